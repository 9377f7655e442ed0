"""The same losses without the logits: chunk by chunk, from hidden states to gradients.

A loss of a language model usually holds several tensors of shape (tokens, vocabulary):
logits of student and teacher, their log-softmax, and the gradients of all of these.
Here no such tensor exists. Tokens are taken a chunk at a time; a chunk's logits become
their own gradient, in place and in closed form, and that goes at once into the
gradients of the hidden states and of the head. The values are those of `losses.py`.

With q for the student and g for the derivative of a divergence D with respect to q,
the gradient with respect to the student's softened logits is q · (g - sum(q · g)); for
forward KL this is q - p. (Computing gradients in the forward pass, chunk by chunk, is
the idea of Liger Kernel's fused linear losses, Hsu et al. 2024.)
"""

import math

import torch
import torch.nn.functional as F

from willows_kd.errors import is_integer, require
from willows_kd.losses import DIVERGENCES, at_least_float32, check_alpha, check_labels
from willows_kd.soft_labels import check_temperature

CHUNK = 2**23 + 2**21  # logits of a chunk: 40 MiB in float32, 208 tokens of GPT-2's vocabulary
ROWS = 2**20  # logits that are worked on at a time: 4 MiB, so that they stay in a CPU's cache


def chunked_loss(
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """alpha · hard + (1 - alpha) · soft, as `losses.mix` of the losses of the logits.

    Logits are hidden @ head.T. The arithmetic is in float32 at least.

    Args:
        student_hidden, teacher_hidden: final hidden states, shapes (..., width); the
            widths may differ. No teacher is needed where `alpha` is 1.
        student_head, teacher_head: output weights, shapes (vocabulary, width).
        labels: the tokens to be predicted, shape (...).
        temperature, alpha, divergence: as in `DistillConfig`.
        mask: True where a token counts, shape (...).
        chunk: tokens at a time; by the size of the vocabulary where None.

    Returns:
        the loss, with gradients for student_hidden and student_head; and, without
        gradients, its soft-label and hard-label parts, 0 for one that has no weight.
    """
    check_temperature(temperature)
    check_alpha(alpha)
    check_labels(labels, student_hidden.shape[:-1])
    known = ", ".join(DIVERGENCES)
    require(divergence in DIVERGENCES, f"divergence is {divergence!r}; it must be one of {known}")
    require(chunk is None or is_integer(chunk), f"chunk is {chunk!r}; it must be at least 1 token")
    if alpha < 1:
        check_teacher(student_hidden, student_head, teacher_hidden, teacher_head)
    counted = ... if mask is None else mask.bool()
    student_hidden, labels = student_hidden[counted], labels[counted]
    if alpha < 1:
        teacher_hidden, teacher_head = teacher_hidden[counted].detach(), teacher_head.detach()
        teacher_hidden = teacher_hidden.flatten(0, -2)
    settings = temperature, alpha, divergence, chunk or max(1, CHUNK // len(student_head))
    teacher = (teacher_hidden, teacher_head) if alpha < 1 else (None, None)
    return ChunkedLoss.apply(
        student_hidden.flatten(0, -2), student_head, *teacher, labels.flatten(), settings
    )


def check_teacher(student_hidden, student_head, teacher_hidden, teacher_head) -> None:
    """Refuse a teacher that is missing, or says nothing about these tokens."""
    given = teacher_hidden is not None and teacher_head is not None
    require(given, "with alpha below 1 the teacher's hidden states and output weights are needed")
    require(
        teacher_hidden.shape[:-1] == student_hidden.shape[:-1]
        and len(teacher_head) == len(student_head),
        f"the student has {tuple(student_hidden.shape[:-1])} tokens and {len(student_head)} logits "
        f"each, the teacher {tuple(teacher_hidden.shape[:-1])} and {len(teacher_head)}; "
        "they must be equal",
    )


class ChunkedLoss(torch.autograd.Function):
    """Loss and gradients in one walk over the tokens; backward only hands them out."""

    @staticmethod
    def forward(ctx, hidden, head, teacher_hidden, teacher_head, labels, settings):
        """The loss of tokens of shape (tokens,), and the gradients, kept for `backward`."""
        *objective, chunk = settings
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
                sums += into_gradient(logits, teacher_logits, labels[part], objective)
                gradient = logits.div_(len(labels)).to(hidden.dtype)
                del logits, teacher_logits  # before the next ones are made
                add_product(grad_hidden[part], gradient, head)
                add_product(grad_head, gradient.T, hidden[part])
                del gradient
        ctx.gradients = grad_hidden.to(kinds[0]), grad_head.to(kinds[1])
        soft, hard = sums / max(1, len(labels))
        alpha = objective[1]
        ctx.mark_non_differentiable(soft, hard)
        return alpha * hard + (1 - alpha) * soft, soft, hard

    @staticmethod
    def backward(ctx, grad_loss, _soft, _hard):
        """The gradients that `forward` left, times the loss's own; they serve once."""
        grad_hidden, grad_head = ctx.gradients
        del ctx.gradients
        return grad_hidden.mul_(grad_loss), grad_head.mul_(grad_loss), None, None, None, None


def equal_parts(tokens: int, most: int) -> list[slice]:
    """As few parts as may be, of nearly the same size, each of `most` tokens at most."""
    count = -(-tokens // most)
    ends = [round(tokens * (i + 1) / count) for i in range(count)]
    return [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b. In half precision each product is rounded, but not their sum."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def into_gradient(logits, teacher_logits, labels, objective) -> torch.Tensor:
    """Overwrite the student's logits, shape (tokens, vocabulary), with the loss's gradient.

    Returns:
        the sums over the tokens of the soft-label and the hard-label loss, shape (2,).
    """
    temperature, alpha, divergence = objective
    sums = logits.new_zeros(2)
    rows = max(1, ROWS // logits.shape[1]) if logits.device.type == "cpu" else len(logits)
    for begin in range(0, len(logits), rows):
        z = logits[begin : begin + rows]
        y = labels[begin : begin + rows, None]
        gradient = torch.zeros_like(z) if alpha else 0
        if alpha:
            log_q = F.log_softmax(z, dim=-1)
            sums[1] -= log_q.gather(1, y).sum()
            gradient = log_q.exp_().scatter_add_(1, y, -torch.ones_like(y, dtype=z.dtype))
            gradient *= alpha
        if alpha < 1:
            log_q = F.log_softmax(z / temperature, dim=-1)
            log_p = F.log_softmax(teacher_logits[begin : begin + rows] / temperature, dim=-1)
            value, slope = GRADIENTS[divergence](log_q, log_p)
            order = temperature if divergence == "total_variation" else temperature**2
            sums[0] += order * value
            gradient = slope.mul_(order / temperature * (1 - alpha)).add_(gradient)
        z.copy_(gradient)
    return sums


def forward_kl(log_q: torch.Tensor, log_p: torch.Tensor):
    """Sum of KL(p || q) over the tokens, and its gradient: q - p."""
    p = log_p.exp()
    value = torch.sum(p * log_p.sub_(log_q))
    return value, log_q.exp_().sub_(p)


def reverse_kl(log_q: torch.Tensor, log_p: torch.Tensor):
    """Sum of KL(q || p), and its gradient: g = log(q/p) + 1."""
    return through_softmax(log_q.exp(), log_q.sub_(log_p), weight=1.0)


def jensen_shannon(log_q: torch.Tensor, log_p: torch.Tensor, beta: float = 0.5):
    """Sum of the divergence with m = beta·p + (1 - beta)·q, and its gradient: g = log(q/m)."""
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    from_p = beta * torch.sum(log_p.exp() * log_p.sub_(log_m))
    value, gradient = through_softmax(log_q.exp(), log_q.sub_(log_m), weight=1 - beta)
    return from_p + value, gradient


def total_variation(log_q: torch.Tensor, log_p: torch.Tensor):
    """Sum of half of sum |p - q|, and its gradient: g is half the sign of q - p."""
    q = log_q.exp_()
    gap = q - log_p.exp_()
    value = gap.abs().sum() / 2
    return value, through_softmax(q, gap.sign_(), weight=0.5)[1]


def through_softmax(q: torch.Tensor, g: torch.Tensor, weight: float):
    """weight · sum(q · g), over all tokens, and weight · q · (g - sum(q · g)), by token."""
    mean = (q * g).sum(dim=-1, keepdim=True)
    return weight * mean.sum(), g.sub_(mean).mul_(q).mul_(weight)


GRADIENTS = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "total_variation": total_variation,
}
