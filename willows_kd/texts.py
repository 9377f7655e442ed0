"""Text files read, cleaned and, if they are the book, cut into chapters."""

import codecs
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from willows_kd.errors import InputError, require

SAMPLE_STORY = Path(__file__).parent / "assets" / "sample_story.txt"
WILLOWS = "THE WIND IN THE WILLOWS"
# the titles of their first and last chapters
OWN_BOOKS = {WILLOWS: ("RIVER BANK", "ULYSSES"), "THE KETTLE ON LAMMAS DOWN": ("KETTLE", "MICHAEL")}


@dataclass(frozen=True)
class Corpus:
    """A text as it is learnt from.

    Attributes:
        title: the book's title, or the name of the file or data set.
        provenance: where the text came from, in one line.
        texts: the chapters of the book, or the rows of a table, or one text.
        skipped: empty lines and rows that were passed over while reading.
        in_rows: True for a table, which is split between texts; any other text is split where
            a paragraph ends.
        tokenize: for chats, what turns them into token ids and a mask of those to learn, as
            `sources.chats.tokenize_chats` does; None for strings.
    """

    title: str
    provenance: str
    texts: Sequence
    skipped: int = 0
    in_rows: bool = False
    tokenize: Callable | None = None

    @property
    def text(self) -> str:
        """All texts in one string; of chats, which get their form from a template, none."""
        return "\n\n".join(text for text in self.texts if isinstance(text, str))


# -- bytes to text ---------------------------------------------------------------------

NO_TEXT = {"%pdf-": "a PDF", "<!doctype": "HTML", "<html": "HTML"}
UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_file(path: str | os.PathLike, encoding: str | None = None) -> Corpus:
    """Read a text file: the book and the sample story by chapter, any other as one text."""
    path = Path(path)
    try:
        return parse_text(decode(path.read_bytes(), str(path), encoding), path.stem, str(path))
    except OSError as error:
        reason = f"{path} cannot be read: {error.strerror}; give the path of a text file"
        raise InputError(reason) from error


def decode(raw: bytes, name: str = "the text", encoding: str | None = None) -> str:
    """Bytes to text with line ends of ``"\\n"``: by an encoding, else UTF-8, or UTF-16 by its mark.

    Raises:
        InputError: the bytes are in another encoding, or those of a PDF or of HTML.
    """
    head = raw[:100].decode("ascii", "ignore").replace("\0", "").strip().lower()
    for begin, kind in NO_TEXT.items():
        require(not head.startswith(begin), f"{name} is {kind}; save it as plain text first")
    try:
        text = raw.decode(encoding or ("utf-16" if raw[:2] in UTF16_MARKS else "utf-8"))
    except LookupError:
        raise InputError(f"{encoding!r} is no known encoding; give one such as 'cp1251'") from None
    except ValueError:
        text = "\0"
    require(
        "\0" not in text,
        f"{name} is not text in {encoding or 'UTF-8'}; if it is text, name its encoding with "
        "encoding= (--encoding)",
    )
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


# -- text to chapters ------------------------------------------------------------------

START_OF_BOOK = re.compile(r"^\*\*\* ?START OF TH.*$", re.MULTILINE)
END_OF_BOOK = re.compile(r"^\*\*\* ?END OF TH.*$", re.MULTILINE)
HEADING = re.compile(r"^(?:CHAPTER )?(?:[IVX]+|\d+)\. +([^a-z\n]+)$", re.MULTILINE)
# of a book: pictures, numbers of pages, and ornaments between paragraphs
FURNITURE = re.compile(r"\[Illustration[^\]]*\]|\{\d+\}|^[ \t]*(?:[*·•][ \t]*){3,}$", re.MULTILINE)
EMPHASIS = re.compile(r"(?<!\w)_([^_]+)_(?!\w)")
PARAGRAPH = re.compile(r"(?:^.*\S.*\n?)+", re.MULTILINE)  # lines that are not blank
PARAGRAPH_BREAK = re.compile(r"\n\s*\n")
LONGEST_WRAPPED_LINE = 120  # characters: a longer line was never broken by hand


def parse_text(text: str, title: str, provenance: str) -> Corpus:
    """Clean a text; cut the book and the sample story into chapters, leave any other whole.

    Project Gutenberg's front and end matter is left out, and so is what stands before the
    book's first chapter.
    """
    text = strip_licence(text).strip("\n")
    # all but one of the blank lines between two paragraphs
    skipped = sum(found[0].count("\n") - 2 for found in PARAGRAPH_BREAK.finditer(text))
    book, chapters = chapters_of(FURNITURE.sub("", text))
    del text  # which may be long
    texts = tuple(map(clean, chapters))
    require(all(texts), f"{provenance} holds no text; give a file with a few paragraphs in it")
    return Corpus(book or title, provenance, texts, skipped)


def strip_licence(text: str) -> str:
    """A text without Project Gutenberg's front and end matter, if it has any."""
    start, end = START_OF_BOOK.search(text), END_OF_BOOK.search(text)
    return text[start.end() if start else 0 : end.start() if end else len(text)]


def chapters_of(text: str) -> tuple[str | None, list[str]]:
    """The title and chapters of the book or the sample story; of another text, None and itself."""
    headings = [*HEADING.finditer(text)][-12:]  # a contents page comes before them
    titles = [heading[1] for heading in headings]
    for book, (first, last) in OWN_BOOKS.items():
        if len(titles) == 12 and first in titles[0] and last in titles[-1]:
            ends = [*(heading.start() for heading in headings[1:]), len(text)]
            return book, [text[h.end() : end] for h, end in zip(headings, ends, strict=True)]
    return None, [text]


def clean(text: str) -> str:
    """A text without hand-made line ends, a blank line between its paragraphs."""
    text = text.strip("\n")
    if not PARAGRAPH_BREAK.search(text):  # each line is a paragraph
        text = text.replace("\n", "\n\n")
    return "\n\n".join(each for found in PARAGRAPH.finditer(text) for each in unwrap(found[0]))


def unwrap(piece: str) -> list[str]:
    """The paragraphs of lines that stand together.

    Lines that were broken by hand to fit a page are joined; indented lines (verse)
    keep their breaks; lines too long to have been broken are paragraphs themselves.
    """
    lines = piece.removesuffix("\n").split("\n")
    texts = [" ".join(line.split()) for line in lines]
    if not any(len(line) > LONGEST_WRAPPED_LINE for line in lines):
        verse = len(lines) > 1 and all(line[0].isspace() for line in lines)
        texts = [("\n" if verse else " ").join(texts)]
    return [EMPHASIS.sub(r"\1", text) for text in texts]
