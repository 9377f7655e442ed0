"""Checks for notebook 03: the shift, the loss, the number of steps."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from willows_kd.exercises import not_yet, well_done
from willows_kd.losses import forward_kl, hard_label_loss, mix

ALPHA_SIDE = "alpha is on the wrong side: it weighs the hard labels, 1 - alpha the soft ones"
T_SQUARED = (
    "the T² is missing, so the soft labels count for less and less as T grows; multiply the KL "
    "by temperature**2"
)
SWAPPED = (
    "teacher and student are swapped in the KL; F.kl_div takes the student's log-probabilities "
    "first, then the teacher's"
)
PER_TEXT = (
    'the KL is divided by the number of texts only, as reduction="batchmean" does; divide by the '
    "number of tokens"
)
CROSS_ENTROPY = (
    "this is the cross-entropy with the soft labels; it teaches the same, but is not 0 where the "
    "student equals its teacher: take the KL"
)


def check_shift(my_shift: Callable) -> bool:
    """Whether `my_shift(logits, input_ids)` pairs each prediction with the token it predicts.

    Logits and ids both hold the position that they stand at, so that what was paired
    with what can be read off the result.
    """
    batch, length, vocabulary = 2, 6, 5
    positions = torch.arange(length).expand(batch, length)
    logits = positions[..., None].expand(batch, length, vocabulary).float()
    try:
        predictions, labels = my_shift(logits.clone(), positions.clone())
        shapes = tuple(predictions.shape), tuple(labels.shape)
    except Exception as error:
        return stopped(error)
    wanted = (batch, length - 1, vocabulary), (batch, length - 1)
    if (shapes[0][:1], shapes[0][2:], shapes[1][:1]) != ((batch,), (vocabulary,), (batch,)) or (
        len(shapes[1]) != 2
    ):
        return not_yet(
            f"the shapes are {shapes[0]} and {shapes[1]}, not {wanted[0]} and {wanted[1]}. Shorten "
            "the second dimension, time: [:, :-1] or [:, 1:]"
        )
    if shapes[0][1] != shapes[1][1]:
        return not_yet(
            f"there are {shapes[0][1]} predictions for {shapes[1][1]} labels. The last prediction "
            "has no next token and the first token has no prediction: one of each goes"
        )
    offsets = (labels - predictions[..., 0]).unique()
    if len(offsets) != 1:
        return not_yet(
            "not every position is paired with the token after it. The last one has no next "
            "token: cut it off, do not roll it round"
        )
    offset = int(offsets)
    if offset == 0:
        return not_yet(
            "position i is paired with token i, which the student has just read. The loss would "
            "fall to nothing by copying. Pair it with token i + 1"
        )
    if offset == -1:
        return not_yet(
            "off by one the wrong way: position i is paired with token i - 1, the past. Drop the "
            "last prediction and the first token, not the other way round"
        )
    if offset != 1:
        return not_yet(f"position i is paired with token i {offset:+d}; it predicts token i + 1")
    if shapes != wanted:
        return not_yet(
            f"{shapes[1][1]} pairs are left of {length} tokens; {length - 1} could be had"
        )
    return well_done("position i answers for token i + 1, and for no other")


def check_loss(my_loss: Callable) -> bool:
    """Whether `my_loss(z_s, z_t, labels, temperature, alpha)` is the loss of distillation.

    The result is compared with the right loss and with what each usual mistake gives.
    """
    generator = torch.Generator().manual_seed(0)
    z_s, z_t = 2 * torch.randn(2, 3, 4, 7, generator=generator)
    labels = torch.randint(7, (3, 4), generator=generator)
    t, alpha = 3.0, 0.2
    try:
        found = torch.as_tensor(my_loss(z_s.clone(), z_t.clone(), labels.clone(), t, alpha))
    except Exception as error:
        return stopped(error)
    if found.numel() != 1:
        return not_yet(f"the loss has shape {tuple(found.shape)}; it is one number: take the mean")
    hard, soft = hard_label_loss(z_s, labels), forward_kl(z_s, z_t, t)
    backwards, unsoftened = forward_kl(z_t, z_s, t), t**2 * forward_kl(z_s, z_t)
    only_student = t**2 * forward_kl(z_s / t, z_t)
    floor = t**2 * torch.special.entr(F.softmax(z_t / t, -1)).sum(-1).mean()
    softened_hard = hard_label_loss(z_s / t, labels)
    mistakes = [
        (mix(soft, hard, alpha), ALPHA_SIDE),
        (mix(hard, soft / t**2, alpha), T_SQUARED),
        (mix(soft / t**2, hard, alpha), f"{ALPHA_SIDE}. And {T_SQUARED}"),
        (mix(hard, soft / t, alpha), "the soft labels have T where T² belongs"),
        (mix(t**2 * hard, soft, alpha), "T² multiplies the hard labels too; the KL alone needs it"),
        (mix(softened_hard, soft, alpha), "the hard labels are softened; T belongs in the KL only"),
        (mix(hard, only_student, alpha), "the teacher's logits are not divided by the temperature"),
        (mix(hard, unsoftened, alpha), "the logits are not divided by the temperature"),
        (mix(hard, backwards, alpha), SWAPPED),
        (mix(hard, soft / 7, alpha), "the KL is a mean over the vocabulary; sum over it"),
        (mix(hard, soft * 4, alpha), PER_TEXT),
        (mix(hard, soft + floor, alpha), CROSS_ENTROPY),
        (hard, "these are the hard labels alone, whatever alpha is"),
        (soft, "these are the soft labels alone, whatever alpha is"),
    ]
    if close(found, mix(hard, soft, alpha)):
        return well_done("alpha weighs the hard labels, T² the soft ones, both per token")
    for wrong, problem in mistakes:
        if close(found, wrong):
            return not_yet(problem)
    return not_yet(
        f"the loss is {found.item():.4f} where {mix(hard, soft, alpha).item():.4f} was wanted "
        f"(hard labels {hard.item():.4f}, soft labels with T² {soft.item():.4f}, alpha {alpha})"
    )


def check_steps(my_steps: Callable) -> bool:
    """Whether `my_steps(blocks, batch_size, gradient_accumulation_steps, epochs)` is right."""
    blocks, batch_size, gradient_accumulation_steps, epochs = case = 31, 8, 3, 3
    try:
        found = my_steps(*case)
        others = my_steps(48, 8, 1, 2), my_steps(5, 8, 1, 1)
    except Exception as error:
        return stopped(error)
    a_step = batch_size * gradient_accumulation_steps
    mistakes = {
        math.ceil(blocks / a_step): "that is one epoch; every epoch sees all blocks again",
        epochs * (blocks // a_step): "the last step of an epoch is missing; it has fewer blocks, "
        "but it is a step: round up",
        epochs * math.ceil(blocks / batch_size): "those are forward passes; an optimiser step "
        "comes after `gradient_accumulation_steps` of them",
        math.ceil(epochs * blocks / a_step): "no step reaches over the end of an epoch; round up "
        "in each epoch, then multiply",
        epochs * blocks: "that is a step a block; a step takes several: batch_size times "
        "gradient_accumulation_steps",
        epochs * blocks / a_step: "a number of steps is whole; round up in each epoch",
    }
    right = epochs * math.ceil(blocks / a_step)
    shown = "blocks={}, batch_size={}, gradient_accumulation_steps={}, epochs={}".format(*case)
    if found == right and others == (12, 1):
        return well_done(f"{shown} makes {right} steps")
    if found == right:
        return not_yet(
            f"right for {shown}, but not for 48 blocks, 8, 1, 2 epochs (12) or for 5 blocks, "
            "8, 1, 1 epoch (1)"
        )
    return not_yet(f"{shown}, and you say {found}: {mistakes.get(found, 'count one epoch first')}")


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether two losses are equal but for rounding."""
    return torch.allclose(found.detach().float().reshape(()), wanted, rtol=1e-4)


def stopped(error: Exception) -> bool:
    """Say that the learner's function raised an error."""
    return not_yet(f"your function stops with {type(error).__name__}: {error}")
