"""Pictures of what was measured: data in, a `Figure` out. Titles state what the data say."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullLocator

from willows_kd.compress.speculative import expected_speedup
from willows_kd.errors import require
from willows_kd.evaluation import LABELS, with_intervals
from willows_kd.figures.style import COLOURS, FILLED, HATCHED, LINES, MARKERS, QUIET, figure
from willows_kd.losses import entropy, soften, top_k
from willows_kd.students import layer_stack

SHADES = LinearSegmentedColormap.from_list("shades", ["white", COLOURS[1]])

# -- what several figures share --------------------------------------------------------


def name_rows(ax, names: Sequence[str], above: float = 0.5) -> None:
    """Rows from top to bottom, one a name, with room above the first one."""
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -above)
    ax.grid(axis="y", visible=False)


def grouped_bars(fig, ax, names, series: dict[str, Sequence[float]], form, looks) -> None:
    """One bar of each series in a row, its number at its end, and a legend below."""
    height = 0.8 / len(series)
    for i, (label, values) in enumerate(series.items()):
        rows = np.arange(len(names)) + (i - (len(series) - 1) / 2) * height
        ax.barh(rows, values, height * 0.94, label=label, **looks[i % 2])
        for row, value in zip(rows, values, strict=True):
            side = "right" if value < 0 else "left"
            ax.text(value, row, f" {value:{form}} ", va="center", ha=side, fontsize=9)
    name_rows(ax, names)
    ax.margins(x=0.14)
    if len(series) > 1:
        fig.legend(loc="outside lower center", ncols=len(series))


def dots(ax, values: dict[str, float], form: str, colours: dict[str, str], spans=None) -> None:
    """One dot a row, its number above it, and its interval if `spans` has one (low, high)."""
    for row, (name, value) in enumerate(values.items()):
        low, high = (spans or {}).get(name, (value, value))
        ax.errorbar(
            value,
            row,
            xerr=[[value - low], [high - value]] if low < high else None,
            color=colours.get(name, COLOURS[1]),
            marker="D" if name in colours else "o",
            capsize=4,
        )
        place = {"xytext": (7, 5), "textcoords": "offset points", "fontsize": 9}
        ax.annotate(f"{value:{form}}", (value, row), **place)
    name_rows(ax, list(values), above=0.9)


def plain_ticks(ax, values: Sequence[float]) -> None:
    """A logarithmic x axis that is labelled with these numbers."""
    ax.set_xscale("log")
    ax.minorticks_off()
    ax.set_xticks(values, [f"{value:g}" for value in values])


def plain_numbers(axis, subs: Sequence[int] = (1, 2, 5)) -> None:
    """Plain numbers, and few, on an axis that is logarithmic already."""
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def percent(share: float) -> str:
    """A share in percent, with the digits that tell it from none and from all."""
    if 0.1 <= share <= 0.99 or share in (0, 1):
        return f"{share:.0%}"
    return f"{100 * share:.2g}%" if share < 0.1 else f"{share:.1%}"


def show_token(tokenizer, token: int) -> str:
    """A token as a label: a leading space made visible, a line break too."""
    text = tokenizer.decode([token]).replace("\n", "⏎")
    return ("·" + text[1:] if text.startswith(" ") else text).replace("$", r"\$")


# -- 01: the teacher -------------------------------------------------------------------


def plot_parts(models: dict[str, torch.nn.Module]) -> Figure:
    """Where the parameters are: embeddings, and each layer, as one bar a model."""
    counts = {name: parameter_parts(model) for name, model in models.items()}
    with figure(height=0.9 + 0.6 * len(models)) as (fig, ax):
        for row, parts in enumerate(counts.values()):
            left, total = 0.0, sum(parts.values())
            for name, count in parts.items():
                is_layer = name.startswith("layer")
                colour, ink = (COLOURS[0], "white") if is_layer else (COLOURS[3], "black")
                ax.barh(row, count / 1e6, left=left, color=colour, edgecolor="white", height=0.6)
                if count > total * (0.04 if is_layer else 0.12):
                    label = name.removeprefix("layer ")
                    ax.text(left + count / 2e6, row, label, ha="center", va="center", color=ink)
                left += count / 1e6
            ax.text(left, row, f"  {left:.2f} M", va="center")
        name_rows(ax, list(models))
        ax.margins(x=0.12)
        ax.set_xlabel("parameters (millions); a number is a layer")
        name, parts = next(iter(counts.items()))
        share = sum(n for part, n in parts.items() if part.startswith("layer"))
        share /= sum(parts.values())
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


def plot_split(parts: dict[str, Sequence[str]]) -> Figure:
    """Which lines of a book are for training and which are held out, one strip a way to split.

    Args:
        parts: for each way, the part (train, validation or test) of each line, in the
            order of the book. A strip is read downwards, then rightwards.
    """
    down = 12  # lines in a column
    colours = {"train": COLOURS[0], "validation": COLOURS[3], "test": COLOURS[1]}
    swatches = [Patch(color=colour, label=part) for part, colour in colours.items()]
    with figure(height=1.2 + 0.8 * len(parts)) as (fig, ax):
        for row, lines in enumerate(parts.values()):
            across = math.ceil(len(lines) / down)
            cells = np.ones((across * down, 3))
            cells[: len(lines)] = [to_rgb(colours[part]) for part in lines]
            image = cells.reshape(across, down, 3).swapaxes(0, 1)
            place = (0, across * down / len(lines), row + 0.38, row - 0.38)
            ax.imshow(image, extent=place, aspect="auto", interpolation="nearest")
        name_rows(ax, list(parts))
        ax.set(xlim=(0, 1), xlabel="place in the book")
        ax.xaxis.set_major_formatter("{x:.0%}")
        ax.grid(visible=False)
        fig.legend(handles=swatches, loc="outside lower center", ncols=3)
        beside = [f"{share_beside(lines):.0%} {name}" for name, lines in parts.items()]
        ax.set_title(f"Test text next to training text: {', '.join(beside)}")
    return fig


def share_beside(lines: Sequence[str]) -> float:
    """The share of the test lines whose neighbour, before or after, is a training line."""
    tested = [i for i, part in enumerate(lines) if part == "test"]
    return sum("train" in lines[max(0, i - 1) : i + 2] for i in tested) / len(tested)


def plot_perplexities(measured: dict[str, dict[str, float]]) -> Figure:
    """Perplexity of each model on each part of a text, as bars.

    Args:
        measured: by model, then by part; the title speaks of the last part.
    """
    parts = list(next(iter(measured.values())))
    series = {name: [values[part] for part in parts] for name, values in measured.items()}
    with figure(height=1.1 + 0.36 * len(series) * len(parts)) as (fig, ax):
        looks = [HATCHED, FILLED] if len(series) > 1 else [FILLED]  # the last is the one to look at
        grouped_bars(fig, ax, parts, series, ".1f", looks)
        ax.set_xlabel("perplexity (lower is better)")
        told = [f"{name} {values[-1]:.1f}" for name, values in series.items()]
        ax.set_title(f"{parts[-1].capitalize()} perplexity: {', '.join(told)}")
    return fig


# -- 02: soft labels and temperature ---------------------------------------------------


def plot_soft_labels(
    logits: torch.Tensor, tokenizer, temperature: float = 1.0, written: int | None = None
) -> Figure:
    """The ten likeliest next tokens at one position, as bars, and the share of all others.

    Args:
        logits: of one position, shape (vocabulary,).
        temperature: softens them; if it is not 1, outlines show T = 1.
        written: the id of the token that the text really has: the hard label. If it is
            not among the ten, it has a bar of its own, with its place in the order.
    """
    logits = logits.detach().float().cpu()
    tokens = top_k(logits, 10).tokens.tolist()
    if written is not None and written not in tokens:
        tokens.append(written)
    soft, plain = (soften(logits, t)[tokens].tolist() for t in (temperature, 1.0))
    names = [show_token(tokenizer, i) for i in tokens]
    with figure(height=0.8 + 0.29 * len(tokens)) as (fig, ax):
        bars = ax.barh(range(len(soft)), soft, color=COLOURS[0])
        if temperature != 1:
            ax.barh(range(len(soft)), plain, fill=False, edgecolor=QUIET, linestyle="--")
        if written in tokens:
            row, place = tokens.index(written), (logits > logits[written]).sum().item() + 1
            bars[row].set(facecolor=COLOURS[3], hatch="//", edgecolor="black")
            names[row] = f"written{f' (no. {place:,})' if place > 10 else ''}: {names[row]}"
        paper = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # over an outline's edge
        for row, value in enumerate(soft):
            number = f"{value:.3f}" if value >= 0.01 else f"{value:.2g}"
            place = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
            ax.annotate(number, (value, row), bbox=paper, fontsize=9, **place)
        name_rows(ax, names)
        ax.margins(x=0.2)
        ax.set_xlabel("probability" + (" (outlines: at T = 1)" if temperature != 1 else ""))
        rest = max(0.0, 1 - sum(soft))
        draw_rest(ax.inset_axes([1.03, 0, 0.05, 1]), rest)
        nats = entropy(soften(logits, temperature)).item()
        found = f"entropy {nats:.2f} nats, first choice {percent(soft[0])}"
        ax.set_title(f"T = {temperature:g}: {found}")
        told = (f"{name} {value:.2g}" for name, value in zip(names, soft, strict=True))
        fig.description = f"T = {temperature:g}: {found}. {', '.join(told)}, "
        fig.description += f"all others {percent(rest)}"
    return fig


def draw_rest(ax, rest: float) -> None:
    """All probability as one column, of which the bars beside it are a part."""
    ax.bar(0, rest, bottom=1 - rest, color="#c9c9c9", width=1)
    ax.bar(0, 1 - rest, color=COLOURS[0], width=1)
    ax.set(xlim=(-0.5, 0.5), ylim=(0, 1))
    ax.axis("off")
    for name, share, middle in (
        ("all others", rest, 1 - rest / 2),
        ("these", 1 - rest, (1 - rest) / 2),
    ):
        height = min(max(middle, 0.06), 0.94)  # a label has a height of its own
        ax.text(0.7, height, f"{name}\n{percent(share)}", va="center")


def plot_temperatures(logits: torch.Tensor, temperatures: Sequence[float]) -> Figure:
    """Entropy, and the probability outside the ten likeliest tokens, over temperature.

    Args:
        logits: of any number of positions, shape (..., vocabulary); means are drawn.
        temperatures: rising; their axis is logarithmic.
    """
    nats = [entropy(soften(logits, t)).mean().item() for t in temperatures]
    rest = [top_k(logits, 10, t).rest.mean().item() for t in temperatures]
    limit = math.log(logits.shape[-1])
    with figure(columns=2, width=9.0, height=3.4) as (fig, (left, right)):
        left.plot(temperatures, nats, color=COLOURS[0])
        left.axhline(limit, color=QUIET, linewidth=1, linestyle="--", marker="")
        told = f"all {logits.shape[-1]:,} tokens equally likely"
        left.text(temperatures[0], limit, told, ha="left", va="bottom")
        left.set(ylabel="entropy (nats)", ylim=(0, 1.15 * limit))
        left.set_title(f"Entropy rises from {nats[0]:.1f} to {nats[-1]:.1f} nats")
        right.plot(temperatures, rest, color=COLOURS[1], marker="s")
        right.set(ylabel="probability outside the top ten", ylim=(0, 1.05))
        right.set_title(f"Outside the top ten: {percent(rest[0])} to {percent(rest[-1])}")
        for ax in (left, right):
            plain_ticks(ax, temperatures)
            ax.set_xlabel("temperature T")
    return fig


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
        for name, values in norms.items():
            ax.plot(temperatures, values, label=name)
        for i, (name, value) in enumerate((references or {}).items()):
            look = {"color": QUIET, "linestyle": LINES[3 - i], "marker": "", "linewidth": 1.5}
            ax.axhline(value, label=name, **look)
        ax.set(yscale="log", ylabel="gradient norm")
        plain_ticks(ax, temperatures)
        ax.set_xlabel("temperature T")
        ax.legend()
        changes = {name: max(values) / min(values) for name, values in norms.items()}
        told = [f"{n:,.{0 if n >= 10 else 1}f}-fold {name}" for name, n in changes.items()]
        ax.set_title(f"The gradient changes {', '.join(told)}")
    return fig


def plot_two_peaks(x: np.ndarray, teacher: np.ndarray, students: dict[str, np.ndarray]) -> Figure:
    """A density with two peaks, and the single peaks that were fitted to it."""
    with figure() as (fig, ax):
        ax.fill_between(x, teacher, color="#dcdcdc", label="teacher")
        spreads = {}
        for i, (name, density) in enumerate(students.items()):
            ax.plot(x, density, label=name, color=COLOURS[i], linestyle=LINES[i], marker="")
            mean = np.average(x, weights=density)
            spreads[name] = math.sqrt(np.average((x - mean) ** 2, weights=density))
        ax.set(xlabel="x", ylabel="density", xlim=(x[0], x[-1]))
        ax.set_ylim(bottom=0)
        fig.legend(loc="outside lower center", ncols=2)
        wide, narrow = max(spreads, key=spreads.get), min(spreads, key=spreads.get)
        title = f"{wide} covers (width {spreads[wide]:.2f}), {narrow} picks ({spreads[narrow]:.2f})"
        ax.set_title(title[0].upper() + title[1:])
    return fig


def plot_pull(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, label: int, tokenizer
) -> Figure:
    """What one position teaches: how far each label pulls the student's logits, at T = 1.

    Shown are the label's token and the ten that soft labels pull hardest. The pull is minus
    the gradient of the loss with respect to the logits: 1 - q for the hard label's token and
    -q for all others, but p - q for soft labels, with p for the teacher's probabilities and q
    for the student's.

    Args:
        student_logits, teacher_logits: of one position, shape (vocabulary,).
        label: the id of the token that the text really has.
    """
    q, p = (soften(z.detach().cpu()) for z in (student_logits, teacher_logits))
    hard, soft = -q.clone(), p - q
    hard[label] += 1
    others = [i for i in soft.abs().topk(10).indices.tolist() if i != label]
    tokens = [label, *sorted(others, key=lambda i: -soft[i])]
    names = [f"written: {show_token(tokenizer, label)}"]
    names += [show_token(tokenizer, i) for i in tokens[1:]]
    with figure(height=1.3 + 0.38 * len(tokens)) as (fig, ax):
        series = {"hard label": hard[tokens].tolist(), "soft labels": soft[tokens].tolist()}
        grouped_bars(fig, ax, names, series, "+.3f", [HATCHED, FILLED])
        ax.axvline(0, color="black", linewidth=0.8, marker="", linestyle="-")
        ax.set_xlabel("pull on the student's logit (right: up, left: down)")
        up = (soft > 0).sum().item()
        ax.set_title(f"The hard label raises 1 token, soft labels raise {up:,} of {len(p):,}")
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
        better = {name: COLOURS[0] for name, value in perplexities.items() if value <= guess}
        dots(ax, perplexities, ",.0f", better)
        ax.set_ylim(top=-1.2)
        for value, name in ((teacher, "teacher"), (guess, "blind guess")):
            ax.axvline(value, color=QUIET, linewidth=1, linestyle="--", marker="")
            ax.text(value, -0.85, f" {name}, {value:,.0f}", color=QUIET, va="center")
        ax.set(xscale="log", xlabel="perplexity before any training (logarithmic)")
        everything = [teacher, guess, *perplexities.values()]
        ax.set_xlim(min(everything) / 1.3, max(everything) * 2.5)
        best = min(perplexities, key=perplexities.get)
        ratio = perplexities[best] / teacher
        ax.set_title(f"Best start: {best}, {ratio:.1f} × the teacher's perplexity")
    return fig


def plot_choices(choices: pd.DataFrame) -> Figure:
    """Perplexity of students before and after training, a dot for each choice of layers.

    Args:
        choices: a row each, with `start`, `end` and `init`, the ways of `choose_layers` that
            come to it, if any: these are named. Such rows are in `stored_results("inits")`.
    """
    with figure() as (fig, ax):
        named = choices[choices["init"].fillna("") != ""]
        ax.scatter(choices["start"], choices["end"], color="none", edgecolor=QUIET)
        for i, row in enumerate(named.itertuples()):
            look = {"color": COLOURS[i % 5], "marker": MARKERS[i % 5], "label": row.init}
            ax.scatter(row.start, row.end, **look)
        ax.legend()
        ax.set(xlabel="perplexity before training", ylabel="perplexity after a short training")
        if choices["start"].max() > 5 * choices["start"].min():
            ax.set(xscale="log", yscale="log", xlabel="perplexity before training (logarithmic)")
            plain_numbers(ax.xaxis)
            plain_numbers(ax.yaxis)
        order = choices["start"].rank().corr(choices["end"].rank())  # Spearman's
        best = choices["start"].idxmin() == choices["end"].idxmin()
        ends = f"the best start ends {'best' if best else 'behind another'}"
        ax.set_title(f"Rank correlation of start and end {order:.2f}; {ends}")
    return fig


def plot_history(
    histories: dict[str, list[dict]],
    teacher_perplexity: float | None = None,
    start: float | None = None,
) -> Figure:
    """Training loss and validation perplexity by step, of one or more students.

    Args:
        histories: what `distill` returned, by name.
        teacher_perplexity: on the same validation blocks, drawn as a line.
        start: the students' validation perplexity before any training, drawn at step 0.
    """
    check_histories(histories)
    with figure(columns=2, width=9.0) as (fig, (left, right)):
        for i, (name, history) in enumerate(histories.items()):
            steps, losses = zip(*((row["step"], row["loss"]) for row in history), strict=True)
            left.plot(steps, losses, label=name, linewidth=1, marker="", **line_look(i))
        left.set(xlabel="optimiser step", ylabel="training loss (nats per token)", yscale="log")
        plain_numbers(left.yaxis, (1, 2, 3, 4, 6))
        left.set_title("Training: compare shapes, not heights")
        begin = [(0, start)] if start else []
        ends = draw_validation(right, histories, "step", teacher_perplexity, begin)
        right.set(xlabel="optimiser step", ylabel="validation perplexity")
        if start:  # far above what training reaches
            right.set_yscale("log")
            plain_numbers(right.yaxis, (1, 2, 3, 5))
        best = min(ends, key=lambda name: ends[name][1], default=None)
        found = f"Lowest at the end: {best}, {ends[best][1]:.1f}" if ends else "No epoch finished"
        right.set_title(found)
        (right if ends else left).legend()
    return fig


def plot_progress(
    histories: dict[str, list[dict]], teacher_perplexity: float, start: float
) -> Figure:
    """Validation perplexity over tokens seen: where a short run stands beside a full one.

    Both axes are logarithmic, so that a minute and an hour fit on one figure.

    Args:
        histories: by name; rows with `tokens` and, in some, `validation_perplexity`. The
            title compares the first run's end with the last run's.
        teacher_perplexity: on the same validation blocks, drawn as a line.
        start: the students' validation perplexity before any training, drawn as a line.
    """
    check_histories(histories)
    with figure() as (fig, ax):
        ax.axhline(start, color=QUIET, linestyle=":", marker="", label=f"untrained, {start:,.0f}")
        ends = draw_validation(ax, histories, "tokens", teacher_perplexity)
        for tokens, perplexity in ends.values():
            place = {"xytext": (4, 6), "textcoords": "offset points", "fontsize": 9}
            ax.annotate(f"{perplexity:.1f}", (tokens, perplexity), **place)
        ax.set(xscale="log", yscale="log")
        ax.set(xlabel="tokens seen (logarithmic)", ylabel="validation perplexity (logarithmic)")
        plain_numbers(ax.yaxis, (1, 2, 3, 5))
        ax.margins(x=0.1)
        ax.legend()
        told = [
            f"{name}: {p:.1f} at {tokens / 1e6:.2g} M tokens" for name, (tokens, p) in ends.items()
        ]
        ax.set_title("; ".join(told))
    return fig


def check_histories(histories) -> None:
    """Require at least one history by name, each with a row."""
    some = isinstance(histories, dict) and histories and all(histories.values())
    require(some, "there is no history to draw; give what distill returned, by name")


def line_look(i: int) -> dict:
    """Colour and dashes of the i-th run; more than five still differ."""
    return {"color": COLOURS[i % 5], "linestyle": LINES[(i + i // 5) % 5]}


def draw_validation(ax, histories, along: str, teacher: float | None, begin=()) -> dict:
    """Curves of validation perplexity after the points `begin`; where each run ended."""
    ends = {}
    for i, (name, history) in enumerate(histories.items()):
        points = [
            (row[along], row["validation_perplexity"])
            for row in history
            if not pd.isna(row.get("validation_perplexity"))
        ]
        if points:  # else stopped before the first epoch's end
            marker = MARKERS[i % 5] if len(points) < 20 else ""
            x, y = zip(*begin, *points, strict=True)
            ax.plot(x, y, label=name, marker=marker, **line_look(i))
            ends[name] = points[-1]
    if teacher is not None:
        label = f"teacher, {teacher:.1f}"
        ax.axhline(teacher, color=QUIET, linewidth=1, linestyle="-", marker="", label=label)
    return ends


def plot_transfer(table: pd.DataFrame) -> Figure:
    """How near students came to their teacher with different training texts.

    Args:
        table: index: the training text; column `ratio`: times the teacher's perplexity;
            columns `low` and `high`, if it has them: the interval of the ratio.
    """
    table = table.sort_values("ratio")
    ratios = table["ratio"].to_dict()
    spans = {}
    if {"low", "high"} <= set(table):
        spans = {row.Index: (row.low, row.high) for row in table.itertuples()}
    best, widest = table.index[0], max(ratios.values())
    with figure(height=1.1 + 0.42 * len(table)) as (fig, ax):
        dots(ax, ratios, ".3f", {best: COLOURS[0]}, spans)
        ax.axvline(1, color=QUIET, linewidth=1, linestyle="--", marker="")
        ax.text(1, -0.7, " teacher", color=QUIET, va="center")
        if widest > 3:
            ax.set_xscale("log")
            plain_numbers(ax.xaxis)
        ax.margins(x=0.15)
        ax.set_xlabel("times the teacher's perplexity (lower is better)")
        ax.set_title(f"Best: {best}, {ratios[best]:.3f} × the teacher's perplexity")
    return fig


# -- 04: evaluation --------------------------------------------------------------------


def plot_latency(measured: pd.DataFrame) -> Figure:
    """Time of a forward pass against its tokens: lower is faster, a flat line is free work.

    Black dots are single shapes: as many tokens may stand in many short blocks or in
    one long block. The line joins their means.

    Args:
        measured: columns model, batch, length, seconds. The title says how many times
            as fast as the first model the second one is.
    """
    frame = measured.assign(tokens=measured["batch"] * measured["length"])
    means = frame.pivot_table(index="tokens", columns="model", values="seconds", sort=False)
    means = means.sort_index()[list(frame["model"].unique())]
    with figure() as (fig, ax):
        for i, name in enumerate(means):
            look = {"label": name, "marker": MARKERS[i % 5], **line_look(i)}
            ax.plot(means.index, means[name] * 1e3, **look)
            rows = frame[frame["model"] == name]
            ax.scatter(rows["tokens"], rows["seconds"] * 1e3, s=9, color="black", zorder=3)
        plain_ticks(ax, means.index)
        ax.set(xlabel="tokens in a forward pass (batch × length)", ylabel="forward pass (ms)")
        ax.set_ylim(bottom=0)
        ax.legend()
        first, other = means.columns[0], means.columns[min(1, len(means.columns) - 1)]
        ratios = means[first] / means[other]
        low, high = f"{ratios.min():.1f}", f"{ratios.max():.1f}"
        times = high if low == high else f"{low} to {high}"
        ax.set_title(f"{other}: {times} times as fast as {first}")
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
    labels = {0.0: "soft labels only (alpha = 0)", 1.0: "hard labels only (alpha = 1)"}
    with figure(height=4.2) as (fig, ax):
        for i, alpha in enumerate(frame.index.unique(0)):
            rows, label = frame.loc[alpha], labels.get(alpha, f"mixed, alpha = {alpha:g}")
            spread = rows.get(f"± {value}")
            if alpha == 1:
                level, half = rows[value].iloc[0], 0.0 if spread is None else spread.iloc[0]
                ax.axhline(level, linestyle="--", marker="", color=QUIET, label=label)
                ax.axhspan(level - half, level + half, color=QUIET, alpha=0.15, linewidth=0)
                continue
            ax.errorbar(
                rows.index * 1.03**i,  # side by side, so that no interval hides another
                rows[value],
                yerr=spread,
                label=label,
                capsize=3,
                marker=MARKERS[i % 5],
                **line_look(i),
            )
        plain_ticks(ax, sorted(measured["temperature"].unique()))
        ax.set(xlabel="temperature T", ylabel=f"validation {value}")
        seeds = groups.size().max()
        title = f"bars and band: 95% intervals over {seeds} seeds" if seeds > 1 else None
        fig.legend(loc="outside lower center", ncols=2, title=title)
        alpha, temperature = frame[value].idxmin()
        what = labels.get(alpha, f"mixed labels, alpha = {alpha:g}").split(" (")[0]
        where = "" if alpha == 1 else f", T = {temperature:g}"
        ax.set_title(f"Lowest {value}: {what}{where}: {frame[value].min():.2f}")
    return fig


def plot_tradeoff(
    table: pd.DataFrame,
    teacher: str = "teacher",
    untrained: Sequence[str] = ("untrained",),
    measure: str = "perplexity",
) -> Figure:
    """Perplexity against the time of a generated token; a marker's area is the size on disk.

    Untrained students are left out, since being small and fast is no merit of theirs; if
    there is no other student, they are hollow. Another measure than the perplexity, such as
    "bits_per_byte", is for models whose vocabularies differ.
    """
    trained = table.drop(index=[name for name in untrained if name in table.index])
    if len(trained) > 1:
        table = trained
    label = LABELS[measure]
    best = table[measure].drop(index=teacher).idxmin()
    with figure() as (fig, ax):
        area = 300 * table["disk_mb"] / table["disk_mb"].max()
        for i, (name, row) in enumerate(table.iterrows()):
            hollow = name in untrained
            look = {"marker": MARKERS[i % 5], "label": f"{name}, {row['disk_mb']:.1f} MB"}
            look |= {"color": "none" if hollow else COLOURS[i % 5]}
            look |= {"edgecolor": QUIET if hollow else "black"}
            ax.scatter(row["token_ms"], row[measure], s=area[name], **look)
        ax.legend(markerscale=0.6, labelspacing=0.9)
        ax.set(xlabel="generating a token (ms)", ylabel=f"{label} on held-out text")
        if table[measure].max() > 5 * table[measure].min():
            ax.set(yscale="log", ylabel=f"{label} on held-out text (logarithmic)")
            plain_numbers(ax.yaxis)
        ax.margins(0.25)
        ratio = table.loc[best] / table.loc[teacher]
        ax.set_title(
            f"{best}: {ratio[measure]:.2f} times the {label}, "
            f"{ratio['disk_mb']:.2f} of the size, {ratio['token_ms']:.2f} of the time"
        )
    return fig


def plot_token_view(
    teacher_logits: torch.Tensor, student_logits: torch.Tensor, tokenizer, context: str = ""
) -> Figure:
    """Teacher and student side by side at one position: what each would say next.

    The rows are the six likeliest tokens of each, and all others together.

    Args:
        teacher_logits, student_logits: of one position, shape (vocabulary,).
        context: the text before, shown above.
    """
    p, q = (soften(z.detach().cpu()) for z in (teacher_logits, student_logits))
    likeliest = {i for x in (p, q) for i in x.topk(6).indices.tolist()}
    tokens = sorted(likeliest, key=lambda i: -p[i])
    names = [*(show_token(tokenizer, i) for i in tokens), "all others"]
    series = {
        name: [*x[tokens].tolist(), max(0.0, 1 - x[tokens].sum().item())]
        for name, x in (("teacher", p), ("student", q))
    }
    with figure(height=1.4 + 0.36 * len(names)) as (fig, ax):
        grouped_bars(fig, ax, names, series, ".3f", [FILLED, HATCHED])
        ax.set_xlabel("probability")
        first, second = (show_token(tokenizer, x.argmax().item()) for x in (p, q))
        moved = percent((p - q).abs().sum().item() / 2)
        found = f"Teacher: “{first}”, student: “{second}”; {moved} of the probability differs"
        context = context.replace("$", r"\$")
        ax.set_title(f"{context} …\n{found}" if context else found)
    return fig


def plot_divergence(tokens: Sequence[str], values: Sequence[float]) -> Figure:
    """A text whose tokens are shaded by a value in nats: the darker, the larger.

    Args:
        tokens: the text, piece by piece; a piece that begins with a space begins a word.
        values: one for each, at least 0.
    """
    columns = 96
    values = [max(0.0, float(value)) for value in values]  # rounding can leave a 0 just below
    top = max(max(values), 1e-9)
    places = wrap_words([token.replace("\n", " ") for token in tokens], columns)
    rows = places[-1][0] + 1
    shades = ScalarMappable(Normalize(0, top), SHADES)
    with figure(width=9.0, height=1.3 + 0.3 * rows) as (fig, ax):
        for (y, x, text), value in zip(places, values, strict=True):
            ax.barh(y, len(text), left=x, height=0.9, color=shades.to_rgba(value))
            look = {"family": "monospace", "fontsize": 9, "va": "center", "ha": "center"}
            for i, letter in enumerate(text):  # one by one: a monospace run drifts off its boxes
                ax.text(x + i + 0.5, y, letter.replace("$", r"\$"), **look)
        ax.set(xlim=(0, columns), ylim=(rows - 0.4, -0.6))
        ax.axis("off")
        scale = {"location": "bottom", "anchor": (0, 0), "shrink": 0.4, "aspect": 30}
        fig.colorbar(shades, ax=ax, label="nats per token", **scale)
        most = tokens[int(np.argmax(values))].strip().replace("$", r"\$")
        ax.set_title(f"{np.mean(values):.2f} nats a token; most, {top:.2f}, at “{most}”")
    return fig


def wrap_words(tokens: Sequence[str], columns: int) -> list[tuple[int, int, str]]:
    """Row, column and text of each token: no word is broken unless it is longer than a row."""
    places, row, column = [], 0, 0
    for i, token in enumerate(tokens):
        end = i + 1
        while end < len(tokens) and not tokens[end].startswith(" "):
            end += 1
        starts_word = i == 0 or token.startswith(" ")
        needed = len("".join(tokens[i:end])) if starts_word else len(token)
        if column and column + needed > columns:
            row, column = row + 1, 0
        places.append((row, column, token))
        column += len(token)
    return places


# -- 05: its own words -----------------------------------------------------------------


def plot_exposure(curves: dict[str, Sequence[float]]) -> Figure:
    """KL from the teacher as a text moves on from its prompt, one line a kind of text.

    Args:
        curves: for each kind of text the mean KL at each token after the prompt, in nats;
            drawn as means of eight tokens, so that a trend can be seen.
    """
    require(curves, "no curves were given; give at least one in a dict, by name")
    window = 8
    with figure() as (fig, ax):
        means = {}
        for i, (name, values) in enumerate(curves.items()):
            values = np.asarray(values, dtype=float)
            means[name] = values.mean()
            parts = values[: len(values) // window * window].reshape(-1, window).mean(axis=1)
            middles = (np.arange(len(parts)) + 0.5) * window
            ax.plot(middles, parts, label=f"{name}, mean {means[name]:.3f}", **line_look(i))
        ax.set(xlabel="tokens after the prompt", ylabel="KL from the teacher (nats per token)")
        ax.set_ylim(bottom=0)
        ax.legend()
        least, most = min(means, key=means.get), max(means, key=means.get)
        ax.set_title(f"Nearest on {least} ({means[least]:.3f}), furthest on {most}")
    return fig


def plot_writing(table: pd.DataFrame) -> Figure:
    """How likely and how varied each writer's text is, a line a writer over sampling temperature.

    Args:
        table: columns way, sampling (temperature), teacher_nats and distinct, such as from
            `text_quality`; rows of the same way and temperature are averaged. What the
            others are held against is the way "teacher".
    """
    means = table.groupby(["way", "sampling"], sort=False)[["distinct", "teacher_nats"]].mean()
    with figure(height=4.6) as (fig, ax):
        ways = means.index.unique(0)
        looks = {way: line_look(i) for i, way in enumerate(ways.drop("teacher", errors="ignore"))}
        for way in ways:
            rows = means.loc[way].sort_index()
            look = looks.get(way, {"color": QUIET, "linestyle": "--", "marker": "*"})
            ax.plot(rows["distinct"], rows["teacher_nats"], label=way, **look)
            if way == "teacher":
                for sampling, row in rows.iterrows():
                    place = {"xytext": (6, -11), "textcoords": "offset points", "fontsize": 9}
                    ax.annotate(f"T = {sampling:g}", row, color=QUIET, **place)
        ax.margins(0.1)
        ax.set_xlabel("different ones among all runs of three tokens (varied is right)")
        ax.set_ylabel("nats per token under the teacher (likely is down)")
        fig.legend(loc="outside lower center", ncols=2)
        if "teacher" in ways:
            ax.set_title("Between likely and varied; the teacher is the dashed line")
    return fig


# -- 06: inside the teacher ------------------------------------------------------------


def plot_attention(maps: dict[str, torch.Tensor], ids: torch.Tensor, tokenizer) -> Figure:
    """Which tokens a head looks back at from each position, one map a model, side by side.

    Args:
        maps: by name, the attention weights of one head, shape (tokens, tokens): row i is
            what position i takes from each token.
        ids: the text, shape (tokens,), at least two tokens.
        tokenizer: for the labels.
    """
    labels = [show_token(tokenizer, i) for i in ids.tolist()]
    side = 2.0 + 0.16 * len(labels)
    with figure(len(maps), width=0.8 + side * len(maps), height=side) as (fig, axes):
        for ax, (name, weights) in zip(np.atleast_1d(axes), maps.items(), strict=True):
            weights = weights.detach().float().cpu().numpy()
            image = ax.imshow(weights, cmap=SHADES, vmin=0, vmax=1)
            ax.set_xticks(range(len(labels)), labels, rotation=90, fontsize=8)
            ax.set_yticks(range(len(labels)), labels, fontsize=8)
            ax.grid(visible=False)
            ax.set(xlabel="looks at", ylabel="from")
            ax.set_title(f"{name}: {weights[1:, 0].mean():.0%} to the first token", fontsize=9)
        fig.colorbar(image, ax=axes, label="share of the attention", shrink=0.6)
    return fig


# -- 07: a student at work -------------------------------------------------------------


def plot_bits(table: pd.DataFrame, measure: str = "kl_to_teacher") -> Figure:
    """Quality over size on disk, a line a model; each marker has its number of bits beside it.

    Args:
        table: columns model, bits, megabytes and the measure, one row a model in so many bits.
    """
    ends = []
    with figure(height=4.0) as (fig, ax):
        for i, (name, rows) in enumerate(table.groupby("model", sort=False)):
            rows = rows.sort_values("megabytes")
            look = line_look(i) | {"marker": MARKERS[i % 5], "label": name}
            ax.plot(rows["megabytes"], rows[measure], **look)
            for row in rows.itertuples():
                at = row.megabytes, getattr(row, measure)
                side = {"textcoords": "offset points", "xytext": (6, 5), "color": COLOURS[i % 5]}
                ax.annotate(f"{row.bits}", at, **side)
            best = rows.loc[rows[measure].idxmin()]
            ends.append(f"{name} {best[measure]:.3g} at {best['megabytes']:.1f} MB")
        ax.set(yscale="log", ylabel=LABELS[measure])
        ax.set_xlabel("size on disk (MB); numbers are bits for each weight")
        plain_numbers(ax.yaxis)
        ax.margins(0.1)
        ax.legend()
        ax.set_title(f"Lowest: {'; '.join(ends)}")
    return fig


def plot_acceptance(measured: dict[str, tuple[float, float]]) -> Figure:
    """Accepted drafts of several students: from logits and by decoding, on one diagonal.

    Args:
        measured: by name, 1 - total variation from logits, and the share accepted.
    """
    require(measured, "nothing was measured; give at least one student in a dict, by name")
    with figure(height=4.2) as (fig, ax):
        both = [value for pair in measured.values() for value in pair]
        ends = [max(0, min(both) - 0.05), min(1, max(both) + 0.05)]
        ax.plot(ends, ends, color=QUIET, linestyle="--", marker="", label="equal")
        for i, (name, (expected, found)) in enumerate(measured.items()):
            look = {"color": COLOURS[i % 5], "marker": MARKERS[i % 5], "linestyle": ""}
            ax.plot(expected, found, label=f"{name}: {expected:.3f}, {found:.3f}", **look)
        ax.set(xlabel="1 − total variation, from logits", ylabel="accepted, by decoding")
        ax.legend()
        best = max(measured, key=lambda name: measured[name][1])
        gap = max(abs(expected - found) for expected, found in measured.values())
        ax.set_title(
            f"{best}: {percent(measured[best][1])} accepted; from its logits each share is known "
            f"to within {gap:.3f}"
        )
    return fig


def plot_speedup(
    acceptance: float, cost: float, ks: Sequence[int], measured=None, checks=None
) -> Figure:
    """Speed-up by the number of drafted tokens: by formula, and as the clock has it.

    Args:
        acceptance: the share of drafted tokens that the teacher accepts.
        cost: seconds of a draft model's token, the teacher's being 1.
        ks: numbers of drafted tokens.
        measured: the speed-up by the clock for each k.
        checks: for each k the seconds of a pass over k + 1 tokens, the teacher's token being 1.
    """
    formula = [expected_speedup(acceptance, k, cost) for k in ks]
    lines = {f"formula, cost ratio {cost:.2f}": formula}
    if checks is not None:
        both = zip(ks, checks, strict=True)
        with_checks = [expected_speedup(acceptance, k, cost, check) for k, check in both]
        lines["formula with the measured check"] = with_checks
    if measured is not None:
        lines["by the clock"] = measured
    with figure() as (fig, ax):
        ax.axhline(1, color=QUIET, linewidth=1, linestyle="-", marker="", label="teacher alone")
        for i, (name, values) in enumerate(lines.items()):
            ax.plot(ks, values, label=name, marker=MARKERS[i], **line_look(i))
        ax.set(xlabel="drafted tokens k", ylabel="speed, the teacher's own being 1")
        ax.set_ylim(bottom=0)
        ax.set_xticks(ks)
        ax.legend()
        shown, values = list(lines.items())[-1]
        best = int(np.argmax(values))
        ax.set_title(
            f"{percent(acceptance)} accepted: at best {values[best]:.2f} times the teacher's "
            f"speed, at k = {ks[best]} ({shown})"
        )
    return fig


# -- 08: a real teacher ------------------------------------------------------------------


def plot_memory(plans: dict) -> Figure:
    """Where the memory of training goes: the parts of each `plan`'s peak, as one bar."""
    with figure(height=1.5 + 0.6 * len(plans)) as (fig, ax):
        for row, plan in enumerate(plans.values()):
            left = 0.0
            for i, (part, size) in enumerate(plan.memory.items()):
                label = part if row == 0 else None
                look = {"color": COLOURS[i], "edgecolor": "white", "height": 0.6}
                ax.barh(row, size / 1e6, left=left, label=label, **look)
                left += size / 1e6
            ax.text(left, row, f"  {left:,.0f} MB", va="center")
        name_rows(ax, list(plans))
        ax.margins(x=0.16)
        ax.set_xlabel("MB at the peak")
        fig.legend(loc="outside lower center", ncols=3)
        name, plan = next(iter(plans.items()))
        part = max(plan.memory, key=plan.memory.get)
        share = plan.memory[part] / plan.peak_memory
        ax.set_title(f"Most memory goes to {part}: {share:.0%} ({name})")
    return fig
