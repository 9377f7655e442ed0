"""Checks for notebook S2: a distance of hidden states, units to keep, sorted probabilities."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from willows_kd.exercises import judge, random_logits, wrong_means
from willows_kd.losses import cosine_distance


def check_cosine(my_cosine: Callable) -> bool:
    """Check `my_cosine(student_hidden, teacher_hidden, mask)`, a mean over what counts."""
    cases = []
    for seed in (1, 2):
        mask = torch.ones(2, 5, dtype=torch.bool)
        mask[1, 5 - seed :] = False
        hidden = (random_logits(2, 5, 8, seed=seed + i) for i in (0, 5))
        cases.append((*hidden, mask))

    right = cosine_distance
    mistakes = {
        lambda a, b, _: right(a, b): "the padding counts too: take the mean where mask is True",
        lambda *case: right(*case) * case[2].double().mean(): "you divide by the padding, too",
        lambda *case: right(*case) * case[2].sum(): "this is a sum over the tokens; take the mean",
        lambda *case: 1 - right(*case): "this is the cosine itself: subtract it from 1",
        lambda a, b, _: (1 - F.cosine_similarity(a, b, dim=1)).mean(): "the cosine runs over the "
        "tokens; it compares vectors of the width: dim=-1",
    }
    return judge(my_cosine, cases, right, mistakes, "directions are compared, and padding is not")


def check_units(my_units: Callable) -> bool:
    """Check `my_units(activations, keep)`: the numbers of the units that stay, in any order."""
    activations, keep = random_logits(3, 7, 12, seed=0), 5
    activations[..., :3] -= 2.0  # large, and negative
    activations[1, 2, 11] = 12.0  # an outlier

    def in_order(activations, keep):
        units = my_units(activations, keep)
        return None if units is None else torch.as_tensor(units).sort().values

    def kept(score: Callable) -> Callable:
        return lambda activations, keep: score(activations).topk(keep).indices.sort().values

    mistakes = {
        kept(lambda a: -a.abs().mean((0, 1))): "these are the units that do least; keep the others",
        kept(lambda a: a.mean((0, 1))): "a large negative activation is passed on too: take .abs()",
        kept(lambda a: a.mean((0, 1)).abs()): "positive and negative cancel: .abs() comes first",
        kept(lambda a: a.abs().amax((0, 1))): "one outlier decides: take the mean, not the largest",
    }
    right = kept(lambda a: a.abs().mean((0, 1)))
    praise = "the units that pass on most, over all tokens, are kept"
    return judge(in_order, [(activations, keep)], right, mistakes, praise)


def check_uld(my_uld: Callable) -> bool:
    """Check `my_uld(student_logits, teacher_logits)`, for vocabularies of two sizes."""
    sizes = (5, 9), (9, 6)
    cases = [(random_logits(4, a, seed=a), random_logits(4, b, seed=9 * b)) for a, b in sizes]

    def downwards(p: torch.Tensor) -> torch.Tensor:
        return p.sort(descending=True).values

    def distance(z_s, z_t, of=torch.softmax, sort=downwards, end=None, power=1) -> torch.Tensor:
        p, q = (sort(of(z, -1)) for z in (z_s, z_t))
        width = max(p.shape[-1], q.shape[-1])
        p, q = (F.pad(x, (0, width - x.shape[-1]))[:, :end] for x in (p, q))
        return (p - q).abs().pow(power).sum(-1).mean()

    mistakes = {
        lambda *z: distance(*z, sort=lambda p: p): "the probabilities are not sorted",
        lambda *z: distance(*z, sort=lambda p: p.sort().values): "they rise, so that padding "
        "meets the likeliest: sort downwards",
        lambda *z: distance(*z, end=min(x.shape[-1] for x in z)): "the longer list is cut: "
        "fill the shorter one with zeros",
        lambda *z: distance(*z, of=lambda z, _: z): "you compare logits, not probabilities",
        lambda *z: distance(*z, power=2): "differences are squared; take absolute values",
        **wrong_means(distance, 4, 9),
    }
    praise = "it compares how sure both are, whatever the names of their tokens"
    return judge(my_uld, cases, distance, mistakes, praise)
