"""The losses without all the logits: from hidden states to gradients, chunk by chunk.

A full-logits loss holds several tensors of shape (tokens, vocabulary). Here no such tensor
exists. Tokens are taken a chunk at a time; a divergence's closed form turns a chunk's logits into
their own gradient, and this is added at once to the gradients of the hidden states and of the
head. (Computing gradients in the forward pass, chunk by chunk, is the idea of Liger Kernel's fused
linear losses, Hsu et al. 2024.)
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from willows_kd.config import DistillConfig
from willows_kd.errors import require
from willows_kd.losses import at_least_float32, check_labels, log_mixture, log_ratio

CHUNK = 2**23 + 2**21  # logits of a chunk: 40 MiB in float32, 208 tokens of GPT-2's vocabulary
ROWS = 2**19  # logits in one step of the arithmetic: 2 MiB, to stay in a CPU's cache


def chunked_distillation_loss(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teacher_hidden: torch.Tensor | None,
    teacher_head: torch.Tensor | None,
    labels: torch.Tensor,
    temperature: float = 1.0,
    alpha: float = 0.0,
    divergence: str = "forward_kl",
    mask: torch.Tensor | None = None,
    chunk: int | None = None,
    *,
    beta: float = 0.5,
    skew: float = 0.1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """alpha · hard + (1 - alpha) · soft: `losses.mix` of the full-logits losses.

    Logits are hidden @ head.T. The arithmetic on them is in float32 at least.

    Args:
        student_hidden, teacher_hidden: final hidden states, shapes (..., width); the
            widths may differ. If `alpha` is 1, no teacher is needed: pass None.
        student_head, teacher_head: output weights, shapes (vocabulary, width).
        labels: ids of the tokens to predict, shape (...).
        temperature, alpha, divergence, beta, skew: as in `DistillConfig`.
        mask: True for each token that counts, shape (...).
        chunk: tokens at a time; None sets it by the size of the vocabulary.

    Returns:
        three numbers, in nats per token: the loss, which has gradients for student_hidden
        and student_head, and its soft-label and hard-label parts, which have none. A part
        without weight is 0.

    Raises:
        InputError: a value is out of its range, or the shapes do not fit together.
        RuntimeError: a second backward pass. Gradients are handed out once, to save memory.
    """
    config = DistillConfig(temperature, alpha, divergence, beta, skew)  # which checks them
    check_labels(labels, student_hidden.shape[:-1])
    counted = ... if mask is None else mask.bool()
    if alpha < 1:
        sizes = [
            f"{tuple(hidden.shape[:-1])} tokens and {len(head)} logits each"
            for hidden, head in ((student_hidden, student_head), (teacher_hidden, teacher_head))
        ]
        differ = f"the student has {sizes[0]}, the teacher {sizes[1]}; they must be equal"
        require(sizes[0] == sizes[1], differ)
        teacher_hidden = teacher_hidden[counted].flatten(0, -2)
    else:
        teacher_hidden = teacher_head = None
    student_hidden, labels = student_hidden[counted].flatten(0, -2), labels[counted].flatten()
    chunk = chunk or max(1, CHUNK // len(student_head))
    return LossWithGradients.apply(
        student_hidden, student_head, teacher_hidden, teacher_head, labels, config, chunk
    )


class LossWithGradients(torch.autograd.Function):
    """Loss and gradients in one pass over the tokens; backward only hands them out."""

    @staticmethod
    def forward(ctx, hidden, head, teacher_hidden, teacher_head, labels, config, chunk):
        """The loss of tokens of shape (tokens,), and the gradients, kept for `backward`."""
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        kinds = hidden.dtype, head.dtype
        hidden, head, teacher_hidden, teacher_head = (
            x if x is None or dtype is None else x.to(dtype)
            for x in (hidden, head, teacher_hidden, teacher_head)
        )
        wide = torch.promote_types(hidden.dtype, torch.float32)
        grad_hidden = torch.zeros_like(hidden, dtype=wide)
        grad_head = torch.zeros_like(head, dtype=wide)
        sums = hidden.new_zeros(2, dtype=wide)
        with torch.autocast(device, enabled=False):
            for part in equal_parts(len(labels), chunk):
                logits = at_least_float32(hidden[part] @ head.T)
                teacher_logits = None
                if teacher_hidden is not None:
                    teacher_logits = at_least_float32(teacher_hidden[part] @ teacher_head.T)
                sums += into_gradient(logits, teacher_logits, labels[part], config, len(labels))
                gradient = logits.to(hidden.dtype)
                del logits, teacher_logits  # before the next ones are made
                add_product(grad_hidden[part], gradient, head)
                add_product(grad_head, gradient.T, hidden[part])
                del gradient
        ctx.gradients = grad_hidden.to(kinds[0]), grad_head.to(kinds[1])
        soft, hard = sums / max(1, len(labels))
        ctx.mark_non_differentiable(soft, hard)
        return config.alpha * hard + (1 - config.alpha) * soft, soft, hard

    @staticmethod
    def backward(ctx, grad_loss, _soft, _hard):
        """The gradients that `forward` kept, times that of the loss, in place."""
        if ctx.gradients is None:
            once = "the chunked loss hands out its gradients once, to save memory"
            raise RuntimeError(f"a second backward pass: {once}; compute the loss again")
        grad_hidden, grad_head = ctx.gradients
        ctx.gradients = None
        return grad_hidden.mul_(grad_loss), grad_head.mul_(grad_loss), *5 * [None]


def equal_parts(tokens: int, most: int) -> list[slice]:
    """The fewest parts of at most `most` tokens each, of nearly equal size."""
    count = -(-tokens // most)
    ends = [round(tokens * (i + 1) / count) for i in range(count)]
    return [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b. In half precision only each product is rounded, not their sum."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def into_gradient(logits, teacher_logits, labels, config, total: int) -> torch.Tensor:
    """Overwrite the student's logits, shape (tokens, vocabulary), with the loss's gradient.

    The loss is the mean over `total` tokens, of which these are some.

    Returns:
        the sums over the tokens of the soft-label and the hard-label loss, shape (2,).
    """
    temperature, alpha = config.temperature, config.alpha
    power = 1 if config.divergence == "total_variation" else 2  # of T, as in `losses`
    sums = logits.new_zeros(2)
    rows = max(1, ROWS // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    for begin in range(0, len(logits), rows):
        z = logits[begin : begin + rows]
        hard_gradient = 0
        if alpha > 0:
            log_q = F.log_softmax(z, dim=-1)
            y = labels[begin : begin + rows, None]
            sums[1] -= log_q.gather(1, y).sum()
            hard_gradient = log_q.exp_().scatter_add_(1, y, -torch.ones_like(y, dtype=z.dtype))
            hard_gradient *= alpha / total
        if alpha < 1:
            log_q = F.log_softmax(z / temperature, dim=-1)
            log_p = F.log_softmax(teacher_logits[begin : begin + rows] / temperature, dim=-1)
            closed_form = CLOSED_FORMS[config.divergence]
            value, gradient = closed_form(log_q, log_p, beta=config.beta, skew=config.skew)
            sums[0] += temperature**power * value.sum()
            weight = (1 - alpha) * temperature ** (power - 1) / total
            torch.mul(gradient, weight, out=z)
            z += hard_gradient
        else:
            z.copy_(hard_gradient)
    return sums


# -- closed forms ----------------------------------------------------------------------
# Each takes log q of the student and log p of the teacher, shapes (..., vocabulary), and returns
# the divergence of each token, shape (...), and its gradient with respect to the softened logits
# z_s / T, shape (..., vocabulary).


def mean_and_gradient(g, q):
    """The mean of g under q, and q · (g - mean): the gradient of logits, from that of q."""
    mean = (q * g).sum(dim=-1)
    return mean, (g - mean[..., None]).mul_(q)


def forward_kl(log_q, log_p, **_):
    """KL(p || q), and its gradient q - p."""
    p = log_p.exp()
    return (p * log_ratio(log_p, log_q, p)).sum(dim=-1), log_q.exp().sub_(p)


def reverse_kl(log_q, log_p, **_):
    """KL(q || p), and its gradient q · (log(q/p) - KL(q || p))."""
    q = log_q.exp()
    return mean_and_gradient(log_ratio(log_q, log_p, q), q)


def jensen_shannon(log_q, log_p, beta, **_):
    """The mix of two KLs to m; its gradient is (1 - beta) · q · (log(q/m) - KL(q || m))."""
    p, q = log_p.exp(), log_q.exp()
    log_m = log_mixture(log_p, log_q, beta)
    from_p = (p * log_ratio(log_p, log_m, p)).sum(dim=-1)
    from_q, gradient = mean_and_gradient(log_ratio(log_q, log_m, q), q)
    return beta * from_p + (1 - beta) * from_q, gradient.mul_(1 - beta)


def skewed_forward_kl(log_q, log_p, skew, **_):
    """KL(p || m); its gradient is q · sum(w) - w, with w = (1 - skew) · p · q/m."""
    p, q = log_p.exp(), log_q.exp()
    log_m = log_mixture(log_p, log_q, skew)
    value = (p * log_ratio(log_p, log_m, p)).sum(dim=-1)
    weight = (log_q - log_m).exp_().mul_(p).mul_(1 - skew)
    return value, (q * weight.sum(dim=-1, keepdim=True)).sub_(weight)


def skewed_reverse_kl(log_q, log_p, skew, **_):
    """KL(q || m); its gradient is q · (g - sum(q · g)), with g = log(q/m) - skew · q/m."""
    q = log_q.exp()
    slope = log_ratio(log_q, log_mixture(log_q, log_p, skew), q)
    return (q * slope).sum(dim=-1), mean_and_gradient(slope - skew * slope.exp(), q)[1]


def total_variation(log_q, log_p, **_):
    """Half the sum of |q - p|; its gradient is q · (g - sum(q · g)), g half the sign of q - p."""
    q = log_q.exp()
    gap = q - log_p.exp()
    return gap.abs().sum(dim=-1) / 2, mean_and_gradient(gap.sign() / 2, q)[1]


CLOSED_FORMS: dict[str, Callable] = {
    form.__name__: form
    for form in (
        *(forward_kl, reverse_kl, jensen_shannon),
        *(skewed_forward_kl, skewed_reverse_kl, total_variation),
    )
}
