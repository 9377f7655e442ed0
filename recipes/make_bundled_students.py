"""How the bundled students were made from the bundled teacher, and their control.

    python recipes/make_bundled_students.py --books FOLDER --willows FILE

Run `recipes/make_bundled_models.py` first, or use the teacher that ships. FOLDER and FILE
are those of that recipe. All students have as many parameters and see the same kinds of
blocks: chapters I-X of the book, repeated, and other books, since soft labels can be learnt
from any text (`benchmarks/what_helps.py` compares kinds of text). `student` has half of the
teacher's layers and learns from soft labels only; `student_hard_labels`, the control, is the
same but for its labels; `student_narrow` has all layers and a quarter of the feed-forward
units, the most active ones, and soft labels. Each stage is kept as it was best on chapter XI:
nearest to the teacher in KL, or, the control, lowest in perplexity. Chapter XII is looked at
once, for the model cards and for the table of the loss by position.

The first stage reads blocks of 128 tokens, and leaves the positions from 128 on untrained;
the others read blocks of all 256 positions. All are measured over windows of 256. The
students that ship went through the first two stages with the reader, fine-tuned, as their
teacher; the soft-label student then through the third with the teacher that ships, which has
learnt to copy. The narrow one read blocks of 256 from the start, a sixth of them.

Everything unfinished lies in --work_dir: a stage that is finished there is not run again.
"""

import argparse
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from teach_copying import copy_gains

import willows_kd as kd
from willows_kd.corpus import tokenize

ASSETS = Path(__file__).parent.parent / "willows_kd" / "assets"
BOOK_REPEATS = 16  # passes over chapters I-X in each pass over the other books: 1 block of 4
SETTINGS = dict(temperature=1.0, seed=0)
STAGES = (
    dict(block_size=128, batch_size=8, epochs=2, rate=1.0, every=1),
    dict(block_size=256, batch_size=4, epochs=1, rate=0.5, every=2),  # every second block
    dict(block_size=256, batch_size=4, epochs=1, rate=0.5, every=8),
    dict(block_size=256, batch_size=4, epochs=1, rate=0.75, every=6),
)
STUDENTS = {
    "student": dict(alpha=0.0, learning_rate=2e-3),
    "student_hard_labels": dict(alpha=1.0, learning_rate=4e-4),
    "student_narrow": dict(alpha=0.0, learning_rate=2e-3),
}
STAGES_OF = {"student": (0, 1, 2), "student_hard_labels": (0, 1), "student_narrow": (3,)}
SAMPLE = 64  # blocks on which units are scored
LOOK_AT = {8 * 2**i for i in range(6)}  # steps early in training at which validation is measured
LOOK_EVERY = 250  # and later ones
BIN = 32  # positions that share a row in the table of the loss by position


def main() -> None:
    """Train the students that are asked for and put them where the package looks for them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--books", type=Path, required=True, help="folder of .txt books")
    parser.add_argument("--willows", type=Path, required=True, help="the book, as .txt")
    parser.add_argument("--work_dir", type=Path, default=Path("recipe_work"))
    parser.add_argument("--assets", type=Path, default=ASSETS, help="where the students go")
    parser.add_argument("--only", nargs="+", choices=STUDENTS, help="these students")
    options = parser.parse_args()

    teacher, tokenizer = kd.load_teacher()
    curves = {("teacher", 0): teacher}
    for name in options.only or STUDENTS:
        for stage in STAGES_OF[name]:
            folder = options.work_dir / f"{name}_{stage + 1}"
            if not (folder / "model.safetensors").exists():
                before = options.work_dir / f"{name}_{stage}"
                run_stage(name, stage, before, folder, teacher, tokenizer, options)
            curves[name, stage + 1] = kd.load_student(folder, tokenizer).eval()
        publish(name, folder, options.assets / name, teacher, tokenizer, options.willows)
    if not options.only:
        write_curves(curves, tokenizer, options)


def run_stage(name, stage, before: Path, folder: Path, teacher, tokenizer, options) -> None:
    """Train a student for a stage, from where the one before ended."""
    settings = STAGES[stage]
    config = kd.DistillConfig(
        **SETTINGS | STUDENTS[name] | {k: settings[k] for k in ("batch_size", "epochs")}
    )
    config = replace(config, learning_rate=config.learning_rate * settings["rate"])
    blocks = transfer_set(tokenizer, settings["block_size"], settings["every"], options)
    student, history = start(name, teacher, blocks), []
    if stage > STAGES_OF[name][0]:
        student, history = kd.load_student(before, tokenizer), read_history(before)
    student, new = train(teacher, student, blocks, config)
    last = history[-1] if history else {"step": 0, "epoch": 0, "tokens": 0, "seconds": 0}
    counts = ("step", "epoch", "tokens", "seconds")
    size = {"block_size": settings["block_size"]}
    history += [row | size | {count: row[count] + last[count] for count in counts} for row in new]
    kd.save_model(student.half(), tokenizer, folder)
    pd.DataFrame(history).to_csv(folder / "history.csv", index=False, float_format="%.6g")


def start(name: str, teacher, blocks: kd.Blocks):
    """A student before any training."""
    if name != "student_narrow":
        return kd.student_from_teacher(teacher)
    units = kd.importance(teacher, blocks.train[:SAMPLE])["feed_forward"]
    return kd.narrowed(teacher, feed_forward=units.topk(units.shape[1] // 4).indices)


def read_history(folder: Path) -> list[dict]:
    """The rows of a stage that is finished; values that were not measured are left out."""
    rows = pd.read_csv(folder / "history.csv").to_dict("records")
    return [{name: value for name, value in row.items() if value == value} for row in rows]


def transfer_set(tokenizer, block_size: int, every: int, options) -> kd.Blocks:
    """The book's blocks, with the training chapters repeated and other books beside them."""
    blocks = kd.pack(kd.load_corpus(options.willows), tokenizer, block_size)
    texts = [kd.load_corpus(path).text for path in sorted(options.books.glob("*.txt"))]
    tokens = tokenize(texts, tokenizer)
    others = tokens[: len(tokens) // block_size * block_size].view(-1, block_size)
    mixed = torch.cat([blocks.train.repeat(BOOK_REPEATS, 1), others])
    return replace(blocks, train=mixed[::every])


def train(teacher, student, blocks, config):
    """The student as it was best on validation, which is measured along the way; its history."""
    measure = "validation_kl" if config.alpha == 0 else "validation_perplexity"
    best = {"value": math.inf}

    def look(row: dict) -> None:
        if row["step"] in LOOK_AT or row["step"] % LOOK_EVERY == 0:
            found = kd.evaluate(student, blocks.validation, teacher=teacher)
            row["validation_perplexity"] = found["perplexity"]
            row["validation_kl"] = found["kl_to_teacher"]
            print({k: row[k] for k in ("step", "validation_perplexity", "seconds")}, flush=True)
        if row.get(measure, math.inf) < best["value"]:
            weights = {name: w.clone() for name, w in student.state_dict().items()}
            best.update(value=row[measure], weights=weights)

    history = kd.distill(teacher, student, blocks, config, look, kd.ChunkedLoss)
    student.load_state_dict(best["weights"])
    return student, [r for r in history if r["step"] % 10 == 1 or "validation_perplexity" in r]


def write_curves(models: dict, tokenizer, options) -> None:
    """The loss by position on chapter XII of the teacher and of each student after each stage."""
    test = kd.pack(kd.load_corpus(options.willows), tokenizer).test
    rows = []
    for (name, stage), model in models.items():
        nats = kd.loss_by_position(model, test)
        for start in range(0, len(nats), BIN):
            mean = nats[start : start + BIN].mean().item()
            rows.append({"model": name, "stage": stage, "position": start, "nll": mean})
    path = options.assets / "results" / "positions.csv"
    pd.DataFrame(rows).to_csv(path, index=False, float_format="%.6g")


def publish(name: str, source: Path, target: Path, teacher, tokenizer, willows: Path) -> None:
    """Put a finished student into the package: fp16 weights, history, model card."""
    student = kd.load_student(source, tokenizer).eval()  # measured as it ships: rounded to fp16
    blocks = kd.pack(kd.load_corpus(willows), tokenizer)
    held_out = {"validation (chapter XI)": blocks.validation, "test (chapter XII)": blocks.test}
    found = {part: kd.evaluate(student, ids, teacher=teacher) for part, ids in held_out.items()}
    asked = {part: kd.evaluate(teacher, ids) for part, ids in held_out.items()}
    history = read_history(source)
    student.half().save_pretrained(target)
    shutil.copy(source / "history.csv", target)
    gains = copy_gains(student, blocks.test)
    card = model_card(name, student, history, found, asked, gains)
    (target / "README.md").write_text(card, encoding="utf-8")


def model_card(name, student, history, found: dict, asked: dict, gains: str) -> str:
    """The README of a bundled student."""
    labels = "hard labels, as a control," if "hard" in name else "the teacher's soft labels"
    kept = "A quarter of the feed-forward units" if "narrow" in name else "Half of the layers"
    sizes = [f"{size:.0f}" for size in dict.fromkeys(row["block_size"] for row in history)]
    rows = "\n".join(
        f"| {part} | {q['perplexity']:.2f} | {q['perplexity'] / asked[part]['perplexity']:.3f} "
        f"| {q['kl_to_teacher']:.3f} | {q['agreement']:.3f} |"
        for part, q in found.items()
    )
    return f"""---
license: mit
language: en
library_name: transformers
pipeline_tag: text-generation
tags: [knowledge-distillation, willows_kd]
---

# willows_kd {name}

{kept} of the bundled teacher, {student.config.n_layer} layers: \
{student.num_parameters():,} parameters, stored in fp16. Trained on {labels} with \
{history[-1]["tokens"] / 1e6:.1f} million tokens: chapters I-X of The Wind in the Willows and \
forty other public-domain books (recipes/books.csv), one block of the book for three of the \
others, in blocks of {" and then ".join(sizes)} tokens. Each stage was kept as it was best on \
chapter XI.

Made by `python recipes/make_bundled_students.py --books FOLDER --willows FILE`; every setting \
is in that script. `history.csv` holds every tenth step of the training run, and the validation \
chapter about every {LOOK_EVERY}th; its seconds were measured beside other work.

Measured over windows of {student.config.n_positions} tokens on chapters that neither it nor its \
teacher nor their tokenizer has seen:

| held-out text | perplexity | times the teacher's | KL (nats per token) | top-1 agreement |
|---|---|---|---|---|
{rows}

{gains}

Licence: MIT, like the project. The books are in the public domain in the United States.
"""


if __name__ == "__main__":
    main()
