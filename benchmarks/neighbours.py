"""What a row of a table is worth to the next one in its block, which sees it.

    python benchmarks/neighbours.py

`kd.pack` puts rows one after the other, an end-of-text token between them. Here the rows are the
paragraphs of a chapter that nobody trained on, in random order: each is read by the bundled teacher
once by itself and once behind another row. If the difference is near 0, packing rows does no harm.
"""

import argparse

import torch

import willows_kd as kd

LONGEST = 100  # tokens of a row, so that two of them fit the teacher's positions
SHORTEST = 20


def main() -> None:
    """Print a line for each chapter, with a 95 % interval over rows."""
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    teacher, tokenizer = kd.load_teacher()
    splits = kd.split(kd.load_corpus())
    for name, texts in (("validation", splits.validation), ("test", splits.test)):
        paragraphs = "\n\n".join(texts).split("\n\n")
        ids = [tokenizer(text, verbose=False)["input_ids"] for text in paragraphs]
        rows = [torch.tensor(row[:LONGEST]) for row in ids if len(row) >= SHORTEST]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
        end = torch.tensor([tokenizer.eos_token_id])
        pairs = [(rows[i], rows[j]) for i, j in zip(order, order[1:], strict=False)]
        alone = [nats(teacher, end, row) for _, row in pairs]
        behind = [nats(teacher, torch.cat([other, end]), row) for other, row in pairs]
        gap, low, high = kd.paired_bootstrap(behind, alone)
        print(f"{name}: {len(pairs)} rows, {sum(alone) / len(alone):.3f} nats a token alone;")
        print(f"  behind another row {gap:+.3f} ({low:+.3f} to {high:+.3f})")


@torch.inference_mode()
def nats(model, before: torch.Tensor, row: torch.Tensor) -> float:
    """The cross-entropy of a row's tokens after others, in nats per token."""
    ids = torch.cat([before, row])[None]
    log_q = model(ids).logits[0, len(before) - 1 : -1].log_softmax(dim=-1)
    return -log_q.gather(-1, row[:, None]).mean().item()


if __name__ == "__main__":
    main()
