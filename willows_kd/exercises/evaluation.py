"""Checks for notebook 04: agreement, an interval from three values, perplexity from bits."""

import math
import statistics
from collections.abc import Callable

import torch

from willows_kd.exercises import judge, judge_choices


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
        lambda t, s: agreement(t, s, 1): "your argmax runs over dim=1, time; take dim=-1",
        lambda t, s: agreement(t, s, 0): "your argmax runs over dim=0, the batch; take dim=-1",
        lambda t, s: agreement(t[:, :-1], s[:, 1:]): "the student is one position ahead",
        lambda t, s: agreement(t[:, :-1], s[:, :-1]): "the last position counts, too",
        lambda t, s: 1 - agreement(t, s): "this is the share of positions that differ",
        lambda t, s: 35 * agreement(t, s): "this is a number of positions: take the mean",
        lambda t, s: 100 * agreement(t, s): "this is a percentage; the share is from 0 to 1",
        lambda t, s: 0: "you find no agreement at all. If you compare the highest logits: they "
        "are never equal. Compare where they stand: argmax, not max",
        lambda t, s: 1: "an argmax without dim looks at all positions at once. Give it dim=-1",
    }
    praise = f"the first choices agree at {agreement(teacher, student):.0%} of the positions"
    return judge(my_agreement, [(teacher, student)], agreement, mistakes, praise)


HALF_WIDTH = (
    {
        4.303: None,
        1.96: "1.96 is the normal's, for very many values. Three leave two degrees of freedom",
        3.182: "3.18 is for three degrees of freedom. One went into the mean: two are left",
        1.0: "Student's t is missing. Look it up for two degrees of freedom, and multiply",
    },
    {
        "root": None,
        "nothing": "the square root of n is missing: a mean varies less than its values",
        "n": "it is divided by n. Divide by its square root",
    },
    {
        statistics.stdev: None,
        statistics.pstdev: "dividing by n is too small for a sample. Divide by n - 1",
        statistics.variance: "this is the variance. The standard deviation is its square root",
    },
    {1: None, 2: "this is the whole width. The ± of a table is half of it"},
)


def check_half_width(my_half_width: Callable) -> bool:
    """Check `my_half_width(values)`: half the 95 % interval of the mean of three values."""
    cases = [((31.0, 34.5, 32.1),), ((0.2, 0.9, 0.4),)]

    def answer(quantile, divisor, spread, width, values) -> float:
        divided = {"root": math.sqrt(len(values)), "nothing": 1, "n": len(values)}[divisor]
        return width * quantile * spread(values) / divided

    values = cases[0][0]
    width = answer(4.303, "root", statistics.stdev, 1, values)
    praise = f"{statistics.mean(values):.1f} ± {width:.1f} for {values}"
    # the tolerance: 4.30 is fine
    return judge_choices(my_half_width, cases, HALF_WIDTH, answer, praise, tolerance=2e-3)


def check_perplexity(my_perplexity: Callable) -> bool:
    """Check `my_perplexity(bits_per_byte, bytes_of_text, tokens)`."""
    mistakes = {
        lambda b, n, t: 2**b: "you raise 2 to the bits of a byte. A token has several bytes",
        lambda b, n, t: 2 ** (b * t / n): "bytes and tokens are the wrong way round",
        lambda b, n, t: math.exp(b * n / t): "bits are raised with the base e; theirs is 2",
        lambda b, n, t: b * n / t: "these are bits per token. Perplexity is 2 to this power",
        lambda b, n, t: b * n: "these are the bits of the whole text: share them among the tokens",
    }
    cases = [(1.25, 320, 80), (2.0, 90, 30)]
    praise = "5 bits a token are a perplexity of 32"
    return judge(my_perplexity, cases, lambda b, n, t: 2 ** (b * n / t), mistakes, praise)
