"""Reading: bytes and tables to texts, texts to splits, splits to blocks with their masks."""

import codecs
import copy
import hashlib
import json
import re

import datasets
import huggingface_hub
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

import willows_kd as kd
from willows_kd.corpus import PIECE, split, tokenize
from willows_kd.sources import load
from willows_kd.sources.chats import tokenize_chats
from willows_kd.sources.tables import READERS, Rows, quiet_datasets
from willows_kd.texts import LONGEST_WRAPPED_LINE, WILLOWS, decode, parse_text

ROMAN = ["I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X", "XI", "XII"]
# the first and last titles tell the book; those between, and all the words, are our own
WILLOWS_TITLES = ["THE RIVER BANK", *(f"TITLE {n}" for n in ROMAN[1:11]), "THE RETURN OF ULYSSES"]

# the same examples in every run, and no clock
repeatable = settings(derandomize=True, deadline=None, max_examples=50)


@pytest.fixture(autouse=True)
def own_tables(tmp_path_factory, monkeypatch):
    """Tables are not mapped into the user's cache."""
    folder = tmp_path_factory.mktemp("tables")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder))


def parse(text: str) -> kd.Corpus:
    return parse_text(text, "file-name", "a test")


def corpus_of(texts: list, skipped: int = 0) -> kd.Corpus:
    return kd.Corpus("A test", "a test", tuple(texts), skipped)


@pytest.mark.parametrize(
    ("mark", "codec", "named"),
    [
        (b"", "utf-8", None),
        (codecs.BOM_UTF8, "utf-8", None),
        (codecs.BOM_UTF16_LE, "utf-16-le", None),
        (codecs.BOM_UTF16_BE, "utf-16-be", None),
        (b"", "cp1252", "cp1252"),
    ],
)
def test_utf8_and_marked_utf16_are_read_and_another_encoding_if_it_is_named(mark, codec, named):
    text = "‘Ho!’ cried the\nnaïve badger.\n\n“So late?” — it was.\n"
    for line_end in ("\n", "\r\n", "\r"):
        raw = mark + text.replace("\n", line_end).encode(codec)
        assert decode(raw, "a file", named) == text


# -- text to chapters ------------------------------------------------------------------

LONG_LINE = "word " * (LONGEST_WRAPPED_LINE // 5) + "word"


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("One\nday it\nrained.", "One\n\nday it\n\nrained."),  # no blank line
        ("One\nday.\n \t\nIt\nrained.", "One day.\n\nIt rained."),  # wrapped by hand
        ("  One  day\nit\train_ed.\n\nSo.", "One day it rain_ed.\n\nSo."),
        ("So:\n\n  One\n    Two,\n\nand sat\ndown.", "So:\n\nOne\nTwo,\n\nand sat down."),  # verse
        ("One.\n\n[Illustration: A\n\nbed]\n\n * * *\n\nTwo {12}.", "One.\n\nTwo ."),
        ("It was _very_ wet, _far\ntoo_ wet.\n\nSo.", "It was very wet, far too wet.\n\nSo."),
        (f"{'a' * LONGEST_WRAPPED_LINE}\nb\n\nSo.", f"{'a' * LONGEST_WRAPPED_LINE} b\n\nSo."),
        (f"One.\n\n_{LONG_LINE}_\nTwo.", f"One.\n\n{LONG_LINE}\n\nTwo."),
        ("I. FOG\n\nSo.\n\nII. RAIN\n\nSo.", "I. FOG\n\nSo.\n\nII. RAIN\n\nSo."),
    ],
)
def test_text_is_cleaned_and_is_one_text(raw, clean):
    assert (parse(raw).title, parse(raw).texts) == ("file-name", (clean,))


START = "*** START OF THE PROJECT GUTENBERG EBOOK A BOOK ***"
END = "*** END OF THE PROJECT GUTENBERG EBOOK A BOOK ***"


def willows(heading: str = "{roman}. {title}", titles=WILLOWS_TITLES) -> str:
    """A text with the headings of the book; its last chapter is as long as all the others."""
    return "\n\n".join(
        heading.format(n=n, roman=ROMAN[n - 1], title=title)
        + f"\n\nWords of chapter <{n}>." * (12 if n == 12 else 1)
        for n, title in enumerate(titles, start=1)
    )


CONTENTS = "".join(f"{n}. {title}\n\n" for n, title in enumerate(WILLOWS_TITLES, start=1))


@pytest.mark.parametrize(
    "raw",
    [
        f"Licence.\n{START}\n\n\nTHE BOOK\n\n{CONTENTS}{willows()}\n\n{END}\nLicence.",
        f"{willows('CHAPTER {n}.  {title}')}\n\n{END.replace('*** ', '***')}\nLicence.",
    ],
)
def test_the_book_is_split_by_chapter_and_its_front_left_out(raw):
    corpus = parse(raw)
    assert corpus.title == WILLOWS
    assert "Licence" not in corpus.text and "BOOK" not in corpus.text and "TITLE" not in corpus.text
    for name, wanted in {"train": range(1, 11), "validation": [11], "test": [12]}.items():
        found = getattr(split(corpus), name)
        texts = "\n\n".join(found)
        assert [f"<{n}>" in texts for n in range(1, 13)] == [n in wanted for n in range(1, 13)]
        assert len(found) == len(wanted)


@pytest.mark.parametrize("titles", [WILLOWS_TITLES[:11], [*WILLOWS_TITLES[1:], "MORE"]])
def test_a_part_of_the_book_is_not_the_book(titles):
    assert len(parse(willows(titles=titles)).texts) == 1


def test_surplus_blank_lines_are_counted_and_marks_within_a_line_are_text():
    corpus = parse(f"It said {START} and {END}.\n\n\n \nTwo.\n\nThree.")
    assert corpus.skipped == 2
    assert corpus.text == f"It said {START} and {END}.\n\nTwo.\n\nThree."


# -- where the text comes from ---------------------------------------------------------


def test_the_first_source_that_can_be_had_is_read(story, tmp_path, monkeypatch, capsys):
    def write(path, name: str):
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"This is the {name}.\n\nIt rained.")
        return path

    monkeypatch.setattr(load, "download_book", lambda url: pytest.fail("asked the network"))
    write(load.cache_folder() / "wind_in_the_willows.txt", "cache")
    for source in (None, "willows"):
        assert kd.load_corpus(source).text == "This is the cache.\n\nIt rained."
    variable = write(tmp_path / "b.txt", "variable")
    monkeypatch.setenv("WILLOWS_KD_CORPUS", str(variable))
    corpus = kd.load_corpus()
    assert corpus.text == "This is the variable.\n\nIt rained."
    assert corpus.provenance == f"{variable} (WILLOWS_KD_CORPUS)"
    path = write(tmp_path / "a.txt", "path")
    assert kd.load_corpus(path) == kd.Corpus("a", str(path), ("This is the path.\n\nIt rained.",))
    assert kd.load_corpus("sample") == story
    assert capsys.readouterr() == ("", "")


def test_without_the_book_the_story_is_read_and_said_or_the_book_alone_refused(story, capsys):
    assert kd.load_corpus() == story
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and not err
    assert "a test tried to look up" in out and "sample story" in out
    with pytest.raises(kd.InputError, match="a test tried.*WILLOWS_KD_CORPUS"):
        kd.load_corpus("willows")
    assert capsys.readouterr() == ("", "")


def test_the_sample_story_is_what_the_stored_results_were_measured_on(story, tokenizer):
    assert len(story.texts) == 12 and story.title == "THE KETTLE ON LAMMAS DOWN"
    found = {}
    for name, texts in vars(split(story)).items():
        ids = tokenize(texts, tokenizer)
        found[name] = len(ids), hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]
    assert found == {
        "train": (25123, "4c81d54f50f19393"),
        "validation": (3174, "038cb735a433f97b"),
        "test": (3194, "8c70386982678be8"),
    }


# -- tables ----------------------------------------------------------------------------

TEXTS = {"a": "It rained,\r\n\r\nso.", "b": None, "c": " ", "d": "NA"}
ROWS = [{"id": name, "text": text} for name, text in TEXTS.items()]
CHAT = [{"role": "user", "content": "Rain?"}, {"role": "assistant", "content": "So."}]


@pytest.fixture
def write_rows(tmp_path):
    """A function that writes a file of rows in the format of its name, or any text."""

    def write(name: str, rows: list | str, encoding: str = "utf-8"):
        path = tmp_path / name
        if isinstance(rows, str):
            path.write_bytes(rows.encode(encoding))
            return path
        table, kind = datasets.Dataset.from_list(rows), READERS[path.suffix]
        settings = {"csv": {"sep": "\t" if path.suffix == ".tsv" else ",", "index": False}}
        with quiet_datasets():
            getattr(table, f"to_{kind}")(path, **settings.get(kind, {}))
        return path

    return write


@pytest.mark.parametrize("name", ["a[1].jsonl", "a.csv", "a.TSV", "a.parquet"])
def test_each_row_of_a_table_is_a_text(name, write_rows, capfd):
    path = write_rows(name.lower(), ROWS)
    path = path.rename(path.with_name(name))
    corpus = kd.load_corpus(path)
    assert [*corpus.texts] == ["It rained,\n\nso.", "NA"]
    assert (corpus.title, corpus.provenance, corpus.skipped) == (path.stem, str(path), 2)
    assert kd.load_corpus(path, text_column="id").text == "a\n\nb\n\nc\n\nd"
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()  # as it was


def test_rows_are_read_from_the_disk_and_none_is_in_two_splits(write_rows):
    texts = [f"Row {n}." for n in range(25)]
    corpus = kd.load_corpus(write_rows("a.jsonl", [{"text": text} for text in texts]))
    parts = split(corpus)
    for part in (corpus.texts, parts.train, parts.test):
        assert isinstance(part, Rows) and not isinstance(part.table, list)
    found = [[*parts.train], [*parts.validation], [*parts.test]]
    assert found == [texts[:21], texts[21:23], texts[23:]]


def test_a_table_has_the_encodings_of_a_text(write_rows):
    text = "id,text\n1,Дождь.\n"
    assert kd.load_corpus(write_rows("a.csv", "\ufeff" + text, "utf-16-le")).text == "Дождь."
    path = write_rows("a.csv", text, "cp1251")
    assert kd.load_corpus(path, encoding="cp1251").text == "Дождь."


def test_a_name_on_the_hub_is_loaded_by_datasets_if_the_hub_answers(monkeypatch):
    asked = []

    def dataset_info(self, name, timeout):
        asked.append(name)
        if name == "nobody/rain":
            raise ConnectionError("no\nroute")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    rows = datasets.Dataset.from_list(ROWS)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows)
    corpus = kd.load_corpus("nobody/fog-1.5")
    assert (corpus.text, corpus.provenance) == ("It rained,\n\nso.\n\nNA", "nobody/fog-1.5")
    with pytest.raises(kd.InputError, match=r"as a data set of the hub \(no route\)"):
        kd.load_corpus("nobody/rain")
    assert asked == ["nobody/fog-1.5", "nobody/rain"]


# -- texts to splits -------------------------------------------------------------------


def test_another_text_is_split_where_paragraphs_end():
    texts = ["\n\n".join(f"Paragraph {n}{i}." for i in range(5)) for n in range(4)]
    splits = split(corpus_of(texts))
    assert splits.train == [*texts[:3], "Paragraph 30."]
    assert splits.validation == ["Paragraph 31.\n\nParagraph 32."]
    assert splits.test == ["Paragraph 33.\n\nParagraph 34."]
    splits = split(corpus_of(["\n\n".join(["x" * 52, *["x" * 10] * 19])]))  # the nearest one
    assert [len(part[0].split("\n\n")) for part in vars(splits).values()] == [15, 3, 2]


def test_a_text_of_one_paragraph_is_split_between_words():
    splits = split(corpus_of(["word " * 99 + "word"]))
    parts = [texts[0] for texts in vars(splits).values()]
    assert [len(part.split()) for part in parts] == [80, 10, 10]
    assert {word for part in parts for word in part.split()} == {"word"}


@repeatable
@given(st.lists(st.lists(st.text("abc", min_size=1), min_size=1, max_size=6), min_size=1))
def test_a_split_loses_nothing_and_holds_out_the_end(book):
    paragraphs = [paragraph for text in book for paragraph in text]
    splits = vars(split(corpus_of(["\n\n".join(text) for text in book]))).values()
    parts = [[p for text in part for p in text.split("\n\n")] for part in splits]
    total = len("\n\n\n".join("\n\n".join(text) for text in book))
    longest = max(map(len, paragraphs))
    if longest <= total / 10:  # none is so long that it is cut
        assert sum(parts, []) == paragraphs
    assert "".join(sum(parts, [])) == "".join(paragraphs)
    train, validation, _ = (sum(map(len, part)) + 2 * len(part) for part in parts)
    assert abs(train - 0.8 * total) <= longest + 2 * len(paragraphs)
    assert abs(train + validation - 0.9 * total) <= longest + 2 * len(paragraphs)


# -- splits to blocks ------------------------------------------------------------------


def with_first_token(tokenizer):
    """A tokenizer that begins every text with a token of its own, as Llama's does."""
    changed = copy.deepcopy(tokenizer)
    begin = changed.convert_ids_to_tokens(7)
    changed.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, 7)]
    )
    return changed


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("block_size", [2, 7, 20])
def test_no_token_is_lost(block_size, first, story, tokenizer):
    corpus = corpus_of([text[:900] for text in story.texts])
    own = with_first_token(tokenizer) if first else tokenizer
    packed = kd.pack(corpus, own, block_size)
    assert packed.first_token == (7 if first else None) and packed.masks == {}
    for name, parts in vars(split(corpus)).items():
        tokens = tokenize(parts, own)
        assert tokenizer.decode(tokens) == tokenizer.eos_token.join(parts)
        assert tokens.tolist().count(tokenizer.eos_token_id) == len(parts) - 1

        blocks, left = getattr(packed, name), packed.remainder[name]
        assert blocks.dtype == torch.int64
        assert blocks.shape == (len(tokens) // (block_size - first), block_size)
        assert not first or (blocks[:, 0] == 7).all()
        assert torch.equal(blocks[:, first:].flatten(), tokens[: len(tokens) - left])
    assert packed.block_size == block_size


def test_texts_stand_apart_where_there_is_an_end_of_text_token(story, tokenizer):
    without = copy.deepcopy(tokenizer)
    without.eos_token = None
    texts = [story.text, "So."]  # the first is tokenized in pieces
    first, second = (tokenizer(text, verbose=False)["input_ids"] for text in texts)
    assert tokenize(texts, tokenizer).tolist() == [*first, tokenizer.eos_token_id, *second]
    assert tokenize(texts, without).tolist() == [*first, *second]
    assert tokenize([], tokenizer).tolist() == []


@repeatable
@given(
    st.lists(st.sampled_from([*"ab.,'’é ", " \n", "\n\n", "\t", "the mole", "1908"]), max_size=60),
    st.integers(1, 12),
)
def test_a_long_text_that_is_cut_has_the_tokens_of_the_whole(tokenizer, words, longest):
    text = "".join(words)
    assert "100000" in PIECE.pattern
    cut = re.compile(PIECE.pattern.replace("100000", str(longest)), PIECE.flags)
    pieces = cut.findall(text)
    assert "".join(pieces) == text and all(len(piece) <= longest for piece in pieces)
    found = [i for piece in pieces for i in tokenizer(piece)["input_ids"]]
    if all(piece[:1].isspace() for piece in pieces[1:]):  # no word was longer than a piece
        assert found == tokenizer(text)["input_ids"]
    else:
        assert tokenizer.decode(found) == text


def test_a_block_is_as_long_as_the_models_positions(story, tokenizer):
    assert kd.pack(story, tokenizer).block_size == 256
    changed = copy.deepcopy(tokenizer)
    changed.model_max_length = 10**30
    assert kd.pack(story, changed).block_size == 1024


# -- chats -----------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def with_template(tokenizer, template: str | None = TEMPLATE):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def chats(row: dict) -> kd.Corpus:
    """Twelve times the same row."""
    return kd.Corpus(
        "a",
        "a",
        Rows(datasets.Dataset.from_list([row] * 12)),
        in_rows=True,
        tokenize=tokenize_chats,
    )


def answers(blocks: kd.Blocks, tokenizer, name: str = "train") -> str:
    """The text that counts in a split."""
    return tokenizer.decode(getattr(blocks, name)[blocks.masks[name]])


@pytest.mark.parametrize("first", [False, True])
def test_exactly_the_completion_and_its_end_count(first, tokenizer):
    own = with_first_token(tokenizer) if first else tokenizer
    corpus = chats({"prompt": "Rain?", "completion": " So it was."})
    blocks = kd.pack(corpus, own, 16)
    asked, said = (tokenizer(text)["input_ids"] for text in ("Rain?", " So it was."))
    begin, end = [7] * first, tokenizer.eos_token_id
    pads = 16 - len(begin + asked + said) - 1
    assert blocks.train[0].tolist() == [*begin, *asked, *said, *[end] * (1 + pads)]
    counted = [False] * len(begin + asked) + [True] * (len(said) + 1) + [False] * pads
    assert blocks.masks["train"][0].tolist() == counted
    assert torch.equal(kd.pack(corpus, own, 16 - pads).train, blocks.train[:, : 16 - pads])
    assert [len(part) for part in (blocks.train, blocks.validation, blocks.test)] == [10, 1, 1]
    assert set(blocks.remainder.values()) == {0}


def test_a_long_chat_goes_on_in_blocks_of_its_own(tokenizer):
    row = {"prompt": "Rain?", "completion": " It rained and rained."}
    blocks = kd.pack(chats(row), tokenizer, 4)
    whole = blocks.train.view(10, -1)
    assert whole.shape[1] > 4 and all(torch.equal(row, whole[0]) for row in whole)
    assert answers(blocks, tokenizer) == 10 * (" It rained and rained." + tokenizer.eos_token)


def test_every_answer_of_a_chat_counts_and_nothing_of_its_form(tokenizer):
    own, end = with_template(tokenizer), tokenizer.eos_token
    more = CHAT + [CHAT[0], {"role": "assistant", "content": "Yes."}]
    blocks = kd.pack(chats({"messages": more}), own, 64)
    assert answers(blocks, own, "test") == f"So.{end}Yes.{end}"
    form = f"user: Rain?{end}\nassistant: So.{end}\nuser: Rain?{end}\nassistant: Yes.{end}"
    assert tokenizer.decode(blocks.test[0]).startswith(form)
    assert tokenizer.decode(blocks.test[0]).removeprefix(form).replace(end, "") == ""


def test_a_first_token_that_a_template_writes_stands_once(tokenizer):
    template = '{{ "' + tokenizer.decode([7]) + '" }}' + TEMPLATE
    own = with_first_token(with_template(tokenizer, template))
    blocks = kd.pack(chats({"messages": CHAT}), own, 64)
    assert blocks.train[0].tolist().count(7) == 1 and blocks.train[0, 0] == 7


def test_rows_without_an_answer_are_skipped_and_a_column_can_be_named(write_rows):
    rows = [{"prompt": "Rain?", "completion": text} for text in ["So.", "", None, "No."]]
    path = write_rows("a.jsonl", "\n".join(map(json.dumps, rows)))
    corpus = kd.load_corpus(path)
    assert [row["completion"] for row in corpus.texts] == ["So.", "No."] and corpus.skipped == 2
    assert kd.load_corpus(path, text_column="completion").text == "So.\n\nNo."
