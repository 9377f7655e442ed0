"""What brings a student nearer to its teacher: which text, which temperature, which alpha?

    python benchmarks/what_helps.py --books FOLDER [--seeds 0 1 2]

Students of half the layers, from one start, at equal tokens, judged on the validation
chapter, with several seeds. First the text: half of the blocks are the book's training
chapters, and the other half is what a row names; soft labels need no written truth, so
any text will do. Then temperature and alpha, with other books. FOLDER holds other books
as text files (recipes/books.csv lists those that were used). The runs are stored where
the notebooks find them, the tables in `benchmarks/results/`.
"""

import argparse
import random
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from intervals import with_intervals

import willows_kd as kd
from willows_kd.corpus import tokenize

RESULTS = Path(__file__).parent / "results"
STORED = Path(__file__).parent.parent / "willows_kd" / "assets" / "results"
SOFT = dict(temperature=1.0, alpha=0.0, learning_rate=2e-3)
HARD = dict(temperature=1.0, alpha=1.0, learning_rate=4e-4)
TITLES = {"transfer_sets": "Which text?", "temperatures": "Which temperature, which alpha?"}
MEASURES = ("ratio", "kl_to_teacher", "agreement")


def main() -> None:
    """Train every student with every seed, and write both tables after each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--books", type=Path, required=True, help="folder of .txt books")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()

    teacher, tokenizer = kd.load_teacher()
    blocks = kd.pack(kd.load_corpus(), tokenizer)
    texts = training_texts(options, teacher, tokenizer, blocks)
    target = kd.evaluate(teacher, blocks.validation)["perplexity"]
    measured = []
    for seed in options.seeds:
        for text, settings in students():
            config = kd.DistillConfig(**settings, epochs=1, seed=seed)
            student = kd.student_from_teacher(teacher)
            chosen = replace(blocks, train=texts[text])
            kd.distill(teacher, student, chosen, config, loss=kd.ChunkedLoss)
            found = kd.evaluate(student, blocks.validation, teacher=teacher)
            found["ratio"] = found["perplexity"] / target
            tokens = texts[text].numel()
            measured.append({"text": text, **settings, "seed": seed, "tokens": tokens, **found})
            print(measured[-1], flush=True)
            write(pd.DataFrame(measured))


def students() -> list[tuple[str, dict]]:
    """The text and the settings of each student."""
    texts = (
        "the book again",
        "other books",
        "other books, nothing of this one",
        "the teacher's own writing",
        "other books, words shuffled",
        "random tokens",
    )
    kinds = [(text, SOFT) for text in texts] + [(text, HARD) for text in texts[:2]]
    grid = [(0.5, 0.0), (2.0, 0.0), (4.0, 0.0), (1.0, 0.5), (2.0, 0.5)]
    return kinds + [("other books", SOFT | dict(temperature=T, alpha=a)) for T, a in grid]


def training_texts(options, teacher, tokenizer, blocks) -> dict[str, torch.Tensor]:
    """The blocks of each text, all of the same number, shape (blocks, block_size)."""
    book, half = blocks.train, len(blocks.train)
    pages = [kd.load_corpus(path).text for path in sorted(options.books.glob("*.txt"))]
    books = shuffled(cut(tokenize(pages, tokenizer), blocks.block_size))
    jumbled = shuffled_words(books[: 2 * half], tokenizer)[:half]
    noise = torch.randint(len(tokenizer), book.shape, generator=torch.Generator().manual_seed(0))
    return {
        "the book again": torch.cat([book, book]),
        "other books": torch.cat([book, books[:half]]),
        "other books, nothing of this one": books[: 2 * half],
        "the teacher's own writing": torch.cat([book, own_writing(teacher, *book.shape)]),
        "other books, words shuffled": torch.cat([book, jumbled]),
        "random tokens": torch.cat([book, noise]),
    }


def cut(tokens: torch.Tensor, block_size: int) -> torch.Tensor:
    """A row of tokens as blocks, shape (blocks, block_size)."""
    return tokens[: len(tokens) // block_size * block_size].view(-1, block_size)


def shuffled(blocks: torch.Tensor) -> torch.Tensor:
    """The blocks in another order, the same each time."""
    return blocks[torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0))]


def shuffled_words(blocks: torch.Tensor, tokenizer) -> torch.Tensor:
    """The words of some blocks in another order, as blocks again."""
    words = tokenizer.decode(blocks.flatten().tolist()).split(" ")
    random.Random(0).shuffle(words)
    return cut(tokenize([" ".join(words)], tokenizer), blocks.shape[1])


def own_writing(teacher, count: int, length: int) -> torch.Tensor:
    """Blocks drawn from the teacher at temperature 1, each from the end-of-text token on."""
    first = torch.full((count, 1), teacher.config.eos_token_id)
    return torch.cat([first, kd.sample_continuations(teacher, first, length - 1)], dim=1)


def write(measured: pd.DataFrame) -> None:
    """Every run as CSV, and means with 95 % intervals as Markdown, a file a table."""
    default = (measured["temperature"] == 1) & measured["alpha"].isin([0, 1])
    tables = {"transfer_sets": default, "temperatures": measured["text"] == "other books"}
    for folder in (RESULTS, STORED):
        folder.mkdir(parents=True, exist_ok=True)
    for name, chosen in tables.items():
        measured[chosen].to_csv(STORED / f"{name}.csv", index=False, float_format="%.6g")
        text = f"# {TITLES[name]}\n\n{as_table(measured[chosen])}"
        (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")


def as_table(runs: pd.DataFrame) -> str:
    """Means over seeds and 95 % intervals, one line a student."""
    lines = [
        "| text | T | alpha | times the teacher's perplexity | KL (nats per token) | agreement |",
        "|---|---|---|---|---|---|",
    ]
    for (text, T, alpha), group in runs.groupby(["text", "temperature", "alpha"], sort=False):
        means = with_intervals(group[list(MEASURES)].to_dict("records"))
        cells = [
            f"{means[name]:.3f}" + (f" ± {means[f'± {name}']:.3f}" if len(group) > 1 else "")
            for name in MEASURES
        ]
        lines.append(f"| {text} | {T:g} | {alpha:g} | {' | '.join(cells)} |")
    tokens, seeds = runs["tokens"].max(), runs["seed"].nunique()
    lines.append(f"\n{tokens:,} tokens each, {seeds} seeds, validation chapter (XI).")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
