"""Checks for notebook 07: who follows a draft, and what a draft brings."""

from collections.abc import Callable

import torch

from willows_kd.exercises import attempt, judge, not_yet, well_done
from willows_kd.speculative import expected_tokens


def check_emitted(my_emitted: Callable) -> bool:
    """Check `my_emitted(p, q, token, u)`: how likely each token is to be emitted.

    `u` is the number from 0 to 1 that decides on the drafted token: certain if it is
    accepted, else the residual distribution. Shapes (vocabulary,).
    """
    p, q = torch.tensor([[0.4, 0.1, 0.2, 0.2, 0.1], [0.2, 0.3, 0.1, 0.2, 0.2]]).double()
    raised = (p - q).clamp(min=0)
    wrong_ways = {
        "if the token is rejected, the next is drawn from max(0, p - q) and not from p: what the "
        "draft has brought already must not be brought again": p,
        "max(0, p - q) does not sum to 1 yet: divide it by its sum": raised,
        "max(0, q - p) is what the draft has too much of; the residual is max(0, p - q)": (
            (q - p).clamp(min=0) / (q - p).clamp(min=0).sum()
        ),
        "a rejected token is replaced by another one": torch.eye(5)[1].double(),
        "take absolute values nowhere: where q is larger, nothing is missing": (
            (p - q).abs() / (p - q).abs().sum()
        ),
    }
    cases = {  # token and u, and whether the token is accepted
        (0, 0.99): True,  # p > q: always
        (1, 0.2): True,  # p/q is 1/3
        (1, 0.7): False,
        (3, 0.9): True,  # p = q
    }
    for (token, u), accepted in cases.items():
        found, problem = attempt(my_emitted, p, q, token, u)
        if problem:
            return not_yet(problem)
        try:
            found = torch.as_tensor(found, dtype=torch.float64).detach()
        except (TypeError, ValueError, RuntimeError):
            return not_yet(f"your function returns {type(found).__name__}; it is a distribution")
        if found.shape != p.shape:
            return not_yet(f"your result has shape {tuple(found.shape)}; it should be (5,)")
        right = torch.eye(5)[token].double() if accepted else raised / raised.sum()
        if torch.allclose(found, right):
            continue
        case = f"p = {p[token]:.1f}, q = {q[token]:.1f}, u = {u}"
        if accepted:
            return not_yet(
                f"with {case} the token is accepted: u is below min(1, p/q), so that this token "
                "is certain, with probability 1"
            )
        for hint, wrong in wrong_ways.items():
            if torch.allclose(found, wrong):
                return not_yet(hint)
        return not_yet(f"with {case} you return {found.tolist()}; it should be {right.tolist()}")
    return well_done("whatever the draft was, the text is the teacher's")


def check_tokens(my_tokens: Callable) -> bool:
    """Check `my_tokens(a, k)`: expected tokens for each pass of the teacher."""
    cases = [(0.5, 1), (0.8, 4), (0.3, 6)]
    mistakes = {
        "one token of the teacher's comes with every pass, after the accepted ones": (
            lambda a, k: expected_tokens(a, k) - 1
        ),
        "the end is one term too early: the sum goes up to a to the power of k": (
            lambda a, k: expected_tokens(a, k - 1)
        ),
        "a token counts only if all before it were accepted: its share is a to the power of its "
        "place": lambda a, k: k * a + 1,
        "you leave the teacher's own token out, and count what no longer counts": (
            lambda a, k: k * a
        ),
        "this is endless drafting; k tokens are drafted, then it ends": lambda a, k: 1 / (1 - a),
        "this is the chance that all are accepted": lambda a, k: a**k,
    }
    praise = "the later a drafted token, the less it brings"
    return judge(my_tokens, cases, expected_tokens, mistakes.items(), praise)
