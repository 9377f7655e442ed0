"""A student of some of its teacher's layers, proven equal to its teacher without the others."""

import contextlib
import copy
import re
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from willows_kd.errors import InputError, is_integer, one_line, require
from willows_kd.models import (
    eval_mode,
    merge_adapters,
    require_model,
    require_weights,
    untrained,
    vocabulary_size,
)


def student_from_teacher(
    teacher: PreTrainedModel,
    layers: int | None = None,
    init: str | Sequence[int] = "spaced",
    seed: int = 0,
) -> PreTrainedModel:
    """A student with fewer layers, in float32, on the teacher's vocabulary.

    A student that copies layers is proven: on a short input it must give the logits of
    the teacher with its other layers skipped. The student is float32 even if the teacher is
    in half precision, in which training soon breaks down. LoRA adapters are merged first.

    Args:
        teacher: any decoder that `transformers` builds from a config.
        layers: how many; None for half of the teacher's.
        init: which layers are copied, with embeddings and head. ``"spaced"``: evenly
            spaced ones, the first and the last among them, as for DistilGPT2 (Sanh et al.
            2019, section 3). ``"first"``: the first. A list of layer numbers, counted from 0
            and rising: these, such as those that `choose_layers` found to be missed most.
            ``"random"``: none.
        seed: for ``"random"``.

    Raises:
        InputError: `layers` is not between 1 and the teacher's, `init` is unknown, or the
            teacher's family cannot be cut so: a setting of it may be in the way.
    """
    require_model(teacher, "teacher")
    require_weights(teacher)
    teacher = merge_adapters(teacher)
    kept = layers_to_keep(teacher, layers, init)
    family = teacher.config.model_type
    with family_errors_as_input_errors(f"no student of layers {kept} of this {family} teacher"):
        config = config_of_layers(teacher.config, depth_of(teacher), kept)
        student = untrained(config, teacher, seed)
        if isinstance(init, str) and init == "random":
            return student
        check_layers(teacher, student, kept)
        student.load_state_dict(weights_of_layers(teacher, kept))
        without = "the other layers; a layer of this family depends on its number, or on the layers"
        check_equal(student, teacher, skipped_layers(teacher, kept), f"{without} before it")
    return student


@contextlib.contextmanager
def family_errors_as_input_errors(what: str):
    """Turn whatever a family's code makes of fewer layers into one line."""
    try:
        yield
    except Exception as error:
        raise InputError(f"{what}: {one_line(error).partition('. ')[0]}") from error


# -- which layers, and where they are --------------------------------------------------


def layers_to_keep(teacher, layers: int | None, init: str | Sequence[int]) -> list[int]:
    """Which of a teacher's layers a student takes, counted from 0.

    Raises:
        InputError: there are not so many, or `init` is none of the accepted values.
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
    known = isinstance(init, str) and init in ("spaced", "first", "random")
    accepted = "spaced, first, random or a list of layer numbers, such as choose_layers returns"
    require(known, f"init is {init!r}; it must be {accepted}")
    layers = max(1, depth // 2) if layers is None else layers
    fits = is_integer(layers) and layers <= depth
    require(fits, f"layers is {layers!r}; this teacher allows 1 to {depth}")
    return list(range(layers)) if init == "first" else evenly_spaced(depth, int(layers))


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
    require(bool(found), f"this {config.model_type} model has no list of its {depth} layers")
    # the decoder's rather than those of a part that sees or hears
    return next((name for name, module in found.items() if module in decoder), next(iter(found)))


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


# -- settings and weights of some layers -----------------------------------------------


def config_of_layers(config, depth: int, kept: list[int]):
    """A model's config for some of its layers: the depth is set, and settings with a value for
    each layer are cut. It is read as a saved student's would be.

    Settings that name layers or count them are left as they are: if a layer then becomes
    another, `check_layers` or `check_equal` refuses the student.
    """
    text = config.get_text_config(decoder=True)
    settings = text.to_dict()
    for name, value in settings.items():
        per_layer = isinstance(value, list | tuple) and len(value) == depth
        if per_layer and not name.endswith("token_id"):
            settings[name] = [value[i] for i in kept]
    settings[depth_name(text)] = len(kept)
    cut = type(text).from_dict(settings)
    if text is config:
        return cut
    config = copy.deepcopy(config)  # of a model that sees or hears, too
    name = next(name for name, part in vars(config).items() if type(part) is type(text))
    setattr(config, name, cut)
    return config


def weights_of_layers(model: PreTrainedModel, kept: list[int]) -> dict[str, torch.Tensor]:
    """A model's weights with only some of its layers, numbered anew."""
    stack, weights = f"{layer_stack(model)}.", {}
    for key, tensor in model.state_dict().items():
        if key.startswith(stack):
            number, _, rest = key.removeprefix(stack).partition(".")
            if int(number) not in kept:
                continue
            key = f"{stack}{kept.index(int(number))}.{rest}"
        weights[key] = tensor
    return weights


# -- the proof -------------------------------------------------------------------------

# attributes in which layers that compute the same may differ
OF_NO_LAYER = "^p$|drop|training|idx|index|layer_id|number|store"


def check_layers(teacher, student, kept: list[int]) -> None:
    """Require each layer of a student to be built as the teacher's layer that it copies.

    Settings that a short input does not show, such as a long attention window, are
    seen here: they are attributes of the layers or of what they contain.

    Raises:
        InputError: with the first attribute that differs.
    """
    mine, theirs = (model.get_submodule(layer_stack(model)) for model in (student, teacher))
    for i, number in enumerate(kept):
        now, was = build_of(mine[i]), build_of(theirs[number])
        for name in sorted(now.keys() | was.keys()):
            old, new = was.get(name, "absent"), now.get(name, "absent")
            made = f"{name} is {old} in layer {number}, and its config makes it {new} in layer {i}"
            require(old == new, f"{made} of {len(kept)}")


def build_of(layer: nn.Module) -> dict[str, object]:
    """The classes of a layer's modules, and those of their attributes that make a difference."""
    found: dict[str, object] = {}
    for name, module in layer.named_modules():
        found[name or "the class"] = type(module).__name__
        for key, value in vars(module).items():
            plain = isinstance(value, bool | int | float | str) and not key.startswith("_")
            if plain and not re.search(OF_NO_LAYER, key):
                found[f"{name}.{key}".lstrip(".")] = value
    return found


@torch.no_grad()
def check_equal(student, teacher, cut, without: str) -> None:
    """Prove a student: its logits are those of its teacher without what it has not.

    They may differ by 0.1 % of their size from those of a teacher in float32, and by 5 % if the
    teacher rounds to half precision.

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
