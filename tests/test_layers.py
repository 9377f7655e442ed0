"""Which layers a student keeps: what each way to choose keeps, measures, and refuses."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from families import random_teacher

import willows_kd as kd
from conftest import shake
from willows_kd.compress.layers import passes_to_choose
from willows_kd.config import INITS
from willows_kd.students import evenly_spaced


def test_the_first_and_the_last_layer_are_kept_and_no_gap_is_left():
    assert evenly_spaced(12, 6) == [0, 2, 4, 7, 9, 11]  # DistilGPT2's choice
    assert evenly_spaced(12, 1) == evenly_spaced(1, 1) == [0]
    for depth, layers in itertools.combinations_with_replacement(range(2, 25), 2):
        kept = evenly_spaced(layers, depth)
        gaps = [b - a for a, b in itertools.pairwise(kept)]
        assert (kept[0], kept[-1], len(kept)) == (0, layers - 1, depth)
        assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1


# -- ways to choose ----------------------------------------------------------------------


@pytest.fixture
def uneven(make_gpt2):
    """A teacher of six layers, of which 1 and 4 hardly do a thing, and 2 not much."""
    teacher = shake(make_gpt2(6))
    with torch.no_grad():
        for number, share in ((1, 1e-3), (2, 0.1), (4, 1e-4)):
            for weight in teacher.transformer.h[number].parameters():
                weight *= share
    return teacher


@pytest.fixture
def few(blocks):
    """A few training blocks."""
    return blocks.train[:4]


def perplexity_by_hand(teacher, kept, few):
    """That of a teacher whose other layers are taken out."""
    cut = copy.deepcopy(teacher)
    cut.transformer.h = torch.nn.ModuleList(cut.transformer.h[i] for i in kept)
    with torch.no_grad():
        logits = cut(few, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), few[:, 1:].flatten()).exp().item()


def test_block_influence_is_the_cosine_distance_of_what_goes_in_and_out(teacher, few):
    shake(teacher).train()
    seen = []  # the residual stream, without the norm that `transformers` puts on its end
    hooks = [
        layer.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
        for layer in [*teacher.transformer.h, teacher.transformer.ln_f]
    ]
    with torch.no_grad():
        copy.deepcopy(teacher).eval()(few)
    for hook in hooks:
        hook.remove()
    found = kd.block_influence(teacher, few)
    cosines = [F.cosine_similarity(a, b, dim=-1).mean() for a, b in itertools.pairwise(seen)]
    torch.testing.assert_close(found, 1 - torch.stack(cosines))
    assert teacher.training and not any(layer._forward_hooks for layer in teacher.modules())


def test_influence_keeps_the_layers_that_do_something(uneven, few):
    found = kd.choose_layers(uneven, 4, few, ["influence"])
    assert found.loc["influence", "layers"] == [0, 2, 3, 5]


def test_the_table_says_where_each_student_starts_the_best_first(uneven, few):
    found = kd.choose_layers(uneven, 3, few)
    assert set(found.index) == set(INITS)
    assert found["layers"]["spaced"] == evenly_spaced(6, 3) != found["layers"]["first"]
    assert found["perplexity"].is_monotonic_increasing
    for kept, perplexity in zip(found["layers"], found["perplexity"], strict=True):
        assert perplexity == pytest.approx(perplexity_by_hand(uneven, kept, few), rel=1e-4)


def test_dropped_is_what_costs_least_a_run_or_step_by_step(teacher, few):
    shake(teacher)

    def best(each):
        return min(each, key=lambda kept: perplexity_by_hand(teacher, kept, few))

    kept = list(range(4))
    while len(kept) > 2:
        kept = best([[i for i in kept if i != dropped] for dropped in kept])
    found = kd.choose_layers(teacher, 2, few, ["greedy", "contiguous"])["layers"]
    assert found["greedy"] == kept
    assert found["contiguous"] == best(([2, 3], [0, 3], [0, 1]))


@pytest.mark.parametrize("init", INITS)
def test_so_often_is_the_teacher_read_in_order_to_choose(init, teacher, few):
    read = []
    teacher.register_forward_hook(lambda *_: read.append(init))
    found = kd.choose_layers(teacher, 2, few, [init]).loc[init]
    assert len(read) - 1 == found["passes"] == passes_to_choose(init, 4, 2)
    assert len(found["layers"]) == 2


def test_too_many_layers_and_unknown_ways_are_refused(teacher, few):
    with pytest.raises(kd.InputError, match="layers is 5; this teacher allows 1 to 4"):
        kd.choose_layers(teacher, 5, few)
    with pytest.raises(kd.InputError, match="init is 'last'; it must be one of spaced"):
        kd.choose_layers(teacher, 2, few, ["last"])


def test_layers_of_another_family_are_chosen_too(ids):
    found = kd.choose_layers(random_teacher("llama"), 3, ids)
    assert len(found) == len(INITS) and found["perplexity"].notna().all()
