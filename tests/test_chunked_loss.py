"""The chunked loss equals the full-logits loss, in a fraction of its memory."""

import copy
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import willows_kd as kd
from willows_kd.cost import MemoryWatch
from willows_kd.losses import DIVERGENCES, divergence_of, hard_label_loss, log_softened, mix
from willows_kd.scale import chunked_loss as module
from willows_kd.scale import linear_head
from willows_kd.scale.chunked_loss import CLOSED_FORMS, chunked_distillation_loss
from willows_kd.scale.linear_head import has_linear_head

EXAMPLES = settings(max_examples=50, deadline=None, derandomize=True)
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
    divergence = divergence_of(kd.DistillConfig(divergence=name, **parameters))
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
    skew=st.sampled_from([0.1, 0.9]),
    chunk=st.sampled_from([None, 1, 3, 7]),
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
        asked = teacher if alpha < 1 else (None, None)  # hard labels alone need no teacher
        loss, soft, hard = chunked_distillation_loss(
            *student, *asked, labels, *how, chunk, **parameters
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


@pytest.mark.parametrize("divergence", sorted(set(DIVERGENCES) - {"reverse_kl"}))
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (torch.float16, 5e-3)])
def test_in_every_precision_it_is_the_float64_loss_but_for_rounding(divergence, dtype, rounding):
    """Some tokens are cut from the teacher, so that the reverse KL is infinite."""
    student, teacher, labels = inputs(64, 300, 16, 16, 0, dtype)
    teacher[0][:, 0] = 1
    teacher[1][:40, 0] = -INF
    how = 2.0, 0.3, divergence
    found = with_gradients(
        chunked_distillation_loss(*student, *teacher, labels, *how, chunk=10)[0], student
    )
    exact = [[x.detach().double() for x in pair] for pair in (student, teacher)]
    exact[0] = [x.requires_grad_() for x in exact[0]]
    wanted = with_gradients(full_logits_loss(*exact, labels, *how)[0], exact[0])
    assert [x.dtype for x in found] == [torch.float32, dtype, dtype]
    for one, other in zip(found, wanted, strict=True):
        assert other.isfinite().all()
        assert (one.double() - other).norm() <= rounding * other.norm()


def test_infinities_of_tokens_that_do_not_count_do_not_spread_and_the_teacher_gets_no_gradient():
    student, teacher, labels = inputs(6, 10, 4, 4, 0, torch.float64)
    with torch.no_grad():
        student[0][2] = teacher[0][2] = torch.inf
    teacher = [x.requires_grad_() for x in teacher]
    mask = torch.arange(6) != 2
    loss, soft, hard = chunked_distillation_loss(*student, *teacher, labels, mask=mask.long())
    loss.backward()
    assert all(x.grad.isfinite().all() for x in student)
    assert all(x.grad is None for x in teacher)
    assert not soft.requires_grad and not hard.requires_grad
    blocks = [student[0].view(3, 2, 4), student[1], teacher[0].view(3, 2, 4), teacher[1]]
    again = chunked_distillation_loss(*blocks, labels.view(3, 2), mask=mask.view(3, 2))
    assert again[0] == loss


@pytest.mark.parametrize("name", CLOSED_FORMS)
@pytest.mark.parametrize(
    "cut", [(), (0,), (1,), (0, 1)], ids=["none", "student", "teacher", "both"]
)
def test_a_closed_form_is_the_divergence_and_its_gradient_that_of_autograd(name, cut):
    """A KL is infinite, and has no gradient, if its second distribution alone rules out tokens."""
    logits = 2 * torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(0)).double()
    for model in cut:
        logits[model, ..., :3] = -INF
    student, parameters = logits[0].requires_grad_(), {"beta": 0.3, "skew": 0.2}
    logs = log_softened(student, logits[1], 1.0)
    value, found = CLOSED_FORMS[name](*logs, **parameters)
    wanted = divergence_of(kd.DistillConfig(divergence=name, **parameters))(student, logits[1])
    assert value.mean().item() == pytest.approx(wanted.item(), rel=1e-12)
    infinite = (name, cut) in (("forward_kl", (0,)), ("reverse_kl", (1,)))
    assert wanted.isinf() == infinite
    if not infinite:
        expected = torch.autograd.grad(value.sum(), student)[0]
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        assert expected.abs().sum() > 0.1


def test_its_defaults_are_those_of_the_settings():
    student, teacher, labels = inputs(6, 10, 4, 4, 0, torch.float64)
    wanted = full_logits_loss(student, teacher, labels, 1.0, 0.0, "forward_kl")[0]
    found = chunked_distillation_loss(*student, *teacher, labels)[0]
    assert found.item() == pytest.approx(wanted.item(), rel=1e-12)


def test_a_second_backward_pass_is_refused():
    student, teacher, labels = inputs(6, 10, 4, 4, 0, torch.float64)
    loss = chunked_distillation_loss(*student, *teacher, labels)[0]
    loss.backward(retain_graph=True)
    once = [x.grad.clone() for x in student]
    with pytest.raises(RuntimeError, match="hands out its gradients once"):
        loss.backward()
    assert all(torch.equal(x.grad, first) for x, first in zip(student, once, strict=True))


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_under_autocast_the_products_are_in_half_precision_and_the_gradients_in_float32(alpha):
    student, teacher, labels = inputs(64, 300, 16, 16, 0, torch.float32)
    teacher = teacher if alpha < 1 else (None, None)
    how = labels, 2.0, alpha, "forward_kl", None, 10
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(chunked_distillation_loss(*student, *teacher, *how)[0], student)
    halves = [x.detach().bfloat16().requires_grad_() for x in student]
    taught = [x if x is None else x.bfloat16() for x in teacher]
    expected = with_gradients(chunked_distillation_loss(*halves, *taught, *how)[0], halves)
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"divergence": "hinge"}, "'hinge'; it must be one of forward_kl, reverse_kl, "),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"divergence": "jensen_shannon", "beta": 1}, "beta is 1"),
        ({"labels": torch.zeros(5).long()}, r"token ids \(torch.long\) of shape \(6,\)"),
        ({"teacher_hidden": torch.zeros(5, 4)}, r"has \(6,\) tokens .* teacher \(5,\) tokens"),
        ({"teacher_head": torch.zeros(9, 4)}, "and 10 logits each, the teacher .* and 9 logits"),
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
    chunked_distillation_loss(*student, *teacher, labels, chunk=5)
    assert sizes == [4, 4, 4] + [6, 6] + [1] * 12 + [4, 4, 4]  # as few and as equal as can be


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


def train(teacher, student, blocks, loss=kd.ChunkedLoss, **changes):
    student = copy.deepcopy(student)
    config = kd.DistillConfig(**{"epochs": 1, "batch_size": 4} | changes)
    return [row["loss"] for row in kd.distill(teacher, student, blocks, config, loss=loss)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"alpha": 0.4, "divergence": "jensen_shannon", "beta": 0.2, "hidden_weight": 0.5},
        {"alpha": 1.0, "hidden_weight": 1.0, "hidden_layers": [(0, 0), (1, 2)]},
    ],
    ids=str,
)
def test_distill_trains_the_same_student_with_it_and_without(
    make_gpt2, blocks, monkeypatch, changes
):
    teacher, student = make_gpt2(initializer_range=0.15), make_gpt2(layers=1, seed=1)
    calls, chunked = [], linear_head.chunked_distillation_loss
    monkeypatch.setattr(
        linear_head, "chunked_distillation_loss", lambda **kw: calls.append(1) or chunked(**kw)
    )
    losses = train(teacher, student, blocks, **changes)
    assert len(calls) == 6
    assert losses == pytest.approx(train(teacher, student, blocks, None, **changes), rel=1e-4)


def test_logits_that_are_more_than_a_product_take_the_full_logits_loss(make_gpt2, blocks):
    teacher, student = make_gpt2(initializer_range=0.15), make_gpt2(layers=1, seed=1)
    student.set_output_embeddings(torch.nn.Linear(32, teacher.config.vocab_size))  # a bias
    assert not has_linear_head(student, blocks.train[:1])
    assert train(teacher, student, blocks) == train(teacher, student, blocks, None)

    assert has_linear_head(teacher, blocks.train[:1])
    teacher.register_forward_hook(
        lambda _module, _inputs, out: out.__setitem__("logits", 3 * torch.tanh(out.logits / 3))
    )
    assert not has_linear_head(teacher, blocks.train[:1])


def test_gradient_checkpointing_changes_nothing_but_memory(make_gpt2, blocks):
    teacher, student = make_gpt2(initializer_range=0.15), make_gpt2(layers=2, seed=1)
    asked, losses, passes = [], [], []
    student.transformer.h[0].mlp.register_forward_pre_hook(lambda *_: asked.append(1))
    for checkpointing in (False, True):
        losses.append(train(teacher, student, blocks, gradient_checkpointing=checkpointing))
        passes.append(len(asked))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert passes[1] == 2 * passes[0] + 6  # the forward pass of each of the 6 steps, again
