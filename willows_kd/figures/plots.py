"""Figures from data and a title: bars, dots, lines, points, maps and shaded tokens.

A title is a sentence that the author writes where the numbers are. Tables are data frames
of pandas, or what makes one, such as {column: {row: number}}.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator

from willows_kd.figures.style import BARS, COLOURS, LINES, MARKERS, QUIET, figure

SHADES = LinearSegmentedColormap.from_list("shades", ["white", COLOURS[1]])


def plot_bars(values, *, title: str, xlabel: str, form: str = ".3g", stacked=False) -> Figure:
    """Horizontal bars with their numbers: a row for each row of a table, a bar for each column.

    Args:
        values: the table.
        form: the format of the numbers.
        stacked: one bar a row, made of its columns, with their sum at its end.
    """
    frame = pd.DataFrame(values)
    beside = 1 if stacked else len(frame.columns)
    height, rows = 0.8 / beside, np.arange(len(frame))
    with figure(title, height=1.5 + len(frame) * (0.25 + 0.17 * beside)) as (fig, ax):
        ends = np.zeros(len(frame))
        for i, name in enumerate(frame):
            left, places = (ends, rows) if stacked else (0, rows + (i - (beside - 1) / 2) * height)
            look = BARS[i % len(BARS)]
            ax.barh(places, frame[name], height * 0.94, left=left, label=str(name), **look)
            ends = ends * stacked + frame[name].to_numpy()
            if not stacked or i == len(frame.columns) - 1:
                for row, value in zip(places, ends, strict=True):
                    look = {"va": "center", "ha": "right" if value < 0 else "left", "fontsize": 9}
                    ax.text(value, row, f" {value:{form}} ", **look)
        name_rows(ax, frame.index)
        ax.margins(x=0.14)
        finish(ax, xlabel, columns=3)
    return fig


def plot_dots(
    values, *, title: str, xlabel: str, levels: dict | None = None, log=False, form: str = ".3f"
) -> Figure:
    """A dot a row with its number, and the span of what was measured, if there is one.

    Args:
        values: numbers by name, or a table with the columns mean, min and max, such as
            `groupby(...).agg(["mean", "min", "max"])` makes.
        levels: numbers to compare with, by name: vertical lines.
        log: a logarithmic axis.
        form: the format of the numbers.
    """
    frame = values if isinstance(values, pd.DataFrame) else pd.DataFrame({"mean": values})
    with figure(title, height=1.5 + 0.42 * len(frame)) as (fig, ax):
        for place, row in enumerate(frame.itertuples()):
            low, high = getattr(row, "min", row.mean), getattr(row, "max", row.mean)
            ends = [[row.mean - low], [high - row.mean]] if low < high else None
            ax.errorbar(row.mean, place, xerr=ends, color=COLOURS[0], marker="o", capsize=4)
            beside = {"xytext": (7, 5), "textcoords": "offset points", "fontsize": 9}
            ax.annotate(f"{row.mean:{form}}", (row.mean, place), **beside)
        for name, value in (levels or {}).items():
            ax.axvline(value, color=QUIET, linewidth=1, linestyle="--", marker="")
            ax.text(value, -0.85, f" {name}, {value:{form}}", color=QUIET, va="center")
        name_rows(ax, frame.index, above=1.2)
        ax.margins(x=0.15)
        finish(ax, xlabel, log="x" if log else "")
    return fig


def plot_lines(
    lines, *, title: str, xlabel: str, ylabel: str, levels: dict | None = None, log="", spans=None
) -> Figure:
    """A line for each column of a table over its index; what is missing is left out.

    Args:
        lines: the table. Numbers by x, for each name, make one: {name: {x: y}}.
        levels: numbers to compare with, by name: horizontal lines.
        log: which axes are logarithmic: "x", "y" or "xy".
        spans: two tables like `lines`, with the lowest and the highest values.
    """
    frame = pd.DataFrame(lines).sort_index()
    with figure(title, height=4.0) as (fig, ax):
        for i, name in enumerate(frame):
            line = frame[name].dropna()
            ends = [abs(line - end[name].dropna()) for end in spans] if spans else None
            marker = MARKERS[i % 5] if len(line) < 20 else ""
            look = line_look(i) | {"marker": marker, "capsize": 3, "label": str(name)}
            ax.errorbar(line.index, line, yerr=ends, **look)
        for i, (name, value) in enumerate((levels or {}).items()):
            look = {"color": QUIET, "linewidth": 1.5, "linestyle": LINES[i % 5], "marker": ""}
            ax.axhline(value, label=f"{name}, {value:,.4g}", **look)
        finish(ax, xlabel, ylabel, log)
        if "x" in log and len(frame) < 10:
            ax.xaxis.set_major_locator(FixedLocator(frame.index))
    return fig


def plot_scatter(
    points: dict, *, title: str, xlabel: str, ylabel: str, log: str = "", joined: bool = False
) -> Figure:
    """Points in groups, each with a marker of its own.

    Args:
        points: by the group's name, each (x, y) or (x, y, what to write beside it).
        log: which axes are logarithmic: "x", "y" or "xy".
        joined: the points of a group are joined by a line, in their order.
    """
    with figure(title, height=4.4) as (fig, ax):
        for i, (name, group) in enumerate(points.items()):
            look = line_look(i) | {"marker": MARKERS[i % 5], "label": name}
            look |= {} if joined else {"linestyle": "", "alpha": 0.8}
            ax.plot([x for x, *_ in group], [y for _, y, *_ in group], **look)
            for x, y, *note in group:
                beside = {"xytext": (6, 5), "textcoords": "offset points", "fontsize": 9}
                ax.annotate(f"{note[0] if note else ''}", (x, y), color=COLOURS[i % 5], **beside)
        ax.margins(0.12)
        finish(ax, xlabel, ylabel, log)
    return fig


def plot_heatmaps(maps: dict, *, title: str, labels: Sequence[str], shares: str) -> Figure:
    """Square maps of shares from 0 to 1, side by side: row i says what i takes of each column.

    Args:
        maps: by name, tensors or arrays of shape (labels, labels).
        labels: of rows and columns.
        shares: what is shared.
    """
    side = 2.0 + 0.16 * len(labels)
    width = 0.8 + side * len(maps)
    with figure(title, len(maps), width=width, height=side + 0.5) as (fig, axes):
        for ax, (name, weights) in zip(np.atleast_1d(axes), maps.items(), strict=True):
            image = ax.imshow(
                torch.as_tensor(weights).float().cpu().numpy(), cmap=SHADES, vmin=0, vmax=1
            )
            ax.set_xticks(range(len(labels)), labels, rotation=90, fontsize=8)
            ax.set_yticks(range(len(labels)), labels, fontsize=8)
            ax.grid(visible=False)
            ax.set_title(name)
        fig.colorbar(image, ax=axes, label=shares, shrink=0.6)
    return fig


def plot_tokens(
    tokens: Sequence[str], values: Sequence[float], *, title: str, label: str = "nats per token"
) -> Figure:
    """A text whose tokens are shaded by a value: the darker, the larger.

    Args:
        tokens: the text, piece by piece; a piece that begins with a space begins a word.
        values: one for each; what is below 0 is white.
        label: what the values are.
    """
    columns = 96
    values = [float(value) for value in values]
    places = wrap_words([token.replace("\n", " ") for token in tokens], columns)
    rows = places[-1][0] + 1
    shades = ScalarMappable(Normalize(0, max(*values, 1e-9)), SHADES)
    with figure(title, width=9.0, height=1.3 + 0.3 * rows) as (fig, ax):
        for (y, x, text), value in zip(places, values, strict=True):
            ax.barh(y, len(text), left=x, height=0.9, color=shades.to_rgba(max(0.0, value)))
            look = {"family": "monospace", "fontsize": 9, "va": "center", "ha": "center"}
            for i, letter in enumerate(text):  # one by one: a monospace run drifts off its boxes
                ax.text(x + i + 0.5, y, letter, **look)
        ax.set(xlim=(0, columns), ylim=(rows - 0.4, -0.6))
        ax.axis("off")
        bar = {"location": "bottom", "anchor": (0, 0), "shrink": 0.4, "aspect": 30}
        fig.colorbar(shades, ax=ax, label=label, **bar)
    return fig


# -- tables to draw ----------------------------------------------------------------------


def token_table(values: dict, tokenizer, k: int = 6, also: Sequence[int] = ()) -> pd.DataFrame:
    """Numbers of single tokens, and of all others together: a table for `plot_bars`.

    Args:
        values: by name, one number a token, shape (vocabulary,), such as probabilities. The
            rows fall by the first.
        tokenizer: for the labels, in which a dot stands for a leading space.
        k: of each, the tokens with the k largest numbers, whatever their sign.
        also: ids of further tokens.
    """
    values = {name: x.detach().float().cpu() for name, x in values.items()}
    first = next(iter(values.values()))
    largest = (x.abs().topk(k).indices.tolist() for x in values.values())
    tokens = sorted({int(i) for i in also}.union(*largest), key=lambda i: -first[i])
    columns = {
        name: [*x[tokens].tolist(), round((x.sum() - x[tokens].sum()).item(), 6)]
        for name, x in values.items()
    }
    return pd.DataFrame(columns, [*(show_token(tokenizer, i) for i in tokens), "all others"])


def show_token(tokenizer, token: int) -> str:
    """A token as a label: a leading space made visible, a line break too."""
    text = tokenizer.decode([token]).replace("\n", "⏎")
    return "·" + text[1:] if text.startswith(" ") else text


def curves(histories: dict, along: str = "step", start=None) -> pd.DataFrame:
    """The validation perplexity of each history: a table for `plot_lines`.

    Args:
        histories: what `distill` returned, by name. One that ended before its epoch did is
            named as such.
        along: "step" or "tokens".
        start: the value before any training, the same for all.
    """
    lines, measure = {}, "validation_perplexity"
    for name, history in histories.items():
        column = pd.DataFrame(history).set_index(along).reindex(columns=[measure])[measure]
        early = "" if pd.notna(column.iloc[-1]) else f" (ended early, {along} {column.index[-1]})"
        before = {} if start is None else {0: start}
        lines[name + early] = before | column.dropna().to_dict()
    return pd.DataFrame(lines)


# -- what several figures share ----------------------------------------------------------


def line_look(i: int) -> dict:
    """Colour and dashes of the i-th line; more than five still differ."""
    return {"color": COLOURS[i % 5], "linestyle": LINES[(i + i // 5) % 5]}


def name_rows(ax, names: Sequence[str], above: float = 0.5) -> None:
    """Rows from top to bottom, one a name, with room above the first one."""
    ax.set_yticks(range(len(names)), [str(name) for name in names])
    ax.set_ylim(len(names) - 0.5, -above)
    ax.grid(axis="y", visible=False)


def finish(ax, xlabel: str, ylabel: str = "", log: str = "", columns: int = 2) -> None:
    """Name the axes, and the colours if there are several below them, in so many columns.

    The axes that are named in `log` become logarithmic, with plain numbers, and few.
    """
    ax.set(xlabel=xlabel, ylabel=ylabel)
    for letter in log:
        ax.set(**{f"{letter}scale": "log"})
        axis = getattr(ax, f"{letter}axis")
        low, high = axis.get_view_interval()
        decades = np.log10(high / low)
        steps = LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,))
        axis.set_major_locator(MaxNLocator(6) if decades < 1 else steps)
        axis.set_major_formatter("{x:,.10g}")
        axis.set_minor_locator(NullLocator())
    if len(ax.get_legend_handles_labels()[0]) > 1:
        ax.figure.legend(loc="outside lower center", ncols=columns)


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
