"""How the bundled models were made, from nothing: tokenizer, reader, base, teacher.

    python recipes/make_bundled_models.py --books FOLDER --willows FILE

FOLDER holds public-domain books as text files (the forty that were used are listed
in recipes/books.csv with their Project Gutenberg numbers), FILE is *The Wind in the
Willows*. The reader reads the books, the base also learns to copy (`teach_copying.py`), the
teacher is the base, fine-tuned on chapters I-X. Chapters XI and XII are seen by nothing here
but the choice of an epoch (XI) and the perplexities.

Everything unfinished lives in --work_dir. Run the same command again after an
interruption: finished parts are kept, and training goes on from its last checkpoint.
"""

import argparse
import csv
import shutil
from pathlib import Path

import torch
from teach_copying import FINE_TUNING_SHARE, copy_gains, teach_copying, with_spans
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from willows_kd.corpus import split, tokenize
from willows_kd.evaluation import evaluate
from willows_kd.sources.load import load_corpus

VOCABULARY = 4096
CONTEXT = 256
END_OF_TEXT = "<|endoftext|>"
ASSETS = Path(__file__).parent.parent / "willows_kd" / "assets"


def main() -> None:
    """Make what is not there yet, in order, and put it where the package looks for it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--books", type=Path, required=True, help="folder of .txt books")
    parser.add_argument("--willows", type=Path, required=True, help="the book, as .txt")
    parser.add_argument("--work_dir", type=Path, default=Path("recipe_work"))
    parser.add_argument("--assets", type=Path, default=ASSETS, help="where the models go")
    parser.add_argument("--passes", type=int, default=5, help="over the books, in pre-training")
    options = parser.parse_args()

    chapters = split(load_corpus(options.willows))
    books = [load_corpus(path).text for path in sorted(options.books.glob("*.txt"))]
    tokenizer = make_tokenizer(books + chapters.train, options.work_dir / "tokenizer")
    validation = blocks_of(chapters.validation, tokenizer, CONTEXT)

    reader = options.work_dir / "reader"
    train(
        new_gpt2(tokenizer),
        blocks_of(books, tokenizer, CONTEXT),
        validation,
        reader,
        per_device_train_batch_size=8,
        num_train_epochs=options.passes,
        learning_rate=2e-3,
        warmup_steps=400,
        weight_decay=0.1,
    )
    base = options.work_dir / "base"
    teach_copying(reader, tokenize(books, tokenizer), base)
    torch.manual_seed(0)
    ids, labels = with_spans(
        as_tensor(blocks_of(chapters.train, tokenizer, CONTEXT)), FINE_TUNING_SHARE
    )
    train(
        GPT2LMHeadModel.from_pretrained(base, dtype=torch.float32),
        [{"input_ids": i, "labels": label} for i, label in zip(ids, labels, strict=True)],
        validation,
        options.work_dir / "teacher",
        per_device_train_batch_size=4,
        num_train_epochs=3,
        learning_rate=5e-4,
        warmup_steps=50,
        weight_decay=0.1,
    )
    held_out = {
        "validation (chapter XI)": as_tensor(validation),
        "test (chapter XII)": as_tensor(blocks_of(chapters.test, tokenizer, CONTEXT)),
    }
    for name in ("base", "teacher"):
        publish(options.work_dir / name, options.assets / name, tokenizer, held_out)


def make_tokenizer(texts: list[str], folder: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE with GPT-2's pre-tokenizer, learnt from texts."""
    if not folder.exists():
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        bpe.post_processor = processors.ByteLevel(trim_offsets=False)
        learner = trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        bpe.train_from_iterator(texts, learner)
        PreTrainedTokenizerFast(
            tokenizer_object=bpe,
            bos_token=END_OF_TEXT,
            eos_token=END_OF_TEXT,
            unk_token=END_OF_TEXT,
            model_max_length=CONTEXT,
        ).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def new_gpt2(tokenizer) -> GPT2LMHeadModel:
    """The architecture, with random weights: six layers, so that a student can have three."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=CONTEXT,
            n_embd=224,
            n_layer=6,
            n_head=4,
            activation_function="gelu_pytorch_tanh",  # GPT-2's, computed in one pass: faster
            attn_pdrop=0.0,  # attention dropout costs two fifths of the speed on a CPU
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def blocks_of(texts: list[str], tokenizer, block_size: int) -> list[dict]:
    """Texts as the fixed runs of tokens that `Trainer` takes."""
    tokens = tokenize(texts, tokenizer)
    whole = len(tokens) // block_size * block_size
    return [{"input_ids": b, "labels": b} for b in tokens[:whole].view(-1, block_size)]


def as_tensor(blocks: list[dict]) -> torch.Tensor:
    """The token ids of blocks, shape (blocks, block_size)."""
    return torch.stack([block["input_ids"] for block in blocks])


def train(model, blocks, validation, folder: Path, **settings) -> None:
    """Train with checkpoints, keep the epoch that is best on validation, log to a CSV."""
    if (folder / "model.safetensors").exists():
        return
    checkpoints = folder.with_name(folder.name + "_checkpoints")
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=checkpoints,
            use_cpu=not torch.cuda.is_available(),
            bf16=torch.cuda.is_available(),
            adam_beta2=0.95,
            lr_scheduler_type="cosine",
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=2,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            logging_steps=50,
            report_to="none",
            seed=0,
            **settings,
        ),
        train_dataset=blocks,
        eval_dataset=validation,
    )
    print(f"{folder.name}: {model.num_parameters():,} parameters, {len(blocks)} blocks a pass")
    trainer.train(resume_from_checkpoint=any(checkpoints.glob("checkpoint-*")) or None)
    trainer.save_model(folder)
    write_log(trainer.state.log_history, folder / "training_log.csv")


def write_log(history: list[dict], path: Path) -> None:
    """What `Trainer` logged, as a table: a row a step, empty where a value was not logged."""
    columns = ["step", "epoch", "loss", "eval_loss", "learning_rate", "grad_norm"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for row in history if "loss" in row or "eval_loss" in row)


def publish(source: Path, target: Path, tokenizer, splits: dict[str, torch.Tensor]) -> None:
    """Put a finished model into the package: fp16 weights, tokenizer, log, model card."""
    # measured as it ships: with the weights rounded to fp16
    model = GPT2LMHeadModel.from_pretrained(source, dtype=torch.float16).float()
    found = {name: evaluate(model, blocks, tokenizer) for name, blocks in splits.items()}
    gains = copy_gains(model, splits["test (chapter XII)"])
    model.half().save_pretrained(target)
    if target.name == "teacher":  # one file for all bundled models
        tokenizer.save_pretrained(target)
    log = source / "training_log.csv"
    shutil.copy(log if log.exists() else source.with_name("reader") / log.name, target)
    (target / "README.md").write_text(
        model_card(target.name, model, found, gains), encoding="utf-8"
    )


def model_card(name: str, model, found: dict[str, dict[str, float]], gains: str) -> str:
    """The README of a bundled model."""
    config = model.config
    learnt = (
        "forty public-domain books (recipes/books.csv), and on blocks of them in which a span "
        "stands twice, so that it copies"
    )
    if name == "teacher":
        learnt += ". Then fine-tuned on chapters I-X of The Wind in the Willows"
    rows = "\n".join(
        f"| {split} | {q['perplexity']:.2f} | {q['bits_per_byte']:.3f} |"
        for split, q in found.items()
    )
    return f"""---
license: mit
language: en
library_name: transformers
pipeline_tag: text-generation
---

# willows_kd {name}

A GPT-2 of {config.n_layer} layers, width {config.n_embd}, {config.n_head} heads, \
{config.n_positions} positions, {config.vocab_size} tokens: {model.num_parameters():,} parameters, \
stored in fp16. It is small enough to learn with on a laptop and too small for anything else.

Trained on {learnt}. Its tokenizer, a byte-level BPE, was learnt from the same texts.

Made by `python recipes/make_bundled_models.py --books FOLDER --willows FILE`; every setting is \
in that script and in `teach_copying.py`, and logged steps are in `training_log.csv` beside this \
file (of the base: before it learnt to copy).

Measured on chapters that neither it nor its tokenizer has seen, over windows of \
{CONTEXT} tokens that overlap by half (the epoch was chosen on the validation chapter):

| held-out text | perplexity | bits per byte |
|---|---|---|
{rows}

{gains}

Licence: MIT, like the project. The books are in the public domain in the United States.
"""


if __name__ == "__main__":
    main()
