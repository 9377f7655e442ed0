"""Which layers a student keeps: how much each one is missed, and ways to choose by it."""

import math
from collections.abc import Sequence

import pandas as pd
import torch

from willows_kd.config import INITS
from willows_kd.errors import require
from willows_kd.evaluation import block_nll, check_blocks
from willows_kd.losses import cosine_distance
from willows_kd.models import eval_mode, merge_adapters
from willows_kd.students import (
    depth_of,
    family_errors_as_input_errors,
    layer_stack,
    layers_to_keep,
    skipped_layers,
)


def choose_layers(
    teacher, layers: int | None, blocks: torch.Tensor, inits: Sequence[str] = INITS
) -> pd.DataFrame:
    """What each way to choose keeps, and where a student of these layers starts.

    Args:
        teacher: the model that the student is cut from.
        layers: how many to keep; None for half of them.
        blocks: a few training blocks of token ids, shape (blocks, block_size).
        inits: the ways. "spaced" and "first" are those of `student_from_teacher`.
            "influence": the layers of greatest `block_influence`. "contiguous": all but the run
            of neighbours that is missed least (after Gromov et al. 2024, "The Unreasonable
            Ineffectiveness of the Deeper Layers"). "greedy": greedy elimination, what is left
            when the layer that is missed least is dropped, again and again.

    Returns:
        a row for each init, the best start first. `layers` are their numbers, for `init` of
        `student_from_teacher`; `perplexity` is that of the teacher without the others on these
        blocks, and `passes` is how often the teacher read the blocks in order to choose.

    Raises:
        InputError: there are not so many layers, an init is unknown, or these are no blocks.
    """
    teacher = merge_adapters(teacher)
    check_blocks(teacher, blocks, "teacher")
    depth, family = depth_of(teacher), teacher.config.model_type
    rows = {}
    for init in inits:
        require(init in INITS, f"init is {init!r}; it must be one of {', '.join(INITS)}")
        kept = layers_to_keep(teacher, layers, "first" if init in MEASURED else init)
        with family_errors_as_input_errors(f"no layers of this {family} teacher by {init}"):
            if init in MEASURED:
                kept = MEASURED[init](teacher, depth, len(kept), blocks)
            perplexity = nats_with(teacher, kept, blocks).exp().item()
        passes = passes_to_choose(init, depth, len(kept))
        rows[init] = {"layers": kept, "perplexity": perplexity, "passes": passes}
    return pd.DataFrame.from_dict(rows, orient="index").sort_values("perplexity", kind="stable")


def passes_to_choose(init: str, depth: int, layers: int) -> int:
    """How often a teacher reads the blocks until an `init` has chosen."""
    greedy = sum(range(layers + 1, depth + 1))
    return {"influence": 1, "contiguous": layers + 1, "greedy": greedy}.get(init, 0)


def most_influential(teacher, depth: int, layers: int, blocks: torch.Tensor) -> list[int]:
    """The layers of greatest block influence."""
    return sorted(block_influence(teacher, blocks).topk(layers).indices.tolist())


def dropped_block(teacher, depth: int, layers: int, blocks: torch.Tensor) -> list[int]:
    """All layers but the run of neighbours that is missed least (Gromov et al. 2024 drop one)."""
    runs = [[*range(i), *range(i + depth - layers, depth)] for i in range(layers + 1)]
    return min(runs, key=lambda kept: nats_with(teacher, kept, blocks))


def greedy_elimination(teacher, depth: int, layers: int, blocks: torch.Tensor) -> list[int]:
    """What is left when the layer that is missed least is dropped, again and again."""
    kept = list(range(depth))
    while len(kept) > layers:
        fewer = [[i for i in kept if i != dropped] for dropped in kept]
        kept = min(fewer, key=lambda kept: nats_with(teacher, kept, blocks))
    return kept


MEASURED = {
    "influence": most_influential,
    "contiguous": dropped_block,
    "greedy": greedy_elimination,
}


def nats_with(teacher, kept: list[int], blocks: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of a teacher with only some of its layers, in nats per token; one number."""
    with skipped_layers(teacher, kept):
        return block_nll(teacher, blocks).mean().nan_to_num(math.inf)


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
