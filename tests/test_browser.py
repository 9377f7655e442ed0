"""JupyterLab in a real browser: every notebook with widgets runs, and these live.

Needs Chromium (Debian: `apt-get install chromium`); skipped where there is none.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
from jupyter_client import BlockingKernelClient
from notebook_runs import SERIES, short_book, small

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
FLAGS += ["--disable-component-update", "--no-first-run", "--disable-quic"]
MINUTES = 60_000  # one of them, in milliseconds
WIDGETS = ("kd.explore_", "kd.prompt_box")
LIVE = [path for path in SERIES if any(w in path.read_text(encoding="utf-8") for w in WIDGETS)]
# Every cell in the page, seen or not; no pop-up with news of Jupyter.
SETTINGS = {
    "notebook-extension/tracker": '{"windowingMode": "none"}',
    "apputils-extension/notification": '{"fetchNews": "false", "checkForUpdates": false}',
}
# Through JupyterLab's own commands, which report the end: a click on a menu may come too early.
RUN_ALL = """async () => {
    await jupyterapp.restored;
    const panel = jupyterapp.shell.currentWidget;
    await panel.context.ready;
    await panel.sessionContext.ready;
    jupyterapp.commands.execute("notebook:run-all-cells").then(() => { window.ran = true; });
}"""

# an error's traceback, or what was written to stderr; by version they are told apart or not
TROUBLE = ", ".join(f'[data-mime-type="application/vnd.jupyter.{n}"]' for n in ("error", "stderr"))

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium found: `apt-get install chromium`"),
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A JupyterLab over copies of the notebooks, in which nothing is stored yet."""
    folder = tmp_path_factory.mktemp("lab")
    for path in LIVE:
        notebook = small(path)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, folder / path.name)
    for name, settings in SETTINGS.items():
        file = folder / ".config" / "lab" / "user-settings" / "@jupyterlab"
        file = file / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True)
        file.write_text(settings)
    port = free_port()
    command = f"-m jupyter lab --no-browser --port={port} --allow-root".split()
    command += ["--ServerApp.token=", "--ServerApp.password=", f"--ServerApp.root_dir={folder}"]
    command += ["--ServerApp.disable_check_xsrf=True", "--LabApp.expose_app_in_browser=True"]
    places = {
        "JUPYTER_CONFIG_DIR": str(folder / ".config"),
        "JUPYTER_RUNTIME_DIR": str(folder / ".runtime"),
        "XDG_CACHE_HOME": str(folder / ".cache"),
        "WILLOWS_KD_CORPUS": str(short_book(folder)),
    }
    environment = os.environ | places | {"HF_HUB_OFFLINE": "1"}
    with (folder / "lab.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, *command], stdout=log, stderr=log, env=environment, cwd=folder
        )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_until_answering(address)
        yield SimpleNamespace(address=address, folder=folder)
    finally:
        server.terminate()
        server.wait(30)


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_answering(address: str, seconds: float = 120) -> None:
    """Return when the server answers."""
    end = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


def start_kernel(lab, name: str) -> None:
    """Start a notebook's kernel and return when it answers.

    JupyterLab connects twice to a kernel that is slow to start, and forgets what it sent
    before: so the page is opened only when the kernel is ready.
    """
    kernel = {"kernel": {"name": "python3"}, "name": name, "path": name, "type": "notebook"}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(
        f"{lab.address}/api/sessions", json.dumps(kernel).encode(), headers
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        number = json.load(answer)["kernel"]["id"]
    client = BlockingKernelClient()
    client.load_connection_file(str(lab.folder / ".runtime" / f"kernel-{number}.json"))
    client.start_channels()
    client.kernel_info(reply=True, timeout=120)
    client.stop_channels()


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="`pip install playwright`")
    with sync_api.sync_playwright() as engine:
        chromium = engine.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


PICTURES = "document.querySelectorAll('.jp-RenderedImage img').length"
SHOWN = "() => [...document.querySelectorAll('.widget-output img')].map(one => one.src).join()"
ANSWERED = """() => [...document.querySelectorAll('.widget-html')]
    .some(one => one.innerText.includes('The owl'))"""


def stored_pictures(path: Path) -> int:
    outputs = [o for cell in nbformat.read(path, 4).cells for o in cell.get("outputs", [])]
    return sum("image/png" in output.get("data", {}) for output in outputs)


def move_slider(page) -> None:
    """Move the first explorer's slider one step and wait for another picture."""
    before = page.evaluate(SHOWN)
    assert before, "the explorer shows no picture"
    page.focus(".widget-box:has(.widget-output) .noUi-handle")
    page.keyboard.press("ArrowRight")
    page.wait_for_function(f"before => ({SHOWN})() !== before", arg=before, timeout=3 * MINUTES)


def type_prompt(page) -> None:
    """Type into the first prompt box and wait for text that goes on from there."""
    box = page.query_selector(".widget-text input")
    box.fill("The owl")
    box.press("Enter")
    page.wait_for_function(ANSWERED, timeout=3 * MINUTES)


@pytest.mark.parametrize("path", LIVE, ids=lambda path: path.stem)
def test_a_notebook_is_shown_whole_and_its_widgets_live(path, lab, browser):
    start_kernel(lab, path.name)
    page = browser.new_page()
    page.goto(f"{lab.address}/lab/tree/{path.name}?reset")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=2 * MINUTES)
    page.evaluate(RUN_ALL)
    page.wait_for_function("window.ran", timeout=10 * MINUTES)  # an error ends it too
    page.wait_for_function(f"{PICTURES} >= {stored_pictures(path)}", timeout=MINUTES)
    assert page.query_selector_all(".jp-MarkdownCell:not(:has(.jp-RenderedMarkdown))") == []
    assert "Error displaying widget" not in page.inner_text(".jp-Notebook")
    source = path.read_text(encoding="utf-8")
    if "kd.explore_" in source:
        move_slider(page)
    if "kd.prompt_box" in source:
        type_prompt(page)
    assert page.query_selector_all(TROUBLE) == []
    page.close()
