"""Where do soft labels win? The bundled models on the test chapter and on other text.

    python benchmarks/other_text.py --books FOLDER

Notebook 04 measures the texts that ship; this adds the other books that base and students
were trained on. FOLDER holds them as text files (recipes/books.csv lists those that were
used). The differences are stored where the notebook finds them.
"""

import argparse
from importlib import metadata
from pathlib import Path

import pandas as pd
import torch

import willows_kd as kd
from willows_kd.corpus import tokenize

STORED = Path(__file__).parent.parent / "willows_kd" / "assets" / "results" / "other_text.csv"
MODELS = ("teacher", "base", "student", "student_hard_labels")
PAIRS = {
    "student - control": ("student", "student_hard_labels"),
    "teacher - base": ("teacher", "base"),
    "student - teacher": ("student", "teacher"),
}
MOST_BLOCKS = 40  # of a text


def main() -> None:
    """Measure every text, and store a row for each text and pair of models."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--books", type=Path, required=True, help="folder of .txt books")
    options = parser.parse_args()

    _, tokenizer = kd.load_teacher()
    models = {name: kd.load_bundled(name) for name in MODELS}
    texts = {"test chapter": kd.pack(kd.load_corpus(), tokenizer).test}
    others = others_that_ship() | {
        path.stem: kd.load_corpus(path).text for path in sorted(options.books.glob("*.txt"))
    }
    texts |= {name: in_blocks(text, tokenizer) for name, text in others.items()}
    rows = []
    for text, blocks in texts.items():
        nll = {name: kd.block_nll(model, blocks) for name, model in models.items()}
        for pair, (a, b) in PAIRS.items():
            mean, low, high = kd.paired_bootstrap(nll[a], nll[b])
            found = {"mean": mean, "min": low, "max": high, "blocks": len(blocks)}
            rows.append({"text": text, "pair": pair, **found})
            print(rows[-1], flush=True)
    pd.DataFrame(rows).to_csv(STORED, index=False, float_format="%.4g")


def others_that_ship() -> dict[str, str]:
    """Text that no model was trained on: a story and code of the package, a licence."""
    apache = next(file for file in metadata.files("transformers") if file.name == "LICENSE")
    return {
        "sample story": kd.load_corpus("sample").text,
        "a licence": apache.read_text(),
        "a Python file": Path(kd.__file__).with_name("losses.py").read_text(encoding="utf-8"),
    }


def in_blocks(text: str, tokenizer, length: int = 256) -> torch.Tensor:
    """The first blocks of a text, shape (at most 40, length)."""
    tokens = tokenize([text], tokenizer)
    return tokens[: len(tokens) // length * length].view(-1, length)[:MOST_BLOCKS]


if __name__ == "__main__":
    main()
