"""Weights and tokenizers: loading a teacher or a student, what both share, and saving."""

import contextlib
import copy
import csv
import dataclasses
import functools
import hashlib
import json
import logging
import os
from pathlib import Path

import huggingface_hub
import pandas as pd
import torch
import transformers
from accelerate import PartialState
from huggingface_hub.utils import get_session
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from willows_kd.errors import InputError, is_integer, require, type_name
from willows_kd.files import atomic_directory, check_output

ASSETS = Path(__file__).parent / "assets"
BUNDLED_TEACHER = ASSETS / "teacher"
BUNDLED = ("base", "teacher", "student", "student_hard_labels")
TOKENIZER_FILES = ("tokenizer.json", "vocab.*", "*.model")
PADDING_LIMIT = 128  # heads are padded to multiples of 8, 64 or 128 for speed, never by more
# what `transformers` calls a model's cache: past_key_values, in later versions cache
CACHE = next(field.name for field in dataclasses.fields(CausalLMOutputWithPast)[2:])


class HubError(InputError):
    """A name is no local directory, and the model hub did not give it."""


def best_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def distributed_state() -> PartialState:
    """The processes that a launcher started, joined over their GPUs, or over the CPU without.

    Accelerate itself joins processes on CPUs only where it is told to.
    """
    launched = "LOCAL_RANK" in os.environ
    return PartialState(cpu=launched and not torch.cuda.is_available())


# -- loading ---------------------------------------------------------------------------


def load_teacher(name_or_path=None, device=None) -> tuple[PreTrainedModel, object]:
    """A teacher and its tokenizer: in eval mode, in float32, ready to be asked.

    Args:
        name_or_path: a directory, or a name on the model hub, of any causal language
            model (``"gpt2"``); None for the tiny GPT-2 that ships with the package.
        device: where it goes; None for the GPU where there is one.

    Raises:
        InputError: it is not there, is no causal language model, is damaged, or has
            only pickled weights, which are never loaded.
    """
    name_or_path = BUNDLED_TEACHER if name_or_path is None else name_or_path
    tokenizer = load_tokenizer(name_or_path)
    return load_model(name_or_path, device).eval(), tokenizer


def load_student(name_or_path, teacher_tokenizer, device=None) -> PreTrainedModel:
    """A student made elsewhere, such as ``"distilgpt2"``.

    Raises:
        InputError: as `load_teacher`; or the student's tokenizer is not the teacher's.
    """
    check_same_tokenizer(teacher_tokenizer, load_tokenizer(name_or_path))
    return load_model(name_or_path, device)


def load_bundled(name: str = "teacher", device=None) -> PreTrainedModel:
    """A model that ships with the package, in eval mode and float32.

    Args:
        name: ``"base"``, the teacher before it was fine-tuned on the book;
            ``"teacher"``; ``"student"``, trained on the teacher's soft labels alone; or
            ``"student_hard_labels"``, trained on the book alone.
        device: where it goes; None for the GPU if there is one.
    """
    return load_model(bundled(name), device).eval()


def bundled_history(name: str = "student") -> list[dict]:
    """How a bundled student was trained: the rows that `distill` returned."""
    with (bundled(name) / "history.csv").open(encoding="utf-8", newline="") as rows:
        # not by pandas, whose floats may differ in their last digit
        return [
            {column: json.loads(value) if value else None for column, value in row.items()}
            for row in csv.DictReader(rows)
        ]


def stored_results(name: str) -> pd.DataFrame:
    """Results that take too long for a notebook: a row a training run, as a benchmark stored it.

    Args:
        name: "positions", the loss by position of the students after each stage of their recipe;
            "transfer_sets" or "temperatures", by `benchmarks/what_helps.py`; "ways", or
            "writing" with a row for each sampling temperature, by `benchmarks/ways.py`;
            "inits", students of other layers, by `benchmarks/inits.py`.
    """
    stored = {file.stem: file for file in sorted((ASSETS / "results").glob("*.csv"))}
    require(name in stored, f"no stored results are called {name!r}; there are {', '.join(stored)}")
    return pd.read_csv(stored[name])


def bundled(name: str) -> Path:
    """The directory of a bundled model.

    Raises:
        InputError: there is none of that name.
    """
    accepted = ", ".join(BUNDLED)
    require(name in BUNDLED, f"no bundled model is called {name!r}; there are {accepted}")
    return ASSETS / name


def load_tokenizer(name_or_path):
    """The tokenizer of a directory or hub name."""
    check_model(name_or_path)
    path = Path(name_or_path)
    if path.is_dir() and not any(any(path.glob(pattern)) for pattern in TOKENIZER_FILES):
        if base := adapter_base(name_or_path):
            return load_tokenizer(base)
        raise InputError(f"{path} has no tokenizer (no {' or '.join(TOKENIZER_FILES)})")
    with (
        loading_errors_as_input_errors(name_or_path, "has no tokenizer that can be read"),
        quiet_transformers(),
    ):
        return AutoTokenizer.from_pretrained(
            name_or_path, trust_remote_code=False, local_files_only=not may_ask_hub(name_or_path)
        )


def load_model(name_or_path, device=None) -> PreTrainedModel:
    """A causal language model in float32, from safetensors only, with no remote code.

    A directory with a LoRA adapter is loaded onto its base model and merged.
    """
    check_model(name_or_path)
    if base := adapter_base(name_or_path):
        return load_merged(base, name_or_path, device)
    with loading_errors_as_input_errors(name_or_path, "cannot be loaded"), quiet_transformers():
        model, info = AutoModelForCausalLM.from_pretrained(
            name_or_path,
            dtype=torch.float32,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            trust_remote_code=False,
            local_files_only=not may_ask_hub(name_or_path),
            output_loading_info=True,
        )
    if missing := sorted(info["missing_keys"]):
        raise InputError(f"{name_or_path} lacks weights ({', '.join(missing[:3])} ...)")
    if mismatched := sorted(key for key, *_ in info["mismatched_keys"]):
        raise InputError(
            f"{name_or_path} has weights that do not fit its config ({', '.join(mismatched[:3])})"
        )
    return model.to(device or best_device())


def load_merged(base: str, adapter, device=None) -> PreTrainedModel:
    """A base model with a directory's LoRA adapter merged into its weights."""
    try:
        from peft import PeftModel
    except ImportError:
        raise InputError(f"{adapter} holds a LoRA adapter; to load it, pip install peft") from None
    found = (Path(adapter) / "adapter_model.safetensors").is_file()
    require(found, f"{adapter} holds no adapter weights (no adapter_model.safetensors)")
    model = load_model(base, device)
    with loading_errors_as_input_errors(adapter, "cannot be loaded"), quiet_transformers():
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return merged.requires_grad_(True)  # PEFT froze the base model


def adapter_base(name_or_path) -> str | None:
    """The model that a directory's LoRA adapter belongs to; None if it holds no adapter."""
    file = Path(name_or_path) / "adapter_config.json"
    if not file.is_file() or (file.parent / "config.json").is_file():
        return None
    try:
        base = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError, OSError):
        base = None
    named = isinstance(base, str) and base and Path(base).absolute() != file.parent.absolute()
    require(named, f"{file} is damaged: it does not name the model it belongs to")
    return base


def check_model(name_or_path) -> None:
    """Refuse a local directory that cannot hold a causal language model, before loading it."""
    named = isinstance(name_or_path, str | os.PathLike) and str(name_or_path).strip()
    require(named, f"the model is {name_or_path!r}; give a directory or a name on the hub")
    path = Path(name_or_path)
    if not path.exists():
        if looks_like_a_path(str(name_or_path)):
            raise InputError(f"model directory {path} does not exist")
        return  # a name on the hub: `transformers` will tell
    if not path.is_dir():
        raise InputError(f"{path} is a file; give the directory that holds a model's config.json")
    if adapter_base(path):
        return
    config_file = path / "config.json"
    if not config_file.is_file():
        raise InputError(f"{path} is not a model: it holds no config.json")
    try:
        architectures = json.loads(config_file.read_text()).get("architectures") or []
        architectures = ["".join(name) for name in architectures]
    except (ValueError, AttributeError, TypeError, OSError):
        raise InputError(f"{config_file} is damaged: it holds no JSON object") from None
    if architectures and not any("CausalLM" in a or "LMHead" in a for a in architectures):
        raise InputError(
            f"{path} is a {architectures[0]}; a teacher or student must be a causal language model"
        )
    if not any(path.glob("*.safetensors")):
        for export in [*path.glob("model.onnx"), *path.glob("model.gguf")]:
            raise InputError(f"{export} is an export; give the model that it was made from")
        if any(path.glob("*.bin")):
            raise InputError(
                f"{path} holds only pickled weights, which can run code when loaded; if you trust "
                "them, convert them once: AutoModelForCausalLM.from_pretrained(DIR)"
                ".save_pretrained(NEW_DIR)"
            )
        raise InputError(f"{path} holds no weights (no .safetensors file)")


def load_config(name_or_path):
    """The config of a model, without its weights; an adapter's is that of its base."""
    check_model(name_or_path)
    name_or_path = adapter_base(name_or_path) or name_or_path
    with (
        loading_errors_as_input_errors(name_or_path, "has no config that can be read"),
        quiet_transformers(),
    ):
        return AutoConfig.from_pretrained(
            name_or_path, trust_remote_code=False, local_files_only=not may_ask_hub(name_or_path)
        )


def check_context(name_or_path, block_size: int) -> None:
    """Refuse blocks longer than the positions that a model has."""
    config = load_config(name_or_path)
    positions = max_positions(config)
    if block_size < 2 or positions and block_size > positions:
        raise InputError(f"block_size is {block_size}; this model takes 2 to {positions or 'any'}")


def max_positions(config) -> int | None:
    """How many tokens a model reads at once; None if its config sets no limit."""
    config = config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")
    found = [getattr(config, name, None) for name in names]
    return next((value for value in found if is_integer(value)), None)


def check_positions(model, blocks: torch.Tensor, name: str) -> None:
    """Require blocks, shape (blocks, block_size), that a model has positions for."""
    longest, given = max_positions(model.config), blocks.shape[1]
    require(
        longest is None or given <= longest,
        f"blocks have {given} tokens, the {name} takes at most {longest}; "
        "pack the corpus again with that block_size",
    )


def looks_like_a_path(name: str) -> bool:
    """Whether a name means a place on disk: hub names are NAME or OWNER/NAME."""
    return name.startswith((".", "/", "~", "\\")) or name.count("/") > 1 or "\\" in name


def may_ask_hub(name_or_path) -> bool:
    """Whether a name is one to ask the hub for, and the hub answers.

    One short question, where `transformers` would try for half a minute: without a
    connection, what is in its cache is found at once, and what is not is refused.
    """
    if Path(name_or_path).exists():
        return False
    try:
        ask_hub(str(name_or_path))
    except Exception:  # whatever the HTTP client calls it, there is no hub
        return False
    return True


@functools.lru_cache  # an answer is kept, and an error is not: the hub may come back
def ask_hub(name: str) -> None:
    """Ask the hub for a name; whatever it answers, it is there."""
    get_session().head(huggingface_hub.hf_hub_url(name, "config.json"), timeout=5)


@contextlib.contextmanager
def loading_errors_as_input_errors(name_or_path, what: str):
    """Turn what `transformers` raises for a bad model into one line."""
    try:
        yield
    except (InputError, KeyboardInterrupt):
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if not Path(name_or_path).exists() and isinstance(error, OSError):
            raise HubError(
                f"{name_or_path} is no local directory and the model hub did not give it "
                f"({hub_answer(error) or 'no connection, or no such name'})"
            ) from error
        raise InputError(f"{name_or_path} {what}: {reason[:200]}") from error


def hub_answer(error: BaseException | None) -> str | None:
    """What a hub answered that did not give a file, as far as its status tells."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 404):
            return f"it answered {status}: no such name, or one to log in for"
        if status:
            return f"it answered {status}"
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def eval_mode(*models):
    """Models in eval mode, and afterwards each of their modules in the mode it was in."""
    given = [model for model in models if model is not None]
    modes = [(module, module.training) for model in given for module in model.modules()]
    for model in given:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def dropout_set_to(model, p: float):
    """Every `nn.Dropout` of a model at one probability, and afterwards as it was."""
    layers = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    before = [layer.p for layer in layers]
    for layer in layers:
        layer.p = p
    try:
        yield
    finally:
        for layer, value in zip(layers, before, strict=True):
            layer.p = value


@contextlib.contextmanager
def quiet_transformers():
    """No progress bars or notices for what takes a moment; errors are raised, not logged."""
    library = transformers.utils.logging
    verbosity, bars = library.get_verbosity(), library.is_progress_bar_enabled()
    library.set_verbosity(logging.ERROR)
    library.disable_progress_bar()
    try:
        yield
    finally:
        library.set_verbosity(verbosity)
        if bars:
            library.enable_progress_bar()


def merge_adapters(model):
    """A model with its LoRA adapters, and parametrizations such as fake quantization, merged
    into its weights: a copy, if it has any."""
    if hasattr(model, "merge_and_unload"):
        model = copy.deepcopy(model).merge_and_unload()
    if any(map(parametrize.is_parametrized, model.modules())):
        model = copy.deepcopy(model)
        for module in filter(parametrize.is_parametrized, list(model.modules())):
            merge_parametrizations(module)
    return model


@torch.no_grad()
def merge_parametrizations(module: nn.Module) -> None:
    """Make a module's parametrized weights, as they are now, its weights; ties stay.

    `parametrize.remove_parametrizations` would change the class, which copies share.
    """
    lists = module.parametrizations
    for name, weight in {name: part() for name, part in lists.items()}.items():
        lists[name].original.copy_(weight)
    module.__class__ = module.__class__.__bases__[0]
    del module.parametrizations
    for name, part in lists.items():
        setattr(module, name, part.original)


def require_model(model, name: str) -> None:
    """Require a language model: not the pair that `load_teacher` returns, not a headless one."""
    is_model = isinstance(model, nn.Module) and hasattr(model, "config")
    require(
        is_model, f"{name} is {type_name(model)}; give a model: teacher, tokenizer = load_teacher()"
    )
    headless = isinstance(model, PreTrainedModel) and not model.can_generate()
    require(
        not headless,
        f"{name} is {type_name(model)}, which predicts no tokens; "
        "load it with AutoModelForCausalLM",
    )


# -- one vocabulary --------------------------------------------------------------------


def check_same_tokenizer(teacher_tokenizer, student_tokenizer) -> None:
    """Refuse a student that reads text otherwise than its teacher.

    Raises:
        InputError: sizes differ (both are named), or the same text gets other ids.
    """
    is_tokenizer = hasattr(teacher_tokenizer, "get_vocab")
    require(is_tokenizer, f"tokenizer is {type_name(teacher_tokenizer)}; give that of the teacher")
    sizes = len(teacher_tokenizer), len(student_tokenizer)
    if sizes[0] != sizes[1]:
        raise InputError(
            f"teacher and student must share a vocabulary: the teacher's has {sizes[0]} tokens, "
            f"the student's {sizes[1]}"
        )
    if teacher_tokenizer.get_vocab() != student_tokenizer.get_vocab():
        raise InputError(
            f"teacher and student must share a vocabulary: both have {sizes[0]} tokens, "
            "but they give different ids to the same text"
        )


def vocabulary_size(model) -> int:
    """How many logits a model gives for each token."""
    return model.config.get_text_config(decoder=True).vocab_size


def common_vocabulary(teacher: PreTrainedModel, student: PreTrainedModel) -> int:
    """How many logits teacher and student share.

    The larger of two heads may be padded to a round number: what is beyond the
    smaller one is then no token, and is left out of every loss.

    Raises:
        InputError: the sizes differ by more than padding explains.
    """
    sizes = vocabulary_size(teacher), vocabulary_size(student)
    if sizes[0] != sizes[1] and (max(sizes) % 8 or abs(sizes[0] - sizes[1]) >= PADDING_LIMIT):
        raise InputError(
            f"teacher and student must share a vocabulary: the teacher predicts {sizes[0]} tokens, "
            f"the student {sizes[1]}"
        )
    return min(sizes)


# -- from hidden states to logits --------------------------------------------------------


def hidden_states(model, ids: torch.Tensor) -> torch.Tensor:
    """What a model's output weights are applied to, shape (blocks, block_size, width)."""
    return model.base_model(ids, use_cache=False).last_hidden_state


def fingerprint(model) -> str:
    """A name for a model's weights and settings: another as soon as any of them is."""
    config = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    made = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(merge_adapters(model).state_dict().items()):
        made.update(name.encode())
        if hasattr(tensor, "full_tensor"):  # a share of one, of a sharded teacher
            tensor = tensor.full_tensor()
        made.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return made.hexdigest()[:24]


# -- saving ------------------------------------------------------------------


def save_model(
    model, tokenizer, directory, extra: dict[str, str] | None = None, overwrite: bool = False
) -> None:
    """Write a directory that `transformers` loads, whole or not at all.

    Args:
        model, tokenizer: what to save; LoRA adapters are merged into the weights.
        directory: where. It may be new, empty, or an earlier output of ours.
        extra: further text files, by name.
        overwrite: replace a directory even if it is not ours.

    Raises:
        InputError: the directory holds other files, or (`WriteError`) cannot be written.
    """
    directory = Path(directory)
    check_output(directory, overwrite)
    with atomic_directory(directory) as partial, quiet_transformers():
        merge_adapters(model).save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        for name, text in (extra or {}).items():
            (partial / name).write_text(text, encoding="utf-8")
