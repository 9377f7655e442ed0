"""The site in a real browser: `make site`, then every page as a reader sees it.

Needs the extra `site` and Chromium; skipped without them. Screenshots of every page, on a desk
and on a phone, are left in tests/artifacts/site/.
"""

import functools
import http.server
import json
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_browser
from notebook_runs import SERIES, SOLUTIONS
from test_browser import CHROMIUM

import willows_kd as kd

pytest.importorskip("myst_nb", reason='`pip install -e ".[site]"`')
pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium found"),
]

browser = test_browser.browser
ROOT = Path(__file__).parent.parent
PICTURES = Path(__file__).parent / "artifacts" / "site"
DESK = {"width": 1280, "height": 900}
PHONE = {"width": 390, "height": 844}
TEX = re.compile(r"\$[^$\n]+\$|\\\(|\\\[|\\[a-z]{2,}")
TABLE = re.compile(r"\| ?:?[-–—]{2}")  # as Markdown writes it, with dashes made long or not
SEEN = {  # what is noted of a page, and the script that finds it
    "links": "() => [...document.querySelectorAll('a[href]')].map(one => one.href)",
    "anchors": "() => [...document.querySelectorAll('[id]')].map(one => one.id)",
    # prose, in which no TeX or Markdown may be left: all but code and drawn formulas
    "prose": """() => {
        const copy = document.querySelector('article').cloneNode(true);
        copy.querySelectorAll('pre, code, mjx-container, script').forEach(one => one.remove());
        return copy.textContent;
    }""",
    # inline formulas that scroll
    "bars": """() => [...document.querySelectorAll('span.math')]
        .filter(one => ['auto', 'scroll'].includes(getComputedStyle(one).overflowX)).length""",
    # pictures that say nothing to who cannot see them
    "mute": """() => [...document.querySelectorAll('article img')]
        .filter(one => one.alt.length < 10 || one.alt.includes('_images')).map(one => one.src)""",
    # whether each is drawn, with no command that MathJax does not know, which it writes in red
    "formulas": """() => [...document.querySelectorAll('.math')].map(one =>
        !!one.querySelector('mjx-container svg')
        && !one.querySelector('[data-mjx-error], [fill="red"]'))""",
}
# What reaches beyond the window and is in nothing that scrolls by itself.
SIDEWAYS = """() => {
    const scrolls = one => one && one.tagName !== 'ARTICLE' && (
        ['auto', 'scroll'].includes(getComputedStyle(one).overflowX) || scrolls(one.parentElement));
    return [...document.querySelectorAll('article, article *')]
        .filter(one => one.getBoundingClientRect().right > window.innerWidth && !scrolls(one))
        .map(one => one.outerHTML.slice(0, 80));
}"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site's folder and its address on this machine."""
    folder = tmp_path_factory.mktemp("build") / "site"
    command = re.search(r"-m sphinx .*", (ROOT / "Makefile").read_text(encoding="utf-8"))[0]
    command = command.replace("build/site", str(folder))
    command = command.replace("build/doctrees", str(folder.with_name("doctrees")))
    done = subprocess.run(
        [sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    quiet = {"log_message": lambda *_: None}
    handler = type("Quiet", (http.server.SimpleHTTPRequestHandler,), quiet)
    handler = functools.partial(handler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield SimpleNamespace(folder=folder, address=f"http://127.0.0.1:{server.server_port}/")
        server.shutdown()


@pytest.fixture(scope="module")
def seen(site, browser):
    """What a reader meets on each page: one visit each on a desk and on a phone."""
    pages = sorted(path.relative_to(site.folder).as_posix() for path in site.folder.rglob("*.html"))
    return {name: visit(site, browser, name) for name in pages if name != "index.html"}


def visit(site, browser, name: str) -> SimpleNamespace:
    """Open one page in both sizes, and note what it shows and asks for."""
    page = browser.new_page(viewport=DESK)
    found = SimpleNamespace(requests=[], errors=[])
    page.on("request", lambda request: found.requests.append(request.url))
    page.on("console", lambda said: said.type == "error" and found.errors.append(said.text))
    page.on("pageerror", lambda error: found.errors.append(str(error)))
    page.on("response", lambda got: got.status >= 400 and found.errors.append(got.url))
    page.goto(site.address + name)
    page.evaluate("() => window.MathJax?.startup?.promise")
    for what, script in SEEN.items():
        setattr(found, what, page.evaluate(script))
    found.tables = TABLE.findall(found.prose)
    picture = PICTURES / name.replace("/", "-").removesuffix(".html")
    page.screenshot(path=f"{picture}-1280.png", full_page=True)
    page.set_viewport_size(PHONE)
    found.sideways = page.evaluate(SIDEWAYS)
    page.screenshot(path=f"{picture}-390.png", full_page=True)
    page.close()
    return found


def test_every_notebook_and_page_is_there(seen):
    pages = [*SERIES, *SOLUTIONS, *(ROOT / "docs").glob("*.md")]
    names = {path.relative_to(ROOT).with_suffix(".html").as_posix() for path in pages}
    assert names <= set(seen)


def test_no_request_leaves_the_machine_and_no_link_within_the_site_is_dead(site, seen):
    asked = {url for page in seen.values() for url in page.requests}
    assert {url for url in asked if not url.startswith((site.address, "data:"))} == set()
    anchors = {f"{name}#{anchor}" for name, page in seen.items() for anchor in page.anchors}
    links = {link for page in seen.values() for link in page.links}
    mine = {link.removeprefix(site.address) for link in links if link.startswith(site.address)}
    missing = {link for link in mine if not (site.folder / link.partition("#")[0]).exists()}
    assert missing == set()
    assert {link for link in mine if not link.endswith("#") and "#" in link} <= anchors


def test_formulas_are_drawn_and_none_is_left_as_tex(seen):
    assert sum(len(page.formulas) for page in seen.values()) > 10
    assert [name for name, page in seen.items() if not all(page.formulas)] == []
    assert {n: TEX.findall(page.prose) for n, page in seen.items() if TEX.search(page.prose)} == {}


@pytest.mark.parametrize("what", ["errors", "bars", "mute", "tables", "sideways"])
def test_no_page_has(what, seen):
    """Errors, formulas that scroll, mute pictures, tables as Markdown, what a phone cuts off."""
    assert {name: getattr(page, what) for name, page in seen.items() if getattr(page, what)} == {}


def test_the_search_finds_the_notebook_on_temperature(site, browser):
    page = browser.new_page(viewport=DESK)
    page.goto(site.address)  # which leads on to the first page
    page.wait_for_url("**/docs/index.html")
    page.fill("input[name=q]", "temperature")
    page.press("input[name=q]", "Enter")
    page.wait_for_function("() => document.querySelector('.search-summary')")
    links = page.eval_on_selector_all("#search-results li a", "all => all.map(one => one.href)")
    lessons = ["/solutions/" not in link for link in links]
    assert any("02_soft_labels_and_temperature.html" in link for link in links)
    assert lessons == sorted(lessons, reverse=True)  # solutions come last
    page.close()


def test_the_api_has_every_public_name_in_order_and_commands_their_help(site, seen):
    listed = [
        anchor for anchor in seen["docs/api.html"].anchors if anchor.startswith("willows_kd.")
    ]
    names = [f"willows_kd.{file}.{name}" for name, file in kd.HOME.items()]
    members = {anchor for anchor in listed if anchor.rpartition(".")[0] in names}  # of classes
    assert [anchor for anchor in listed if anchor not in members] == names
    page = (site.folder / "docs" / "command_line.html").read_text(encoding="utf-8")
    assert "usage: willows-kd distill" in re.sub(r"<[^>]+>", "", page)


def test_a_notebook_gets_the_badge_of_this_copys_address(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import pages

    monkeypatch.setattr(pages, "address", lambda: "https://github.com/owner/name")
    app = SimpleNamespace(env=SimpleNamespace(doc2path=lambda docname: f"{docname}.ipynb"))
    source = [json.dumps({"cells": [{"metadata": {"tags": ["nav"]}, "source": ""}]})]
    pages.prepare_notebook(app, "notebooks/01_teacher", source)
    place = "github/owner/name/blob/main/notebooks/01_teacher.ipynb"
    first, offered = (cell["source"] for cell in json.loads(source[0])["cells"])
    assert first.endswith(f"[Open in Colab](https://colab.research.google.com/{place})")
    assert "{download}`Download <01_teacher.ipynb>`" in offered
