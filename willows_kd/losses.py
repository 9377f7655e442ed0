"""What the student is asked to bring to zero: divergences from the teacher's soft labels.

Every divergence takes logits of shape (..., vocabulary) and a mask of shape (...)
that is True where a token counts, and returns one number: the sum over the
vocabulary, the mean over the tokens that count, in nats per token, times T² (Hinton,
Vinyals & Dean 2015, section 2) so that gradients keep their size as T grows. With p
for the teacher and q for the student:

    forward KL       sum p log(p/q)                   covers all that the teacher might say
    reverse KL       sum q log(q/p)                   keeps to what the teacher surely says
    Jensen-Shannon   a mix of the two, bounded by log 2
    total variation  sum |p - q| / 2                  bounded by 1; times T, see there

All are 0 where the student equals the teacher. The arguments are in the same order
everywhere: student first. Arithmetic is in float32 at least.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from willows_kd.errors import require
from willows_kd.soft_labels import check_temperature

Divergence = Callable[..., torch.Tensor]


def forward_kl(student_logits, teacher_logits, temperature=1.0, mask=None) -> torch.Tensor:
    """KL(teacher || student) · T²: the loss of classical distillation.

    Its gradient with respect to the student's logits is, for each of N counted
    tokens, T · (softmax(z_s/T) - softmax(z_t/T)) / N.
    """
    log_q, log_p = log_softened(student_logits, teacher_logits, temperature, mask)
    return temperature**2 * masked_mean(kl(log_p, log_q), mask)


def reverse_kl(student_logits, teacher_logits, temperature=1.0, mask=None) -> torch.Tensor:
    """KL(student || teacher) · T²: as MiniLLM uses it (Gu et al. 2024, section 2.1)."""
    log_q, log_p = log_softened(student_logits, teacher_logits, temperature, mask)
    return temperature**2 * masked_mean(kl(log_q, log_p), mask)


def jensen_shannon(
    student_logits, teacher_logits, temperature=1.0, mask=None, beta=0.5
) -> torch.Tensor:
    """beta · KL(p || m) + (1 - beta) · KL(q || m), times T², with m = beta·p + (1-beta)·q.

    The generalised divergence of Agarwal et al. 2024 (GKD, equation 1). It tends to
    0 as `beta` tends to 0 or 1; only divided by beta, or by 1 - beta, does it tend to
    the forward, or reverse, KL. So `beta` must lie strictly between.
    """
    require(0 < beta < 1, f"beta is {beta}; it must lie between 0 and 1, both excluded")
    log_q, log_p = log_softened(student_logits, teacher_logits, temperature, mask)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    per_token = beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
    return temperature**2 * masked_mean(per_token, mask)


def total_variation(student_logits, teacher_logits, temperature=1.0, mask=None) -> torch.Tensor:
    """Half the sum of |p - q|, times T: the share of mass that would have to move.

    T and not T²: this distance is of first order in the logits' difference, so its
    gradient shrinks as 1/T where that of a KL shrinks as 1/T². Used for distillation
    by Wen et al. 2023 (f-divergence minimisation, section 3).
    """
    log_q, log_p = log_softened(student_logits, teacher_logits, temperature, mask)
    return temperature * masked_mean((log_p.exp() - log_q.exp()).abs().sum(dim=-1) / 2, mask)


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "total_variation": total_variation,
}


def hard_label_loss(student_logits, labels, mask=None) -> torch.Tensor:
    """Cross-entropy with the words that were really written, in nats per token.

    Args:
        student_logits: shape (..., vocabulary).
        labels: token ids, shape (...).
        mask: True where a token counts, shape (...).
    """
    check_labels(labels, student_logits.shape[:-1])
    logits = zero_masked_logits(at_least_float32(student_logits), mask)
    per_token = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
    return masked_mean(per_token.view(labels.shape), mask)


def check_labels(labels: torch.Tensor, shape: torch.Size) -> None:
    """Refuse what are no token ids, or not one for each prediction."""
    require(
        labels.shape == shape and not labels.is_floating_point(),
        f"labels are {labels.dtype} of shape {tuple(labels.shape)}; "
        f"they must be token ids (torch.long) of shape {tuple(shape)}",
    )


def mix(hard_loss, soft_loss, alpha: float):
    """alpha · hard + (1 - alpha) · soft: `alpha` weighs the hard labels."""
    check_alpha(alpha)
    return alpha * hard_loss + (1 - alpha) * soft_loss


def check_alpha(alpha: float) -> None:
    """Refuse a weight that is none."""
    accepted = "it must lie between 0 (soft only) and 1 (hard only)"
    require(0 <= alpha <= 1, f"alpha is {alpha}; {accepted}")


def shift(logits: torch.Tensor, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pair each prediction with the token it predicts: position i with token i + 1.

    Args:
        logits: shape (batch, block_size, vocabulary).
        input_ids: shape (batch, block_size).

    Returns:
        logits of shape (batch, block_size - 1, vocabulary), without the last position,
        which has no next token, and labels of shape (batch, block_size - 1).
    """
    require(
        logits.ndim == 3 and logits.shape[:2] == input_ids.shape,
        f"logits of shape {tuple(logits.shape)} do not go with ids of shape "
        f"{tuple(input_ids.shape)}; they must be (batch, block_size, vocabulary) and "
        "(batch, block_size)",
    )
    return logits[:, :-1], input_ids[:, 1:]


def log_softened(student_logits, teacher_logits, temperature, mask=None):
    """log softmax(z/T) of both over the vocabulary; the teacher's takes no gradient."""
    check_temperature(temperature)
    require(
        student_logits.shape == teacher_logits.shape,
        f"the student's logits have shape {tuple(student_logits.shape)}, the teacher's "
        f"{tuple(teacher_logits.shape)}; they must be equal",
    )
    student = zero_masked_logits(at_least_float32(student_logits), mask) / temperature
    teacher = zero_masked_logits(at_least_float32(teacher_logits.detach()), mask) / temperature
    return F.log_softmax(student, dim=-1), F.log_softmax(teacher, dim=-1)


def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of each token, in nats, shape (...), from log-probabilities."""
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(dim=-1)


def masked_mean(per_token: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The mean over the tokens that count; 0 where none does."""
    if mask is None:
        return per_token.mean()
    return (per_token * mask).sum() / mask.sum().clamp_min(1)


def zero_masked_logits(logits: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Zeros for the logits of tokens that do not count: an infinity there would spread."""
    if mask is None:
        return logits
    require(
        mask.shape == logits.shape[:-1],
        f"the mask has shape {tuple(mask.shape)}; it must have {tuple(logits.shape[:-1])}",
    )
    return logits.masked_fill(~mask.bool()[..., None], 0)


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Half-precision logits in float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
