"""Checks for notebook S2: a distance of hidden states, units to keep, sorted probabilities."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from willows_kd.exercises import judge, random_logits
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
        "the padding counts too: take the mean where mask is True": lambda a, b, _: right(a, b),
        "you divide by the padding, too": lambda *case: right(*case) * case[2].double().mean(),
        "this is a sum over the tokens; take the mean": lambda *case: right(*case) * case[2].sum(),
        "this is the cosine itself: subtract it from 1": lambda *case: 1 - right(*case),
        "the cosine runs over the tokens; it compares vectors of the width: dim=-1": (
            lambda a, b, _: (1 - F.cosine_similarity(a, b, dim=1)).mean()
        ),
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

    def right(activations, keep, first=torch.abs, over=torch.mean, last=torch.clone):
        return last(over(first(activations), (0, 1))).topk(keep).indices.sort().values

    mistakes = {
        "these are the units that do least; keep the others": {"last": torch.neg},
        "a large negative activation is passed on too: take .abs()": {"first": torch.clone},
        "positive and negative cancel: .abs() comes first": {
            "first": torch.clone,
            "last": torch.abs,
        },
        "one outlier decides: take the mean, not the largest": {"over": torch.amax},
    }
    praise = "the units that pass on most, over all tokens, are kept"
    return judge(in_order, [(activations, keep)], right, mistakes, praise)


def check_uld(my_uld: Callable) -> bool:
    """Check `my_uld(student_logits, teacher_logits)`, for vocabularies of two sizes."""
    sizes = (5, 9), (9, 6)
    cases = [(random_logits(4, a, seed=a), random_logits(4, b, seed=9 * b)) for a, b in sizes]

    def right(z_s, z_t, of=torch.softmax, falling=True, cut=max, power=1) -> torch.Tensor:
        p, q = (of(z, -1) for z in (z_s, z_t))
        if falling is not None:
            p, q = (x.sort(descending=falling).values for x in (p, q))
        width = cut(p.shape[-1], q.shape[-1])
        p, q = (F.pad(x, (0, width - x.shape[-1])) for x in (p, q))
        return (p - q).abs().pow(power).sum(-1).mean()

    mistakes = {
        "the probabilities are not sorted": {"falling": None},
        "they rise, so that padding meets the likeliest: sort downwards": {"falling": False},
        "the longer list is cut: fill the shorter one with zeros": {"cut": min},
        "you compare logits, not probabilities": {"of": lambda z, _: z},
        "differences are squared; take absolute values": {"power": 2},
        "it grows with the number of tokens: take the mean": lambda *z: 4 * right(*z),
        "it is divided by the vocabulary too: sum over it": lambda *z: right(*z) / 9,
    }
    praise = "it compares how sure both are, whatever the names of their tokens"
    return judge(my_uld, cases, right, mistakes, praise)
