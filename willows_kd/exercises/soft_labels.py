"""Checks for notebook 02: forward KL, a temperature for a given entropy, an equal say.

Each tries what a learner wrote on small random logits, compares it with the right
answer and with the answers that common mistakes give, prints what it found, and
returns whether all was well.
"""

import functools
import itertools
import math
from collections.abc import Callable

import torch

from willows_kd import losses
from willows_kd.exercises import not_yet, well_done
from willows_kd.soft_labels import entropy, soften

CLOSE = 1e-4  # relative: far above float32's rounding, far below any mistake

AXIS = {
    -1: None,
    1: "the probabilities of one token do not sum to 1: your softmax runs over dim=1, "
    "which is time. Give it dim=-1, the vocabulary.",
    0: "the probabilities of one token do not sum to 1: your softmax runs over dim=0, "
    "which is the batch. Give it dim=-1, the vocabulary.",
}
FORM = {
    "kl": None,
    "cross-entropy": "your loss is not 0 where the student equals the teacher: it is the "
    "cross-entropy with the soft labels. Sum p · (log p - log q).",
    "not a log": "F.kl_div was given the student's probabilities; it wants their logarithms. "
    "Use F.log_softmax for the student.",
}
ORDER = {
    "right": None,
    "swapped": "student and teacher are swapped: this is reverse KL. F.kl_div takes the "
    "student's log-probabilities first, the teacher as the target.",
}
SOFTENED = {
    "both": None,
    "teacher": "only the teacher is softened. Divide the student's logits by T as well.",
    "student": "only the student is softened. Divide the teacher's logits by T as well.",
    "neither": "your softmax knows no temperature. Divide both logits by T first.",
}
DIVIDED = {
    "tokens": None,
    "batch": "the loss grows with the length of the text: it is divided by the batch only, as "
    'by reduction="batchmean". Sum over the vocabulary, then take the mean over all tokens.',
    "all": "the loss shrinks as the vocabulary grows: it is divided by the vocabulary too, as "
    'by reduction="mean". Sum over the vocabulary, then take the mean over all tokens.',
    "nothing": "the loss grows with the number of tokens: it is a sum. "
    "Sum over the vocabulary only, then take the mean over all tokens.",
    "vocabulary": "the sum runs over time and the mean over the vocabulary. "
    "Sum over dim=-1 first, then take the mean.",
}
FACTOR = {
    2: None,
    0: "the gradient shrinks as T grows: T² is missing. Multiply by temperature**2.",
    1: "the gradient still shrinks as T grows: your factor is T. Multiply by temperature**2.",
}


def check_forward_kl(function: Callable) -> bool:
    """Check `function(student_logits, teacher_logits, temperature)`, a mean over tokens."""
    cases = forward_kl_cases()
    found, problem = call(function, cases)
    if problem is None and found == [0.0, 0.0]:
        problem = "your loss is 0, however far the student is from the teacher. Write it first."
    if problem is None and not all(map(math.isfinite, found)):
        problem = f"your loss is {found[0]}. Does F.kl_div take a logarithm twice, or of 0?"
        problem += " A target that is a logarithm needs log_target=True."
    if problem is not None:
        return verdict([problem])
    choices = (AXIS, FORM, ORDER, SOFTENED, DIVIDED, FACTOR)
    problems = diagnose(found, cases, forward_kl_with, choices)
    if problems is None:
        equal = function(cases[0][1], cases[0][1], 1.7)
        right = losses.forward_kl(*cases[0]).item()
        problems = [
            f"on one example your loss is {found[0]:.4f} and should be {right:.4f}; where the "
            f"student equals the teacher it is {float(equal):.4f} and should be 0."
        ]
    if not problems:
        problems = gradient_problem(function, losses.forward_kl, cases[0])
    return verdict(problems, "the same value and the same gradient as kd.forward_kl.")


@functools.cache
def forward_kl_cases() -> list[tuple[torch.Tensor, torch.Tensor, float]]:
    """Logits of student and teacher of shape (4, 5, 7), and a temperature, twice."""
    return [
        (random_logits((4, 5, 7), i).requires_grad_(), random_logits((4, 5, 7), i + 9), t)
        for i, t in enumerate((1.7, 3.3))
    ]


def forward_kl_with(case, axis, form, order, softened, divided, factor) -> float:
    """The loss that comes out with these choices; the right ones are the first of each."""
    z_s, z_t, t = case
    batch, time, vocabulary = z_s.shape
    parts = {"tokens": batch * time, "batch": batch, "all": z_s.numel(), "nothing": 1}
    parts["vocabulary"] = batch * vocabulary
    total = total_kl_with(z_s, z_t, t, axis, form, order, softened)
    return total * t**factor / parts[divided]


@functools.cache  # tensors are told apart by identity, and these are the same each time
def total_kl_with(z_s, z_t, t, axis, form, order, softened) -> float:
    """The sum over all dimensions."""
    z_s, z_t = z_s.detach(), z_t.detach()
    z_s = z_s / t if softened in ("both", "student") else z_s
    z_t = z_t / t if softened in ("both", "teacher") else z_t
    log_q, log_p = z_s.log_softmax(axis), z_t.log_softmax(axis)
    if order == "swapped":
        log_p, log_q = log_q, log_p
    first = {"kl": log_p, "cross-entropy": 0, "not a log": log_p}[form]
    second = log_q.exp() if form == "not a log" else log_q
    return (log_p.exp() * (first - second)).sum().item()


def check_find_temperature(function: Callable) -> bool:
    """Check `function(logits, nats)`: the temperature at which the soft labels have that entropy.

    The logits have shape (vocabulary,); the answer lies between 0.01 and 100.
    """
    wanted = {1.0: 1.0, 8.0: 3.0, 0.3: 2.0, 2.0: 0.3, 1.5: 3.8}  # size of the logits: nats
    cases = [(size * random_logits((50,), i), n) for i, (size, n) in enumerate(wanted.items())]
    found, problem = call(function, cases)
    if problem is None and not all(0 < t < math.inf for t in found):
        problem = f"you return {found[0]:g}; a temperature is a positive, finite number."
    if problem is None and len(set(found)) == 1:
        problem = f"whatever entropy is asked for, you return {found[0]:g}. Search for it."
    if problem is not None:
        return verdict([problem])

    def errors(temperature_of, scale=1.0) -> list[float]:
        """How far the entropies are from those asked for, in nats, when read so."""
        return [
            abs(entropy(soften(z, temperature_of(t))).item() / scale - nats)
            for (z, nats), t in zip(cases, found, strict=True)
        ]

    off = errors(lambda t: t)
    worst = max(range(len(off)), key=off.__getitem__)
    logits, nats = cases[worst]
    reached = entropy(soften(logits, found[worst])).item()
    said = f"asked for {nats} nats you return T = {found[worst]:.4g}, which gives "
    said += f"{reached:.4f}. "
    if max(off) < 1e-3:
        problem = None
    elif max(errors(lambda t: t, math.log(2))) < 1e-3:
        problem = said + "You measure in bits: use the natural logarithm, or kd.entropy."
    elif max(errors(lambda t: 1 / t)) < 1e-3:
        problem = said + "Your T multiplies the logits; it must divide them."
    elif max(off) < 0.15:
        problem = said + "That is near: halve the interval more often."
    elif min(off) < 1e-3:
        problem = said + "Others are right. Begin as wide as 0.01 to 100, and halve often."
    elif len({round(math.log(t), 1) for t in found}) <= 2:  # only ends of an interval
        problem = said + "You always end at an end of the interval: entropy rises with T, so "
        problem += "where it is too low at the middle, the lower end moves up to the middle."
    else:
        problem = said + "Keep the half in which the answer lies, and halve some forty times."
    return verdict([problem] if problem else [], "every entropy is hit to a thousandth of a nat.")


SAY = {
    "right": None,
    "the other side": "that is 1 - alpha: yours gives the larger gradient the larger say. Solve "
    "alpha · hard = (1 - alpha) · soft for alpha.",
    "a ratio": "that is soft / hard, a ratio, and may exceed 1. Solve "
    "alpha · hard = (1 - alpha) · soft for alpha.",
    "a ratio upside down": "that is hard / soft, a ratio, and may exceed 1. Solve "
    "alpha · hard = (1 - alpha) · soft for alpha.",
    "one half": "equal weights are not an equal say: the gradients differ in size.",
}
SIZE = {
    "norm": None,
    "loss": "you compare the losses. What moves the student is their gradients: compare the "
    "norms of those.",
    "square": "you compare squared norms; gradients add up as vectors do, so leave out the square.",
    "sum of absolute values": "you add up absolute values; take the Euclidean norm, .norm().",
    "hard left behind": "the second gradient holds the first as well: .backward() adds up. "
    "Start from a fresh copy, or use torch.autograd.grad.",
    "soft left behind": "the second gradient holds the first as well: .backward() adds up. "
    "Start from a fresh copy, or use torch.autograd.grad.",
}
SOFT = {
    "right": None,
    "without T²": "T² is missing from the soft labels. kd.forward_kl has it.",
    "T² twice": "T² stands there twice: kd.forward_kl has it already.",
    "unsoftened": "the soft labels are not softened. Give kd.forward_kl the temperature.",
}


def check_equal_say(function: Callable) -> bool:
    """Check `function(student_logits, teacher_logits, labels, temperature)`, which returns alpha.

    At that alpha the gradients of the hard and of the soft labels, each with its
    weight, have the same norm.
    """
    cases = []
    for seed, t in enumerate((1.7, 3.3)):
        labels = torch.randint(7, (4, 5), generator=torch.Generator().manual_seed(seed))
        cases.append(
            (random_logits((4, 5, 7), seed), random_logits((4, 5, 7), seed + 9), labels, t)
        )
    fresh = [(z_s.clone(), z_t.clone(), *rest) for z_s, z_t, *rest in cases]
    found, problem = call(function, fresh)
    if problem is not None:
        return verdict([problem])
    problems = diagnose(found, cases, equal_say_with, (SAY, SIZE, SOFT))
    if problems is None:
        right = equal_say_with(cases[0], "right", "norm", "right")
        problems = [
            f"on one example you return {found[0]:.4f} and should return {right:.4f}. Print the "
            "norms of both gradients: alpha times the hard one must equal 1 - alpha times the soft."
        ]
    return verdict(problems, "hard and soft labels pull equally hard.")


def equal_say_with(case, say, size, soft_from) -> float:
    """The alpha that comes out with these choices; the right ones are the first of each."""
    z_s, z_t, labels, t = case
    z_s = z_s.clone().requires_grad_()
    hard = losses.hard_label_loss(z_s, labels)
    soft = losses.forward_kl(z_s, z_t, 1.0 if soft_from == "unsoftened" else t)
    soft = soft * t ** {"without T²": -2, "T² twice": 2}.get(soft_from, 0)
    g_hard, g_soft = (torch.autograd.grad(loss, z_s)[0] for loss in (hard, soft))
    if size.endswith("left behind"):
        both = g_hard + g_soft
        g_hard, g_soft = (g_hard, both) if size.startswith("hard") else (both, g_soft)
    a, b = {
        "loss": (hard.detach(), soft.detach()),
        "square": (g_hard.norm() ** 2, g_soft.norm() ** 2),
        "sum of absolute values": (g_hard.abs().sum(), g_soft.abs().sum()),
    }.get(size, (g_hard.norm(), g_soft.norm()))
    answers = {"right": b / (a + b), "the other side": a / (a + b), "a ratio": b / a}
    answers |= {"a ratio upside down": a / b, "one half": torch.tensor(0.5)}
    return answers[say].item()


# -- what all three share --------------------------------------------------------------


def random_logits(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Logits in float64, the same every time."""
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(shape, generator=generator, dtype=torch.float64)


def call(function: Callable, cases: list[tuple]) -> tuple[list[float], str | None]:
    """What a function returns for each case, or why it returns no number."""
    found = []
    for case in cases:
        try:
            result = function(*case)
        except Exception as error:  # whatever a learner's code raises is worth telling
            return [], f"your function stops with {type(error).__name__}: {error}"
        if result is None:
            return [], "your function returns nothing. Does it end with `return`?"
        if isinstance(result, torch.Tensor) and result.numel() != 1:
            return [], (
                f"your function returns a tensor of shape {tuple(result.shape)}; one number is "
                "wanted. Sum over the vocabulary, then take the mean over the tokens."
            )
        try:
            found.append(result.item() if isinstance(result, torch.Tensor) else float(result))
        except (TypeError, ValueError):
            return [], f"your function returns a {type(result).__name__}; a number is wanted."
    return found, None


def diagnose(found: list[float], cases, answer_with: Callable, choices) -> list[str] | None:
    """The mistakes that explain what was found, as few as do; None where none does."""

    def mistakes(chosen) -> list[str]:
        """What is said of the choices that are not right."""
        said = (texts[key] for texts, key in zip(choices, chosen, strict=True))
        return [text for text in said if text is not None]

    for chosen in sorted(itertools.product(*choices), key=lambda chosen: len(mistakes(chosen))):
        answers = (answer_with(case, *chosen) for case in cases)  # one by one, as far as needed
        if all(map(close, found, answers)):
            return mistakes(chosen)
    return None


def close(found: float, answer: float) -> bool:
    """Whether two numbers are the same but for rounding."""
    return math.isclose(found, answer, rel_tol=CLOSE)


def gradient_problem(function: Callable, right: Callable, case: tuple) -> list[str]:
    """What is wrong with the gradient of a loss whose value is right."""
    z_s, *rest = case
    loss = function(z_s, *rest)
    if not isinstance(loss, torch.Tensor) or not loss.requires_grad:
        return [
            "the value is right, but no gradient reaches the student. "
            "Leave out .item(), .detach() and torch.no_grad() on the student's side."
        ]
    mine, wanted = (torch.autograd.grad(f, z_s)[0] for f in (loss, right(z_s, *rest)))
    if not torch.allclose(mine, wanted, rtol=1e-3, atol=1e-6):
        return ["the value is right, but the gradient is not: a part of it was detached."]
    return []


def verdict(problems: list[str], praise: str = "") -> bool:
    """Print what is wrong, or the praise; return whether nothing is wrong."""
    for problem in problems:
        not_yet(problem)
    return not problems and well_done(praise)
