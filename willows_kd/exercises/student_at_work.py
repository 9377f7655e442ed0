"""Checks for notebook 07: rounding to few bits, who follows a draft, what a draft brings."""

from collections.abc import Callable

import torch

from willows_kd.compress.speculative import expected_tokens
from willows_kd.exercises import attempt, judge, not_yet, random_logits, well_done


def rounded(weight, most: int, amax=lambda w: w.abs().amax(1, keepdim=True), near=torch.round):
    """A matrix as integers up to `most` times a scale, and those integers."""
    scale = amax(weight) / most
    integers = near(weight / scale)
    return integers * scale, integers


def check_rounding(my_rounding: Callable) -> bool:
    """Check `my_rounding(weight, bits)`: a matrix, (outputs, inputs), as few bits hold it."""
    for bits, shape in ((4, (6, 9)), (3, (4, 5))):
        weight = random_logits(*shape, seed=bits)
        weight *= torch.arange(1, shape[0] + 1)[:, None]  # channels of different size
        found, problem = attempt(my_rounding, weight, bits)
        if problem:
            return not_yet(problem)
        if not torch.is_tensor(found) or found.shape != weight.shape:
            what = tuple(found.shape) if torch.is_tensor(found) else type(found).__name__
            return not_yet(f"you return {what}; it is a matrix of shape {shape}")
        most = 2 ** (bits - 1) - 1
        mistakes = {
            "nothing is rounded yet": weight,
            "these are the integers; multiply them by their scale": rounded(weight, most)[1],
            "there is one scale for the whole matrix; each output channel has its own": (
                rounded(weight, most, lambda w: w.abs().max())[0]
            ),
            "there is a scale for each column; output channels are the rows here": (
                rounded(weight, most, lambda w: w.abs().amax(0, keepdim=True))[0]
            ),
            "the scale is that of the largest weight: of the largest *size*, take .abs() first": (
                rounded(weight, most, lambda w: w.amax(1, keepdim=True))[0]
            ),
            "you cut off what is behind the point; take the nearest integer": (
                rounded(weight, most, near=torch.trunc)[0]
            ),
            "you round down; take the nearest integer": rounded(weight, most, near=torch.floor)[0],
            f"{bits} signed bits reach 2^{bits - 1} - 1 = {most}, not one more": (
                rounded(weight, most + 1)[0]
            ),
            f"that is twice as far as signed integers of {bits} bits reach: {most}": (
                rounded(weight, 2**bits - 1)[0]
            ),
        }
        for hint, wrong in mistakes.items():
            if torch.allclose(found.double(), wrong, rtol=1e-4, atol=1e-9):
                return not_yet(hint)
        wanted = rounded(weight, most)[0]
        if not torch.allclose(found.double(), wanted, rtol=1e-4, atol=1e-9):
            row = (found - wanted).abs().sum(1).argmax().item()
            return not_yet(
                f"with {bits} bits row {row} begins with {found[row, 0]:.4g}; it should be "
                f"{wanted[row, 0]:.4g}"
            )
    return well_done("each row has its own scale, and none of its integers is out of reach")


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
