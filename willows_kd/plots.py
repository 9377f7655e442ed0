"""Pictures of what was measured: data in, a `Figure` out. Titles state what the data say."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from willows_kd.errors import require
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


def plot_split(parts: dict[str, Sequence[str]], down: int = 12) -> Figure:
    """Which lines of a book are trained on and which are held out, one strip a way to split.

    Args:
        parts: for each way, the part (train, validation or test) of each line, in the
            order of the book.
        down: lines in a column of a strip, which is read downwards, then rightwards.
    """
    colours = {"train": COLOURS[0], "validation": COLOURS[3], "test": COLOURS[1]}
    inks = {"train": "white", "validation": "black", "test": "black"}
    with figure(width=8.0, height=0.9 + 0.8 * len(parts)) as (fig, ax):
        for row, lines in enumerate(parts.values()):
            across = math.ceil(len(lines) / down)
            cells = np.ones((across * down, 3))
            cells[: len(lines)] = [to_rgb(colours[part]) for part in lines]
            image = cells.reshape(across, down, 3).swapaxes(0, 1)
            place = (0, across * down / len(lines), row + 0.38, row - 0.38)
            ax.imshow(image, extent=place, aspect="auto", interpolation="nearest")
        first = next(iter(parts.values()))
        for part, run in consecutive(first):
            if len(run) > 0.06 * len(first):
                middle = (run.start + run.stop) / 2 / len(first)
                look = {"ha": "center", "va": "center", "fontsize": 8.5, "color": inks[part]}
                ax.text(middle, 0, part, **look)
        ax.set_yticks(range(len(parts)), parts)
        ax.set(xlim=(0, 1), ylim=(len(parts) - 0.5, -0.5), xlabel="place in the book")
        ax.xaxis.set_major_formatter("{x:.0%}")
        ax.grid(visible=False)
        beside = [f"{share_beside(lines):.0%} {name}" for name, lines in parts.items()]
        ax.set_title(f"Test lines next to training: {', '.join(beside)}")
    return fig


def consecutive(labels: Sequence[str]) -> list[tuple[str, range]]:
    """The runs of equal labels: each label and where it stands."""
    starts = [i for i, label in enumerate(labels) if i == 0 or label != labels[i - 1]]
    ends = [*starts[1:], len(labels)]
    return [(labels[i], range(i, j)) for i, j in zip(starts, ends, strict=True)]


def share_beside(lines: Sequence[str]) -> float:
    """The share of the test lines whose neighbour, before or after, is trained on."""
    tested = [i for i, part in enumerate(lines) if part == "test"]
    beside = ["train" in lines[max(0, i - 1) : i + 2] for i in tested]
    return sum(beside) / len(beside)


def plot_perplexities(measured: dict[str, dict[str, float]]) -> Figure:
    """Perplexity of each model on each part of a text, as bars.

    Args:
        measured: by model, then by part; the title speaks of the last part.
    """
    models, parts = list(measured), list(next(iter(measured.values())))
    looks = [{"color": COLOURS[0]}, {"color": "#f3b3ba", "hatch": "//", "edgecolor": COLOURS[1]}]
    if len(models) > 1:  # the last model is the one that it is about
        looks = looks[::-1]
    with figure(height=1.1 + 0.36 * len(models) * len(parts)) as (fig, ax):
        height = 0.8 / len(models)
        for i, name in enumerate(models):
            rows = np.arange(len(parts)) + (i - (len(models) - 1) / 2) * height
            values = [measured[name][part] for part in parts]
            ax.barh(rows, values, height * 0.94, label=name, **looks[i % 2])
            for row, value in zip(rows, values, strict=True):
                ax.text(value, row, f" {value:.1f}", va="center")
        ax.set_yticks(range(len(parts)), parts)
        ax.invert_yaxis()
        ax.margins(x=0.1)
        ax.grid(axis="y", visible=False)
        ax.set_xlabel("perplexity (lower is better)")
        last = [measured[name][parts[-1]] for name in models]
        told = [f"{name} {value:.1f}" for name, value in zip(models, last, strict=True)]
        ax.set_title(f"{parts[-1].capitalize()} perplexity: {', '.join(told)}")
        if len(models) > 1:
            fig.legend(loc="outside lower center", ncols=len(models))
    return fig


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
        temperature: softens them; where it is not 1, outlines show T = 1.
        written: the id of the token that the text really has: the hard label. It has
            a bar of its own, with its place in the order, where it is not among the `k`.
    """
    logits = logits.detach().float().cpu()
    tokens = top_k(logits, k).tokens.tolist()
    if written is not None and written not in tokens:
        tokens.append(written)
    soft, plain = (soften(logits, t)[tokens].tolist() for t in (temperature, 1.0))
    nats = entropy(soften(logits, temperature)).item()
    names = [show_token(tokenizer, i) for i in tokens]
    with figure(height=0.8 + 0.29 * len(tokens)) as (fig, ax):
        bars = ax.barh(range(len(soft)), soft, color=COLOURS[0])
        if temperature != 1:
            ax.barh(range(len(soft)), plain, fill=False, edgecolor=QUIET, linestyle="--")
        if written in tokens:
            row, place = tokens.index(written), (logits > logits[written]).sum().item() + 1
            bars[row].set(facecolor=COLOURS[3], hatch="//", edgecolor="black")
            names[row] = f"written{f' (no. {place:,})' if place > k else ''}: {names[row]}"
        for row, (value, outline) in enumerate(zip(soft, plain, strict=True)):
            end = value if temperature == 1 else max(value, outline)
            ax.text(end, row, f" {value:.3f}" if value >= 0.01 else f" {value:.2g}", va="center")
        ax.set_yticks(range(len(soft)), names)
        ax.invert_yaxis()
        ax.margins(x=0.2)
        ax.grid(axis="y", visible=False)
        ax.set_xlabel("probability" + (" (outlines: at T = 1)" if temperature != 1 else ""))
        rest = max(0.0, 1 - sum(soft))
        side = ax.inset_axes([1.03, 0, 0.05, 1])  # all probability, of which the bars are a part
        side.bar(0, rest, bottom=1 - rest, color="#c9c9c9", width=1)
        side.bar(0, 1 - rest, color=COLOURS[0], width=1)
        side.set(xlim=(-0.5, 0.5), ylim=(0, 1))
        side.axis("off")
        middle = {"all others": 1 - rest / 2, "these": (1 - rest) / 2}
        for name, share in (("all others", rest), ("these", 1 - rest)):
            height = min(max(middle[name], 0.06), 0.94)  # a label has a height of its own
            side.text(0.7, height, f"{name}\n{percent(share)}", va="center")
        ax.set_title(
            f"T = {temperature:g}: entropy {nats:.2f} nats, first choice {percent(soft[0])}"
        )
        fig.description = (
            f"{ax.get_title(loc='left')}. "
            + ", ".join(f"{name} {value:.2g}" for name, value in zip(names, soft, strict=True))
            + f", all others {percent(rest)}"
        )
    return fig


def percent(share: float) -> str:
    """A share in percent, with the digits that tell it from none and from all."""
    if 0.1 <= share <= 0.99 or share in (0, 1):
        return f"{share:.0%}"
    return f"{100 * share:.2g}%" if share < 0.1 else f"{share:.1%}"


def plot_temperatures(logits: torch.Tensor, temperatures: Sequence[float]) -> Figure:
    """Entropy, and the mass outside the ten likeliest tokens, over temperature.

    Args:
        logits: of any number of positions, shape (..., vocabulary); means are drawn.
        temperatures: rising; their axis is logarithmic.
    """
    nats = [entropy(soften(logits, t)).mean().item() for t in temperatures]
    rest = [top_k(logits, 10, t).rest.mean().item() for t in temperatures]
    limit = math.log(logits.shape[-1])
    with figure(columns=2, width=9.5) as (fig, (left, right)):
        left.plot(temperatures, nats, color=COLOURS[0])
        left.axhline(limit, color=QUIET, linewidth=1, linestyle="--", marker="")
        left.text(temperatures[0], limit, "knows nothing: log V", ha="left", va="bottom")
        left.set(ylabel="entropy (nats)", ylim=(0, 1.15 * limit))
        left.set_title(f"Entropy: {nats[0]:.1f} to {nats[-1]:.1f} of {limit:.1f} nats")
        right.plot(temperatures, rest, color=COLOURS[1], marker="s")
        right.set(ylabel="mass outside the ten likeliest", ylim=(0, 1.05))
        right.set_title(f"Outside the top ten: {percent(rest[0])} to {percent(rest[-1])}")
        for ax in (left, right):
            temperature_axis(ax, temperatures)
    return fig


def temperature_axis(ax, temperatures: Sequence[float]) -> None:
    """A logarithmic axis of temperatures that is labelled with plain numbers."""
    ax.set(xscale="log", xlabel="temperature T")
    ax.minorticks_off()
    ax.set_xticks(temperatures, [f"{t:g}" for t in temperatures])


def plot_gradients(
    temperatures: Sequence[float],
    norms: dict[str, Sequence[float]],
    references: dict[str, float] | None = None,
) -> Figure:
    """The size of a gradient over temperature, one line a loss, both axes logarithmic.

    Args:
        temperatures: rising.
        norms: by name of the loss, one value a temperature.
        references: by name, sizes that do not depend on the temperature.
    """
    with figure() as (fig, ax):
        falls = {}
        for name, values in norms.items():
            ax.plot(temperatures, values, label=name)
            falls[name] = values[0] / values[-1]
        for i, (name, value) in enumerate((references or {}).items()):
            look = {"color": QUIET, "linestyle": LINES[3 - i], "marker": "", "linewidth": 1.5}
            ax.axhline(value, label=name, **look)
        ax.set(yscale="log", ylabel="gradient norm")
        temperature_axis(ax, temperatures)
        ax.legend()
        most, least = max(falls, key=falls.get), min(falls, key=falls.get)
        second = by_factor(falls[least]).lower()
        second = second.removeprefix("falls ") if falls[most] >= 1 else second
        ax.set_title(f"{by_factor(falls[most])} {most}, {second} {least}")
    return fig


def by_factor(fall: float) -> str:
    """A fall by a factor in words; a rise where the factor is below 1."""
    factor = fall if fall >= 1 else 1 / fall
    return f"{'Falls' if fall >= 1 else 'Rises'} {factor:,.{0 if factor >= 10 else 1}f}-fold"


def plot_two_peaks(x: np.ndarray, teacher: np.ndarray, students: dict[str, np.ndarray]) -> Figure:
    """A density with two peaks, and the single peaks that were fitted to it."""
    with figure() as (fig, ax):
        ax.fill_between(x, teacher, color="#dcdcdc", label="teacher")
        for i, (name, density) in enumerate(students.items()):
            ax.plot(x, density, label=name, color=COLOURS[i], linestyle=LINES[i], marker="")
        ax.set(xlabel="x", ylabel="density", xlim=(x[0], x[-1]))
        ax.set_ylim(bottom=0)
        fig.legend(loc="outside lower center", ncols=3 if len(students) < 3 else 2)
        spreads = {}
        for name, density in students.items():
            mean = np.average(x, weights=density)
            spreads[name] = math.sqrt(np.average((x - mean) ** 2, weights=density))
        wide, narrow = max(spreads, key=spreads.get), min(spreads, key=spreads.get)
        title = f"{wide} covers (width {spreads[wide]:.2f}), {narrow} picks ({spreads[narrow]:.2f})"
        ax.set_title(title[0].upper() + title[1:])
    return fig


# -- 03: the distillation loop ---------------------------------------------------------


def plot_starts(perplexities: dict[str, float], teacher: float, guess: float) -> Figure:
    """Perplexity of students before any training, between the teacher and a blind guess.

    Args:
        perplexities: of students that were made in different ways, by name.
        teacher: the teacher's, on the same text.
        guess: that of giving every token the same probability: the vocabulary's size.
    """
    with figure(height=1.2 + 0.42 * len(perplexities)) as (fig, ax):
        for row, value in enumerate(perplexities.values()):
            worse = value > guess
            look = {"color": COLOURS[1 if worse else 0], "marker": MARKERS[worse]}
            ax.plot([value], [row], linestyle="", **look)
            place = {"xytext": (8, 0), "textcoords": "offset points", "va": "center"}
            ax.annotate(f"{value:,.0f}", (value, row), **place)
        for value, name in ((teacher, "teacher"), (guess, "blind guess")):
            ax.axvline(value, color=QUIET, linewidth=1, linestyle="--", marker="")
            ax.text(value, -0.75, f" {name}, {value:,.0f}", color=QUIET, va="center")
        ax.set_yticks(range(len(perplexities)), perplexities)
        ax.set_ylim(len(perplexities) - 0.5, -1.1)
        ax.set(xscale="log", xlabel="perplexity before any training (logarithmic)")
        everything = [teacher, guess, *perplexities.values()]
        ax.set_xlim(min(everything) / 1.3, max(everything) * 2.5)
        ax.grid(axis="y", visible=False)
        best = min(perplexities, key=perplexities.get)
        ratio = perplexities[best] / teacher
        ax.set_title(f"Best start: {best}, {ratio:.1f} × the teacher's perplexity")
    return fig


def plot_history(
    histories: dict[str, list[dict]], teacher_perplexity: float | None = None
) -> Figure:
    """Training loss by step, and validation perplexity by epoch, of one or more students.

    Args:
        histories: what `distill` returned, by name.
        teacher_perplexity: on the same validation blocks, drawn as a line.
    """
    trained = isinstance(histories, dict) and histories and all(histories.values())
    require(trained, "there is no history to draw; give what distill returned, by name")
    with figure(columns=2, width=9.5) as (fig, (left, right)):
        ends = {}
        for i, (name, history) in enumerate(histories.items()):
            frame = pd.DataFrame(history)
            look = {"color": COLOURS[i % 5], "linestyle": LINES[(i + i // 5) % 5]}
            left.plot(frame["step"], frame["loss"], label=name, linewidth=1, marker="", **look)
            if "validation_perplexity" not in frame:  # stopped before an epoch's end
                continue
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
        left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 6)))
        left.yaxis.set_major_formatter("{x:g}")
        left.yaxis.set_minor_locator(NullLocator())
        left.set_title("Training: compare shapes, not heights")
        right.set(xlabel="epoch", ylabel="validation perplexity")
        right.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        best = min(ends, key=ends.get, default=None)
        found = f"Lowest at the end: {best}, {ends[best]:.1f}" if ends else "No epoch was finished"
        right.set_title(found)
        (right if ends else left).legend()
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
            ("batch", "length", "blocks in a batch (of {} tokens each)", "Larger batches"),
            ("length", "batch", "tokens in a block (batch of {})", "Longer blocks"),
        )
        for ax, (along, fixed, label, what) in zip(axes, panels, strict=True):
            held = measured[measured[fixed] == measured[fixed].min()]
            label = label.format(measured[fixed].min())
            for name, rows in held.groupby("model", sort=False):
                ax.plot(rows[along], rows["seconds"] * 1e3, label=name)
            wide = held.pivot(index=along, columns="model", values="seconds")
            others = [name for name in wide if name != first]
            ratios = wide[first] / wide[others[0] if others else first]
            ax.set(xlabel=label, ylabel="forward pass (ms)", xscale="log")
            ax.set_xticks(sorted(held[along].unique()), sorted(held[along].unique()))
            ax.minorticks_off()
            ax.set_ylim(bottom=0)
            low, high = f"{ratios.min():.1f}", f"{ratios.max():.1f}"
            times = high if low == high else f"{low} to {high}"
            ax.set_title(f"{what}: {others[0] if others else first} {times} times as fast")
        axes[0].legend()
    return fig


def plot_sweep(measured: pd.DataFrame, value: str = "perplexity") -> Figure:
    """Quality over temperature, one line for each alpha, with intervals over seeds.

    Hard labels alone (alpha = 1) know no temperature: they are one level, with a band
    for its interval.

    Args:
        measured: columns temperature, alpha, seed and `value`, one row a student.
    """
    groups = measured.groupby(["alpha", "temperature"])[value]
    found = {key: with_intervals([{value: v} for v in group]) for key, group in groups}
    frame = pd.DataFrame.from_dict(found, orient="index")
    temperatures = sorted(measured["temperature"].unique())
    with figure() as (fig, ax):
        for i, alpha in enumerate(frame.index.unique(0)):
            rows = frame.loc[alpha]
            spread = rows.get(f"± {value}")
            if alpha == 1:
                level = rows[value].iloc[0]
                half = 0.0 if spread is None else spread.iloc[0]
                look = {"color": QUIET, "label": "alpha = 1, at any T"}
                ax.axhline(level, linestyle="--", marker="", **look)
                ax.axhspan(level - half, level + half, color=QUIET, alpha=0.15, linewidth=0)
                continue
            ax.errorbar(
                rows.index * 1.03**i,  # side by side, so that no interval hides another
                rows[value],
                yerr=spread,
                label=f"alpha = {alpha:g}",
                capsize=3,
                marker=MARKERS[i % 5],
                linestyle=LINES[i % 5],
                color=COLOURS[i % 5],
            )
        ax.set(xlabel="temperature T", ylabel=f"validation {value}", xscale="log")
        ax.set_xticks(temperatures, [f"{t:g}" for t in temperatures])
        ax.minorticks_off()
        ax.legend(loc="upper left", bbox_to_anchor=(1, 1))  # beside: the band fills the axes
        alpha, temperature = frame[value].idxmin()
        where = "with hard labels alone" if alpha == 1 else f"at T = {temperature:g}"
        if 0 < alpha < 1:
            where += f", alpha = {alpha:g}"
        elif alpha == 0:
            where += ", soft labels alone"
        ax.set_title(f"Lowest {where}: {frame[value].min():.2f}")
    return fig


def plot_tradeoff(table: pd.DataFrame, teacher: str = "teacher") -> Figure:
    """Perplexity against the time of a generated token; a marker's area is the size on disk.

    Intervals of the perplexity are drawn where the table of `compare` has them.
    """
    with figure() as (fig, ax):
        area = 300 * table["disk_mb"] / table["disk_mb"].max()
        for i, (name, row) in enumerate(table.iterrows()):
            look = {"color": COLOURS[i % 5], "edgecolor": "black", "alpha": 0.85}
            look |= {"marker": MARKERS[i % 5], "label": f"{name}, {row['disk_mb']:.1f} MB"}
            ax.scatter(row["token_ms"], row["perplexity"], s=area[name], **look)
            spread = row.get("± perplexity", math.nan)
            if not pd.isna(spread):
                ax.errorbar(
                    row["token_ms"],
                    row["perplexity"],
                    yerr=spread,
                    color="black",
                    linestyle="",
                    marker="",
                    capsize=4,
                    zorder=3,
                )
        ax.legend(markerscale=0.6, labelspacing=0.9)
        ax.set(xlabel="generating a token (ms)", ylabel="perplexity on held-out text")
        ax.margins(0.25)
        best = table.drop(index=teacher)["perplexity"].idxmin()
        ratio = table.loc[best] / table.loc[teacher]
        ax.set_title(
            f"{best}: {ratio['disk_mb']:.2f} of the size, {ratio['token_ms']:.2f} of the time, "
            f"{ratio['perplexity']:.2f} times the perplexity"
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
    values = [max(0.0, float(value)) for value in values]  # rounding can leave a 0 just below
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
