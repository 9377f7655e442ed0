"""What will it reach? Students of many sizes and budgets, of several teachers, and in steps.

    python benchmarks/law.py --books FOLDER [--seeds 0 1 2]

Students of 1 to 5 of the bundled teacher's 6 layers learn from its soft labels for four budgets
of tokens, each twice the last, so that a law fitted on three of them can be asked for the fourth.
Two further questions, on the same text: is it better to leave layers out in two rounds, and which
teacher is the best one for a student of three layers: the base, or one that was fine-tuned on the
book for one, three or eight epochs? Text is half the book's training chapters and half other
books, FOLDER's (recipes/books.csv lists those that were used). All are judged on the validation
chapter. The rows are stored where notebook S4 finds them; one that is stored is not run again.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch

import willows_kd as kd
from willows_kd.corpus import tokenize

STORED = Path(__file__).parent.parent / "willows_kd" / "assets" / "results" / "law.csv"
BUDGETS = (48, 96, 192, 384)  # blocks
SIZES = (1, 2, 3, 4, 5)  # layers
EPOCHS = (0, 1, 3, 8)  # of the teachers; 0 is the base
SMALL = 3  # layers of the student in the further questions


def main() -> None:
    """Train and judge every student that is not stored yet."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--books", type=Path, required=True, help="folder of .txt books")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()

    teacher, tokenizer = kd.load_teacher()
    blocks = kd.pack(kd.load_corpus(), tokenizer)
    runs = Runs(blocks, mixed_text(options.books, tokenizer, blocks))
    teachers = fine_tuned(blocks)
    runs.of_itself(teacher)
    for seed in options.seeds:
        runs.in_rounds(teacher, seed)
        for epochs, other in teachers.items():
            runs.of_teacher(epochs, other, seed, teachers[0])
        for size in SIZES:
            for budget in BUDGETS:
                runs.of_size(teacher, size, budget, seed)


def mixed_text(folder: Path, tokenizer, blocks) -> torch.Tensor:
    """Blocks of the book and as many of other books, in random order."""
    size, generator = blocks.block_size, torch.Generator().manual_seed(0)
    pages = [kd.load_corpus(path).text for path in sorted(folder.glob("*.txt"))]
    tokens = tokenize(pages, tokenizer)
    others = tokens[: len(tokens) // size * size].view(-1, size)
    others = others[torch.randperm(len(others), generator=generator)[: len(blocks.train)]]
    both = torch.cat([blocks.train, others])
    return both[torch.randperm(len(both), generator=generator)]


def fine_tuned(blocks) -> dict[int, torch.nn.Module]:
    """The base after so many epochs of the book."""
    teachers = {}
    for epochs in EPOCHS:
        model = kd.load_bundled("base")
        if epochs:  # alpha=1: hard labels, so that nobody is asked
            config = kd.DistillConfig(alpha=1.0, epochs=epochs, learning_rate=5e-4)
            kd.distill(kd.load_bundled("base"), model, blocks, config)
        teachers[epochs] = model.eval()
    return teachers


class Runs:
    """Trains students, and stores a row for each."""

    def __init__(self, blocks, text: torch.Tensor):
        """Take the blocks to judge on, and those to learn from."""
        self.blocks, self.text = blocks, text
        self.rows = pd.read_csv(STORED).to_dict("records") if STORED.exists() else []

    def of_itself(self, teacher) -> None:
        """The teacher, which no student is meant to pass."""
        named = {"study": "teacher", "layers": teacher.config.num_hidden_layers, "tokens": 0}
        if self.is_new(named):
            self.add(named, teacher, teacher)

    def of_size(self, teacher, size: int, budget: int, seed: int) -> None:
        """A student of so many layers, for so many blocks."""
        named = {"study": "sizes", "layers": size, "tokens": self.text[:budget].numel()}
        if self.is_new(named | {"seed": seed}):
            student = kd.student_from_teacher(teacher, size)
            self.train(teacher, student, self.text[:budget], seed)
            self.add(named | {"seed": seed}, teacher, student)

    def in_rounds(self, teacher, seed: int) -> None:
        """First a layer more, for half of the largest budget; then without it, for the rest."""
        named = {"study": "in rounds", "layers": SMALL, "tokens": self.text[: BUDGETS[-1]].numel()}
        if self.is_new(named | {"seed": seed}):
            first, second = self.text[: BUDGETS[-1]].chunk(2)
            larger = kd.student_from_teacher(teacher, SMALL + 1)
            self.train(teacher, larger, first, seed)
            student = kd.student_from_teacher(larger, SMALL, [0, 1, 3])  # those of one round
            self.train(teacher, student, second, seed)
            self.add(named | {"seed": seed}, teacher, student)

    def of_teacher(self, epochs: int, teacher, seed: int, base) -> None:
        """A student cut from the base, taught by one of the teachers for the third budget."""
        named = {"study": "teachers", "layers": SMALL, "tokens": self.text[: BUDGETS[2]].numel()}
        named |= {"epochs": epochs, "seed": seed}
        if self.is_new(named):
            student = kd.student_from_teacher(base, SMALL)
            self.train(teacher, student, self.text[: BUDGETS[2]], seed)
            of_teacher = kd.evaluate(teacher, self.blocks.validation)["perplexity"]
            self.add(named | {"teacher_perplexity": of_teacher}, teacher, student)

    def train(self, teacher, student, text: torch.Tensor, seed: int) -> None:
        """Distil once over a text."""
        part = replace(self.blocks, train=text, validation=self.blocks.validation[:2])
        config = kd.DistillConfig(epochs=1, seed=seed)
        kd.distill(teacher, student, part, config, loss=kd.ChunkedLoss)

    def is_new(self, named: dict) -> bool:
        """Whether no stored row is of this run."""
        return not any(all(row.get(k) == v for k, v in named.items()) for row in self.rows)

    def add(self, named: dict, teacher, student) -> None:
        """Judge a student, and write the file."""
        found = kd.evaluate(student, self.blocks.validation, teacher=teacher)
        row = named | {name: found[name] for name in ("perplexity", "kl_to_teacher")}
        self.rows.append(row)
        print(row, flush=True)
        pd.DataFrame(self.rows).to_csv(STORED, index=False, float_format="%.6g")


if __name__ == "__main__":
    main()
