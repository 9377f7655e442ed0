"""Weights and tokenizers: a teacher, and the student that is to become like it."""

import contextlib
import copy
import csv
import hashlib
import json
import logging
import math
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import huggingface_hub
import pandas as pd
import torch
import transformers
from accelerate import PartialState
from huggingface_hub.utils import get_session
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from willows_kd.errors import InputError, is_integer, require, type_name
from willows_kd.files import atomic_directory, check_output
from willows_kd.pruning import masked, parts_to_keep, pruned

ASSETS = Path(__file__).parent / "assets"
BUNDLED_TEACHER = ASSETS / "teacher"
BUNDLED = ("base", "teacher", "student", "student_hard_labels")
TOKENIZER_FILES = ("tokenizer.json", "vocab.*", "*.model")
PADDING_LIMIT = 128  # heads are padded to multiples of 8, 64 or 128 for speed, never by more


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
    with open(bundled(name) / "history.csv", encoding="utf-8", newline="") as file:
        return [
            {key: number_or_none(value) for key, value in row.items()}
            for row in csv.DictReader(file)
        ]


def stored_results(name: str) -> pd.DataFrame:
    """Results that take too long for a notebook: a row a training run, as a benchmark stored it.

    Args:
        name: "transfer_sets" or "temperatures", both by `benchmarks/what_helps.py`.
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


def number_or_none(text: str) -> float | int | None:
    """A number as CSV holds it; None if it is missing or not a number."""
    value = float(text or "nan")
    return None if math.isnan(value) else int(text) if text.isdigit() else value


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
        return PeftModel.from_pretrained(model, adapter).merge_and_unload()


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
        if any(path.glob("*.bin")):
            raise InputError(
                f"{path} holds only pickled weights, which can run code when loaded; if you trust "
                "them, convert them once: AutoModelForCausalLM.from_pretrained(DIR)"
                ".save_pretrained(NEW_DIR)"
            )
        raise InputError(f"{path} holds no weights (no .safetensors file)")


def check_context(name_or_path, block_size: int) -> None:
    """Refuse blocks longer than the positions that a model has."""
    check_model(name_or_path)
    name_or_path = adapter_base(name_or_path) or name_or_path
    with (
        loading_errors_as_input_errors(name_or_path, "has no config that can be read"),
        quiet_transformers(),
    ):
        config = AutoConfig.from_pretrained(
            name_or_path, trust_remote_code=False, local_files_only=not may_ask_hub(name_or_path)
        )
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
        get_session().head(huggingface_hub.hf_hub_url(str(name_or_path), "config.json"), timeout=5)
    except Exception:  # whatever the HTTP client calls it, there is no hub
        return False
    return True


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
    """Models in eval mode, and afterwards each in the mode it was in."""
    modes = [(model, model.training) for model in models if model is not None]
    for model, _ in modes:
        model.eval()
    try:
        yield
    finally:
        for model, training in modes:
            model.train(training)


@contextlib.contextmanager
def dropout_set_to(model, p: float):
    """All dropout of a model at one probability, and afterwards as it was.

    Some families have no `nn.Dropout` but read a number when they are called, from an
    attribute of a layer (OPT, XGLM) or from the config: these numbers are set too.
    Whole layers are never dropped (`layerdrop`).
    """
    before = []
    configs = (module.config for module in model.modules() if hasattr(module, "config"))
    owners = [*model.modules(), *(part for config in configs for part in configs_of(config))]
    for settings in map(vars, {id(owner): owner for owner in owners}.values()):
        is_layer = "p" in settings and "inplace" in settings  # an nn.Dropout of any shape
        for name in ["p"] if is_layer else [n for n in settings if "drop" in n.lower()]:
            if isinstance(settings[name], float | int) and not isinstance(settings[name], bool):
                before.append((settings, name, settings[name]))
                settings[name] = 0.0 if "layerdrop" in name.lower().replace("_", "") else p
    try:
        yield
    finally:
        for settings, name, value in reversed(before):
            settings[name] = value


def configs_of(config):
    """A config and the configs inside it."""
    yield config
    for part in vars(config).values():
        if isinstance(part, transformers.PreTrainedConfig):
            yield from configs_of(part)


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


# -- making a student ------------------------------------------------------------------


def student_from_teacher(
    teacher: PreTrainedModel,
    layers: int | None = None,
    init: str | Sequence[int] = "spaced",
    seed: int = 0,
    heads: Sequence[Sequence[int]] | torch.Tensor | None = None,
    feed_forward: Sequence[Sequence[int]] | torch.Tensor | None = None,
) -> PreTrainedModel:
    """A student with fewer layers or narrower ones, in float32, on the teacher's vocabulary.

    A student that copies layers is proven: on a short input it must give the logits of
    the teacher with its other layers skipped and its other heads and units at zero. The
    residual stream keeps its width, so hidden states keep the teacher's shape. The student
    is float32 even if the teacher is in half precision, in which training soon breaks
    down. LoRA adapters are merged first.

    Args:
        teacher: any decoder that `transformers` builds from a config.
        layers: how many; None for half of the teacher's.
        init: ``"spaced"`` copies evenly spaced layers, the first and the last among
            them, with embeddings and head, as DistilGPT2 was initialised (Sanh et al.
            2019, section 3); ``"first"`` copies the first layers instead; a list of
            layer numbers, counted from 0 and rising, copies these; ``"random"`` copies
            nothing.
        seed: for ``"random"``.
        heads, feed_forward: the numbers of the heads and feed-forward units to keep, for
            each layer of the teacher, shape (layers, kept), such as those of greatest
            `importance`; None for all. Grouped heads are numbered by group, and GPT-2's
            heads cannot be pruned: its config ties their size to their number.

    Raises:
        InputError: `layers` is not between 1 and the teacher's, `init` is unknown, `heads`
            or `feed_forward` are no such numbers, or the teacher's family cannot be cut so:
            a setting of it may be in the way.
    """
    require_model(teacher, "teacher")
    teacher = merge_adapters(teacher)
    depth = len(teacher.get_submodule(layer_stack(teacher)))
    kept = layers_to_keep(depth, layers, init)
    parts = parts_to_keep(teacher, heads=heads, feed_forward=feed_forward)
    with cutting_errors_as_input_errors(teacher.config.model_type, kept):
        teacher = narrowed(teacher, parts)
        config = config_of_layers(teacher.config, depth, kept)
        student = untrained(config, teacher, torch.float32, seed)
        if not (isinstance(init, str) and init == "random"):
            copy_layers(teacher, student, kept)
    return student


def untrained(config, teacher, dtype: torch.dtype, seed: int = 0) -> PreTrainedModel:
    """A model of a config with random weights, else set up as the teacher is."""
    with torch.random.fork_rng(), quiet_transformers():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=teacher.config._attn_implementation
        ).to(teacher.device)
    model.generation_config = copy.deepcopy(teacher.generation_config)
    return model


def narrowed(teacher, parts: dict[str, torch.Tensor]) -> PreTrainedModel:
    """A teacher without its other heads and units, proven; the teacher itself if it keeps all."""
    if not parts:
        return teacher
    config, weights = pruned(teacher, parts)
    narrow = untrained(config, teacher, teacher.dtype)
    load_weights(narrow, weights)
    check_student(teacher, narrow, masked(teacher, parts), "the other heads and units")
    return narrow


@contextlib.contextmanager
def cutting_errors_as_input_errors(family: str, kept: list[int]):
    """Turn whatever a family's code makes of fewer layers into one line."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()).partition(". ")[0][:200] or type_name(error)
        raise InputError(
            f"no student of layers {kept} of this {family} teacher: {reason}"
        ) from error


def layers_to_keep(depth: int, layers: int | None, init: str | Sequence[int]) -> list[int]:
    """Which of a teacher's layers a student takes, counted from 0.

    Raises:
        InputError: there are not so many, or `init` is none of the accepted values.
    """
    if not isinstance(init, str) and isinstance(init, Iterable):
        kept = list(init)
        rising = all(is_integer(i, 0) and i < depth for i in kept) and kept == sorted(set(kept))
        require(
            kept and rising and layers in (None, len(kept)),
            f"init is {kept}; layer numbers must rise and lie between 0 and {depth - 1}"
            + ("" if layers is None else f", and be as many as layers, {layers}"),
        )
        return [int(i) for i in kept]
    known = isinstance(init, str) and init in ("spaced", "first", "random")
    require(known, f"init is {init!r}; it must be spaced, first, random or a list of layer numbers")
    layers = max(1, depth // 2) if layers is None else layers
    fits = is_integer(layers) and layers <= depth
    require(fits, f"layers is {layers!r}; this teacher allows 1 to {depth}")
    return list(range(layers)) if init == "first" else evenly_spaced(depth, int(layers))


def config_of_layers(config, depth: int, kept: list[int]):
    """A model's config for only some of its layers, as a saved student's would be read.

    Every setting that holds something for each layer is cut to the layers that stay,
    and rules that count layers are restated so that each layer stays what it was.
    """
    text = config.get_text_config(decoder=True)
    settings = text.to_dict()
    if "decoder_sparse_step" in settings:  # mixtures of experts in every so many layers
        step, dense = settings["decoder_sparse_step"], settings["mlp_only_layers"] or []
        dense = [i for i in range(depth) if i in dense or (i + 1) % step]
        settings |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
    if is_integer(settings.get("first_k_dense_replace"), 0):
        settings["first_k_dense_replace"] = sum(i < settings["first_k_dense_replace"] for i in kept)
    if shared := settings.get("num_kv_shared_layers"):  # the last ones use earlier keys and values
        settings["num_kv_shared_layers"] = sum(i >= depth - shared for i in kept)
    for name in [name for name in settings if name.endswith("_period")]:
        offset = name.removesuffix("period") + "offset"
        if offset in settings:
            settings |= zip(
                (name, offset), same_rhythm(settings[name], settings[offset], kept), strict=True
            )
    for name, value in settings.items():
        settings[name] = setting_of_layers(name, value, depth, kept)
    if "attention_layers" in settings:  # GPT-Neo reads these from another setting
        settings["attention_types"] = [[[name], 1] for name in settings["attention_layers"]]
    settings[depth_name(text)] = len(kept)
    cut = type(text).from_dict(settings)
    if text is config:
        return cut
    config = copy.deepcopy(config)  # of a model that sees or hears, too
    name = next(name for name, part in vars(config).items() if type(part) is type(text))
    setattr(config, name, cut)
    return config


def depth_name(config) -> str:
    """What a family calls its decoder's number of layers, such as GPT-2's `n_layer`."""
    usual = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    names = ("decoder_layers", "num_decoder_layers")
    return next((name for name in names if name in vars(config)), usual)


def setting_of_layers(name: str, value, depth: int, kept: list[int]):
    """A setting as it is for some layers: cut if it has a value per layer, renumbered if it
    names layers, else as it is."""
    if name.endswith(("token_id", "limit", "architectures")) or not value:
        return value
    per_layer = "layer" in name or "_id" in name or "indices" in name
    if isinstance(value, dict) and all(str(key).isdigit() for key in value):
        return {kept.index(int(key)): v for key, v in value.items() if int(key) in kept}
    if not isinstance(value, list | tuple):
        return value
    numbers = per_layer and all(is_integer(i, 0) and i < depth for i in value)
    if numbers and list(value) == sorted(set(value)):
        return [kept.index(i) for i in value if i in kept]
    if len(value) == depth or per_layer and len(value) > depth:
        return [value[i] for i in kept]
    return value


def same_rhythm(period: int, offset: int, kept: list[int]) -> tuple[int, int]:
    """Period and offset by which the kept layers, numbered anew, are what they were."""
    chosen = [i % period == offset for i in kept]
    for p in range(1, len(kept) + 2):
        for o in range(p):
            if [i % p == o for i in range(len(kept))] == chosen:
                return p, o
    return period, offset


def check_layers(teacher, student, kept: list[int]) -> None:
    """Require each layer of a student to be built as the teacher's layer that it copies.

    Settings that a short input does not show, such as a long attention window, are
    seen here: they are attributes of the layers or of what they contain.

    Raises:
        InputError: with the first attribute that differs.
    """
    stacks = [model.get_submodule(layer_stack(model)) for model in (student, teacher)]
    for i, layer in enumerate(stacks[0]):
        mine, theirs = build_of(layer), build_of(stacks[1][kept[i]])
        for name in sorted(mine.keys() | theirs.keys()):
            ours, its = mine.get(name, "absent"), theirs.get(name, "absent")
            require(
                ours == its,
                f"its config makes {name} of layer {kept[i]} {its}, and of layer {i} {ours}",
            )


# attributes in which layers that compute the same may differ
OF_NO_LAYER = "^p$|drop|training|idx|index|layer_id|number|store"


def build_of(layer: nn.Module) -> dict[str, object]:
    """The classes of a layer's modules, and those of their attributes that make a difference."""
    found = {}
    for name, module in layer.named_modules():
        found[name or "the class"] = type(module).__name__
        for key, value in vars(module).items():
            plain = isinstance(value, bool | int | float | str) and not key.startswith("_")
            if plain and not re.search(OF_NO_LAYER, key):
                found[f"{name}.{key}".lstrip(".")] = value
    return found


def copy_layers(teacher, student, kept: list[int]) -> None:
    """Give a student its teacher's weights, with those of the layers kept, and prove it.

    Raises:
        InputError: a layer is built otherwise than the one it copies, a weight has
            another shape, or the logits are not the teacher's without its other layers.
    """
    renumbered = kept != list(range(len(kept)))
    scaled = renumbered and getattr(teacher.config, "scale_attn_by_inverse_layer_idx", False)
    if scaled:
        warnings.warn(
            "scale_attn_by_inverse_layer_idx divides attention by a layer's number, which is "
            "another in the student: it starts a little further from its teacher",
            stacklevel=3,
        )
    else:
        check_layers(teacher, student, kept)
    load_weights(student, keep_layers(teacher, kept))
    if not scaled:
        reason = "a layer of this family depends on its number, or on the layers before it"
        check_student(
            teacher, student, skipped_layers(teacher, kept), f"the other layers; {reason}"
        )


def load_weights(model, weights: dict[str, torch.Tensor]) -> None:
    """Give a model weights.

    Raises:
        InputError: one is missing, has no place, or has another shape.
    """
    own = model.state_dict()
    for name in sorted(weights.keys() | own.keys()):
        shapes = [tuple(each[name].shape) if name in each else "none" for each in (weights, own)]
        require(shapes[0] == shapes[1], f"{name} has shape {shapes[0]}, not {shapes[1]}")
    model.load_state_dict(weights)


@torch.no_grad()
def check_student(teacher, student, cut, without: str) -> None:
    """Prove a student: the logits of its teacher without what it has not.

    Args:
        cut: a context in which the teacher does without it; `without` says what it is.

    Raises:
        InputError: they are not the same.
    """
    ids = torch.arange(1, 13)[None].to(teacher.device) * 7919 % vocabulary_size(teacher)
    with eval_mode(teacher, student):
        with cut:
            expected = teacher(ids, use_cache=False).logits.float()
        error = (student(ids, use_cache=False).logits - expected).norm() / expected.norm()
    tolerance = 1e-3 if teacher.dtype in (torch.float32, torch.float64) else 0.05
    require(
        error <= tolerance,
        f"its logits differ by {error:.2g} of their size from the teacher's without {without}",
    )


@contextlib.contextmanager
def skipped_layers(model, kept: list[int]):
    """A model whose other layers pass on what they are given."""

    def skip(layer, args, kwargs, output):
        given = args[0] if args else kwargs["hidden_states"]
        return given if torch.is_tensor(output) else (given, *output[1:])

    stack = model.get_submodule(layer_stack(model))
    skipped = [layer for i, layer in enumerate(stack) if i not in kept]
    hooks = [layer.register_forward_hook(skip, with_kwargs=True) for layer in skipped]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def merge_adapters(model):
    """A model with its LoRA adapters merged into its weights: a copy, if it has any."""
    if not hasattr(model, "merge_and_unload"):
        return model
    return copy.deepcopy(model).merge_and_unload()


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


def evenly_spaced(depth: int, layers: int) -> list[int]:
    """Which of `depth` layers to keep: the first, the last, and evenly between.

    For 6 of 12 this is 0, 2, 4, 7, 9, 11, the choice made for DistilGPT2.
    """
    return [round(i) for i in torch.linspace(0, depth - 1, layers, dtype=torch.float64).tolist()]


def layer_stack(model: PreTrainedModel) -> str:
    """The name of the module list that holds a model's layers, such as `transformer.h`.

    Raises:
        InputError: it has none.
    """
    config = model.config.get_text_config(decoder=True)
    depth = getattr(config, depth_name(config))
    decoder = set(getattr(model, "get_decoder", lambda: model)().modules())
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    }
    if found:  # the decoder's rather than those of a part that sees or hears
        return next(
            (name for name, module in found.items() if module in decoder), next(iter(found))
        )
    raise InputError(f"this {config.model_type} model has no list of its {depth} layers")


def keep_layers(model: PreTrainedModel, kept: list[int]) -> dict[str, torch.Tensor]:
    """A model's weights with only some of its layers, numbered anew."""
    stack = layer_stack(model)
    weights = {}
    for key, tensor in model.state_dict().items():
        if key.startswith(stack + "."):
            index, rest = key[len(stack) + 1 :].split(".", 1)
            if int(index) not in kept:
                continue
            key = f"{stack}.{kept.index(int(index))}.{rest}"
        weights[key] = tensor.clone()
    return weights


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


def output_weights(model, vocabulary: int) -> torch.Tensor:
    """A model's output weights for the first tokens of its vocabulary, (vocabulary, width)."""
    weights = model.get_output_embeddings().weight
    return weights if len(weights) == vocabulary else weights[:vocabulary]


@torch.no_grad()
def has_linear_head(model, ids: torch.Tensor) -> bool:
    """Whether a model's logits are hidden states times output weights: seen by trying.

    They are more than that where a head has a bias, or where logits are capped or scaled.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        return False
    with eval_mode(model):
        hidden = getattr(model.base_model(ids, use_cache=False), "last_hidden_state", None)
        return hidden is not None and torch.allclose(
            head(hidden), model(ids, use_cache=False).logits, rtol=1e-4, atol=1e-5
        )


def weights_digest(model) -> str:
    """A name for a model's weights and settings: another as soon as any of them is."""
    config = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version"):
        config.pop(name, None)
    made = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        made.update(name.encode())
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
