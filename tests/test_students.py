"""Students of some of a teacher's layers: which ones, that they are right, and what is refused."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

import willows_kd as kd
from conftest import logits, shake
from willows_kd import students

# -- a student of some of the teacher's layers -----------------------------------------


def test_a_student_is_its_teacher_without_the_other_layers(teacher, ids):
    student = kd.student_from_teacher(shake(teacher), 2)
    with torch.no_grad():  # a layer whose weights are all 0 adds nothing to what passes it
        for weight in teacher.transformer.h[1:3].parameters():
            weight.zero_()
    assert student.config.num_hidden_layers == 2
    torch.testing.assert_close(logits(student, ids), logits(teacher, ids))


def test_a_layer_that_would_become_another_kind_is_refused(monkeypatch):
    """`mlp_only_layers` names layers: what it says of the teacher is wrong for the student."""
    teacher = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**MIXED))
    monkeypatch.setattr(students, "skipped_layers", None)  # seen without a forward pass
    expected = (
        r"no student of layers \[0, 3\] of this qwen3_moe teacher: mlp is .*Sparse.* in layer 3, "
        r"and its config makes it .*MLP in layer 1 of 2"
    )
    with pytest.raises(kd.InputError, match=expected):
        kd.student_from_teacher(teacher, 2)
    assert kd.student_from_teacher(teacher, 2, "random").config.num_hidden_layers == 2


def test_a_layer_that_depends_on_more_than_its_weights_is_refused(teacher, monkeypatch):
    """As if the feed-forward part of a layer were changed by something that is written nowhere."""
    shake(teacher)
    teacher.transformer.h[3].mlp.register_forward_hook(
        lambda part, args, output: output + output.roll(1, -1)
    )
    with pytest.raises(kd.InputError, match="logits differ by .* depends on its number, or"):
        kd.student_from_teacher(teacher, 2)


def test_attention_scaled_by_the_layers_number_is_refused(make_gpt2):
    teacher = shake(make_gpt2(scale_attn_by_inverse_layer_idx=True))
    said = "in layer 3, and its config makes it .* in layer 1|depends on its number"
    with pytest.raises(kd.InputError, match=said):
        kd.student_from_teacher(teacher, 2)


@pytest.mark.parametrize(
    ("settings", "why"), [({"is_quantized": True}, "load it unquantised"), ({}, "offloaded")]
)
def test_a_student_of_weights_that_are_not_there_is_refused(settings, why, teacher):
    vars(teacher).update(settings)
    if not settings:
        teacher.transformer.h[3].to("meta")
    with pytest.raises(kd.InputError, match=why):
        kd.student_from_teacher(teacher, 2)


def test_the_proof_leaves_the_teacher_whole(teacher, ids):
    before = logits(shake(teacher), ids)
    kd.student_from_teacher(teacher, 2)
    assert torch.equal(logits(teacher, ids), before)


def test_a_student_writes_the_same_with_and_without_its_cache(teacher, ids):
    student = kd.student_from_teacher(shake(teacher), 2).eval()
    settings = {"do_sample": False, "min_new_tokens": 8, "max_new_tokens": 8, "pad_token_id": 0}
    mask = torch.ones_like(ids)
    cached, plain = (
        student.generate(ids, attention_mask=mask, use_cache=cache, **settings)
        for cache in (True, False)
    )
    assert torch.equal(cached, plain)


@pytest.mark.parametrize(
    ("init", "kept"), [("spaced", [0, 3]), ("first", [0, 1]), ([1, 2], [1, 2])]
)
def test_a_student_has_its_teachers_weights_and_its_own_storage(init, kept, teacher):
    shake(teacher)
    student = kd.student_from_teacher(teacher, 2, init)
    pairs = zip(student.transformer.h, [teacher.transformer.h[i] for i in kept], strict=True)
    for mine, theirs in [*pairs, (student.transformer.ln_f, teacher.transformer.ln_f)]:
        assert all(map(torch.equal, mine.parameters(), theirs.parameters()))
    assert torch.equal(student.transformer.wte.weight, teacher.transformer.wte.weight)
    assert torch.equal(student.transformer.wpe.weight, teacher.transformer.wpe.weight)
    storages = [
        {p.untyped_storage().data_ptr() for p in m.parameters()} for m in (student, teacher)
    ]
    assert not storages[0] & storages[1]


def test_a_students_head_is_still_its_embedding(teacher):
    student = kd.student_from_teacher(teacher)
    assert student.lm_head.weight is student.transformer.wte.weight


@pytest.mark.parametrize(("depth", "half"), [(1, 1), (4, 2), (5, 2)])
def test_a_student_has_half_of_the_layers_unless_told_otherwise(depth, half, make_gpt2):
    assert kd.student_from_teacher(make_gpt2(depth)).config.n_layer == half


def test_a_random_student_follows_from_its_seed_and_copies_nothing(teacher):
    first, again, other = (
        kd.student_from_teacher(teacher, 2, "random", seed).transformer.wte.weight
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, teacher.transformer.wte.weight)


@pytest.mark.parametrize("init", ["spaced", "random"])
def test_making_a_student_draws_none_of_the_callers_random_numbers(init, teacher):
    state = torch.get_rng_state()
    kd.student_from_teacher(teacher, 2, init)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_student_of_a_frozen_teacher_can_be_trained(teacher):
    student = kd.student_from_teacher(teacher.requires_grad_(False))
    assert all(p.requires_grad for p in student.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_student_of_a_half_precision_teacher_is_float32(dtype, teacher):
    student = kd.student_from_teacher(teacher.to(dtype), 2)
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert torch.equal(student.transformer.wte.weight.to(dtype), teacher.transformer.wte.weight)


@pytest.mark.parametrize("layers", [0, 5, 2.0, True])
def test_a_student_of_impossible_depth_is_refused(layers, teacher):
    with pytest.raises(kd.InputError, match=f"layers is {layers}; .* 1 to 4"):
        kd.student_from_teacher(teacher, layers)


@pytest.mark.parametrize("init", ["last", "greedy", None, 2])
def test_an_unknown_init_is_refused(init, teacher):
    with pytest.raises(
        kd.InputError, match=f"{init!r}; it must be spaced, first, random or a list"
    ):
        kd.student_from_teacher(teacher, 2, init)


@pytest.mark.parametrize("init", [[], [2, 1], [1, 1], [0, 4], [-1, 2], [0.0, 2], "012"])
def test_layer_numbers_that_are_none_are_refused(init, teacher):
    with pytest.raises(kd.InputError, match="init is"):
        kd.student_from_teacher(teacher, init=init)


def test_layers_may_be_named_by_numpy_and_must_agree_with_how_many(teacher):
    student = kd.student_from_teacher(teacher, np.int64(3), np.array([0, 2, 3]))
    assert student.config.n_layer == 3
    with pytest.raises(kd.InputError, match="as many as layers, 2"):
        kd.student_from_teacher(teacher, 2, [0, 1, 3])


# -- settings of each layer ------------------------------------------------------------

MIXED = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "mlp_only_layers": [1],
}


def test_settings_of_each_layer_are_cut_and_all_others_kept():
    kinds = ["full_attention"] * 3 + ["sliding_attention"]
    config = Qwen3Config(num_hidden_layers=4, layer_types=kinds)
    config.eos_token_id = [1, 2, 3, 4]  # as many ends of text as layers
    cut, before = students.config_of_layers(config, 4, [0, 3]), config.to_dict()
    changed = {name for name, value in cut.to_dict().items() if value != before.get(name)}
    assert changed == {"num_hidden_layers", "layer_types"}
    assert cut.layer_types == ["full_attention", "sliding_attention"]
    assert (cut.num_hidden_layers, config.num_hidden_layers) == (2, 4)
