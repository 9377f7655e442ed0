"""Checks for notebook S3: rounding to few bits, who follows a draft, what a draft brings."""

from collections.abc import Callable

import torch

from willows_kd.exercises import judge, random_logits


def rounded(weight, most: int, amax=lambda w: w.abs().amax(1, keepdim=True), near=torch.round):
    """A matrix as integers up to `most` times a scale."""
    scale = amax(weight) / most
    return near(weight / scale) * scale


def check_rounding(my_rounding: Callable) -> bool:
    """Check `my_rounding(weight, bits)`: a matrix, (outputs, inputs), as few bits hold it."""
    cases = []
    for bits, shape in ((4, (6, 9)), (3, (4, 5))):
        channels = torch.arange(1, shape[0] + 1)[:, None]  # of different size
        cases.append((random_logits(*shape, seed=bits) * channels, bits))

    def most(bits: int) -> int:
        return 2 ** (bits - 1) - 1

    def right(weight, bits, **choices):
        return rounded(weight, most(bits), **choices)

    mistakes = {
        lambda w, _: w: "nothing is rounded yet",
        lambda w, b: right(w, b) / w.abs().amax(1, keepdim=True) * most(b): "these are the "
        "integers; multiply them by their scale",
        lambda *case: right(*case, amax=lambda w: w.abs().max()): "there is one scale for the "
        "whole matrix; each output channel has its own",
        lambda *case: right(*case, amax=lambda w: w.abs().amax(0, keepdim=True)): "there is a "
        "scale for each column; output channels are the rows here",
        lambda *case: right(*case, amax=lambda w: w.amax(1, keepdim=True)): "the scale is that "
        "of the largest weight: of the largest *size*, take .abs() first",
        lambda *case: right(*case, near=torch.trunc): "you cut off what is behind the point; "
        "take the nearest integer",
        lambda *case: right(*case, near=torch.floor): "you round down; take the nearest integer",
        lambda w, b: rounded(w, most(b) + 1): "so many signed bits reach 2^(bits - 1) - 1, not "
        "one more",
        lambda w, b: rounded(w, 2**b - 1): "that is twice as far as signed integers of so many "
        "bits reach",
    }
    praise = "each row has its own scale, and none of its integers is out of reach"
    return judge(my_rounding, cases, right, mistakes, praise)


def check_emitted(my_emitted: Callable) -> bool:
    """Check `my_emitted(p, q, token, u)`: how likely each token is to be emitted.

    `u` is the number from 0 to 1 that decides on the drafted token: certain if it is
    accepted, else the residual distribution. Shapes (vocabulary,).
    """
    p, q = torch.tensor([[0.4, 0.1, 0.2, 0.2, 0.1], [0.2, 0.3, 0.1, 0.2, 0.2]]).double()
    # p/q is 2, 1/3 and 1
    accepted = [(p, q, 0, 0.99), (p, q, 1, 0.2), (p, q, 3, 0.9)]
    for case in accepted:
        told = f"with p = {p[case[2]]:.1f}, q = {q[case[2]]:.1f}, u = {case[3]} the token is "
        told += "accepted: u is below min(1, p/q), so that this token is certain"
        anything = [(lambda *_: my_emitted(*case), told)]  # noqa: B023
        if not judge(my_emitted, [case], lambda *_: torch.eye(5)[case[2]], anything):  # noqa: B023
            return False

    def residual(p, q, *_, of=lambda p, q: (p - q).clamp(min=0)):
        return of(p, q) / of(p, q).sum()

    mistakes = {
        lambda p, *_: p: "if the token is rejected, the next is drawn from max(0, p - q) and not "
        "from p: what the draft has brought already must not be brought again",
        lambda p, q, *_: (p - q).clamp(min=0): "max(0, p - q) does not sum to 1 yet: divide it "
        "by its sum",
        lambda p, q, *_: residual(q, p): "max(0, q - p) is what the draft has too much of; the "
        "residual is max(0, p - q)",
        lambda p, q, token, _: torch.eye(5)[token]: "a rejected token is replaced by another one",
        lambda p, q, *_: residual(p, q, of=lambda p, q: (p - q).abs()): "take absolute values "
        "nowhere: where q is larger, nothing is missing",
    }
    praise = "whatever the draft was, the text is the teacher's"
    return judge(my_emitted, [(p, q, 1, 0.7)], residual, mistakes, praise)


def expected_tokens(a: float, k: int) -> float:
    """1 + a + ... + a to the power of k (Leviathan et al. 2023, equation 1)."""
    return sum(a**i for i in range(k + 1))


def check_tokens(my_tokens: Callable) -> bool:
    """Check `my_tokens(a, k)`: expected tokens for each pass of the teacher."""
    cases = [(0.5, 1), (0.8, 4), (0.3, 6)]
    mistakes = {
        lambda a, k: expected_tokens(a, k) - 1: "one token of the teacher's comes with every "
        "pass, after the accepted ones",
        lambda a, k: expected_tokens(a, k - 1): "the end is one term too early: the sum goes up "
        "to a to the power of k",
        lambda a, k: k * a + 1: "a token counts only if all before it were accepted: its share "
        "is a to the power of its place",
        lambda a, k: k * a: "you leave the teacher's own token out, and count what no longer "
        "counts",
        lambda a, k: 1 / (1 - a): "this is endless drafting; k tokens are drafted, then it ends",
        lambda a, k: a**k: "this is the chance that all are accepted",
    }
    praise = "the later a drafted token, the less it brings"
    return judge(my_tokens, cases, expected_tokens, mistakes, praise)
