"""A student of some of its teacher's layers, heads and units, proven equal to what was kept."""

import copy
import re
import warnings
from collections.abc import Sequence

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from willows_kd.compress.layers import (
    depth_name,
    depth_of,
    family_errors_as_input_errors,
    layer_stack,
    layers_to_keep,
    skipped_layers,
)
from willows_kd.compress.width import masked, parts_to_keep, pruned
from willows_kd.errors import is_integer, require
from willows_kd.models import (
    eval_mode,
    merge_adapters,
    quiet_transformers,
    require_model,
    vocabulary_size,
)


def student_from_teacher(
    teacher: PreTrainedModel,
    layers: int | None = None,
    init: str | Sequence[int] = "spaced",
    seed: int = 0,
    heads: Sequence[Sequence[int]] | torch.Tensor | None = None,
    feed_forward: Sequence[Sequence[int]] | torch.Tensor | None = None,
    blocks: torch.Tensor | None = None,
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
        init: which layers are copied, with embeddings and head. ``"spaced"``: evenly
            spaced ones, the first and the last among them, as for DistilGPT2 (Sanh et al.
            2019, section 3). ``"first"``: the first. ``"influence"``: those of greatest
            `block_influence`. ``"contiguous"``: all but the run of neighbours that is
            missed least (after Gromov et al. 2024, "The Unreasonable Ineffectiveness of
            the Deeper Layers"). ``"greedy"``: what is left when the layer that is missed
            least is dropped, again and again. A list of layer numbers, counted from 0 and
            rising: these. ``"random"``: none. `choose_layers` compares them.
        seed: for ``"random"``.
        heads, feed_forward: the numbers of the heads and feed-forward units to keep, for
            each layer of the teacher, shape (layers, kept), such as those of greatest
            `importance`; None for all. Grouped heads are numbered by group, and GPT-2's
            heads cannot be pruned: its config ties their size to their number.
        blocks: a few training blocks of token ids, shape (blocks, block_size), on which
            influence, contiguous and greedy measure.

    Raises:
        InputError: `layers` is not between 1 and the teacher's, `init` is unknown, `heads`
            or `feed_forward` are no such numbers, or the teacher's family cannot be cut so:
            a setting of it may be in the way.
    """
    require_model(teacher, "teacher")
    teacher = merge_adapters(teacher)
    kept = layers_to_keep(teacher, layers, init, blocks)
    parts = parts_to_keep(teacher, heads=heads, feed_forward=feed_forward)
    family = teacher.config.model_type
    with family_errors_as_input_errors(f"no student of layers {kept} of this {family} teacher"):
        teacher = narrowed(teacher, parts)
        config = config_of_layers(teacher.config, depth_of(teacher), kept)
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


# -- settings of some layers ----------------------------------------------------------


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


# -- weights of some layers, and the proof --------------------------------------------


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
