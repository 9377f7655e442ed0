"""The chunked loss equals the full-logits loss, in a fraction of its memory."""

import copy
import inspect
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import willows_kd as kd
from willows_kd import distillation
from willows_kd.cost import MemoryWatch
from willows_kd.losses import DIVERGENCES, hard_label_loss, mix
from willows_kd.models import has_linear_head
from willows_kd.scale import chunked_loss as module
from willows_kd.scale.chunked_loss import chunked_distillation_loss, equal_parts

EXAMPLES = settings(max_examples=100, deadline=None, derandomize=True)
INF = float("inf")


def inputs(tokens, vocabulary, width, teacher_width, seed, dtype):
    """Hidden states, heads and labels; those of the student take gradients."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    student = [normal(tokens, width), normal(vocabulary, width)]
    teacher = [normal(tokens, teacher_width), normal(vocabulary, teacher_width)]
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    return [x.requires_grad_() for x in student], teacher, labels


def full_logits_loss(student, teacher, labels, temperature, alpha, name, mask=None, **parameters):
    """The losses of `losses.py`, on logits."""
    logits, teacher_logits = student[0] @ student[1].T, teacher[0] @ teacher[1].T
    divergence = DIVERGENCES[name].with_parameters(**parameters)
    soft = divergence(logits, teacher_logits, temperature, mask)
    hard = hard_label_loss(logits, labels, mask)
    return mix(hard, soft, alpha), soft, hard


def with_gradients(loss, student):
    return [loss.detach(), *torch.autograd.grad(loss, student)]


@EXAMPLES
@given(
    shape=st.tuples(st.integers(1, 24), st.integers(2, 40), st.integers(1, 9), st.integers(1, 9)),
    temperature=st.sampled_from([0.5, 1.0, 2.0, 7.5]),
    alpha=st.sampled_from([0.0, 0.3, 1.0]),
    divergence=st.sampled_from(list(DIVERGENCES)),
    beta=st.sampled_from([0.1, 0.5]),
    skew=st.sampled_from([0.0, 0.1, 0.9]),
    chunk=st.one_of(st.none(), st.integers(1, 30)),
    rows=st.sampled_from([1, 200]),
    masked=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_it_is_the_full_logits_loss(
    shape, temperature, alpha, divergence, beta, skew, chunk, rows, masked, seed
):
    student, teacher, labels = inputs(*shape, seed, torch.float64)
    mask = torch.rand(shape[0], generator=torch.Generator().manual_seed(seed)) >= masked
    how, parameters = (temperature, alpha, divergence, mask), {"beta": beta, "skew": skew}
    with mock.patch.object(module, "ROWS", rows):
        loss, soft, hard = chunked_distillation_loss(
            *student, *teacher, labels, *how, chunk, **parameters
        )
    wanted, wanted_soft, wanted_hard = full_logits_loss(
        student, teacher, labels, *how, **parameters
    )
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(
        with_gradients(3 * loss, student), with_gradients(3 * wanted, student), **close
    )
    torch.testing.assert_close(soft, wanted_soft.detach() if alpha < 1 else 0 * soft, **close)
    torch.testing.assert_close(hard, wanted_hard.detach() if alpha > 0 else 0 * hard, **close)


# the smallest probabilities are 0 in lower precision, as are those of tokens cut from the teacher
PRECISIONS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 5e-3}


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("cut", [False, True], ids=["all tokens", "some cut from the teacher"])
def test_in_every_precision_it_is_the_float64_loss_but_for_rounding(divergence, dtype, cut):
    student, teacher, labels = inputs(64, 300, 16, 16, 0, dtype)
    teacher[0][:, 0] = 1
    teacher[1][:40, 0] = -INF if cut else 1
    alpha = 0.3
    if cut and divergence == "reverse_kl":
        assert (
            chunked_distillation_loss(*student, *teacher, labels, 2.0, alpha, divergence)[0] == INF
        )
        return
    how = 2.0, alpha, divergence
    found = with_gradients(
        chunked_distillation_loss(*student, *teacher, labels, *how, chunk=10)[0], student
    )
    exact = [[x.detach().double() for x in pair] for pair in (student, teacher)]
    exact[0] = [x.requires_grad_() for x in exact[0]]
    wanted = with_gradients(full_logits_loss(*exact, labels, *how)[0], exact[0])
    wide = torch.promote_types(dtype, torch.float32)
    assert [x.dtype for x in found] == [wide, dtype, dtype]
    for one, other in zip(found, wanted, strict=True):
        assert other.isfinite().all()
        assert (one.double() - other).norm() <= PRECISIONS[dtype] * other.norm()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("teacher_too", [False, True])
def test_tokens_cut_from_the_student_give_the_value_of_the_full_logits_loss(
    divergence, teacher_too
):
    student, teacher, labels = inputs(8, 10, 4, 4, 0, torch.float64)
    with torch.no_grad():
        for hidden, head in [student, teacher] if teacher_too else [student]:
            hidden[:, 0] = 1
            head[:3, 0] = -INF
    soft = chunked_distillation_loss(*student, *teacher, labels, 2.0, 0.0, divergence)[1]
    wanted = full_logits_loss(student, teacher, labels, 2.0, 0.0, divergence)[1]
    assert soft.item() == pytest.approx(wanted.item(), rel=1e-12)
    assert soft.isinf() == (divergence == "forward_kl" and not teacher_too)


def test_infinities_of_tokens_that_do_not_count_do_not_spread():
    student, teacher, labels = inputs(6, 10, 4, 4, 0, torch.float64)
    with torch.no_grad():
        student[0][2] = teacher[0][2] = torch.inf
    mask = torch.arange(6) != 2
    found = with_gradients(
        chunked_distillation_loss(*student, *teacher, labels, mask=mask)[0], student
    )
    assert all(value.isfinite().all() for value in found)


def test_a_second_backward_pass_is_refused_in_the_words_of_autograd():
    student, teacher, labels = inputs(6, 10, 4, 4, 0, torch.float64)
    loss = chunked_distillation_loss(*student, *teacher, labels)[0]
    loss.backward(retain_graph=True)
    once = [x.grad.clone() for x in student]
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        loss.backward()
    assert all(torch.equal(x.grad, first) for x, first in zip(student, once, strict=True))


def test_the_teacher_gets_no_gradient():
    student, teacher, labels = inputs(6, 10, 4, 4, 0, torch.float64)
    for x in teacher:
        x.requires_grad_()
    loss, soft, hard = chunked_distillation_loss(*student, *teacher, labels, alpha=0.5)
    loss.backward()
    assert all(x.grad is None for x in teacher)
    assert not soft.requires_grad and not hard.requires_grad


def test_under_autocast_the_products_are_in_half_precision_and_the_gradients_in_float32():
    student, teacher, labels = inputs(64, 300, 16, 16, 0, torch.float32)
    how = labels, 2.0, 0.3, "forward_kl", None, 10
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(chunked_distillation_loss(*student, *teacher, *how)[0], student)
    halves = [[x.detach().bfloat16() for x in pair] for pair in (student, teacher)]
    halves[0] = [x.requires_grad_() for x in halves[0]]
    expected = with_gradients(chunked_distillation_loss(*halves[0], *halves[1], *how)[0], halves[0])
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one.to(other.dtype), other)
    assert not torch.equal(found[2], found[2].bfloat16().float())  # a sum over chunks


def test_the_logits_of_a_teacher_in_half_precision_are_taken_further_in_float32():
    student, teacher, labels = inputs(64, 300, 16, 16, 0, torch.float32)
    teacher = [x.bfloat16() for x in teacher]
    found = chunked_distillation_loss(*student, *teacher, labels, 2.0)[0]
    expected = full_logits_loss(student, teacher, labels, 2.0, 0.0, "forward_kl")[0]
    torch.testing.assert_close(found, expected)


def test_numbers_of_numpy_are_numbers():
    student, teacher, labels = inputs(12, 10, 4, 4, 0, torch.float32)
    how = np.float32(2), np.float64(0.5), "jensen_shannon", None, np.int64(5)
    found = chunked_distillation_loss(*student, *teacher, labels, *how, beta=np.float64(0.25))[0]
    usual = 2.0, 0.5, "jensen_shannon", None, 5
    assert found == chunked_distillation_loss(*student, *teacher, labels, *usual, beta=0.25)[0]


def test_parts_are_as_few_and_as_equal_as_can_be():
    for tokens in range(1, 30):
        for most in range(1, 31):
            parts = equal_parts(tokens, most)
            sizes = [len(range(tokens)[part]) for part in parts]
            assert sum((list(range(tokens)[part]) for part in parts), []) == list(range(tokens))
            assert len(parts) == -(-tokens // most)
            assert max(sizes) - min(sizes) <= 1


def test_leading_dimensions_are_tokens_too():
    student, teacher, labels = inputs(12, 10, 4, 4, 0, torch.float64)
    flat = chunked_distillation_loss(*student, *teacher, labels, 2.0, 0.5)[0]
    blocks = [student[0].view(3, 4, 4), student[1], teacher[0].view(3, 4, 4), teacher[1]]
    assert chunked_distillation_loss(*blocks, labels.view(3, 4), 2.0, 0.5)[0] == flat


@pytest.mark.parametrize("teacher", [(None, None), (torch.zeros(3, 4), torch.zeros(9, 4))])
@pytest.mark.parametrize("autocast", [False, True])
def test_hard_labels_alone_need_no_teacher_and_do_not_look_at_one(teacher, autocast):
    student, _, labels = inputs(12, 10, 4, 4, 0, torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, soft, hard = chunked_distillation_loss(*student, *teacher, labels, alpha=1.0)
    assert soft == 0
    assert loss == hard > 0


def test_a_mask_may_be_of_numbers():
    student, teacher, labels = inputs(6, 10, 4, 4, 0, torch.float64)
    mask = torch.arange(6) > 1
    found = chunked_distillation_loss(*student, *teacher, labels, mask=mask.long())[0]
    assert found == chunked_distillation_loss(*student, *teacher, labels, mask=mask)[0]


def test_its_defaults_are_those_of_the_settings():
    given, usual = inspect.signature(chunked_distillation_loss).parameters, kd.DistillConfig()
    for name in ("temperature", "alpha", "divergence", "beta", "skew"):
        assert given[name].default == getattr(usual, name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"divergence": "hinge"}, "'hinge'; it must be one of forward_kl, reverse_kl, "),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"alpha": 2}, "alpha is 2"),
        ({"chunk": 0}, "chunk is 0; it must be at least 1 token"),
        ({"chunk": 2.5}, "chunk is 2.5"),
        ({"divergence": "jensen_shannon", "beta": 1}, "beta is 1"),
        ({"divergence": "skewed_reverse_kl", "skew": 1}, "skew is 1"),
        ({"labels": torch.zeros(5).long()}, r"token ids \(torch.long\) of shape \(6,\)"),
        ({"teacher_head": None}, "the teacher's hidden states and output weights are needed"),
        ({"teacher_hidden": None}, "the teacher's hidden states and output weights are needed"),
        ({"teacher_hidden": torch.zeros(5, 4)}, r"has \(6,\) tokens .* the teacher \(5,\) and 10;"),
        ({"teacher_head": torch.zeros(9, 4)}, r"and 10 logits each, the teacher \(6,\) and 9;"),
    ],
)
def test_what_cannot_be_used_is_named(changes, message):
    student, teacher, labels = inputs(6, 10, 4, 4, 0, torch.float32)
    names = "student_hidden", "student_head", "teacher_hidden", "teacher_head", "labels"
    given = dict(zip(names, [*student, *teacher, labels], strict=True))
    with pytest.raises(kd.InputError, match=message):
        chunked_distillation_loss(**given | changes)


def test_a_chunk_is_sized_by_the_vocabulary_unless_given(monkeypatch):
    student, teacher, labels = inputs(12, 10, 4, 4, 0, torch.float64)
    sizes, usual = [], module.into_gradient
    monkeypatch.setattr(module, "CHUNK", 45)
    monkeypatch.setattr(
        module, "into_gradient", lambda z, *rest: sizes.append(len(z)) or usual(z, *rest)
    )
    chunked_distillation_loss(*student, *teacher, labels)
    chunked_distillation_loss(*student, *teacher, labels, chunk=7)
    monkeypatch.setattr(module, "CHUNK", 9)  # less than one token
    chunked_distillation_loss(*student, *teacher, labels)
    assert sizes == [4, 4, 4] + [6, 6] + [1] * 12


def test_its_memory_does_not_grow_by_the_vocabulary_with_the_tokens():
    vocabulary, width, most = 30_000, 32, {}
    for tokens in (200, 800):
        student, teacher, labels = inputs(tokens, vocabulary, width, width, 0, torch.float32)
        with MemoryWatch() as watch:
            chunked_distillation_loss(*student, *teacher, labels, 2.0, chunk=20)[0].backward()
        most[tokens] = watch.most
    assert most[800] - most[200] < 4 * 600 * width * 4  # hidden states, their gradient, masks
    assert most[800] < 800 * vocabulary * 4  # one tensor of logits would be more than all


# -- in the loop -----------------------------------------------------------------------


def train(teacher, student, blocks, **changes):
    student = copy.deepcopy(student)
    config = kd.DistillConfig(**{"epochs": 2, "batch_size": 4} | changes)
    return student, [row["loss"] for row in kd.distill(teacher, student, blocks, config)]


@pytest.mark.parametrize(
    ("alpha", "divergence"), [(0.0, "forward_kl"), (0.4, "jensen_shannon"), (1.0, "forward_kl")]
)
def test_distill_trains_the_same_student_with_it_and_without(
    make_gpt2, blocks, monkeypatch, alpha, divergence
):
    teacher, student = make_gpt2(initializer_range=0.15), make_gpt2(layers=1, seed=1)
    _, losses = train(teacher, student, blocks, alpha=alpha, divergence=divergence)
    monkeypatch.setattr(distillation, "has_linear_head", lambda *_: False)
    _, full = train(teacher, student, blocks, alpha=alpha, divergence=divergence)
    assert losses == pytest.approx(full, rel=1e-4)


def test_distill_uses_it_for_gpt2(teacher, blocks, monkeypatch):
    calls = []
    loss = distillation.chunked_distillation_loss
    monkeypatch.setattr(
        distillation, "chunked_distillation_loss", lambda **kw: calls.append(1) or loss(**kw)
    )
    train(teacher, kd.student_from_teacher(teacher), blocks, epochs=1)
    assert len(calls) == 6


def test_a_student_whose_head_has_a_bias_takes_the_full_logits_loss(teacher, blocks):
    width, vocabulary = teacher.config.n_embd, teacher.config.vocab_size
    assert has_linear_head(teacher, blocks.train[:1])
    student = kd.student_from_teacher(teacher)
    biased = torch.nn.Linear(width, vocabulary)
    torch.nn.init.normal_(biased.bias)
    student.set_output_embeddings(biased)
    assert not has_linear_head(student, blocks.train[:1])
    _, losses = train(teacher, student, blocks, epochs=3)
    assert losses[-1] < losses[0]


def test_capped_logits_take_the_full_logits_loss(teacher, blocks):
    teacher.register_forward_hook(
        lambda _module, _inputs, out: out.__setitem__("logits", 3 * torch.tanh(out.logits / 3))
    )
    with torch.no_grad():
        teacher.lm_head.weight.mul_(20)
    assert not has_linear_head(teacher, blocks.train[:1])


def test_gradient_checkpointing_changes_nothing_but_memory(make_gpt2, blocks):
    teacher, student = make_gpt2(initializer_range=0.15), make_gpt2(layers=2, seed=1)
    _, usual = train(teacher, student, blocks)
    asked = []
    student.transformer.h[0].mlp.register_forward_pre_hook(lambda *_: asked.append(1))
    _, losses = train(teacher, student, blocks, gradient_checkpointing=True)
    assert losses == pytest.approx(usual, rel=1e-5)
    with_it = len(asked)
    train(teacher, student, blocks)
    assert with_it == len(asked) - with_it + 12  # the forward pass of each of the 12 steps, again
