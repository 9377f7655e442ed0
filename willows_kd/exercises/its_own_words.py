"""Checks for notebook 05: what counts, a skewed KL, a reward that trains."""

from collections.abc import Callable

import torch

from willows_kd.exercises import attempt, judge, not_yet, random_logits, well_done
from willows_kd.losses import forward_kl, reverse_kl, skewed_forward_kl, skewed_reverse_kl


def check_mask(my_mask: Callable) -> bool:
    """Check `my_mask(length, prompt)`: which predictions are of tokens that were written."""
    for length, prompt in ((12, 4), (9, 1)):
        mask, problem = attempt(my_mask, length, prompt)
        if problem:
            return not_yet(problem)
        try:
            mask = torch.as_tensor(mask).bool().tolist()
        except (TypeError, ValueError, RuntimeError):
            return not_yet(f"your function returns {type(mask).__name__}; it is a mask of booleans")
        if not isinstance(mask, list) or len(mask) != length - 1:
            return not_yet(
                f"of {length} tokens {length - 1} are predicted: the first one is not. Return as "
                "many values"
            )
        first = mask.index(True) if True in mask else length
        if first == length:
            return not_yet("nothing counts; the predictions of written tokens do")
        if all(mask) and prompt > 1:
            return not_yet("the openings count too; they were given, not written")
        if mask[first:] != [True] * (length - 1 - first):
            return not_yet("all that follows the first written token was written too")
        if first == prompt:
            return not_yet(
                "the first written token is left out: position prompt - 1, the last one of the "
                "opening, predicts it"
            )
        if first != prompt - 1:
            return not_yet(
                f"with an opening of {prompt} your first prediction that counts is at {first}; "
                f"it should be at {prompt - 1}"
            )
    return well_done("what the student wrote counts, from its first token on, and nothing else")


def check_skewed_kl(my_skewed_kl: Callable) -> bool:
    """Check `my_skewed_kl(student_logits, teacher_logits, skew)`, a mean over tokens."""
    cases = [
        (random_logits(4, 5, 7, seed=i), random_logits(4, 5, 7, seed=i + 9), skew)
        for i, skew in enumerate((0.1, 0.4))
    ]

    def right(z_s, z_t, skew) -> float:
        return skewed_forward_kl(z_s, z_t, skew=skew).item()

    def of_logits(z_s, z_t, skew) -> float:
        return forward_kl(skew * z_t + (1 - skew) * z_s, z_t).item()

    mistakes = {
        "this is the forward KL, without any skew": lambda z_s, z_t, _: forward_kl(z_s, z_t).item(),
        "the shares are swapped: skew is that of p, the teacher's distribution": (
            lambda z_s, z_t, skew: right(z_s, z_t, 1 - skew)
        ),
        "you mix the logits; the mix is one of probabilities": of_logits,
        "this is the skewed reverse KL: the student's distribution comes first": (
            lambda z_s, z_t, skew: skewed_reverse_kl(z_s, z_t, skew=skew).item()
        ),
        "it grows with the number of tokens: sum over the vocabulary, then take the mean": (
            lambda z_s, z_t, skew: 20 * right(z_s, z_t, skew)
        ),
        "it is divided by the vocabulary too: sum over the vocabulary, then take the mean": (
            lambda z_s, z_t, skew: right(z_s, z_t, skew) / 7
        ),
    }
    praise = "finite even where the student gives a token no probability at all"
    return judge(my_skewed_kl, cases, right, mistakes.items(), praise)


def check_reward_loss(my_reward_loss: Callable) -> bool:
    """Check `my_reward_loss(log_q, log_p)`, both of shape (tokens drawn from the student,).

    The tokens are drawn as often as the student expects them, so that the mean over them is
    the expectation, exactly.
    """
    counts = torch.tensor([1, 2, 3, 4])
    z = (counts.double() / counts.sum()).log().requires_grad_()
    z_p, drawn = random_logits(4, seed=1), torch.arange(4).repeat_interleave(counts)
    log_q, log_p = z.log_softmax(-1)[drawn], z_p.log_softmax(-1)[drawn]
    try:
        loss = my_reward_loss(log_q, log_p)
        (found,) = torch.autograd.grad(loss, z, allow_unused=True)
    except Exception as error:  # whatever a learner's code raises is worth telling
        return not_yet(
            f"no gradient comes out: {type(error).__name__}: {str(error).splitlines()[0]}. The "
            "log-probability that is differentiated must not be detached; return one number"
        )
    forward, reverse = (
        torch.autograd.grad(kl(z[None], z_p[None]), z)[0] for kl in (forward_kl, reverse_kl)
    )

    def is_(gradient) -> bool:
        return torch.allclose(found, gradient, rtol=1e-4, atol=1e-9)

    if found is None or is_(0 * reverse):
        return not_yet(
            "the gradient is 0 on average. The mean of log q - log p is a good value, and teaches "
            "nothing: detach it, and multiply it with log q"
        )
    hints = {
        "this is the forward KL's gradient, as of k3: not the reverse KL's": forward,
        "the sign is wrong: a step down this gradient goes away from the teacher": -reverse,
        "it grows with the number of tokens: take the mean": len(drawn) * reverse,
    }
    for hint, wrong in hints.items():
        if is_(wrong):
            return not_yet(hint)
    if not is_(reverse):
        return not_yet(f"the gradient is {found.tolist()}; it should be {reverse.tolist()}")
    return well_done("the policy gradient: on average the reverse KL's, from drawn tokens alone")
