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


def as_tensor(result, tidy: Callable = torch.as_tensor) -> torch.Tensor:
    """A number or a tensor, made comparable, in float64."""
    return tidy(torch.as_tensor(result)).detach().double()


def result_of(
    function: Callable, case: tuple, shape: tuple = (), tidy: Callable = torch.as_tensor
) -> tuple[torch.Tensor | None, str | None]:
    """What a learner's function returns, as a tensor of a shape, or what is wrong with it."""
    result, problem = attempt(function, *case)
    if problem:
        return None, problem
    what = f"a tensor of shape {tuple(shape)}" if shape else "one number"
    try:
        value = as_tensor(result, tidy)
    except (TypeError, ValueError, RuntimeError):
        return None, f"your function returns {type(result).__name__}; it is {what}"
    if value.shape != shape and (shape or value.numel() != 1):
        return None, f"your result has shape {tuple(value.shape)}; it is {what}"
    return value.reshape(shape), None


def judge(
    function: Callable,
    cases: list[tuple],
    right: Callable,
    mistakes: dict[Callable, str] | Iterable[tuple[Callable, str]],
    praise: str = "",
    not_finite: str = "",
    tolerance: float = 1e-4,
    tidy: Callable = torch.as_tensor,
    wrong_shape: str = "",
) -> bool:
    """Compare what a learner's function returns with the right numbers and the wrong ones.

    Args:
        cases: the arguments of each example.
        right: gives the right number, or tensor, from the same arguments.
        mistakes: functions that make a mistake, likeliest first, each with its hint.
        praise: what is said if all is right.
        not_finite: the hint if a number is infinite or none.
        tolerance: relative; far above rounding and far below any mistake.
        tidy: what makes right answers alike, such as sorting.
        wrong_shape: the hint if the result is of another shape, or none.
    """
    rights, found = [as_tensor(right(*case), tidy) for case in cases], []
    for case, wanted in zip(cases, rights, strict=True):
        value, problem = result_of(function, case, wanted.shape, tidy)
        if value is not None and not value.isfinite().all():
            problem = f"you return {shown(value)}. {not_finite}"
        if problem:
            return not_yet(f"{problem}. {wrong_shape}" if wrong_shape else problem)
        found.append(value)

    def matches(answers: list[torch.Tensor]) -> list[bool]:
        pairs = zip(found, answers, strict=True)
        return [
            f.shape == a.shape and torch.allclose(f, a, rtol=tolerance, atol=1e-9) for f, a in pairs
        ]

    hits = matches(rights)
    if all(hits):
        return well_done(praise) if praise else True
    for wrong, hint in mistakes.items() if isinstance(mistakes, dict) else mistakes:
        if all(matches([as_tensor(wrong(*case), tidy) for case in cases])):
            return not_yet(hint)
    if not any(value.any() for value in found):
        return not_yet("your function returns 0, whatever it is given. Write it first")
    if any(hits):
        return not_yet("right for one example, wrong for another. Is a number written out?")
    told = f"on one example you return {shown(found[0])}; it should be {shown(rights[0])}"
    return not_yet(told)


def shown(value: torch.Tensor) -> str:
    """A number, or the first few of a tensor."""
    if value.numel() == 1:
        return f"{value.item():.6g}"
    few = ", ".join(f"{number:.4g}" for number in value.flatten()[:6].tolist())
    return f"[{few}{', ...' if value.numel() > 6 else ''}]"


def wrong_means(right: Callable, tokens: int, vocabulary: int) -> dict[Callable, str]:
    """The mistakes of a mean over tokens that is a sum, or divided by too much."""
    return {
        lambda *case: tokens * right(*case): "it grows with the number of tokens: sum over the "
        "vocabulary, then take the mean",
        lambda *case: right(*case) / vocabulary: "it is divided by the vocabulary too: sum over "
        "it, then take the mean",
    }


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
                yield lambda *case, chosen=chosen: answer(*chosen, *case), hints[0] + more


def judge_choices(
    function: Callable,
    cases: list[tuple],
    choices: tuple[dict, ...],
    answer: Callable,
    praise: str = "",
    most: int = 3,
    **more,
) -> bool:
    """`judge` a function whose mistakes are those of `combined`; what is right comes from both."""
    right = functools.partial(answer, *(next(iter(texts)) for texts in choices))
    return judge(function, cases, right, combined(choices, answer, most), praise, **more)


def random_logits(*shape: int, seed: int) -> torch.Tensor:
    """Logits in float64, the same every time."""
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
