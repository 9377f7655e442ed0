"""Things to move and to type into: each is a pure figure function behind a few controls.

A notebook shows the same picture once without the widget, so that a page that runs
nothing still shows it. They need no more than ipywidgets 7.7.
"""

import html
from collections.abc import Sequence

import ipywidgets
import torch
from IPython.display import display

from willows_kd.cost import eval_mode
from willows_kd.errors import require
from willows_kd.figures.plots import plot_attention, plot_soft_labels, plot_speedup, plot_token_view
from willows_kd.generation import complete
from willows_kd.students import evenly_spaced


def explore_temperature(model, tokenizer, prompts: list[str], temperatures=(0.5, 8.0)):
    """Soft labels of the next token after a prompt, with the temperature on a slider."""
    require(prompts, "no prompts were given; give a list of at least one text")
    logits = {prompt: next_token_logits(model, tokenizer, prompt) for prompt in prompts}
    low, high = temperatures
    controls = {
        "prompt": ipywidgets.Dropdown(options=prompts, description="after"),
        "temperature": ipywidgets.FloatSlider(
            1.0, min=low, max=high, step=0.25, description="T", continuous_update=False
        ),
    }

    def show(prompt, temperature):
        display(plot_soft_labels(logits[prompt], tokenizer, temperature))

    return explorer(show, controls)


def explore_tokens(teacher, student, tokenizer, text: str):
    """Teacher and student side by side, one position of a text at a time."""
    ids = ids_of(tokenizer, text)
    both = [all_logits(model, ids) for model in (teacher, student)]
    controls = {
        "position": ipywidgets.IntSlider(
            1, min=1, max=ids.shape[1] - 1, description="token", continuous_update=False
        )
    }

    def show(position):
        before = tokenizer.decode(ids[0, max(0, position - 8) : position].tolist())
        views = [logits[position - 1] for logits in both]
        display(plot_token_view(*views, tokenizer, before.replace("\n", " ")))

    return explorer(show, controls)


def explore_attention(teacher, student, tokenizer, text: str):
    """Attention maps of teacher and student side by side, one layer and head at a time.

    Beside a layer of the student stands that of the teacher at the same share of its depth,
    from which `student_from_teacher` copies it.
    """
    ids = ids_of(tokenizer, text)
    of_teacher, of_student = (attention_maps(model, ids) for model in (teacher, student))
    partners = evenly_spaced(len(of_teacher), len(of_student))
    heads = min(len(of_teacher[0]), len(of_student[0]))
    controls = {
        name: ipywidgets.IntSlider(1, min=1, max=top, description=name, continuous_update=False)
        for name, top in (("layer", len(of_student)), ("head", heads))
    }

    def show(layer, head):
        partner = partners[layer - 1]
        maps = {
            f"teacher, layer {partner + 1}": of_teacher[partner][head - 1],
            f"student, layer {layer}": of_student[layer - 1][head - 1],
        }
        display(plot_attention(maps, ids[0], tokenizer))

    return explorer(show, controls)


def explore_speedup(acceptance: float, cost: float, ks: Sequence[int]):
    """Speed-up by the number of drafted tokens, with acceptance and cost ratio on sliders."""
    controls = {
        name: ipywidgets.FloatSlider(
            value, min=0, max=1, step=0.01, description=name, continuous_update=False
        )
        for name, value in (("acceptance", acceptance), ("cost ratio", cost))
    }

    def show(**chosen):
        display(plot_speedup(chosen["acceptance"], chosen["cost ratio"], ks))

    return explorer(show, controls)


def prompt_box(models: dict, tokenizer, prompt: str = "The Mole", max_new_tokens: int = 40):
    """A box to type a prompt into; each model continues it, from the same seed.

    What a model writes is shown as text, whatever it looks like: it is escaped.
    """
    box = ipywidgets.Text(prompt, description="prompt", continuous_update=False)
    seed = ipywidgets.IntSlider(0, min=0, max=20, description="seed", continuous_update=False)
    out = {name: ipywidgets.HTML() for name in models}

    def write(_change=None):
        for name, model in models.items():
            text = complete(model, tokenizer, box.value, max_new_tokens, seed=seed.value)
            out[name].value = f"<b>{html.escape(name)}</b><p>{html.escape(text)}</p>"

    box.observe(write, "value")
    seed.observe(write, "value")
    write()
    return ipywidgets.VBox([box, seed, *out.values()])


def explorer(show, controls: dict):
    """Controls above what a function displays for their values; its errors are shown there."""
    out = ipywidgets.interactive_output(show, controls)
    return ipywidgets.VBox([*controls.values(), out])


def ids_of(tokenizer, text: str) -> torch.Tensor:
    """The token ids of a text, shape (1, tokens), at least two of them."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    require(ids.shape[1] > 1, f"the text {text!r} is too short; give one of at least two tokens")
    return ids


def next_token_logits(model, tokenizer, prompt: str) -> torch.Tensor:
    """Logits of the token after a prompt, shape (vocabulary,)."""
    return all_logits(model, tokenizer(prompt, return_tensors="pt")["input_ids"])[-1]


@torch.inference_mode()
def all_logits(model, ids: torch.Tensor) -> torch.Tensor:
    """Logits at each position of one text, shape (tokens, vocabulary), on the CPU."""
    with eval_mode(model):
        return model(ids.to(model.device)).logits[0].float().cpu()


@torch.inference_mode()
def attention_maps(model, ids: torch.Tensor) -> list[torch.Tensor]:
    """Each layer's attention weights for one text, shape (heads, tokens, tokens), on the CPU."""
    usual = model.config._attn_implementation
    with eval_mode(model):
        model.set_attn_implementation("eager")  # faster kernels do not keep the weights
        try:
            found = model(ids.to(model.device), output_attentions=True).get("attentions")
        finally:
            model.set_attn_implementation(usual)
    kind = model.config.model_type
    require(found, f"models of the {kind} family have no attention maps; give one of another")
    return [weights[0].float().cpu() for weights in found]
