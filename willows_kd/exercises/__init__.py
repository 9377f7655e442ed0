"""Checks for the exercises of the notebooks: each says what is wrong, or that all is well.

An exercise is a table: a few cases, the right answer to them, and the usual mistakes, each with
its hint. A check compares what a learner wrote with the right answer and with each mistake.
"""

import copy
import textwrap
from collections.abc import Callable

import torch


def not_yet(problem: str) -> bool:
    """Say what is wrong, in lines that a notebook does not break; False."""
    print(textwrap.fill(f"not yet: {problem.rstrip('.')}.", 78))
    return False


def well_done(what: str) -> bool:
    """Say that all is right; True."""
    print(textwrap.fill(f"well done: {what}.", 78))
    return True


def judge(
    function: Callable,
    right: Callable,
    mistakes: dict[str, Callable],
    praise: str,
    *cases: tuple,
    tolerance: float = 1e-4,
) -> bool:
    """Compare what a learner's function returns with the right numbers and the wrong ones.

    Args:
        right: gives the right number, or tensor, from the same arguments.
        mistakes: for each hint, the likeliest first, a function that makes the mistake. What
            comes out may be infinite, or of another shape.
        praise: what is said if all is right.
        cases: the arguments of each example.
        tolerance: relative; far above rounding and far below any mistake.
    """
    found = [attempt(function, case) for case in cases]
    for value in found:
        if isinstance(value, str):
            return not_yet(value)

    def same(mine: torch.Tensor, other: torch.Tensor) -> bool:
        alike = mine.shape == other.shape
        return alike and torch.allclose(mine, other, tolerance, 1e-9, equal_nan=True)

    def hits(answer: Callable) -> list[bool]:
        return [same(mine, attempt(answer, case)) for mine, case in zip(found, cases, strict=True)]

    if all(hits(right)):
        return well_done(praise)
    for hint, mistake in mistakes.items():
        if all(hits(mistake)):
            return not_yet(hint)
    if not any(value.any() for value in found):
        return not_yet("your function returns 0, whatever it is given. Write it first")
    first = hits(right).index(False)
    case, mine, wanted = cases[first], found[first], attempt(right, cases[first])
    if mine.shape != wanted.shape:
        it_is = f"a tensor of shape {tuple(wanted.shape)}" if wanted.ndim else "one number"
        return not_yet(f"your result has shape {tuple(mine.shape)}; it is {it_is}")
    given = ", ".join(map(str, case))
    example = f"for {given}" if 0 < len(given) < 40 else "on one example"
    return not_yet(f"{example} you return {shown(mine)}; it should be {shown(wanted)}")


def attempt(function: Callable, case: tuple) -> torch.Tensor | str:
    """What a function returns, in float64, for copies of the arguments; or what is wrong."""
    try:
        result = function(*copy.deepcopy(case))
    except Exception as error:  # whatever a learner's code raises is worth telling
        return f"your function stops with {type(error).__name__}: {error}"
    if result is None or result is ...:
        return "your function returns nothing: end it with `return`"
    try:
        value = torch.as_tensor(result).detach().double()
    except (TypeError, ValueError, RuntimeError):
        return f"your function returns {type(result).__name__}; give a number or a tensor"
    return value.squeeze() if value.numel() == 1 else value


def shown(value: torch.Tensor) -> str:
    """A number, or the first few of a tensor."""
    if value.numel() == 1:
        return f"{value.item():.6g}"
    few = ", ".join(f"{number:.4g}" for number in value.flatten()[:6].tolist())
    return f"[{few}{', ...' if value.numel() > 6 else ''}]"


def random_logits(*shape: int, seed: int) -> torch.Tensor:
    """Logits in float64, the same every time."""
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
