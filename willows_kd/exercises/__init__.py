"""Checks for the exercises of the notebooks: each says what is wrong, or that all is well.

A check calls what a learner wrote on small examples and compares the results with the
right ones and with what each usual mistake gives.
"""

import copy
import functools
import itertools
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


def as_tensor(result) -> torch.Tensor:
    """A number or a tensor, made comparable: in float64, one number without dimensions."""
    value = torch.as_tensor(result).detach().double()
    return value.squeeze() if value.numel() == 1 else value


def attempt_number(function: Callable, case: tuple) -> tuple[torch.Tensor | None, str | None]:
    """`attempt` a function that returns a number or a tensor."""
    result, problem = attempt(function, *case)
    if problem:
        return None, problem
    try:
        return as_tensor(result), None
    except (TypeError, ValueError, RuntimeError):
        return None, f"your function returns {type(result).__name__}; give a number or a tensor"


def judge(
    function: Callable,
    cases: list[tuple],
    right: Callable,
    mistakes: dict[Callable, str] | Iterable[tuple[Callable, str]],
    praise: str = "",
    tolerance: float = 1e-4,
) -> bool:
    """Compare what a learner's function returns with the right numbers and the wrong ones.

    Args:
        cases: the arguments of each example.
        right: gives the right number, or tensor, from the same arguments.
        mistakes: functions that make a mistake, likeliest first, each with its hint. What they
            return may be infinite, or of another shape.
        praise: what is said if all is right.
        tolerance: relative; far above rounding and far below any mistake.
    """
    rights, found = [as_tensor(right(*case)) for case in cases], []
    for case in cases:
        value, problem = attempt_number(function, case)
        if problem:
            return not_yet(problem)
        found.append(value)

    def matches(answers: list[torch.Tensor]) -> list[bool]:
        close = functools.partial(torch.allclose, rtol=tolerance, atol=1e-9, equal_nan=True)
        pairs = zip(found, answers, strict=True)
        return [mine.shape == other.shape and close(mine, other) for mine, other in pairs]

    hits = matches(rights)
    if all(hits):
        return well_done(praise) if praise else True
    for wrong, hint in mistakes.items() if isinstance(mistakes, dict) else mistakes:
        if all(matches([as_tensor(wrong(*case)) for case in cases])):
            return not_yet(hint)
    mine, wanted = found[0], rights[0]
    if mine.shape != wanted.shape:
        it_is = f"a tensor of shape {tuple(wanted.shape)}" if wanted.ndim else "one number"
        return not_yet(f"your result has shape {tuple(mine.shape)}; it is {it_is}")
    if not any(value.any() for value in found):
        return not_yet("your function returns 0, whatever it is given. Write it first")
    if any(hits):
        return not_yet("right for one example, wrong for another. Is a number written out?")
    return not_yet(f"on one example you return {shown(mine)}; it should be {shown(wanted)}")


def judge_choices(
    function: Callable,
    cases: list[tuple],
    choices: tuple[dict, ...],
    answer: Callable,
    praise: str = "",
    most: int = 3,
    tolerance: float = 1e-4,
) -> bool:
    """`judge` a function that has several things to get right, alone and together.

    Args:
        choices: one dict for each of these: from what can be done to its hint; the first is
            right and has no hint.
        answer: gives the number from one choice of each, then a case.
        most: how many choices may be wrong at once; the hint is that of the first.
    """

    def mistakes():
        for wrong in range(1, most + 1):
            for chosen in itertools.product(*choices):
                hints = [texts[key] for texts, key in zip(choices, chosen, strict=True)]
                hints = [hint for hint in hints if hint]
                if len(hints) == wrong:
                    more = f". After that, {wrong - 1} more to find" if wrong > 1 else ""
                    yield functools.partial(answer, *chosen), hints[0] + more

    right = functools.partial(answer, *(next(iter(texts)) for texts in choices))
    return judge(function, cases, right, mistakes(), praise, tolerance)


def shown(value: torch.Tensor) -> str:
    """A number, or the first few of a tensor."""
    if value.numel() == 1:
        return f"{value.item():.6g}"
    few = ", ".join(f"{number:.4g}" for number in value.flatten()[:6].tolist())
    return f"[{few}{', ...' if value.numel() > 6 else ''}]"


def wrong_means(right: Callable, tokens: int, vocabulary: int) -> dict[Callable, str]:
    """The mistakes of a mean over tokens that is a sum, or divided by too much."""
    return {
        lambda *case: tokens * right(*case): "it grows with the number of tokens: take the mean",
        lambda *case: right(*case) / vocabulary: "it is divided by the vocabulary too: sum over it",
    }


def random_logits(*shape: int, seed: int) -> torch.Tensor:
    """Logits in float64, the same every time."""
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
