"""Checks for notebook S3: rounding to few bits, who follows a draft, what a draft brings."""

from collections.abc import Callable

import torch

from willows_kd.exercises import attempt_number, judge, not_yet, random_logits


def check_rounding(my_rounding: Callable) -> bool:
    """Check `my_rounding(weight, bits)`: a matrix, (outputs, inputs), as few bits hold it."""
    cases = []
    for bits, shape in ((4, (6, 9)), (3, (4, 5))):
        channels = torch.arange(1, shape[0] + 1)[:, None]  # of different size
        cases.append((random_logits(*shape, seed=bits) * channels, bits))

    def right(
        w, bits, most=lambda b: 2 ** (b - 1) - 1, dim=1, size=torch.abs, near=torch.round, unit=None
    ) -> torch.Tensor:
        scale = size(w).amax(dim, keepdim=True) / most(bits)
        return near(w / scale) * (scale if unit is None else unit)

    mistakes = {
        "nothing is rounded yet": {"near": torch.clone},
        "these are the integers; multiply them by their scale": {"unit": 1},
        "there is one scale for all rows; each has its own": {"dim": (0, 1)},
        "there is a scale for each column; each row has its own": {"dim": 0},
        "the scale is that of the largest *size*: take .abs() first": {"size": torch.clone},
        "you cut off what is behind the point": {"near": torch.trunc},
        "you round down; take the nearest integer": {"near": torch.floor},
        "signed bits reach 2^(bits - 1) - 1, not one more": {"most": lambda b: 2 ** (b - 1)},
        "twice as far as signed bits reach": {"most": lambda b: 2**b - 1},
    }
    praise = "each row has its own scale, and none of its integers is out of reach"
    return judge(my_rounding, cases, right, mistakes, praise)


def check_emitted(my_emitted: Callable) -> bool:
    """Check `my_emitted(p, q, token, u)`: how likely each token is to be emitted.

    `u` is the number from 0 to 1 that decides on the drafted token: certain if it is
    accepted, else the residual distribution. Shapes (vocabulary,).
    """
    p, q = torch.tensor([[0.4, 0.1, 0.2, 0.2, 0.1], [0.2, 0.3, 0.1, 0.2, 0.2]]).double()
    certain = torch.eye(5).double()
    for token, u in ((0, 0.99), (1, 0.2), (3, 0.9)):  # p/q is 2, 1/3 and 1
        found, problem = attempt_number(my_emitted, (p, q, token, u))
        if problem or not torch.equal(found.flatten(), certain[token]):
            told = f"with p = {p[token]:.1f}, q = {q[token]:.1f}, u = {u} the token is accepted: "
            told += "u is below min(1, p/q), so that this token is certain"
            return not_yet(problem or told)

    def residual(p, q, *_):
        return (p - q).clamp(min=0) / (p - q).clamp(min=0).sum()

    mistakes = {
        "if the token is rejected, the next is drawn from max(0, p - q) and not from p: what the "
        "draft has brought already must not be brought again": lambda p, *_: p,
        "max(0, p - q) does not sum to 1 yet": lambda p, q, *_: (p - q).clamp(min=0),
        "max(0, q - p) is what the draft has too much of": lambda p, q, *_: residual(q, p),
        "a rejected token is replaced by another one": lambda p, q, token, _: certain[token],
        "take absolute values nowhere: where q is larger, nothing is missing": (
            lambda p, q, *_: (p - q).abs() / (p - q).abs().sum()
        ),
    }
    praise = "whatever the draft was, the text is the teacher's"
    return judge(my_emitted, [(p, q, 1, 0.7)], residual, mistakes, praise)


def check_tokens(my_tokens: Callable) -> bool:
    """Check `my_tokens(a, k)`: expected tokens for each pass of the teacher."""

    def right(a: float, k: int) -> float:
        return sum(a**i for i in range(k + 1))

    mistakes = {
        "one token of the teacher's comes with every pass": lambda a, k: right(a, k) - 1,
        "the end is one term too early: the last is a**k": lambda a, k: right(a, k - 1),
        "a token counts only if all before it were accepted": lambda a, k: k * a + 1,
        "the teacher's own token is missing, and not all drafted ones count": lambda a, k: k * a,
        "this is endless drafting; k tokens are drafted, then it ends": lambda a, k: 1 / (1 - a),
        "this is the chance that all are accepted": lambda a, k: a**k,
    }
    cases = [(0.5, 1), (0.8, 4), (0.3, 6)]
    praise = "the later a drafted token, the less it brings"
    return judge(my_tokens, cases, right, mistakes, praise)
