"""Which layers should a student copy, and does the best start end best?

    python benchmarks/inits.py
    python benchmarks/inits.py --teacher DIR --books FOLDER [--steps 600]

The first compares all choices of half of the bundled teacher's layers. The second compares
the ways to choose two thirds and half of the layers of a deeper teacher, shaped like Llama,
which it trains on the books in FOLDER and the book's training chapters, and keeps in DIR.
Each student is judged on the validation chapter before training and after a short one, all
on the same blocks in the same order. The rows are stored where the notebooks find them, the
tables in `benchmarks/results/inits.md`. A row that is stored already is not run again.
"""

import argparse
import itertools
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import willows_kd as kd
from willows_kd.config import INITS
from willows_kd.corpus import tokenize

RESULTS = Path(__file__).parent / "results" / "inits.md"
STORED = Path(__file__).parent.parent / "willows_kd" / "assets" / "results" / "inits.csv"
SHORT = kd.DistillConfig(epochs=1, learning_rate=1e-3)


def main() -> None:
    """Compare the layers of one teacher."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--teacher", type=Path, help="where the deep teacher is, or will be")
    parser.add_argument("--books", type=Path, help="folder of .txt books to train it on")
    parser.add_argument("--steps", type=int, default=600, help="of 16 blocks, to train it")
    options = parser.parse_args()

    teacher, tokenizer = kd.load_teacher()
    blocks = kd.pack(kd.load_corpus(), tokenizer)
    if options.teacher is None:
        every_choice(teacher, blocks)
        return
    if not options.teacher.exists():
        teacher = deep_teacher(tokenizer, blocks, options)
        kd.save_model(teacher, tokenizer, options.teacher)
    teacher, _ = kd.load_teacher(options.teacher)
    depth = teacher.config.num_hidden_layers
    for layers in (depth * 2 // 3, depth // 2):
        every_way(teacher, blocks, layers)


def every_choice(teacher, blocks) -> None:
    """Each choice of half of the layers; `init` says which ways to choose come to it."""
    depth = teacher.config.num_hidden_layers
    ways = {}
    for init, kept in kd.choose_layers(teacher, depth // 2, few(blocks))["layers"].items():
        ways.setdefault(tuple(kept), []).append(init)
    for kept in itertools.combinations(range(depth), depth // 2):
        init = ", ".join(ways.get(kept, []))
        judge(teacher, blocks, list(kept), {"teacher": "bundled", "init": init})


def every_way(teacher, blocks, layers: int) -> None:
    """Each way to choose so many layers, and the seconds that it takes."""
    for init in INITS:
        start = time.perf_counter()
        kept = kd.choose_layers(teacher, layers, few(blocks), [init]).loc[init, "layers"]
        seconds = time.perf_counter() - start
        judge(teacher, blocks, kept, {"teacher": "Llama-shaped", "init": init, "seconds": seconds})


def few(blocks) -> torch.Tensor:
    """Eight training blocks from all over the text, on which layers are chosen."""
    return blocks.train[:: len(blocks.train) // 8][:8]


def judge(teacher, blocks, kept: list[int], row: dict) -> None:
    """Look at a student of these layers before and after a short training, and store the row."""
    row["layers"] = " ".join(map(str, kept))
    stored = read()
    if any(all(old[name] == row[name] for name in ("teacher", "layers", "init")) for old in stored):
        return
    student = kd.student_from_teacher(teacher, init=kept)
    part = replace(blocks, train=blocks.train[::8], validation=blocks.validation[:12])
    row |= {"depth": teacher.config.num_hidden_layers}
    row |= {"start": kd.evaluate(student, part.validation)["perplexity"]}
    last = kd.distill(teacher, student, part, SHORT, loss=kd.ChunkedLoss)[-1]
    row |= {"end": last["validation_perplexity"], "tokens": last["tokens"]}
    rows = pd.DataFrame([*stored, row])
    rows.to_csv(STORED, index=False, float_format="%.6g")
    RESULTS.write_text("# Which layers?\n\n" + "\n".join(tables(rows)), encoding="utf-8")


def read() -> list[dict]:
    """The rows that are stored; a student that nobody's way comes to has an empty `init`."""
    return pd.read_csv(STORED).fillna({"init": ""}).to_dict("records") if STORED.exists() else []


def deep_teacher(tokenizer, blocks, options):
    """A narrow Llama of 12 layers, trained on other books, then on this one."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=352,
            num_hidden_layers=12,
            num_attention_heads=4,
            max_position_embeddings=blocks.block_size,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    pages = [kd.load_corpus(path).text for path in sorted(options.books.glob("*.txt"))]
    tokens = tokenize(pages, tokenizer)
    size = blocks.block_size
    text = tokens[: len(tokens) // size * size].view(-1, size)
    text = text[torch.randperm(len(text))]
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    for step in range(options.steps):
        done = step / options.steps
        source = text if done < 0.7 else blocks.train  # the book comes last
        ids = source[torch.arange(step * 16, step * 16 + 16) % len(source)]
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 50, 2 * (1 - done))
        loss = model(ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: {loss.item():.3f} nats", flush=True)
    return model.eval()


def tables(rows: pd.DataFrame):
    """A table for each teacher and number of layers, the best start first."""
    kinds = [rows["teacher"], rows["layers"].str.split().str.len()]
    for (name, size), group in rows.groupby(kinds, sort=False):
        order = group["start"].rank().corr(group["end"].rank())
        best = group.loc[group["end"].idxmin()]
        yield f"## {size} of the {group['depth'].iloc[0]} layers of the {name} teacher\n"
        yield "| layers | chosen by | perplexity at the start | at the end | seconds to choose |"
        yield "|---|---|---|---|---|"
        for row in group.sort_values("start").itertuples():
            seconds = "" if pd.isna(getattr(row, "seconds", None)) else f"{row.seconds:.1f}"
            numbers = f"{row.start:,.1f} | {row.end:,.1f} | {seconds}"
            yield f"| {row.layers.replace(' ', ', ')} | {row.init or '-'} | {numbers} |"
        yield (
            f"\nBest at the end: {best.layers.replace(' ', ', ')}. Spearman's rank correlation of "
            f"start and end: {order:.2f}. {group['tokens'].iloc[0]:,} tokens of training.\n"
        )


if __name__ == "__main__":
    main()
