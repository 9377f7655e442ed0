"""Divergences: how far the student's predictions are from the teacher's soft labels.

Every divergence takes the logits of student and teacher, in this order, of shape
(..., vocabulary), and a mask of shape (...) that is True for each token that counts. It
returns one number: the sum over the vocabulary, averaged over the tokens that count, in
nats per token (total variation has no unit), times a power of T that keeps the size of
the gradients as T grows (Hinton, Vinyals & Dean 2015, section 2). With the softened
distributions p = softmax(z_t / T) of the teacher and q = softmax(z_s / T) of the student:

    forward KL       sum p log(p/q)       the student must cover all that the teacher might say
    reverse KL       sum q log(q/p)       the student may keep to what the teacher surely says
    Jensen-Shannon   a mix of the two     at most log 2
    skewed KLs       KL to a mixture      at most -log(skew)
    total variation  sum |p - q| / 2      at most 1

All are 0 if the student equals the teacher. A token of probability 0, such as one whose
logit is -inf, adds 0 log 0 = 0; if only the other distribution gives it 0, a KL that is not
skewed is infinite. The arithmetic is in float32 at least.

The mixtures weigh the two distributions differently from one source to the next:

    GKD (Agarwal et al. 2024)    beta is the teacher's weight in m = beta p + (1 - beta) q
    TRL's GKD                    the same, but beta = 0 and 1 are set to forward and reverse KL,
                                 and the temperature brings no factor T²
    DistiLLM (Ko et al. 2024)    the skew is the weight of the distribution that KL starts from;
                                 in its code's Jensen-Shannon, `lam` is the student's: 1 - beta

Here beta is GKD's and the skew DistiLLM's, so that Jensen-Shannon is beta times the skewed
forward KL of skew beta, plus 1 - beta times the skewed reverse KL of skew 1 - beta.

`DIVERGENCES`, the registry, holds the formulas. The functions here, the full-logits
losses, take its values and leave the gradients to autograd; `chunked_distillation_loss` takes its
values and its gradients. To add a divergence, add an entry, and its name to
`config.DIVERGENCE_NAMES`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

from willows_kd.errors import require
from willows_kd.soft_labels import at_least_float32, check_temperature


def forward_kl(student_logits, teacher_logits, temperature=1.0, mask=None) -> torch.Tensor:
    """KL(teacher || student) · T²: the loss of classical distillation (Hinton et al. 2015).

    Its gradient with respect to the student's logits is T · (q - p) / N for each of the N
    tokens that count.

    Args:
        student_logits, teacher_logits: shape (..., vocabulary). Only the student's take
            gradients.
        temperature: T, softens both distributions; positive.
        mask: True for each token that counts, shape (...); None counts all.

    Returns:
        the mean over the tokens that count, in nats per token: one number, 0 if none counts.

    Raises:
        InputError: the shapes do not fit together, or T is not positive and finite.
    """
    return DIVERGENCES["forward_kl"](student_logits, teacher_logits, temperature, mask)


def reverse_kl(student_logits, teacher_logits, temperature=1.0, mask=None) -> torch.Tensor:
    """KL(student || teacher) · T², as in MiniLLM (Gu et al. 2024, section 2.1).

    The arguments are those of `forward_kl`.
    """
    return DIVERGENCES["reverse_kl"](student_logits, teacher_logits, temperature, mask)


def jensen_shannon(
    student_logits, teacher_logits, temperature=1.0, mask=None, beta=0.5
) -> torch.Tensor:
    """[beta · KL(p || m) + (1 - beta) · KL(q || m)] · T², with m = beta · p + (1 - beta) · q.

    The generalised divergence of GKD (Agarwal et al. 2024, equation 1). It tends to 0 as
    `beta` tends to 0 or 1, so `beta` must lie strictly between. Divided by beta it tends to
    the forward KL as beta tends to 0; divided by 1 - beta, to the reverse KL as beta tends
    to 1. The other arguments are those of `forward_kl`.
    """
    divergence = DIVERGENCES["jensen_shannon"].with_parameters(beta=beta)
    return divergence(student_logits, teacher_logits, temperature, mask)


def skewed_forward_kl(
    student_logits, teacher_logits, temperature=1.0, mask=None, skew=0.1
) -> torch.Tensor:
    """KL(p || skew · p + (1 - skew) · q) · T², as in DistiLLM (Ko et al. 2024, section 3.1).

    A token that only the teacher gives probability costs at most -log(skew), where the
    forward KL has no bound. 0 <= skew < 1; at 0 it is the forward KL itself,
    infinities included. The other arguments are those of `forward_kl`.
    """
    divergence = DIVERGENCES["skewed_forward_kl"].with_parameters(skew=skew)
    return divergence(student_logits, teacher_logits, temperature, mask)


def skewed_reverse_kl(
    student_logits, teacher_logits, temperature=1.0, mask=None, skew=0.1
) -> torch.Tensor:
    """KL(q || (1 - skew) · p + skew · q) · T², as in DistiLLM (Ko et al. 2024, section 3.1).

    A token that only the student gives probability costs at most -log(skew), where the
    reverse KL has no bound. 0 <= skew < 1; at 0 it is the reverse KL itself,
    infinities included. The other arguments are those of `forward_kl`.
    """
    divergence = DIVERGENCES["skewed_reverse_kl"].with_parameters(skew=skew)
    return divergence(student_logits, teacher_logits, temperature, mask)


def total_variation(student_logits, teacher_logits, temperature=1.0, mask=None) -> torch.Tensor:
    """Half the sum of |p - q|, times T: the share of probability mass that would have to move.

    T and not T², since this distance is of first order in the difference of the logits:
    its gradient shrinks as 1/T, that of a KL as 1/T². Used for distillation by Wen et al.
    2023 (f-divergence minimisation, section 3). The arguments are those of `forward_kl`.
    """
    return DIVERGENCES["total_variation"](student_logits, teacher_logits, temperature, mask)


@dataclass(frozen=True)
class Divergence:
    """A divergence of the student's distribution q from the teacher's, p.

    Attributes:
        formula: a function of (log q, log p), shapes (..., vocabulary), and the parameters.
            It returns the value of each token, shape (...), and a function that returns the
            gradient of the value with respect to the softened logits z_s / T, in closed
            form, shape (..., vocabulary).
        power: exponent of T. The loss is T^power · value.
        parameters: further keyword arguments of `formula`.
    """

    formula: Callable[..., tuple[torch.Tensor, Callable[[], torch.Tensor]]]
    power: int = 2
    parameters: Mapping[str, float] = field(default_factory=dict)

    def with_parameters(self, **given) -> "Divergence":
        """The same divergence with these parameters; it ignores those it does not have."""
        own = {name: given.get(name, value) for name, value in self.parameters.items()}
        return replace(self, parameters=own)

    def __call__(self, student_logits, teacher_logits, temperature, mask=None) -> torch.Tensor:
        """The full-logits loss: T^power · value, averaged over the tokens that count."""
        log_q, log_p = log_softened(student_logits, teacher_logits, temperature, mask)
        per_token, _ = self.formula(log_q, log_p, **self.parameters)
        return temperature**self.power * masked_mean(per_token, mask)


def forward_kl_formula(log_q, log_p):
    """KL(p || q), and its gradient q - p."""
    p = log_p.exp()
    return (p * log_ratio(log_p, log_q, p)).sum(dim=-1), lambda: log_q.exp().sub_(p)


def reverse_kl_formula(log_q, log_p):
    """KL(q || p), and its gradient q · (log(q/p) - KL(q || p))."""
    q = log_q.exp()
    slope = log_ratio(log_q, log_p, q)
    value = (q * slope).sum(dim=-1)
    return value, lambda: (slope - value[..., None]).mul_(q)


def jensen_shannon_formula(log_q, log_p, beta):
    """The mix of two KLs to m; its gradient is (1 - beta) · q · (log(q/m) - KL(q || m))."""
    require(0 < beta < 1, f"beta is {beta}; it must lie between 0 and 1, both excluded")
    p, q = log_p.exp(), log_q.exp()
    log_m = log_mixture(p, q, beta)
    slope = log_ratio(log_q, log_m, q)
    from_p, from_q = (p * log_ratio(log_p, log_m, p)).sum(dim=-1), (q * slope).sum(dim=-1)
    value = beta * from_p + (1 - beta) * from_q
    return value, lambda: (slope - from_q[..., None]).mul_(q).mul_(1 - beta)


def skewed_forward_kl_formula(log_q, log_p, skew):
    """KL(p || m); its gradient is q · sum(w) - w, with w = (1 - skew) · p · q/m."""
    check_skew(skew)
    if skew == 0:
        return forward_kl_formula(log_q, log_p)
    p, q = log_p.exp(), log_q.exp()
    log_m = log_mixture(p, q, skew)

    def gradient():
        weight = (log_q - log_m).exp_().mul_(p).mul_(1 - skew)
        return (q * weight.sum(dim=-1, keepdim=True)).sub_(weight)

    return (p * log_ratio(log_p, log_m, p)).sum(dim=-1), gradient


def skewed_reverse_kl_formula(log_q, log_p, skew):
    """KL(q || m); its gradient is q · (g - sum(q · g)), with g = log(q/m) - skew · q/m."""
    check_skew(skew)
    if skew == 0:
        return reverse_kl_formula(log_q, log_p)
    p, q = log_p.exp(), log_q.exp()
    log_ratios = log_ratio(log_q, log_mixture(p, q, 1 - skew), q)

    def gradient():
        slope = log_ratios - skew * log_ratios.exp()
        return (slope - (q * slope).sum(dim=-1, keepdim=True)).mul_(q)

    return (q * log_ratios).sum(dim=-1), gradient


def check_skew(skew: float) -> None:
    """Require a share below 1, at which nothing of the other distribution is left."""
    require(0 <= skew < 1, f"skew is {skew}; it must be at least 0 (a plain KL) and below 1")


def log_mixture(p: torch.Tensor, q: torch.Tensor, weight: float) -> torch.Tensor:
    """log(weight · p + (1 - weight) · q)."""
    smallest = torch.finfo(q.dtype).tiny  # not 0: autograd would divide 0 by 0
    return (weight * p + (1 - weight) * q).clamp_min(smallest).log()


def total_variation_formula(log_q, log_p):
    """Half the sum of |q - p|; its gradient is q · (g - sum(q · g)), g half the sign of q - p."""
    q = log_q.exp()
    gap = q - log_p.exp()

    def gradient():
        slope = gap.sign() / 2
        return (slope - (q * slope).sum(dim=-1, keepdim=True)).mul_(q)

    return gap.abs().sum(dim=-1) / 2, gradient


def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) of each token, in nats, shape (...), from log-probabilities."""
    p = log_p.exp()
    return (p * log_ratio(log_p, log_q, p)).sum(dim=-1)


def log_ratio(log_p: torch.Tensor, log_q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """log(p/q); 0 if p is 0, so that p log(p/q) is 0 and not NaN."""
    return (log_p - log_q).masked_fill_(p == 0, 0)


DIVERGENCES: dict[str, Divergence] = {
    "forward_kl": Divergence(forward_kl_formula),
    "reverse_kl": Divergence(reverse_kl_formula),
    "jensen_shannon": Divergence(jensen_shannon_formula, parameters={"beta": 0.5}),
    "skewed_forward_kl": Divergence(skewed_forward_kl_formula, parameters={"skew": 0.1}),
    "skewed_reverse_kl": Divergence(skewed_reverse_kl_formula, parameters={"skew": 0.1}),
    "total_variation": Divergence(total_variation_formula, power=1),
}


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
    most 2. It has no unit. The arithmetic is in float32 at least.

    Args:
        student_hidden, teacher_hidden: shape (..., width), of one width. Only the student's
            take gradients.
        mask: True for each token that counts, shape (...); None counts all.

    Returns:
        the mean over the tokens that count: one number, 0 if none counts.

    Raises:
        InputError: the shapes do not fit together.
    """
    check_equal_shapes(student_hidden, teacher_hidden, "hidden states")
    student, teacher = (
        zero_masked(at_least_float32(h), mask) for h in (student_hidden, teacher_hidden.detach())
    )
    return masked_mean(1 - F.cosine_similarity(student, teacher, dim=-1), mask)


def mix(hard_loss, soft_loss, alpha: float):
    """alpha · hard + (1 - alpha) · soft: `alpha` weighs the hard labels.

    As in Hinton et al. 2015 the two weights add up to 1. Some libraries, torchtune among
    them, weigh the soft labels instead: their `kd_ratio` is 1 - alpha.
    """
    check_alpha(alpha)
    return alpha * hard_loss + (1 - alpha) * soft_loss


def check_alpha(alpha: float) -> None:
    """Require a weight from 0 to 1."""
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
