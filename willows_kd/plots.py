"""Pictures of what was measured: data in, a `Figure` out. Titles state what the data say."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from willows_kd.evaluation import with_intervals
from willows_kd.models import layer_stack
from willows_kd.soft_labels import entropy, soften, top_k
from willows_kd.style import COLOURS, LINES, MARKERS, QUIET, figure

# -- 01: the teacher -------------------------------------------------------------------


def plot_parts(models: dict[str, torch.nn.Module]) -> Figure:
    """Where the parameters are: embeddings, and each layer, as one bar a model."""
    with figure(height=0.9 + 0.6 * len(models)) as (fig, ax):
        for row, model in enumerate(models.values()):
            left = 0.0
            for name, count in parameter_parts(model).items():
                is_layer = name.startswith("layer")
                colour = COLOURS[0] if is_layer else COLOURS[3]
                ax.barh(row, count / 1e6, left=left, color=colour, edgecolor="white", height=0.6)
                label = name.removeprefix("layer ") if is_layer else name
                ink = "white" if is_layer else "black"
                if count > 0.04 * model.num_parameters() * (1 if is_layer else 3):
                    ax.text(left + count / 2e6, row, label, ha="center", va="center", color=ink)
                left += count / 1e6
            ax.text(left, row, f"  {left:.2f} M", va="center")
        ax.set_yticks(range(len(models)), models)
        ax.set_ylim(len(models) - 0.5, -0.5)
        ax.margins(x=0.12)
        ax.grid(axis="y", visible=False)
        ax.set_xlabel("parameters (millions)")
        name, model = next(iter(models.items()))
        parts = parameter_parts(model)
        share = sum(n for part, n in parts.items() if part.startswith("layer")) / sum(
            parts.values()
        )
        ax.set_title(f"{share:.0%} of the {name}'s parameters are in its layers")
    return fig


def parameter_parts(model) -> dict[str, int]:
    """Parameters by part of a decoder: embeddings, layer 1, layer 2, ..., the rest."""
    stack, depth = layer_stack(model), model.config.num_hidden_layers
    parts = {"embeddings": 0, **{f"layer {i + 1}": 0 for i in range(depth)}, "rest": 0}
    for name, tensor in model.named_parameters():
        if name.startswith(stack + "."):
            part = f"layer {int(name[len(stack) + 1 :].split('.')[0]) + 1}"
        else:
            part = "embeddings" if tensor.ndim == 2 else "rest"
        parts[part] += tensor.numel()
    return parts


# -- 02: soft labels and temperature ---------------------------------------------------


def plot_soft_labels(
    logits: torch.Tensor,
    tokenizer,
    temperature: float = 1.0,
    written: int | None = None,
    k: int = 10,
) -> Figure:
    """The likeliest next tokens of one position, as bars, with entropy and the rest.

    Args:
        logits: of one position, shape (vocabulary,).
        temperature: softens them.
        written: the id of the token that the text really has: the hard label.
    """
    logits = logits.detach().float().cpu()
    found = top_k(logits, k, temperature)
    nats = entropy(soften(logits, temperature)).item()
    with figure(height=0.8 + 0.28 * (k + 1)) as (fig, ax):
        names = [show_token(tokenizer, i) for i in found.tokens.tolist()]
        values = found.probabilities.tolist()
        bars = ax.barh(range(k), values, color=COLOURS[0])
        for row, token in enumerate(found.tokens.tolist()):
            if token == written:
                bars[row].set(color=COLOURS[3], hatch="//", edgecolor="black")
                names[row] = f"written: {names[row]}"
        ax.barh(k, found.rest.item(), color="#c9c9c9")
        for row, value in enumerate([*values, found.rest.item()]):
            ax.text(value, row, f" {value:.3f}", va="center")
        ax.set_yticks(range(k + 1), [*names, "all others"])
        ax.invert_yaxis()
        ax.margins(x=0.12)
        ax.grid(axis="y", visible=False)
        ax.set_xlabel("probability")
        ax.set_title(f"T = {temperature:g}: entropy {nats:.2f} nats, first choice {values[0]:.0%}")
        fig.description = f"{ax.get_title(loc='left')}. " + ", ".join(
            f"{name} {value:.3f}" for name, value in zip(names[:5], values, strict=False)
        )
    return fig


def plot_temperatures(logits: torch.Tensor, temperatures: Sequence[float]) -> Figure:
    """Entropy, and the mass outside the ten likeliest tokens, over temperature.

    Args:
        logits: of any number of positions, shape (positions, vocabulary); means are drawn.
    """
    nats = [entropy(soften(logits, t)).mean().item() for t in temperatures]
    rest = [top_k(logits, 10, t).rest.mean().item() for t in temperatures]
    limit = math.log(logits.shape[-1])
    with figure(columns=2, width=9.5) as (fig, (left, right)):
        left.plot(temperatures, nats, color=COLOURS[0])
        left.axhline(limit, color=QUIET, linewidth=1, linestyle="--", marker="")
        left.text(temperatures[-1], limit, "knows nothing: log V", ha="right", va="bottom")
        left.set(xlabel="temperature T", ylabel="entropy (nats)", ylim=(0, 1.15 * limit))
        left.set_title(f"Entropy: {nats[0]:.1f} to {nats[-1]:.1f} nats")
        right.plot(temperatures, rest, color=COLOURS[1], marker="s")
        right.set(xlabel="temperature T", ylabel="mass outside the ten likeliest", ylim=(0, 1))
        right.set_title(f"Outside the top ten: {rest[0]:.0%} to {rest[-1]:.0%}")
    return fig


def plot_gradients(temperatures: Sequence[float], norms: dict[str, Sequence[float]]) -> Figure:
    """The size of a gradient over temperature, one line a loss, both axes logarithmic."""
    with figure() as (fig, ax):
        falls = {}
        for name, values in norms.items():
            ax.plot(temperatures, values, label=name)
            falls[name] = values[0] / values[-1]
        ax.set(xscale="log", yscale="log", xlabel="temperature T", ylabel="gradient norm")
        ax.legend()
        most, least = max(falls, key=falls.get), min(falls, key=falls.get)
        ax.set_title(f"Falls {falls[most]:,.0f}-fold {most}, {falls[least]:.1f}-fold {least}")
    return fig


def plot_two_peaks(x: np.ndarray, teacher: np.ndarray, students: dict[str, np.ndarray]) -> Figure:
    """A density with two peaks, and the single peaks that were fitted to it."""
    with figure() as (fig, ax):
        ax.fill_between(x, teacher, color="#dcdcdc", label="teacher")
        for i, (name, density) in enumerate(students.items()):
            ax.plot(x, density, label=name, color=COLOURS[i], linestyle=LINES[i], marker="")
        ax.set(xlabel="x", ylabel="density")
        ax.legend()
        spreads = {}
        for name, density in students.items():
            mean = np.average(x, weights=density)
            spreads[name] = math.sqrt(np.average((x - mean) ** 2, weights=density))
        wide, narrow = max(spreads, key=spreads.get), min(spreads, key=spreads.get)
        ax.set_title(
            f"{wide} covers (width {spreads[wide]:.1f}), {narrow} picks ({spreads[narrow]:.1f})"
        )
    return fig


# -- 03: the distillation loop ---------------------------------------------------------


def plot_history(
    histories: dict[str, list[dict]], teacher_perplexity: float | None = None
) -> Figure:
    """Training loss by step, and validation perplexity by epoch, of one or more students.

    Args:
        histories: what `distill` returned, by name.
        teacher_perplexity: on the same validation blocks, drawn as a line.
    """
    with figure(columns=2, width=9.5) as (fig, (left, right)):
        ends = {}
        for i, (name, history) in enumerate(histories.items()):
            frame = pd.DataFrame(history)
            look = {"color": COLOURS[i % 5], "linestyle": LINES[i % 5]}
            left.plot(frame["step"], frame["loss"], label=name, linewidth=1, marker="", **look)
            epochs = frame.dropna(subset=["validation_perplexity"])
            right.plot(
                epochs["epoch"],
                epochs["validation_perplexity"],
                label=name,
                marker=MARKERS[i % 5],
                **look,
            )
            ends[name] = epochs["validation_perplexity"].iloc[-1]
        if teacher_perplexity is not None:
            right.axhline(teacher_perplexity, color=QUIET, linewidth=1, marker="", label="teacher")
        left.set(xlabel="optimiser step", ylabel="training loss (nats per token)", yscale="log")
        left.set_title("Training: compare shapes, not heights")
        right.set(xlabel="epoch", ylabel="validation perplexity")
        right.xaxis.get_major_locator().set_params(integer=True)
        best = min(ends, key=ends.get)
        right.set_title(f"Lowest at the end: {best}, {ends[best]:.1f}")
        right.legend()
    return fig


# -- 04: evaluation --------------------------------------------------------------------


def plot_comparison(table: pd.DataFrame, teacher: str = "teacher") -> Figure:
    """The perplexity of each model of a `compare` table, against the teacher's.

    Intervals are drawn where the table has them. The title names the student that
    comes nearest to the teacher, its perplexity and its size as shares of the teacher's.
    """
    students = table.drop(index=teacher)
    target = table.loc[teacher, "perplexity"]
    best = students["perplexity"].idxmin()
    ratio = students.loc[best, "perplexity"] / target
    with figure(height=1.0 + 0.5 * len(table)) as (fig, ax):
        ax.axvline(target, color=COLOURS[0], linestyle="--", marker="", linewidth=1)
        for row, (name, model) in enumerate(table.iterrows()):
            spread = model.get("± perplexity", math.nan)
            ax.errorbar(
                model["perplexity"],
                row,
                xerr=None if pd.isna(spread) else spread,
                color=COLOURS[0] if name == teacher else COLOURS[1],
                marker="D" if name == teacher else "o",
                capsize=4,
            )
            label = f"{model['perplexity']:.1f}"
            place = {"xytext": (7, 5), "textcoords": "offset points", "fontsize": 9}
            ax.annotate(label, (model["perplexity"], row), **place)
        ax.set_yticks(range(len(table)), table.index)
        ax.set_ylim(len(table) - 0.4, -0.8)
        low, high = table["perplexity"].min(), table["perplexity"].max()
        ax.set_xlim(low - 0.08 * (high - low), high + 0.12 * (high - low))
        ax.set_xlabel("perplexity on held-out text (lower is better)")
        size = table.loc[best, "parameters"] / table.loc[teacher, "parameters"]
        ax.set_title(f"{best}: {ratio:.2f} × the teacher's perplexity, {size:.0%} of its size")
    return fig


def plot_latency(measured: pd.DataFrame) -> Figure:
    """Time of a forward pass against batch size and against length.

    Args:
        measured: columns model, batch, length, seconds. The left panel holds the
            shortest length, the right one the smallest batch.
    """
    first = measured["model"].iloc[0]
    with figure(columns=2, width=9.5) as (fig, axes):
        panels = (
            ("batch", "length", "blocks in a batch"),
            ("length", "batch", "tokens in a block"),
        )
        for ax, (along, fixed, label) in zip(axes, panels, strict=True):
            held = measured[measured[fixed] == measured[fixed].min()]
            for name, rows in held.groupby("model", sort=False):
                ax.plot(rows[along], rows["seconds"] * 1e3, label=name)
            wide = held.pivot(index=along, columns="model", values="seconds")
            others = [name for name in wide if name != first]
            speedup = (wide[first] / wide[others[0]]).median() if others else 1.0
            ax.set(xlabel=label, ylabel="forward pass (ms)", xscale="log")
            ax.set_xticks(sorted(held[along].unique()), sorted(held[along].unique()))
            ax.minorticks_off()
            ax.set_ylim(bottom=0)
            ax.set_title(f"{others[0] if others else first}: {speedup:.2f} times as fast")
        axes[0].legend()
    return fig


def plot_sweep(measured: pd.DataFrame, value: str = "perplexity") -> Figure:
    """Quality over temperature, one line for each alpha, with intervals over seeds.

    Args:
        measured: columns temperature, alpha, seed and `value`, one row a student.
    """
    groups = measured.groupby(["alpha", "temperature"])[value]
    found = {key: with_intervals([{value: v} for v in group]) for key, group in groups}
    frame = pd.DataFrame.from_dict(found, orient="index")
    with figure() as (fig, ax):
        for i, alpha in enumerate(frame.index.unique(0)):
            ax.errorbar(
                frame.loc[alpha].index,
                frame.loc[alpha, value],
                yerr=frame.loc[alpha].get(f"± {value}"),
                label=f"alpha = {alpha:g}",
                capsize=3,
                marker=MARKERS[i % 5],
                linestyle=LINES[i % 5],
                color=COLOURS[i % 5],
            )
        ax.set(xlabel="temperature T", ylabel=f"validation {value}")
        ax.legend()
        alpha, temperature = frame[value].idxmin()
        ax.set_title(f"Lowest at T = {temperature:g}, alpha = {alpha:g}: {frame[value].min():.2f}")
    return fig


def plot_tradeoff(table: pd.DataFrame, teacher: str = "teacher") -> Figure:
    """Perplexity against the time of a generated token; a marker's area is the size on disk."""
    with figure() as (fig, ax):
        area = 300 * table["disk_mb"] / table["disk_mb"].max()
        for i, (name, row) in enumerate(table.iterrows()):
            look = {"color": COLOURS[i % 5], "edgecolor": "black", "alpha": 0.85}
            look |= {"marker": MARKERS[i % 5], "label": f"{name}, {row['disk_mb']:.1f} MB"}
            ax.scatter(row["token_ms"], row["perplexity"], s=area[name], **look)
        ax.legend(markerscale=0.6, labelspacing=0.9)
        ax.set(xlabel="generating a token (ms)", ylabel="perplexity on held-out text")
        ax.margins(0.25)
        best = table.drop(index=teacher)["perplexity"].idxmin()
        ratio = table.loc[best] / table.loc[teacher]
        ax.set_title(
            f"{best}: {ratio['disk_mb']:.2f} of the size, {ratio['token_ms']:.2f} of the time, "
            f"{ratio['perplexity']:.2f} of the perplexity"
        )
    return fig


def plot_token_view(
    teacher_logits: torch.Tensor,
    student_logits: torch.Tensor,
    tokenizer,
    context: str = "",
    k: int = 8,
) -> Figure:
    """Teacher and student side by side on one position: the teacher's likeliest tokens.

    Args:
        teacher_logits, student_logits: of one position, shape (vocabulary,).
        context: the text before, shown above.
    """
    found = top_k(teacher_logits.detach().float().cpu(), k)
    student = soften(student_logits.detach().float().cpu())[found.tokens]
    with figure(height=1.0 + 0.34 * k) as (fig, ax):
        rows = np.arange(k)
        ax.barh(rows - 0.2, found.probabilities, 0.38, color=COLOURS[0], label="teacher")
        look = {"color": "#f3b3ba", "hatch": "//", "edgecolor": COLOURS[1]}
        ax.barh(rows + 0.2, student, 0.38, label="student", **look)
        ax.set_yticks(rows, [show_token(tokenizer, i) for i in found.tokens.tolist()])
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
        ax.set_xlabel("probability")
        ax.legend(loc="lower right")
        gap = (found.probabilities - student).abs().sum().item()
        ax.set_title(f"{context} …\nmass moved among these: {gap:.2f}", fontsize=10)
    return fig


def plot_divergence(tokens: Sequence[str], values: Sequence[float], columns: int = 84) -> Figure:
    """A text whose tokens are shaded by a value: the darker, the larger (nats).

    Args:
        tokens: the text, piece by piece.
        values: one for each, at least 0.
    """
    top = max(max(values), 1e-9)
    places, row, column = [], 0, 0
    for token in tokens:
        text = token.replace("\n", " ")
        if column + len(text) > columns:
            row, column = row + 1, 0
        places.append((row, column, text))
        column += len(text)
    with figure(width=9.5, height=0.9 + 0.3 * (row + 1)) as (fig, ax):
        for (y, x, text), value in zip(places, values, strict=True):
            shade = value / top
            ax.barh(y, len(text), left=x, height=0.9, color=(0.82, 0.29, 0.36, shade))
            look = {"family": "monospace", "fontsize": 8.8, "va": "center"}
            for i, letter in enumerate(text):  # one by one: a monospace run drifts off its boxes
                ax.text(x + i + 0.5, y, letter, ha="center", **look)
        ax.set(xlim=(0, columns), ylim=(row + 0.6, -0.6))
        ax.axis("off")
        most = places[int(np.argmax(values))][2].strip()
        ax.set_title(f"Mean {np.mean(values):.2f} nats; most, {top:.2f}, at “{most}”")
    return fig


def show_token(tokenizer, token: int) -> str:
    """A token as a label: a leading space made visible, a line break too."""
    text = tokenizer.decode([token]).replace("\n", "⏎")
    return ("·" + text[1:] if text.startswith(" ") else text).replace("$", r"\$")
