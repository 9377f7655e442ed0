"""Fetching the book: a real opener and a real server on this machine, without encryption."""

import http.client
import http.server
import itertools
import os
import random
import socket
import threading
import types
import urllib.request
from pathlib import Path

import pytest

import willows_kd as kd
from willows_kd import gutenberg
from willows_kd.files import cache_folder
from willows_kd.gutenberg import DownloadError, fetch_willows, strip_licence

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


class Unencrypted(urllib.request.HTTPSHandler):
    """Opens https addresses in plain HTTP: all but the encryption is as it is."""

    def https_open(self, req):
        return self.do_open(http.client.HTTPConnection, req)


class Site:
    """What a server of this machine answers, by path, and which paths it was asked for."""

    def __init__(self, port: int):
        self.secure = f"https://127.0.0.1:{port}"
        self.insecure = f"http://127.0.0.1:{port}"
        self.answers: dict[str, bytes] = {}
        self.asked: list[str] = []

    def serve(self, body: bytes, status: str = "200 OK", path: str = "/book", **headers) -> str:
        """Answer a path from now on, with the headers as they are given, and return its address."""
        headers = {"Content-Length": len(body)} | {
            k.replace("_", "-"): v for k, v in headers.items()
        }
        lines = [f"HTTP/1.0 {status}", *(f"{k}: {v}" for k, v in headers.items() if v is not None)]
        self.answers[path] = "\r\n".join([*lines, "", ""]).encode() + body
        return self.secure + path


@pytest.fixture
def site(monkeypatch):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            site.asked.append(self.path)
            self.wfile.write(site.answers[self.path])

        def log_message(self, *_):
            pass

    build_opener = urllib.request.build_opener
    no_proxy = urllib.request.ProxyHandler({})
    monkeypatch.setattr(
        urllib.request, "build_opener", lambda *given: build_opener(Unencrypted, no_proxy, *given)
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        site = Site(server.server_port)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield site
        server.shutdown()
        thread.join()


def cached() -> list[Path]:
    """All that is in the cache, finished or not."""
    return sorted(cache_folder().rglob("*"))


# -- the book arrives ------------------------------------------------------------------


def test_the_book_is_kept_and_not_fetched_again(site):
    address = site.serve(BODY)
    path = fetch_willows((address,))
    assert cached() == [path]
    assert fetch_willows((address,)) == path
    assert site.asked == ["/book"]


def test_what_is_kept_is_the_text_without_licence_or_windows_line_ends(site):
    text = fetch_willows((site.serve(BODY),)).read_bytes().decode()
    assert text == BOOK[BOOK.index(START) + len(START) : BOOK.index(END)].strip() + "\n"


def test_the_gaps_between_chapters_are_kept_as_one_blank_line(site):
    roomy = fetch_willows((site.serve(as_bytes(BOOK.replace("\n\n", "\n\n\n\n"))),))
    book = kd.load_corpus(roomy)
    assert [chapter.title for chapter in book.chapters] == TITLES
    assert book.skipped == 0


def test_the_fetched_book_is_the_corpus(site, monkeypatch, capsys):
    address = site.serve(BODY)
    monkeypatch.setattr(gutenberg, "fetch_willows", lambda: fetch_willows((address,)))
    for source in (None, "willows"):
        book = kd.load_corpus(source)
        assert [chapter.title for chapter in book.chapters] == TITLES
        assert book.provenance == gutenberg.PROVENANCE
    assert capsys.readouterr() == ("", "")


def test_the_mirror_is_asked_where_the_first_address_fails(site):
    first = site.serve(b"gone", "404 Not Found", path="/first")
    mirror = site.serve(BODY, path="/mirror")
    path = fetch_willows((first, mirror))
    assert cached() == [path]
    assert site.asked == ["/first", "/mirror"]


def test_a_body_without_a_length_arrives_whole(site):
    assert gutenberg.download(site.serve(BODY, Content_Length=None)) == BODY


def test_a_redirect_that_stays_encrypted_is_followed(site):
    site.serve(BODY, path="/moved")
    address = site.serve(b"", "302 Found", Location="/moved")
    assert gutenberg.download(address) == BODY
    assert site.asked == ["/book", "/moved"]


# -- the book does not arrive ----------------------------------------------------------

HTML = b"<!doctype html><html><body><h1>I. THE RIVER BANK</h1>Please log in.</body></html>"
CHUNKED = {"Content_Length": None, "Transfer_Encoding": "chunked"}


@pytest.mark.parametrize(
    ("body", "answer", "problem"),
    [
        pytest.param(HTML, {}, "not the twelve chapters", id="an HTML page"),
        pytest.param(as_bytes(book_of(TITLES[1:])), {}, "not the twelve", id="another book"),
        pytest.param(as_bytes(book_of(TITLES, 1_000)), {}, "not the twelve", id="an abridged book"),
        pytest.param(BODY[: -len(BODY) // 30], {}, None, id="the book without its last pages"),
        pytest.param(BODY, {"Content_Length": len(BODY) + 1}, None, id="a byte missing"),
        pytest.param(BODY, {"Content_Length": "many"}, None, id="a length that is no number"),
        pytest.param(BODY + bytes(gutenberg.SIZE_LIMIT), {}, "more than", id="too large"),
        pytest.param(BODY.replace("‘".encode(), b"\x91"), {}, "invalid start", id="not UTF-8"),
        pytest.param(BODY, {"status": "404 Not Found"}, "Not Found", id="not found"),
        pytest.param(b"800\r\nI. THE", CHUNKED, None, id="a connection that breaks off"),
        pytest.param(BODY, {"status": "what?"}, None, id="a garbled answer"),
    ],
)
def test_what_is_not_the_whole_book_is_refused_and_not_kept(body, answer, problem, site):
    address = site.serve(body, **answer)
    with pytest.raises(DownloadError, match=problem) as caught:
        fetch_willows((address,))
    assert str(caught.value) and "\n" not in str(caught.value)
    assert site.asked == ["/book"]
    assert cached() == []


def test_an_address_that_is_not_encrypted_is_not_asked(site):
    site.serve(BODY)
    with pytest.raises(DownloadError, match="is not https"):
        fetch_willows((site.insecure + "/book",))
    assert site.asked == []
    assert cached() == []


def test_a_redirect_out_of_encryption_is_not_followed(site):
    site.serve(BODY, path="/moved")
    address = site.serve(b"", "302 Found", Location=site.insecure + "/moved")
    with pytest.raises(DownloadError, match="not https"):
        fetch_willows((address,))
    assert site.asked == ["/book"]
    assert cached() == []


def test_a_server_that_does_not_answer_is_given_up(site, monkeypatch):
    monkeypatch.setattr(gutenberg, "TIMEOUT", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"https://127.0.0.1:{silent.getsockname()[1]}/book"
        with pytest.raises(DownloadError, match="timed out"):
            fetch_willows((address,))


def test_a_server_that_answers_drop_by_drop_is_given_up(site, monkeypatch):
    ticks = itertools.count(step=gutenberg.DEADLINE)
    clock = types.SimpleNamespace(monotonic=lambda: next(ticks))
    monkeypatch.setattr(gutenberg, "time", clock)
    with pytest.raises(DownloadError, match=f"not complete after {gutenberg.DEADLINE} seconds"):
        gutenberg.download(site.serve(BODY))


def test_each_problem_is_named_once(site):
    gone = [site.serve(b"", "404 Not Found", path=f"/{n}") for n in range(2)]
    page = site.serve(HTML)
    with pytest.raises(DownloadError) as caught:
        fetch_willows((*gone, page))
    assert str(caught.value) == "Not Found; what arrived is not the twelve chapters of the book"


def test_without_a_network_the_problem_is_said_in_a_line(site):
    with pytest.raises(DownloadError, match="a test tried to look up") as caught:
        fetch_willows()
    assert "\n" not in str(caught.value)
    assert cached() == []


def test_the_addresses_are_encrypted():
    assert gutenberg.URLS
    assert all(url.startswith("https://") for url in gutenberg.URLS)


# -- the cache -------------------------------------------------------------------------


def test_a_cache_in_the_place_of_a_file_is_named(site, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(DownloadError, match="cannot be written: ") as caught:
        fetch_willows((site.serve(BODY),))
    assert str(caught.value).startswith(str(cache_folder()))


def test_a_cache_that_is_locked_is_named(site, monkeypatch, tmp_path):
    folder = tmp_path / "locked"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))

    def lock(function):  # not chmod: it does not keep out root, as whom a container runs
        def locked(path, *args, **kwargs):
            if str(path).startswith(str(folder)):
                raise PermissionError(13, "Permission denied", str(path))
            return function(path, *args, **kwargs)

        return locked

    for name in ("stat", "mkdir"):
        monkeypatch.setattr(os, name, lock(getattr(os, name)))
    with pytest.raises(DownloadError, match="cannot be written: Permission denied") as caught:
        fetch_willows((site.serve(BODY),))
    assert str(caught.value).startswith(str(cache_folder()))


# -- the licence -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (f"Licence.\n{START}\nIt rained.\n{END}\nLicence.", "\nIt rained.\n"),
        (f"\ufeffLicence.\n{START.replace('*** ', '***')}\nIt rained.\n", "\nIt rained.\n"),
        (f"It rained.\n{END.replace('THE', 'THIS')}\nLicence.", "It rained.\n"),
        ("It rained.\n\n*** So.\n", "It rained.\n\n*** So.\n"),
        (f"It said {START} and {END}.", f"It said {START} and {END}."),
    ],
    ids=["both marks", "start only", "end only", "no mark", "marks within a line"],
)
def test_the_licence_is_stripped(raw, text):
    assert strip_licence(raw) == text
