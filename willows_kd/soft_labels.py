"""From logits to soft labels: what the teacher knows beyond its first choice.

Tensors only. Logits have shape (..., vocabulary); probabilities likewise.
"""

from numbers import Real
from typing import NamedTuple

import torch

from willows_kd.errors import is_integer, require, type_name


def soften(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Soft labels: softmax(logits / T), over the vocabulary.

    T = 1 gives the model's own distribution, T > 1 flattens it, T < 1 sharpens it
    (Hinton, Vinyals & Dean 2015, equation 1). The arithmetic is in float32 at least.

    Raises:
        InputError: the temperature is not a positive, finite number.
    """
    check_temperature(temperature)
    require(isinstance(logits, torch.Tensor), f"logits are {type_name(logits)}; give a tensor")
    return torch.softmax(at_least_float32(logits) / temperature, dim=-1)


def check_temperature(temperature: float) -> None:
    """Require a positive, finite number."""
    number = isinstance(temperature, Real | torch.Tensor)
    require(
        number and 0 < temperature < float("inf"),
        f"temperature is {temperature!r}; it must be a positive, finite number",
    )


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Half-precision logits in float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """Entropy of distributions in nats, shape (...): 0 for a hard label, log V if uniform."""
    return torch.special.entr(probabilities).sum(dim=-1)


class TopK(NamedTuple):
    """The k likeliest tokens, and the probability of all the others.

    Attributes:
        probabilities: shape (..., k), in falling order.
        tokens: token ids, shape (..., k).
        rest: probability mass outside the k, shape (...).
    """

    probabilities: torch.Tensor
    tokens: torch.Tensor
    rest: torch.Tensor


def top_k(logits: torch.Tensor, k: int = 10, temperature: float = 1.0) -> TopK:
    """The k likeliest tokens at a temperature; their order is the same at every temperature."""
    softened = soften(logits, temperature)
    vocabulary = softened.shape[-1]
    fits = is_integer(k) and k <= vocabulary
    require(fits, f"k is {k!r}; it must be a whole number from 1 to {vocabulary}")
    probabilities, tokens = softened.topk(k, dim=-1)
    return TopK(probabilities, tokens, (1 - probabilities.sum(dim=-1)).clamp_min(0))
