"""Checks for notebooks S1 and A2: what counts, a skewed KL, a reward that trains."""

from collections.abc import Callable
from functools import partial

import torch

from willows_kd.exercises import judge, random_logits
from willows_kd.exercises.soft_labels import Z_S, Z_T
from willows_kd.losses import forward_kl, reverse_kl, skewed_forward_kl, skewed_reverse_kl


def check_mask(my_mask: Callable) -> bool:
    """Check `my_mask(length, prompt)`: which predictions are of tokens that were written."""

    def right(length: int, prompt: int) -> torch.Tensor:
        return torch.arange(1, length) >= prompt

    mistakes = {
        "the openings count too; they were given, not written": lambda n, _: right(n, 0),
        "position prompt - 1 predicts the first written token": lambda n, p: right(n, p + 1),
        "the first token is not predicted: drop it": lambda n, p: torch.arange(n) >= p,
    }
    praise = "what the student wrote counts, from its first token on, and nothing else"
    return judge(my_mask, right, mistakes, praise, (12, 4), (9, 1))


def check_skewed_kl(my_skewed_kl: Callable) -> bool:
    """Check `my_skewed_kl(student_logits, teacher_logits, skew)`, a mean over tokens."""

    def right(z_s, z_t, skew, kl=skewed_forward_kl) -> torch.Tensor:
        return kl(z_s, z_t, skew=skew)

    mistakes = {
        "the shares are swapped: skew is the share of p": lambda s, t, a: right(s, t, 1 - a),
        "mix the probabilities, not the logits": lambda s, t, a: forward_kl(a * t + (1 - a) * s, t),
        "the teacher's distribution comes first": partial(right, kl=skewed_reverse_kl),
        "it is divided by the vocabulary too: sum over it": lambda *case: right(*case) / 7,
    }
    praise = "finite even where the student gives a token no probability at all"
    return judge(my_skewed_kl, right, mistakes, praise, (Z_S, Z_T, 0.1), (Z_T, Z_S, 0.4))


def check_reward_loss(my_reward_loss: Callable) -> bool:
    """Check `my_reward_loss(log_q, log_p)`, both of shape (tokens drawn from the student,).

    The tokens are drawn as often as the student expects them, so that the mean over them is
    the expectation, exactly.
    """
    counts = torch.tensor([1, 2, 3, 4])
    z = (counts.double() / counts.sum()).log().requires_grad_()
    z_p, drawn = random_logits(4, seed=1), torch.arange(4).repeat_interleave(counts)
    log_q, log_p = z.log_softmax(-1)[drawn], z_p.log_softmax(-1)[drawn]
    forward, reverse = (
        torch.autograd.grad(kl(z[None], z_p[None]), z)[0] for kl in (forward_kl, reverse_kl)
    )

    def gradient() -> torch.Tensor:
        loss = torch.as_tensor(my_reward_loss(log_q, log_p))
        return torch.autograd.grad(loss, z)[0] if loss.requires_grad else torch.zeros(4)

    mistakes = {
        "its gradient is 0 on average: detach log_q - log_p, times log_q": lambda: 0 * reverse,
        "this is the forward KL's gradient, as of k3": lambda: forward,
        "the sign is wrong: a step down leads away from the teacher": lambda: -reverse,
    }
    praise = "the policy gradient: on average the reverse KL's, from drawn tokens alone"
    return judge(gradient, lambda: reverse, mistakes, praise, ())
