"""Checks for notebook 04: agreement, an interval from three values, perplexity from bits.

Each calls what a learner wrote, compares the result with the right one and with what
each usual mistake gives, prints what it found, and returns whether all was well.
"""

import itertools
import math
import statistics
from collections.abc import Callable

import torch

from willows_kd.exercises import not_yet, well_done


def check_agreement(my_agreement: Callable) -> bool:
    """Whether `my_agreement(teacher_logits, student_logits)` is the top-1 agreement.

    Both logits have shape (batch, time, vocabulary); wanted is the share of all
    positions, from 0 to 1, where both have the same first choice.
    """
    generator = torch.Generator().manual_seed(157)
    teacher = torch.randn(5, 7, 6, generator=generator)
    student = teacher + torch.randn(5, 7, 6, generator=generator)
    found, problem = one_number(my_agreement, teacher.clone(), student.clone())
    if problem:
        return not_yet(problem)
    right = share_of_equal(teacher, student)
    if close(found, right):
        return well_done(f"the first choices agree at {right:.0%} of the positions")
    mistakes = {
        "your argmax runs over dim=1, which is time. The first choice is among the "
        "vocabulary: dim=-1": share_of_equal(teacher, student, dim=1),
        "your argmax runs over dim=0, which is the batch. The first choice is among the "
        "vocabulary: dim=-1": share_of_equal(teacher, student, dim=0),
        "the student is one position behind. Both models answer for the same next token at "
        "the same position: compare position i with position i": share_of_equal(
            teacher[:, :-1], student[:, 1:]
        ),
        "the student is one position ahead. Both models answer for the same next token at "
        "the same position: compare position i with position i": share_of_equal(
            teacher[:, 1:], student[:, :-1]
        ),
        "the last position is left out. It has no label, but no label is needed: both models "
        "have a first choice there": share_of_equal(teacher[:, :-1], student[:, :-1]),
        "the first position is left out. Both models have a first choice there too": share_of_equal(
            teacher[:, 1:], student[:, 1:]
        ),
        "this is the share of positions where they differ": 1 - right,
        "this is a number of positions. Divide by how many there are: take the mean": right
        * teacher[..., 0].numel(),
        "this is a percentage; the share lies between 0 and 1": 100 * right,
        "you find no agreement at all. If you compare the highest logits: they are never equal. "
        "Compare where they stand: argmax, not max": 0.0,
        "an argmax without dim looks at all positions at once. Give it dim=-1": 1.0,
    }
    for problem, wrong in mistakes.items():
        if close(found, wrong):
            return not_yet(problem)
    return not_yet(f"on one example you find {found:.4f}; it is {right:.4f}")


def share_of_equal(teacher: torch.Tensor, student: torch.Tensor, dim: int = -1) -> float:
    """How often the places of the maxima over a dimension are the same."""
    return (teacher.argmax(dim) == student.argmax(dim)).double().mean().item()


QUANTILES = {
    4.303: None,
    1.96: "1.96 is the normal's, for very many values. Three values leave two degrees of "
    "freedom, and Student's t is much larger there",
    3.182: "3.18 is for three degrees of freedom. One of three went into the mean: two are left",
    2.920: "2.92 leaves 5 % on one side. An interval leaves 2.5 % on each of two",
    1.0: "Student's t is missing: one standard error on each side is no 95 % interval. Look t up "
    "for two degrees of freedom, and multiply",
}
ROOTS = {
    "right": None,
    "none": "the square root of n is missing. This says how far single values lie from the "
    "mean; the mean itself is better known. Divide by math.sqrt(n)",
    "n": "it is divided by n. Divide by its square root",
}
DEVIATIONS = {
    "sample": None,
    "population": "the standard deviation is divided by n, which is too small for a sample. "
    "Divide by n - 1: statistics.stdev, or ddof=1 in numpy",
    "variance": "this is the variance. The standard deviation is its square root",
}
WIDTHS = {
    1: None,
    2: "this is the whole width. The ± of a table is half of it",
}


def check_half_width(my_half_width: Callable) -> bool:
    """Whether `my_half_width(values)` is half the 95 % interval of the mean of three values."""
    cases = (31.0, 34.5, 32.1), (0.2, 0.9, 0.4)
    found = []
    for values in cases:
        result, problem = one_number(my_half_width, values)
        if problem:
            return not_yet(problem)
        found.append(result)
    named = [choice.items() for choice in (QUANTILES, ROOTS, DEVIATIONS, WIDTHS)]
    combinations = sorted(
        itertools.product(*named), key=lambda made: sum(problem is not None for _, problem in made)
    )
    for made in combinations:  # the fewest mistakes first
        if all(
            close(result, half_width(values, *(key for key, _ in made)), 2e-3)
            for result, values in zip(found, cases, strict=True)
        ):
            problems = [problem for _, problem in made if problem]
            if problems:
                return not_yet(". And ".join(problems))
            return well_done(f"{statistics.mean(cases[0]):.1f} ± {found[0]:.1f} for {cases[0]}")
    if found == [0, 0]:
        return not_yet("your half width is 0, which claims certainty. Write it first")
    right = half_width(cases[0], 4.303, "right", "sample", 1)
    return not_yet(f"for {cases[0]} you find {found[0]:.3f}; it is {right:.3f}")


def half_width(values, quantile: float, root: str, deviation: str, width: int) -> float:
    """The half width of the interval, right or with mistakes."""
    spread = {
        "sample": statistics.stdev,
        "population": statistics.pstdev,
        "variance": statistics.variance,
    }[deviation](values)
    divisor = {"right": math.sqrt(len(values)), "none": 1, "n": len(values)}[root]
    return width * quantile * spread / divisor


def check_perplexity(my_perplexity: Callable) -> bool:
    """Whether `my_perplexity(bits_per_byte, bytes_of_text, tokens)` is the perplexity."""
    bits, size, tokens = case = 1.25, 320, 80
    found, problem = one_number(my_perplexity, *case)
    if problem:
        return not_yet(problem)
    a_token = bits * size / tokens
    mistakes = {
        "you raise 2 to the bits of a byte. A token has several bytes: multiply by bytes per "
        "token first": 2**bits,
        "bytes and tokens are the wrong way round: bits per byte times bytes is all the bits, "
        "and these are shared among the tokens": 2 ** (bits * tokens / size),
        "bits are raised with the base e. exp belongs to nats; the base for bits is 2": math.exp(
            a_token
        ),
        "bits are raised with the base e, and they are those of a byte. Take the bits of a "
        "token, and the base 2": math.exp(bits),
        "these are bits per token. Perplexity is 2 to this power": a_token,
        "these are nats per token. Perplexity is exp of them": a_token * math.log(2),
        "these are the bits of the whole text. Share them among the tokens, then raise 2 to "
        "this power": bits * size,
        "you raise 2 to the bits of the whole text. Share them among the tokens first": 2
        ** (bits * size),
    }
    if close(found, 2**a_token):
        again, problem = one_number(my_perplexity, 2.0, 90, 30)
        if problem or not close(again, 64):
            return not_yet(f"right for {case}, but for (2.0, 90, 30) it is 64, not {again}")
        return well_done(f"{a_token:g} bits a token are a perplexity of {found:g}")
    for problem, wrong in mistakes.items():
        if close(found, wrong):
            return not_yet(problem)
    return not_yet(
        f"for {bits} bits per byte, {size} bytes and {tokens} tokens you find {found:.4g}. Find "
        "the bits of the whole text first, then those of a token, then the perplexity"
    )


def one_number(function: Callable, *arguments) -> tuple[float, str | None]:
    """What a learner's function returns as a float, or what is wrong with it."""
    try:
        result = function(*arguments)
    except Exception as error:
        hint = ". True and False have no mean: .float() first" if "Bool" in str(error) else ""
        return math.nan, f"your function stops with {type(error).__name__}: {error}{hint}"
    if result is None or result is ...:
        return math.nan, "your function returns nothing. End it with return"
    try:
        result = torch.as_tensor(result, dtype=torch.float64).detach()
    except (TypeError, ValueError, RuntimeError):
        return math.nan, f"your function returns {type(result).__name__}; it is one number"
    if result.numel() != 1:
        return math.nan, f"your result has shape {tuple(result.shape)}; it is one number"
    return result.item(), None


def close(found: float, wanted: float, relative: float = 1e-5) -> bool:
    """Whether two numbers are equal but for rounding."""
    return math.isclose(found, wanted, rel_tol=relative, abs_tol=1e-9)
