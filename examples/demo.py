"""A web page on which models go on with one prompt, side by side: python examples/demo.py.

Each text of the others is shaded by the KL divergence from the first model, the teacher. What a
model or a user wrote reaches the page only through `html.escape`.
"""

import argparse
import html
import importlib.util
import math
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import torch

from willows_kd.cli.distill import find_device
from willows_kd.cli.others import names_of
from willows_kd.cost import size_on_disk
from willows_kd.errors import InputError, require
from willows_kd.evaluation import token_scores
from willows_kd.generation import complete
from willows_kd.models import bundled, load_student, load_teacher

HOST = "127.0.0.1"
NEW_TOKENS = 60
LONG_PROMPT = 400  # characters that are shown at once
ABOUT = """# Teacher and student, side by side
Begin a text. A language model, the *teacher*, goes on with it, and so does a smaller one that
learnt from it, the *student*: one after the other, so that each has the machine to itself. The
redder a token of the student, the further its prediction was from the teacher's (KL divergence,
in nats; point at a token for the number)."""
CSS = """
.model { border-top: 2px solid var(--border-color-primary); padding-top: .6em; min-height: 9em }
.model h3 { margin: 0 } .model small, .model .prompt { opacity: .65 }
@media (max-width: 40em) { .models { flex-direction: column } }
.model p { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.7; font-size: 1.05em }
"""


def main(arguments: list[str] | None = None) -> int:
    """Show the page until Ctrl-C; returns the exit code, 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    models = "the teacher, then students (default: the bundled teacher and student)"
    add("model_dir", metavar="DIR", nargs="*", help=models)
    add("--port", type=int, default=7860, help="for this machine alone (default: 7860)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps ... (default: auto)")
    options = parser.parse_args(arguments)
    try:
        check_page(options.port)
        serve(*load(options.model_dir, find_device(options.device)), options.port)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def load(folders: list[str], device) -> tuple[dict[str, torch.nn.Module], object]:
    """The models of some folders by name, the teacher first, and its tokenizer."""
    folders = folders or [str(bundled(name)) for name in ("teacher", "student")]
    names = names_of(folders)
    teacher, tokenizer = load_teacher(folders[0], device)
    students = [load_student(name, tokenizer, device).eval() for name in folders[1:]]
    return dict(zip(names, [teacher, *students], strict=True)), tokenizer


def check_page(port: int) -> None:
    """Require gradio, and a port on which a page can be opened."""
    found = importlib.util.find_spec("gradio")
    require(found, "demo needs gradio; pip install gradio")
    try:
        socket.create_server((HOST, port)).close()
    except (OSError, OverflowError) as error:
        reason = f"port {port} cannot be used ({error}); give another with --port"
        raise InputError(reason) from error


def serve(models: dict[str, torch.nn.Module], tokenizer, port: int) -> None:
    """Show the page of some models, the teacher first, until Ctrl-C."""
    import gradio as gr

    page = make_page(models, tokenizer)
    excepted = os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")
    os.environ["no_proxy"] = f"{excepted},{HOST}"  # gradio looks whether its page answers
    page.launch(
        server_name=HOST,
        server_port=port,
        share=False,
        ssr_mode=False,
        quiet=True,
        # the machine's own fonts: none is fetched
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        css=CSS,
        footer_links=[],
        prevent_thread_lock=True,
    )
    print(f"🌐 http://{HOST}:{port} shows {', '.join(models)}; Ctrl-C ends it", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        page.close(verbose=False)


def make_page(models: dict[str, torch.nn.Module], tokenizer):
    """The page as gradio's `Blocks`. It asks nobody but this machine."""
    import gradio as gr

    teacher = next(iter(models.values()))
    heads = {name: heading(name, model) for name, model in models.items()}

    def answer(prompt: str, length: int, temperature: float, seed: int):
        shown = {name: column(head) for name, head in heads.items()}
        try:
            for name, model in models.items():
                settings = int(length), temperature, seed
                for now in columns(heads[name], teacher, model, tokenizer, prompt, *settings):
                    shown[name] = now
                    yield list(shown.values())
        except InputError as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from error

    with gr.Blocks(title="willows-kd", analytics_enabled=False) as page:
        gr.Markdown(ABOUT)
        prompt = gr.Textbox("The Mole had been", label="prompt", lines=2, max_lines=8)
        with gr.Row():
            length = gr.Slider(10, 200, NEW_TOKENS, step=10, label="tokens to write")
            heat = gr.Slider(0, 2, 0.8, step=0.1, label="temperature (0: the likeliest token)")
            seed = gr.Number(0, label="seed", precision=0, minimum=0, maximum=2**31)
        with gr.Row():
            button = gr.Button("Write", variant="primary")
            stop = gr.Button("Stop")
        with gr.Row(elem_classes="models"):
            outputs = [gr.HTML(column(head), min_width=300) for head in heads.values()]
        # one at a time: a second browser sees its place in the queue
        writing = gr.on(
            [button.click, prompt.submit],
            answer,
            [prompt, length, heat, seed],
            outputs,
            concurrency_limit=1,
            trigger_mode="once",
        )
        stop.click(None, cancels=[writing])
    return page


def columns(head: str, teacher, model, tokenizer, prompt: str, *settings) -> Iterator[str]:
    """What one model's column shows, token by token; a student's is shaded at the end."""
    parts, start = [], time.perf_counter()
    for prompt_ids, new_ids in written(model, tokenizer, prompt, *settings):
        parts = parts or [text_of(tokenizer, prompt_ids)]
        parts.append(text_of(tokenizer, prompt_ids + new_ids)[len("".join(parts)) :])
        fact = f"{len(new_ids) / (time.perf_counter() - start):.0f} tokens/s"
        yield column(head, fact, parts, [0.0] * len(new_ids))
    if model is not teacher:
        ids = torch.tensor([prompt_ids + new_ids], device=model.device)
        kl = token_scores(model, teacher, ids)["kl"][0, len(prompt_ids) - 1 :].tolist()
        fact += f" · {sum(kl) / len(kl):.2f} nats from the teacher"
        yield column(head, fact, parts, kl)


def written(model, tokenizer, prompt, *settings) -> Iterator[tuple[list, list]]:
    """The prompt's ids, as the model reads them, and those written so far, at each new one."""
    arrived: queue.SimpleQueue = queue.SimpleQueue()
    left = threading.Event()

    def put(ids):
        if left.is_set():
            raise InterruptedError("nobody reads on")
        arrived.put(ids.flatten().tolist())

    streamer = SimpleNamespace(put=put, end=lambda: None)
    with ThreadPoolExecutor(1) as pool:  # its end is waited for: the next page is alone then
        writing = pool.submit(complete, model, tokenizer, prompt, *settings, streamer=streamer)
        writing.add_done_callback(lambda _: arrived.put(None))
        ids: list[list[int]] = []
        try:
            for new in iter(arrived.get, None):
                ids.append(new)
                if len(ids) > 1:
                    yield ids[0], sum(ids[1:], [])
        finally:
            left.set()
        writing.result()  # raises what went wrong


def text_of(tokenizer, ids: list[int]) -> str:
    """The text of some ids, without a last character that further tokens have yet to spell."""
    return tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd")


def heading(name: str, model) -> str:
    """A model's name and size."""
    size = f"{model.num_parameters() / 1e6:.1f} M parameters · {size_on_disk(model) / 1e6:.1f} MB"
    return f"<h3>{html.escape(name)}</h3><small>{size}</small>"


def column(head: str, fact: str = "", parts=("",), kl=()) -> str:
    """A model's column: what it is, the prompt, and its tokens, each as dark as its KL is large."""
    prompt, *tokens = (html.escape(part) for part in parts)
    shaded = [
        f'<span style="background: rgba(209, 73, 91, {1 - math.exp(-2 * nats):.2f})" '
        f'title="{nats:.2f} nats">{token}</span>'
        for token, nats in zip(tokens, kl, strict=True)
    ]
    if len(parts[0]) > LONG_PROMPT:
        told = f"the prompt, {len(parts[0]):,} characters"
        prompt = f"<details><summary>{told}</summary>{prompt}</details>"
    text = f'<p><span class="prompt">{prompt}</span>{"".join(shaded)}</p>'
    return f'<div class="model">{head}<br><small>{fact}</small>{text}</div>'


if __name__ == "__main__":
    sys.exit(main())
