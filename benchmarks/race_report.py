"""What `race.py` measured, as `race.md` and two pictures: made from its CSV files alone."""

import os
import platform
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from contestants import CACHED, LINES, LOSSES, NAIVE, REFERENCE
from matplotlib.ticker import LogLocator, NullLocator

from willows_kd.evaluation import number
from willows_kd.figures.style import COLOURS, MARKERS, figure
from willows_kd.figures.style import LINES as LINE_STYLES

ON_POLICY_BASE = "TRL GKDTrainer, on-policy"
NAME_AND_MB = ["contestant", "mb"]
PACKAGES = ("torch", "transformers", "trl", "nvidia-modelopt", "liger-kernel")
STUDENTS = {
    "tiny": "the bundled teacher of 6 layers, a student of 3, the book in blocks of 128 tokens",
    "gpt2": "GPT-2's 12 layers with random weights, a student of 6, random tokens",
}
INTRODUCTION = """\
# The race

`python benchmarks/race.py` made this page. All contestants had the same teacher, the same start of
the student, the same optimiser and learning rates, 8 blocks of 128 tokens a step in the same order
(line by line: one line), no dropout, float32 unless bfloat16 is named, and the forward KL at T = 1
alone.

{machine}. {versions}.

Other work shares the machine: **read the ratios, not the seconds.** The contestants took turns in
each round."""


def write_report(folder: Path, left_out: dict[str, str]) -> str:
    """Write the page and the pictures for all parts whose CSV file is there; return the page."""
    found = {path.stem: pd.read_csv(path) for path in folder.glob("race*.csv")}
    page = [INTRODUCTION.format(machine=machine(), versions=versions())]
    page += [f"{name} is left out: {reason}" for name, reason in left_out.items()]
    sections = {
        "race_parity": parity_section,
        "race": lambda frame: speed_section(frame, found.get("race_memory")),
        "race_curves": curves_section,
        "race_loss": loss_section,
        "race_growth": growth_section,
        "race_on_policy": on_policy_section,
    }
    page += [write(found[name]) for name, write in sections.items() if name in found]
    if "race" in found:
        plot_race(found["race"], found.get("race_curves")).savefig(folder / "race.png")
    if "race_growth" in found:
        plot_growth(found["race_growth"]).savefig(folder / "race_growth.png")
    text = "\n\n".join(page) + "\n"
    (folder / "race.md").write_text(text, encoding="utf-8")
    return text


def machine() -> str:
    """What it ran on, without its name."""
    kind = f"{platform.system()} {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return f"{kind}, {os.cpu_count()} cores, {torch.get_num_threads()} threads of PyTorch"


def versions() -> str:
    """Python and the packages that take part, as installed."""
    told = [f"Python {platform.python_version()}"]
    for name in PACKAGES:
        try:
            told.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            told.append(f"no {name}")
    return ", ".join(told)


def markdown(rows: list[list[str]]) -> str:
    """Rows of cells, the first of them the head, as a table."""
    rows = [rows[0], ["---"] + ["---:"] * (len(rows[0]) - 1), *rows[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def date(frame: pd.DataFrame) -> str:
    """The day on which a file's numbers were measured."""
    return frame["date"].iloc[0]


def parity_section(frame: pd.DataFrame) -> str:
    """Whether all compute the same thing."""
    rows = [["contestant", "largest relative difference"]]
    rows += [[name, f"{value:.1e}"] for name, value in frame[["contestant", "difference"]].values]
    return (
        f"## The same losses ({date(frame)})\n\nThe losses of the first six steps, "
        f"against those of *{REFERENCE}*.\n\n{markdown(rows)}"
    )


# -- speed and memory ------------------------------------------------------------------


def against(frame: pd.DataFrame, other: str, value="tokens_per_second") -> pd.DataFrame:
    """Each contestant's ratio to another one, round by round: a row a contestant."""
    rounds = frame.pivot(index="repeat", columns="contestant", values=value)
    return rounds.div(rounds[other], axis=0).T.loc[frame["contestant"].unique()]


def on_policy_section(frame: pd.DataFrame) -> str:
    """How fast a student learns from what it writes itself."""
    told = (
        "The student continues the first quarter of each block, and the teacher judges what it "
        "wrote: other words for each contestant, so there are no equal losses to compare."
    )
    return f"{speed_section(frame, None, ON_POLICY_BASE, 'On-policy')}\n\n{told}"


def speed_section(frame, memory: pd.DataFrame | None, base=LINES, title="Speed and memory") -> str:
    """Best and median tokens a second with their ratios, and memory and set-up, a table a size."""
    told = [f"## {title} ({date(frame)})"]
    for size, rounds in frame.groupby("size", sort=False):
        rounds = rounds.assign(share=rounds["tokens_per_second"] / rounds["limit"])
        groups = rounds.groupby("contestant", sort=False)
        rates = groups["tokens_per_second"].agg(["max", "median"]).round(1)
        ratios, medians = against(rounds, base), groups[["setup", "share"]].median()
        peaks = {} if memory is None else dict(memory[memory["size"] == size][NAME_AND_MB].values)
        head = [
            "contestant",
            "best tokens/s",
            "ratio",
            "median tokens/s",
            "ratio",
            "ratio by round",
        ]
        rows = [[*head, "of the limit", "peak memory (MB)", "set-up (s)"]]
        for name, rate in rates.iterrows():
            row = [name]
            for which in ("max", "median"):
                row += [f"{rate[which]:,.1f}", f"{rate[which] / rates.loc[base, which]:.2f}"]
            row.append(f"{ratios.loc[name].min():.2f} to {ratios.loc[name].max():.2f}")
            row += [f"{medians.loc[name, 'share']:.0%}", number(peaks.get(name, float("nan")))]
            rows.append([*row, number(medians.loc[name, "setup"])])
        many = f"{rounds['blocks'].iloc[0]:,} blocks, {rounds['repeat'].nunique()} rounds"
        told += [f"**{size}**: {STUDENTS[size]}; {many}.", markdown(rows)]
    told.append(
        f"*Ratio*: the column before it, divided by that of *{base}*. *Ratio by round*: the "
        "smallest and the largest ratio within one round, in which all take turns. "
        "*Of the limit*: the time that the matrix products of a step would take at the rate at "
        "which this machine multiplied matrices of the model's shapes, in the same numbers and the "
        "same round, as a share of the time taken; the median. Counted are the products that each "
        "contestant cannot do without: the student's three times, the teacher's once, or, cached, "
        "its head's. "
        "*Peak memory*: resident, beyond teacher and student, in a process of its own. "
        "*Set-up* is left out of tokens/s; for a cached teacher it is one pass of the teacher over "
        "all blocks, which every later epoch and every later run uses again."
    )
    return "\n\n".join(told)


def plot_race(speeds: pd.DataFrame, curves: pd.DataFrame | None):
    """Speed against line by line as bars, and validation KL against seconds of training."""
    columns, width = (1, 7.0) if curves is None else (2, 12.5)
    ratios = ratios_to_lines(speeds)
    best = " and ".join(f"{bars[CACHED]:.1f} ({size})" for size, bars in ratios.items())
    with figure(f"{CACHED}: {best} times {LINES}", columns, width, height=5.0) as (fig, axes):
        draw_speeds(axes if curves is None else axes[0], ratios)
        if curves is not None:
            draw_curves(axes[1], curves)
            fig.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return fig


def ratios_to_lines(speeds: pd.DataFrame) -> dict[str, pd.Series]:
    """Each size's median tokens a second as multiples of line by line's."""
    ratios = {}
    for size, rounds in speeds.groupby("size", sort=False):
        rates = rounds.groupby("contestant", sort=False)["tokens_per_second"].median()
        ratios[size] = rates / rates[LINES]
    return ratios


def draw_speeds(ax, ratios: dict[str, pd.Series]) -> None:
    """A bar a contestant and size."""
    for i, (size, bars) in enumerate(ratios.items()):
        places = np.arange(len(bars)) + (i - (len(ratios) - 1) / 2) * 0.4
        ax.barh(places, bars, 0.38, color=COLOURS[(0, 3)[i]], label=size)
        for place, bar in zip(places, bars, strict=True):
            ax.text(bar, place, f" {bar:.1f}", va="center", fontsize=8.5)
    ax.set_yticks(range(len(bars)), bars.index)
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.margins(x=0.1)
    ax.set_xlabel(f"median tokens a second ÷ that of {LINES}")
    if len(ratios) > 1:
        ax.legend(loc="lower right")


def draw_curves(ax, curves: pd.DataFrame) -> None:
    """Validation KL against seconds of training."""
    groups = curves.groupby("contestant", sort=False)
    for i, (name, rows) in enumerate(groups):
        look = {"color": COLOURS[i % 5], "marker": MARKERS[(i + i // 5) % 5], "markersize": 4}
        style = LINE_STYLES[(i + i // 5) % 5]
        ax.plot(rows["seconds"], rows["kl"], label=name, linestyle=style, **look)
    ax.set(xlabel="seconds of training", ylabel="validation KL (nats per token)", yscale="log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_title(f"Lowest KL at the end: {groups['kl'].last().idxmin()}")


def curves_section(frame: pd.DataFrame) -> str:
    """Where each contestant stands when the time is up."""
    ends = frame.groupby("contestant", sort=False).last().sort_values("kl")
    rows = [["contestant", "seconds", "tokens", "validation KL (nats per token)"]]
    for name, end in ends.iterrows():
        rows.append([name, number(end["seconds"]), f"{end['tokens']:,}", f"{end['kl']:.4f}"])
    return (
        f"## After the same time ({date(frame)})\n\nThe size *tiny*, one run each, the learning "
        "rate constant after a short warm-up; line by line also at a tenth of that rate, which "
        "suits its small steps better. The clock stands still while the student is looked at, "
        "and does not run during set-up.\n\n"
        f"{markdown(rows)}\n\n![Speed, and KL against seconds of training](race.png)"
    )


# -- the loss alone, and growth --------------------------------------------------------


def loss_section(frame: pd.DataFrame) -> str:
    """Time and memory of each loss."""
    told = [
        f"## The loss alone ({date(frame)})\n\nForward KL from final hidden states, forward and "
        "backward, for GPT-2's width (768) and vocabulary (50,257) in float32. Memory is resident, "
        "beyond the inputs; the gradients, which all must make, are in it."
    ]
    for tokens, rounds in frame.groupby("tokens"):
        ratios = against(rounds, NAIVE, "seconds").median(axis=1)
        rows = [[f"{tokens:,} tokens", "seconds", f"÷ {NAIVE}", "peak memory (MB)"]]
        medians = rounds.groupby("contestant")[["seconds", "mb"]].median()
        for name in filter(medians.index.__contains__, LOSSES):
            row = medians.loc[name]
            rows.append([name, number(row["seconds"]), number(ratios[name]), number(row["mb"])])
        told.append(markdown(rows))
    return "\n\n".join(told)


def exponent(rows: pd.DataFrame, value: str) -> float:
    """The slope of a value's logarithm over that of x."""
    return np.polyfit(np.log(rows["x"]), np.log(rows[value]), 1)[0]


def growth_section(frame: pd.DataFrame) -> str:
    """The exponents."""
    rows = [["as there are more", "from", "to", "time grows as", "memory grows as"]]
    for axis, points in frame.groupby("axis", sort=False):
        powers = [f"power {exponent(points, value):.2f}" for value in ("seconds", "mb")]
        rows.append([axis, f"{points['x'].min():,}", f"{points['x'].max():,}", *powers])
    return (
        f"## How the cost of our step grows ({date(frame)})\n\nFrom a step of 8 blocks of 128 "
        "tokens, a teacher of 6 layers, 224 wide, and a vocabulary of 4,096. Where blocks get "
        f"longer there are fewer: 1,024 tokens a step.\n\n{markdown(rows)}\n\n"
        "![Time and memory of a step as one size grows](race_growth.png)"
    )


def plot_growth(frame: pd.DataFrame):
    """Time and memory of a step, relative to the smallest, as each size grows."""
    groups = frame.groupby("axis", sort=False)
    title = "Cost of one of our steps as one size grows"
    with figure(title, columns=len(groups), width=12, height=3.4) as (fig, axes):
        for ax, (axis, points) in zip(axes, groups, strict=True):
            for value, label in {"seconds": "time", "mb": "memory"}.items():
                growth = points[value] / points[value].iloc[0]
                ax.plot(points["x"], growth, label=f"{label}, power {exponent(points, value):.2f}")
            ax.set(xscale="log", yscale="log", xlabel=axis, title="")
            ax.set_xticks(points["x"], [f"{x:,}" for x in points["x"]])
            ax.minorticks_off()
            ax.set_ylim(0.8, 16)
            ax.set_yticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
            ax.legend(fontsize=8.5)
        axes[0].set_ylabel("times the smallest")
    return fig
