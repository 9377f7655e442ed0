"""Width: how much heads and feed-forward units pass on, and a model without some of them.

The residual stream keeps its width, so a narrower student's hidden states still have the
teacher's shape. Grouped heads stay whole: there, a "head" is one key/value head with the
query heads that share it.
"""

import contextlib
import copy
import re
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from willows_kd.errors import InputError, require
from willows_kd.evaluation import check_blocks
from willows_kd.models import eval_mode, merge_adapters, require_model, require_weights, untrained
from willows_kd.students import check_equal, family_errors_as_input_errors

LAYOUTS = {  # GPT-2's and Llama's names of the maps into heads or units and, last, out of them
    "heads": (("c_attn", "c_proj"), ("q_proj", "k_proj", "v_proj", "o_proj")),
    "feed_forward": (("c_fc", "c_proj"), ("gate_proj", "up_proj", "down_proj")),
}


@torch.no_grad()
def importance(teacher, blocks: torch.Tensor) -> dict[str, torch.Tensor]:
    """How much each of a teacher's heads and feed-forward units passes on: which to keep.

    It is the norm of what a head or unit gives to its layer's output projection, mean over
    tokens; for a unit this is its mean |activation| (Muralidharan et al. 2024, "Compact
    Language Models via Pruning and Knowledge Distillation", section 2.2).

    Args:
        teacher: a model laid out as GPT-2 or Llama is.
        blocks: a few blocks of token ids, shape (blocks, block_size).

    Returns:
        "heads", shape (layers, heads), with one number per group if heads are grouped, and
        "feed_forward", shape (layers, units). `scores["feed_forward"].topk(n).indices` are
        the units that `narrowed` is to keep.

    Raises:
        InputError: the teacher has another layout, or these are no blocks for it.
    """
    check_blocks(teacher, blocks, "teacher")
    scores = {part: [] for part in LAYOUTS}
    with contextlib.ExitStack() as stack:
        stack.enter_context(eval_mode(teacher))
        for part, found in scores.items():
            layers, count = layout(teacher, part)

            def score(module, args, found=found, count=count):
                found.append(args[0].float().unflatten(-1, (count, -1)).norm(dim=-1).mean((0, 1)))

            for *_, out in map(dict.values, layers):
                stack.callback(out.register_forward_pre_hook(score).remove)
        teacher.base_model(blocks.to(teacher.device), use_cache=False)
    return {part: torch.stack(found) for part, found in scores.items()}


def narrowed(
    teacher: PreTrainedModel,
    heads: Sequence[Sequence[int]] | torch.Tensor | None = None,
    feed_forward: Sequence[Sequence[int]] | torch.Tensor | None = None,
) -> PreTrainedModel:
    """A copy of a teacher in float32 with only some of its heads and feed-forward units.

    It is proven: on a short input it must give the logits of the teacher with the other heads
    and units at zero. `student_from_teacher` takes it as a teacher, to cut layers, too.

    Args:
        teacher: a model laid out as GPT-2 or Llama is.
        heads, feed_forward: the numbers of the heads and feed-forward units to keep, for each
            layer, shape (layers, kept), such as those of greatest `importance`; None for all.
            Grouped heads are numbered by group, and GPT-2's heads cannot be pruned: its config
            ties their size to their number.

    Raises:
        InputError: `heads` or `feed_forward` are no such numbers, or the teacher's family
            cannot be cut so.
    """
    require_model(teacher, "teacher")
    require_weights(teacher)
    teacher = merge_adapters(teacher)
    kept = parts_to_keep(teacher, heads=heads, feed_forward=feed_forward)
    with family_errors_as_input_errors(f"no narrower {teacher.config.model_type}"):
        config, weights = pruned(teacher, kept)
        student = untrained(config, teacher)
        student.load_state_dict(weights)
        check_equal(student, teacher, masked(teacher, kept), "the other heads and units")
    return student


def layout(model: PreTrainedModel, part: str) -> tuple[list[dict[str, nn.Module]], int]:
    """By name, each layer's maps into its heads or units and, last, out of them; and how many
    heads (groups, if grouped) or units these are.
    """
    config = model.config.get_text_config(decoder=True)
    for names in LAYOUTS[part]:
        layers = [
            {f"{path}.{name}": getattr(module, name) for name in names}
            for path, module in model.named_modules()
            if all(hasattr(module, name) for name in names)
            and re.search(r"\.\d+\.\w+$", path)  # a layer's own, not one of its experts
        ]
        if len(layers) == config.num_hidden_layers:
            heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
            *_, out = layers[0].values()
            return layers, heads if part == "heads" else out.weight.numel() // config.hidden_size
    raise InputError(
        f"{part} of the {config.model_type} family cannot be pruned: only the layouts of GPT-2 "
        "and Llama are known"
    )


def parts_to_keep(teacher: PreTrainedModel, **given) -> dict[str, torch.Tensor]:
    """Which heads and units stay, shape (layers, kept), rising; nothing for a part left whole."""
    kept = {}
    for part, numbers in given.items():
        if numbers is None:
            continue
        layers, count = layout(teacher, part)
        require(
            part != "heads" or len(layers[0]) > 2,
            f"heads of the {teacher.config.model_type} family cannot be pruned: its config makes a "
            "head as wide as the model divided by its heads; prune feed_forward, or layers",
        )
        rows = [sorted(set(torch.as_tensor(row).tolist())) for row in numbers]
        equal = len(rows) == len(layers) and len({len(row) for row in rows}) == 1 and rows[0]
        require(
            equal and min(map(min, rows)) >= 0 and max(map(max, rows)) < count,
            f"{part} must list equally many different numbers from 0 to {count - 1} for each "
            f"of the teacher's {len(layers)} layers, such as "
            f"importance(teacher, blocks)[{part!r}].topk({count // 2 or 1}).indices",
        )
        kept[part] = torch.tensor(rows, device=teacher.device)
    return kept


def pruned(teacher: PreTrainedModel, kept: dict[str, torch.Tensor]):
    """A teacher's config and weights with only the heads and units of `parts_to_keep`."""
    config, weights = copy.deepcopy(teacher.config), teacher.state_dict()
    for part, rows in kept.items():
        layers, count = layout(teacher, part)
        text, number = config.get_text_config(decoder=True), rows.shape[1]
        if part == "feed_forward":
            setattr(text, "n_inner" if hasattr(text, "n_inner") else "intermediate_size", number)
        else:
            queries = text.num_attention_heads
            text.head_dim = getattr(text, "head_dim", None) or text.hidden_size // queries
            text.num_attention_heads, text.num_key_value_heads = queries // count * number, number
        for layer, chosen in zip(layers, rows, strict=True):
            *_, out = layer
            for name, module in layer.items():
                side = int(isinstance(module, Conv1D) != (name == out))  # Conv1D is transposed
                sides = {"weight": side} if name == out else {"weight": side, "bias": 0}
                for key, dim in sides.items():
                    if (tensor := weights.get(f"{name}.{key}")) is not None:
                        each = tensor.unflatten(dim, (count, -1)).index_select(dim, chosen)
                        weights[f"{name}.{key}"] = each.flatten(dim, dim + 1)
    return config, weights


@contextlib.contextmanager
def masked(teacher: PreTrainedModel, kept: dict[str, torch.Tensor]):
    """A teacher whose other heads and units pass on zeros: what a pruned one must equal."""
    with contextlib.ExitStack() as stack:
        for part, rows in kept.items():
            layers, count = layout(teacher, part)
            for layer, chosen in zip(layers, rows, strict=True):
                *_, out = layer.values()
                on = torch.zeros(count, 1, dtype=torch.bool, device=teacher.device)
                on[chosen] = True

                def silence(module, args, on=on):
                    return (args[0].unflatten(-1, (len(on), -1)) * on).flatten(-2)

                stack.callback(out.register_forward_pre_hook(silence).remove)
        yield
