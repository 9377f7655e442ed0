"""What `willows-kd distill` does: check, load, train, save, compare."""

import contextlib
import copy
import dataclasses
import json
import os
import sys
import warnings
from pathlib import Path

import pandas as pd
import torch
import transformers
from tqdm.auto import tqdm

import willows_kd
from willows_kd import files, models
from willows_kd.checkpoints import Checkpoints
from willows_kd.config import DistillConfig
from willows_kd.corpus import Corpus, load_corpus, pack
from willows_kd.distillation import distill
from willows_kd.errors import InputError
from willows_kd.evaluation import as_markdown, compare
from willows_kd.teacher_cache import cache_teacher

GPT2_VOCABULARY = 50_257


def distill_to_directory(options, config: DistillConfig) -> int:
    """Run the whole job, with checkpoints beside the output directory, and return the exit code.

    Raises:
        InputError: something that was given cannot be used. Nothing was written.
    """
    main_process = models.distributed_state().is_main_process
    if not main_process:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  one process speaks for all
    for name in ("model_dir", "student", "dataset_path", "output_dir"):
        if getattr(options, name) == "":
            raise InputError(f"{name} is empty; leave it out or give a path")
    output = Path(options.output_dir)
    files.check_output(output, options.overwrite)
    checkpoints = Checkpoints(checkpoints_folder(output), options.checkpoint_minutes)
    with checkpoints.locked() if main_process else contextlib.nullcontext():
        if main_process:
            files.clean_up_interrupted_writes(output)
        if main_process and checkpoints.files() and not (options.resume or options.overwrite):
            raise InputError(
                f"{checkpoints.folder} holds a run that was stopped; "
                "--resume goes on with it, --overwrite starts afresh"
            )
        return train_and_save(options, config, checkpoints)


def checkpoints_folder(output: Path) -> Path:
    """Where the checkpoints of an output directory are: `student.checkpoints` for `student`."""
    named = output if output.name.strip(".") else output.resolve()
    return named.with_name(f"{named.name}.checkpoints")


def train_and_save(options, config: DistillConfig, checkpoints: Checkpoints) -> int:
    """Check, load, train, save, compare; returns the exit code."""
    main_process = models.distributed_state().is_main_process
    device = find_device(options.device)
    bundled = options.model_dir is None
    teacher_name = str(models.BUNDLED_TEACHER) if bundled else options.model_dir
    check_inputs_stay(options)
    tokenizer = models.load_tokenizer(teacher_name)
    models.check_context(teacher_name, options.block_size)
    student_name = choose_student(options, tokenizer)
    corpus = None if options.dataset_path is None else load_corpus(options.dataset_path)
    if corpus and len(corpus.text) < 100 * options.block_size:  # may be too short: see at once
        pack_without_warning(corpus, tokenizer, options.block_size)

    print(f"🔍 Loading teacher model from: {'the bundled teacher' if bundled else teacher_name}")
    teacher, _ = models.load_teacher(teacher_name, device)
    print(f"🔍 Loading student model ({student_name})...")
    student = load_or_make_student(options, student_name, teacher, device)
    print(f"📚 Loading dataset from: {options.dataset_path or 'The Wind in the Willows'}")
    corpus = corpus or load_corpus()
    print("⚙️ Tokenizing dataset...")
    blocks = pack_without_warning(corpus, tokenizer, options.block_size)
    print("🚀 Starting distillation training...")
    if corpus.skipped:
        print(f"⚠️ Skipping empty input batch... ({corpus.skipped} empty lines or chapters)")
    sys.stdout.flush()

    untrained = copy.deepcopy(student)
    cached = options.cache_teacher and config.alpha < 1
    asked = cache_with_printed_warnings(teacher, blocks) if cached else teacher
    history, finished = train(asked, student, blocks, config, checkpoints, options.resume)
    if not main_process:
        return 0
    if not finished:
        print(f"stopped: nothing was saved{how_to_resume(checkpoints)}", file=sys.stderr)
        return 130
    table = None
    if finished == config.epochs:
        named = {"teacher": teacher, "student before": untrained, "student": student}
        try:
            table = compare(named, blocks, tokenizer)
        except (KeyboardInterrupt, OSError) as error:  # the student is there: save it all the same
            uncompared = str(error) or "stopped"
    settings = {
        "teacher": "willows_kd's bundled teacher" if bundled else teacher_name,
        "student": student_name,
        "corpus": corpus.provenance,
        "block_size": options.block_size,
        "epochs_finished": finished,
        **dataclasses.asdict(config),
        "versions": {m.__name__: m.__version__ for m in (willows_kd, torch, transformers)},
    }
    print(f"💾 Saving distilled student model to: {options.output_dir}")
    extra = {
        files.SETTINGS_FILE: json.dumps(settings, indent=2) + "\n",
        "history.csv": pd.DataFrame(history).to_csv(index=False),
        "README.md": model_card(settings, table),
    }
    models.save_model(student, tokenizer, options.output_dir, extra, options.overwrite)
    print("✅ Distilled model saved successfully!")
    if finished < config.epochs:
        stopped = f"stopped: the student is that of epoch {finished} of {config.epochs}"
        print(f"{stopped}{how_to_resume(checkpoints)}")
        return 130
    checkpoints.clear()
    if table is None:
        print(f"{uncompared}: the student is trained, but was not compared")
        return 130
    print(f"\n{as_markdown(table)}")
    print(f"\nMeasured on the held-out test text of {corpus.title}, with {describe(table)}.")
    return 0


def check_inputs_stay(options) -> None:
    """Refuse an output directory that would replace what the run reads.

    Raises:
        InputError: the teacher, the student or the text lies in the output directory.
    """
    output = Path(options.output_dir).resolve()
    for given in (options.model_dir, options.student, options.dataset_path):
        path = Path(given).resolve() if given else None
        if path and path.exists() and output in (path, *path.parents):
            raise InputError(f"{given} lies in {options.output_dir}, which would be replaced")


def find_device(name: str) -> torch.device:
    """The device of that name, `auto` for the GPU where there is one."""
    if name == "auto":
        state = models.distributed_state()
        return state.device if state.num_processes > 1 else models.best_device()
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # which a device without memory (meta) refuses too
    except Exception as error:  # each backend has its own way to be absent
        raise InputError(f"device {name} cannot be used here; auto or cpu can") from error
    return device


def choose_student(options, tokenizer) -> str:
    """What to call the student that is to be loaded or made.

    Raises:
        InputError: it is not there, or reads text otherwise than the teacher.
    """
    if options.layers is not None:
        if options.student not in (None, "half"):
            raise InputError("--layers makes a student from the teacher; leave out --student")
        return f"{options.layers} of the teacher's layers"
    gpt2 = len(tokenizer) == GPT2_VOCABULARY
    name = options.student or ("distilgpt2" if gpt2 else "half")
    if name != "half":
        try:
            models.check_context(name, options.block_size)
            models.check_same_tokenizer(tokenizer, models.load_tokenizer(name))
        except models.HubError as error:
            raise InputError(f"{error}; --student half makes one from the teacher") from error
    return name


def load_or_make_student(options, name: str, teacher, device):
    """The student of that name, checked to share the teacher's vocabulary."""
    if name == "half" or options.layers is not None:
        return models.student_from_teacher(teacher, options.layers)
    student = models.load_model(name, device)
    shared = models.common_vocabulary(teacher, student)
    heads = teacher.config.vocab_size, student.config.vocab_size
    if heads[0] != heads[1]:
        print(f"ℹ️ Heads of {heads[0]} and {heads[1]} logits: the first {shared} are tokens")
    return student


def pack_without_warning(corpus: Corpus, tokenizer, block_size: int):
    """`pack` without its warning, which the command words in its own way."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return pack(corpus, tokenizer, block_size)


def cache_with_printed_warnings(teacher, blocks):
    """`cache_teacher`, with its warning as a line like the others."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        asked = cache_teacher(teacher, blocks)
    for warning in said:
        print(f"⚠️ {warning.message}")
    return asked


def train(
    teacher, student, blocks, config: DistillConfig, checkpoints: Checkpoints, resume: bool
) -> tuple[list[dict], int]:
    """Distil; where Ctrl-C stops it, the student is that of the last epoch finished here.

    Returns:
        the history of the finished epochs, and how many those are.
    """
    kept: dict = {"epoch": 0}

    def on_step(row: dict) -> None:
        if "average_loss" in row:
            weights = student.state_dict().items()
            kept["weights"] = {k: v.detach().to("cpu", copy=True) for k, v in weights}
            kept["epoch"] = row["epoch"]
            tqdm.write(f"✅ Epoch {row['epoch']}: Average Loss {row['average_loss']:.4f}")

    history = distill(teacher, student, blocks, config, on_step, checkpoints, resume)
    last = history[-1] if history else {}
    if last.get("epoch") == config.epochs and "average_loss" in last:
        return history, config.epochs
    if kept["epoch"]:
        student.load_state_dict(kept["weights"])
    return [row for row in history if row["epoch"] <= kept["epoch"]], kept["epoch"]


def how_to_resume(checkpoints: Checkpoints) -> str:
    """What to say to somebody who stopped a run."""
    return "; add --resume to go on from where it stopped" if checkpoints.files() else ""


def describe(table: pd.DataFrame) -> str:
    """The machine that a table was measured on."""
    return f"{table.attrs['threads']} threads, {table.attrs['machine']}"


def model_card(settings: dict, table: pd.DataFrame | None) -> str:
    """The README of an output directory."""
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [knowledge-distillation, willows_kd]",
        "---",
        "",
        "# A distilled student",
        "",
        f"Trained with willows_kd on the soft labels of its teacher ({settings['teacher']}), "
        f"{settings['epochs_finished']} epochs on {settings['corpus']}.",
        "",
        "## Settings",
        "",
        *(f"- {name}: {value}" for name, value in settings.items()),
        "",
    ]
    if table is not None:
        lines += ["## Measured on held-out text", "", as_markdown(table), ""]
        lines += [f"Speed and memory: {describe(table)}.", ""]
    return "\n".join(lines)
