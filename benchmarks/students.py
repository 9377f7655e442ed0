"""The central measurement: hard labels, soft labels or both, at the same budget.

    python benchmarks/students.py [--corpus FILE] [--output_dir benchmarks/results]

Every student has half of the teacher's layers, starts from the same copied weights and
sees the same blocks in the same order. For each objective the learning rate and
the epoch are chosen on the validation text, from one grid, with the first seed; the
test text is looked at once, at the end, with all seeds.
"""

import argparse
import dataclasses
from pathlib import Path

import pandas as pd

import willows_kd as kd

OBJECTIVES = {"hard labels only": 1.0, "soft labels only": 0.0, "both": 0.5}
LEARNING_RATES = (2.5e-4, 7.5e-4, 2.5e-3)
SEEDS = (0, 1, 2)


def main() -> None:
    """Choose, train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", help="a text file (default: as load_corpus finds it)")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--temperature", type=float, default=kd.DistillConfig.temperature)
    options = parser.parse_args()

    teacher, tokenizer = kd.load_teacher()
    corpus = kd.load_corpus(options.corpus)
    blocks = kd.pack(corpus, tokenizer)
    chosen, histories, trials = {}, {}, []
    for name, alpha in OBJECTIVES.items():
        for rate in LEARNING_RATES:
            config = kd.DistillConfig(
                alpha=alpha,
                epochs=options.epochs,
                temperature=options.temperature,
                learning_rate=rate,
                seed=SEEDS[0],
            )
            student, history, best = train(teacher, blocks, config)
            trials.append({"objective": name, "learning_rate": rate, **best})
            print(trials[-1], flush=True)
            if name not in chosen or best["perplexity"] < chosen[name][2]["perplexity"]:
                chosen[name], histories[name] = (student, config, best), history

    models = {"teacher": teacher, "untrained student": kd.student_from_teacher(teacher)}
    for name, (student, config, _) in chosen.items():
        models[name] = lambda seed, student=student, config=config: (
            student
            if seed == config.seed
            else train(teacher, blocks, dataclasses.replace(config, seed=seed))[0]
        )
    table = kd.compare(models, blocks, tokenizer, seeds=SEEDS)
    write(options.output_dir, table, trials, histories, teacher, blocks, corpus)


def train(teacher, blocks, config):
    """A student as of the epoch that is best on validation, its history, and that epoch."""
    student = kd.student_from_teacher(teacher)
    best = {"epoch": 0, "perplexity": float("inf")}
    kept = {}

    def keep_the_best(row):
        if row.get("validation_perplexity", float("inf")) < best["perplexity"]:
            best.update(epoch=row["epoch"], perplexity=row["validation_perplexity"])
            kept.update({name: w.clone() for name, w in student.state_dict().items()})

    history = kd.distill(teacher, student, blocks, config, on_step=keep_the_best)
    student.load_state_dict(kept)
    return student, history, best


def write(folder: Path, table: pd.DataFrame, trials, histories, teacher, blocks, corpus) -> None:
    """The table as Markdown and CSV, the grid as CSV, two pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    perplexity = table["perplexity"]
    hard, soft = perplexity["hard labels only"], perplexity["soft labels only"]
    closed = (hard - soft) / (hard - perplexity["teacher"])
    ratio = soft / perplexity["teacher"]
    finding = (
        f"Soft labels close {closed:.0%} of the gap between hard labels and the teacher; "
        f"the soft-label student's perplexity is {ratio:.3f} times the teacher's."
    )
    text = (
        f"{kd.as_markdown(table)}\n\n{finding} Test text of {corpus.title}, {len(SEEDS)} seeds.\n"
    )
    print(f"\n{text}")
    (folder / "students.md").write_text(text, encoding="utf-8")
    table.to_csv(folder / "students.csv")
    pd.DataFrame(trials).to_csv(folder / "students_grid.csv", index=False)
    kd.plot_comparison(table).savefig(folder / "students.png")
    on_validation = kd.quality(teacher, blocks.validation)["perplexity"]
    kd.plot_history(histories, on_validation).savefig(folder / "students_history.png")


if __name__ == "__main__":
    main()
