"""Checks for the exercises of the notebooks: each says what is wrong, or that all is well.

A check calls what a learner wrote on small examples and compares the results with the
right ones and with what each usual mistake gives.
"""

import copy
import itertools
import math
import textwrap
from collections.abc import Callable, Iterable

import torch


def not_yet(problem: str) -> bool:
    """Say what is wrong; False."""
    return say(f"not yet: {problem}", False)


def well_done(what: str) -> bool:
    """Say that all is right; True."""
    return say(f"well done: {what}", True)


def say(sentence: str, outcome: bool) -> bool:
    """Print a sentence in lines that a notebook does not break, and return the outcome."""
    end = "" if sentence.endswith((".", "?")) else "."
    print(textwrap.fill(sentence + end, 78))
    return outcome


def attempt(function: Callable, *arguments) -> tuple:
    """What a function returns for copies of the arguments, and the problem if it stops."""
    try:
        result = function(*copy.deepcopy(arguments))
    except Exception as error:  # whatever a learner's code raises is worth telling
        hint = ". True and False have no mean: .float() first" if "Bool" in str(error) else ""
        return None, f"your function stops with {type(error).__name__}: {error}{hint}"
    if result is None or result is ...:
        return None, "your function returns nothing. Does it end with `return`?"
    return result, None


def one_number(function: Callable, *arguments) -> tuple[float, str | None]:
    """What a learner's function returns as a float, and what is wrong with it."""
    result, problem = attempt(function, *arguments)
    if problem:
        return math.nan, problem
    try:
        result = torch.as_tensor(result, dtype=torch.float64).detach()
    except (TypeError, ValueError, RuntimeError):
        return math.nan, f"your function returns {type(result).__name__}; it is one number"
    if result.numel() != 1:
        return math.nan, f"your result has shape {tuple(result.shape)}; it is one number"
    return result.item(), None


def judge(
    function: Callable,
    cases: list[tuple],
    right: Callable,
    mistakes: Iterable[tuple[str, Callable]],
    praise: str,
    not_finite: str = "",
    tolerance: float = 1e-4,
) -> bool:
    """Compare what a learner's function returns with the right numbers and the wrong ones.

    Args:
        cases: the arguments of each example.
        right: gives the right number from the same arguments.
        mistakes: hints, each with a function that makes that mistake, likeliest first.
        praise: what is said if all is right.
        not_finite: the hint if the number is infinite or none.
        tolerance: relative; far above rounding and far below any mistake.
    """
    found = []
    for case in cases:
        value, problem = one_number(function, *case)
        if problem is None and not math.isfinite(value):
            problem = f"you return {value}. {not_finite}"
        if problem:
            return not_yet(problem)
        found.append(value)

    def matches(answer: Callable) -> list[bool]:
        pairs = zip(found, cases, strict=True)
        return [
            math.isclose(f, answer(*case), rel_tol=tolerance, abs_tol=1e-9) for f, case in pairs
        ]

    hits = matches(right)
    if all(hits):
        return well_done(praise)
    for hint, wrong in mistakes:
        if all(matches(wrong)):
            return not_yet(hint)
    if not any(found):
        return not_yet("your function returns 0, whatever it is given. Write it first")
    if any(hits):
        return not_yet("right for one example, wrong for another. Is a number written out?")
    wanted = right(*cases[0])
    return not_yet(f"on one example you return {found[0]:.6g}; it should be {wanted:.6g}")


def combined(choices: tuple[dict, ...], answer: Callable, most: int = 3):
    """The mistakes that wrong choices make, alone and together, the fewest first.

    Args:
        choices: one dict for each thing to get right: from what can be done to its hint;
            the first is right and has no hint.
        answer: gives the number from one choice of each, then a case.
        most: how many choices may be wrong at once. The hint is that of the first.
    """
    for wrong in range(1, most + 1):
        for chosen in itertools.product(*choices):
            hints = [texts[key] for texts, key in zip(choices, chosen, strict=True) if texts[key]]
            if len(hints) == wrong:
                more = f". After that, {wrong - 1} more to find" if wrong > 1 else ""
                yield hints[0] + more, lambda *case, chosen=chosen: answer(*chosen, *case)


def first_choices(choices: tuple[dict, ...]) -> list:
    """What is right of each choice."""
    return [next(iter(texts)) for texts in choices]


def random_logits(*shape: int, seed: int) -> torch.Tensor:
    """Logits in float64, the same every time."""
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
