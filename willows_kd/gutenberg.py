"""The book, from Project Gutenberg to the user's cache. (Models come from the hub: `models.py`.)"""

import os
import re
import time
import urllib.request
from http.client import HTTPException
from pathlib import Path

from willows_kd.errors import WriteError
from willows_kd.files import atomic_file, cache_folder

URLS = (
    "https://www.gutenberg.org/cache/epub/289/pg289.txt",
    "https://gutenberg.pglaf.org/2/8/289/289-0.txt",
)
PROVENANCE = "Project Gutenberg eBook #289"
TIMEOUT = 10  # seconds without an answer
DEADLINE = 30  # seconds for a whole download
SIZE_LIMIT = 2_000_000  # bytes; the book has a third of a million
NOT_THE_BOOK = "what arrived is not the twelve chapters of the book"
START_OF_BOOK = re.compile(r"^\*\*\* ?START OF TH.*$", re.MULTILINE)
END_OF_BOOK = re.compile(r"^\*\*\* ?END OF TH.*$", re.MULTILINE)
CHAPTER_LENGTHS = range(10_000, 60_000)  # characters that a chapter of this book may have


class DownloadError(Exception):
    """The book cannot be downloaded; the message says why in a few words."""


def fetch_willows(urls: tuple[str, ...] = URLS) -> Path:
    """The path of the book in the user's cache, downloaded if it is not there yet.

    Raises:
        DownloadError: no address gave the book. The cache is then as it was.
    """
    path = cache_folder() / "wind_in_the_willows.txt"
    if os.path.exists(path):  # not path.exists(): it raises if a folder is locked
        return path
    problems = []
    for url in urls:
        try:
            text = download(url).decode("utf-8-sig").replace("\r\n", "\n")
            if not END_OF_BOOK.search(text):
                raise DownloadError(NOT_THE_BOOK)
            text = strip_licence(text)
            text = re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"
            check_is_the_book(text)
        except (OSError, HTTPException, ValueError, DownloadError) as error:
            problems.append(" ".join(str(getattr(error, "reason", None) or error).split()))
            continue
        try:
            with atomic_file(path) as partial:
                partial.write_text(text, encoding="utf-8")
        except WriteError as error:
            raise DownloadError(str(error)) from error
        return path
    raise DownloadError("; ".join(dict.fromkeys(problems)))


class HttpsOnly(urllib.request.HTTPRedirectHandler):
    """Follow a redirect only if it stays encrypted."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        """As in the base class, but refuses any address that is not https."""
        if not newurl.startswith("https://"):
            raise DownloadError("redirected to an address that is not https")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def download(url: str) -> bytes:
    """The body behind an https address, bounded in size and time."""
    if not url.startswith("https://"):
        raise DownloadError(f"{url} is not https")
    request = urllib.request.Request(url, headers={"User-Agent": "willows_kd"})
    start = time.monotonic()
    body = bytearray()
    with urllib.request.build_opener(HttpsOnly).open(request, timeout=TIMEOUT) as answer:
        expected = answer.headers.get("Content-Length")
        while chunk := answer.read1(65_536):
            body += chunk
            if len(body) > SIZE_LIMIT:
                raise DownloadError(f"more than {SIZE_LIMIT} bytes")
            if time.monotonic() - start > DEADLINE:
                raise DownloadError(f"not complete after {DEADLINE} seconds")
    if expected and len(body) != int(expected):
        raise DownloadError(f"{len(body)} of {expected} bytes arrived")
    return bytes(body)


def strip_licence(text: str) -> str:
    """A text without Project Gutenberg's front and end matter, if it has any."""
    start, end = START_OF_BOOK.search(text), END_OF_BOOK.search(text)
    return text[start.end() if start else 0 : end.start() if end else len(text)]


def check_is_the_book(text: str) -> None:
    """Refuse an error page, a truncated file or another book."""
    parts = re.split(r"^(?:CHAPTER )?(?:[IVX]+|\d+)\. +([^a-z\n]+)$", text, flags=re.MULTILINE)
    chapters = zip(parts[1::2], parts[2::2], strict=True)
    titles = [title for title, chapter in chapters if len(chapter) in CHAPTER_LENGTHS]
    if len(titles) != 12 or "RIVER BANK" not in titles[0] or "ULYSSES" not in titles[-1]:
        raise DownloadError(NOT_THE_BOOK)
