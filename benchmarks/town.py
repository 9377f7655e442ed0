"""When does on-policy training pay? A town, where an answer is right or wrong.

    python benchmarks/town.py [--towns 0 1 2] [--seeds 0 1 2] [--ways WAY ...] [--steps 500]

For each town a teacher learns the way from every cell. A student starts from 400 steps on one
stored answer of the teacher's to each of 150 prompts; each way goes on from there. The share of
held-out prompts that it answers rightly, greedily, is stored where notebook S1 finds it, with its
KL from the teacher at each token of its own text. The table is in `benchmarks/results/town.md`.
A run that is stored already is not run again. The setting was chosen, so that there is something
to see: few prompts, a teacher that is right, and answers in which an early mistake leads astray.
"""

import argparse
import copy
import time
from pathlib import Path

import pandas as pd
import torch
from intervals import with_intervals

import willows_kd as kd
from willows_kd.exercises.town import (
    ANSWER,
    PROMPT,
    Town,
    as_blocks,
    small_gpt2,
    train_teacher,
    walk,
)

RESULTS = Path(__file__).parent / "results" / "town.md"
STORED = Path(__file__).parent.parent / "willows_kd" / "assets" / "results" / "town.csv"
SOME, ALL = 150, 653  # prompts to train on; the others are held out
START_STEPS, BATCH = 400, 50
REVERSE, MINE = {"divergence": "reverse_kl"}, {"on_policy_share": 1.0}
STORED_TEXT = {"prompts": SOME, "answers": 1, "noise": 0.0}
# what each way changes in the settings, and in the text
WAYS = {
    "stored text, forward KL": ({}, {}),
    "on-policy, forward KL": (MINE, {}),
    "random moves in the text, forward KL": ({}, {"answers": 16, "noise": 0.3}),
    "more answers in the text, forward KL": ({}, {"answers": 16}),
    "stored text, reverse KL": (REVERSE, {}),
    "on-policy, reverse KL": (REVERSE | MINE, {}),
    "all prompts, stored text, forward KL": ({}, {"prompts": ALL}),
    "all prompts, on-policy, forward KL": (MINE, {"prompts": ALL}),
}


def main() -> None:
    """Train and judge each student that is not stored yet, and write after each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--towns", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--steps", type=int, default=500, help="of each way")
    options = parser.parse_args()

    rows = pd.read_csv(STORED).to_dict("records") if STORED.exists() else []
    done = {(row["town"], row["seed"], row["way"]) for row in rows}
    for number in options.towns:
        runs = [(seed, way) for seed in options.seeds for way in options.ways]
        runs = [run for run in runs if (number, *run) not in done]
        if not runs:
            continue
        town = Town(number)
        teacher = train_teacher(town)
        if (number, 0, "teacher") not in done:
            row = {"town": number, "seed": 0, "way": "teacher", "steps": 0, "seconds": 0}
            add(rows, row | judged(teacher, teacher, town))
        starts = {}
        for seed, way in runs:
            if seed not in starts:
                starts[seed] = small_gpt2(2, seed)
                trained(teacher, starts[seed], town, {}, STORED_TEXT, START_STEPS, seed)
            student = copy.deepcopy(starts[seed])
            settings, text = WAYS[way]
            found = trained(
                teacher, student, town, settings, STORED_TEXT | text, options.steps, seed
            )
            row = {"town": number, "seed": seed, "way": way} | found
            add(rows, row | judged(student, teacher, town))


def trained(teacher, student, town, settings, text, steps, seed) -> dict:
    """Train a student, in place; the steps, and their seconds of processor time."""
    prompts = town.prompts[: text["prompts"]].repeat(text["answers"], 1)
    texts = walk(teacher, prompts, text["noise"], seed)
    blocks = as_blocks(texts, steps, BATCH)
    config = kd.DistillConfig(epochs=1, batch_size=BATCH, seed=seed, **settings)
    start = time.process_time()
    kd.distill(teacher, student, blocks, config)
    return {"steps": steps, "seconds": time.process_time() - start}


def judged(model, teacher, town) -> dict:
    """Held-out prompts answered rightly, and KL from the teacher at each token of its own text."""
    prompts = town.prompts[ALL:]
    greedy = kd.sample_continuations(model, prompts, ANSWER, temperature=0)
    right = town.right(torch.cat([prompts, greedy], dim=1)).float().mean().item()
    kl = kd.token_scores(model, teacher, walk(model, prompts))["kl"][:, PROMPT - 1 :].mean(dim=0)
    return {"right": right} | {f"kl_{i}": x for i, x in enumerate(kl.tolist(), start=1)}


def add(rows: list[dict], row: dict) -> None:
    """Store a run, and write the files."""
    rows.append(row)
    print(row, flush=True)
    runs = pd.DataFrame(rows)
    runs.to_csv(STORED, index=False, float_format="%.6g")
    RESULTS.write_text(f"# When does on-policy training pay?\n\n{as_table(runs)}", encoding="utf-8")


def as_table(runs: pd.DataFrame) -> str:
    """Means over towns and seeds, with 95 % intervals, one line a way."""
    measures = {"right": "held-out prompts right"} | {
        f"kl_{i}": f"KL at token {i} of its own text" for i in (1, 3, 6)
    }
    lines = [
        f"| way | runs | {' | '.join(measures.values())} | seconds of one core |",
        "|---" * 7 + "|",
    ]
    for way, group in runs.groupby("way", sort=False):
        means = with_intervals(group[list(measures)].to_dict("records"))
        cells = [
            f"{means[name]:.3f}" + (f" ± {means[f'± {name}']:.3f}" if len(group) > 1 else "")
            for name in measures
        ]
        lines.append(
            f"| {way} | {len(group)} | {' | '.join(cells)} | {group['seconds'].min():.0f} |"
        )
    lines.append("\nRuns are of several towns and seeds; seconds: the fastest of them.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
