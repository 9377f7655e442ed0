"""Checks for notebook 03: the shift, the loss, the number of steps."""

import math
from collections.abc import Callable
from functools import partial

import torch

from willows_kd.exercises import judge
from willows_kd.exercises.soft_labels import CASES, KL
from willows_kd.losses import forward_kl, hard_label_loss, mix


def check_shift(my_shift: Callable) -> bool:
    """Check `my_shift(logits, input_ids)`: each prediction with the token it predicts.

    Logits and ids both hold the position that they stand at, so that what was paired
    with what can be read off the result.
    """
    ids = torch.arange(6).expand(2, 6)
    logits = ids[..., None].expand(2, 6, 5)

    def ahead(logits, ids) -> torch.Tensor:
        """How far each label lies after its prediction."""
        predictions, labels = my_shift(logits, ids)
        shapes = tuple(predictions.shape), tuple(labels.shape)
        if shapes[0][:-1] != shapes[1]:
            raise ValueError(f"predictions {shapes[0]} and labels {shapes[1]} do not pair off")
        return labels - predictions[..., 0]

    mistakes = {
        "position i is paired with token i, just read: take i + 1": lambda z, i: i - i,
        "position i is paired with token i - 1": lambda z, i: i[:, :-1] - i[:, 1:],
        "the last position has no next token: do not roll it": lambda z, i: i.roll(-1, 1) - i,
        "time is the second dimension: [:, :-1] or [:, 1:]": lambda z, i: i[1:] - i[:-1],
    }
    praise = "position i answers for token i + 1, and for no other"
    return judge(ahead, lambda *_: torch.ones(2, 5), mistakes, praise, (logits, ids))


def check_loss(my_loss: Callable) -> bool:
    """Check `my_loss(z_s, z_t, labels, temperature, alpha)`: the loss of distillation."""

    def right(s, t, y, T, alpha, kl=forward_kl, soften=0, times=0) -> torch.Tensor:
        hard = T**times * hard_label_loss(s / T**soften, y)
        return mix(hard, kl(s, t, T), alpha)

    mistakes = {
        "alpha weighs the hard labels": lambda s, t, y, T, alpha: right(s, t, y, T, 1 - alpha),
        "alpha is missing": lambda s, t, y, T, _: 2 * right(s, t, y, T, 0.5),
        "the hard labels are softened; T belongs in the KL only": partial(right, soften=1),
        "T² multiplies the hard labels too; only the KL needs it": partial(right, times=2),
    }
    mistakes |= {hint: partial(right, kl=kl) for hint, kl in KL.items()}
    praise = "alpha weighs the hard labels, T² the soft ones, both per token"
    return judge(my_loss, right, mistakes, praise, (*CASES[0], 0.2), (*CASES[1], 0.7))


def check_steps(my_steps: Callable) -> bool:
    """Check `my_steps(blocks, batch_size, gradient_accumulation_steps, epochs)`."""

    def right(blocks, size, times, epochs) -> int:
        return epochs * math.ceil(blocks / (size * times))

    mistakes = {
        "that is one epoch; each sees all blocks again": lambda b, s, t, e: right(b, s, t, 1),
        "the last step of an epoch is missing: round up": lambda b, s, t, e: e * (b // (s * t)),
        "those are forward passes, not steps": lambda b, s, t, e: right(b, s, 1, e),
        "round up in each epoch, then multiply": lambda b, s, t, e: right(e * b, s, t, 1),
    }
    praise = f"{right(31, 8, 3, 3)} steps for (31, 8, 3, 3)"
    return judge(my_steps, right, mistakes, praise, (31, 8, 3, 3), (48, 8, 1, 2), (5, 8, 1, 1))
