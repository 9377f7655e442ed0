"""Checks for the exercises of the notebooks: each says what is wrong, or that all is well.

An exercise is a table: a few cases, the right answer to them, and the usual mistakes, each with
its hint. A check compares what a learner wrote with the right answer and with each mistake.
"""

import copy
import functools
import itertools
import operator
import textwrap
from collections.abc import Callable, Iterator

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


def attempt(function: Callable, case: tuple) -> tuple:
    """What a function returns for copies of the arguments, and the problem if it stops."""
    try:
        result = function(*copy.deepcopy(case))
    except Exception as error:  # whatever a learner's code raises is worth telling
        hint = ". True and False have no mean: .float() first" if "Bool" in str(error) else ""
        return None, f"your function stops with {type(error).__name__}: {error}{hint}"
    if result is None or result is ...:
        return None, "your function returns nothing. Does it end with `return`?"
    return result, None


def attempt_number(function: Callable, case: tuple) -> tuple[torch.Tensor | None, str | None]:
    """`attempt` a function that returns a number or a tensor."""
    result, problem = attempt(function, case)
    if problem:
        return None, problem
    try:
        return as_tensor(result), None
    except (TypeError, ValueError, RuntimeError):
        return None, f"your function returns {type(result).__name__}; give a number or a tensor"


def as_tensor(result) -> torch.Tensor:
    """A number or a tensor, made comparable: in float64, one number without dimensions."""
    value = torch.as_tensor(result).detach().double()
    return value.squeeze() if value.numel() == 1 else value


def judge(
    function: Callable,
    cases: list[tuple],
    right: Callable,
    mistakes: dict[str, Callable | dict],
    praise: str,
    most: int = 3,
    tolerance: float = 1e-4,
) -> bool:
    """Compare what a learner's function returns with the right numbers and the wrong ones.

    Args:
        cases: the arguments of each example.
        right: gives the right number, or tensor, from the same arguments.
        mistakes: for each hint, the likeliest first, a function that makes the mistake, or the
            options with which `right` makes it. What comes out may be infinite, or of another
            shape.
        praise: what is said if all is right.
        most: how many mistakes by options may be made at once; the hint is that of the first.
        tolerance: relative; far above rounding and far below any mistake.
    """
    found = []
    for case in cases:
        value, problem = attempt_number(function, case)
        if problem:
            return not_yet(problem)
        found.append(value)

    def matches(answer: Callable) -> list[bool]:
        close = functools.partial(torch.allclose, rtol=tolerance, atol=1e-9, equal_nan=True)
        pairs = [(mine, as_tensor(answer(*c))) for mine, c in zip(found, cases, strict=True)]
        return [mine.shape == other.shape and close(mine, other) for mine, other in pairs]

    hits = matches(right)
    if all(hits):
        return well_done(praise)
    for hint, wrong in wrong_answers(right, mistakes, most):
        if all(matches(wrong)):
            return not_yet(hint)
    mine, wanted = found[0], as_tensor(right(*cases[0]))
    if mine.shape != wanted.shape:
        it_is = f"a tensor of shape {tuple(wanted.shape)}" if wanted.ndim else "one number"
        return not_yet(f"your result has shape {tuple(mine.shape)}; it is {it_is}")
    if not any(value.any() for value in found):
        return not_yet("your function returns 0, whatever it is given. Write it first")
    if any(hits):
        return not_yet("right for one example, wrong for another. Is a number written out?")
    return not_yet(f"on one example you return {shown(mine)}; it should be {shown(wanted)}")


def wrong_answers(right: Callable, mistakes: dict, most: int) -> Iterator[tuple[str, Callable]]:
    """Hints, and functions that make the mistakes: one at a time, then some options together."""
    for hint, wrong in mistakes.items():
        yield hint, wrong if callable(wrong) else functools.partial(right, **wrong)
    options = [hint for hint, wrong in mistakes.items() if not callable(wrong)]
    for count in range(2, most + 1):
        for first, *others in itertools.combinations(options, count):
            wrong = [mistakes[hint] for hint in (first, *others)]
            together = functools.reduce(operator.or_, wrong)
            if len(together) == sum(map(len, wrong)):  # none undoes another
                more = f". After that, {len(others)} more to find"
                yield first + more, functools.partial(right, **together)


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
