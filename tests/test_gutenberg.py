"""Fetching the book: a real server on this machine, asked without encryption."""

import http.client
import http.server
import os
import random
import socket
import threading
import urllib.request
from pathlib import Path

import pytest

import willows_kd as kd
from willows_kd import texts
from willows_kd.files import cache_folder
from willows_kd.texts import fetch_willows

# the first and last titles tell the book; those between, and all the words, are our own
ROMAN = ["I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X", "XI", "XII"]
TITLES = ["THE RIVER BANK", *(f"TITLE {n}" for n in ROMAN[1:11]), "THE RETURN OF ULYSSES"]
START = "*** START OF THE PROJECT GUTENBERG EBOOK A BOOK ***"
END = "*** END OF THE PROJECT GUTENBERG EBOOK A BOOK ***"


def book_of(titles: list[str], words_a_chapter: int = 5_000) -> str:
    """A book of filler words that looks like one of Project Gutenberg's, licence and all."""
    draw = random.Random(0)
    parts = ["\ufeffThe Project Gutenberg eBook\n\nLicence.", START, "A BOOK", "by Nobody"]
    for numeral, title in zip(ROMAN, titles, strict=False):
        words = draw.choices(["badger", "hedge", "rain", "late,", "so", "‘Ho!’"], k=words_a_chapter)
        lines = [" ".join(words[i : i + 12]) for i in range(0, len(words), 12)]
        paragraphs = ["\n".join(lines[i : i + 10]) for i in range(0, len(lines), 10)]
        parts += [f"{numeral}. {title}", *paragraphs]
    return "\n\n".join([*parts, END, "Licence."])


def as_bytes(text: str) -> bytes:
    return text.replace("\n", "\r\n").encode()


BOOK = book_of(TITLES)
BODY = as_bytes(BOOK)
HTML = b"<!doctype html><html><body><h1>I. THE RIVER BANK</h1>Please log in.</body></html>"


class Unencrypted(urllib.request.HTTPSHandler):
    """Opens https addresses in plain HTTP: all but the encryption is as it is."""

    def https_open(self, req):
        return self.do_open(http.client.HTTPConnection, req)


class Site:
    """What a server of this machine answers, by path, and which paths it was asked for."""

    def __init__(self, port: int):
        self.address = f"127.0.0.1:{port}"
        self.answers: dict[str, bytes] = {}
        self.asked: list[str] = []

    def serve(self, body: bytes, status: str = "200 OK", path: str = "/book", **headers) -> str:
        """Answer a path from now on, with the headers as they are given, and return its address."""
        headers = {"Content-Length": len(body)} | {
            k.replace("_", "-"): v for k, v in headers.items()
        }
        lines = [f"HTTP/1.0 {status}", *(f"{k}: {v}" for k, v in headers.items() if v is not None)]
        self.answers[path] = "\r\n".join([*lines, "", ""]).encode() + body
        return f"https://{self.address}{path}"


@pytest.fixture
def site(monkeypatch):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            site.asked.append(self.path)
            self.wfile.write(site.answers[self.path])

        def log_message(self, *_):
            pass

    opener = urllib.request.build_opener(Unencrypted, urllib.request.ProxyHandler({}))
    monkeypatch.setattr(urllib.request, "_opener", opener)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        site = Site(server.server_port)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield site
        server.shutdown()
        thread.join()


@pytest.fixture
def fetch(monkeypatch):
    """Fetch the book from some addresses."""

    def fetch(*urls: str) -> Path:
        monkeypatch.setattr(texts, "URLS", urls)
        return fetch_willows()

    return fetch


def cached() -> list[Path]:
    """All that is in the cache, finished or not."""
    return sorted(cache_folder().rglob("*"))


def test_the_book_is_kept_without_its_licence_and_not_fetched_again(site, fetch):
    path = fetch(site.serve(as_bytes(BOOK.replace("\n\n", "\n\n\n\n"))))
    text = BOOK[BOOK.index(START) + len(START) : BOOK.index(END)].strip() + "\n"
    assert path.read_bytes().decode() == text
    assert cached() == [path] == [fetch(site.serve(BODY))]
    assert site.asked == ["/book"]
    for source in (None, "willows"):
        book = kd.load_corpus(source)
        assert (book.title, len(book.texts), book.skipped) == (texts.WILLOWS, 12, 0)
        assert book.provenance == "Project Gutenberg eBook #289"


def test_the_mirror_is_asked_where_the_first_address_fails(site, fetch):
    first = site.serve(b"gone", "404 Not Found", path="/first")
    assert [fetch(first, site.serve(BODY, path="/mirror"))] == cached()
    assert site.asked == ["/first", "/mirror"]


def test_a_redirect_is_followed_only_if_it_stays_encrypted(site, fetch):
    site.serve(BODY, path="/moved")
    with pytest.raises(kd.InputError, match="not https"):
        fetch(site.serve(b"", "302 Found", Location=f"http://{site.address}/moved"))
    assert cached() == []
    assert fetch(site.serve(b"", "302 Found", Location="/moved", Content_Length=None))


CHUNKED = {"Content_Length": None, "Transfer_Encoding": "chunked"}


@pytest.mark.parametrize(
    ("body", "answer", "problem"),
    [
        pytest.param(HTML, {}, "not the twelve chapters", id="an HTML page"),
        pytest.param(as_bytes(book_of(TITLES[1:])), {}, "not the twelve", id="another book"),
        pytest.param(as_bytes(book_of(TITLES, 1_000)), {}, "not the twelve", id="an abridged book"),
        pytest.param(BODY[: -len(BODY) // 30], {}, "not the twelve", id="without its last pages"),
        pytest.param(BODY + bytes(texts.SIZE_LIMIT), {}, "more than", id="too large"),
        pytest.param(BODY.replace("‘".encode(), b"\x91"), {}, "invalid start", id="not UTF-8"),
        pytest.param(BODY, {"status": "404 Not Found"}, "Not Found", id="not found"),
        pytest.param(b"800\r\nI. THE", CHUNKED, None, id="a connection that breaks off"),
        pytest.param(BODY, {"status": "what?"}, None, id="a garbled answer"),
    ],
)
def test_what_is_not_the_whole_book_is_refused_and_not_kept(body, answer, problem, site, fetch):
    with pytest.raises(kd.InputError, match=problem) as caught:
        fetch(site.serve(body, **answer))
    assert str(caught.value) and "\n" not in str(caught.value)
    assert site.asked == ["/book"]
    assert cached() == []


def test_a_server_that_does_not_answer_is_given_up(site, fetch, monkeypatch):
    monkeypatch.setattr(texts, "TIMEOUT", 0.05)
    refused = pytest.raises(kd.InputError, match="timed out")
    with socket.create_server(("127.0.0.1", 0)) as silent, refused:
        fetch(f"https://127.0.0.1:{silent.getsockname()[1]}/book")


def test_each_problem_is_named_once(site, fetch):
    gone = [site.serve(b"", "404 Not Found", path=f"/{n}") for n in range(2)]
    with pytest.raises(kd.InputError) as caught:
        fetch(*gone, site.serve(HTML))
    assert str(caught.value) == "Not Found; what arrived is not the twelve chapters of the book"


def test_the_addresses_are_encrypted():
    assert texts.URLS and all(url.startswith("https://") for url in texts.URLS)


@pytest.mark.parametrize("locked", [False, True], ids=["a file", "locked"])
def test_a_cache_that_cannot_be_written_is_named_and_the_story_read(
    locked, site, fetch, story, monkeypatch, tmp_path, capsys
):
    place = tmp_path / "place"
    place.mkdir() if locked else place.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(place))
    mkdir, stat = os.mkdir, os.stat

    def guard(function):  # not chmod: it does not keep out root, as whom a container runs
        def guarded(path, *args, **kwargs):
            if locked and str(path).startswith(str(place)):
                raise PermissionError(13, "Permission denied", str(path))
            return function(path, *args, **kwargs)

        return guarded

    monkeypatch.setattr(os, "mkdir", guard(mkdir))
    monkeypatch.setattr(os, "stat", guard(stat))
    with pytest.raises(kd.InputError, match="cannot be written: ") as caught:
        fetch(site.serve(BODY))
    assert str(caught.value).startswith(str(cache_folder()))
    assert kd.load_corpus() == story
    assert str(caught.value) in capsys.readouterr().out
