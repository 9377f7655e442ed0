"""What `willows-kd generate`, `compare` and `export` do with a model that is trained."""

from pathlib import Path

from transformers import TextStreamer

from willows_kd import evaluation, models
from willows_kd.cli import distill as commands
from willows_kd.compress.export import export_model, load_onnx
from willows_kd.corpus import pack
from willows_kd.errors import require
from willows_kd.generation import complete
from willows_kd.sources.load import load_corpus


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
    model, tokenizer = models.load_teacher(options.model_dir, "cpu")
    found = export_model(model, tokenizer, options.output_dir, options.to, options.overwrite)
    print(f"💾 {found['file']}: {found['megabytes']:.1f} MB")
    if "kl" in found:
        print(f"Compared with PyTorch, the KL divergence is {found['kl']:.1g} nats per token")
    return commands.OK


def compare(options) -> int:
    """Print the table of some models; all have the vocabulary of the first, the teacher."""
    require(len(options.model_dir) > 1, "give at least two models, the teacher first")
    names = names_of(options.model_dir)
    device = commands.find_device(options.device)
    block_size = commands.block_length(options.block_size, *options.model_dir)
    corpus = load_corpus(options.dataset_path, options.text_column, options.encoding)
    teacher, tokenizer = models.load_teacher(options.model_dir[0], device)
    with commands.warnings_as_lines():
        others = [models.load_student(each, tokenizer, device) for each in options.model_dir[1:]]
        loaded = dict(zip(names, [teacher, *others], strict=True))
        table = evaluation.compare(loaded, pack(corpus, tokenizer, block_size), tokenizer)
    commands.print_table(table, corpus)
    return commands.OK


def names_of(folders: list[str]) -> list[str]:
    """What to call some models: the last part of their paths, or all of it if two are alike."""
    require(len(set(folders)) == len(folders), "a model is given twice; give each once")
    names = [Path(folder).name for folder in folders]
    return names if len(set(names)) == len(names) else folders
