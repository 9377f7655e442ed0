"""What `willows-kd distill` does: prepare, train, save, compare."""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import sys
import tempfile
import warnings
from collections.abc import Callable
from datetime import datetime
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
from willows_kd.corpus import Blocks, Corpus, load_corpus, pack
from willows_kd.distillation import distill
from willows_kd.errors import InputError, Stopped, WriteError, one_line, require
from willows_kd.evaluation import as_markdown, compare, number
from willows_kd.generation import make_transfer_set
from willows_kd.scale.checkpoints import Checkpoints
from willows_kd.scale.linear_head import ChunkedLoss
from willows_kd.scale.teacher_cache import cache_teacher
from willows_kd.students import depth_of, layers_to_keep, student_from_teacher

GPT2_VOCABULARY = 50_257
BLOCKS_TO_CHOOSE = 8  # on which the ways to choose a student's layers are compared
STEPS_TO_TIME = 3  # of each dtype
SECONDS_TO_TIME = 3.0  # after which one step is enough
AS_BYTES = "utf-8", "surrogateescape"  # of a path, whatever bytes it has
FASTER = 1.1  # by so much, or float32 stays

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
    facts: dict  # what is saved beside the settings


def distill_to_directory(options, config: DistillConfig) -> int:
    """Run the whole job, with checkpoints beside the output directory, and return the exit code."""
    output, main_process = Path(options.output_dir), models.distributed_state().is_main_process
    files.check_output(output, options.overwrite)
    checkpoints = Checkpoints(checkpoints_folder(output), options.checkpoint_minutes)
    locked = checkpoints.locked() if main_process else contextlib.nullcontext()
    with locked, warnings_as_lines():
        if main_process:
            files.clean_up_interrupted_writes(output)
            check_nothing_is_lost(output, checkpoints, options)
        job = prepare(options)
        config = dataclasses.replace(config, dtype=choose_dtype(options, job, config, checkpoints))
        if main_process:
            check_savable(job, config)
        history = train(job, config, checkpoints, options)
        if not main_process:
            return OK
        return save_and_compare(job, config, history, checkpoints, options)


def checkpoints_folder(output: Path) -> Path:
    """Where the checkpoints of an output directory are: `student.checkpoints` for `student`."""
    named = output if output.name.strip(".") else output.resolve()
    return named.with_name(f"{named.name}.checkpoints")


def check_nothing_is_lost(output: Path, checkpoints: Checkpoints, options) -> None:
    """Refuse to replace a stopped run or a student unless the options say so."""
    stopped = checkpoints.files()
    if options.overwrite or options.resume and stopped:
        return
    require(
        not stopped,
        f"{checkpoints.folder} holds a run that was stopped; "
        "--resume continues it, --overwrite starts afresh",
    )
    check_no_student(output)


def check_no_student(output: Path) -> None:
    """Refuse to replace a student, and say which."""
    student = student_in(output)
    choice = "choose another --output_dir, or add --overwrite to replace it"
    require(not student, f"{output} holds a student ({student}); {choice}")


def student_in(output: Path) -> str:
    """When and how the student in an output directory was made; nothing if there is none."""
    try:
        file = output / files.SETTINGS_FILE
        made = json.loads(file.read_text(encoding="utf-8"))
        when = f"{datetime.fromtimestamp(file.stat().st_mtime):%Y-%m-%d %H:%M}"
        return f"{when}, T = {made['temperature']}, {counted(made['epochs_finished'], 'epoch')}"
    except (OSError, ValueError, KeyError, TypeError):
        return "of unknown settings" if file.exists() else ""


# -- before training -------------------------------------------------------------------


def prepare(options) -> Job:
    """Check and load everything, what is quickest to check first."""
    device = find_device(options.device)
    check_inputs_stay(options.output_dir, options.model_dir, options.student, options.dataset_path)
    cached_text = options.on_policy_share == 0 or not options.cache_teacher
    require(cached_text, "--cache_teacher knows no text that is yet to be written; leave it out")
    bundled = options.model_dir is None
    teacher_name = str(models.BUNDLED_TEACHER) if bundled else options.model_dir
    block_length(options.block_size, teacher_name)
    tokenizer = models.load_tokenizer(teacher_name)
    student_name = choose_student(options, tokenizer)
    sources = [teacher_name] if student_name == "half" else [teacher_name, student_name]
    block_size = block_length(options.block_size, *sources)
    corpus = None if options.dataset_path is None else read_corpus(options)

    print(f"🔍 Loading teacher model from: {'the bundled teacher' if bundled else teacher_name}")
    teacher, _ = models.load_teacher(teacher_name, device)
    shown = f"{options.layers} of the teacher's layers" if options.layers else student_name
    print(f"🔍 Loading student model ({shown})...")
    if student_name == "half":  # refuses bad layers before a text is read
        layers = options.init if isinstance(options.init, list) else "spaced"
        layers_to_keep(teacher, options.layers, layers)
    for whose, name in zip(("teacher", "student"), sources, strict=False):
        if models.adapter_base(name):
            print(f"ℹ️ The {whose}'s LoRA adapter is merged into its weights")
    print(f"📚 Loading dataset from: {options.dataset_path or 'The Wind in the Willows'}")
    corpus = corpus or read_corpus(options)
    print("⚙️ Tokenizing dataset...")
    blocks = pack_without_warning(corpus, tokenizer, block_size)
    facts = {"teacher": "willows_kd's bundled teacher" if bundled else teacher_name}
    if student_name == "half":
        kept = layers_of_student(options, teacher, blocks.train)
        facts["student"] = f"layers {listed(kept)} of the teacher's {depth_of(teacher)}"
        make = functools.partial(student_from_teacher, teacher, init=kept)
    else:
        facts["student"] = student_name
        make = functools.partial(models.load_student, student_name, tokenizer, device)
    student = make()
    if len(tokenizer) > models.vocabulary_size(
        student
    ):  # tokens that only the teacher has would have no embedding
        tokenizer = models.load_tokenizer(student_name)
    facts |= {"corpus": corpus.provenance, "block_size": block_size}
    facts |= {"teacher_text": options.teacher_text}
    if limit := untrained_positions(student, block_size):
        print(f"⚠️ {limit}")
        facts["untrained_positions"] = limit
    if options.teacher_text:
        print("✍️ The teacher is writing the training text...")
        written = make_transfer_set(teacher, blocks.train, seed=options.seed)
        blocks = dataclasses.replace(blocks, train=written)
    return Job(teacher, student, make, tokenizer, corpus, blocks, facts)


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
            models.check_same_tokenizer(tokenizer, models.load_tokenizer(name))
        except models.HubError as error:
            raise InputError(f"{error}; --student half makes one from the teacher") from error
    return name


def layers_of_student(options, teacher, blocks: torch.Tensor) -> list[int]:
    """Which of its teacher's layers a student keeps: those given, or the best by measurement.

    Measured is on a few training blocks; ways to choose for which the teacher would read more
    than an epoch's blocks are left out.
    """
    if isinstance(options.init, list):
        return options.init
    depth, size = depth_of(teacher), len(layers_to_keep(teacher, options.layers, "spaced"))
    few = blocks[:: max(1, len(blocks) // BLOCKS_TO_CHOOSE)][:BLOCKS_TO_CHOOSE]
    affordable = [i for i in INITS if passes_to_choose(i, depth, size) * len(few) <= len(blocks)]
    inits = affordable if options.init in (None, "auto") else [options.init]
    table = choose_layers(teacher, size, few, inits)
    for init, kept in table["layers"].items():
        try:
            student_from_teacher(teacher, init=kept)
            break
        except InputError:  # there are families in which not every layer can be left out
            if init == table.index[-1]:
                raise
    starts = {name: number(value) for name, value in table["perplexity"].items()}
    print(f"✂️ The student keeps layers {listed(kept)} of the teacher's {depth} ({init})")
    print(f"   Its perplexity before training: {starts.pop(init)}")
    if starts:
        print(f"   Other choices: {', '.join(f'{name} {value}' for name, value in starts.items())}")
    return kept


def untrained_positions(student, block_size: int) -> str:
    """What follows from blocks shorter than a table of learned positions; else nothing."""
    positions, tokens = models.max_positions(student.config), student.get_input_embeddings()
    tables = [m for m in student.modules() if isinstance(m, nn.Embedding) and m is not tokens]
    # OPT and its like have two rows more than positions
    learned = any(positions in (len(t.weight), len(t.weight) - 2) for t in tables)
    if not learned or block_size >= positions:
        return ""
    return (
        f"Positions {block_size + 1} to {positions} of the student are not trained: "
        f"it is only good for texts of up to {block_size} tokens"
    )


def choose_dtype(options, job: Job, config: DistillConfig, checkpoints: Checkpoints) -> str:
    """The arithmetic of the steps: as given, that of a run that is resumed, or the faster one.

    Several processes would have to agree on what is faster: they train in float32.
    """
    if options.dtype != "auto" or models.distributed_state().num_processes > 1:
        return config.dtype
    if options.resume and (found := checkpoints.newest()):
        return found.run["settings"]["dtype"]
    seconds = {dtype: step_seconds(job, config, dtype) for dtype in DTYPES}
    if math.inf in seconds.values():
        return "float32"
    ratio = seconds["float32"] / seconds["bfloat16"]
    dtype = "bfloat16" if ratio >= FASTER else "float32"
    print(f"ℹ️ A step in bfloat16 has {ratio:.2f} times float32's speed here: using {dtype}")
    return dtype


def step_seconds(job: Job, config: DistillConfig, dtype: str) -> float:
    """Seconds of a step of a student that is thrown away; infinity if a step fails."""
    config = dataclasses.replace(config, dtype=dtype, epochs=1, gradient_accumulation_steps=1)
    some = job.blocks.train[: config.blocks_per_pass(job.blocks.block_size)]
    train, held_out = some.repeat(STEPS_TO_TIME, 1), job.blocks.validation[:1]
    ends = [0.0]

    def on_step(row: dict) -> None:
        ends.append(row["seconds"])
        if row["seconds"] > SECONDS_TO_TIME:
            raise EnoughError

    with contextlib.suppress(EnoughError, InputError, RuntimeError):
        few = Blocks(train, held_out, held_out, {})
        distill(job.teacher, job.make_student(), few, config, on_step=on_step, loss=ChunkedLoss)
    return min((b - a for a, b in itertools.pairwise(ends)), default=math.inf)


class EnoughError(Exception):
    """A step was timed that took long."""


def check_savable(job: Job, config: DistillConfig) -> None:
    """Try to save all but the weights before training, rather than after hours."""
    try:
        with tempfile.TemporaryDirectory() as folder, models.quiet_transformers():
            job.student.config.save_pretrained(folder)
            job.tokenizer.save_pretrained(folder)
            for text in texts(job, config, []).values():
                text.encode(*AS_BYTES)
    except Exception as error:
        # no room for temporary files, as Python or Rust says it: the output directory may have it
        if isinstance(error, OSError) or "(os error" in str(error):
            return
        name = type(job.student).__name__
        raise InputError(f"a {name} like this cannot be saved: {one_line(error)}") from error


# -- training, and after it ------------------------------------------------------------


def train(job: Job, config: DistillConfig, checkpoints: Checkpoints, options) -> list[dict]:
    """Distil; if Ctrl-C stops it, the student is that of the last finished epoch.

    Returns:
        the history of the finished epochs.
    """
    teacher = job.teacher
    if options.cache_teacher and config.alpha < 1:
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
        history = distill(teacher, job.student, job.blocks, config, loss=ChunkedLoss, **more)
    except Stopped as stopped:
        history = stopped.history
    if history and is_finished(history, config):
        return history
    ended = checkpoints.newest(ends_epoch=True)
    if ended is None:
        return []
    ended.load(job.student)
    return ended.history


def is_finished(history: list[dict], config: DistillConfig) -> bool:
    """Whether a history is that of all epochs."""
    return history[-1]["epoch"] == config.epochs and "average_loss" in history[-1]


def save_and_compare(job: Job, config, history: list[dict], checkpoints, options) -> int:
    """Save the student, measure it beside its teacher, and return the exit code."""
    resumable = "; add --resume to go on from where it stopped" if checkpoints.files() else ""
    if not history:
        print(f"stopped: nothing was saved{resumable}", file=sys.stderr)
        return STOPPED
    output = options.output_dir
    print(f"💾 Saving distilled student model to: {output}")
    extra = texts(job, config, history)
    models.save_model(job.student, job.tokenizer, output, extra, options.overwrite)
    print("✅ Distilled model saved successfully!")
    if not is_finished(history, config):
        done = f"epoch {history[-1]['epoch']} of {config.epochs}"
        print(f"stopped: the student is that of {done}{resumable}")
        return STOPPED
    print("📏 Comparing with the teacher...", flush=True)
    try:
        named = {"teacher": job.teacher, "student before": job.make_student()}
        table = compare(named | {"student": job.student}, job.blocks, job.tokenizer)
        with files.atomic_file(Path(output) / "README.md") as card:
            card.write_bytes(texts(job, config, history, table)["README.md"].encode(*AS_BYTES))
    except KeyboardInterrupt:
        failure, code = "stopped", STOPPED
    except Exception as error:  # whatever happens, the student is saved
        failure = one_line(error)
        code = CANNOT_WRITE if isinstance(error, OSError | WriteError) else FAILED
    else:
        print(f"\n{as_text(table)}")
        print(f"\nMeasured on the held-out test text of {job.corpus.title},")
        print(f"with {describe(table)}.")
        failure, code = "", OK
    if failure:
        print(f"{failure}: the student is trained and saved, but was not compared")
    checkpoints.clear()
    return code


def texts(job: Job, config: DistillConfig, history: list[dict], table=None) -> dict[str, str]:
    """What is saved beside the student: settings, history and model card."""
    settings = {
        **job.facts,
        "epochs_finished": history[-1]["epoch"] if history else 0,
        **dataclasses.asdict(config),
        "versions": {m.__name__: m.__version__ for m in (willows_kd, torch, transformers)},
    }
    return {
        files.SETTINGS_FILE: json.dumps(settings, indent=2) + "\n",
        "history.csv": pd.DataFrame(history).to_csv(index=False),
        "README.md": model_card(settings, table),
    }


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
        f"{counted(settings['epochs_finished'], 'epoch')} on {settings['corpus']}.",
        "",
        *(f"{settings[name]}.\n" for name in ["untrained_positions"] if name in settings),
        "## Settings",
        "",
        *(f"- {name}: {value}" for name, value in settings.items()),
        "",
    ]
    if table is not None:
        lines += ["## Measured on held-out text", "", as_markdown(table), ""]
        lines += [f"Speed and memory: {describe(table)}.", ""]
    return "\n".join(lines)


# -- what the commands share -----------------------------------------------------------


def block_length(block_size: int | None, *names: str) -> int:
    """Tokens in a block: as given, checked, or all that these models read, at most 1,024."""
    if block_size is None:
        positions = [models.max_positions(models.load_config(name)) for name in names]
        return min([LONGEST_BLOCK, *filter(None, positions)])
    for name in names:
        models.check_context(name, block_size)
    return block_size


def check_inputs_stay(output_dir: str, *inputs: str | None) -> None:
    """Refuse an output directory that would replace what the run reads."""
    output = Path(output_dir).resolve()
    for given in filter(None, inputs):
        path = Path(given).resolve()
        if path.exists() and output in (path, *path.parents):
            raise InputError(f"{given} lies in {output_dir}, which would be replaced")


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


def read_corpus(options) -> Corpus:
    """The corpus that the options name."""
    return load_corpus(options.dataset_path, options.text_column, options.encoding)


def pack_without_warning(corpus: Corpus, tokenizer, block_size: int) -> Blocks:
    """`pack` without its warning, which the command words in its own way."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return pack(corpus, tokenizer, block_size)


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


def as_text(table: pd.DataFrame) -> str:
    """The table of `compare` in plain text, at most 80 columns wide."""
    rows = [line.split("|")[1:-1] for line in as_markdown(table).splitlines()]
    names, _, *rows = [[cell.strip() for cell in row] for row in rows]
    cells = pd.DataFrame([row[1:] for row in rows], [row[0] for row in rows], names[1:])
    widths = [len(name) + 1 for name in cells]  # names may be of several words
    return cells.to_string(line_width=80, col_space=widths)


def describe(table: pd.DataFrame) -> str:
    """The machine that a table was measured on."""
    return f"{counted(table.attrs['threads'], 'thread')}, {table.attrs['machine']}"


def counted(count: int, noun: str) -> str:
    """A number of things: 1 epoch, 2 epochs."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def listed(numbers: list[int]) -> str:
    """Numbers as `--init` takes them: 0,3,5."""
    return ",".join(map(str, numbers))
