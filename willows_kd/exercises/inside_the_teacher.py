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

    def right(a, b, mask) -> float:
        return cosine_distance(a, b, mask).item()

    mistakes = {
        lambda a, b, mask: cosine_distance(a, b).item(): "the padding counts too: take the mean "
        "where the mask is True",
        lambda a, b, mask: right(a, b, mask) * mask.double().mean().item(): "you divide by all "
        "tokens; divide by the number of those that count",
        lambda a, b, mask: right(a, b, mask) * mask.sum().item(): "this is a sum over the "
        "tokens; take the mean",
        lambda a, b, mask: 1 - right(a, b, mask): "this is the cosine itself, which is largest "
        "for equal directions: subtract it from 1",
        lambda a, b, mask: (1 - F.cosine_similarity(a, b, dim=1)).mean().item(): "the cosine "
        "runs over the tokens; it compares vectors of the width: dim=-1",
    }
    return judge(my_cosine, cases, right, mistakes, "directions are compared, and padding is not")


def check_units(my_units: Callable) -> bool:
    """Check `my_units(activations, keep)`: the numbers of the units that stay, in any order."""
    activations, keep = random_logits(3, 7, 12, seed=0), 5
    activations[..., :3] -= 2.0  # large, and negative
    activations[1, 2, 11] = 12.0  # an outlier

    def kept(score: Callable) -> Callable:
        return lambda activations, keep: score(activations).topk(keep).indices

    mistakes = {
        kept(lambda a: -a.abs().mean((0, 1))): "these are the units that do least; keep the others",
        kept(lambda a: a.mean((0, 1))): "a large negative activation is passed on too: take the "
        "absolute value",
        kept(lambda a: a.mean((0, 1)).abs()): "take the absolute value before the mean, or "
        "positive and negative cancel",
        kept(lambda a: a.abs().amax((0, 1))): "one outlier decides: take the mean over tokens, "
        "not the largest",
    }
    return judge(
        my_units,
        [(activations, keep)],
        kept(lambda a: a.abs().mean((0, 1))),
        mistakes,
        "the units that pass on most, over all tokens, are kept",
        tidy=lambda units: units.sort().values,
    )


def check_uld(my_uld: Callable) -> bool:
    """Check `my_uld(student_logits, teacher_logits)`, for vocabularies of two sizes."""
    cases = [
        (random_logits(4, a, seed=a), random_logits(4, b, seed=9 * b)) for a, b in ((5, 9), (9, 6))
    ]

    def distance(z_s, z_t, of=torch.Tensor.softmax, order=1, pad=True, power=1) -> float:
        p, q = (order * (order * of(z, -1)).sort(descending=True).values for z in (z_s, z_t))
        width = (max if pad else min)(p.shape[-1], q.shape[-1])
        p, q = (F.pad(x, (0, width - x.shape[-1])) for x in (p, q))
        return (p - q).abs().pow(power).sum(-1).mean().item()

    def unsorted(z_s, z_t) -> float:
        width = max(z_s.shape[-1], z_t.shape[-1])
        p, q = (F.pad(z.softmax(-1), (0, width - z.shape[-1])) for z in (z_s, z_t))
        return (p - q).abs().sum(-1).mean().item()

    mistakes = {
        unsorted: "the probabilities are not sorted; token 3 of one is not token 3 of the other",
        lambda *z: distance(*z, order=-1): "they rise, so that padding meets likely tokens: sort "
        "them downwards",
        lambda *z: distance(*z, pad=False): "the longer list is cut; fill the shorter one with "
        "zeros",
        lambda *z: distance(*z, of=lambda z, _: z): "you compare logits, not probabilities",
        lambda *z: distance(*z, power=2): "differences are squared; take absolute values",
        **wrong_means(distance, 4, 9),
    }
    praise = "it compares how sure both are, whatever the names of their tokens"
    return judge(my_uld, cases, distance, mistakes, praise)
