"""Checks for notebook 02: forward KL, a temperature for a given entropy, an equal say."""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from willows_kd.exercises import judge, not_yet, random_logits
from willows_kd.losses import entropy, forward_kl, hard_label_loss, reverse_kl, soften

KL = {  # the hint: what makes the mistake, of logits of shape (4, 5, 7) and T
    "your softmax runs over time: use dim=-1": lambda s, t, T: forward_kl(s.mT, t.mT, T) * 7 / 5,
    "that is the soft cross-entropy: sum p · (log p - log q)": lambda s, t, T: (
        forward_kl(s, t, T) + T**2 * entropy(soften(t, T)).mean()
    ),
    "F.kl_div got the student's probabilities; it wants their logarithms": lambda s, t, T: (
        T**2 * F.kl_div(soften(s, T), soften(t, T), reduction="sum") / 20
    ),
    "this is reverse KL: F.kl_div takes the student first": reverse_kl,
    "batchmean grows with the length: take the mean over tokens": lambda *z: 5 * forward_kl(*z),
    "sum over the vocabulary, then take the mean over tokens": lambda *z: forward_kl(*z) / 7,
    "T² is missing: multiply by temperature**2": lambda s, t, T: forward_kl(s, t, T) / T**2,
}
Z_S, Z_T = random_logits(4, 5, 7, seed=0), random_logits(4, 5, 7, seed=9)
LABELS = torch.arange(20).reshape(4, 5) % 7
CASES = (Z_S, Z_T, LABELS, 1.7), (Z_T, Z_S, LABELS, 3.3)


def check_forward_kl(my_forward_kl: Callable) -> bool:
    """Check `my_forward_kl(student_logits, teacher_logits, temperature)`, a mean over tokens."""
    praise = "the same value as kd.forward_kl"
    if not judge(my_forward_kl, forward_kl, KL, praise, (Z_S, Z_T, 1.7), (Z_T, Z_S, 3.3)):
        return False
    loss = torch.as_tensor(my_forward_kl(Z_S.clone().requires_grad_(), Z_T.clone(), 1.7))
    return loss.requires_grad or not_yet("but no gradient: leave out .item() and .detach()")


def check_find_temperature(my_temperature: Callable) -> bool:
    """Check `my_temperature(logits, nats)`: where the soft labels have that entropy.

    The logits have shape (vocabulary,); the answer lies between 0.01 and 100.
    """
    one, other = random_logits(50, seed=0), random_logits(50, seed=1)
    temperatures = torch.logspace(-2, 2, 10_001)

    def right(logits, nats) -> torch.Tensor:
        found = entropy(soften(logits / temperatures[:, None]))
        return temperatures[(found - nats).abs().argmin()]

    mistakes = {
        "that is 1, whatever entropy is asked for: search for it": lambda *_: 1.0,
        "you measure in bits: use the natural logarithm": lambda z, n: right(z, n * math.log(2)),
    }
    praise = "every temperature is right to a thousandth"
    return judge(my_temperature, right, mistakes, praise, (one, 1.0), (other, 3.8), tolerance=1e-3)


def check_equal_say(my_alpha: Callable) -> bool:
    """Check `my_alpha(z_s, z_t, labels, temperature)`: both weighted gradients have one norm."""

    def right(s, t, labels, T, size=lambda loss, z: torch.autograd.grad(loss, z)[0].norm()):
        s.requires_grad_()
        hard, soft = size(hard_label_loss(s, labels), s), size(forward_kl(s, t, T), s)
        return soft / (hard + soft)

    mistakes = {
        "equal weights are not an equal say: the gradients differ in size": lambda *_: 0.5,
        "that is 1 - alpha: the larger gradient has more say": lambda *case: 1 - right(*case),
        "that is soft / hard: solve for alpha": lambda *case: right(*case) / (1 - right(*case)),
        "compare the norms of gradients, not losses": partial(right, size=lambda loss, _: loss),
        "kd.forward_kl needs the temperature": lambda s, t, labels, _: right(s, t, labels, 1.0),
    }
    return judge(my_alpha, right, mistakes, "hard and soft labels pull equally hard", *CASES)
