"""Checks for notebook S3: rounding to few bits, who follows a draft, what a draft brings."""

from collections.abc import Callable
from functools import partial

import torch

from willows_kd.exercises import judge, random_logits


def check_rounding(my_rounding: Callable) -> bool:
    """Check `my_rounding(weight, bits)`: a matrix, (outputs, inputs), as few bits hold it."""
    weight = random_logits(6, 9, seed=4) * torch.arange(1, 7)[:, None]  # rows of several sizes

    def right(w, bits, more=0, dim=1, size=torch.abs, near=torch.round, unit=None) -> torch.Tensor:
        scale = size(w).amax(dim, keepdim=True) / (2 ** (bits - 1) - 1 + more)
        return near(w / scale) * (scale if unit is None else unit)

    mistakes = {
        "nothing is rounded yet": partial(right, near=torch.clone),
        "these are the integers: multiply them by their scale": partial(right, unit=1),
        "there is one scale for all rows; each has its own": partial(right, dim=(0, 1)),
        "there is a scale for each column; each row has its own": partial(right, dim=0),
        "the largest may be negative: take .abs() first": partial(right, size=torch.clone),
        "signed bits reach 2^(bits - 1) - 1, not one more": partial(right, more=1),
    }
    praise = "each row has its own scale, and none of its integers is out of reach"
    return judge(my_rounding, right, mistakes, praise, (weight, 4), (weight, 3))


def check_emitted(my_emitted: Callable) -> bool:
    """Check `my_emitted(p, q, token, u)`: how likely each token is to be emitted.

    `u` is the number from 0 to 1 that decides on the drafted token: certain if it is
    accepted, else the residual distribution. Shapes (vocabulary,).
    """
    p, q = torch.tensor([[0.4, 0.1, 0.2, 0.2, 0.1], [0.2, 0.3, 0.1, 0.2, 0.2]]).double()
    cases = [(p, q, *drawn) for drawn in ((0, 0.99), (1, 0.2), (3, 0.9), (1, 0.7))]

    def right(p, q, token, u, rest=lambda p, q: (p - q).clamp(min=0), total=torch.sum):
        accepted = u < p[token] / q[token]
        return torch.eye(5)[token] if accepted else rest(p, q) / total(rest(p, q))

    mistakes = {
        "if u is below p/q, all of the probability is on `token`": lambda p, *_: p,
        "a token is rejected if u is above p/q": lambda p, q, token, u: torch.eye(5)[token],
        "if it is rejected, draw from max(0, p - q), not p": partial(right, rest=lambda p, q: p),
        "max(0, p - q) does not sum to 1 yet": partial(right, total=torch.ones_like),
    }
    praise = "whatever the draft was, the text is the teacher's"
    return judge(my_emitted, right, mistakes, praise, *cases)


def check_tokens(my_tokens: Callable) -> bool:
    """Check `my_tokens(a, k)`: expected tokens for each pass of the teacher."""

    def right(a: float, k: int) -> float:
        return sum(a**i for i in range(k + 1))

    mistakes = {
        "one token of the teacher's comes with every pass": lambda a, k: right(a, k) - 1,
        "the end is one term too early: the last is a**k": lambda a, k: right(a, k - 1),
        "a token counts only if all before it were accepted": lambda a, k: k * a + 1,
    }
    praise = "the later a drafted token, the less it brings"
    return judge(my_tokens, right, mistakes, praise, (0.5, 1), (0.8, 4))
