"""Whatever comes in, it is read or refused in one line; nothing else is ever raised."""

import contextlib
import io
import os
import random
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import willows_kd as kd
from willows_kd import corpus
from willows_kd.cli import distill as commands
from willows_kd.cli import main, parse
from willows_kd.scale.checkpoints import Checkpoints
from willows_kd.texts import parse_text

pytestmark = pytest.mark.slow

EXAMPLES = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "200")), deadline=None, derandomize=True
)

# What headings, licences, encodings and line ends are told by, and what looks like them.
FRAGMENTS = [
    *("CHAPTER I", "Chapter 2", "I.", "II. THE OPEN ROAD", "III", "iv.", "12.", "1", "XIIII."),
    *("*** START OF THE PROJECT GUTENBERG EBOOK ***", "*** END OF THE BOOK ***", "* * *"),
    *("[Illustration: a toad]", "[Pg 12]", "{99}", "_rat_", "__", "_", "I said so.", "Mole"),
    *("\n", "\n\n", "\r\n", "\r", "\t", " ", "   \n  ", "\f", "\v", "\x1a", "\0", "\ufeff"),
    *("\u2028", "\x85", "\xa0", "é", "ß", "İ", "ﬁ", "☃", "🐀", "שלום", "a" * 130, "<b>&amp;"),
    *("---\n", "title: a\n"),
]
texts = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=20), max_size=40).map("".join)
codecs = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"])
encoded = st.builds(lambda text, codec: text.encode(codec, "ignore"), texts, codecs)


def cut_and_changed(raw: bytes, seed: int) -> bytes:
    """A file that was damaged on its way."""
    draw = random.Random(seed)
    raw = bytearray(raw[: draw.randrange(len(raw) + 1)])
    for _ in range(draw.randrange(4) if raw else 0):
        raw[draw.randrange(len(raw))] = draw.randrange(256)
    return bytes(raw)


damaged = st.builds(cut_and_changed, encoded, st.integers(0, 2**32))


def one_line(error: Exception) -> bool:
    return "\n" not in str(error) and len(str(error)) > 10


@EXAMPLES
@given(st.binary(max_size=400) | encoded | damaged)
def test_any_file_is_a_corpus_or_refused(raw):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.txt"
        path.write_bytes(raw)
        try:
            book = kd.load_corpus(path)
        except kd.InputError as error:
            assert one_line(error)
            return
    assert book.text.strip()
    parts = kd.split(book)
    held = [p for part in vars(parts).values() for text in part for p in text.split()]
    whole = book.text.split()
    if max(map(len, whole)) <= len(book.text) // 10:  # no word is longer than a part
        assert held == whole  # each once, in order
    assert "".join(held) == "".join(whole)


@EXAMPLES
@given(texts)
def test_any_text_is_cleaned_and_nothing_is_made_up(raw):
    try:
        book = parse_text(raw, "title", "somewhere")
    except kd.InputError as error:
        assert one_line(error)
        return
    assert all(book.texts)
    assert set("".join(book.texts)) <= set(raw) | {" ", "\n"}


@EXAMPLES
@given(texts.filter(str.strip), st.integers(2, 9))
def test_any_text_is_packed_or_refused(tokenizer, raw, block_size):
    book = corpus.Corpus("t", "somewhere", (raw,))
    try:
        blocks = kd.pack(book, tokenizer, block_size)
    except kd.InputError as error:
        assert one_line(error)
        return
    for part in (blocks.train, blocks.validation, blocks.test):
        assert part.dtype == torch.long and part.shape[1] == block_size and len(part)
        assert part.min() >= 0 and part.max() < len(tokenizer)


NAMES = list(kd.DistillConfig.__dataclass_fields__)
values = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["forward_kl", "float32", 10**400, -0.0, 1e-320, b"2", [], 2 + 0j])
)


@EXAMPLES
@given(st.dictionaries(st.sampled_from(NAMES), values, max_size=4))
def test_any_settings_are_kept_as_they_are_or_refused(changes):
    try:
        config = kd.DistillConfig(**changes)
    except kd.InputError as error:
        assert one_line(error)
        assert any(str(error).startswith(name) for name in changes)
    else:
        assert {name: getattr(config, name) for name in changes} == changes


OPTIONS = ["--epochs", "--temperature", "--alpha", "--layers", "--device", "--dtype", "--seed"]
OPTIONS += ["--model_dir", "--output_dir", "--resume", "--overwrite", "--checkpoint_minutes", "-h"]
words = st.sampled_from([*OPTIONS, "distill", "1", "0", "-1", "nan", "cpu", "--", "-", "=", ""])


@EXAMPLES
@given(st.lists(words | st.text(max_size=6), max_size=6), st.booleans())
def test_any_command_line_is_understood_or_refused(arguments, named):
    arguments = ["distill", *arguments] if named else arguments
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(commands, "distill_to_directory", lambda options, config: 0)
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = stop.code
    assert code in (0, 2)
    assert "Traceback" not in err.getvalue()
    if code == 2:
        assert err.getvalue().startswith("error: ")
        assert one_line(err.getvalue().removesuffix("\n"))
    elif not out.getvalue():
        assert parse(arguments).command == "distill"


@EXAMPLES
@given(st.binary(max_size=300))
def test_any_file_is_no_checkpoint(raw):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "step_00000001.safetensors").write_bytes(raw)
        assert Checkpoints(folder).newest() is None
