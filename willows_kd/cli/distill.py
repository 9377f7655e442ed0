"""What `willows-kd distill` does: prepare, train, compare, save."""

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
from willows_kd.compress.layers import choose_layers, depth_of, layers_to_keep, passes_to_choose
from willows_kd.config import INITS, DistillConfig
from willows_kd.corpus import Blocks, Corpus, load_corpus, pack
from willows_kd.cost import size_on_disk
from willows_kd.distillation import distill
from willows_kd.errors import InputError, WriteError
from willows_kd.evaluation import as_markdown, compare, number
from willows_kd.generation import write_blocks
from willows_kd.scale.checkpoints import Checkpoints
from willows_kd.scale.teacher_cache import cache_teacher
from willows_kd.students import student_from_teacher

GPT2_VOCABULARY = 50_257
BLOCKS_TO_CHOOSE = 8  # on which the ways to choose a student's layers are compared

# exit codes; bad input is 2
OK, FAILED, CANNOT_WRITE, STOPPED = 0, 1, 3, 130


def distill_to_directory(options, config: DistillConfig) -> int:
    """Run the whole job, with checkpoints beside the output directory, and return the exit code."""
    main_process = models.distributed_state().is_main_process
    if not main_process:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  one process speaks for all
    for name in ("model_dir", "student", "dataset_path", "output_dir", "text_column", "encoding"):
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
        return prepare_train_save(options, config, checkpoints)


def checkpoints_folder(output: Path) -> Path:
    """Where the checkpoints of an output directory are: `student.checkpoints` for `student`."""
    named = output if output.name.strip(".") else output.resolve()
    return named.with_name(f"{named.name}.checkpoints")


@dataclasses.dataclass
class Job:
    """What a run trains with, all of it checked."""

    teacher: torch.nn.Module
    student: torch.nn.Module
    tokenizer: object
    corpus: Corpus
    blocks: Blocks
    names: dict[str, str]  # of teacher and student, for the settings that are saved


def prepare_train_save(options, config: DistillConfig, checkpoints: Checkpoints) -> int:
    """Prepare, train, compare and save; returns the exit code."""
    job = prepare(options)
    hint_at_bfloat16(options, job.student.device)
    untrained = copy.deepcopy(job.student)
    history, epochs = train(job, config, checkpoints, options)
    if not models.distributed_state().is_main_process:
        return OK
    if not epochs:
        print(f"stopped: nothing was saved{how_to_resume(checkpoints)}", file=sys.stderr)
        return STOPPED
    finished = epochs == config.epochs
    table, failure, code = try_to_compare(job, untrained) if finished else (None, "", STOPPED)
    save(job, options, config, history, table)
    if not finished:
        stopped = f"stopped: the student is that of epoch {epochs} of {config.epochs}"
        print(f"{stopped}{how_to_resume(checkpoints)}")
        return code
    checkpoints.clear()
    if table is None:
        print(f"{failure}: the student is trained and saved, but was not compared")
        return code
    print(f"\n{as_markdown(table)}")
    print(f"\nMeasured on the held-out test text of {job.corpus.title}, with {describe(table)}.")
    return code


def prepare(options) -> Job:
    """Check and load everything, what is quickest to check first."""
    device = find_device(options.device)
    check_inputs_stay(options.output_dir, options.model_dir, options.student, options.dataset_path)
    bundled = options.model_dir is None
    teacher_name = str(models.BUNDLED_TEACHER) if bundled else options.model_dir
    models.check_context(teacher_name, options.block_size)
    for name in ("layers", "init"):
        if getattr(options, name) is not None and options.student not in (None, "half"):
            raise InputError(f"--{name} makes a student from the teacher; leave out --student")
    if options.student not in (None, "half"):
        check_student(options.student, options.block_size)
    if options.cache_teacher and options.text in ("student", "mix"):
        raise InputError(
            "--cache_teacher keeps what the teacher says of a text known beforehand; leave it out "
            f"with --text {options.text}"
        )
    corpus = None if options.dataset_path is None else read_corpus(options)

    print(f"🔍 Loading teacher model from: {'the bundled teacher' if bundled else teacher_name}")
    teacher, tokenizer = models.load_teacher(teacher_name, device)
    student_name = choose_student(options, tokenizer)
    print(f"🔍 Loading student model ({student_name})...")
    cut = student_name == "half" or (options.layers, options.init) != (None, None)
    if cut:
        numbers = options.init if isinstance(options.init, list) else "spaced"
        layers_to_keep(teacher, options.layers, numbers)  # refuses bad ones before a text is read
    else:
        student = load_student(student_name, teacher, tokenizer, device)
    for whose, name in (("teacher", teacher_name), ("student", student_name)):
        if models.adapter_base(name):
            print(f"ℹ️ The {whose}'s LoRA adapter is merged into its weights")
    print(f"📚 Loading dataset from: {options.dataset_path or 'The Wind in the Willows'}")
    corpus = corpus or read_corpus(options)
    print("⚙️ Tokenizing dataset...")
    blocks = pack_without_warning(corpus, tokenizer, options.block_size)
    if cut:
        student, kept = cut_student(options, teacher, blocks.train)
        student_name = f"layers {listed(kept)} of the teacher's {depth_of(teacher)}"
    check_savable(student)
    if options.text == "teacher":
        print("✍️ The teacher is writing the training text...")
        written = warnings_printed(write_blocks, teacher, blocks.train, seed=options.seed)
        blocks = dataclasses.replace(blocks, train=written)
    teacher_name = "willows_kd's bundled teacher" if bundled else teacher_name
    names = {"teacher": teacher_name, "student": student_name}
    return Job(teacher, student, tokenizer, corpus, blocks, names)


def train(
    job: Job, config: DistillConfig, checkpoints: Checkpoints, options
) -> tuple[list[dict], int]:
    """Distil; if Ctrl-C stops it, the student is that of the last epoch finished in this run.

    Returns:
        the history of the finished epochs, and how many those are.
    """
    print("🚀 Starting distillation training...")
    if job.corpus.skipped:
        print(f"⚠️ Skipping empty input batch... ({job.corpus.skipped} empty lines or rows)")
    sys.stdout.flush()
    kept: dict = {"epoch": 0}

    def on_step(row: dict) -> None:
        if "average_loss" in row:
            weights = job.student.state_dict().items()
            kept["weights"] = {k: v.detach().to("cpu", copy=True) for k, v in weights}
            kept["epoch"] = row["epoch"]
            tqdm.write(f"✅ Epoch {row['epoch']}: Average Loss {row['average_loss']:.4f}")

    cached = options.cache_teacher and config.alpha < 1
    teacher = warnings_printed(cache_teacher, job.teacher, job.blocks) if cached else job.teacher
    history = distill(
        teacher,
        job.student,
        job.blocks,
        config,
        on_step=on_step,
        checkpoints=checkpoints,
        resume=options.resume,
    )
    last = history[-1] if history else {}
    if last.get("epoch") == config.epochs and "average_loss" in last:
        return history, config.epochs
    if kept["epoch"]:
        job.student.load_state_dict(kept["weights"])
    return [row for row in history if row["epoch"] <= kept["epoch"]], kept["epoch"]


def try_to_compare(job: Job, untrained) -> tuple[pd.DataFrame | None, str, int]:
    """The table of teacher and student; if there is none, why, and the exit code for that.

    Whatever happens here, the student is trained, and is to be saved.
    """
    named = {"teacher": job.teacher, "student before": untrained, "student": job.student}
    try:
        return compare(named, job.blocks, job.tokenizer), "", OK
    except KeyboardInterrupt:
        return None, "stopped", STOPPED
    except Exception as error:
        code = CANNOT_WRITE if isinstance(error, OSError | WriteError) else FAILED
        return None, one_line(error), code


def save(job: Job, options, config: DistillConfig, history: list[dict], table) -> None:
    """Write the output directory: the student, its settings, its history and a model card."""
    settings = {
        **job.names,
        "corpus": job.corpus.provenance,
        "block_size": options.block_size,
        "text": options.text,
        "epochs_finished": history[-1]["epoch"],
        **dataclasses.asdict(config),
        "versions": {m.__name__: m.__version__ for m in (willows_kd, torch, transformers)},
    }
    extra = {
        files.SETTINGS_FILE: json.dumps(settings, indent=2) + "\n",
        "history.csv": pd.DataFrame(history).to_csv(index=False),
        "README.md": model_card(settings, table),
    }
    print(f"💾 Saving distilled student model to: {options.output_dir}")
    models.save_model(job.student, job.tokenizer, options.output_dir, extra, options.overwrite)
    print("✅ Distilled model saved successfully!")


def check_inputs_stay(output_dir: str, *inputs: str | None) -> None:
    """Refuse an output directory that would replace what the run reads."""
    output = Path(output_dir).resolve()
    for given in inputs:
        path = Path(given).resolve() if given else None
        if path and path.exists() and output in (path, *path.parents):
            raise InputError(f"{given} lies in {output_dir}, which would be replaced")


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
    """What to call the student that is to be loaded or made."""
    if options.layers is not None:
        return f"{options.layers} of the teacher's layers"
    if options.init is not None:
        return "half" if isinstance(options.init, str) else f"layers {listed(options.init)}"
    name = options.student or ("distilgpt2" if len(tokenizer) == GPT2_VOCABULARY else "half")
    if name != "half":
        if options.student is None:  # others were checked before the teacher was loaded
            check_student(name, options.block_size)
        models.check_same_tokenizer(tokenizer, models.load_tokenizer(name))
    return name


def check_student(name: str, block_size: int) -> None:
    """Refuse a student that is not there, or takes no blocks of this length."""
    try:
        models.check_context(name, block_size)
    except models.HubError as error:
        raise InputError(f"{error}; --student half makes one from the teacher") from error


def cut_student(options, teacher, blocks: torch.Tensor) -> tuple[torch.nn.Module, list[int]]:
    """A student of the teacher's layers, and which these are.

    Unless told otherwise, these are the best by measurement on a few training blocks. Ways
    to choose for which the teacher would read more than an epoch's blocks are left out.
    """
    if isinstance(options.init, list):
        return student_from_teacher(teacher, options.layers, options.init), options.init
    depth, size = depth_of(teacher), len(layers_to_keep(teacher, options.layers, "spaced"))
    few = blocks[:: max(1, len(blocks) // BLOCKS_TO_CHOOSE)][:BLOCKS_TO_CHOOSE]
    affordable = [i for i in INITS if passes_to_choose(i, depth, size) * len(few) <= len(blocks)]
    inits = affordable if options.init in (None, "auto") else [options.init]
    table = choose_layers(teacher, size, few, inits)
    for init, kept in table["layers"].items():
        try:
            student = student_from_teacher(teacher, init=kept)
            break
        except InputError:  # there are families in which not every layer can be left out
            if init == table.index[-1]:
                raise
    starts = {name: number(value) for name, value in table["perplexity"].items()}
    start = f"perplexity {starts.pop(init)} at the start"
    others = ", ".join(f"{name} {value}" for name, value in starts.items())
    print(f"✂️ Layers {listed(kept)} of {depth} ({init}): {start}{'; ' + others if others else ''}")
    return student, kept


def listed(numbers: list[int]) -> str:
    """Numbers as `--init` takes them: 0,3,5."""
    return ",".join(map(str, numbers))


def load_student(name: str, teacher, tokenizer, device):
    """The student of that name, checked to share the teacher's vocabulary."""
    student = models.load_model(name, device)
    small, large = sorted((teacher, student), key=lambda model: model.config.vocab_size)
    heads = teacher.config.vocab_size, student.config.vocab_size
    if heads[0] != heads[1] and min(heads) >= len(tokenizer):
        # the tokenizers are the same, so what the larger head has beyond the smaller is no token
        large.resize_token_embeddings(small.config.vocab_size)
        print(f"ℹ️ Heads of {heads[0]} and {heads[1]} logits: the first {min(heads)} are used")
    models.common_vocabulary(teacher, student)
    return student


def check_savable(student) -> None:
    """Try to save a student before it is trained, rather than after hours."""
    try:
        size_on_disk(student)
    except OSError:  # no room for temporary files: the output directory may have it
        pass
    except Exception as error:
        name = type(student).__name__
        raise InputError(f"a {name} like this cannot be saved: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """What an error says, in one line of at most 200 characters."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def hint_at_bfloat16(options, device: torch.device) -> None:
    """Print that bfloat16 would be faster, if this CPU has instructions for it and nobody chose."""
    can = getattr(torch.cpu, "get_capabilities", dict)()  # newer versions of PyTorch have it
    fast = device.type == "cpu" and (can.get("avx512_bf16") or can.get("amx_bf16"))
    if options.dtype is None and fast:
        print("ℹ️ This CPU has bfloat16 instructions: --dtype bfloat16 is usually faster here")


def read_corpus(options) -> Corpus:
    """The corpus that the options name."""
    return load_corpus(options.dataset_path, options.text_column, options.encoding)


def pack_without_warning(corpus: Corpus, tokenizer, block_size: int):
    """`pack` without its warning, which the command words in its own way."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return pack(corpus, tokenizer, block_size)


def warnings_printed(function, *arguments, **options):
    """Call a function, with its warnings as lines like the others."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        result = function(*arguments, **options)
    for warning in said:
        print(f"⚠️ {warning.message}")
    return result


def how_to_resume(checkpoints: Checkpoints) -> str:
    """What to do next, for somebody who stopped a run."""
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
