"""Which way of distilling is better: whose text, which divergence, what else is matched?

    python benchmarks/ways.py [--seeds 0 1 2] [--ways WAY ...]

One start, one text, equal optimiser steps, several seeds, judged on the validation
chapter; the seconds are those of training, the writing counted. For each student: quality
on the book, KL from the teacher on the student's own text, and what it writes at several
sampling temperatures. The runs are stored where notebooks S1 and S2 find them, the table
in `benchmarks/results/ways.md`. A row that is stored already is not run again.
"""

import argparse
import itertools
import os
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
from intervals import with_intervals

import willows_kd as kd

RESULTS = Path(__file__).parent / "results" / "ways.md"
STORED = Path(__file__).parent.parent / "willows_kd" / "assets" / "results"
SOFT = dict(learning_rate=1e-3)
HARD = dict(learning_rate=4e-4, alpha=1.0)
TEMPERATURES = (0.5, 0.75, 1.0)  # of sampling
MEASURES = ("ratio", "kl_to_teacher", "kl_on_own_text", "teacher_nll", "distinct", "seconds")
TITLES = {
    "ratio": "times the teacher's perplexity",
    "kl_to_teacher": "KL on the book",
    "kl_on_own_text": "KL on its own text",
    "teacher_nll": "its text under the teacher (nats)",
    "distinct": "distinct-3 of its text",
    "seconds": "seconds of training",
}


def main() -> None:
    """Train and judge every student with every seed, and write after each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", default=list(ways()), help="by name (default: all)")
    options = parser.parse_args()

    teacher, tokenizer = kd.load_teacher()
    corpus = kd.load_corpus()
    blocks = kd.pack(corpus, tokenizer)
    judge = Judge(teacher, tokenizer, blocks)
    stored = Stored()
    nothing = {"seconds": 0, "steps": 0}
    stored.add("teacher", 0, judge.judged(teacher) | nothing, judge.writings(teacher))
    for seed, way in itertools.product(options.seeds, options.ways):
        if not stored.has(way, seed):
            with TemporaryDirectory() as cache:  # so that no writing of another run is found
                os.environ["XDG_CACHE_HOME"] = cache
                student, seconds = trained(teacher, blocks, ways()[way], seed)
            stored.add(way, seed, judge.judged(student) | seconds, judge.writings(student))


def ways() -> dict[str, dict]:
    """The settings of each way; `text`, `cache`, `pruned`, `share` are not of the loop."""
    reverse = SOFT | dict(divergence="reverse_kl")
    layers = dict(hidden_weight=1.0, hidden_layers=((1, 1), (2, 3), (3, 6)))
    quarter = dict(share=0.25)
    return {
        "hard labels": HARD,
        "forward KL": SOFT,
        "reverse KL": reverse,
        "teacher's text, hard labels": HARD | dict(text=dict(temperature=1.0)),
        "teacher's beams, hard labels": HARD | dict(text=dict(beams=4)),
        "teacher's text, forward KL": SOFT | dict(text=dict(temperature=1.0)),
        "on-policy forward KL": SOFT | dict(on_policy_share=1.0),
        "on-policy reverse KL": reverse | dict(on_policy_share=1.0),
        "forward KL, two passes": SOFT | dict(epochs=2),
        "8 largest logits": SOFT | dict(cache=dict(top_k=8)),
        "8 sampled tokens": SOFT | dict(cache=dict(samples=8)),
        "64 sampled tokens": SOFT | dict(cache=dict(samples=64)),
        "forward KL, a quarter": SOFT | quarter,
        "final hidden states, a quarter": SOFT | quarter | dict(hidden_weight=1.0),
        "hidden states of each layer, a quarter": SOFT | quarter | layers,
        "final hidden states": SOFT | dict(hidden_weight=1.0),
        "hidden states of each layer": SOFT | layers,
        "all layers, a quarter of the units": SOFT | dict(pruned=True),
    }


def trained(teacher, blocks, settings: dict, seed: int):
    """A student trained in one way, and the seconds that it took."""
    settings = dict(epochs=1, seed=seed) | settings
    ours = ("text", "cache", "pruned", "share")
    text, cache, pruned, share = (settings.pop(name, None) for name in ours)
    count = int(len(blocks.train) * (share or 1))
    blocks = replace(blocks, train=blocks.train[:count], validation=blocks.validation[:2])
    start, asked = time.perf_counter(), teacher
    if text:
        written = kd.make_transfer_set(teacher, blocks.train, seed=seed, **text)
        blocks = replace(blocks, train=written)
    writing = time.perf_counter() - start
    if cache:
        asked = kd.cache_teacher(teacher, blocks, **cache)
    student = narrower(teacher, blocks) if pruned else kd.student_from_teacher(teacher)
    config = kd.DistillConfig(**settings)
    history = kd.distill(asked, student, blocks, config, loss=kd.ChunkedLoss)
    return student, {"seconds": history[-1]["seconds"] + writing, "steps": len(history)}


def narrower(teacher, blocks):
    """A student with all layers and a quarter of the feed-forward units: as many weights."""
    units = kd.importance(teacher, blocks.train[:16])["feed_forward"]
    return kd.narrowed(teacher, feed_forward=units.topk(units.shape[1] // 4).indices)


class Judge:
    """Looks at a student from every side, each time in the same way."""

    def __init__(self, teacher, tokenizer, blocks):
        self.teacher, self.tokenizer, self.blocks = teacher, tokenizer, blocks
        self.prompts = blocks.validation[:48, : blocks.block_size // 4]
        self.target = kd.evaluate(teacher, blocks.validation)["perplexity"]

    def judged(self, model) -> dict:
        """Quality on the validation chapter, and of what the model writes at temperature 1."""
        found = kd.evaluate(model, self.blocks.validation, self.tokenizer, self.teacher)
        text = kd.sample_continuations(model, self.prompts, 96)
        own = kd.text_quality(model, self.teacher, self.prompts, text)
        own["kl_on_own_text"] = own.pop("kl_to_teacher")
        return found | own | {"ratio": found["perplexity"] / self.target}

    def writings(self, model) -> list[dict]:
        """What the model writes at each sampling temperature."""
        rows = []
        for T in TEMPERATURES:
            text = kd.sample_continuations(model, self.prompts, 96, T, seed=1)
            rows.append(kd.text_quality(model, self.teacher, self.prompts, text) | {"sampling": T})
        return rows


class Stored:
    """The runs so far, a row a student, and what each writes, a row a sampling temperature."""

    def __init__(self):
        self.runs, self.texts = (
            pd.read_csv(path).to_dict("records") if path.exists() else []
            for path in (STORED / "ways.csv", STORED / "writing.csv")
        )

    def has(self, way: str, seed: int) -> bool:
        """Whether this student has been judged."""
        return any(row["way"] == way and row["seed"] == seed for row in self.runs)

    def add(self, way: str, seed: int, judged: dict, writings: list[dict]) -> None:
        """Store a student, and write the files."""
        if self.has(way, seed):
            return
        named = {"way": way, "seed": seed}
        self.runs.append(named | judged)
        self.texts += [named | row for row in writings]
        print(self.runs[-1], flush=True)
        runs = pd.DataFrame(self.runs)
        for name, table in (("ways", runs), ("writing", pd.DataFrame(self.texts))):
            table.to_csv(STORED / f"{name}.csv", index=False, float_format="%.6g")
        RESULTS.write_text(f"# Which way of distilling?\n\n{as_table(runs)}", encoding="utf-8")


def as_table(runs: pd.DataFrame) -> str:
    """Means over seeds and 95 % intervals, one line a way."""
    lines = [f"| way | {' | '.join(TITLES[name] for name in MEASURES)} |", "|---" * 7 + "|"]
    for way, group in runs.groupby("way", sort=False):
        means = with_intervals(group[list(MEASURES)].to_dict("records"))
        cells = [
            f"{means[name]:.3f}" + (f" ± {means[f'± {name}']:.3f}" if len(group) > 1 else "")
            for name in MEASURES[:-1]
        ]
        cells.append(f"{group['seconds'].min():.0f}")
        lines.append(f"| {way} | {' | '.join(cells)} |")
    seeds = runs["seed"].nunique()
    told = f"{seeds} seeds (one without a ±), validation chapter (XI)"
    lines.append(f"\n{told}; seconds: the fastest of the seeds.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
