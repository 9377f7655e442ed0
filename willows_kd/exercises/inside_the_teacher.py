"""Checks for notebook S2: a distance of hidden states, units to keep, sorted probabilities."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from willows_kd.exercises import judge, random_logits
from willows_kd.losses import cosine_distance


def check_cosine(my_cosine: Callable) -> bool:
    """Check `my_cosine(student_hidden, teacher_hidden, mask)`, a mean over what counts."""
    mask = torch.arange(10).reshape(2, 5) < 7
    case = random_logits(2, 5, 8, seed=1), random_logits(2, 5, 8, seed=2), mask
    right = cosine_distance
    mistakes = {
        "padding counts too: take the mean where mask is True": lambda a, b, _: right(a, b),
        "you divide by the padding, too": lambda *case: right(*case) * 7 / 10,
        "this is the cosine itself: subtract it from 1": lambda *case: 1 - right(*case),
    }
    return judge(my_cosine, right, mistakes, "directions are compared, and padding is not", case)


def check_units(my_units: Callable) -> bool:
    """Check `my_units(activations, keep)`: the numbers of the units that stay, in any order."""
    activations = random_logits(3, 7, 12, seed=0)
    activations[..., :3] -= 2.0  # large, and negative
    activations[1, 2, 11] = 12.0  # an outlier

    def right(activations, keep, of=lambda a: a.abs().mean((0, 1))) -> list:
        return sorted(of(activations).topk(keep).indices)

    mistakes = {
        "these do least: keep the others": partial(right, of=lambda a: -a.abs().mean((0, 1))),
        "negatives are passed on, too: take .abs()": partial(right, of=lambda a: a.mean((0, 1))),
        "one outlier decides: take the mean": partial(right, of=lambda a: a.abs().amax((0, 1))),
    }
    praise = "the units that pass on most, over all tokens, are kept"
    return judge(lambda *case: sorted(my_units(*case)), right, mistakes, praise, (activations, 5))


def check_uld(my_uld: Callable) -> bool:
    """Check `my_uld(student_logits, teacher_logits)`, for vocabularies of two sizes."""
    few, some, many = (random_logits(4, size, seed=size) for size in (5, 6, 9))

    def right(z_s, z_t, sort=lambda p: p.sort(descending=True).values, cut=max) -> torch.Tensor:
        p, q = (sort(z.softmax(-1)) for z in (z_s, z_t))
        width = cut(p.shape[-1], q.shape[-1])
        p, q = (F.pad(x, (0, width - x.shape[-1])) for x in (p, q))
        return (p - q).abs().sum(-1).mean()

    mistakes = {
        "the probabilities are not sorted": partial(right, sort=lambda p: p),
        "sort downwards: padding is unlikely": partial(right, sort=lambda p: p.sort().values),
        "the longer list is cut: fill the shorter one with zeros": partial(right, cut=min),
        "it is divided by the vocabulary too: sum over it": lambda *z: right(*z) / 9,
    }
    praise = "it compares how sure both are, whatever the names of their tokens"
    return judge(my_uld, right, mistakes, praise, (few, many), (many, some))
