"""Checks for notebook S1: what counts, a skewed KL, a reward that trains."""

from collections.abc import Callable

import torch

from willows_kd.exercises import judge, random_logits
from willows_kd.losses import forward_kl, reverse_kl, skewed_forward_kl, skewed_reverse_kl


def check_mask(my_mask: Callable) -> bool:
    """Check `my_mask(length, prompt)`: which predictions are of tokens that were written."""

    def counted(length: int, first: int, last: int | None = None) -> torch.Tensor:
        mask = torch.zeros(length - 1)
        mask[first:last] = 1
        return mask

    mistakes = {
        "nothing counts; the predictions of written tokens do": lambda n, _: counted(n, n),
        "the openings count too; they were given, not written": lambda n, _: counted(n, 0),
        "the tokens after the first written one were written too": (
            lambda n, prompt: counted(n, prompt - 1, prompt)
        ),
        "the first written token is left out: position prompt - 1 predicts it": counted,
        "The first token is not predicted: drop it": lambda n, prompt: counted(n + 1, prompt),
    }
    praise = "what the student wrote counts, from its first token on, and nothing else"
    cases = [(12, 4), (9, 1)]
    return judge(my_mask, cases, lambda n, prompt: counted(n, prompt - 1), mistakes, praise)


def check_skewed_kl(my_skewed_kl: Callable) -> bool:
    """Check `my_skewed_kl(student_logits, teacher_logits, skew)`, a mean over tokens."""
    cases = [
        (random_logits(4, 5, 7, seed=i), random_logits(4, 5, 7, seed=i + 9), skew)
        for i, skew in enumerate((0.1, 0.4))
    ]

    def right(z_s, z_t, skew) -> torch.Tensor:
        return skewed_forward_kl(z_s, z_t, skew=skew)

    mistakes = {
        "this is the forward KL, without any skew": lambda s, t, _: forward_kl(s, t),
        "the shares are swapped: skew is the share of p": lambda s, t, a: right(s, t, 1 - a),
        "you mix the logits; the mix is one of probabilities": (
            lambda s, t, a: forward_kl(a * t + (1 - a) * s, t)
        ),
        "this is the skewed reverse KL: the student's distribution comes first": (
            lambda s, t, a: skewed_reverse_kl(s, t, skew=a)
        ),
        "it grows with the number of tokens: take the mean": lambda *case: 20 * right(*case),
        "it is divided by the vocabulary too: sum over it": lambda *case: right(*case) / 7,
    }
    praise = "finite even where the student gives a token no probability at all"
    return judge(my_skewed_kl, cases, right, mistakes, praise)


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
        loss = my_reward_loss(log_q, log_p)
        try:
            (found,) = torch.autograd.grad(loss, z, allow_unused=True, retain_graph=True)
        except Exception as error:
            raise ValueError(
                f"no gradient comes out, {str(error).splitlines()[0]}. The log-probability that "
                "is differentiated must not be detached; return one number"
            ) from error
        return torch.zeros(4) if found is None else found

    mistakes = {
        "the gradient is 0 on average. The mean of log q - log p is a good value, and teaches "
        "nothing: detach it, and multiply it with log q": lambda: 0 * reverse,
        "this is the forward KL's gradient, as of k3: not the reverse KL's": lambda: forward,
        "the sign is wrong: a step down this gradient goes away from the teacher": lambda: -reverse,
        "it grows with the number of tokens: take the mean": lambda: len(drawn) * reverse,
    }
    praise = "the policy gradient: on average the reverse KL's, from drawn tokens alone"
    return judge(gradient, [()], lambda: reverse, mistakes, praise)
