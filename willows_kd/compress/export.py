"""A student for other runtimes: ONNX, proven before it is kept, ONNX in int8, and GGUF."""

import contextlib
import copy
import importlib.util
import json
import logging
import math
import tempfile
import warnings
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from willows_kd.config import EXPORT_FORMATS
from willows_kd.errors import InputError, one_line, require, type_name
from willows_kd.files import atomic_write, check_output
from willows_kd.generation import sample_continuations
from willows_kd.losses import kl
from willows_kd.models import (
    CACHE,
    loading_errors_as_input_errors,
    max_positions,
    merge_adapters,
    quiet_transformers,
    require_model,
)

TOLERANCE = 1e-4  # of logits in float32, as a share of the largest
# what llama.cpp takes for granted: GPT-2's settings, and how its tokenizer splits a text
OF_LLAMA_CPP = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of one function
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
}
SPLIT_BY_LLAMA_CPP = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


def export_model(model, tokenizer, directory, to: str = "onnx", overwrite: bool = False) -> dict:
    """Write a model for another runtime, whole or not at all.

    "onnx" has the key-value cache among its inputs and outputs, and takes any number of
    texts and tokens; it is kept only if its logits are PyTorch's. `load_onnx` reads it.
    "onnx-int8" is the same with weights in 8 bits (onnxruntime's dynamic quantization).
    "gguf" is llama.cpp's format: a GPT-2's weights in float32, and its tokenizer.

    Args:
        model: a causal language model; it is not changed.
        tokenizer: its tokenizer, saved beside it, or in the file (GGUF).
        directory: gets `model.onnx` or `model.gguf`.
        to: "onnx", "onnx-int8" or "gguf".
        overwrite: replace what the directory holds.

    Returns:
        file: where the model is.
        megabytes: its size.
        difference: of ONNX, how far a logit is from PyTorch's at most, as a share of the largest.
        kl: of ONNX, KL(PyTorch's || its own) in nats per token, on text of the model's own.
        int8_share: of onnx-int8, the share of the weights that are in 8 bits.

    Raises:
        InputError: the format is unknown or its packages are missing; the family cannot be
            exported to it; or (`WriteError`) the directory cannot be written.
    """
    require_model(model, "model")
    require(callable(tokenizer), f"tokenizer is {type_name(tokenizer)}; give the model's own")
    formats = ", ".join(EXPORT_FORMATS)
    require(to in EXPORT_FORMATS, f"to is {to!r}; it must be one of {formats}")
    check_packages(to)
    directory = Path(directory)
    check_output(directory, overwrite)
    model = copy.deepcopy(merge_adapters(model)).to("cpu", torch.float32).eval()
    name = "model.gguf" if to == "gguf" else "model.onnx"
    write = {"onnx": write_onnx, "onnx-int8": write_int8, "gguf": write_gguf}[to]
    with atomic_write(directory) as folder:
        folder.mkdir()
        with exporting(f"this {model.config.model_type} model", to):
            found = write(model, tokenizer, folder / name)
        megabytes = sum(file.stat().st_size for file in folder.glob(f"{name}*")) / 1e6
    return {"file": directory / name, "megabytes": megabytes, **found}


def check_packages(to: str) -> None:
    """Refuse a format whose packages are not installed."""
    needed = ("gguf",) if to == "gguf" else ("onnx", "onnxruntime", "onnxscript")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    install = 'pip install "willows-kd[export]"'
    require(not missing, f"{to} needs {' and '.join(missing)}; {install}")


@contextlib.contextmanager
def exporting(model: str, to: str):
    """Silence the exporters, and turn what they make of an unknown family into one line."""
    logging.disable(logging.WARNING)
    try:
        with quiet_transformers(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except OSError:
        raise
    except Exception as error:
        raise InputError(f"{model} cannot be exported to {to}: {one_line(error)}") from error
    finally:
        logging.disable(logging.NOTSET)


# -- ONNX ------------------------------------------------------------------------------


def write_onnx(model, tokenizer, file: Path) -> dict[str, float]:
    """Write a model with its config and tokenizer; returns how far it is from PyTorch's."""
    for part in (model.config, model.generation_config, tokenizer):
        part.save_pretrained(file.parent)
    export_with_cache(model, file)
    found = compare_logits(model, file.parent)
    off = found["difference"]
    require(off <= TOLERANCE, f"its logits differ by {off:.2g} of the largest from PyTorch's")
    return found


def write_int8(model, tokenizer, file: Path) -> dict[str, float]:
    """`write_onnx`, then quantize, and measure again.

    Each weight matrix has one scale; activations are scaled as they come ("dynamic").
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    write_onnx(model, tokenizer, file)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        prepared = Path(folder) / file.name
        # makes a matrix of the tied head, the embeddings' transpose, which is then quantized too
        quant_pre_process(file, prepared, skip_symbolic_shape=True)
        quantize_dynamic(prepared, file, weight_type=QuantType.QInt8)
    sizes = {True: 0, False: 0}
    eight_bits = onnx.TensorProto.INT8, onnx.TensorProto.UINT8
    for tensor in onnx.load(file).graph.initializer:
        sizes[tensor.data_type in eight_bits] += math.prod(tensor.dims)
    share = sizes[True] / sum(sizes.values())
    return compare_logits(model, file.parent) | {"int8_share": share}


class WithCache(nn.Module):
    """A model whose cache is a list of keys and values, which ONNX can name."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, past):
        """Logits of the ids that follow the cached ones, and the cache with both."""
        out = self.model(ids, **{CACHE: DynamicCache(past)}, use_cache=True)
        return out.logits, keys_and_values(out[CACHE])


def keys_and_values(cache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What a cache holds for each layer, each of shape (batch, heads, tokens, width)."""
    usual = all(hasattr(layer, "keys") for layer in cache.layers)
    require(usual, "its cache holds more than keys and values")
    return [(layer.keys, layer.values) for layer in cache.layers]


@torch.no_grad()
def export_with_cache(model, file: Path) -> None:
    """Write a model to ONNX for any number of texts, of new tokens and of cached ones.

    Inputs are `input_ids` and for each layer `past_key_values.0.key` and `.value`; outputs
    are `logits` and `present.0.key` and so on.
    """
    ids = torch.ones(2, 8, dtype=torch.long)  # any, 5 cached and 3 new ones
    past = keys_and_values(model(ids[:, :5], use_cache=True)[CACHE])
    batch, tokens, cached = (torch.export.Dim(name) for name in ("batch", "tokens", "cached"))
    each = {0: batch, 2: cached}
    layers = [f"{i}.{what}" for i in range(len(past)) for what in ("key", "value")]
    program = torch.onnx.export(
        WithCache(model),
        (ids[:, 5:], past),
        dynamo=True,
        verbose=False,
        dynamic_shapes=({0: batch, 1: tokens}, [(each, each) for _ in past]),
        input_names=["input_ids", *(f"past_key_values.{layer}" for layer in layers)],
        output_names=["logits", *(f"present.{layer}" for layer in layers)],
    )
    for node in program.model.graph:
        node.metadata_props.clear()  # which tell where on this machine the code is
    program.save(file)


@torch.no_grad()
def compare_logits(model, directory: Path) -> dict[str, float]:
    """How far an exported model is from PyTorch's, on two texts of at most 32 tokens of its own.

    It reads a prompt, some tokens and one, with the cache.
    """
    length = min(32, max_positions(model.config) or 32)
    first = torch.full((2, 1), model.config.bos_token_id or 0)
    ids = torch.cat([first, sample_continuations(model, first, length - 1)], dim=1)
    exported, wanted = load_onnx(directory)[0], model(ids, use_cache=False).logits
    half = length // 2
    cache, parts = None, []
    for part in ids.split([half, length - half - 1, 1], dim=1):
        out = exported(part, **{CACHE: cache})
        cache = out[CACHE]
        parts.append(out.logits)
    found = torch.cat(parts, dim=1)
    return {
        "difference": ((found - wanted).abs().max() / wanted.abs().max()).item(),
        "kl": kl(wanted.log_softmax(-1), found.log_softmax(-1)).mean().clamp(min=0).item(),
    }


def load_onnx(directory) -> tuple[PreTrainedModel, object]:
    """What `export_model` wrote as ONNX, and its tokenizer.

    The model runs in onnxruntime on the CPU, with as many threads as PyTorch has. `evaluate`,
    `complete`, `sample_continuations` and `latency` take it as they take any other.

    Raises:
        InputError: onnxruntime is missing, or the directory holds no such model.
    """
    check_packages("onnx")
    import onnxruntime

    file = Path(directory) / "model.onnx"
    require(file.is_file(), f"{directory} holds no model.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # idle threads that spin would take the cores from the next model, and from PyTorch
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4  # an error is raised as well
    with loading_errors_as_input_errors(directory):
        model = OnnxModel(
            AutoConfig.from_pretrained(directory),
            GenerationConfig.from_pretrained(directory),
            onnxruntime.InferenceSession(file, options),
        )
        return model.eval(), AutoTokenizer.from_pretrained(directory)


class OnnxModel(PreTrainedModel, GenerationMixin):
    """An exported model. Texts of a batch have one length: the file takes no padding mask."""

    def __init__(self, config, generation_config, session):
        super().__init__(config)
        self.generation_config, self.session = generation_config, session
        _, *cached = session.get_inputs()
        self.cached = {each.name: (each.shape[1], 0, each.shape[3]) for each in cached}

    device = torch.device("cpu")
    _supports_sdpa = True  # whatever the config asks for: attention is in the file

    def forward(self, input_ids, use_cache=True, **given) -> CausalLMOutputWithPast:
        """Logits of the ids that follow the cached ones, and the cache with both."""
        mask, before = given.get("attention_mask"), given.get(CACHE)
        require(mask is None or mask.all(), "texts of a batch must have one length: no padding")
        if before is not None and before.get_seq_length():
            past = sum(keys_and_values(before), ())
        else:
            past = [torch.empty(len(input_ids), *shape) for shape in self.cached.values()]
        given = {name: t.numpy() for name, t in zip(self.cached, past, strict=True)}
        logits, *cache = self.session.run(None, {"input_ids": input_ids.numpy(), **given})
        cache = [torch.from_numpy(each) for each in cache]
        layers = list(zip(cache[::2], cache[1::2], strict=True))
        cache = DynamicCache(layers) if use_cache else None
        return CausalLMOutputWithPast(logits=torch.from_numpy(logits), **{CACHE: cache})


# -- GGUF ------------------------------------------------------------------------------


def write_gguf(model, tokenizer, file: Path) -> dict:
    """Write a GPT-2 with its tokenizer for llama.cpp."""
    import gguf

    config, parts = model.config, json.loads(tokenizer.backend_tokenizer.to_str())
    check_llama_cpp(config, parts)
    writer = gguf.GGUFWriter(file, "gpt2")
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    tokens = [tokenizer.convert_ids_to_tokens(i) for i in range(config.vocab_size)]
    writer.add_token_list([token or f"[unused{i}]" for i, token in enumerate(tokens)])
    special = dict.fromkeys(tokenizer.all_special_tokens, gguf.TokenType.CONTROL)
    kinds = special | {None: gguf.TokenType.UNUSED}  # what a padded head has beyond the tokens
    writer.add_token_types([kinds.get(token, gguf.TokenType.NORMAL) for token in tokens])
    pairs = parts["model"]["merges"]
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in pairs])
    writer.add_bos_token_id(tokenizer.eos_token_id)  # GPT-2's end of text begins texts, too
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)
    for name, weight in gguf_weights(model).items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {}


def check_llama_cpp(config, tokenizer: dict) -> None:
    """Refuse a model that llama.cpp would run otherwise than PyTorch, or not at all."""
    require(config.model_type == "gpt2", "only GPT-2s can; llama.cpp's own converter knows others")
    for name, taken in OF_LLAMA_CPP.items():
        value = getattr(config, name)
        require(value in taken, f"{name} is {value!r}; llama.cpp takes it to be {taken[0]!r}")
    split = {"use_regex": True} | (tokenizer["pre_tokenizer"] or {})
    as_gpt2 = SPLIT_BY_LLAMA_CPP.items() <= split.items() and tokenizer["normalizer"] is None
    as_gpt2 = as_gpt2 and tokenizer["model"]["type"] == "BPE"
    require(as_gpt2, "its tokenizer does not split text as GPT-2's does")


def gguf_weights(model) -> dict:
    """A GPT-2's weights as NumPy arrays under llama.cpp's names, matrices as (out, in)."""
    import gguf

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, model.config.n_layer)
    weights = model.state_dict()
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    found = {}
    for name, weight in weights.items():
        if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight")):
            weight = weight.T  # Conv1D keeps them as (in, out)
        found[names.get_name(name, (".weight", ".bias"))] = weight.contiguous().numpy()
    return found
