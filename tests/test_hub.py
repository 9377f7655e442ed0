"""A model hub that fails: one clear line, in bounded time, nothing spoilt, and then it works."""

import http.server
import threading
from pathlib import Path

import huggingface_hub
import pytest

import willows_kd as kd

HTML = b"<html><body>Sign in to the network</body></html>"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
HANG = 90  # seconds: longer than anybody waits


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves the model directory `root` under any name, with the `fault` of the moment."""

    protocol_version = "HTTP/1.1"
    root: Path
    fault = ""
    done = threading.Event()
    waited_out: list[str] = []

    def do_GET(self):
        file = self.root / self.path.rsplit("/", 1)[-1]
        if self.fault == "hangs":
            if not self.done.wait(HANG):
                self.waited_out.append(self.path)
            self.close_connection = True
        elif self.fault.isdigit():
            self.send(int(self.fault), b"no")
        elif not self.path.startswith("/owner/name/") or not file.is_file():
            self.send(404, b"Entry not found", {"X-Error-Code": "EntryNotFound"})
        elif self.fault == "html":  # a portal that one has to sign in to, without a hub's headers
            self.send(200, HTML, {"X-Repo-Commit": None, "ETag": None})
        else:
            body, cut = file.read_bytes(), self.fault == "cut" and file.suffix == ".safetensors"
            self.send(200, body, cut=len(body) // 2 if cut else 0)

    do_HEAD = do_GET

    def send(self, status: int, body: bytes, more=None, cut: int = 0) -> None:
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{len(body)}"', "Content-Length": len(body)}
        self.send_response(status)
        for name, value in (headers | (more or {})).items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) - cut])
        self.close_connection = bool(cut)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(model_dir, tmp_path, monkeypatch):
    """A hub on this machine."""
    Hub.root, Hub.fault, Hub.waited_out = model_dir, "", []
    Hub.done.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,)).start()
        constants, address = huggingface_hub.constants, f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield Hub
        Hub.done.set()
        server.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["404", "401", "503", "html", "cut", "hangs"])
def test_a_hub_that_fails_is_one_line_and_what_it_gave_is_not_kept(fault, hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the library's own tries
    hub.fault = fault
    with pytest.raises(kd.InputError, match=r"^owner/name [^\n]+$"):
        kd.load_teacher("owner/name", "cpu")
    assert not hub.waited_out
    hub.fault = ""  # the same name, and now it answers well
    teacher, tokenizer = kd.load_teacher("owner/name", "cpu")
    assert teacher.config.vocab_size == len(tokenizer)
