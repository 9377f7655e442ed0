"""Text files read, cleaned and, if they are the book, cut into chapters; the book's download."""

import codecs
import os
import re
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from willows_kd.errors import InputError, one_line, require
from willows_kd.files import atomic_write, cache_folder

WILLOWS = "THE WIND IN THE WILLOWS"
# the titles of their first and last chapters
OWN_BOOKS = {WILLOWS: ("RIVER BANK", "ULYSSES"), "THE KETTLE ON LAMMAS DOWN": ("KETTLE", "MICHAEL")}


@dataclass(frozen=True)
class Corpus:
    """A text as it is learnt from.

    Attributes:
        title: the book's title, or the name of the file or data set.
        provenance: where the text came from, in one line.
        texts: the chapters of the book, or the rows of a table, or one text. Rows of chats
            are dicts with `messages`, or with `prompt` and `completion`.
        skipped: empty lines and rows that were passed over while reading.
    """

    title: str
    provenance: str
    texts: Sequence
    skipped: int = 0

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


# -- the book's download ---------------------------------------------------------------

URLS = (
    "https://www.gutenberg.org/cache/epub/289/pg289.txt",
    "https://gutenberg.pglaf.org/2/8/289/289-0.txt",
)
TIMEOUT = 10  # seconds without an answer
SIZE_LIMIT = 2_000_000  # bytes; the book has a third of a million


def fetch_willows() -> Path:
    """The path of the book in the user's cache, downloaded if it is not there yet.

    Raises:
        InputError: no address gave the book. The cache is then as it was.
    """
    path = cache_folder() / "wind_in_the_willows.txt"
    if os.path.exists(path):  # not path.exists(): it raises if a folder is locked
        return path
    problem = ""
    for url in URLS:
        try:
            text = download_book(url)
        except (OSError, HTTPException, ValueError) as error:
            problem = one_line(error)
            continue
        with atomic_write(path) as partial:
            partial.write_text(text, encoding="utf-8")
        return path
    raise InputError(problem)


def download_book(url: str) -> str:
    """The book behind an address, bounded in size and without its licence."""
    request = urllib.request.Request(url, headers={"User-Agent": "willows_kd"})
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        require(answer.url.startswith("https://"), "redirected to an address that is not https")
        raw = answer.read(SIZE_LIMIT + 1)
    require(len(raw) <= SIZE_LIMIT, f"more than {SIZE_LIMIT} bytes")
    text = decode(raw)
    body = PARAGRAPH_BREAK.sub("\n\n", strip_licence(text)).strip("\n") + "\n"
    is_whole = END_OF_BOOK.search(text) and chapters_of(body)[0] == WILLOWS
    require(is_whole, "what arrived is not the twelve chapters of the book")
    return body
