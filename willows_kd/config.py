"""The settings of a distillation, in one place, checked when they are made."""

import math
import numbers
from dataclasses import dataclass

from willows_kd.errors import InputError, is_integer

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


@dataclass(frozen=True)
class DistillConfig:
    """How a student is trained.

    Attributes:
        temperature: softens the teacher's and the student's distributions alike.
        alpha: weight of the hard-label cross-entropy, as in Hinton et al. 2015; 1 - alpha
            is the weight of the soft labels. 0 is soft labels only, 1 is the hard-label
            control. Some libraries weigh the other side: torchtune's `kd_ratio` is the
            weight of the soft labels, so it is 1 - alpha.
        divergence: how the distance from the soft labels is measured, by name.
        beta: the teacher's weight in the Jensen-Shannon divergence; the others ignore it.
        skew: how much of the first distribution the skewed KLs mix into the second, as in
            DistiLLM; the others ignore it.
        hidden_weight: weight of the distance between hidden states (cosine, as in
            DistilBERT), which is added to the loss.
        hidden_layers: which hidden states, as pairs (student's, teacher's) of numbers: 0 is
            the embeddings, k what layer k puts out. None compares the final ones, which the
            output weights are applied to.
        student_text: share of the blocks of a step that the student writes itself, from a
            block's first quarter on (on-policy; lambda in Agarwal et al. 2024). Only what it
            wrote is scored.
        epochs: passes over the training blocks.
        learning_rate: the peak, after the warm-up and before the cosine decay.
        batch_size: blocks in one forward pass, over all processes.
        gradient_accumulation_steps: forward passes in one optimiser step.
        warmup_ratio: share of all steps over which the learning rate rises.
        weight_decay: AdamW's, on matrices only.
        max_grad_norm: a gradient with a larger norm is scaled down to this norm.
        dropout: the student's dropout probability while it trains.
        seed: orders the blocks and draws the dropout.
        dtype: "float32", or "bfloat16" for autocast with float32 weights.
        gradient_checkpointing: keep only each layer's input for the backward pass and
            compute the rest again: slower, in less memory.
    """

    temperature: float = 1.0
    alpha: float = 0.0
    divergence: str = "forward_kl"
    beta: float = 0.5
    skew: float = 0.1
    hidden_weight: float = 0.0
    hidden_layers: tuple[tuple[int, int], ...] | None = None
    student_text: float = 0.0
    epochs: int = 3
    learning_rate: float = 1e-3
    batch_size: int = 8
    gradient_accumulation_steps: int = 1
    warmup_ratio: float = 0.1
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    dropout: float = 0.0
    seed: int = 0
    dtype: str = "float32"
    gradient_checkpointing: bool = False

    def __post_init__(self):
        """Check every setting, and say what would be accepted.

        Raises:
            InputError: a value has the wrong type or lies outside its range.
        """
        self._check("temperature", float, "above 0 and at most 1000", lambda v: 0 < v <= 1000)
        self._check("alpha", float, "from 0 (soft labels only) to 1 (hard labels only)", unit_range)
        self._check("divergence", str, f"one of {', '.join(DIVERGENCE_NAMES)}", DIVERGENCE_NAMES)
        self._check("beta", float, "above 0 and below 1", lambda v: 0 < v < 1)
        self._check("skew", float, "at least 0 and below 1", lambda v: 0 <= v < 1)
        self._check("hidden_weight", float, "at least 0", lambda v: v >= 0)
        self._check_hidden_layers()
        self._check("student_text", float, "from 0 (the blocks as they are) to 1", unit_range)
        if self.student_text and self.alpha:
            raise InputError(
                f"alpha is {self.alpha}; it must be 0 where the student writes the text "
                "(student_text), since nobody knows its hard labels"
            )
        self._check("epochs", int, "at least 1", lambda v: v >= 1)
        self._check("learning_rate", float, "above 0 and at most 1", lambda v: 0 < v <= 1)
        self._check("batch_size", int, "at least 1", lambda v: v >= 1)
        self._check("gradient_accumulation_steps", int, "at least 1", lambda v: v >= 1)
        self._check("warmup_ratio", float, "from 0 to 1", unit_range)
        self._check("weight_decay", float, "at least 0", lambda v: v >= 0)
        self._check("max_grad_norm", float, "above 0", lambda v: v > 0)
        self._check("dropout", float, "at least 0 and below 1", lambda v: 0 <= v < 1)
        self._check("seed", int, "from 0 to 2**32 - 1", lambda v: 0 <= v < 2**32)
        self._check("dtype", str, f"one of {', '.join(DTYPES)}", DTYPES)
        if not isinstance(self.gradient_checkpointing, bool):
            value = self.gradient_checkpointing
            raise InputError(f"gradient_checkpointing is {value!r}; it must be True or False")

    def _check_hidden_layers(self):
        if self.hidden_layers is None:
            return
        try:
            pairs = tuple((a, b) for a, b in self.hidden_layers)
        except (TypeError, ValueError):
            pairs = ()
        if not pairs or not all(is_integer(i, 0) for pair in pairs for i in pair):
            raise InputError(
                f"hidden_layers is {self.hidden_layers!r}; it must be pairs of layer numbers "
                "(student's, teacher's), such as ((1, 2), (3, 6)), or None"
            )
        object.__setattr__(self, "hidden_layers", tuple((int(a), int(b)) for a, b in pairs))

    def _check(self, name, type_, accepted, test):
        value = getattr(self, name)
        whole = "a whole number, " if type_ is int else ""
        kind = {int: numbers.Integral, float: numbers.Real, str: str}[type_]
        right_type = isinstance(value, kind) and not isinstance(value, bool)
        finite = right_type and (type_ is str or abs(value) < math.inf)
        if not finite or not (test(value) if callable(test) else value in test):
            raise InputError(f"{name} is {value!r}; it must be {whole}{accepted}")
        if not isinstance(value, int | float | str):  # NumPy's, which JSON does not know
            object.__setattr__(self, name, type_(value))


def unit_range(value: float) -> bool:
    """Whether a value lies from 0 to 1."""
    return 0 <= value <= 1
