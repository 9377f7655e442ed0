"""The settings of a distillation: each with its default, its range and its help, in one place.

The checks, the options of the command line and the documentation are made from them.
"""

import contextlib
import dataclasses
import inspect
import numbers
import operator
from collections.abc import Callable
from dataclasses import dataclass, field

from willows_kd.errors import InputError, is_integer, require

DIVERGENCE_NAMES = (
    "forward_kl",
    "reverse_kl",
    "jensen_shannon",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "total_variation",
)
DTYPES = ("float32", "bfloat16")
INITS = ("spaced", "first", "influence", "contiguous", "greedy")
EXPORT_FORMATS = ("onnx", "onnx-int8", "gguf")
LONGEST_BLOCK = 1024  # tokens: GPT-2's positions; longer ones only by choice
TOKENS_PER_PASS = 1024


def setting(default, about: str, accepted: str = "", fits: Callable | tuple = (True, False)):
    """A field of `DistillConfig`.

    Args:
        default: its type is the setting's.
        about: what the setting does.
        accepted: its range in words.
        fits: its range: a function of the value, or all values.
    """
    return field(default=default, metadata={"help": about, "accepted": accepted, "fits": fits})


AT_LEAST_0 = "at least 0", lambda v: v >= 0
AT_LEAST_1 = "at least 1", lambda v: v >= 1
BETWEEN = "above 0 and below 1", lambda v: 0 < v < 1
BELOW_1 = "at least 0 and below 1", lambda v: 0 <= v < 1


@dataclass(frozen=True)
class DistillConfig:
    """How a student is trained. Each setting is checked when it is made.

    Raises:
        InputError: a value has the wrong type or lies outside its range.
    """

    temperature: float = setting(
        1.0,
        "softens the distributions of teacher and student alike",
        "above 0 and at most 1000",
        lambda v: 0 < v <= 1000,
    )
    alpha: float = setting(
        0.0,
        "weight of the hard-label cross-entropy (Hinton et al. 2015); 1 - alpha, torchtune's "
        "kd_ratio, is that of the soft labels",
        "from 0 (soft labels only) to 1 (hard labels only)",
        lambda v: 0 <= v <= 1,
    )
    divergence: str = setting(
        "forward_kl",
        "how the distance from the soft labels is measured",
        f"one of {', '.join(DIVERGENCE_NAMES)}",
        DIVERGENCE_NAMES,
    )
    beta: float = setting(0.5, "the teacher's weight in jensen_shannon", *BETWEEN)
    skew: float = setting(
        0.1, "the first distribution's share in the second of a skewed KL (DistiLLM)", *BETWEEN
    )
    hidden_weight: float = setting(
        0.0,
        "weight of the cosine distance between hidden states (DistilBERT), added to the loss",
        *AT_LEAST_0,
    )
    hidden_layers: tuple[tuple[int, int], ...] | None = setting(
        None,
        "which hidden states, as pairs (student's, teacher's): 0 is the embeddings, k what layer "
        "k puts out; if not given, the final ones, which the output weights are applied to",
    )
    on_policy_share: float = setting(
        0.0,
        "λ, the share of a step's blocks that the student writes itself, from a block's first "
        "quarter on, and is scored on (Agarwal et al. 2024)",
        "from 0 (the text as it is) to 1 (on-policy)",
        lambda v: 0 <= v <= 1,
    )
    epochs: int = setting(3, "passes over the training blocks", *AT_LEAST_1)
    learning_rate: float = setting(
        1e-3,
        "the peak learning rate, after the warm-up and before the cosine decay",
        "above 0 and at most 1",
        lambda v: 0 < v <= 1,
    )
    batch_size: int | None = setting(
        None,
        "blocks in a forward pass, over all processes (if not given, as many as make "
        f"{TOKENS_PER_PASS:,} tokens)",
        *AT_LEAST_1,
    )
    gradient_accumulation_steps: int = setting(
        1, "forward passes in an optimiser step", *AT_LEAST_1
    )
    warmup_ratio: float = setting(
        0.1,
        "share of the steps over which the learning rate rises",
        "from 0 to 1",
        lambda v: 0 <= v <= 1,
    )
    weight_decay: float = setting(0.1, "AdamW's weight decay, on matrices only", *AT_LEAST_0)
    max_grad_norm: float = setting(
        1.0,
        "a gradient with a larger norm is scaled down to this norm",
        "above 0",
        lambda v: v > 0,
    )
    dropout: float = setting(0.0, "the student's dropout while it trains", *BELOW_1)
    seed: int = setting(
        0,
        "orders the blocks and draws dropout and on-policy text",
        "from 0 to 2**32 - 1",
        lambda v: 0 <= v < 2**32,
    )
    dtype: str = setting(
        "float32",
        "arithmetic of a step; bfloat16 is by autocast, with weights in float32",
        f"one of {', '.join(DTYPES)}",
        DTYPES,
    )
    gradient_checkpointing: bool = setting(
        False, "compute activations again in the backward pass: slower, in less memory"
    )

    def __post_init__(self):
        for each in dataclasses.fields(self):
            self._check(each)
        if self.on_policy_share and self.alpha:
            raise InputError(
                f"alpha is {self.alpha}; it must be 0 if the student writes the text "
                "(on_policy_share), since nobody knows its hard labels"
            )

    def blocks_per_pass(self, block_size: int) -> int:
        """How many blocks of so many tokens go through a model at once, over all processes."""
        return self.batch_size or max(1, TOKENS_PER_PASS // block_size)

    def _check(self, each: dataclasses.Field) -> None:
        value, fits = getattr(self, each.name), each.metadata["fits"]
        if value is None and each.default is None:
            return
        if each.name == "hidden_layers":
            object.__setattr__(self, each.name, layer_pairs(value))
            return
        type_ = scalar_type(each)
        kind = {int: numbers.Integral, float: numbers.Real}.get(type_, type_)
        right_type = isinstance(value, kind) and (type_ is bool or not isinstance(value, bool))
        if not right_type or not (fits(value) if callable(fits) else value in fits):
            whole = "a whole number, " if type_ is int else ""
            accepted = each.metadata["accepted"] or "True or False"
            raise InputError(f"{each.name} is {value!r}; it must be {whole}{accepted}")
        if not isinstance(value, int | float | str):  # NumPy's, which JSON does not know
            object.__setattr__(self, each.name, type_(value))


def check_dial(**values) -> None:
    """Check what stands in a notebook's dial, before anything is computed with it.

    Args:
        values: settings of `DistillConfig` by name, and numbers of things: blocks, texts, tokens.

    Raises:
        InputError: a setting lies outside its range, or a number of things is not whole or
            below 1; None leaves it to the notebook.
    """
    names = {each.name for each in dataclasses.fields(DistillConfig)}
    DistillConfig(**{name: value for name, value in values.items() if name in names})
    for name, value in values.items():
        fits = name in names or value is None or is_integer(value)
        require(fits, f"{name} is {value!r}; it must be a whole number, at least 1")


def scalar_type(each: dataclasses.Field) -> type:
    """The type of a setting that is one value."""
    return int if each.default is None else type(each.default)


def layer_pairs(value) -> tuple[tuple[int, int], ...]:
    """Pairs of layer numbers, checked."""
    with contextlib.suppress(TypeError, ValueError):  # of what are no pairs of whole numbers
        pairs = tuple((operator.index(a), operator.index(b)) for a, b in value)
        if pairs and min(map(min, pairs)) >= 0:
            return pairs
    raise InputError(
        f"hidden_layers is {value!r}; it must be pairs of layer numbers (student's, teacher's), "
        "such as ((1, 2), (3, 6)), or None"
    )


def described(each: dataclasses.Field) -> str:
    """What a setting does, and its range."""
    accepted = each.metadata["accepted"]
    return each.metadata["help"] + (f"; {accepted}" if accepted else "")


DistillConfig.__doc__ = "\n".join(
    [inspect.cleandoc(DistillConfig.__doc__ or ""), "", "Attributes:"]
    + [f"    {each.name}: {described(each)}." for each in dataclasses.fields(DistillConfig)]
)
