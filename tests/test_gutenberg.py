"""Fetching the book: what is kept of an answer, and what is refused."""

import contextlib
import io
import urllib.request

import pytest
from test_corpus import END, START, WILLOWS_TITLES, willows

import willows_kd as kd
from willows_kd import texts
from willows_kd.files import cache_folder
from willows_kd.sources import load
from willows_kd.sources.load import fetch_willows


def book_of(titles: list[str]) -> str:
    """A book that looks like one of Project Gutenberg's, licence and all."""
    parts = ["\ufeffThe Project Gutenberg eBook", "Licence.", START, "A BOOK", "by Nobody"]
    parts += [willows(titles=titles), "The badger, late,\ncried: ‘Ho!’", END, "Licence."]
    return "\n\n".join(parts)


BOOK = book_of(WILLOWS_TITLES)
BODY = BOOK.replace("\n", "\r\n").encode()
HTML = b"<!doctype html><html><body><h1>I. THE RIVER BANK</h1>Please log in.</body></html>"
MOVED = "moved to an address that is not encrypted"
FIRST, MIRROR = load.URLS


@pytest.fixture
def site(monkeypatch):
    """What is answered, by address: bytes, or an error; `site["moved"]` is where it ends up."""
    site, asked = {}, []

    def urlopen(request, timeout):
        assert timeout == load.TIMEOUT
        url = request.full_url
        asked.append(url)
        if isinstance(answer := site[url], Exception):
            raise answer
        body = io.BytesIO(answer)
        body.url = site.get("moved", url)
        return contextlib.closing(body)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    site["asked"] = asked
    return site


def cached() -> list:
    """All that is in the cache, finished or not."""
    return sorted(cache_folder().rglob("*"))


def test_the_book_is_kept_without_its_licence_and_not_fetched_again(site):
    site[FIRST], site[MIRROR] = OSError("gone"), BODY
    path = fetch_willows()
    text = BOOK[BOOK.index(START) + len(START) : BOOK.index(END)].strip() + "\n"
    assert path.read_bytes().decode() == text
    assert cached() == [path] == [fetch_willows()]
    assert site["asked"] == [FIRST, MIRROR]
    book = kd.load_corpus()
    assert (book.title, len(book.texts)) == (texts.WILLOWS, 12)
    assert book.provenance == "Project Gutenberg eBook #289"


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (HTML, "is HTML"),
        (book_of(WILLOWS_TITLES[1:]).encode(), "not the twelve chapters"),
        (BODY[: BODY.index(END.encode())], "not the twelve chapters"),  # without its last pages
        (BODY + bytes(load.SIZE_LIMIT), "more than"),
        (TimeoutError("timed\nout"), "timed out"),
        (MOVED, "not https"),
    ],
)
def test_what_is_not_the_whole_book_is_refused_and_not_kept(body, problem, site):
    site[FIRST] = site[MIRROR] = BODY if body is MOVED else body
    if body is MOVED:  # the book, but over a connection that anybody can change
        site["moved"] = FIRST.replace("https", "http")
    with pytest.raises(kd.InputError, match=f"could not be had .*{problem}") as caught:
        kd.load_corpus("willows")
    assert "\n" not in str(caught.value)
    assert cached() == []
