"""The table and picture of the README: the bundled students beside their teacher.

    python benchmarks/students.py [--output_dir benchmarks/results]

`recipes/make_bundled_students.py` trained the students and chose their settings on the
validation chapter; here they meet the test chapter.
"""

import argparse
from pathlib import Path

import torch

import willows_kd as kd

SPAN = 60  # tokens that are copied
PICTURED = {
    "perplexity": "perplexity on held-out text",
    "disk_mb": "size on disk",
    "forward_ms": "reading a block",
    "token_ms": "generating a token",
}


def main() -> None:
    """Compare, and write the table as Markdown and CSV, and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()

    teacher, tokenizer = kd.load_teacher()
    corpus = kd.load_corpus()
    blocks = kd.pack(corpus, tokenizer)
    models = {
        "teacher": teacher,
        "untrained student": kd.student_from_teacher(teacher).eval(),
        "hard labels only": kd.load_bundled("student_hard_labels"),
        "soft labels only": kd.load_bundled("student"),
        "soft labels, narrow": kd.load_bundled("student_narrow"),
    }
    table = kd.compare(models, blocks, tokenizer)
    told = finding(table, models, blocks)
    copies = copying(models, blocks)
    text = f"{kd.as_markdown(table)}\n\n{told} Test text of {corpus.title}.\n\n{copies}\n"
    print(f"\n{text}")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    (options.output_dir / "students.md").write_text(text, encoding="utf-8")
    table.to_csv(options.output_dir / "students.csv")
    students = table.drop(index="untrained student") / table.loc["teacher"]
    figure = kd.plot_bars(
        students.drop(index="teacher")[list(PICTURED)].rename(columns=PICTURED).T,
        title=told.split(";")[0] + ".",
        xlabel="times the teacher's",
        form=".2f",
    )
    figure.savefig(options.output_dir / "students.png")


def copying(models: dict, blocks: kd.Blocks) -> str:
    """What an earlier copy is worth to each model, and how much of one it writes itself."""
    generator = torch.Generator().manual_seed(0)
    teacher, length = models["teacher"], 2 * SPAN
    random = torch.randint(1, teacher.config.vocab_size, (48, length), generator=generator)
    stream = blocks.test.flatten()
    text = stream[: len(stream) // length * length].view(-1, length)
    gains = [
        f"{name} {kd.copy_gain(model, text):.2f} and {kd.copy_gain(model, random):.2f}"
        for name, model in models.items()
    ]
    again = torch.cat([random[:, :SPAN], random[:, : SPAN // 2]], dim=1)
    shares = []
    for name, model in models.items():
        written = kd.sample_continuations(model, again, SPAN // 2, temperature=0).cpu()
        shares.append(f"{name} {(written == random[:, SPAN // 2 : SPAN]).float().mean():.0%}")
    return (
        "An earlier copy is worth, in nats a token on text and on random tokens: "
        f"{'; '.join(gains)}. Reading random tokens and then the first half of them again, and "
        f"going on with the likeliest token, each copies: {', '.join(shares)}."
    )


def finding(table, models: dict, blocks: kd.Blocks) -> str:
    """How near the soft-label student comes, and whether the test text is long enough to say."""
    perplexity = table["perplexity"]
    ratio = perplexity["soft labels only"] / perplexity["teacher"]
    hard = perplexity["hard labels only"]
    closed = (hard - perplexity["soft labels only"]) / (hard - perplexity["teacher"])
    nats = {name: kd.block_nll(model, blocks.test) for name, model in models.items()}
    gap, low, high = kd.paired_bootstrap(nats["hard labels only"], nats["soft labels only"])
    return (
        f"The soft-label student's perplexity is {ratio:.3f} times the teacher's; it closes "
        f"{closed:.0%} of the gap between the hard-label control and the teacher. The control "
        f"is {gap:.3f} nats per token behind it (95 % interval {low:.3f} to {high:.3f}, paired "
        f"bootstrap over {len(blocks.test)} test blocks)."
    )


if __name__ == "__main__":
    main()
