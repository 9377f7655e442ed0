"""Reading a book: bytes to text, text to chapters, chapters to splits, splits to blocks."""

import codecs
import copy
import gzip
import json
import textwrap

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import willows_kd as kd
from willows_kd import corpus as corpus_file
from willows_kd import gutenberg
from willows_kd.chapters import roman
from willows_kd.corpus import (
    FRONT_MATTER_LIMIT,
    LENGTH_OF_A_BOOK,
    LONGEST_WRAPPED_LINE,
    decode,
    is_willows,
    parse_book,
    read_book,
    split,
    tokenize,
)
from willows_kd.models import BUNDLED_TEACHER

ROMAN = ["I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X", "XI", "XII"]
# the first and last titles tell the book; those between, and all the words, are our own
WILLOWS_TITLES = ["THE RIVER BANK", *(f"TITLE {n}" for n in ROMAN[1:11]), "THE RETURN OF ULYSSES"]

# the same examples in every run, and no clock
repeatable = settings(derandomize=True, deadline=None, max_examples=50)


def parse(text: str) -> kd.Corpus:
    return parse_book(text, "file-name", "a test")


def chapters(text: str) -> list[tuple[str, str]]:
    return [(chapter.title, chapter.text) for chapter in parse(text).chapters]


def corpus_of(texts: list[str], skipped: int = 0) -> kd.Corpus:
    found = (kd.Chapter(n, f"Title {n}", text) for n, text in enumerate(texts, start=1))
    return kd.Corpus("A test", "a test", tuple(found), skipped)


# -- bytes to text ---------------------------------------------------------------------


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize(
    ("mark", "codec"),
    [
        (b"", "utf-8"),
        (codecs.BOM_UTF8, "utf-8"),
        (b"", "utf-16-le"),
        (b"", "utf-16-be"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (b"", "cp1252"),
    ],
    ids=lambda value: value if isinstance(value, str) else "BOM" if value else "plain",
)
def test_text_is_decoded_whatever_its_encoding_and_line_ends(mark, codec, line_end):
    text = "‘Ho!’ cried the naïve badger.\n\n“So late?” — it was.\n"
    assert decode(mark + text.replace("\n", line_end).encode(codec)) == text


def test_marks_of_files_are_no_text():
    assert decode("One.\n\ufeffTwo.\n\x1a".encode(), encoding="utf-8") == "One.\nTwo.\n"


RUSSIAN = "Крот трудился всё утро. "
FRENCH = "« L’été, où naît la forêt », dit-il — ça ira, très élégant, n’est-ce pas ? "


@pytest.mark.parametrize(
    ("text", "encoding", "warned"),
    [
        (RUSSIAN, "cp1251", True),
        (RUSSIAN, "koi8-r", True),
        ("鼹鼠整个上午都在努力工作，", "gbk", True),
        ("It’s ‘so’. é", "utf-8", True),  # with a byte that is not
        (FRENCH, "cp1252", False),
        (RUSSIAN, "utf-8", False),
    ],
)
def test_text_that_looks_wrong_is_warned_of_once_unless_its_encoding_is_named(
    text, encoding, warned, recwarn
):
    raw = (text * 5).encode(encoding)
    decode(raw + (b"\xe9" if "é" in text and encoding == "utf-8" else b""), "my_file")
    messages = [str(warning.message) for warning in recwarn]
    assert len(messages) == warned
    assert all("my_file" in message and "--encoding" in message for message in messages)
    recwarn.clear()
    assert decode(raw, encoding=encoding) == text * 5
    assert not recwarn


@pytest.mark.parametrize(
    ("encoding", "problem"),
    [("utf-8", "not text in utf-8"), ("cp1", "'cp1' is no known"), ("hex", "'hex' is no known")],
)
def test_an_encoding_that_does_not_fit_is_refused(encoding, problem):
    with pytest.raises(kd.InputError, match=problem):
        decode(RUSSIAN.encode("cp1251"), encoding=encoding)


@pytest.mark.parametrize(
    "raw",
    [
        bytes(1_000),
        bytes(range(256)),
        b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\x01\x00",
        gzip.compress(b"It rained.", mtime=0),
        (BUNDLED_TEACHER / "model.safetensors").read_bytes(),
        codecs.BOM_UTF16_LE + b"\x41",
    ],
    ids=["zeros", "every byte", "a picture", "an archive", "weights", "half a character"],
)
def test_what_is_not_text_is_refused(raw):
    with pytest.raises(kd.InputError, match="my_file is not text"):
        decode(raw, "my_file")


# -- text to chapters ------------------------------------------------------------------

LONG_LINE = "word " * (LONGEST_WRAPPED_LINE // 5) + "word"


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        pytest.param("One\nday it\nrained.", "One\n\nday it\n\nrained.", id="no blank line"),
        pytest.param("One\nday.\n\nIt\nrained.", "One day.\n\nIt rained.", id="hard wraps"),
        pytest.param("One.\n \t\nTwo.", "One.\n\nTwo.", id="blank line of spaces"),
        pytest.param("One  day  it\trained.", "One day it rained.", id="runs of spaces"),
        pytest.param(
            "He sang:\n\n  One for the hill,\n    Two for the mill,\n\nand sat\ndown.",
            "He sang:\n\nOne for the hill,\nTwo for the mill,\n\nand sat down.",
            id="verse",
        ),
        pytest.param("  One day\nit rained.\n\nSo.", "One day it rained.\n\nSo.", id="indent"),
        pytest.param("One.\n\n[Illustration]\n\nTwo.", "One.\n\nTwo.", id="picture"),
        pytest.param(
            "One.\n\n[Illustration: A badger\n\nin bed]\n\nTwo.", "One.\n\nTwo.", id="caption"
        ),
        pytest.param("One.\n\n  *    *    *\n\nTwo.", "One.\n\nTwo.", id="spaced asterisks"),
        pytest.param("One.\n\n*****\n\nTwo.", "One.\n\nTwo.", id="asterisks"),
        pytest.param("One.\n\n· · ·\n\nTwo.", "One.\n\nTwo.", id="dots"),
        pytest.param("One {12}day [Pg 13] it rained.", "One day it rained.", id="page numbers"),
        pytest.param(
            "It was _very_ wet, _far\ntoo_ wet.\n\nSo.",
            "It was very wet, far too wet.\n\nSo.",
            id="emphasis",
        ),
        pytest.param("Call it my_own_name.", "Call it my_own_name.", id="underscores in a word"),
        pytest.param(
            f"One.\n\n{LONG_LINE}\nTwo.", f"One.\n\n{LONG_LINE}\n\nTwo.", id="over-long line"
        ),
        pytest.param(
            f"One.\n\n_{LONG_LINE}_", f"One.\n\n{LONG_LINE}", id="emphasis in an over-long line"
        ),
    ],
)
def test_text_is_cleaned(raw, clean):
    assert parse(raw).text == clean


@pytest.mark.parametrize(
    "raw", ["", " \n\n\t\n", "[Illustration]\n\n* * *", "I. SPRING\n\nII. FOG"]
)
def test_a_text_with_nothing_to_learn_from_is_refused(raw):
    with pytest.raises(kd.InputError, match="a test holds no text"):
        parse(raw)


@pytest.mark.parametrize(("length", "kept"), [(FRONT_MATTER_LIMIT, 0), (FRONT_MATTER_LIMIT + 1, 1)])
def test_a_preface_is_a_chapter_if_it_is_long(length, kept):
    preface = "x" * (length - 1) + "."
    book = parse(f"BY NOBODY\n\n{preface}\n\nCONTENTS\n\nI. SPRING\n\nIt rained.\n\nII. FOG\n\nSo.")
    expected = [("SPRING", "It rained."), ("FOG", "So.")]
    assert [(c.title, c.text) for c in book.chapters] == [("file-name", preface)][:kept] + expected
    assert [c.number for c in book.chapters] == list(range(1, kept + 3))
    assert book.title == ("file-name" if kept else "BY NOBODY")


SEASONS = ["The Wet Spring", "The Dry Summer", "The Fog"]
TEXT = "It was _very_ wet that year, said the badger. " * 5 + "So he went to bed."


def book_of(headings: list[str], front: str = "") -> str:
    """A book with some text below each heading."""
    return front + "\n\n".join(f"{heading}\n\n{TEXT}\n\n{TEXT}" for heading in headings)


@pytest.mark.parametrize(
    ("style", "titles"),
    [
        ("{roman}. {upper}", "{upper}"),
        ("{n}.  {title}", "{title}"),
        ("  {roman}.   {title}  ", "{title}"),
        ("0{n} {title}", "{title}"),
        ("CHAPTER {roman}--{upper}", "{upper}"),
        ("Chapter {n}: {title}", "{title}"),
        ("Chapter {roman}. {lower}.", "{lower}."),
        ("Chapter {word}: {title}", "{title}"),
        ("ADVENTURE {roman}. {upper}", "{upper}"),
        ("CHAPTER {n}\n{upper}", "{upper}"),
        ("{n}\n\n{title}", "{title}"),
        ("CHAPTER {roman}.\n\n“{title}”", "“{title}”"),
        ("_THE {ordinal} CHAPTER_\n\n_{upper}_", "{upper}"),
        ("CHAPTER {roman}", "CHAPTER {roman}"),
        ("{n}", "{n}"),
        ("{roman}.", "{roman}."),
    ],
)
def test_headings_of_every_style_begin_chapters(style, titles):
    names = ("n", "roman", "word", "ordinal", "title", "upper", "lower")
    words, ordinals = ["ONE", "TWO", "THREE"], ["FIRST", "SECOND", "LAST"]
    cases = [SEASONS, [t.upper() for t in SEASONS], [t.lower() for t in SEASONS]]
    columns = zip(range(1, 4), ROMAN, words, ordinals, *cases, strict=False)
    forms = [dict(zip(names, column, strict=True)) for column in columns]
    book = parse(book_of([style.format(**form) for form in forms]))
    assert [chapter.title for chapter in book.chapters] == [titles.format(**form) for form in forms]
    assert {chapter.text for chapter in book.chapters} == {f"{TEXT}\n\n{TEXT}".replace("_", "")}


@pytest.mark.parametrize(
    ("headings", "found"),
    [
        pytest.param("1. A|2. B|4. D|5. E", "A B D E", id="one is missing"),
        pytest.param("1. A|2. B|2. C|4. D", "A B C D", id="a number printed twice"),
        pytest.param("1. A|2. B|1. C|2. D", "A B C D", id="parts begin again"),
        pytest.param("CHAPTER I. A|CHAPTER II. B|CHAPTER I. C", "A B C", id="a wrong number"),
        pytest.param("1. A|2. B|9. I|3. C", "A B C", id="one far off"),
        pytest.param("ADVENTURE I. A|I|II|ADVENTURE II. B|III. C", "A B C", id="two series"),
        pytest.param("Chapter 1. A|1|2|3|4|Chapter 2. B", "A B", id="page numbers"),
        pytest.param("I. A", "", id="a number alone counts nothing"),
    ],
)
def test_the_series_that_counts_furthest_is_the_chapters(headings, found):
    book = parse(book_of(headings.split("|")))
    assert [c.title for c in book.chapters] == (found.split() or ["file-name"])
    assert book.text.count("bed") == 2 * len(headings.split("|"))  # what does not count is text


@pytest.mark.parametrize(
    "heading", ["{n}. {upper}", "Chapter {n} {title}", "CHAPTER {n}\n\n{title}"]
)
@pytest.mark.parametrize("between", ["\n  ", "\n\n"], ids=["in one block", "a paragraph each"])
def test_a_contents_page_is_left_out(heading, between):
    forms = [{"n": n, "title": t, "upper": t.upper()} for n, t in enumerate(SEASONS, start=1)]
    headings = [heading.format(**form) for form in forms]
    book = parse(book_of(headings, f"A YEAR\n\n{between.join(['CONTENTS', *headings])}\n\n"))
    assert [chapter.title.title() for chapter in book.chapters] == SEASONS
    assert book.title == "A YEAR"
    assert len(book.text.split()) == 6 * len(TEXT.split())
    assert book.skipped == 0


def test_headings_without_numbers_are_found_by_the_contents_page():
    contents = "\n".join(f"    {title}\n      A Song" for title in SEASONS)
    headings = [f"{title.upper()}.\n\nA Song" for title in SEASONS]
    book = parse(book_of(headings, f"Contents:\n\n{contents}\n\nA YEAR\n\n"))
    assert [chapter.title for chapter in book.chapters] == [f"{t.upper()}." for t in SEASONS]
    assert book.text.count("A Song") == 3


@pytest.mark.parametrize(
    "lines",
    [
        "I. Ho, what a night!|II. Ho, what a day!",
        "I’ll go.|II’ll go.",
        "I went.|I WENT OUT",
        "i. spring|ii. fog",
        "1908|1909",
        "1. wash the pan|2. dry it",
        "Chapter and verse.|Chapter and verse.",
        "IV. THE FOURTH|V. THE FIFTH",
        "I. " + "LONG " * 20 + "|II. " + "LONG " * 20,
    ],
)
def test_a_speech_that_begins_like_a_number_is_no_heading(lines):
    text = "\n\n".join(f"It rained.\n\n{line.strip()}" for line in lines.split("|"))
    assert chapters(text) == [("file-name", text)]


@pytest.mark.parametrize("length", [LENGTH_OF_A_BOOK - 100, LENGTH_OF_A_BOOK + 100])
@pytest.mark.parametrize("headings", [[], ["I. SPRING", "II. FOG"]])
def test_one_line_says_that_a_book_has_no_headings(headings, length, recwarn):
    parse(book_of(headings) + "\n\n" + "It rained. " * (length // 11 + 1))
    said = [str(warning.message) for warning in recwarn]
    assert len(said) == (length > LENGTH_OF_A_BOOK and not headings)
    assert all("no chapter headings" in line and "a test" in line for line in said)


def test_roman_numerals_are_read():
    assert [roman(numeral) for numeral in [*ROMAN, "xl", "XCIX"]] == [*range(1, 13), 40, 99]


def test_skipped_lines_and_chapters_are_counted():
    surplus_lines, empty_chapters = "\n\n", "II. FOG\n\n"
    book = parse(f"I. SPRING\n\n{surplus_lines}It rained.\n\n{empty_chapters}III. SNOW\n\nSo.")
    assert [c.title for c in book.chapters] == ["SPRING", "SNOW"]
    assert book.skipped == 3


words = st.text("abcdefghivxlmé’", min_size=1, max_size=8)
paragraphs_of_words = st.lists(st.lists(words, min_size=1, max_size=30), min_size=1, max_size=4)


@repeatable
@given(
    book=st.lists(paragraphs_of_words, min_size=2, max_size=12),
    width=st.integers(10, LONGEST_WRAPPED_LINE),
    gap=st.integers(1, 3),
    front=st.sampled_from(["", "A TITLE\n\n", "A TITLE\n\nCONTENTS\n  I. THIS\n  II. THAT\n\n"]),
    heading=st.sampled_from(["{roman}. TITLE", "Chapter {number}: A Title", "{roman}"]),
)
def test_no_word_of_a_chapter_is_lost(book, width, gap, front, heading):
    raw, expected = front, []
    for number, paragraphs in enumerate(book, start=1):
        texts = [" ".join(words) for words in paragraphs]
        lines = [heading.format(number=number, roman=ROMAN[number - 1])]
        lines += [textwrap.fill(text, width, break_on_hyphens=False) for text in texts]
        raw += ("\n" * (gap + 1)).join([*lines, ""])
        expected.append("\n\n".join(texts))
    assert [text for _, text in chapters(raw)] == expected


# -- where the book comes from ---------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "there", "read"),
    [
        ("path", "path variable cache", "path"),
        ("sample", "path variable cache", "sample"),
        (None, "path variable cache", "variable"),
        (None, "path cache", "cache"),
        ("willows", "variable cache", "variable"),
        ("willows", "cache", "cache"),
    ],
)
def test_the_first_source_that_can_be_had_is_read(
    source, there, read, story, tmp_path, monkeypatch, capsys
):
    cache = gutenberg.cache_folder() / "wind_in_the_willows.txt"
    cache.parent.mkdir(parents=True)
    files = {"path": tmp_path / "a.txt", "variable": tmp_path / "b.txt", "cache": cache}
    for name in there.split():
        files[name].write_text(f"This is the {name}.\n\nIt rained.")
    if "variable" in there:
        monkeypatch.setenv("WILLOWS_KD_CORPUS", str(files["variable"]))
    monkeypatch.setattr(gutenberg, "download", lambda url: pytest.fail("asked the network"))

    book = kd.load_corpus(files.get(source, source))

    expected = story.text if read == "sample" else f"This is the {read}.\n\nIt rained."
    assert book.text == expected
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def dead_network(monkeypatch):
    def download(url):
        raise gutenberg.DownloadError("the line is dead")

    monkeypatch.setattr(gutenberg, "download", download)


def test_without_the_book_the_sample_story_is_read_and_one_line_says_so(
    dead_network, story, capsys
):
    assert kd.load_corpus() == story
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and not err
    assert "the line is dead" in out and "sample story" in out


def test_the_book_and_nothing_else_is_refused_where_it_cannot_be_had(dead_network, capsys):
    with pytest.raises(kd.InputError, match="the line is dead.*WILLOWS_KD_CORPUS") as caught:
        kd.load_corpus("willows")
    assert "\n" not in str(caught.value)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("through_variable", [False, True], ids=["path", "variable"])
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("missing.txt", "does not exist"),
        ("folder", "is a directory"),
        ("empty.txt", "holds no text"),
        ("zeros.bin", "is not text"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_by_name(
    name, problem, through_variable, tmp_path, monkeypatch
):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.txt").touch()
    (tmp_path / "zeros.bin").write_bytes(bytes(100))
    path = tmp_path / name
    if through_variable:
        monkeypatch.setenv("WILLOWS_KD_CORPUS", str(path))
    with pytest.raises(kd.InputError, match=problem) as caught:
        kd.load_corpus(None if through_variable else path)
    assert name in str(caught.value)


TEXTS = {"a": "It rained.\r\nSo.", "b": None, "c": " ", "d": "1. ЭТО"}
ROWS = [{"id": name, "text": text} for name, text in TEXTS.items()]


@pytest.fixture
def write_rows(tmp_path):
    """A function that writes a file of rows, in the format of its name, or of any text."""

    def write(name: str, rows: list[dict] | str, encoding: str = "utf-8"):
        path = tmp_path / name
        if isinstance(rows, str):
            path.write_text(rows)
        elif path.suffix == ".parquet":
            with corpus_file.quiet_progress():
                datasets.Dataset.from_list(rows).to_parquet(path)
        else:
            lines = [json.dumps(row, ensure_ascii=False) for row in rows]
            path.write_text("\n".join(lines), encoding=encoding)
        return path

    return write


@pytest.mark.parametrize("name", ["a[1].jsonl", "a.json", "a.parquet"])
def test_each_row_of_a_table_is_a_text(name, write_rows, capfd):
    path = write_rows(name, ROWS)
    book = kd.load_corpus(path)
    expected = [("Row 1", "It rained.\nSo."), ("Row 4", "1. ЭТО")]
    assert [(c.title, c.text) for c in book.chapters] == expected
    assert (book.title, book.provenance, book.skipped) == (path.stem, str(path), 2)
    assert kd.load_corpus(path, text_column="id").text == "a\n\nb\n\nc\n\nd"
    assert capfd.readouterr() == ("", "")


def test_an_only_column_of_text_needs_no_name_and_an_encoding_is_honoured(write_rows):
    path = write_rows("a.jsonl", [{"id": 1, "body": "Дождь."}], "cp1251")
    assert kd.load_corpus(path, encoding="cp1251").text == "Дождь."
    with pytest.raises(kd.InputError, match="--encoding"):
        kd.load_corpus(path)


@pytest.mark.parametrize(
    ("name", "rows", "column", "problem"),
    [
        ("a.jsonl", [{"a": "b", "c": "d"}], None, "no column 'text' .* are a, c: .*--text_column"),
        ("a.parquet", ROWS, "body", "no column 'body' .* are id, text: .*--text_column"),
        ("a.jsonl", [{"n": 1, "text": "a"}], "n", "no column 'n' of text"),
        ("a.jsonl", [{"text": " "}], None, "holds no text"),
        ("a.jsonl", [], None, "cannot be read as json"),
        ("a.jsonl", ["a", "b"], None, "cannot be read as json"),
        ("a.jsonl", '{"text": "It rained.', None, "cannot be read as json"),
        ("a.parquet", '{"text": "It rained.', None, "cannot be read as parquet"),
        ("a.txt", ROWS, "text", "has no columns"),
    ],
)
def test_a_table_that_gives_no_such_column_of_text_is_refused(
    name, rows, column, problem, write_rows, capfd
):
    with pytest.raises(kd.InputError, match=problem) as caught:
        kd.load_corpus(write_rows(name, rows), text_column=column)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_file_gives_its_name_and_its_provenance(tmp_path):
    path = tmp_path / "my_story.txt"
    path.write_text("It rained.")
    book = read_book(path)
    assert (book.title, book.provenance) == ("my_story", str(path))


def test_the_sample_story_is_a_book_of_twelve_chapters_but_not_the_book(story):
    assert [chapter.number for chapter in story.chapters] == list(range(1, 13))
    assert all(len(chapter.text.split()) > 1_000 for chapter in story.chapters)
    assert len(story.text.split()) >= 15_000
    assert story.skipped == 0
    assert not is_willows(story)


# -- chapters to splits ----------------------------------------------------------------

PREFACE = "It is said. " * (FRONT_MATTER_LIMIT // 10) + "\n\n"


@pytest.mark.parametrize(
    ("front", "heading"),
    [
        pytest.param("", "{roman}. {title}", id="as Project Gutenberg has it"),
        pytest.param("", "{roman}\n\n{title}", id="title under a bare number"),
        pytest.param(PREFACE, "{roman}. {title}", id="with a long preface"),
    ],
)
def test_the_book_is_split_by_chapter_whoever_made_the_copy(front, heading):
    # a last chapter as long as all the others: a split by length would cut it
    book = front + "\n\n".join(
        heading.format(number=n, roman=ROMAN[n - 1], title=title)
        + f"\n\nWords of chapter <{n}>." * (12 if n == 12 else 1)
        for n, title in enumerate(WILLOWS_TITLES, start=1)
    )
    found = {name: "\n\n".join(texts) for name, texts in vars(split(parse(book))).items()}
    chapters_of = {"train": range(1, 11), "validation": [11], "test": [12]}
    for name, text in found.items():
        expected = [n in chapters_of[name] for n in range(1, 13)]
        assert [f"<{n}>" in text for n in range(1, 13)] == expected, name


@pytest.mark.parametrize("titles", [WILLOWS_TITLES[:11], WILLOWS_TITLES[1:] + ["MORE"]])
def test_a_part_of_the_book_is_not_the_book(titles):
    numbered = enumerate(titles, start=1)
    book = parse("\n\n".join(f"{n}. {title}\n\nWords." for n, title in numbered))
    assert len(book.chapters) == len(titles)
    assert not is_willows(book)


def test_another_text_is_split_where_paragraphs_end():
    texts = ["\n\n".join(f"Paragraph {n}{i}." for i in range(5)) for n in range(4)]
    splits = split(corpus_of(texts))
    assert splits.train == [*texts[:3], "Paragraph 30."]
    assert splits.validation == ["Paragraph 31.\n\nParagraph 32."]
    assert splits.test == ["Paragraph 33.\n\nParagraph 34."]


@repeatable
@given(st.lists(st.lists(st.text("ab c", min_size=1), min_size=1, max_size=6), min_size=1))
def test_a_split_loses_nothing_and_holds_out_the_end(book):
    paragraphs = [paragraph for chapter in book for paragraph in chapter]
    texts = ["\n\n".join(chapter) for chapter in book]
    splits = vars(split(corpus_of(texts))).values()
    parts = [[p for text in part for p in text.split("\n\n")] for part in splits]
    total, longest = sum(map(len, paragraphs)), max(map(len, paragraphs))
    if longest <= total // 10:  # none is so long that it is cut
        assert sum(parts, []) == paragraphs
    assert "".join("".join(sum(parts, [])).split()) == "".join("".join(paragraphs).split())
    train, validation, _ = (sum(map(len, part)) for part in parts)
    assert abs(train - 0.8 * total) <= longest
    assert abs(train + validation - 0.9 * total) <= longest


# -- splits to blocks ------------------------------------------------------------------

# words of four to six characters: then no part of a text of 40 paragraphs is too short
WORDS = ["badger", "‘Ho!’", "naïve", "1908", "🦔🦔🦔🦔", "hedge,", "such—", "ïöüß"]
long_paragraphs = st.lists(st.sampled_from(WORDS), min_size=4, max_size=6).map(
    lambda words: " ".join(words * 5)
)
long_texts = st.lists(
    st.lists(long_paragraphs, min_size=5, max_size=7).map("\n\n".join), min_size=8, max_size=9
)


@settings(repeatable, max_examples=20)
@given(texts=long_texts, block_size=st.integers(2, 20))
def test_no_token_is_lost(texts, block_size, tokenizer):
    corpus = corpus_of(texts)
    packed = kd.pack(corpus, tokenizer, block_size)
    for name, parts in vars(split(corpus)).items():
        tokens = tokenize(parts, tokenizer)
        assert tokenizer.decode(tokens) == tokenizer.eos_token.join(parts)
        assert tokens.tolist().count(tokenizer.eos_token_id) == len(parts) - 1

        blocks, left = getattr(packed, name), packed.remainder[name]
        assert blocks.dtype == torch.int64
        assert blocks.shape == (len(tokens) // block_size, block_size)
        assert torch.equal(blocks.flatten(), tokens[: len(tokens) - left])
        assert blocks.numel() + left == len(tokens)
    assert packed.block_size == block_size


def test_texts_stand_apart_where_there_is_an_end_of_text_token(tokenizer):
    without = copy.deepcopy(tokenizer)
    without.eos_token = None
    texts = ["It rained.", "So."]
    first, second = (tokenizer(text)["input_ids"] for text in texts)
    assert tokenize(texts, tokenizer).tolist() == [*first, tokenizer.eos_token_id, *second]
    assert tokenize(texts, without).tolist() == [*first, *second]


@repeatable
@given(
    st.lists(st.sampled_from([*"ab.,'’é ", " \n", "\n\n", "\t", "the mole", "1908"]), max_size=60),
    st.integers(1, 12),
)
def test_a_long_text_that_is_cut_has_the_tokens_of_the_whole(tokenizer, words, longest):
    text = "".join(words)
    pieces = corpus_file.cut(text, longest)
    assert "".join(pieces) == text
    whole = tokenizer(text)["input_ids"]
    if all(piece[:1].isspace() for piece in pieces[1:]):  # no word was longer than a piece
        assert [i for piece in pieces for i in tokenizer(piece)["input_ids"]] == whole
    else:
        assert tokenizer.decode([i for p in pieces for i in tokenizer(p)["input_ids"]]) == text


def test_a_chapter_in_several_pieces_is_one_text(story, tokenizer, monkeypatch):
    monkeypatch.setattr(corpus_file, "LONGEST_PIECE", 5_000)
    assert len(story.text) > 50_000
    tokens = tokenize([story.text, "The end."], tokenizer)
    first, last = (tokenizer(t, verbose=False)["input_ids"] for t in (story.text, "The end."))
    assert tokens.tolist() == [*first, tokenizer.eos_token_id, *last]


def test_the_sample_story_fills_blocks_of_the_default_size(story, tokenizer):
    packed = kd.pack(story, tokenizer)
    assert packed.block_size == 128
    assert torch.equal(kd.pack(story, tokenizer, np.int64(128)).train, packed.train)
    assert min(len(packed.validation), len(packed.test)) >= 8


@pytest.mark.parametrize(
    ("texts", "block_size", "part"),
    [
        (["It rained."], 1_000, "train"),
        (["It rained. "] * 40, 40, "validation"),
        (["It rained."], 2, "validation"),
    ],
    ids=["train too short", "validation too short", "validation empty"],
)
def test_a_text_too_short_for_one_block_is_refused(texts, block_size, part, tokenizer):
    corpus = corpus_of(texts)
    tokens = tokenizer(tokenizer.eos_token.join(getattr(split(corpus), part)))["input_ids"]
    with pytest.raises(kd.InputError) as caught:
        kd.pack(corpus, tokenizer, block_size)
    assert f"{part} part holds {len(tokens)} tokens" in str(caught.value)
    assert f"block of {block_size};" in str(caught.value)


@pytest.mark.parametrize("block_size", [1, -8, 8.0, True, "8"])
def test_a_block_without_a_next_token_is_refused(block_size, story, tokenizer):
    with pytest.raises(kd.InputError, match=f"block_size is {block_size!r}; .* at least 2"):
        kd.pack(story, tokenizer, block_size)


@pytest.mark.parametrize("skipped", [0, 3])
def test_one_warning_counts_the_skipped_lines(skipped, tokenizer, recwarn):
    kd.pack(corpus_of(["It rained."] * 40, skipped), tokenizer, 2)
    found = [str(w.message) for w in recwarn if "skipped" in str(w.message)]
    assert found == [f"skipped {skipped} empty lines or chapters"] * bool(skipped)


@pytest.mark.parametrize("shown", [True, False])
def test_packing_is_quiet_and_leaves_progress_bars_as_they_were(shown, story, tokenizer, capfd):
    before = datasets.are_progress_bars_disabled()
    (datasets.enable_progress_bars if shown else datasets.disable_progress_bars)()
    try:
        kd.pack(story, tokenizer)
        assert datasets.are_progress_bars_disabled() != shown
    finally:
        (datasets.disable_progress_bars if before else datasets.enable_progress_bars)()
    assert capfd.readouterr() == ("", "")
