"""A model's layers: where they are, how much each is missed, and which a student keeps."""

import contextlib
import math
from collections.abc import Iterable, Sequence

import pandas as pd
import torch
from torch import nn
from transformers import PreTrainedModel

from willows_kd.config import INITS
from willows_kd.errors import InputError, is_integer, require, type_name
from willows_kd.evaluation import block_nats, check_blocks
from willows_kd.losses import cosine_distance
from willows_kd.models import eval_mode, merge_adapters


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


def depth_name(config) -> str:
    """What a family calls its decoder's number of layers, such as GPT-2's `n_layer`."""
    usual = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    names = ("decoder_layers", "num_decoder_layers")
    return next((name for name in names if name in vars(config)), usual)


def depth_of(model: PreTrainedModel) -> int:
    """How many layers a model has."""
    return len(model.get_submodule(layer_stack(model)))


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


@contextlib.contextmanager
def family_errors_as_input_errors(what: str):
    """Turn whatever a family's code makes of fewer layers into one line."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split()).partition(". ")[0][:200] or type_name(error)
        raise InputError(f"{what}: {reason}") from error


# -- which layers a student keeps ------------------------------------------------------


def layers_to_keep(
    teacher, layers: int | None, init: str | Sequence[int], blocks: torch.Tensor | None = None
) -> list[int]:
    """Which of a teacher's layers a student takes, counted from 0.

    Raises:
        InputError: there are not so many, `init` is none of the accepted values, or it needs
            blocks and there are none.
    """
    depth = depth_of(teacher)
    if not isinstance(init, str) and isinstance(init, Iterable):
        kept = list(init)
        rising = all(is_integer(i, 0) and i < depth for i in kept) and kept == sorted(set(kept))
        require(
            kept and rising and layers in (None, len(kept)),
            f"init is {kept}; layer numbers must rise and lie between 0 and {depth - 1}"
            + ("" if layers is None else f", and be as many as layers, {layers}"),
        )
        return [int(i) for i in kept]
    known = isinstance(init, str) and init in (*INITS, "random")
    accepted = f"{', '.join(INITS)}, random or a list of layer numbers"
    require(known, f"init is {init!r}; it must be {accepted}")
    layers = max(1, depth // 2) if layers is None else layers
    fits = is_integer(layers) and layers <= depth
    require(fits, f"layers is {layers!r}; this teacher allows 1 to {depth}")
    if init == "first":
        return list(range(layers))
    if init in ("spaced", "random"):
        return evenly_spaced(depth, int(layers))
    needed = "choosing by {init} takes a few blocks of text; give blocks, such as blocks.train[:8]"
    require(blocks is not None, needed.format(init=init))
    check_blocks(teacher, blocks, "teacher")
    choose = {"influence": most_influential, "contiguous": without_a_run, "greedy": one_by_one}
    family = teacher.config.model_type
    with family_errors_as_input_errors(f"no layers of this {family} teacher by {init}"):
        return choose[init](teacher, depth, int(layers), blocks)


def evenly_spaced(depth: int, layers: int) -> list[int]:
    """Which of `depth` layers to keep: the first, the last, and evenly between.

    For 6 of 12 this is 0, 2, 4, 7, 9, 11, the choice made for DistilGPT2.
    """
    return [round(i) for i in torch.linspace(0, depth - 1, layers, dtype=torch.float64).tolist()]


def most_influential(teacher, depth: int, layers: int, blocks: torch.Tensor) -> list[int]:
    """The layers of greatest block influence."""
    return sorted(block_influence(teacher, blocks).topk(layers).indices.tolist())


def without_a_run(teacher, depth: int, layers: int, blocks: torch.Tensor) -> list[int]:
    """All layers but the run of neighbours that is missed least (Gromov et al. 2024 drop one)."""
    runs = [[*range(i), *range(i + depth - layers, depth)] for i in range(layers + 1)]
    return min(runs, key=lambda kept: nats_with(teacher, kept, blocks))


def one_by_one(teacher, depth: int, layers: int, blocks: torch.Tensor) -> list[int]:
    """What is left when the layer that is missed least is dropped, again and again."""
    kept = list(range(depth))
    while len(kept) > layers:
        fewer = [[i for i in kept if i != dropped] for dropped in kept]
        kept = min(fewer, key=lambda kept: nats_with(teacher, kept, blocks))
    return kept


def nats_with(teacher, kept: list[int], blocks: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of a teacher with only some of its layers, in nats per token; one number."""
    with skipped_layers(teacher, kept):
        return block_nats(teacher, blocks).mean().nan_to_num(math.inf)


@torch.no_grad()
def block_influence(teacher, blocks: torch.Tensor) -> torch.Tensor:
    """How far each layer turns the hidden states that pass it, shape (layers,).

    It is 1 minus the cosine of a layer's input and output, mean over tokens: 0 for a layer
    that changes nothing (Men et al. 2024, "ShortGPT", equation 1).

    Args:
        teacher: a causal language model.
        blocks: a few blocks of token ids, shape (blocks, block_size).
    """
    check_blocks(teacher, blocks, "teacher")
    stack = teacher.get_submodule(layer_stack(teacher))
    found = {}

    def measure(layer, args, kwargs, output):
        given = args[0] if args else kwargs["hidden_states"]
        found[layer] = cosine_distance(output if torch.is_tensor(output) else output[0], given)

    hooks = [layer.register_forward_hook(measure, with_kwargs=True) for layer in stack]
    try:
        with eval_mode(teacher):
            teacher(blocks.to(teacher.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    require(len(found) == len(stack), "not every layer of this teacher reads text")
    return torch.stack([found[layer] for layer in stack])


def choose_layers(
    teacher, layers: int | None, blocks: torch.Tensor, inits: Sequence[str] = INITS
) -> pd.DataFrame:
    """What each `init` of `student_from_teacher` keeps, and where such a student starts.

    Args:
        teacher: the model that the student is cut from.
        layers: how many to keep; None for half of them.
        blocks: a few training blocks of token ids, shape (blocks, block_size).
        inits: the ways to choose.

    Returns:
        a row for each init, the best start first. `layers` are their numbers, `perplexity`
        is that of the teacher without the others on these blocks, and `passes` is how often
        the teacher read the blocks in order to choose.

    Raises:
        InputError: as `student_from_teacher`.
    """
    teacher = merge_adapters(teacher)
    check_blocks(teacher, blocks, "teacher")
    rows = {}
    for init in inits:
        kept = layers_to_keep(teacher, layers, init, blocks)
        perplexity = nats_with(teacher, kept, blocks).exp().item()
        passes = passes_to_choose(init, depth_of(teacher), len(kept))
        rows[init] = {"layers": kept, "perplexity": perplexity, "passes": passes}
    return pd.DataFrame.from_dict(rows, orient="index").sort_values("perplexity", kind="stable")


def passes_to_choose(init: str, depth: int, layers: int) -> int:
    """How often a teacher reads the blocks until an `init` has chosen."""
    greedy = sum(range(layers + 1, depth + 1))
    return {"influence": 1, "contiguous": layers + 1, "greedy": greedy}.get(init, 0)
