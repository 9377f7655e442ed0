"""What `willows-kd generate`, `compare` and `export` do with a model that is trained."""

from pathlib import Path

import pandas as pd
from transformers import TextStreamer

from willows_kd import evaluation, files, models
from willows_kd.cli import distill as commands
from willows_kd.compress.export import export_model, load_onnx
from willows_kd.corpus import pack
from willows_kd.errors import InputError, require
from willows_kd.figures.plots import plot_scatter
from willows_kd.generation import complete

OF_ONE_VOCABULARY = ["perplexity", "kl_to_teacher", "agreement"]  # measures by token


def generate(options) -> int:
    """Print a prompt and what a model makes of it, word by word."""
    exported = (Path(options.model_dir) / "model.onnx").is_file()
    model, tokenizer = (load_onnx if exported else models.load_teacher)(options.model_dir)
    complete(
        model,
        tokenizer,
        options.prompt,
        options.max_new_tokens,
        options.temperature,
        options.seed,
        options.top_k,
        TextStreamer(tokenizer, skip_special_tokens=True),
    )
    return commands.OK


def export(options) -> int:
    """Write a model in another format."""
    commands.check_output(options, options.model_dir)
    commands.check_nothing_is_lost(options)
    model, tokenizer = models.load_teacher(options.model_dir, "cpu")
    found = export_model(model, tokenizer, options.output_dir, options.to, options.overwrite)
    print(f"💾 {found['file']}: {found['megabytes']:.1f} MB")
    if "int8_share" in found:
        print(f"{found['int8_share']:.1%} of the weights are in int8")
    if "kl" in found:
        print(
            f"Compared with PyTorch: a logit differs by at most {found['difference']:.1g} of the "
            f"largest;\nthe KL divergence is {found['kl']:.1g} nats per token"
        )
    return commands.OK


def compare(options) -> int:
    """Print the table of some models, and save it with its figure."""
    names = names_of(options.model_dir)
    require(len(names) > 1, "give at least two models, each once")
    if options.output_dir is not None:
        commands.check_output(options, *options.model_dir, options.dataset_path)
        commands.check_nothing_is_lost(options)
    device = commands.find_device(options.device)
    block_size = commands.block_length(options.block_size, *options.model_dir)
    corpus = commands.read_corpus(options)
    loaded = [models.load_teacher(name, device) for name in options.model_dir]
    with commands.warnings_as_lines():
        table = table_of(dict(zip(names, loaded, strict=True)), corpus, block_size)
    commands.print_table(table, corpus)
    measure = "perplexity" if "perplexity" in table else "bits_per_byte"
    if measure == "bits_per_byte":
        print("The models' tokens differ: so does the text of a block and of a token.")
    if options.output_dir is None:
        return commands.OK
    figure = plot_scatter(
        {
            f"{name}, {row['disk_mb']:.1f} MB": [(row["token_ms"], row[measure])]
            for name, row in table.iterrows()
        },
        title="Near the lower left corner: good and fast",
        xlabel=evaluation.LABELS["token_ms"],
        ylabel=f"{evaluation.LABELS[measure]} on held-out text",
    )
    with files.atomic_directory(Path(options.output_dir)) as folder:
        table.to_csv(folder / "comparison.csv", index_label="model")
        figure.savefig(folder / "tradeoff.png", dpi=150)
    print(f"💾 Saved to: {options.output_dir}")
    return commands.OK


def names_of(folders: list[str]) -> list[str]:
    """What to call some models: the last part of their paths, or all of it if two are alike."""
    require(len(set(folders)) == len(folders), "a model is given twice; give each once")
    names = [Path(folder).name for folder in folders]
    return names if len(set(names)) == len(names) else folders


def table_of(loaded: dict[str, tuple], corpus, block_size: int) -> pd.DataFrame:
    """The table of `compare` for models with tokenizers, which may be of several vocabularies."""
    groups: list[tuple] = []
    for name, (model, tokenizer) in loaded.items():
        fits = (group for other, group in groups if same_vocabulary(other, tokenizer))
        group = next(fits, None)
        if group is None:
            groups.append((tokenizer, group := {}))
        group[name] = model
    tables = [
        evaluation.compare(group, pack(corpus, tokenizer, block_size), tokenizer)
        for tokenizer, group in groups
    ]
    table = pd.concat(tables).loc[list(loaded)]
    table.attrs = tables[0].attrs
    return table if len(groups) == 1 else table.drop(columns=OF_ONE_VOCABULARY)


def same_vocabulary(tokenizer, other) -> bool:
    """Whether two tokenizers give the same ids to the same text."""
    try:
        models.check_same_tokenizer(tokenizer, other)
    except InputError:
        return False
    return True
