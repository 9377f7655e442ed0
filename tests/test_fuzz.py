"""Whatever comes in, it is read or refused in one line; nothing else is ever raised."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import willows_kd as kd
from willows_kd.cli import distill as commands
from willows_kd.cli import main

pytestmark = pytest.mark.slow

EXAMPLES = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "200")),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

# What headings, licences, encodings and line ends are told by, and what looks like them.
FRAGMENTS = [
    *("CHAPTER I", "Chapter 2", "I.", "II. THE OPEN ROAD", "12.", "*** END OF THE BOOK ***"),
    *("[Illustration: a toad]", "[Pg 12]", "_rat_", "__", "I said so.", "a" * 130, "<b>&amp;"),
    *("\n", "\n\n", "\r\n", "\r", "\t", " ", "\f", "\x1a", "\0", "\ufeff", "\u2028", "\x85"),
    *("é", "İ", "ﬁ", "🐀", "שלום", "---\n", "title: a\n"),
]
texts = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=20), max_size=40).map("".join)
codecs = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252"])
encoded = st.builds(lambda text, codec: text.encode(codec, "ignore"), texts, codecs)


def one_line(error: Exception) -> bool:
    return "\n" not in str(error) and len(str(error)) > 10


@EXAMPLES
@given(st.binary(max_size=400) | encoded)
def test_any_file_is_a_corpus_or_refused(tmp_path: Path, raw):
    path = tmp_path / "text.txt"
    path.write_bytes(raw)
    try:
        book = kd.load_corpus(path)
    except kd.InputError as error:
        assert one_line(error)
        return
    held = [p for part in vars(kd.split(book)).values() for text in part for p in text.split()]
    assert "".join(held) == "".join(book.text.split())  # each word once, in order


OPTIONS = ["--epochs", "--temperature", "--alpha", "--layers", "--device", "--model_dir", "-h"]
OPTIONS += ["--output_dir", "--resume", "--overwrite", "distill", "1", "-1", "nan", "--", "=", ""]


@EXAMPLES
@given(st.lists(st.sampled_from(OPTIONS) | st.text(max_size=6), max_size=6))
def test_any_command_line_is_understood_or_refused(capsys, monkeypatch, arguments):
    monkeypatch.setattr(commands, "distill_to_directory", lambda options, config: 0)
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    shown = capsys.readouterr().err
    assert code in (0, 2)
    if code == 2:
        assert shown.startswith("error: ")
        assert one_line(shown.removesuffix("\n"))
