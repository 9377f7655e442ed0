"""Perplexity kept, a capability gone: students of one size, on the book and on copying.

    python benchmarks/copying.py

All learn from the soft labels of the training chapters in as many steps, and have as many
parameters: half of the layers, chosen in two ways, or all layers with a quarter of the
feed-forward units. The last kind is such a narrow student whose text repeats a span in a
quarter of the blocks. Chapter XI and XII say how well each predicts, `kd.copy_gain` what an
earlier copy is worth to it, on text and on random tokens. The rows are stored where notebook
S2 finds them; one that is stored already is not run again.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

import willows_kd as kd

STORED = Path(__file__).parent.parent / "willows_kd" / "assets" / "results" / "copying.csv"
SETTINGS = dict(epochs=2, learning_rate=1e-3)
SEEDS = range(3)
SPAN = 60  # tokens that are copied in the probe
LAST = "layers 1, 5, 6"
NARROW = "all layers, a quarter of the units"
REPEATED = f"{NARROW}, repeated spans"


def main() -> None:
    """Train and measure each kind of student with each seed."""
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()

    teacher, tokenizer = kd.load_teacher()
    blocks = kd.pack(kd.load_corpus(), tokenizer)
    units = kd.importance(teacher, blocks.train[:64])["feed_forward"]
    kept = units.topk(units.shape[1] // 4).indices
    starts = {
        "layers 1, 3, 6": lambda: kd.student_from_teacher(teacher, 3, [0, 2, 5]),
        LAST: lambda: kd.student_from_teacher(teacher, 3, [0, 4, 5]),
        NARROW: lambda: kd.narrowed(teacher, feed_forward=kept),
        REPEATED: lambda: kd.narrowed(teacher, feed_forward=kept),
    }
    store("teacher", 0, "", teacher, blocks)
    for seed in SEEDS:
        for kind, start in starts.items():
            if is_stored(kind, seed):
                continue
            student = start()
            store(kind, seed, "before", student, blocks)
            text = blocks.train if kind != REPEATED else with_repeated_spans(blocks.train, seed)
            config = kd.DistillConfig(**SETTINGS, seed=seed)
            kd.distill(teacher, student, replace(blocks, train=text), config, loss=kd.ChunkedLoss)
            store(kind, seed, "after", student, blocks)


def with_repeated_spans(rows: torch.Tensor, seed: int) -> torch.Tensor:
    """The blocks, a quarter of which hold a span of 10 to 60 tokens a second time."""
    generator = torch.Generator().manual_seed(seed)
    rows, width = rows.clone(), rows.shape[1]

    def draw(low, high):
        return torch.randint(low, high, (), generator=generator).item()

    for i in torch.randperm(len(rows), generator=generator)[: len(rows) // 4].tolist():
        size = draw(10, SPAN + 1)
        start = draw(0, width - 2 * size + 1)
        again = draw(start + size, width - size + 1)
        rows[i, again : again + size] = rows[i, start : start + size].clone()
    return rows


def store(kind: str, seed: int, when: str, model, blocks) -> None:
    """Measure a model and add its row."""
    if is_stored(kind, seed, when):
        return
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(1, model.config.vocab_size, (48, 2 * SPAN), generator=generator)
    stream = blocks.test.flatten()
    text = stream[: len(stream) // (2 * SPAN) * 2 * SPAN].view(-1, 2 * SPAN)
    row = {"student": kind, "seed": seed, "when": when, "parameters": model.num_parameters()}
    for chapter, part in {"XI": blocks.validation, "XII": blocks.test}.items():
        row[f"perplexity_{chapter}"] = kd.evaluate(model, part)["perplexity"]
    row |= {"gain_text": kd.copy_gain(model, text), "gain_random": kd.copy_gain(model, random)}
    print(row, flush=True)
    new = pd.DataFrame([row])
    if STORED.exists():
        new = pd.concat([pd.read_csv(STORED), new])
    new.to_csv(STORED, index=False, float_format="%.6g")


def is_stored(kind: str, seed: int, when: str = "after") -> bool:
    """Whether there is such a row."""
    if not STORED.exists():
        return False
    rows = pd.read_csv(STORED, keep_default_na=False)
    return ((rows["student"] == kind) & (rows["seed"] == seed) & (rows["when"] == when)).any()


if __name__ == "__main__":
    main()
