"""Things to move and to type into: each is a pure figure function behind a few controls.

A notebook shows the same picture once without the widget, so that a page that runs
nothing still shows it. They need no more than ipywidgets 7.7.
"""

import html
from collections.abc import Callable

import ipywidgets
import torch
from IPython.display import display

from willows_kd.figures.plots import plot_bars, show_token, token_table
from willows_kd.generation import complete
from willows_kd.losses import entropy, soften
from willows_kd.models import eval_mode


def explore_figure(draw: Callable, **controls):
    """Controls above the figure that a function draws for their values, each by its name."""
    out = ipywidgets.interactive_output(lambda **chosen: display(draw(**chosen)), controls)
    return ipywidgets.VBox([*controls.values(), out])


def slider(name: str, start, low, high, step):
    """A slider, of whole numbers if its step is one; it counts when it is let go."""
    kind = ipywidgets.IntSlider if isinstance(step, int) else ipywidgets.FloatSlider
    look = {"description": name, "continuous_update": False}
    return kind(start, min=low, max=high, step=step, **look)


def explore_temperature(model, tokenizer, prompts: list[str], temperature: float = 1.0):
    """Soft labels of the next token after a prompt, with the temperature on a slider."""
    logits = {
        prompt: all_logits(model, tokenizer(prompt, return_tensors="pt")["input_ids"])[-1]
        for prompt in prompts
    }

    def draw(after, T):
        soft = soften(logits[after], T)
        columns = {f"T = {T:g}": soft} | ({} if T == 1 else {"T = 1": soften(logits[after])})
        return plot_bars(
            token_table(columns, tokenizer, k=10),
            title=f"After “{after}”, T = {T:g}: entropy {entropy(soft):.2f} nats",
            xlabel="probability",
            form=".3f",
        )

    wide = {"layout": {"width": "100%"}, "description": "after"}
    low, high = min(0.5, temperature), max(8.0, temperature)
    return explore_figure(
        draw,
        after=ipywidgets.Dropdown(options=prompts, **wide),
        T=slider("T", temperature, low, high, 0.25),
    )


def explore_tokens(teacher, student, tokenizer, text: str):
    """Teacher and student side by side, one position of a text at a time."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    models = {"teacher": teacher, "student": student}
    soft = {name: soften(all_logits(model, ids)) for name, model in models.items()}

    def draw(token):
        before = tokenizer.decode(ids[0, max(0, token - 8) : token].tolist())
        here = {name: p[token - 1] for name, p in soft.items()}
        said = [f"{name} “{show_token(tokenizer, p.argmax())}”" for name, p in here.items()]
        title = f"After “… {' '.join(before.split())}”: {', '.join(said)}"
        table = token_table(here, tokenizer)
        return plot_bars(table, title=title, xlabel="probability", form=".3f")

    return explore_figure(draw, token=slider("token", 1, 1, ids.shape[1] - 1, 1))


def prompt_box(models: dict, tokenizer, prompt: str = "The Mole", max_new_tokens: int = 40):
    """A box to type a prompt into; each model continues it, from the same seed.

    What a model writes is shown as text, whatever it looks like: it is escaped.
    """
    field = ipywidgets.Text(prompt, continuous_update=False, layout={"width": "100%"})
    button = ipywidgets.Button(description="Write", button_style="primary")
    seed = slider("seed", 0, 0, 20, 1)
    out = {name: ipywidgets.HTML() for name in models}

    def write(_change=None):
        button.disabled, button.description = True, "Writing …"
        for name in models:
            out[name].value = f"<b>{html.escape(name)}</b><p>writing …</p>"
        try:
            for name, model in models.items():
                text = complete(model, tokenizer, field.value, max_new_tokens, seed=seed.value)
                out[name].value = f"<b>{html.escape(name)}</b>{continuation(field.value, text)}"
        finally:
            button.disabled, button.description = False, "Write"

    field.observe(write, "value")  # Enter
    seed.observe(write, "value")
    button.on_click(write)
    write()
    return ipywidgets.VBox([field, ipywidgets.HBox([button, seed]), *out.values()])


def continuation(prompt: str, text: str) -> str:
    """A text as HTML: its prompt paler than the rest, and what became of the prompt."""
    lost = next(i for i in range(len(prompt) + 1) if text.startswith(prompt[i:]))
    kept = prompt[lost:]
    notes = ["the box is empty: the model begins a text of its own"] * (not prompt)
    notes += [f"too long: the prompt's first {lost} characters were cut off"] * (lost > 0)
    small = "".join(f"<br><small>({note})</small>" for note in notes)
    pale, rest = html.escape(kept), html.escape(text[len(kept) :])
    return f'<p><span style="opacity: 0.6">{pale}</span>{rest}{small}</p>'


@torch.inference_mode()
def all_logits(model, ids: torch.Tensor) -> torch.Tensor:
    """Logits at each position of one text, shape (tokens, vocabulary), on the CPU."""
    with eval_mode(model):
        return model(ids.to(model.device)).logits[0].float().cpu()
