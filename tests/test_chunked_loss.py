"""The chunked loss equals the full-logits loss, in a fraction of its memory."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import willows_kd as kd
from willows_kd import distillation
from willows_kd.chunked_loss import chunked_loss
from willows_kd.config import DIVERGENCE_NAMES
from willows_kd.cost import MemoryWatch
from willows_kd.losses import DIVERGENCES, hard_label_loss, mix
from willows_kd.models import has_linear_head

EXAMPLES = settings(max_examples=150, deadline=None, derandomize=True)


def inputs(tokens, vocabulary, width, teacher_width, seed, dtype):
    """Hidden states, heads and labels; those of the student take gradients."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    student = [normal(tokens, width), normal(vocabulary, width)]
    teacher = [normal(tokens, teacher_width), normal(vocabulary, teacher_width)]
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    return [x.requires_grad_() for x in student], teacher, labels


def full_logits_loss(student, teacher, labels, temperature, alpha, divergence, mask=None):
    """The losses of `losses.py`, on logits."""
    logits, teacher_logits = student[0] @ student[1].T, teacher[0] @ teacher[1].T
    soft = DIVERGENCES[divergence](logits, teacher_logits, temperature, mask)
    hard = hard_label_loss(logits, labels, mask)
    return mix(hard, soft, alpha), soft, hard


def with_gradients(loss, student):
    return [loss.detach(), *torch.autograd.grad(loss, student)]


@EXAMPLES
@given(
    shape=st.tuples(st.integers(1, 24), st.integers(2, 40), st.integers(1, 9), st.integers(1, 9)),
    temperature=st.sampled_from([0.5, 1.0, 2.0, 7.5]),
    alpha=st.sampled_from([0.0, 0.3, 1.0]),
    divergence=st.sampled_from(DIVERGENCE_NAMES),
    chunk=st.one_of(st.none(), st.integers(1, 30)),
    masked=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_it_is_the_full_logits_loss(shape, temperature, alpha, divergence, chunk, masked, seed):
    student, teacher, labels = inputs(*shape, seed, torch.float64)
    mask = torch.rand(shape[0], generator=torch.Generator().manual_seed(seed)) >= masked
    how = temperature, alpha, divergence, mask
    loss, soft, hard = chunked_loss(*student, *teacher, labels, *how, chunk)
    wanted, wanted_soft, wanted_hard = full_logits_loss(student, teacher, labels, *how)
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(
        with_gradients(3 * loss, student), with_gradients(3 * wanted, student), **close
    )
    if alpha < 1:
        torch.testing.assert_close(soft, wanted_soft.detach(), **close)
    if alpha > 0:
        torch.testing.assert_close(hard, wanted_hard.detach(), **close)


@pytest.mark.parametrize("divergence", DIVERGENCE_NAMES)
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_in_lower_precision_it_is_the_float64_loss_but_for_rounding(divergence, dtype, close):
    student, teacher, labels = inputs(64, 300, 16, 16, 0, dtype)
    how = 2.0, 0.3, divergence
    found = with_gradients(chunked_loss(*student, *teacher, labels, *how, chunk=10)[0], student)
    exact = [[x.detach().double() for x in pair] for pair in (student, teacher)]
    exact[0] = [x.requires_grad_() for x in exact[0]]
    wanted = with_gradients(full_logits_loss(*exact, labels, *how)[0], exact[0])
    assert [x.dtype for x in found] == [torch.float32, dtype, dtype]
    for one, other in zip(found, wanted, strict=True):
        assert (one.double() - other).norm() <= close * other.norm()


def test_it_is_zero_with_no_gradient_where_the_student_equals_the_teacher():
    student, _, labels = inputs(10, 30, 6, 6, 0, torch.float64)
    teacher = [x.detach().clone() for x in student]
    for divergence in DIVERGENCE_NAMES:
        loss, *_ = chunked_loss(*student, *teacher, labels, 2.0, 0.0, divergence)
        for value in with_gradients(loss, student):
            torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-14)


def test_infinities_where_the_mask_is_false_do_not_spread():
    student, teacher, labels = inputs(6, 10, 4, 4, 0, torch.float64)
    with torch.no_grad():
        student[0][2] = teacher[0][2] = torch.inf
    mask = torch.arange(6) != 2
    found = with_gradients(chunked_loss(*student, *teacher, labels, mask=mask)[0], student)
    assert all(value.isfinite().all() for value in found)


def test_leading_dimensions_are_tokens_too():
    student, teacher, labels = inputs(12, 10, 4, 4, 0, torch.float64)
    flat = chunked_loss(*student, *teacher, labels, 2.0, 0.5)[0]
    blocks = [student[0].view(3, 4, 4), student[1], teacher[0].view(3, 4, 4), teacher[1]]
    assert chunked_loss(*blocks, labels.view(3, 4), 2.0, 0.5)[0] == flat


def test_hard_labels_alone_need_no_teacher():
    student, _, labels = inputs(12, 10, 4, 4, 0, torch.float64)
    loss, soft, hard = chunked_loss(*student, None, None, labels, alpha=1.0)
    assert soft == 0
    assert loss == hard > 0


def test_an_unknown_divergence_is_named():
    student, teacher, labels = inputs(2, 3, 2, 2, 0, torch.float64)
    with pytest.raises(ValueError, match="'hinge'; it must be one of forward_kl"):
        chunked_loss(*student, *teacher, labels, divergence="hinge")


def test_its_memory_does_not_grow_by_the_vocabulary_with_the_tokens():
    vocabulary, width, most = 30_000, 32, {}
    for tokens in (200, 800):
        student, teacher, labels = inputs(tokens, vocabulary, width, width, 0, torch.float32)
        with MemoryWatch() as watch:
            chunked_loss(*student, *teacher, labels, 2.0, chunk=20)[0].backward()
        most[tokens] = watch.most
    assert most[800] - most[200] < 4 * 600 * width * 4  # hidden states, their gradient, masks
    assert most[800] < 800 * vocabulary * 4  # one tensor of logits would be more than all


# -- in the loop -----------------------------------------------------------------------


def train(teacher, student, blocks, **changes):
    student = copy.deepcopy(student)
    config = kd.DistillConfig(**{"epochs": 2, "batch_size": 4} | changes)
    return student, [row["loss"] for row in kd.distill(teacher, student, blocks, config)]


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("divergence", DIVERGENCE_NAMES)
def test_distill_trains_the_same_student_with_it_and_without(
    make_gpt2, blocks, monkeypatch, alpha, divergence
):
    teacher, student = make_gpt2(initializer_range=0.15), make_gpt2(layers=1, seed=1)
    _, losses = train(teacher, student, blocks, alpha=alpha, divergence=divergence)
    monkeypatch.setattr(distillation, "has_linear_head", lambda *_: False)
    _, plain = train(teacher, student, blocks, alpha=alpha, divergence=divergence)
    assert losses == pytest.approx(plain, rel=1e-4)


def test_distill_uses_it_for_gpt2(teacher, blocks, monkeypatch):
    calls = []
    loss = distillation.chunked_loss
    monkeypatch.setattr(distillation, "chunked_loss", lambda **kw: calls.append(1) or loss(**kw))
    train(teacher, kd.student_from_teacher(teacher), blocks, epochs=1)
    assert len(calls) == 6


def test_a_head_with_a_bias_does_not_stream_and_trains_all_the_same(teacher, blocks):
    width, vocabulary = teacher.config.n_embd, teacher.config.vocab_size
    assert has_linear_head(teacher, blocks.train[:1])
    student = kd.student_from_teacher(teacher)
    biased = torch.nn.Linear(width, vocabulary)
    torch.nn.init.normal_(biased.bias)
    student.set_output_embeddings(biased)
    assert not has_linear_head(student, blocks.train[:1])
    _, losses = train(teacher, student, blocks, epochs=3)
    assert losses[-1] < losses[0]


def test_logits_that_are_capped_do_not_stream(teacher, blocks):
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
