"""From logits to soft labels: what the teacher knows beyond its first choice.

Tensors only. Logits have shape (..., vocabulary); probabilities likewise.
"""

from typing import NamedTuple

import torch


def soften(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Soft labels: softmax(logits / T), over the vocabulary.

    T = 1 gives the model's own distribution, T > 1 flattens it, T < 1 sharpens it
    (Hinton, Vinyals & Dean 2015, equation 1). The sum is taken in float32.

    Raises:
        ValueError: the temperature is not a positive, finite number.
    """
    check_temperature(temperature)
    return torch.softmax(logits.float() / temperature, dim=-1)


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that no softmax can take."""
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature is {temperature}; it must be a positive, finite number")


def entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """Entropy of distributions in nats, shape (...): 0 for a hard label, log V for no idea."""
    return torch.special.entr(probabilities).sum(dim=-1)


class TopK(NamedTuple):
    """The k likeliest tokens, and what is left to all the others.

    Attributes:
        probabilities: shape (..., k), falling.
        tokens: token ids, shape (..., k).
        rest: probability mass outside the k, shape (...).
    """

    probabilities: torch.Tensor
    tokens: torch.Tensor
    rest: torch.Tensor


def top_k(logits: torch.Tensor, k: int = 10, temperature: float = 1.0) -> TopK:
    """The k likeliest tokens at a temperature. Their order is the same at every temperature."""
    probabilities, tokens = soften(logits, temperature).topk(k, dim=-1)
    return TopK(probabilities, tokens, (1 - probabilities.sum(dim=-1)).clamp_min(0))
