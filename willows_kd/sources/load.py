"""The text to learn from, wherever it is: a file, a table, the hub, the book's download."""

import os
import urllib.request
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path

from willows_kd.errors import InputError, one_line, require
from willows_kd.files import atomic_write, cache_folder
from willows_kd.sources.tables import READERS, is_table, read_table
from willows_kd.texts import (
    END_OF_BOOK,
    PARAGRAPH_BREAK,
    SAMPLE_STORY,
    WILLOWS,
    Corpus,
    chapters_of,
    decode,
    read_file,
    strip_licence,
)


def load_corpus(
    source: str | os.PathLike | None = None,
    text_column: str | None = None,
    encoding: str | None = None,
) -> Corpus:
    """Read the text to learn from.

    Args:
        source: the path of a text file, or of a table (`.csv`, `.tsv`, `.json`, `.jsonl`,
            `.parquet`), each row of which is a text or a chat (`messages`, or `prompt` and
            `completion`); the name of a data set on the hub, `OWNER/NAME`; ``"sample"`` for
            the story that ships with the package; ``"willows"`` for *The Wind in the
            Willows* and nothing else; or None for the first of these that can be had: the
            file named by ``WILLOWS_KD_CORPUS``, the book from the user's cache, the book
            from Project Gutenberg, the sample story.
        text_column: the column of a table that holds the text; by default the one called
            ``"text"``, or the only one of text.
        encoding: the encoding of your file, such as ``"cp1251"``; by default UTF-8, or
            UTF-16 if the file begins with its byte-order mark.

    Raises:
        InputError: the file is missing, empty or not text, or has no such column or
            encoding; or the book was asked for and cannot be had.
    """
    if source == "sample":
        where = "the sample story that ships with willows_kd"
        return replace(read_file(SAMPLE_STORY), provenance=where)
    if source not in (None, "willows"):
        if is_table(source):
            return read_table(source, text_column, encoding)
        columns = f"{source} has no columns; text_column is for {', '.join(READERS)}"
        require(text_column is None, columns)
        return read_file(source, encoding)
    if override := os.environ.get("WILLOWS_KD_CORPUS"):
        corpus = load_corpus(override, text_column, encoding)
        return replace(corpus, provenance=f"{override} (WILLOWS_KD_CORPUS)")
    try:
        return replace(read_file(fetch_willows()), provenance="Project Gutenberg eBook #289")
    except InputError as error:
        if source == "willows":
            raise InputError(
                f"The Wind in the Willows could not be had ({error}); give the path of a "
                "text file of it, or set WILLOWS_KD_CORPUS to one"
            ) from error
        print(f"📖 The Wind in the Willows could not be had ({error}): using the sample story.")
        return load_corpus("sample")


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
