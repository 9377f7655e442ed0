"""Checks for notebook 04: agreement, an interval from three values, perplexity from bits."""

import math
import statistics
from collections.abc import Callable
from functools import partial

from willows_kd.exercises import judge, random_logits


def check_agreement(my_agreement: Callable) -> bool:
    """Check `my_agreement(teacher_logits, student_logits)`: a share of all positions, 0 to 1."""
    teacher = random_logits(5, 7, 6, seed=44)
    student = teacher + random_logits(5, 7, 6, seed=45)

    def right(teacher, student, dim: int = -1) -> float:
        return (teacher.argmax(dim) == student.argmax(dim)).double().mean().item()

    mistakes = {
        "none agree: compare where the highest logits stand, by argmax": lambda t, s: 0,
        "an argmax without dim looks at all positions at once": lambda t, s: 1,
        "your argmax runs over dim=1, time: take dim=-1": partial(right, dim=1),
        "the last position counts, too": lambda t, s: right(t[:, :-1], s[:, :-1]),
    }
    praise = f"the first choices agree at {right(teacher, student):.0%} of the positions"
    return judge(my_agreement, right, mistakes, praise, (teacher, student))


def check_half_width(my_half_width: Callable) -> bool:
    """Check `my_half_width(values)`: half the 95 % interval of the mean of three values."""

    def right(values, t=4.303, root=math.sqrt, spread=statistics.stdev) -> float:
        return t * spread(values) / root(len(values))

    mistakes = {
        "1.96 is for very many values; three leave two degrees of freedom": partial(right, t=1.96),
        "3.18 is for three degrees of freedom; the mean took one": partial(right, t=3.182),
        "a mean varies less than its values: divide by √n": partial(right, root=lambda n: 1),
        "for the spread of a sample, divide by n - 1": partial(right, spread=statistics.pstdev),
    }
    one, other = (31.0, 34.5, 32.1), (0.2, 0.9, 0.4)
    praise = f"{statistics.mean(one):.1f} ± {right(one):.1f} for {one}"
    # the tolerance: 4.30 is fine
    return judge(my_half_width, right, mistakes, praise, (one,), (other,), tolerance=2e-3)


def check_perplexity(my_perplexity: Callable) -> bool:
    """Check `my_perplexity(bits_per_byte, bytes_of_text, tokens)`."""
    mistakes = {
        "you raise 2 to the bits of a byte; a token has several bytes": lambda b, n, t: 2**b,
        "bits are raised with the base e; theirs is 2": lambda b, n, t: math.exp(b * n / t),
        "these are bits per token; perplexity is 2 to this power": lambda b, n, t: b * n / t,
    }
    praise = "5 bits a token are a perplexity of 32"
    cases = (1.25, 320, 80), (2.0, 90, 30)
    return judge(my_perplexity, lambda b, n, t: 2 ** (b * n / t), mistakes, praise, *cases)
