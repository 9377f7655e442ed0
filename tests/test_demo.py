"""The demo: what its page shows, what the command refuses, and the page in a real browser."""

import html
import importlib.util
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_browser import CHROMIUM, MINUTES, browser, free_port, wait_until_answering  # noqa: F401

import willows_kd as kd

EXAMPLE = Path(__file__).parent.parent / "examples" / "demo.py"
sys.path.insert(0, str(EXAMPLE.parent))
from demo import column, columns, main  # noqa: E402

HOSTILE = (
    "<img src=x onerror=\"document.title='broken in'\"></p></div><b> ${document.title=1} {{value}}"
)
GRADIO = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="no gradio")
SPAN = r'title="([\d.]+) nats">([^<]*)</span>'


# -- what is shown ---------------------------------------------------------------------


def test_a_column_holds_the_text_and_the_kl_of_each_token(teacher, make_gpt2, tokenizer):
    student = make_gpt2(layers=2, seed=1)
    *_, last = columns("", teacher, student, tokenizer, "The river", 60, 0.8, 3)
    text = kd.complete(student, tokenizer, "The river", 60, 0.8, 3)
    assert html.unescape(re.sub(r"<[^>]*>", "", last)).endswith(text.rstrip("\ufffd"))
    ids = torch.tensor([tokenizer("The river")["input_ids"]])
    spans = re.findall(SPAN, last)
    first = kd.token_scores(student, teacher, torch.cat([ids, ids[:, :1]], dim=1))["kl"][0, -1]
    assert spans[0][0] == f"{first:.2f}"
    assert max(float(nats) for nats, _ in spans) > 0
    *_, its_own = columns("", teacher, teacher, tokenizer, "The river", 60, 0.8, 3)
    assert {nats for nats, _ in re.findall(SPAN, its_own)} == {"0.00"}


def test_an_error_while_writing_is_raised(teacher, tokenizer):
    with pytest.raises(kd.InputError, match="temperature is -1"):
        next(columns("", teacher, teacher, tokenizer, "The", 60, -1, 0))


def test_who_stops_reading_stops_the_model(teacher, tokenizer):
    passes = []
    hook = teacher.register_forward_hook(lambda *_: passes.append(1))
    shown = columns("", teacher, teacher, tokenizer, "The", 60, 0, 0)
    next(shown)
    shown.close()
    hook.remove()
    assert len(passes) < 60


def test_hostile_text_is_escaped():
    shown = column("", "", [HOSTILE, HOSTILE], [0.5])
    assert "<img" not in shown and "<b>" not in shown
    assert shown.count("&lt;img") == 2


# -- what is refused -------------------------------------------------------------------


@GRADIO
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        used = str(taken.getsockname()[1])
        for arguments, said in {
            (f"{tmp_path}/missing",): "missing",
            ("a", "a"): "given twice",
            ("--device", "tpu9"): "cannot be used here",
            ("--port", "70000"): "give another with --port",
            ("--port", used): f"port {used} cannot be used",
        }.items():
            assert main(["--port", str(free_port()), *arguments]) == 2
            shown = capsys.readouterr().err
            assert re.fullmatch(r"error: [^\n]+\n", shown) and said in shown


def test_without_gradio_it_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main([]) == 2
    assert "pip install gradio" in capsys.readouterr().err


# -- in the browser --------------------------------------------------------------------


@pytest.fixture
def address():
    """The address of a demo of the bundled models."""
    port = str(free_port())
    with subprocess.Popen([sys.executable, str(EXAMPLE), "--port", port]) as server:
        wait_until_answering(f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}"
        server.terminate()


@GRADIO
@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium found: `apt-get install chromium`")
def test_two_pages_at_once_show_their_own_texts_as_text(address, browser):  # noqa: F811
    asked, said = [], []
    pages = {prompt: browser.new_page() for prompt in (HOSTILE, "The owl")}
    for prompt, page in pages.items():
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append((message.type, message.text)))
        page.goto(address)
        page.wait_for_selector(".model")
        page.fill("textarea", prompt)
    for page in pages.values():
        page.click("button:has-text('Write')")
    for prompt, page in pages.items():
        page.wait_for_selector("text=nats from the teacher", timeout=2 * MINUTES)
        texts = [one.inner_text() for one in page.query_selector_all(".model p")]
        assert len(texts) == 2
        assert all(text.startswith(prompt) and len(text) > len(prompt) for text in texts)
        shaded = page.query_selector_all(".model >> nth=1 >> span[title]")
        assert any(float(one.get_attribute("title").split()[0]) > 0 for one in shaded)
        assert page.query_selector_all("img[onerror], .model script, .model b") == []
        assert page.title() == "willows-kd"
        page.close()
    assert asked and all(url.startswith((address, "data:", "blob:")) for url in asked)
    assert [message for message in said if message[0] == "error"] == []
