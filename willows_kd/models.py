"""Weights and tokenizers: a teacher, and the student that is to become like it."""

import contextlib
import copy
import hashlib
import json
import logging
import math
import os
from pathlib import Path

import huggingface_hub
import torch
import transformers
from accelerate import PartialState
from huggingface_hub.utils import get_session
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from willows_kd.errors import InputError, is_integer, require, type_name
from willows_kd.files import atomic_directory, check_output

ASSETS = Path(__file__).parent / "assets"
BUNDLED_TEACHER = ASSETS / "teacher"
BUNDLED_BASE = ASSETS / "base"
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


def load_base(device=None) -> PreTrainedModel:
    """The bundled teacher as it was before it was fine-tuned on the book."""
    return load_model(str(BUNDLED_BASE), device).eval()


def load_tokenizer(name_or_path):
    """The tokenizer of a directory or hub name."""
    check_model(name_or_path)
    path = Path(name_or_path)
    if path.is_dir() and not any(any(path.glob(pattern)) for pattern in TOKENIZER_FILES):
        raise InputError(f"{path} has no tokenizer (no {' or '.join(TOKENIZER_FILES)})")
    with (
        loading_errors_as_input_errors(name_or_path, "has no tokenizer that can be read"),
        quiet_transformers(),
    ):
        return AutoTokenizer.from_pretrained(
            name_or_path, trust_remote_code=False, local_files_only=not may_ask_hub(name_or_path)
        )


def load_model(name_or_path, device=None) -> PreTrainedModel:
    """A causal language model in float32, from safetensors only, with no remote code."""
    check_model(name_or_path)
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
    with (
        loading_errors_as_input_errors(name_or_path, "has no config that can be read"),
        quiet_transformers(),
    ):
        config = AutoConfig.from_pretrained(
            name_or_path, trust_remote_code=False, local_files_only=not may_ask_hub(name_or_path)
        )
    positions = getattr(config, "max_position_embeddings", None)
    if block_size < 2 or positions and block_size > positions:
        raise InputError(f"block_size is {block_size}; this model takes 2 to {positions or 'any'}")


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
    teacher: PreTrainedModel, layers: int | None = None, init: str = "spaced", seed: int = 0
) -> PreTrainedModel:
    """A student with fewer layers; widths, heads and vocabulary are the teacher's.

    Args:
        teacher: any decoder that `transformers` builds from a config.
        layers: how many; None for half of the teacher's.
        init: ``"spaced"`` copies evenly spaced layers, the first and the last among
            them, with embeddings and head, as DistilGPT2 was initialised (Sanh et al.
            2019, section 3); ``"first"`` copies the first layers instead;
            ``"random"`` copies nothing.
        seed: for ``"random"``.

    Raises:
        InputError: `layers` is not between 1 and the teacher's, or `init` is unknown.
    """
    require_model(teacher, "teacher")
    depth = teacher.config.num_hidden_layers
    layers = max(1, depth // 2) if layers is None else layers
    fits = is_integer(layers) and layers <= depth
    require(fits, f"layers is {layers!r}; this teacher allows 1 to {depth}")
    if init not in ("spaced", "first", "random"):
        raise InputError(f"init is {init!r}; it must be spaced, first or random")
    kept = list(range(layers)) if init == "first" else evenly_spaced(depth, layers)
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):  # families whose layers differ say so here
        config.layer_types = [config.layer_types[i] for i in kept]
    with torch.random.fork_rng(), quiet_transformers():
        torch.manual_seed(seed)
        student = AutoModelForCausalLM.from_config(config, dtype=teacher.dtype)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    if init != "random":
        student.load_state_dict(keep_layers(teacher, kept))
    return student.to(teacher.device)


def require_model(model, name: str) -> None:
    """Refuse what is no model, such as the pair that `load_teacher` returns."""
    is_model = isinstance(model, nn.Module) and hasattr(model, "config")
    require(
        is_model, f"{name} is {type_name(model)}; give a model: teacher, tokenizer = load_teacher()"
    )


def evenly_spaced(depth: int, layers: int) -> list[int]:
    """Which of `depth` layers to keep: the first, the last, and evenly between.

    For 6 of 12 this is 0, 2, 4, 7, 9, 11, the choice made for DistilGPT2.
    """
    return [round(i) for i in torch.linspace(0, depth - 1, layers, dtype=torch.float64).tolist()]


def layer_stack(model: PreTrainedModel) -> str:
    """The name of the module list that holds a model's layers, such as `transformer.h`."""
    depth = model.config.num_hidden_layers
    return next(
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    )


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


def common_vocabulary(teacher: PreTrainedModel, student: PreTrainedModel) -> int:
    """How many logits teacher and student share.

    The larger of two heads may be padded to a round number: what is beyond the
    smaller one is then no token, and is left out of every loss.

    Raises:
        InputError: the sizes differ by more than padding explains.
    """
    sizes = teacher.config.vocab_size, student.config.vocab_size
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


# -- using and saving ------------------------------------------------------------------


@torch.inference_mode()
def complete(
    model,
    tokenizer,
    prompt: str,
    max_new_tokens: int = 60,
    temperature: float = 0.8,
    seed: int = 0,
    top_k: int = 50,
) -> str:
    """Continue a prompt; the same seed gives the same words.

    Each token is drawn from the `top_k` likeliest ones (0: from all) at a temperature
    of sampling; temperature 0 takes the likeliest.
    """
    require_model(model, "model")
    require(
        isinstance(prompt, str), f"prompt is {type_name(prompt)}; give a text, which may be empty"
    )
    require(
        is_integer(max_new_tokens), f"max_new_tokens is {max_new_tokens!r}; at least 1 is needed"
    )
    require(0 <= temperature < math.inf, f"temperature is {temperature}; it must be at least 0")
    require(
        is_integer(top_k, 0), f"top_k is {top_k!r}; it must be a whole number, 0 for all tokens"
    )
    require(
        is_integer(seed, 0) and seed < 2**64, f"seed is {seed!r}; it must be from 0 to 2**64 - 1"
    )
    prompt = prompt.encode(errors="replace").decode()  # a lone surrogate is no text
    ids = tokenizer(prompt or tokenizer.eos_token, return_tensors="pt").to(model.device)[
        "input_ids"
    ]
    if positions := getattr(model.config, "max_position_embeddings", None):
        ids = ids[:, -(positions - 1) :]  # a long prompt loses its beginning
        max_new_tokens = min(max_new_tokens, positions - ids.shape[1])
    with eval_mode(model), torch.random.fork_rng(), quiet_transformers():
        torch.manual_seed(seed)
        likeliest = {"top_k": top_k, "top_p": 1.0}  # whatever the model's own settings are
        sampling = {"do_sample": True, "temperature": float(temperature), **likeliest}
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.eos_token_id,
            **(sampling if temperature else {"do_sample": False}),
        )
    return tokenizer.decode(out[0], skip_special_tokens=True)


def save_model(
    model, tokenizer, directory, extra: dict[str, str] | None = None, overwrite: bool = False
) -> None:
    """Write a directory that `transformers` loads, whole or not at all.

    Args:
        model, tokenizer: what to save.
        directory: where. It may be new, empty, or an earlier output of ours.
        extra: further text files, by name.
        overwrite: replace a directory even if it is not ours.

    Raises:
        InputError: the directory holds other files, or (`WriteError`) cannot be written.
    """
    directory = Path(directory)
    check_output(directory, overwrite)
    with atomic_directory(directory) as partial, quiet_transformers():
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        for name, text in (extra or {}).items():
            (partial / name).write_text(text, encoding="utf-8")
