"""How the bundled students were made from the bundled teacher, and their control.

    python recipes/make_bundled_students.py --books FOLDER --willows FILE

Run `recipes/make_bundled_models.py` first, or use the teacher that ships. FOLDER and FILE
are those of that recipe. Both students have half of the teacher's layers, start from the
same copied weights, and see the same blocks in the same order: chapters I-X of the book,
repeated, and other books, since soft labels can be learnt from any text
(`benchmarks/what_helps.py` compares kinds of text). One student learns from soft labels
only, the other, the control, from hard labels only. Learning rates, and the step of each
run whose weights are kept, were chosen on chapter XI; chapter XII is looked at once, for
the model cards.
"""

import argparse
import math
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

import willows_kd as kd
from willows_kd.corpus import tokenize

ASSETS = Path(__file__).parent.parent / "willows_kd" / "assets"
BLOCK_SIZE = 128
BOOK_REPEATS = 16  # passes over chapters I-X in each pass over the other books: 1 block of 4
SETTINGS = dict(temperature=1.0, epochs=2, batch_size=8, dtype="bfloat16", seed=0)
STUDENTS = {
    "student": dict(alpha=0.0, learning_rate=2e-3),
    "student_hard_labels": dict(alpha=1.0, learning_rate=4e-4),
}
LOOK_AT = {8 * 2**i for i in range(6)}  # steps early in training at which validation is measured
LOOK_EVERY = 500  # and later ones


def main() -> None:
    """Train the students that are asked for and put them where the package looks for them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--books", type=Path, required=True, help="folder of .txt books")
    parser.add_argument("--willows", type=Path, required=True, help="the book, as .txt")
    parser.add_argument("--assets", type=Path, default=ASSETS, help="where the students go")
    parser.add_argument("--only", choices=STUDENTS, help="make one of the two")
    parser.add_argument("--book_repeats", type=int, default=BOOK_REPEATS)
    options = parser.parse_args()

    teacher, tokenizer = kd.load_teacher()
    blocks = kd.pack(kd.load_corpus(options.willows), tokenizer, BLOCK_SIZE)
    others = blocks_of_books(options.books, tokenizer)
    mixed = torch.cat([blocks.train.repeat(options.book_repeats, 1), others])
    blocks = replace(blocks, train=mixed)
    for name in [options.only] if options.only else STUDENTS:
        config = kd.DistillConfig(**SETTINGS | STUDENTS[name])
        student, history = train(teacher, blocks, config)
        publish(student, history, config, options.assets / name, teacher, blocks, tokenizer)


def blocks_of_books(folder: Path, tokenizer) -> torch.Tensor:
    """All books of a folder in one row of tokens, cut into blocks, shape (blocks, block_size)."""
    texts = [kd.load_corpus(path).text for path in sorted(folder.glob("*.txt"))]
    tokens = tokenize(texts, tokenizer)
    return tokens[: len(tokens) // BLOCK_SIZE * BLOCK_SIZE].view(-1, BLOCK_SIZE)


def train(teacher, blocks, config):
    """The student as it was best on validation, which is measured along the way; its history."""
    student, best = kd.student_from_teacher(teacher), {"perplexity": math.inf}

    def look(row: dict) -> None:
        if row["step"] in LOOK_AT or row["step"] % LOOK_EVERY == 0:
            found = kd.quality(student, blocks.validation, teacher=teacher)
            row["validation_perplexity"] = found["perplexity"]
            row["validation_kl"] = found["kl_to_teacher"]
        if row.get("validation_perplexity", math.inf) < best["perplexity"]:
            weights = {name: w.clone() for name, w in student.state_dict().items()}
            best.update(perplexity=row["validation_perplexity"], weights=weights)

    history = kd.distill(teacher, student, blocks, config, on_step=look)
    student.load_state_dict(best["weights"])
    return student, history


def publish(student, history, config, folder: Path, teacher, blocks, tokenizer) -> None:
    """Write a student in fp16 as a Hugging Face directory, with its history and model card."""
    student = student.half().float()  # measured as it ships: with its weights rounded to fp16
    held_out = {"validation (chapter XI)": blocks.validation, "test (chapter XII)": blocks.test}
    found = {name: kd.quality(student, part, teacher=teacher) for name, part in held_out.items()}
    asked = {name: kd.quality(teacher, part) for name, part in held_out.items()}
    student.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    kept = [row for row in history if row["step"] % 10 == 1 or "validation_perplexity" in row]
    pd.DataFrame(kept).to_csv(folder / "history.csv", index=False, float_format="%.6g")
    best = min(kept, key=lambda row: row.get("validation_perplexity", math.inf))
    card = model_card(folder.name, student, history[-1], best, config, found, asked)
    (folder / "README.md").write_text(card, encoding="utf-8")


def model_card(name: str, student, last, best, config, found: dict, asked: dict) -> str:
    """The README of a bundled student."""
    labels = "the teacher's soft labels" if config.alpha == 0 else "hard labels, as a control,"
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

Half the layers of the bundled teacher ({student.config.n_layer} of them): \
{student.num_parameters():,} parameters, stored in fp16. Trained on {labels} with \
{last["tokens"] / 1e6:.1f} million tokens: chapters I-X of The Wind in the Willows and forty other \
public-domain books (recipes/books.csv), one block of the book for three of the others. Its \
weights are those after {best["tokens"] / 1e6:.1f} million tokens, the best on chapter XI.

Made by `python recipes/make_bundled_students.py --books FOLDER --willows FILE`; every setting \
is in that script. `history.csv` holds every tenth step of the training run, and the validation \
chapter about every five hundredth; its seconds were measured beside other work.

Measured on chapters that neither it nor its teacher nor their tokenizer has seen:

| held-out text | perplexity | times the teacher's | KL (nats per token) | top-1 agreement |
|---|---|---|---|---|
{rows}

Licence: MIT, like the project. The books are in the public domain in the United States.
"""


if __name__ == "__main__":
    main()
