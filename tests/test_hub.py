"""A model hub that fails in each way a hub can: one clear line, in bounded time, and then it works.

A server of this machine plays the hub, in a process of its own as the address is read once.
"""

import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

HTML = b"<html><body>Sign in to the network</body></html>"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
HANG = 90  # seconds: longer than anybody waits


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves the model directory `root` under any name; the name says what goes wrong."""

    protocol_version = "HTTP/1.1"
    root: Path
    done = threading.Event()
    seen: list[str] = []
    waited_out: list[str] = []

    def do_HEAD(self):
        self.answer(head=True)

    def do_GET(self):
        self.answer(head=False)

    def answer(self, head: bool) -> None:
        self.seen.append(self.path)
        fault = self.path.removeprefix("/api/models").split("/")[2]
        file = self.root / self.path.rsplit("/", 1)[-1]
        if fault == "hangs":
            if not self.done.wait(HANG):
                self.waited_out.append(self.path)
            self.close_connection = True
        elif fault == "unknown":
            self.send(404, b"Repository not found", head, {"X-Error-Code": "RepoNotFound"})
        elif fault.isdigit():
            self.send(int(fault), b"no", head, {"Retry-After": "1"})
        elif not self.path.startswith("/faults/") or not file.is_file():
            self.send(404, b"Entry not found", head, {"X-Error-Code": "EntryNotFound"})
        elif fault == "html":  # a portal that one has to sign in to: nothing of a hub's headers
            self.send(200, HTML, head, {"X-Repo-Commit": None, "ETag": None})
        else:
            body = file.read_bytes()
            large = file.suffix == ".safetensors"
            self.send(200, body, head, cut=len(body) // 2 if fault == "cut" and large else 0)

    def send(self, status: int, body: bytes, head=True, more=None, cut: int = 0) -> None:
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{len(body)}"', "Content-Length": len(body)}
        self.send_response(status)
        for name, value in (headers | (more or {})).items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        if not head:
            self.wfile.write(body[: len(body) - cut])
        self.close_connection = bool(cut)

    def log_message(self, *_):
        pass


@pytest.fixture
def ask(model_dir, tmp_path):
    """A function that asks the hub for names, in a process of its own."""
    Hub.root, Hub.seen, Hub.waited_out = model_dir, [], []
    Hub.done.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,)).start()
        address = f"http://127.0.0.1:{server.server_port}"
        environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hub")}
        environment.pop("HF_HUB_OFFLINE", None)
        environment |= {"NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}

        def ask(*names: str) -> dict:
            script = Path(__file__).with_name("hub_faults.py")
            done = subprocess.run(
                [sys.executable, script, *names],
                capture_output=True,
                encoding="utf-8",
                env=environment,
                timeout=600,
            )
            assert done.returncode == 0, done.stderr
            ask.stderr = done.stderr
            return json.loads(done.stdout)

        yield ask
        Hub.done.set()
        server.shutdown()


FAULTS = ["unknown", "401", "403", "404", "429", "503", "html", "cut"]


@pytest.mark.slow
def test_a_hub_that_fails_is_one_line_and_spoils_nothing(ask):
    names = [f"faults/{fault}" for fault in FAULTS]
    found = ask(*names, "faults/good")
    for fault, name in zip(FAULTS, names, strict=True):
        answer = found[name]
        assert answer["what"] in ("HubError", "InputError"), fault
        assert name in answer["message"]
        assert "\n" not in answer["message"]
    assert found["faults/good"]["what"] == "loaded"
    assert "Traceback" not in ask.stderr


def test_a_hub_that_hangs_is_given_up(ask):
    assert ask("faults/hangs")["faults/hangs"]["what"] == "HubError"
    assert not Hub.waited_out


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["html", "cut"])
def test_what_a_failing_hub_gave_is_not_kept(fault, ask, model_dir, tmp_path):
    name = f"faults/{fault}"
    assert ask(name)[name]["what"] != "loaded"
    answer = Hub.answer
    Hub.answer = lambda self, head: good(self, head, fault, answer)
    try:
        assert ask(name)[name]["what"] == "loaded"  # the same name, and now it answers well
    finally:
        Hub.answer = answer


def good(self, head: bool, fault: str, answer) -> None:
    """Answer as a hub that is well again."""
    self.path = self.path.replace(f"/faults/{fault}/", "/faults/good/")
    answer(self, head)
