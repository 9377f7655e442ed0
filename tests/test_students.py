"""Students of some of a teacher's layers: which ones, that they are right, and what is refused."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

import willows_kd as kd
from conftest import logits, shake
from willows_kd import students


def test_a_student_is_its_teacher_without_the_other_layers(teacher, ids):
    student = kd.student_from_teacher(shake(teacher), 2)
    with torch.no_grad():  # a layer whose weights are all 0 adds nothing to what passes it
        for weight in teacher.transformer.h[1:3].parameters():
            weight.zero_()
    assert student.config.num_hidden_layers == 2
    torch.testing.assert_close(logits(student, ids), logits(teacher, ids))


def test_a_layer_that_would_become_another_kind_is_refused(monkeypatch):
    """`mlp_only_layers` names layers: what it says of the teacher is wrong for the student."""
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4}
    experts = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
    config = Qwen3MoeConfig(**sizes, **heads, **experts, mlp_only_layers=[1])
    teacher = AutoModelForCausalLM.from_config(config)
    monkeypatch.setattr(students, "skipped_layers", None)  # seen without a forward pass
    expected = (
        r"no student of layers \[0, 3\] of this qwen3_moe teacher: mlp is .*Sparse.* in layer 3, "
        r"and its config makes it .*MLP in layer 1 of 2"
    )
    with pytest.raises(kd.InputError, match=expected):
        kd.student_from_teacher(teacher, 2)
    assert kd.student_from_teacher(teacher, 2, "random").config.num_hidden_layers == 2


def test_a_layer_whose_settings_a_short_input_does_not_show_is_refused(teacher):
    teacher.transformer.h[3].attn.window = 64  # longer than the text of the proof
    with pytest.raises(kd.InputError, match="attn.window is 64 in layer 3, .* absent in layer 1"):
        kd.student_from_teacher(teacher, 2)


def test_a_layer_that_depends_on_more_than_its_weights_is_refused(teacher):
    """As if the feed-forward part of a layer were changed by something that is written nowhere."""
    shake(teacher)
    teacher.transformer.h[3].mlp.register_forward_hook(
        lambda part, args, output: output + output.roll(1, -1)
    )
    with pytest.raises(kd.InputError, match="logits differ by .* depends on its number, or"):
        kd.student_from_teacher(teacher, 2)


def test_weights_that_have_no_place_in_the_student_are_refused(teacher):
    teacher.transformer.h[3].register_buffer("more", torch.ones(2))
    said = r"no student of layers \[0, 3\] of this gpt2 teacher: Error.*transformer.h.1.more"
    with pytest.raises(kd.InputError, match=said):
        kd.student_from_teacher(teacher, 2)


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
    student = kd.student_from_teacher(shake(teacher).requires_grad_(False), 2, init)
    pairs = zip(student.transformer.h, [teacher.transformer.h[i] for i in kept], strict=True)
    for mine, theirs in [*pairs, (student.transformer.ln_f, teacher.transformer.ln_f)]:
        assert all(map(torch.equal, mine.parameters(), theirs.parameters()))
    assert torch.equal(student.transformer.wte.weight, teacher.transformer.wte.weight)
    assert torch.equal(student.transformer.wpe.weight, teacher.transformer.wpe.weight)
    assert student.lm_head.weight is student.transformer.wte.weight
    assert all(p.requires_grad for p in student.parameters())
    storages = [
        {p.untyped_storage().data_ptr() for p in m.parameters()} for m in (student, teacher)
    ]
    assert not storages[0] & storages[1]


def test_a_random_student_follows_from_its_seed_and_copies_nothing(teacher):
    first, again, other = (
        kd.student_from_teacher(teacher, 2, "random", seed).transformer.wte.weight
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, teacher.transformer.wte.weight)


def test_a_student_of_a_half_precision_teacher_is_float32(teacher):
    student = kd.student_from_teacher(teacher.bfloat16(), 2)
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert torch.equal(student.transformer.wte.weight.bfloat16(), teacher.transformer.wte.weight)


def test_layers_are_half_or_so_many_or_these(make_gpt2, teacher):
    for depth, half in ((1, 1), (4, 2), (5, 2)):
        assert kd.student_from_teacher(make_gpt2(depth)).config.n_layer == half
    assert students.layers_to_keep(teacher, np.int64(3), np.array([0, 2, 3])) == [0, 2, 3]
    assert students.layers_to_keep(teacher, 3, "spaced") == [0, 2, 3]
    assert students.layers_to_keep(teacher, 3, "first") == [0, 1, 2]


def test_settings_of_each_layer_are_cut_and_all_others_kept():
    kinds = ["full_attention"] * 3 + ["sliding_attention"]
    config = Qwen3Config(num_hidden_layers=4, layer_types=kinds)
    config.eos_token_id = [1, 2, 3, 4]  # as many ends of text as layers
    cut, before = students.config_of_layers(config, 4, [0, 3]), config.to_dict()
    changed = {name for name, value in cut.to_dict().items() if value != before.get(name)}
    assert changed == {"num_hidden_layers", "layer_types"}
    assert cut.layer_types == ["full_attention", "sliding_attention"]
    assert (cut.num_hidden_layers, config.num_hidden_layers) == (2, 4)
