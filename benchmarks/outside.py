"""The ratio of the README by another route: plain `transformers`, nothing of willows_kd.

    python benchmarks/outside.py --text FILE [--after XII.] TEACHER_DIR STUDENT_DIR ...

Each directory is loaded as a user would load it. The text after the last line that begins with
`--after` (a chapter's number) is read as it stands, line breaks folded, in windows as long as
the model's positions that overlap by half. Printed are the perplexity of the second halves, how
many times that of the first model it is, and the perplexity by position in the window: a model
that is good only as far as it was trained shows here.
"""

import argparse
import re
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PARTS = 8  # of a window


def main() -> None:
    """Print a line for each model."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="+", metavar="MODEL_DIR", help="the teacher first")
    parser.add_argument("--text", type=Path, required=True, help="a text file")
    parser.add_argument("--after", help="read what follows the last line that begins so")
    options = parser.parse_args()
    text = options.text.read_text(encoding="utf-8")
    if options.after:
        text = re.split(rf"(?m)^\s*{re.escape(options.after)}.*$", text)[-1]
    text = re.sub(r"(?<!\n)\n(?!\n)", " ", text)
    tokenizer = AutoTokenizer.from_pretrained(options.models[0])
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    print(f"{len(ids)} tokens; by position: each column is an eighth of the window")
    first = None
    for folder in options.models:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        by_position = losses(model, ids)
        scored = by_position[:, by_position.shape[1] // 2 :].mean().exp()
        first = first or scored
        parts = [part.mean().exp().item() for part in by_position.chunk(PARTS, dim=1)]
        shown = " ".join(f"{part:6.1f}" for part in parts)
        print(f"{folder}: perplexity {scored:.2f}, {scored / first:.3f} times; {shown}")


@torch.inference_mode()
def losses(model, ids: torch.Tensor) -> torch.Tensor:
    """Nats of each prediction, shape (windows, positions - 1)."""
    length = model.config.max_position_embeddings
    windows = ids.unfold(0, length, length // 2)
    found = []
    for window in windows.split(16):
        log_q = model(window).logits[:, :-1].log_softmax(dim=-1)
        found.append(-log_q.gather(-1, window[:, 1:, None])[..., 0])
    return torch.cat(found)


if __name__ == "__main__":
    main()
