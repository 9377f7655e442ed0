"""Temperature, and how far the student's predictions are from the teacher's soft labels.

Every divergence takes the logits of student and teacher, in this order, of shape
(..., vocabulary), and a mask of shape (...) that is True for each token that counts. It returns
one number: the mean over the tokens that count, in nats per token (total variation has no unit),
times a power of T that keeps the size of the gradients as T grows (Hinton, Vinyals & Dean 2015,
section 2). With p = softmax(z_t / T) of the teacher and q = softmax(z_s / T) of the student:

    forward KL       sum p log(p/q)       the student must cover all that the teacher might say
    reverse KL       sum q log(q/p)       the student may keep to what the teacher surely says
    Jensen-Shannon   a mix of the two     at most log 2
    skewed KLs       KL to a mixture      at most -log(skew)
    total variation  sum |p - q| / 2      at most 1

All are 0 if the student equals the teacher. A token of probability 0, such as one whose
logit is -inf, adds 0 log 0 = 0; if only the other distribution gives it 0, a KL that is not
skewed is infinite. The arithmetic is in float32 at least.

beta is that of GKD (Agarwal et al. 2024), the teacher's weight; in TRL beta = 0 and 1 are set to
forward and reverse KL, and there is no factor T². The skew is that of DistiLLM (Ko et al. 2024),
the weight of the distribution that KL starts from. So Jensen-Shannon is beta times the skewed
forward KL of skew beta, plus 1 - beta times the skewed reverse KL of skew 1 - beta.

To add a divergence, write its function here, its gradient in `scale/chunked_loss.py`, and its
name into `config.DIVERGENCE_NAMES`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from willows_kd.errors import is_integer, require, type_name

# -- soft labels -----------------------------------------------------------------------


def soften(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Soft labels: softmax(logits / T), over the vocabulary.

    T = 1 gives the model's own distribution, T > 1 flattens it, T < 1 sharpens it
    (Hinton, Vinyals & Dean 2015, equation 1). The arithmetic is in float32 at least.

    Raises:
        InputError: the temperature is not a positive, finite number.
    """
    check_temperature(temperature)
    require(isinstance(logits, torch.Tensor), f"logits are {type_name(logits)}; give a tensor")
    return torch.softmax(at_least_float32(logits) / temperature, dim=-1)


def check_temperature(temperature: float) -> None:
    """Require a positive, finite number."""
    accepted = "it must be a positive, finite number"
    require(0 < temperature < float("inf"), f"temperature is {temperature!r}; {accepted}")


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Half-precision logits in float32; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def entropy(probabilities: torch.Tensor) -> torch.Tensor:
    """Entropy of distributions in nats, shape (...): 0 for a hard label, log V if uniform."""
    return torch.special.entr(probabilities).sum(dim=-1)


class TopK(NamedTuple):
    """The probabilities and ids of the k likeliest tokens, the likeliest first, shape (..., k).

    `rest` is the probability of all the others, shape (...).
    """

    probabilities: torch.Tensor
    tokens: torch.Tensor
    rest: torch.Tensor


def top_k(logits: torch.Tensor, k: int = 10, temperature: float = 1.0) -> TopK:
    """The k likeliest tokens at a temperature; their order is the same at every temperature."""
    softened = soften(logits, temperature)
    vocabulary = softened.shape[-1]
    fits = is_integer(k) and k <= vocabulary
    require(fits, f"k is {k!r}; it must be a whole number from 1 to {vocabulary}")
    probabilities, tokens = softened.topk(k, dim=-1)
    return TopK(probabilities, tokens, (1 - probabilities.sum(dim=-1)).clamp_min(0))


# -- divergences -----------------------------------------------------------------------


def forward_kl(student_logits, teacher_logits, temperature=1.0, mask=None) -> torch.Tensor:
    """KL(teacher || student) · T²: the loss of classical distillation (Hinton et al. 2015).

    Its gradient, in the student's logits, is T · (q - p) / N for each of N tokens that count.

    Args:
        student_logits, teacher_logits: shape (..., vocabulary); the student's take gradients.
        temperature: T, softens both distributions; positive.
        mask: True for each token that counts, shape (...); None counts all.

    Returns:
        the mean over the tokens that count, in nats per token: one number, 0 if none counts.

    Raises:
        InputError: the shapes do not fit together, or T is not positive and finite.
    """
    log_q, log_p = log_softened(student_logits, teacher_logits, temperature, mask)
    return temperature**2 * masked_mean(kl(log_p, log_q), mask)


def reverse_kl(student_logits, teacher_logits, temperature=1.0, mask=None) -> torch.Tensor:
    """KL(student || teacher) · T², as in MiniLLM (Gu et al. 2024, section 2.1).

    The arguments are those of `forward_kl`.
    """
    log_q, log_p = log_softened(student_logits, teacher_logits, temperature, mask)
    return temperature**2 * masked_mean(kl(log_q, log_p), mask)


def jensen_shannon(
    student_logits, teacher_logits, temperature=1.0, mask=None, beta=0.5
) -> torch.Tensor:
    """[beta · KL(p || m) + (1 - beta) · KL(q || m)] · T², with m = beta · p + (1 - beta) · q.

    The generalised divergence of GKD (Agarwal et al. 2024, equation 1). It tends to 0 as
    `beta` tends to 0 (divided by beta, to the forward KL) or to 1 (divided by 1 - beta, to the
    reverse KL), so `beta` must lie strictly between. The other arguments are those of
    `forward_kl`.
    """
    log_q, log_p = log_softened(student_logits, teacher_logits, temperature, mask)
    log_m = log_mixture(log_p, log_q, beta)
    per_token = beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
    return temperature**2 * masked_mean(per_token, mask)


def skewed_forward_kl(
    student_logits, teacher_logits, temperature=1.0, mask=None, skew=0.1
) -> torch.Tensor:
    """KL(p || skew · p + (1 - skew) · q) · T², as in DistiLLM (Ko et al. 2024, section 3.1).

    A token that only the teacher gives probability costs at most -log(skew), where the
    forward KL has no bound. 0 < skew < 1. The other arguments are those of `forward_kl`.
    """
    log_q, log_p = log_softened(student_logits, teacher_logits, temperature, mask)
    return temperature**2 * masked_mean(kl(log_p, log_mixture(log_p, log_q, skew)), mask)


def skewed_reverse_kl(
    student_logits, teacher_logits, temperature=1.0, mask=None, skew=0.1
) -> torch.Tensor:
    """KL(q || (1 - skew) · p + skew · q) · T², as in DistiLLM (Ko et al. 2024, section 3.1).

    The same with student and teacher in each other's place: bounded, where the reverse KL is
    not, for a token that only the student gives probability.
    """
    log_q, log_p = log_softened(student_logits, teacher_logits, temperature, mask)
    return temperature**2 * masked_mean(kl(log_q, log_mixture(log_q, log_p, skew)), mask)


def total_variation(student_logits, teacher_logits, temperature=1.0, mask=None) -> torch.Tensor:
    """Half the sum of |p - q|, times T: the share of probability mass that would have to move.

    T and not T², since the gradient of this distance shrinks as 1/T, that of a KL as 1/T². Used
    by Wen et al. 2023 (f-divergence minimisation, section 3). The arguments are those of
    `forward_kl`.
    """
    log_q, log_p = log_softened(student_logits, teacher_logits, temperature, mask)
    return temperature * masked_mean((log_q.exp() - log_p.exp()).abs().sum(dim=-1) / 2, mask)


DIVERGENCES: dict[str, Callable] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "skewed_forward_kl": skewed_forward_kl,
    "skewed_reverse_kl": skewed_reverse_kl,
    "total_variation": total_variation,
}


def divergence_of(config) -> Callable:
    """The divergence that a `DistillConfig` names, with its beta or skew if it has one."""
    name = config.divergence
    more = {"beta": config.beta} if name == "jensen_shannon" else {}
    more |= {"skew": config.skew} if name.startswith("skewed") else {}
    return functools.partial(DIVERGENCES[name], **more)


def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of each token, in nats, shape (...), from log-probabilities."""
    p = log_p.exp()
    return (p * log_ratio(log_p, log_q, p)).sum(dim=-1)


def log_ratio(log_p: torch.Tensor, log_q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """log(p/q); 0 if p is 0, so that p log(p/q) is 0 and not NaN."""
    return (log_p - log_q).masked_fill_(p == 0, 0)


def log_mixture(log_p: torch.Tensor, log_q: torch.Tensor, weight: float) -> torch.Tensor:
    """log(weight · p + (1 - weight) · q)."""
    accepted = "beta and skew must lie between 0 and 1, both excluded"
    require(0 < weight < 1, f"the weight in a mixture is {weight}; {accepted}")
    smallest = torch.finfo(log_q.dtype).tiny  # not 0: autograd would divide 0 by 0
    return (weight * log_p.exp() + (1 - weight) * log_q.exp()).clamp_min(smallest).log()


# -- hard labels, hidden states, and what all losses need ------------------------------


def hard_label_loss(student_logits, labels, mask=None) -> torch.Tensor:
    """Cross-entropy with the tokens of the text, in nats per token.

    Args:
        student_logits: shape (..., vocabulary).
        labels: token ids, shape (...).
        mask: True for each token that counts, shape (...).
    """
    check_labels(labels, student_logits.shape[:-1])
    logits = zero_masked(at_least_float32(student_logits), mask)
    per_token = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
    return masked_mean(per_token.view(labels.shape), mask)


def check_labels(labels: torch.Tensor, shape: torch.Size) -> None:
    """Require integer token ids, one per prediction."""
    require(
        labels.shape == shape and not labels.is_floating_point(),
        f"labels are {labels.dtype} of shape {tuple(labels.shape)}; "
        f"they must be token ids (torch.long) of shape {tuple(shape)}",
    )


def cosine_distance(student_hidden, teacher_hidden, mask=None) -> torch.Tensor:
    """1 - cos of the angle between hidden states: DistilBERT's (Sanh et al. 2019, section 3).

    It compares directions, not lengths: 0 if they agree, 1 if they are at right angles, at
    most 2. It has no unit.

    Args:
        student_hidden, teacher_hidden: shape (..., width); the student's take gradients.
        mask: as in `forward_kl`.

    Raises:
        InputError: the shapes do not fit together.
    """
    check_equal_shapes(student_hidden, teacher_hidden, "hidden states")
    student, teacher = (
        zero_masked(at_least_float32(h), mask) for h in (student_hidden, teacher_hidden.detach())
    )
    return masked_mean(1 - F.cosine_similarity(student, teacher, dim=-1), mask)


def mix(hard_loss, soft_loss, alpha: float):
    """alpha · hard + (1 - alpha) · soft, the weights of Hinton et al. 2015.

    Some libraries weigh the soft labels: torchtune's `kd_ratio` is 1 - alpha.
    """
    accepted = "it must lie between 0 (soft only) and 1 (hard only)"
    require(0 <= alpha <= 1, f"alpha is {alpha}; {accepted}")
    return alpha * hard_loss + (1 - alpha) * soft_loss


def shift(logits: torch.Tensor, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pair each prediction with the token it predicts: position i with token i + 1.

    Args:
        logits: shape (batch, block_size, vocabulary).
        input_ids: shape (batch, block_size).

    Returns:
        logits without the last position, which has no next token, and labels: shapes
        (batch, block_size - 1, vocabulary) and (batch, block_size - 1).
    """
    shapes = f"logits of shape {tuple(logits.shape)} and ids of shape {tuple(input_ids.shape)}"
    wanted = "(batch, block_size, vocabulary) and (batch, block_size)"
    fit = logits.ndim == 3 and logits.shape[:2] == input_ids.shape
    require(fit, f"{shapes} do not go together; they must be {wanted}")
    return logits[:, :-1], input_ids[:, 1:]


def log_softened(student_logits, teacher_logits, temperature, mask=None):
    """log q and log p: log softmax(z / T) of student and teacher. Only q takes gradients."""
    check_temperature(temperature)
    check_equal_shapes(student_logits, teacher_logits, "logits")
    return tuple(
        F.log_softmax(zero_masked(at_least_float32(z), mask) / temperature, dim=-1)
        for z in (student_logits, teacher_logits.detach())
    )


def check_equal_shapes(of_student: torch.Tensor, of_teacher: torch.Tensor, what: str) -> None:
    """Require one shape of what is compared token by token."""
    require(
        of_student.shape == of_teacher.shape,
        f"the student's {what} have shape {tuple(of_student.shape)}, the teacher's "
        f"{tuple(of_teacher.shape)}; they must be equal",
    )


def masked_mean(per_token: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The mean over the tokens that count; 0 if none does."""
    if mask is None:
        return per_token.mean()
    return (per_token * mask).sum() / mask.sum().clamp_min(1)


def zero_masked(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Zero the values of tokens that do not count, so that no infinity spreads from them."""
    if mask is None:
        return values
    require(
        mask.shape == values.shape[:-1],
        f"the mask has shape {tuple(mask.shape)}; it must have {tuple(values.shape[:-1])}",
    )
    return values.masked_fill(~mask.bool()[..., None], 0)
