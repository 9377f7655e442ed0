"""Checks for notebook S1: what counts, a skewed KL, a reward that trains."""

from collections.abc import Callable

import torch

from willows_kd.exercises import judge, random_logits, wrong_means
from willows_kd.losses import forward_kl, reverse_kl, skewed_forward_kl, skewed_reverse_kl


def check_mask(my_mask: Callable) -> bool:
    """Check `my_mask(length, prompt)`: which predictions are of tokens that were written."""

    def counted(length: int, first: int, last: int | None = None) -> torch.Tensor:
        mask = torch.zeros(length - 1)
        mask[first:last] = 1
        return mask

    mistakes = {
        lambda n, _: counted(n, n): "nothing counts; the predictions of written tokens do",
        lambda n, _: counted(n, 0): "the openings count too; they were given, not written",
        lambda n, prompt: counted(n, prompt - 1, prompt): "the tokens after the first "
        "written one were written too",
        counted: "the first written token is left out: position prompt - 1 predicts it",
        lambda n, prompt: counted(n + 1, prompt): "The first token is not predicted: drop it",
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
        lambda z_s, z_t, _: forward_kl(z_s, z_t): "this is the forward KL, without any skew",
        lambda z_s, z_t, skew: right(
            z_s, z_t, 1 - skew
        ): "the shares are swapped: skew is the share of p",
        lambda z_s, z_t, skew: forward_kl(skew * z_t + (1 - skew) * z_s, z_t): "you mix the "
        "logits; the mix is one of probabilities",
        lambda z_s, z_t, skew: skewed_reverse_kl(z_s, z_t, skew=skew): "this is the skewed "
        "reverse KL: the student's distribution comes first",
        **wrong_means(right, 20, 7),
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
        lambda: 0 * reverse: "the gradient is 0 on average. The mean of log q - log p is a good "
        "value, and teaches nothing: detach it, and multiply it with log q",
        lambda: forward: "this is the forward KL's gradient, as of k3: not the reverse KL's",
        lambda: -reverse: "the sign is wrong: a step down this gradient goes away from the teacher",
        lambda: len(drawn) * reverse: "it grows with the number of tokens: take the mean",
    }
    praise = "the policy gradient: on average the reverse KL's, from drawn tokens alone"
    return judge(gradient, [()], lambda: reverse, mistakes, praise)
