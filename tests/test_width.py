"""Narrower students: which heads and units count for most, and a model without the others."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    Olmo2Config,
    Qwen2MoeConfig,
    Qwen3Config,
)
from transformers.pytorch_utils import Conv1D

import willows_kd as kd
from conftest import logits, shake

LAYERS, GROUPS = 4, 2
COUNTS = {"heads": GROUPS, "feed_forward": 48}
READ_BY = {"heads": "o_proj", "feed_forward": ("mlp.c_proj", "down_proj")}
SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": LAYERS}
SIZES |= {"num_attention_heads": 8}
GROUPED = {"num_key_value_heads": GROUPS, "intermediate_size": 48}
IDS = torch.arange(1, 41).view(2, 20) * 37 % 96


def random_model(config):
    """A model with noise on every weight, so that no two heads, units or biases are alike."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return shake(AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval())


@pytest.fixture
def llama():
    """A Llama of two groups with four query heads each, and with all biases that it can have."""
    biases = {"attention_bias": True, "mlp_bias": True}
    return random_model(LlamaConfig(**SIZES, **GROUPED, **biases))


@pytest.fixture
def gpt2():
    """A GPT-2 with as many units."""
    return random_model(GPT2Config(vocab_size=96, n_embd=32, n_head=2, n_layer=LAYERS, n_inner=48))


def some(part: str, kept: int) -> torch.Tensor:
    """Numbers that are other ones, in another order, for each layer."""
    draws = torch.rand(LAYERS, COUNTS[part], generator=torch.Generator().manual_seed(1))
    return draws.topk(kept).indices


def silenced(model, kept: dict[str, torch.Tensor]):
    """A copy in which nothing reads what the other heads or units of each layer give."""
    model = copy.deepcopy(model)
    for part, numbers in kept.items():
        maps = [m for name, m in model.named_modules() if name.endswith(READ_BY[part])]
        for module, chosen in zip(maps, numbers.tolist(), strict=True):
            weight = module.weight.data if isinstance(module, Conv1D) else module.weight.data.T
            each = weight.unflatten(0, (COUNTS[part], -1))
            each[[i for i in range(len(each)) if i not in chosen]] = 0
    return model


# -- importance ------------------------------------------------------------------------


def test_a_units_importance_is_its_mean_absolute_activation(gpt2):
    gpt2.set_attn_implementation("sdpa")  # causal without being given a mask
    scores = kd.importance(gpt2, IDS)["feed_forward"]
    streams = gpt2(IDS, output_hidden_states=True).hidden_states
    for layer, stream, found in zip(gpt2.transformer.h, streams[:-1], scores, strict=True):
        middle = stream + layer.attn(layer.ln_1(stream))[0]
        units = layer.mlp.act(layer.mlp.c_fc(layer.ln_2(middle)))
        torch.testing.assert_close(found, units.abs().mean((0, 1)).detach())


def test_a_groups_importance_is_the_norm_of_what_its_heads_give(llama):
    scores = kd.importance(llama, IDS)["heads"]
    out = llama(IDS, output_hidden_states=True, output_attentions=True)
    for i, layer in enumerate(llama.model.layers):
        normed = layer.input_layernorm(out.hidden_states[i])
        values = layer.self_attn.v_proj(normed).view(2, 20, GROUPS, 4)
        weights = out.attentions[i].view(2, GROUPS, 4, 20, 20)
        given = torch.einsum("bghqk,bkgd->bqghd", weights, values)
        norms = given.square().sum((-1, -2)).sqrt()
        torch.testing.assert_close(scores[i], norms.mean((0, 1)).detach())


# -- narrower students -----------------------------------------------------------------


UNITS, HEADS = {"feed_forward": 12}, {"heads": 1}


@pytest.mark.parametrize(
    ("family", "counts"),
    [("gpt2", UNITS), ("llama", UNITS), ("llama", HEADS), ("llama", UNITS | HEADS)],
)
def test_a_student_is_its_teacher_with_the_other_heads_and_units_unread(family, counts, request):
    teacher = request.getfixturevalue(family)
    before = kd.fingerprint(teacher)
    kept = {part: some(part, count) for part, count in counts.items()}
    for numbers in kept.values():
        assert len(set(numbers.flatten().tolist())) > numbers.shape[1]  # not the same in each layer
    student = kd.narrowed(teacher, **kept)
    expected = logits(silenced(teacher, kept), IDS)
    torch.testing.assert_close(logits(student, IDS), expected, rtol=1e-4, atol=1e-4)
    if "heads" in kept:
        config = student.config
        counts = config.num_key_value_heads, config.num_attention_heads, config.head_dim
        assert counts == (1, 4, 4)
    assert kd.fingerprint(teacher) == before
    assert not any(module._forward_pre_hooks for module in teacher.modules())
    half = kd.narrowed(teacher.to(torch.bfloat16), **kept)
    assert {p.dtype for p in half.parameters()} == {torch.float32}


def test_a_narrower_student_is_the_same_when_saved_and_loaded(tmp_path):
    teacher = random_model(Qwen3Config(**SIZES, **GROUPED))
    kept = {part: scores.topk(1).indices for part, scores in kd.importance(teacher, IDS).items()}
    student = kd.student_from_teacher(kd.narrowed(teacher, **kept), 2)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(logits(loaded, IDS), logits(student, IDS))


def test_order_and_kind_of_the_numbers_make_no_difference(gpt2):
    kept = some("feed_forward", 12)
    same = [kept, kept.flip(1).tolist(), kept.numpy(), list(kept)]
    students = [kd.narrowed(gpt2, feed_forward=numbers) for numbers in same]
    assert len({kd.fingerprint(student) for student in students}) == 1


# -- what is refused -------------------------------------------------------------------


@pytest.mark.parametrize(
    "numbers", [[[0, 1]] * 3, [[0, 1]] * 3 + [[0]], [[]] * 4, [[0, 48]] * 4, [[-1, 0]] * 4]
)
def test_numbers_that_are_none_are_refused(numbers, gpt2):
    expected = r"^feed_forward must list .* from 0 to 47 .* 4 layers, .*topk\(24\)\.indices$"
    with pytest.raises(kd.InputError, match=expected):
        kd.narrowed(gpt2, feed_forward=numbers)


def test_layouts_that_cannot_be_cut_are_refused(gpt2):
    with pytest.raises(kd.InputError, match="heads of the gpt2 family .* prune feed_forward"):
        kd.narrowed(gpt2, heads=[[0]] * 4)
    experts = random_model(Qwen2MoeConfig(**SIZES, **GROUPED, num_experts=4))
    with pytest.raises(kd.InputError, match="only the layouts of GPT-2 and Llama"):
        kd.narrowed(experts, feed_forward=[[0]] * 4)
    under_one_norm = random_model(Olmo2Config(**SIZES, **GROUPED))
    with pytest.raises(kd.InputError, match=r"size mismatch for .*q_norm.weight"):
        kd.narrowed(under_one_norm, heads=[[0]] * 4)


def test_a_narrower_student_is_proven(gpt2):
    """As if a feed-forward part were more than its weights say."""
    gpt2.transformer.h[1].mlp.register_forward_hook(lambda m, args, out: out.roll(1, -1))
    with pytest.raises(kd.InputError, match="logits differ by .* without the other heads and"):
        kd.narrowed(gpt2, feed_forward=some("feed_forward", 12))
