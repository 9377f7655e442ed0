"""What `willows-kd distill` does: prepare, train, save, compare."""

import contextlib
import dataclasses
import functools
import glob
import json
import math
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
import transformers
from torch import nn
from tqdm.auto import tqdm

import willows_kd
from willows_kd import files, models
from willows_kd.compress.layers import choose_layers, passes_to_choose
from willows_kd.config import DTYPES, INITS, LONGEST_BLOCK, DistillConfig
from willows_kd.corpus import Blocks, pack
from willows_kd.distillation import distill
from willows_kd.errors import InputError, Stopped, WriteError, one_line, require
from willows_kd.evaluation import LABELS, as_markdown, compare, number
from willows_kd.scale.checkpoints import Checkpoints
from willows_kd.scale.linear_head import ChunkedLoss
from willows_kd.scale.teacher_cache import cache_teacher
from willows_kd.sources.load import load_corpus
from willows_kd.sources.transfer_set import make_transfer_set
from willows_kd.students import depth_of, layers_to_keep, student_from_teacher
from willows_kd.texts import Corpus

GPT2_VOCABULARY = 50_257
STEPS_TO_TIME, TOKENS_TO_TIME = 4, 128  # of each dtype; the first step warms up
UNEVEN = 1.25  # between the speeds of one network, above which they are not to be trusted
BLOCKS_TO_CHOOSE = 8  # on which the ways to choose a student's layers are compared

CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [knowledge-distillation, willows_kd]
---

# A distilled student

Trained with willows_kd to predict as its teacher does.

"""

# exit codes; bad input is 2
OK, FAILED, CANNOT_WRITE, STOPPED = 0, 1, 3, 130


@dataclasses.dataclass
class Job:
    """What a run trains with, all of it checked."""

    teacher: nn.Module
    student: nn.Module
    make_student: Callable[[], nn.Module]  # another, as it is before training
    tokenizer: object
    corpus: Corpus
    blocks: Blocks
    config: DistillConfig
    facts: dict  # what is saved beside the settings


def distill_to_directory(options, config: DistillConfig) -> int:
    """Run the whole job, with checkpoints beside the output directory, and return the exit code."""
    output = Path(options.output_dir).resolve()
    checkpoints = Checkpoints(f"{output}.checkpoints", options.checkpoint_minutes)
    main_process = models.distributed_state().is_main_process
    with checkpoints.locked() if main_process else contextlib.nullcontext(), warnings_as_lines():
        if main_process:
            files.clean_up_interrupted_writes(output.parent, glob.escape(output.name))
            check_stopped_run(options, checkpoints)
            check_output(options, options.model_dir, options.student, options.dataset_path)
        job = prepare(options, config)
        if options.dtype == "auto":
            job.config = dataclasses.replace(config, dtype=choose_dtype(job, checkpoints, options))
        if main_process:
            check_savable(job)
        history = train(job, checkpoints, options)
        return save_and_compare(job, history, checkpoints, options) if main_process else OK


def check_stopped_run(options, checkpoints: Checkpoints) -> None:
    """Refuse to throw a stopped run away unless told to; one that goes on replaces its student."""
    if checkpoints.files():
        choice = "--resume continues it, --overwrite starts afresh"
        message = f"{checkpoints.folder} holds a run that was stopped; {choice}"
        require(options.resume or options.overwrite, message)
        # of its last epoch
        options.overwrite |= (Path(options.output_dir) / files.SETTINGS_FILE).exists()


def check_output(options, *inputs: str | None) -> None:
    """Refuse an output directory that cannot be one, or would replace what the command reads."""
    files.check_output(options.output_dir, options.overwrite)
    output = Path(options.output_dir).resolve()
    for given in filter(None, inputs):
        path = Path(given).resolve()
        if path.exists() and output in (path, *path.parents):
            raise InputError(f"{given} would be replaced; choose another --output_dir")


# -- before training -------------------------------------------------------------------


def prepare(options, config: DistillConfig) -> Job:
    """Check and load everything, what is quickest to check first."""
    device = find_device(options.device)
    teacher_name = options.model_dir or str(models.BUNDLED_TEACHER)
    tokenizer = models.load_tokenizer(teacher_name)
    student_name = choose_student(options, tokenizer)
    names = [teacher_name] if student_name == "half" else [teacher_name, student_name]
    block_size = block_length(options.block_size, *names)
    corpus = load_corpus(options.dataset_path, options.text_column, options.encoding)

    print(f"🔍 Loading teacher model from: {options.model_dir or 'the bundled teacher'}")
    teacher, _ = models.load_teacher(teacher_name, device)
    shown = f"{options.layers} of the teacher's layers" if options.layers else student_name
    print(f"🔍 Loading student model ({shown})...")
    print(f"📚 Loading dataset from: {corpus.provenance}")
    print("⚙️ Tokenizing dataset...")
    blocks = pack(corpus, tokenizer, block_size)
    if student_name == "half":
        kept = layers_of_student(options, teacher, blocks.train)
        about = f"layers {','.join(map(str, kept))} of the teacher's {depth_of(teacher)}"
        print(f"✂️ The student keeps {about}")
        make = functools.partial(student_from_teacher, teacher, init=kept)
    else:
        about = student_name
        make = functools.partial(models.load_student, student_name, tokenizer, device)
    student = make()
    if len(tokenizer) > models.vocabulary_size(student):
        tokenizer = models.load_tokenizer(student_name)  # the teacher's has tokens too many
    facts = {
        "teacher": options.model_dir or "willows_kd's bundled teacher",
        "student": about,
        "corpus": corpus.provenance,
        "block_size": block_size,
        "teacher_text": options.teacher_text,
    }
    if limit := untrained_positions(student, block_size):
        print(f"⚠️ {limit}")
        facts["untrained_positions"] = limit
    if options.teacher_text:
        print("✍️ The teacher is writing the training text...")
        written = make_transfer_set(teacher, blocks.train, seed=options.seed)
        blocks = dataclasses.replace(blocks, train=written)
    return Job(teacher, student, make, tokenizer, corpus, blocks, config, facts)


def choose_student(options, tokenizer) -> str:
    """What the student is made of: "half", which is the teacher, or a directory or hub name."""
    if options.layers is not None or options.init is not None:
        cut = options.student in (None, "half")
        require(cut, "--layers and --init make a student from the teacher; leave out --student")
        return "half"
    usual = tokenizer.vocab_size == GPT2_VOCABULARY  # without tokens that were added, as [PAD]
    name = options.student or ("distilgpt2" if usual else "half")
    if name != "half":
        try:
            own = models.load_tokenizer(name)
        except InputError as error:
            raise InputError(f"{error}; --student half makes one from the teacher") from error
        models.check_same_tokenizer(tokenizer, own)
    return name


def layers_of_student(options, teacher, blocks: torch.Tensor) -> list[int]:
    """Which of its teacher's layers a student keeps: those given, or the best by measurement.

    Measured is on a few training blocks; ways to choose for which the teacher would read more
    than an epoch's blocks are left out.
    """
    if isinstance(options.init, list):
        return layers_to_keep(teacher, options.layers, options.init)
    depth, size = depth_of(teacher), len(layers_to_keep(teacher, options.layers, "spaced"))
    few = blocks[:: max(1, len(blocks) // BLOCKS_TO_CHOOSE)][:BLOCKS_TO_CHOOSE]
    affordable = [i for i in INITS if passes_to_choose(i, depth, size) * len(few) <= len(blocks)]
    inits = affordable if options.init in (None, "auto") else [options.init]
    table = choose_layers(teacher, size, few, inits)
    starts = [f"{init} {number(start)}" for init, start in table["perplexity"].items()]
    print(f"✂️ Perplexity before training, if layers are chosen so:\n   {', '.join(starts)}")
    for kept in table["layers"]:
        # there are families in which not every layer can be left out
        with contextlib.suppress(InputError):
            student_from_teacher(teacher, init=kept)
            break
    return kept


def untrained_positions(student, block_size: int) -> str:
    """What follows from blocks shorter than a table of learned positions; else nothing."""
    positions, tokens = models.max_positions(student.config), student.get_input_embeddings()
    tables = [m for m in student.modules() if isinstance(m, nn.Embedding) and m is not tokens]
    # OPT and its like have two rows more than positions
    learned = any(positions in (len(t.weight), len(t.weight) - 2) for t in tables)
    if not learned or block_size >= positions:
        return ""
    return f"The student is good for up to {block_size} tokens: later positions are not trained"


def choose_dtype(job: Job, checkpoints: Checkpoints, options) -> str:
    """The dtype of a run that is resumed, or else the one whose steps are faster here.

    It is tried on a few short steps of a student that is thrown away. Several processes would
    have to agree on what is faster: they train in float32.
    """
    if options.resume and (found := checkpoints.newest()):
        return found.run["dtype"]
    if models.distributed_state().num_processes > 1:
        return "float32"
    few = job.blocks.train[:1, :TOKENS_TO_TIME].repeat(STEPS_TO_TIME, 1)
    blocks, seconds = Blocks(few, few[:1], few[:1], {}), {}
    for dtype in DTYPES:
        config = dataclasses.replace(job.config, dtype=dtype, epochs=1, batch_size=1)
        history = distill(job.teacher, job.make_student(), blocks, config, loss=ChunkedLoss)
        seconds[dtype] = history[-1]["seconds"] - history[0]["seconds"]
    ratio = seconds["float32"] / seconds["bfloat16"]
    dtype = min(DTYPES, key=seconds.get)
    print(f"ℹ️ A step in bfloat16 has {ratio:.2f} times float32's speed here: using {dtype}")
    return dtype


def check_savable(job: Job) -> None:
    """Try to save all but the weights before training, rather than after hours."""
    try:
        with tempfile.TemporaryDirectory() as folder, models.quiet_transformers():
            job.student.config.save_pretrained(folder)
            job.tokenizer.save_pretrained(folder)
    except Exception as error:
        # no room for temporary files, as Python or Rust says it: the output directory may have it
        if isinstance(error, OSError) or "(os error" in str(error):
            return
        name = type(job.student).__name__
        raise InputError(f"a {name} like this cannot be saved: {one_line(error)}") from error


# -- training, and after it ------------------------------------------------------------


def train(job: Job, checkpoints: Checkpoints, options) -> list[dict]:
    """Distil; if Ctrl-C stops it, the student is that of the last finished epoch.

    Returns:
        the history of the finished epochs.
    """
    teacher = job.teacher
    if options.cache_teacher and job.config.alpha < 1:
        teacher = cache_teacher(teacher, job.blocks)
    print("🚀 Starting distillation training...")
    if job.corpus.skipped:
        print(f"⚠️ Skipping empty input batch... ({job.corpus.skipped} empty lines or rows)")
    sys.stdout.flush()
    if not options.resume:
        checkpoints.clear()

    def on_step(row: dict) -> None:
        if "average_loss" in row:
            tqdm.write(f"✅ Epoch {row['epoch']}: Average Loss {row['average_loss']:.4f}")

    more = {"on_step": on_step, "checkpoints": checkpoints, "resume": options.resume}
    try:
        return distill(teacher, job.student, job.blocks, job.config, loss=ChunkedLoss, **more)
    except Stopped:
        ended = checkpoints.newest(ends_epoch=True)
    if ended is None:
        return []
    ended.load(job.student)
    return ended.history


def save_and_compare(job: Job, history: list[dict], checkpoints, options) -> int:
    """Save the student, measure it beside its teacher, and return the exit code."""
    resumable = "; add --resume to go on from where it stopped" if checkpoints.files() else ""
    if not history:
        print(f"stopped: nothing was saved{resumable}", file=sys.stderr)
        return STOPPED
    output = options.output_dir
    print(f"💾 Saving distilled student model to: {output}")
    models.save_model(job.student, job.tokenizer, output, texts(job, history), options.overwrite)
    print("✅ Distilled model saved successfully!")
    if (done := history[-1]["epoch"]) < job.config.epochs:
        print(f"stopped: the student is that of epoch {done} of {job.config.epochs}{resumable}")
        return STOPPED
    print("📏 Comparing with the teacher...", flush=True)
    try:
        named = {"teacher": job.teacher, "student before": job.make_student()}
        table = compare(named | {"student": job.student}, job.blocks, job.tokenizer)
        with files.atomic_write(Path(output) / "README.md") as card:
            card.write_text(texts(job, history, table)["README.md"], "utf-8", "replace")
    except (Exception, KeyboardInterrupt) as error:  # whatever happens, the student is saved
        print(f"{one_line(error)}: the student is trained and saved, but was not compared")
        if isinstance(error, KeyboardInterrupt):
            return STOPPED
        return CANNOT_WRITE if isinstance(error, OSError | WriteError) else FAILED
    finally:
        checkpoints.clear()
    print_table(table, job.corpus)
    speeds = table.loc[["student before", "student"], ["forward_ms", "token_ms"]]
    if (speeds.max() > UNEVEN * speeds.min()).any():
        print("⚠️ Both students are one network, yet their speeds differ by over a quarter:")
        print("   the machine was busy; compare them again when it is not")
    return OK


def texts(job: Job, history: list[dict], table: pd.DataFrame | None = None) -> dict[str, str]:
    """What is saved beside the student: settings, history and model card."""
    settings = {
        **job.facts,
        "epochs_finished": history[-1]["epoch"],
        **dataclasses.asdict(job.config),
        "versions": {m.__name__: m.__version__ for m in (willows_kd, torch, transformers)},
    }
    card = CARD + "\n".join(f"- {name}: {value}" for name, value in settings.items()) + "\n"
    if table is not None:
        measured = f"Measured on held-out text {machine_of(table)}"
        card += f"\n## Quality, size and speed\n\n{as_markdown(table)}\n\n{measured}.\n"
    return {
        files.SETTINGS_FILE: json.dumps(settings, indent=2) + "\n",
        "history.csv": pd.DataFrame(history).to_csv(index=False),
        "README.md": card,
    }


# -- what the commands share -----------------------------------------------------------


def block_length(block_size: int | None, *names: str) -> int:
    """Tokens in a block: as given, checked, or all that these models read, at most 1,024."""
    positions = [models.max_positions(models.load_config(name)) for name in names]
    longest = min(filter(None, positions), default=math.inf)
    if block_size is None:
        return min(LONGEST_BLOCK, longest)
    fits = 2 <= block_size <= longest
    require(fits, f"block_size is {block_size}; these models take 2 to {longest}")
    return block_size


def find_device(name: str) -> torch.device:
    """The device of that name, `auto` for the GPU if there is one."""
    if name == "auto":
        state = models.distributed_state()
        return state.device if state.num_processes > 1 else models.best_device()
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # which a device without memory (meta) refuses too
    except Exception as error:  # each backend has its own way to be absent
        raise InputError(f"device {name} cannot be used here; auto or cpu can") from error
    return device


@contextlib.contextmanager
def warnings_as_lines():
    """Print each warning once, as a line like the others."""
    said = set()

    def show(message, *_, **__) -> None:
        if str(message) not in said:
            said.add(str(message))
            tqdm.write(f"⚠️ {message}")

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


def print_table(table: pd.DataFrame, corpus: Corpus) -> None:
    """Print the table of `compare` in plain text, at most 80 columns wide, and where it is from."""
    cells = {
        label: [number(value, name == "parameters") for value in table[name]]
        for name, label in LABELS.items()
    }
    shown = pd.DataFrame(cells, table.index).T
    widths = [len(name) + 1 for name in shown]  # names may be of several words
    print(f"\n{shown.to_string(line_width=80, col_space=widths)}\n")
    print(f"Measured on the held-out test text of {corpus.title},\n{machine_of(table)}.")


def machine_of(table: pd.DataFrame) -> str:
    """The machine that a table was measured on."""
    return f"on {table.attrs['machine']}, threads: {table.attrs['threads']}"
