"""Checks for notebook 02: forward KL, a temperature for a given entropy, an equal say."""

import math
from collections.abc import Callable

import torch

from willows_kd.exercises import attempt_number, judge, not_yet, random_logits, shown, well_done
from willows_kd.losses import entropy, forward_kl, hard_label_loss, soften

KL = {  # the hint: what goes wrong in `kl_with`
    "your softmax runs over dim=1, which is time; dim=-1 is the vocabulary": {"dim": 1},
    "your softmax runs over dim=0, which is the batch; dim=-1 is the vocabulary": {"dim": 0},
    "your loss is not 0 when the student equals the teacher: it is the cross-entropy with the "
    "soft labels. Sum p · (log p - log q)": {"first": 0},
    "F.kl_div was given the student's probabilities; it wants their logarithms": {
        "last": torch.exp
    },
    "you return nan. A target that is a logarithm needs log_target=True": {"first": math.nan},
    "this is reverse KL. F.kl_div takes the student first, the teacher as target": {"swap": True},
    "only the teacher is softened. Divide the student's logits by T as well": {"soft": "teacher"},
    "only the student is softened. Divide the teacher's logits by T as well": {"soft": "student"},
    "your softmax knows no temperature. Divide both logits by T first": {"soft": "neither"},
    "the KL grows with the length of the text, as by reduction='batchmean'. Sum over the "
    "vocabulary, then take the mean over all tokens": {"over": "batch"},
    "the KL shrinks as the vocabulary grows, as by reduction='mean'. Sum over the vocabulary, "
    "then take the mean over all tokens": {"over": "all"},
    "the KL grows with the number of tokens. Take the mean over them": {"over": "nothing"},
    "the gradient shrinks as T grows: T² is missing. Multiply the KL by temperature**2": {
        "power": 0
    },
    "the gradient still shrinks as T grows: your factor is T, not temperature**2": {"power": 1},
}


def kl_with(
    z_s, z_t, t, dim=-1, first=1, last=torch.clone, swap=False, soft="both", over="tokens", power=2
) -> torch.Tensor:
    """The mean of sum p (first · log p - last(log q)), times T^power; the defaults are right."""
    z_s = z_s.detach() / (t if soft in ("both", "student") else 1)
    z_t = z_t / (t if soft in ("both", "teacher") else 1)
    log_q, log_p = z_s.log_softmax(dim), z_t.log_softmax(dim)
    if swap:
        log_p, log_q = log_q, log_p
    batch, time, _ = z_s.shape
    parts = {"tokens": batch * time, "batch": batch, "all": z_s.numel(), "nothing": 1}
    return (log_p.exp() * (first * log_p - last(log_q))).sum() * t**power / parts[over]


def logit_cases() -> list[tuple[torch.Tensor, torch.Tensor, float]]:
    """Logits of student and teacher, shape (4, 5, 7), and a temperature, twice."""
    return [
        (random_logits(4, 5, 7, seed=i).requires_grad_(), random_logits(4, 5, 7, seed=i + 9), t)
        for i, t in enumerate((1.7, 3.3))
    ]


def check_forward_kl(my_kl: Callable) -> bool:
    """Check `my_kl(student_logits, teacher_logits, temperature)`, a mean over tokens."""
    if not judge(my_kl, logit_cases(), kl_with, KL, "the same value as kd.forward_kl"):
        return False
    z_s, z_t, t = logit_cases()[0]
    loss = my_kl(z_s, z_t.clone(), t)
    if not isinstance(loss, torch.Tensor) or not loss.requires_grad:
        return not_yet("no gradient reaches the student. Leave out .item() and .detach()")
    mine, wanted = (torch.autograd.grad(f, z_s)[0] for f in (loss, forward_kl(z_s, z_t, t)))
    if not torch.allclose(mine, wanted, rtol=1e-3, atol=1e-6):
        return not_yet("the gradient is not: a part of the loss was detached")
    return True


def check_find_temperature(my_temperature: Callable) -> bool:
    """Check `my_temperature(logits, nats)`: where the soft labels have that entropy.

    The logits have shape (vocabulary,); the answer lies between 0.01 and 100.
    """
    wanted = {1.0: 1.0, 8.0: 3.0, 0.3: 2.0, 2.0: 0.3, 1.5: 3.8}  # size of the logits: nats
    cases = [(size * random_logits(50, seed=i), n) for i, (size, n) in enumerate(wanted.items())]
    found = []
    for case in cases:
        t, problem = attempt_number(my_temperature, case)
        if problem is None and not (t.ndim == 0 and 0 < t < math.inf):
            problem = f"you return {shown(t)}; a temperature is one positive, finite number"
        if problem:
            return not_yet(problem)
        found.append(t.item())

    def error(temperatures: list[float], unit: float = 1.0) -> float:
        """The largest error in nats if the temperatures, and the unit, are these."""
        pairs = zip(cases, temperatures, strict=True)
        return max(abs(entropy(soften(z, t)).item() / unit - nats) for (z, nats), t in pairs)

    if error(found) < 1e-3:
        return well_done("every entropy is hit to a thousandth of a nat")
    whatever = f"whatever entropy is asked for, you return {found[0]:g}. Search for it"
    hints = {
        whatever: len(set(found)) == 1,
        "you measure in bits: use the natural logarithm": error(found, math.log(2)) < 1e-3,
        "your T multiplies the logits; it must divide them": error([1 / t for t in found]) < 1e-3,
        "that is near: halve the interval more often": error(found) < 0.15,
        "entropy rises with T: if it is too low in the middle of the interval, the lower end "
        "moves up to the middle": True,
    }
    return not_yet(next(hint for hint, fits in hints.items() if fits))


def check_equal_say(my_alpha: Callable) -> bool:
    """Check `my_alpha(student_logits, teacher_logits, labels, temperature)`.

    At that alpha the gradients of the hard and of the soft labels, each with its
    weight, have the same norm.
    """
    cases = []
    for seed, (z_s, z_t, t) in enumerate(logit_cases()):
        labels = torch.randint(7, (4, 5), generator=torch.Generator().manual_seed(seed))
        cases.append((z_s.detach(), z_t, labels, t))

    def right(z_s, z_t, labels, t, say=lambda a, b: b / (a + b), of="norms", at=float, power=0):
        z_s = z_s.clone().requires_grad_()
        losses = hard_label_loss(z_s, labels), forward_kl(z_s, z_t, at(t)) * t**power
        norms = [torch.autograd.grad(loss, z_s)[0].norm() for loss in losses]
        return say(*{"norms": norms, "losses": losses, "squares": [n**2 for n in norms]}[of])

    mistakes = {
        "that is 1 - alpha: yours gives the larger gradient the larger say": {
            "say": lambda a, b: a / (a + b)
        },
        "that is soft / hard, a ratio. Solve alpha · hard = (1 - alpha) · soft for alpha": {
            "say": lambda a, b: b / a
        },
        "equal weights are not an equal say: the gradients differ in size": lambda *_: 0.5,
        "you compare the losses. Compare the norms of their gradients": {"of": "losses"},
        "you compare squared norms; gradients add up as vectors do": {"of": "squares"},
        "T² is missing from the soft labels. kd.forward_kl has it": {"power": -2},
        "T² is there twice: kd.forward_kl has it already": {"power": 2},
        "the soft labels are not softened. Give kd.forward_kl the temperature": {
            "at": lambda t: 1.0
        },
    }
    return judge(my_alpha, cases, right, mistakes, "hard and soft labels pull equally hard")
