"""Checks for notebook 03: the shift, the loss, the number of steps."""

import math
from collections.abc import Callable

import torch

from willows_kd.exercises import attempt, judge, not_yet, well_done
from willows_kd.exercises.soft_labels import KL, kl_with, logit_cases
from willows_kd.losses import hard_label_loss, mix


def check_shift(my_shift: Callable) -> bool:
    """Check `my_shift(logits, input_ids)`: each prediction with the token it predicts.

    Logits and ids both hold the position that they stand at, so that what was paired
    with what can be read off the result.
    """
    positions = torch.arange(6).expand(2, 6)
    logits = positions[..., None].expand(2, 6, 5).float()
    result, problem = attempt(my_shift, (logits, positions))
    if problem:
        return not_yet(problem)
    try:
        predictions, labels = result
        shapes = tuple(predictions.shape), tuple(labels.shape)
    except (TypeError, ValueError, AttributeError):
        return not_yet("return two tensors: the predictions, and the labels")
    if predictions.ndim != 3 or shapes[0] != (2, *shapes[1][1:], 5):
        return not_yet(
            f"the shapes are {shapes[0]} and {shapes[1]}, not (2, 5, 5) and (2, 5). The last "
            "prediction and the first token go. Time is the second dimension: [:, :-1] or [:, 1:]"
        )
    offsets = (labels - predictions[..., 0]).unique().tolist()
    if offsets == [1] and shapes[1] == (2, 5):
        return well_done("position i answers for token i + 1, and for no other")
    return not_yet(SHIFTED.get(tuple(offsets), SHIFTED[()]))


SHIFTED = {  # tokens by which a label lies after its prediction: the hint
    (0,): "position i is paired with token i, which the student has just read. The loss would "
    "fall to nothing by copying. Pair it with token i + 1",
    (-1,): "position i is paired with token i - 1. Drop the last prediction and the first token",
    (): "not every position but the last is paired with the token after it. The last one has no "
    "next token: cut it off, do not roll it round",
}


def check_loss(my_loss: Callable) -> bool:
    """Check `my_loss(z_s, z_t, labels, temperature, alpha)`: the loss of distillation."""
    cases = []
    for (z_s, z_t, t), alpha in zip(logit_cases(), (0.2, 0.7), strict=True):
        labels = torch.randint(7, (4, 5), generator=torch.Generator().manual_seed(0))
        cases.append((z_s, z_t, labels, t, alpha))

    def right(z_s, z_t, labels, t, alpha, weight=lambda a: a, divided=0, times=0, **of_kl):
        hard = t**times * hard_label_loss(z_s.detach() / t**divided, labels)
        return mix(hard, kl_with(z_s, z_t, t, **of_kl), weight(alpha))

    mistakes = {
        "alpha is on the wrong side: it weighs the hard labels": {"weight": lambda a: 1 - a},
        "these are the hard labels alone, whatever alpha is": {"weight": lambda a: 1},
        "these are the soft labels alone, whatever alpha is": {"weight": lambda a: 0},
        "the hard labels are softened; T belongs in the KL only": {"divided": 1},
        "T² multiplies the hard labels too; only the KL needs it": {"times": 2},
    }
    praise = "alpha weighs the hard labels, T² the soft ones, both per token"
    return judge(my_loss, cases, right, mistakes | KL, praise)


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
    cases = [(31, 8, 3, 3), (48, 8, 1, 2), (5, 8, 1, 1)]
    praise = f"{right(*cases[0])} steps for {cases[0]}"
    return judge(my_steps, cases, right, mistakes, praise)
