"""Soft labels and losses: equal to the formulas on paper, infinities and masks included."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import willows_kd as kd
from willows_kd import losses
from willows_kd.losses import DIVERGENCES, divergence_of

INF = math.inf
MASK = torch.tensor([[1, 1, 0, 1], [0, 0, 1, 0]], dtype=torch.bool)
LABELS = torch.arange(8).view(2, 4)
# the power of T that makes up for what a gradient loses to the temperature
POWERS = dict.fromkeys(DIVERGENCES, 2) | {"total_variation": 1}
# whose logits are -inf for the first three tokens of the vocabulary
CUTS = {"nobody": (), "teacher": (1,), "student": (0,), "both": (0, 1)}

each_divergence = pytest.mark.parametrize("name", DIVERGENCES)


def two(*shape: int, cut: str = "nobody", scale: float = 2.0, dtype=torch.float64):
    """Logits of a student, which take gradients, and of a teacher."""
    logits = scale * torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    for model in CUTS[cut]:
        logits[model, ..., :3] = -INF
    return logits[0].to(dtype).requires_grad_(), logits[1].to(dtype)


def gradient(loss: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, student)[0]


@pytest.mark.parametrize("temperature", [0.05, 1, 2.5, 100])
def test_soft_labels_are_the_softmax_and_the_top_k_and_the_rest_are_all_of_it(temperature):
    """Tokens whose logit is -inf have no probability and no part in the entropy."""
    logits = two(3, 20, cut="student", dtype=torch.float32)[0].detach()
    paper = [softmax_on_paper(row, temperature) for row in logits.tolist()]
    soft = kd.soften(logits, temperature)
    torch.testing.assert_close(soft, torch.tensor(paper))
    entropies = [sum(-p * math.log(p) for p in row if p) for row in paper]
    torch.testing.assert_close(kd.entropy(soft), torch.tensor(entropies))
    for k in (1, 7, 20):
        top = kd.top_k(logits, k, temperature)
        expected = [sorted(row, reverse=True) for row in paper]
        torch.testing.assert_close(top.probabilities, torch.tensor(expected)[:, :k])
        assert (top.rest >= 0).all()
        torch.testing.assert_close(top.probabilities.sum(dim=-1) + top.rest, torch.ones(3))


def test_the_top_k_of_a_worked_example_and_what_is_usual():
    top = kd.top_k(torch.log(torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])), k=np.int64(3))
    assert top.tokens.tolist() == [1, 3, 4]
    assert top.probabilities.tolist() == pytest.approx([0.4, 0.3, 0.15])
    assert top.rest.item() == pytest.approx(0.15)
    logits = two(20)[0].detach()
    assert torch.equal(kd.top_k(logits).probabilities, kd.top_k(logits, 10, 1).probabilities)
    assert torch.equal(kd.soften(logits), kd.soften(logits, 1))


# -- the formulas on paper, in Python's own numbers ------------------------------------


def softmax_on_paper(logits: list[float], temperature: float) -> list[float]:
    weights = [math.exp((z - max(logits)) / temperature) for z in logits]
    return [weight / sum(weights) for weight in weights]


def kl_on_paper(p: list[float], q: list[float]) -> float:
    return sum((a * math.log(a / b) if b else INF) for a, b in zip(p, q, strict=True) if a)


def mixture_on_paper(p: list[float], q: list[float], weight: float) -> list[float]:
    return [weight * a + (1 - weight) * b for a, b in zip(p, q, strict=True)]


def js_on_paper(p: list[float], q: list[float], beta: float = 0.5) -> float:
    middle = mixture_on_paper(p, q, beta)
    return beta * kl_on_paper(p, middle) + (1 - beta) * kl_on_paper(q, middle)


ON_PAPER = {
    "forward_kl": kl_on_paper,
    "reverse_kl": lambda p, q: kl_on_paper(q, p),
    "jensen_shannon": js_on_paper,
    "skewed_forward_kl": lambda p, q, skew=0.1: kl_on_paper(p, mixture_on_paper(p, q, skew)),
    "skewed_reverse_kl": lambda p, q, skew=0.1: kl_on_paper(q, mixture_on_paper(q, p, skew)),
    "total_variation": lambda p, q: sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2,
}
OWN = {"jensen_shannon": {"beta": 0.2}} | dict.fromkeys(
    ("skewed_forward_kl", "skewed_reverse_kl"), {"skew": 0.3}
)


def on_paper(name, student, teacher, temperature=1.0, mask=None, **own) -> float:
    counted = torch.ones(student.shape[:-1]) if mask is None else mask
    per_token = [
        ON_PAPER[name](
            softmax_on_paper(teacher[place].tolist(), temperature),
            softmax_on_paper(student[place].tolist(), temperature),
            **own,
        )
        for place in map(tuple, counted.nonzero().tolist())
    ]
    return temperature ** POWERS[name] * sum(per_token) / len(per_token)


def gradient_on_paper(name, student, teacher, *how, **own) -> torch.Tensor:
    """Central differences of the formula; 0 for logits of -inf."""
    student, slopes = student.detach().clone(), torch.zeros_like(student)
    for place in map(tuple, student.isfinite().nonzero().tolist()):
        z, sides = student[place].item(), []
        for moved in (z + 1e-5, z - 1e-5):
            student[place] = moved
            sides.append(on_paper(name, student, teacher, *how, **own))
        student[place] = z
        slopes[place] = (sides[0] - sides[1]) / 2e-5
    return slopes


@each_divergence
@pytest.mark.parametrize("cut", CUTS)
def test_a_divergence_is_its_formula_averaged_over_the_counted_tokens(name, cut):
    """Infinite only for a KL, if its first distribution alone has mass; its slope is finite."""
    student, teacher = two(2, 4, 5, cut=cut)
    for how, own in [((), {}), ((0.5, MASK), {}), ((3.0, MASK), OWN.get(name, {}))]:
        loss = getattr(losses, name)(student, teacher, *how, **own)
        paper = on_paper(name, student, teacher, *how, **own)
        assert loss.item() == pytest.approx(paper, rel=1e-12)
        infinite = (name, cut) in [("reverse_kl", "teacher"), ("forward_kl", "student")]
        assert loss.isinf() == infinite
        if cut != "student" and not infinite:
            expected = gradient_on_paper(name, student, teacher, *how, **own)
            torch.testing.assert_close(gradient(loss, student), expected, rtol=1e-6, atol=1e-8)


@each_divergence
def test_in_lower_precision_only_the_logits_are_rounded(name):
    cut = "both" if name == "reverse_kl" else "teacher"
    student, teacher = two(2, 4, 500, cut=cut, dtype=torch.bfloat16)
    loss = getattr(losses, name)(student, teacher, 2.0)
    exact = student.detach().double().requires_grad_()
    expected = getattr(losses, name)(exact, teacher.double(), 2.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    found, slopes = gradient(loss, student), gradient(expected, exact)
    torch.testing.assert_close(found.double(), slopes, rtol=0.02, atol=1e-7)


@each_divergence
def test_a_probability_too_small_for_the_precision_counts_as_zero(name):
    student = torch.tensor([[0.0, 1.0, -500.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, 2.0, -INF]])
    pairs = [(student, teacher), (student[:, :2], teacher[:, :2])]
    loss, without = (getattr(losses, name)(*logits) for logits in pairs)
    assert loss.item() == pytest.approx(without.item(), rel=1e-6)
    assert gradient(loss, student).isfinite().all()


# -- what every divergence has ---------------------------------------------------------


@each_divergence
def test_a_match_is_zero_and_the_teacher_gets_no_gradient(name):
    student, teacher = two(2, 4, 40)
    loss = getattr(losses, name)(student, student.detach().clone(), 2.0)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert gradient(loss, student).abs().max().item() == pytest.approx(0, abs=1e-12)
    teacher.requires_grad_()
    getattr(losses, name)(student, teacher, 2).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@each_divergence
def test_gradients_keep_their_size_as_the_temperature_grows(name):
    student, teacher = two(2, 4, 50, scale=0.1)
    found = [getattr(losses, name)(student, teacher, temperature) for temperature in (1, 3, 50)]
    sizes = [gradient(loss, student).norm().item() for loss in found]
    assert max(sizes) / min(sizes) < 1.1


@each_divergence
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_what_a_masked_token_holds_has_no_effect(name, dtype):
    student, teacher = two(2, 4, 11)
    divergence = getattr(losses, name)
    expected = divergence(student[MASK], teacher[MASK], 2)
    slopes = gradient(expected, student)
    for poison in (1e30, math.nan, INF, -INF):
        poisoned = [torch.where(MASK[..., None], z.detach(), poison) for z in (student, teacher)]
        poisoned[0].requires_grad_()
        loss = divergence(*poisoned, 2, MASK.to(dtype))
        assert loss.item() == pytest.approx(expected.item())
        torch.testing.assert_close(gradient(loss, poisoned[0]), slopes)
    nothing = divergence(student, teacher, 2, torch.zeros(2, 4, dtype=dtype))
    assert nothing == gradient(nothing, student).abs().sum() == 0


@each_divergence
def test_settings_name_a_divergence_with_its_own_parameter(name):
    logits, function = two(4, 11), getattr(losses, name)
    plain = divergence_of(kd.DistillConfig(divergence=name))(*logits, 1.0, None)
    assert plain == function(*logits)
    changed = divergence_of(kd.DistillConfig(divergence=name, beta=0.2, skew=0.3))(*logits)
    assert changed == function(*logits, **OWN.get(name, {}))
    assert (changed != plain) == (name in OWN)


# -- hidden states, hard labels, the mix, the shift ------------------------------------


@pytest.mark.parametrize("poison", [0.0, math.nan, INF])
def test_the_cosine_distance_and_its_gradient_are_their_closed_forms_whatever_is_masked(poison):
    """1 - cos and (cos · s/|s| - t/|t|) / |s|, over the tokens that count; none for the teacher."""
    student, teacher = two(2, 4, 11)
    length = student.norm(dim=-1, keepdim=True)
    s, t = student / length, teacher / teacher.norm(dim=-1, keepdim=True)
    cosine = (s * t).sum(dim=-1, keepdim=True)
    expected = (cosine * s - t) / length * MASK[..., None] / MASK.sum()
    given = [torch.where(MASK[..., None], h.detach(), poison) for h in (student, teacher)]
    given = [h.requires_grad_() for h in given]
    loss = kd.cosine_distance(*given, MASK)
    torch.testing.assert_close(loss, (1 - cosine)[MASK].mean(), rtol=1e-10, atol=0)
    found = torch.autograd.grad(loss, given, allow_unused=True)
    torch.testing.assert_close(found[0], expected.detach(), rtol=1e-10, atol=1e-12)
    assert found[1] is None
    assert kd.cosine_distance(*given, torch.zeros(2, 4)) == 0


@pytest.mark.parametrize("poison", [0.0, math.nan, INF])
def test_the_hard_label_loss_is_cross_entropy_and_honours_the_mask(poison):
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    expected = -(math.log(0.25) + math.log(0.8)) / 2
    assert kd.hard_label_loss(logits, torch.tensor([1, 2])).item() == pytest.approx(expected)
    student, _ = two(2, 4, 11)
    expected = F.cross_entropy(student[MASK], LABELS[MASK])
    poisoned = torch.where(MASK[..., None], student, poison)
    assert kd.hard_label_loss(poisoned, LABELS, MASK).item() == pytest.approx(expected.item())


def test_half_precision_is_taken_further_in_float32():
    student, teacher = two(2, 4, 11, dtype=torch.bfloat16)
    for loss, given in (
        (kd.hard_label_loss, LABELS),
        (kd.soften, 2),
        (kd.cosine_distance, teacher),
    ):
        found = loss(student, given)
        assert found.dtype == torch.float32
        assert torch.equal(found, loss(student.float(), given))


@pytest.mark.parametrize(("alpha", "expected"), [(0, 10.0), (1, 2.0), (0.25, 8.0)])
def test_alpha_weighs_the_hard_labels(alpha, expected):
    assert losses.mix(torch.tensor(2.0), torch.tensor(10.0), alpha).item() == expected


def test_a_prediction_is_paired_with_the_token_that_comes_next():
    ids = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    logits, labels = kd.shift(50.0 * F.one_hot(ids.roll(-1, dims=1), 10), ids)
    assert labels.tolist() == logits.argmax(dim=-1).tolist() == [[1, 4, 1, 5], [2, 6, 5, 3]]
