"""Weights and tokenizers: loading a teacher or a student, what both share, and saving."""

import contextlib
import copy
import csv
import dataclasses
import hashlib
import json
import logging
import os
import warnings
from pathlib import Path

import pandas as pd
import torch
import transformers
from accelerate import PartialState
from huggingface_hub import hf_hub_url
from huggingface_hub.utils import get_session
from torch import nn
from torch.nn.utils import parametrize
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from willows_kd.errors import InputError, is_integer, one_line, require, type_name
from willows_kd.files import atomic_write, check_output

ASSETS = Path(__file__).parent / "assets"
BUNDLED_TEACHER = ASSETS / "teacher"
BUNDLED = ("base", "teacher", "student", "student_hard_labels", "student_narrow")
TOKENIZER_FILES = ("tokenizer.json", "vocab.*", "*.model")
OF_SAMPLING = (
    *("temperature", "top_k", "top_p", "top_h"),
    *("min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"),
)
# what `transformers` calls a model's cache: past_key_values, in later versions cache
CACHE = dataclasses.fields(CausalLMOutputWithPast)[2].name
LEAST_SHARED = 0.9  # of the larger head: with less the models have two vocabularies


def best_device() -> torch.device:
    """The GPU if there is one, NVIDIA's or Apple's, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def distributed_state() -> PartialState:
    """The processes that a launcher started, joined over their GPUs, or over the CPU without.

    Accelerate itself joins processes on CPUs only where it is told to.
    """
    launched = "LOCAL_RANK" in os.environ
    return PartialState(cpu=launched and not torch.cuda.is_available())


# -- loading ---------------------------------------------------------------------------


def load_teacher(
    name_or_path: str | os.PathLike | None = None, device=None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A teacher and its tokenizer: in eval mode, in float32, ready to be asked.

    Args:
        name_or_path: a directory, or a name on the model hub, of any causal language
            model (``"gpt2"``); None for the tiny GPT-2 that ships with the package.
        device: where it goes; None for the GPU if there is one.

    Raises:
        InputError: it is not there, is no causal language model, is damaged, or has
            only pickled weights, which are never loaded.
    """
    name_or_path = BUNDLED_TEACHER if name_or_path is None else name_or_path
    tokenizer = load_tokenizer(name_or_path)
    return load_model(name_or_path, device).eval(), tokenizer


def load_student(
    name_or_path: str | os.PathLike, teacher_tokenizer: PreTrainedTokenizerBase, device=None
) -> PreTrainedModel:
    """A student made elsewhere, such as ``"distilgpt2"``.

    Raises:
        InputError: as `load_teacher`; or the student's tokenizer is not the teacher's.

    Warns:
        UserWarning: one of the tokenizers has tokens added, such as ``[PAD]``.
    """
    tokenizer = load_tokenizer(name_or_path)
    if added := check_same_tokenizer(teacher_tokenizer, tokenizer):
        warnings.warn(added, stacklevel=2)
    return load_model(name_or_path, device)


def load_bundled(name: str = "teacher", device=None) -> PreTrainedModel:
    """A model that ships with the package, in eval mode and float32.

    Args:
        name: ``"base"``, the teacher before it was fine-tuned on the book;
            ``"teacher"``; ``"student"``, half its layers, trained on its soft labels alone;
            ``"student_hard_labels"``, the same, trained on hard labels alone; or
            ``"student_narrow"``, all layers with fewer units, on soft labels.
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
        name: "transfer_sets", "temperatures", "ways", "writing", "inits", "copying", "town", "law",
            "other_text", "positions", "broken_histories" or "broken_runs"; the README of
            `willows_kd/assets` says which benchmark made each.
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


def load_tokenizer(name_or_path: str | os.PathLike) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory or hub name."""
    path = Path(name_or_path)
    if path.exists() and not any(any(path.glob(pattern)) for pattern in TOKENIZER_FILES):
        bundled_one = path.resolve().parent == ASSETS  # they share the teacher's
        name_or_path = BUNDLED_TEACHER if bundled_one else adapter_base(path) or ""
        wanted = "give the directory of a model, with its config.json and tokenizer.json"
        require(name_or_path, f"{path} holds no tokenizer; {wanted}")
    return load_part(AutoTokenizer, name_or_path)


def load_config(name_or_path: str | os.PathLike):
    """The config of a model, without its weights; an adapter's is that of its base."""
    return load_part(AutoConfig, adapter_base(name_or_path) or name_or_path)


def load_model(name_or_path: str | os.PathLike, device=None) -> PreTrainedModel:
    """A causal language model in float32, from safetensors only, with no remote code.

    A directory with a LoRA adapter is loaded onto its base model and merged.
    """
    base, path = adapter_base(name_or_path), Path(name_or_path)
    weights = "adapter_model.safetensors" if base else "*.safetensors"
    require(
        not path.is_dir() or any(path.glob(weights)),
        f"{path} holds no .safetensors weights; pickled ones (.bin) can run code when loaded: if "
        "you trust them, convert them once: "
        "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)",
    )
    model, info = load_part(
        AutoModelForCausalLM,
        base or name_or_path,
        dtype=torch.float32,
        use_safetensors=True,
        ignore_mismatched_sizes=True,  # they are refused below, by name
        output_loading_info=True,
    )
    made_as, is_now = model.config.architectures or ["CausalLM"], type(model).__name__
    causal = any("CausalLM" in kind or kind == is_now for kind in made_as)  # BERT would load, too
    require(causal, f"{name_or_path} is a {made_as[0]}; give a causal language model")
    wrong = sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])])
    lacks = f"{name_or_path} lacks weights that fit its config ({', '.join(wrong[:3])} ...)"
    require(not wrong, lacks)
    if base:
        with loading_errors_as_input_errors(name_or_path):
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, name_or_path).merge_and_unload()
        model.requires_grad_(True)  # PEFT froze it
    return model.to(device or best_device())


def adapter_base(name_or_path: str | os.PathLike) -> str | None:
    """The model that a directory's LoRA adapter belongs to; None if it holds no adapter."""
    folder = Path(name_or_path)
    file = folder / "adapter_config.json"
    if not file.is_file() or (folder / "config.json").is_file():
        return None
    with loading_errors_as_input_errors(folder):
        return json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]


def load_part(kind, name_or_path: str | os.PathLike, **options):
    """What a class of `transformers` loads from a directory or hub name, with no remote code."""
    offline = Path(name_or_path).exists() or not hub_answers(name_or_path)
    with loading_errors_as_input_errors(name_or_path):
        return kind.from_pretrained(
            name_or_path, trust_remote_code=False, local_files_only=offline, **options
        )


def hub_answers(name: str | os.PathLike) -> bool:
    """Whether the hub has an answer for a name, within 5 seconds.

    Without a connection `transformers` tries for half a minute. Told to look in its cache only,
    it finds at once what is there, and refuses what is not.
    """
    with contextlib.suppress(Exception):  # whatever the HTTP client calls it
        get_session().head(hf_hub_url(str(name), "config.json"), timeout=5)
        return True
    return False


@contextlib.contextmanager
def loading_errors_as_input_errors(name_or_path: str | os.PathLike):
    """Quietly, and with what is raised for a bad model in one line."""
    try:
        with quiet_transformers():
            yield
    except Exception as error:
        what = "cannot be loaded"
        if isinstance(error, OSError) and not Path(name_or_path).exists():
            what = "is no local directory and could not be downloaded from the Hugging Face Hub"
        raise InputError(f"{name_or_path} {what}: {one_line(error)}") from error


# -- how many tokens at once -------------------------------------------------------------


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


# -- modes, copies and checks ------------------------------------------------------------


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
    before = {module: module.p for module in model.modules() if isinstance(module, nn.Dropout)}
    for layer in before:
        layer.p = p
    try:
        yield
    finally:
        for layer, value in before.items():
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
    if not any(map(parametrize.is_parametrized, model.modules())):
        return model
    merged = untrained(model.config, model).to(model.dtype).train(model.training)
    weights = {}
    for name in merged.state_dict():
        module, _, attribute = name.rpartition(".")
        weights[name] = getattr(model.get_submodule(module), attribute)
    merged.load_state_dict(weights)
    return merged


def untrained(config, like: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """A float32 model of a config with random weights, else set up as another model is."""
    with torch.random.fork_rng(), quiet_transformers():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(
            copy.deepcopy(config),
            dtype=torch.float32,
            attn_implementation=like.config._attn_implementation,
        ).to(like.device)
    model.generation_config = savable(like.generation_config)  # whoever saves it
    return model


def is_placed(model) -> bool:
    """Whether a model is to stay where it is: its weights were placed as it was loaded, by a
    `device_map`, on the disk even, or in few bits."""
    return bool(getattr(model, "hf_device_map", None) or getattr(model, "is_quantized", False))


def require_weights(model: nn.Module) -> None:
    """Require a model whose weights can be copied: not quantized, not offloaded."""
    teaches = "the teacher's weights are {}: it can teach, but to make a student of it, load it {}"
    quantized = getattr(model, "is_quantized", False)
    require(not quantized, teaches.format("quantized", "unquantised"))
    offloaded = any(weight.is_meta for weight in model.parameters())
    require(not offloaded, teaches.format("offloaded", "without device_map"))


def require_model(model, name: str) -> None:
    """Require a language model: not the pair that `load_teacher` returns, not a headless one."""
    is_model = isinstance(model, nn.Module) and hasattr(model, "config")
    given = f"{name} is {type_name(model)}"
    require(is_model, f"{given}; give a model: teacher, tokenizer = load_teacher()")
    headless = isinstance(model, PreTrainedModel) and not model.can_generate()
    require(not headless, f"{given}, which predicts no tokens; load it with AutoModelForCausalLM")


# -- one vocabulary --------------------------------------------------------------------


def check_same_tokenizer(teacher_tokenizer, student_tokenizer) -> str | None:
    """Refuse a student that reads text otherwise than its teacher.

    Returns:
        a sentence that names the tokens that one of them alone has, added as ``[PAD]`` is; or
        None.

    Raises:
        InputError: the same text gets other ids, or sizes differ by more than added tokens.
    """
    small, large = sorted((teacher_tokenizer, student_tokenizer), key=len)
    added = large.get_vocab().keys() - small.get_vocab().keys()
    sizes = f"{len(teacher_tokenizer)} tokens, the student's {len(student_tokenizer)}"
    wrong = f"teacher and student must share a vocabulary: the teacher's has {sizes}"
    require(added <= large.get_added_vocab().keys(), wrong)
    same = small.get_vocab().items() <= large.get_vocab().items()
    require(same, f"{wrong}, and they give different ids to the same text")
    if not added:
        return None
    whose = "teacher" if large is teacher_tokenizer else "student"
    names = ", ".join(sorted(added)[:3]) + (" ..." if len(added) > 3 else "")
    return f"the {whose}'s tokenizer alone has {names}: the loss leaves out what only one knows"


def vocabulary_size(model) -> int:
    """How many logits a model gives for each token."""
    return model.config.get_text_config(decoder=True).vocab_size


def common_vocabulary(teacher: PreTrainedModel, student: PreTrainedModel) -> int:
    """How many logits teacher and student share: losses and comparisons are over the first so many.

    A head may be padded to a round number, or have tokens added. `check_token_ids` sees that
    nothing beyond the smaller one is in the text.

    Raises:
        InputError: the heads differ by more than padding or added tokens explain.
    """
    sizes = vocabulary_size(teacher), vocabulary_size(student)
    require(
        min(sizes) >= LEAST_SHARED * max(sizes),
        f"teacher and student must share a vocabulary: the teacher predicts {sizes[0]} tokens, "
        f"the student {sizes[1]}",
    )
    return min(sizes)


def check_token_ids(ids: torch.Tensor, model, name: str = "model") -> None:
    """Require token ids that a model has embeddings for.

    There are others if tokens were added to its tokenizer and its embeddings not resized, or if
    the ids are another tokenizer's.
    """
    least, most, known = ids.min().item(), ids.max().item(), vocabulary_size(model)
    wrong = f"a token id is {least if least < 0 else most}; the {name} knows {known}, from 0"
    require(least >= 0 and most < known, wrong)


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
        require(not tensor.is_meta, "some weights are offloaded; load it without device_map")
        made.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return made.hexdigest()[:24]


# -- saving ------------------------------------------------------------------


def save_model(
    model, tokenizer, directory, extra: dict[str, str] | None = None, overwrite: bool = False
) -> None:
    """Write a directory that `transformers` loads, whole or not at all.

    Args:
        model, tokenizer: what to save; LoRA adapters are merged into the weights.
        directory: where. It is new or empty.
        extra: further text files, by name.
        overwrite: replace what the directory holds.

    Raises:
        InputError: the directory holds something, or (`WriteError`) cannot be written.
    """
    directory = Path(directory)
    check_output(directory, overwrite)
    with atomic_write(directory) as partial, quiet_transformers():
        write_weights(model, partial)
        tokenizer.save_pretrained(partial)
        for name, text in (extra or {}).items():
            (partial / name).write_text(text, encoding="utf-8", errors="replace")


def write_weights(model, folder) -> None:
    """Write weights and settings as `transformers` does, LoRA adapters merged."""
    model = copy.copy(merge_adapters(model))  # shallow, with configs of its own
    model.config = copy.deepcopy(model.config)  # to which saving adds
    model.generation_config = savable(model.generation_config)
    model.save_pretrained(folder)


def savable(settings):
    """A config of generation without settings of sampling unless it samples: they have no effect,
    and `transformers` would refuse to save them."""
    settings = copy.deepcopy(settings)
    if settings is not None and not settings.do_sample:
        for name in OF_SAMPLING:
            setattr(settings, name, None)
    return settings
