"""Checks for notebook 04: agreement, an interval from three values, perplexity from bits."""

import math
import statistics
from collections.abc import Callable

import torch

from willows_kd.exercises import judge


def check_agreement(my_agreement: Callable) -> bool:
    """Check `my_agreement(teacher_logits, student_logits)`: the top-1 agreement.

    Both logits have shape (batch, time, vocabulary); wanted is the share of all
    positions, from 0 to 1, at which both have the same first choice.
    """
    generator = torch.Generator().manual_seed(157)
    teacher = torch.randn(5, 7, 6, generator=generator)
    student = teacher + torch.randn(5, 7, 6, generator=generator)

    def agreement(teacher, student, dim: int = -1) -> float:
        return (teacher.argmax(dim) == student.argmax(dim)).double().mean().item()

    mistakes = {
        "your argmax runs over dim=1, time; take dim=-1": {"dim": 1},
        "your argmax runs over dim=0, the batch; take dim=-1": {"dim": 0},
        "the student is one position ahead": lambda t, s: agreement(t[:, :-1], s[:, 1:]),
        "the last position counts, too": lambda t, s: agreement(t[:, :-1], s[:, :-1]),
        "this is the share of positions that differ": lambda t, s: 1 - agreement(t, s),
        "this is a number of positions: take the mean": lambda t, s: 35 * agreement(t, s),
        "this is a percentage; the share is from 0 to 1": lambda t, s: 100 * agreement(t, s),
        "you find no agreement at all. If you compare the highest logits: they are never equal. "
        "Compare where they stand: argmax, not max": lambda t, s: 0,
        "an argmax without dim looks at all positions at once. Give it dim=-1": lambda t, s: 1,
    }
    praise = f"the first choices agree at {agreement(teacher, student):.0%} of the positions"
    return judge(my_agreement, [(teacher, student)], agreement, mistakes, praise)


def check_half_width(my_half_width: Callable) -> bool:
    """Check `my_half_width(values)`: half the 95 % interval of the mean of three values."""
    cases = [((31.0, 34.5, 32.1),), ((0.2, 0.9, 0.4),)]

    def right(values, t=4.303, by=math.sqrt, spread=statistics.stdev, width=1) -> float:
        return width * t * spread(values) / by(len(values))

    mistakes = {
        "1.96 is the normal's, for very many values. Three leave two degrees of freedom": {
            "t": 1.96
        },
        "3.18 is for three degrees of freedom. One went into the mean: two are left": {"t": 3.182},
        "Student's t is missing. Look it up for two degrees of freedom, and multiply": {"t": 1},
        "the square root of n is missing: a mean varies less than its values": {"by": lambda n: 1},
        "it is divided by n. Divide by its square root": {"by": float},
        "dividing by n is too small for a sample. Divide by n - 1": {"spread": statistics.pstdev},
        "this is the variance. The standard deviation is its square root": {
            "spread": statistics.variance
        },
        "this is the whole width. The ± of a table is half of it": {"width": 2},
    }
    (values,) = cases[0]
    praise = f"{statistics.mean(values):.1f} ± {right(values):.1f} for {values}"
    # the tolerance: 4.30 is fine
    return judge(my_half_width, cases, right, mistakes, praise, tolerance=2e-3)


def check_perplexity(my_perplexity: Callable) -> bool:
    """Check `my_perplexity(bits_per_byte, bytes_of_text, tokens)`."""
    mistakes = {
        "you raise 2 to the bits of a byte. A token has several bytes": lambda b, n, t: 2**b,
        "bytes and tokens are the wrong way round": lambda b, n, t: 2 ** (b * t / n),
        "bits are raised with the base e; theirs is 2": lambda b, n, t: math.exp(b * n / t),
        "these are bits per token. Perplexity is 2 to this power": lambda b, n, t: b * n / t,
        "these are the bits of the whole text: share them among the tokens": lambda b, n, t: b * n,
    }
    cases = [(1.25, 320, 80), (2.0, 90, 30)]
    praise = "5 bits a token are a perplexity of 32"
    return judge(my_perplexity, cases, lambda b, n, t: 2 ** (b * n / t), mistakes, praise)
