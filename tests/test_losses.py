"""The losses: equal to the formulas on paper, to autograd, and to PyTorch's own."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import willows_kd as kd
from willows_kd.losses import DIVERGENCES

EXAMPLES = settings(max_examples=25, deadline=None, derandomize=True)
shapes = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(2, 40))
temperatures = st.floats(0.5, 50)
seeds = st.integers(0, 2**16)

every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
# the power of T that makes up for what a gradient loses to the temperature
POWERS = {"forward_kl": 2, "reverse_kl": 2, "jensen_shannon": 2, "total_variation": 1}


def random_logits(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def two(*shape: int, seed: int = 0, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a student and of a teacher."""
    logits = random_logits(2, *shape, seed=seed, scale=scale)
    return logits[0].requires_grad_(), logits[1]


def gradient(loss: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, student)[0]


MASK = torch.tensor([[1, 1, 0, 1], [0, 0, 1, 0]], dtype=torch.bool)


# -- equal to the formulas on paper ----------------------------------------------------


def kl_on_paper(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def js_on_paper(p: list[float], q: list[float]) -> float:
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return kl_on_paper(p, middle) / 2 + kl_on_paper(q, middle) / 2


ON_PAPER = {
    "forward_kl": kl_on_paper,
    "reverse_kl": lambda p, q: kl_on_paper(q, p),
    "jensen_shannon": js_on_paper,
    "total_variation": lambda p, q: sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2,
}


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.5, 1, 2, 7])
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
def test_a_divergence_is_its_formula_averaged_over_the_counted_tokens(name, temperature, mask):
    student, teacher = two(2, 4, 11)
    counted = torch.ones(2, 4, dtype=torch.bool) if mask is None else mask
    per_token = [
        ON_PAPER[name](
            kd.soften(teacher[row, i], temperature).double().tolist(),
            kd.soften(student[row, i], temperature).double().tolist(),
        )
        for row, i in counted.nonzero().tolist()
    ]
    expected = temperature ** POWERS[name] * sum(per_token) / len(per_token)
    loss = DIVERGENCES[name](student, teacher, temperature, mask)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_forward_kl_to_the_last_digit_of_float64():
    student, teacher = two(5, 9)
    p, q = torch.softmax(teacher / 3, dim=-1), torch.softmax(student / 3, dim=-1)
    by_hand = 9 * (p * (p / q).log()).sum(dim=-1).mean()
    assert kd.forward_kl(student, teacher, 3).item() == pytest.approx(by_hand.item(), rel=1e-12)


@EXAMPLES
@given(shapes, temperatures, seeds)
def test_both_kls_are_those_of_torch_distributions(shape, temperature, seed):
    student, teacher = two(*shape, seed=seed)
    q, p = (torch.distributions.Categorical(logits=z / temperature) for z in (student, teacher))
    for loss, first, second in [(kd.forward_kl, p, q), (kd.reverse_kl, q, p)]:
        expected = temperature**2 * torch.distributions.kl_divergence(first, second).mean().item()
        assert loss(student, teacher, temperature).item() == pytest.approx(expected, rel=1e-7)


@EXAMPLES
@given(shapes, temperatures, seeds)
def test_reverse_kl_is_forward_kl_with_the_roles_exchanged(shape, temperature, seed):
    student, teacher = two(*shape, seed=seed)
    reverse = kd.reverse_kl(student, teacher, temperature)
    assert torch.equal(reverse, kd.forward_kl(teacher, student, temperature))


# -- gradients -------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("temperature", [0.5, 1, 2, 10])
def test_the_gradient_of_forward_kl_is_the_closed_form(temperature, mask):
    student, teacher = two(2, 4, 11)
    counted = torch.ones(2, 4, dtype=torch.bool) if mask is None else mask
    q, p = (torch.softmax(z.detach() / temperature, dim=-1) for z in (student, teacher))
    expected = temperature * (q - p) * counted[..., None] / counted.sum()
    found = gradient(kd.forward_kl(student, teacher, temperature, mask), student)
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-12)


@every_divergence
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
@pytest.mark.parametrize("temperature", [1, 3])
def test_autograd_agrees_with_finite_differences(divergence, temperature, mask):
    student, teacher = two(2, 4, 5)
    assert torch.autograd.gradcheck(lambda z: divergence(z, teacher, temperature, mask), student)


@every_divergence
def test_the_teacher_gets_no_gradient(divergence):
    student, teacher = two(2, 4, 11)
    teacher.requires_grad_()
    divergence(student, teacher, 2).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@pytest.mark.parametrize("name", DIVERGENCES)
def test_gradients_keep_their_size_as_the_temperature_grows(name):
    student, teacher = two(2, 4, 50, scale=0.1)
    losses = [DIVERGENCES[name](student, teacher, temperature) for temperature in range(1, 51)]
    sizes = [gradient(loss, student).norm().item() for loss in losses]
    assert max(sizes) / min(sizes) < 1.1


@pytest.mark.parametrize("name", DIVERGENCES)
def test_without_their_power_of_t_gradients_would_fall_as_it_grows(name):
    student, teacher = two(2, 4, 50, scale=0.1)
    cold, hot = (DIVERGENCES[name](student / t, teacher / t) for t in (1, 50))
    fall = gradient(cold, student).norm() / gradient(hot, student).norm()
    assert fall.item() == pytest.approx(50 ** POWERS[name], rel=0.1)


@pytest.mark.parametrize("name", DIVERGENCES)
@EXAMPLES
@given(shape=shapes, temperature=temperatures, seed=seeds)
def test_a_temperature_divides_the_logits_and_multiplies_by_its_power(
    name, shape, temperature, seed
):
    student, teacher = two(*shape, seed=seed)
    at_one = DIVERGENCES[name](student / temperature, teacher / temperature)
    expected = temperature ** POWERS[name] * at_one.item()
    found = DIVERGENCES[name](student, teacher, temperature)
    assert found.item() == pytest.approx(expected, rel=1e-9)


# -- what every divergence has ---------------------------------------------------------


@every_divergence
@EXAMPLES
@given(shape=shapes, temperature=temperatures, seed=seeds)
def test_a_student_that_equals_its_teacher_has_nothing_to_learn(
    divergence, shape, temperature, seed
):
    student, _ = two(*shape, seed=seed)
    loss = divergence(student, student.detach().clone(), temperature)
    assert loss.item() == pytest.approx(0, abs=1e-10)
    assert gradient(loss, student).abs().max().item() == pytest.approx(0, abs=1e-10)


@every_divergence
@EXAMPLES
@given(shape=shapes, temperature=temperatures, seed=seeds)
def test_any_other_student_is_above_zero(divergence, shape, temperature, seed):
    student, teacher = two(*shape, seed=seed)
    assert divergence(student, teacher, temperature) > 0


@every_divergence
@EXAMPLES
@given(shape=shapes, temperature=temperatures, seed=seeds)
def test_a_constant_added_to_all_logits_changes_nothing(divergence, shape, temperature, seed):
    student, teacher = two(*shape, seed=seed)
    moved = divergence(student + 7, teacher - 5, temperature)
    assert moved.item() == pytest.approx(divergence(student, teacher, temperature).item())


@every_divergence
def test_the_mean_is_taken_over_tokens_and_not_over_the_batch(divergence):
    student, teacher = two(2, 4, 11)
    once = divergence(student, teacher, 2).item()
    for dim in (0, 1):
        twice = divergence(torch.cat([student] * 2, dim), torch.cat([teacher] * 2, dim), 2)
        assert twice.item() == pytest.approx(once)


@every_divergence
def test_leading_dimensions_do_not_matter(divergence):
    student, teacher = two(2, 4, 11)
    flat = divergence(student.flatten(0, 1), teacher.flatten(0, 1), 2)
    assert flat.item() == pytest.approx(divergence(student, teacher, 2).item())


@every_divergence
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_compared_in_float32(divergence, dtype):
    student, teacher = (z.detach().to(dtype) for z in two(2, 4, 500))
    loss = divergence(student, teacher, 2)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, divergence(student.float(), teacher.float(), 2))


@every_divergence
@pytest.mark.parametrize("teacher_shape", [(2, 4, 12), (2, 5, 11), (4, 11), (1, 4, 11)])
def test_logits_of_different_shapes_are_refused_with_both_named(divergence, teacher_shape):
    with pytest.raises(ValueError) as error:
        divergence(random_logits(2, 4, 11), random_logits(*teacher_shape))
    assert "(2, 4, 11)" in str(error.value)
    assert str(teacher_shape) in str(error.value)


@every_divergence
@pytest.mark.parametrize("temperature", [0, -1.0, math.nan, math.inf, -math.inf])
def test_a_temperature_that_no_softmax_can_take_is_refused(divergence, temperature):
    with pytest.raises(ValueError, match=f"temperature is {temperature}; it must be a positive"):
        divergence(random_logits(2, 4, 11), random_logits(2, 4, 11), temperature)


# -- the mask --------------------------------------------------------------------------


@every_divergence
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_only_counted_tokens_count(divergence, dtype):
    student, teacher = two(2, 4, 11)
    masked = divergence(student, teacher, 2, MASK.to(dtype))
    assert masked.item() == pytest.approx(divergence(student[MASK], teacher[MASK], 2).item())
    assert gradient(masked, student)[~MASK].abs().sum() == 0


@every_divergence
@pytest.mark.parametrize("whose", ["student", "teacher"])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e30])
def test_what_a_masked_token_holds_has_no_effect(divergence, whose, poison):
    clean = two(2, 4, 11)
    logits = {"student": clean[0].detach().clone(), "teacher": clean[1].clone()}
    logits[whose][~MASK] = poison
    loss = divergence(logits["student"].requires_grad_(), logits["teacher"], 2, MASK)
    expected = divergence(*clean, 2, MASK)
    assert torch.equal(loss, expected)


@every_divergence
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf, 1e30])
def test_what_a_masked_token_holds_has_no_effect_on_the_gradient(divergence, poison):
    student, teacher = two(2, 4, 11)
    expected = gradient(divergence(student, teacher, 2, MASK), student)
    teacher[~MASK] = poison
    assert torch.equal(gradient(divergence(student, teacher, 2, MASK), student), expected)


@every_divergence
def test_where_no_token_counts_the_loss_is_zero_and_so_is_the_gradient(divergence):
    student, teacher = two(2, 4, 11)
    loss = divergence(student, teacher, 2, torch.zeros(2, 4, dtype=torch.bool))
    assert loss == 0
    assert gradient(loss, student).abs().sum() == 0


# -- what only some have ---------------------------------------------------------------


@EXAMPLES
@given(shapes, temperatures, st.floats(0.01, 0.99), seeds)
def test_jensen_shannon_exchanges_the_roles_with_its_weights(shape, temperature, beta, seed):
    student, teacher = two(*shape, seed=seed)
    found = kd.jensen_shannon(student, teacher, temperature, beta=beta)
    exchanged = kd.jensen_shannon(teacher, student, temperature, beta=1 - beta)
    assert found.item() == pytest.approx(exchanged.item(), rel=1e-8)


@EXAMPLES
@given(shapes, seeds)
def test_jensen_shannon_is_at_most_log_2_and_total_variation_at_most_1(shape, seed):
    student, teacher = two(*shape, seed=seed, scale=100)
    assert kd.jensen_shannon(student, teacher) <= math.log(2) + 1e-12
    assert kd.total_variation(student, teacher) <= 1 + 1e-12


def test_models_with_no_token_in_common_reach_the_bounds():
    student, teacher = 1000 * torch.eye(2), 1000 * torch.eye(2).flip(0)
    assert kd.jensen_shannon(student, teacher).item() == pytest.approx(math.log(2))
    assert kd.total_variation(student, teacher).item() == pytest.approx(1)


@pytest.mark.parametrize(("kl", "beta"), [(kd.forward_kl, 1e-6), (kd.reverse_kl, 1 - 1e-6)])
def test_jensen_shannon_tends_to_zero_at_its_ends_and_divided_by_its_weight_to_a_kl(kl, beta):
    student, teacher = two(2, 4, 11, scale=1)
    found = kd.jensen_shannon(student, teacher, 2, beta=beta).item()
    assert found == pytest.approx(0, abs=1e-4)
    assert found / min(beta, 1 - beta) == pytest.approx(kl(student, teacher, 2).item(), rel=1e-3)


@pytest.mark.parametrize("beta", [0, 1, -0.1, 1.1, math.nan])
def test_the_ends_of_jensen_shannon_are_refused(beta):
    with pytest.raises(ValueError, match=f"beta is {beta}; it must lie between 0 and 1, both ex"):
        kd.jensen_shannon(*two(2, 4, 11), beta=beta)


# -- hard labels, the mix, the shift ---------------------------------------------------


@EXAMPLES
@given(shapes, seeds)
def test_the_hard_label_loss_is_cross_entropy(shape, seed):
    student, _ = two(*shape, seed=seed)
    labels = torch.arange(shape[0] * shape[1]).view(shape[:2]) % shape[2]
    expected = F.cross_entropy(student.transpose(1, 2), labels)
    assert kd.hard_label_loss(student, labels).item() == pytest.approx(expected.item())


def test_the_hard_label_loss_of_a_worked_example():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    expected = -(math.log(0.25) + math.log(0.8)) / 2
    assert kd.hard_label_loss(logits, torch.tensor([1, 2])).item() == pytest.approx(expected)


def test_the_hard_label_loss_is_forward_kl_from_a_one_hot_teacher():
    student, _ = two(2, 4, 11)
    labels = torch.arange(8).view(2, 4)
    certain = 1000.0 * F.one_hot(labels, 11).double()
    loss = kd.hard_label_loss(student, labels)
    assert loss.item() == pytest.approx(kd.forward_kl(student, certain).item())


@pytest.mark.parametrize("poison", [0.0, math.nan, math.inf])
def test_the_hard_label_loss_honours_the_mask(poison):
    student, _ = two(2, 4, 11)
    labels = torch.arange(8).view(2, 4)
    expected = F.cross_entropy(student[MASK], labels[MASK])
    poisoned = torch.where(MASK[..., None], student, poison)
    assert kd.hard_label_loss(poisoned, labels, MASK).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_hard_label_loss_of_half_precision_logits_is_taken_in_float32(dtype):
    logits, labels = random_logits(2, 4, 11).to(dtype), torch.arange(8).view(2, 4)
    loss = kd.hard_label_loss(logits, labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, kd.hard_label_loss(logits.float(), labels))


@pytest.mark.parametrize(("alpha", "expected"), [(0, 10.0), (1, 2.0), (0.25, 8.0), (0.5, 6.0)])
def test_alpha_weighs_the_hard_labels(alpha, expected):
    assert kd.mix(torch.tensor(2.0), torch.tensor(10.0), alpha).item() == expected


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan, math.inf])
def test_an_alpha_that_is_no_weight_is_refused(alpha):
    with pytest.raises(ValueError, match=f"alpha is {alpha}; it must lie between 0"):
        kd.mix(1.0, 2.0, alpha)


def test_a_prediction_is_paired_with_the_token_that_comes_next():
    ids = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    knows_the_next = 50.0 * F.one_hot(ids.roll(-1, dims=1), 10)
    logits, labels = kd.shift(knows_the_next, ids)
    assert logits.shape == (2, 4, 10)
    assert labels.tolist() == [[1, 4, 1, 5], [2, 6, 5, 3]]
    assert kd.hard_label_loss(logits, labels).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("offset", [0, 1], ids=["the same token", "the token before"])
def test_a_model_that_knows_any_other_token_is_wrong_everywhere(offset):
    ids = torch.tensor([[3, 1, 4, 2, 5], [9, 2, 6, 5, 3]])
    knows_another = 50.0 * F.one_hot(ids.roll(offset, dims=1), 10)
    assert kd.hard_label_loss(*kd.shift(knows_another, ids)).item() == pytest.approx(50)
