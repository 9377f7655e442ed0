"""How the base learnt to copy: the second part of its pre-training.

Forty books hold next to nothing that is said twice word for word, so a small model that read
them does not learn to copy: an earlier copy of a text helps it by 0.1 nats a token. Here it
first reads short runs that are repeated to the end of a block, beside ordinary blocks, until
the second copy of random tokens is easy; then the books once more, where some blocks hold a
span a second time. A random run's first copy carries no loss: there is nothing to learn in it.

`make_bundled_models.py` calls `teach_copying` and `with_spans`.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import GPT2LMHeadModel

import willows_kd as kd

CONTEXT = 256
RUN_BLOCK = 80  # tokens of a block that repeats a run
IGNORED = -100  # the label of a token without loss
EASY = 3.0  # nats per token on the second copy of random tokens
FORM_STEPS, MIX_STEPS = 1500, 1800  # the first at most
LEARNING_RATE = 1e-3
SHARE = 0.3  # of the blocks in the second part that hold a span twice
LOOK_EVERY = 50
FINE_TUNING_SHARE = 0.5  # more costs perplexity, fewer let the copying of text fade
PROBE_SPAN = 60  # tokens


def teach_copying(base: Path, books: torch.Tensor, folder: Path) -> None:
    """Train a base, shape of `books`: (tokens,), until it copies, and then on the books."""
    if (folder / "model.safetensors").exists():
        return
    torch.manual_seed(1)
    model = GPT2LMHeadModel.from_pretrained(base, dtype=torch.float32)
    without_dropout(model)
    rows = books[: len(books) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    rows = rows[torch.randperm(len(rows))]
    train(model, runs_and_text(books, rows), FORM_STEPS, decay=False, until=copies)
    train(model, text_with_spans(rows[4 * FORM_STEPS :]), MIX_STEPS, decay=True)
    model.save_pretrained(folder)


def train(model, batches: Iterator, steps: int, decay: bool, until=None) -> None:
    """AdamW over batches of (ids, labels, position_ids), each step the mean of its parts."""
    settings = dict(betas=(0.9, 0.95), weight_decay=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, **settings)
    model.train()
    for step in range(steps):
        warm = min(1, (step + 1) / 50)
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps)) if decay else 1
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * warm * cosine
        parts = next(batches)
        for ids, labels, positions in parts:
            loss = model(ids, labels=labels, position_ids=positions).loss
            (loss / len(parts)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if until and (step + 1) % LOOK_EVERY == 0 and until(model):
            return


def copies(model) -> bool:
    """Whether the second copy of random tokens is easy."""
    first = random_tokens(model)[:, :PROBE_SPAN]
    found = kd.token_scores(model, None, torch.cat([first, first], dim=1))["nll"]
    return found[:, PROBE_SPAN:].mean() < EASY


def random_tokens(model) -> torch.Tensor:
    """Rows of two spans for `kd.copy_gain`, shape (48, 2 * PROBE_SPAN)."""
    generator = torch.Generator().manual_seed(7)
    shape = (48, 2 * PROBE_SPAN)
    return torch.randint(1, model.config.vocab_size, shape, generator=generator)


def copy_gains(model, text: torch.Tensor) -> str:
    """A line of a model card: what an earlier copy is worth, on text and on random tokens."""
    stream = text.flatten()
    rows = stream[: len(stream) // (2 * PROBE_SPAN) * 2 * PROBE_SPAN].view(-1, 2 * PROBE_SPAN)
    gains = [kd.copy_gain(model, ids) for ids in (rows, random_tokens(model))]
    return (
        f"An earlier copy of the same {PROBE_SPAN} tokens is worth {gains[0]:.2f} nats a token on "
        f"chapter XII and {gains[1]:.2f} on random tokens (`kd.copy_gain`)."
    )


def runs_and_text(stream: torch.Tensor, rows: torch.Tensor) -> Iterator:
    """Batches of fourteen blocks of runs and four of text."""
    for i in range(FORM_STEPS):
        runs = [run_block(stream) for _ in range(14)]
        runs = tuple(torch.stack(part) for part in zip(*runs, strict=True))
        text = rows[4 * i : 4 * i + 4]
        yield [runs, (text, text, None)]


def text_with_spans(rows: torch.Tensor) -> Iterator:
    """Batches of eight blocks of text, some of which hold a span twice."""
    for i in range(MIX_STEPS):
        ids, labels = with_spans(rows[torch.arange(8 * i, 8 * i + 8) % len(rows)], SHARE)
        yield [(ids, labels, None)]


def run_block(stream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A run of 6 to 32 tokens repeated to the end of a block: ids, labels, positions.

    Half of the runs are text, a quarter random tokens, a quarter shuffled text. Seven blocks
    of ten stand somewhere in the context, the others at its beginning.
    """
    size, kind, start = draw(6, 33), draw(0, 4), draw(0, len(stream) - RUN_BLOCK)
    run = stream[start : start + size]
    if kind == 0:
        run = torch.randint(1, 4096, (size,))
    if kind == 1:
        run = stream[torch.randint(0, len(stream), (size,))]
    ids = run.repeat(-(-RUN_BLOCK // size))[:RUN_BLOCK]
    labels = ids.clone()
    if kind < 2:
        labels[:size] = IGNORED
    offset = draw(0, CONTEXT - RUN_BLOCK + 1) if draw(0, 10) >= 3 else 0
    return ids, labels, torch.arange(RUN_BLOCK) + offset


def with_spans(rows: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks, a share of which hold a span of 10 to 60 tokens twice; ids and labels.

    Three spans of ten are random tokens.
    """
    ids, width = rows.clone(), rows.shape[1]
    labels = rows.clone()
    for i in torch.nonzero(torch.rand(len(rows)) < share).flatten().tolist():
        size, kind = draw(10, PROBE_SPAN + 1), draw(0, 10)
        start = draw(0, width - 2 * size + 1)
        again = draw(start + size, width - size + 1)
        if kind < 3:
            ids[i, start : start + size] = torch.randint(1, 4096, (size,))
        ids[i, again : again + size] = ids[i, start : start + size].clone()
        labels[i] = ids[i]
        if kind < 3:
            labels[i, start : start + size] = IGNORED
    return ids, labels


def without_dropout(model) -> None:
    """Each block is read once: there is nothing to guard against, and it costs time."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def draw(low: int, high: int) -> int:
    """A whole number from `low` to `high` - 1."""
    return torch.randint(low, high, ()).item()
