"""The losses: equal to the formulas on paper, infinities and masks included."""

import inspect
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import willows_kd as kd
from willows_kd.losses import DIVERGENCES, kl, log_softened

INF = math.inf
MASK = torch.tensor([[1, 1, 0, 1], [0, 0, 1, 0]], dtype=torch.bool)
# the power of T that makes up for what a gradient loses to the temperature
POWERS = {
    "forward_kl": 2,
    "reverse_kl": 2,
    "jensen_shannon": 2,
    "skewed_forward_kl": 2,
    "skewed_reverse_kl": 2,
    "total_variation": 1,
}
# whose logits are -inf for the first three tokens of the vocabulary
CUTS = {"nobody": (), "teacher": (1,), "student": (0,), "both": (0, 1)}

each_divergence = pytest.mark.parametrize("name", POWERS)
each_cut = pytest.mark.parametrize("cut", CUTS)


def two(*shape: int, cut: str = "nobody", scale: float = 2.0, dtype=torch.float64):
    """Logits of a student, which take gradients, and of a teacher."""
    logits = scale * torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    for model in CUTS[cut]:
        logits[model, ..., :3] = -INF
    return logits[0].to(dtype).requires_grad_(), logits[1].to(dtype)


def gradient(loss: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, student)[0]


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
    "skewed_forward_kl": lambda p, q: kl_on_paper(p, mixture_on_paper(p, q, 0.1)),
    "skewed_reverse_kl": lambda p, q: kl_on_paper(q, mixture_on_paper(q, p, 0.1)),
    "total_variation": lambda p, q: sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2,
}


def on_paper(name, student, teacher, temperature=1.0, mask=None) -> float:
    counted = torch.ones(student.shape[:-1]) if mask is None else mask
    per_token = [
        ON_PAPER[name](
            softmax_on_paper(teacher[place].tolist(), temperature),
            softmax_on_paper(student[place].tolist(), temperature),
        )
        for place in map(tuple, counted.nonzero().tolist())
    ]
    return temperature ** POWERS[name] * sum(per_token) / len(per_token)


def gradient_on_paper(name, student, teacher, *how) -> torch.Tensor:
    """Central differences of the formula; 0 for logits of -inf."""
    student, slopes = student.detach().clone(), torch.zeros_like(student)
    for place in map(tuple, student.isfinite().nonzero().tolist()):
        z, sides = student[place].item(), []
        for moved in (z + 1e-5, z - 1e-5):
            student[place] = moved
            sides.append(on_paper(name, student, teacher, *how))
        student[place] = z
        slopes[place] = (sides[0] - sides[1]) / 2e-5
    return slopes


# -- equal to the formulas -------------------------------------------------------------


@each_divergence
@each_cut
def test_a_divergence_is_its_formula_averaged_over_the_counted_tokens(name, cut):
    student, teacher = two(2, 4, 9, cut=cut)
    for how in [(), (0.5, MASK), (3.0, MASK)]:
        found = getattr(kd, name)(student, teacher, *how).item()
        assert found == pytest.approx(on_paper(name, student, teacher, *how), rel=1e-12)


def test_only_a_kl_is_infinite_and_only_if_its_first_distribution_alone_has_mass():
    infinite = {
        cut: [name for name in POWERS if getattr(kd, name)(*two(4, 9, cut=cut)) == INF]
        for cut in CUTS
    }
    assert infinite == {
        "nobody": [],
        "teacher": ["reverse_kl"],
        "student": ["forward_kl"],
        "both": [],
    }


@each_cut
def test_the_kl_of_log_probabilities_is_its_formula(cut):
    p, q = (torch.softmax(z.detach(), dim=-1) for z in two(9, cut=cut))
    expected = kl_on_paper(p.tolist(), q.tolist())
    assert kl(p.log(), q.log()).item() == pytest.approx(expected, rel=1e-12)


@each_divergence
@pytest.mark.parametrize("cut", ["nobody", "teacher", "both"])
def test_its_gradient_is_the_slope_of_the_formula(name, cut):
    if (name, cut) == ("reverse_kl", "teacher"):
        pytest.skip("infinite")
    student, teacher = two(2, 4, 9, cut=cut)
    for how in [(1.0, None), (3.0, MASK)]:
        found = gradient(getattr(kd, name)(student, teacher, *how), student)
        expected = gradient_on_paper(name, student, teacher, *how)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@each_divergence
@each_cut
def test_the_closed_form_of_the_gradient_is_that_of_autograd(name, cut):
    """In float64; where the divergence is infinite it has no gradient to compare."""
    divergence = DIVERGENCES[name]
    student, teacher = two(6, 9, cut=cut)
    logs = log_softened(student, teacher, 1.0)
    value, closed_form = divergence.formula(*logs, **divergence.parameters)
    if (name, cut) != ("reverse_kl", "teacher"):
        expected = gradient(value.sum(), student)
        torch.testing.assert_close(closed_form(), expected, rtol=1e-10, atol=1e-12)
        assert expected.abs().sum() > 0.1


@each_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_in_lower_precision_only_the_logits_are_rounded(name, dtype):
    cut = "both" if name == "reverse_kl" else "teacher"
    student, teacher = two(2, 4, 500, cut=cut, dtype=dtype)
    loss = getattr(kd, name)(student, teacher, 2.0)
    exact = student.detach().double().requires_grad_()
    expected = getattr(kd, name)(exact, teacher.double(), 2.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    found, slopes = gradient(loss, student), gradient(expected, exact)
    assert found.dtype == dtype
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), slopes, rtol=2 * rounding + 1e-5, atol=1e-7)


@each_divergence
def test_a_probability_too_small_for_the_precision_counts_as_zero(name):
    student = torch.tensor([[0.0, 1.0, -500.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, 2.0, -INF]])
    loss, without = (
        getattr(kd, name)(*logits)
        for logits in [(student, teacher), (student[:, :2], teacher[:, :2])]
    )
    assert loss.item() == pytest.approx(without.item(), rel=1e-6)
    assert gradient(loss, student).isfinite().all()


# -- what every divergence has ---------------------------------------------------------


@each_divergence
def test_a_student_that_equals_its_teacher_has_nothing_to_learn(name):
    student, _ = two(2, 4, 40)
    loss = getattr(kd, name)(student, student.detach().clone(), 2.0)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert gradient(loss, student).abs().max().item() == pytest.approx(0, abs=1e-12)


@each_divergence
def test_the_teacher_gets_no_gradient(name):
    student, teacher = two(2, 4, 11)
    teacher.requires_grad_()
    getattr(kd, name)(student, teacher, 2).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


@each_divergence
def test_gradients_keep_their_size_as_the_temperature_grows(name):
    student, teacher = two(2, 4, 50, scale=0.1)
    losses = [getattr(kd, name)(student, teacher, temperature) for temperature in range(1, 51)]
    sizes = [gradient(loss, student).norm().item() for loss in losses]
    assert max(sizes) / min(sizes) < 1.1


def test_logits_of_different_shapes_are_refused_with_both_named():
    for shape in [(2, 4, 12), (4, 11), (1, 4, 11)]:
        with pytest.raises(kd.InputError) as error:
            kd.forward_kl(torch.zeros(2, 4, 11), torch.zeros(shape))
        assert "student's logits have shape (2, 4, 11)" in str(error.value)
        assert f"teacher's {shape}; they must be equal" in str(error.value)


@each_divergence
def test_a_temperature_that_no_softmax_can_take_is_refused(name):
    with pytest.raises(kd.InputError, match="temperature is 0; it must be a positive"):
        getattr(kd, name)(*two(4, 11), 0)


def test_numbers_of_numpy_are_numbers():
    student, teacher = two(4, 11, dtype=torch.float32)
    found = kd.mix(
        kd.jensen_shannon(student, teacher, np.float32(2), beta=np.float64(0.25)),
        kd.forward_kl(student, teacher, np.float64(2)),
        alpha=np.float64(0.5),
    )
    parts = kd.jensen_shannon(student, teacher, 2, beta=0.25), kd.forward_kl(student, teacher, 2)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(sum(parts).item() / 2)


# -- the mask --------------------------------------------------------------------------


@each_divergence
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_what_a_masked_token_holds_has_no_effect(name, dtype):
    student, teacher = two(2, 4, 11)
    divergence = getattr(kd, name)
    expected = divergence(student[MASK], teacher[MASK], 2)
    slopes = gradient(expected, student)
    for poison in (1e30, math.nan, INF, -INF):
        poisoned = [torch.where(MASK[..., None], z.detach(), poison) for z in (student, teacher)]
        poisoned[0].requires_grad_()
        loss = divergence(*poisoned, 2, MASK.to(dtype))
        assert loss.item() == pytest.approx(expected.item())
        torch.testing.assert_close(gradient(loss, poisoned[0]), slopes)


@each_divergence
def test_if_no_token_counts_the_loss_is_zero_and_so_is_the_gradient(name):
    student, teacher = two(2, 4, 11)
    loss = getattr(kd, name)(student, teacher, 2, torch.zeros(2, 4, dtype=torch.bool))
    assert loss == 0
    assert gradient(loss, student).abs().sum() == 0


def test_the_loss_of_one_token_that_counts_is_its_own():
    student, teacher = two(2, 4, 11)
    only = torch.zeros(2, 4, dtype=torch.bool)
    only[1, 2] = True
    torch.testing.assert_close(
        kd.forward_kl(student, teacher, 2, only), kd.forward_kl(student[1, 2], teacher[1, 2], 2)
    )


def test_a_mask_of_another_shape_is_refused_with_both_named():
    with pytest.raises(kd.InputError, match=r"has shape \(4, 2\); it must have \(2, 4\)"):
        kd.forward_kl(*two(2, 4, 11), mask=MASK.T)


# -- the registry, and what only some have ---------------------------------------------


def test_each_entry_of_the_registry_is_a_public_function_with_its_parameters():
    assert DIVERGENCES.keys() == POWERS.keys()
    usual = {"temperature": 1.0, "mask": None}
    for name, divergence in DIVERGENCES.items():
        arguments = inspect.signature(getattr(kd, name)).parameters.values()
        defaults = {one.name: one.default for one in list(arguments)[2:]}
        assert defaults == usual | divergence.parameters


def test_parameters_change_the_divergences_that_have_them_and_no_other():
    logits = two(4, 11)
    for name, divergence in DIVERGENCES.items():
        changed = divergence.with_parameters(beta=0.1, skew=0.5)
        differs = changed(*logits, 1.0) != divergence(*logits, 1.0)
        assert differs == (name in ("jensen_shannon", "skewed_forward_kl", "skewed_reverse_kl"))
        assert divergence.with_parameters() == divergence


def test_jensen_shannon_weighs_the_teacher_with_beta():
    student, teacher = two(4, 11)
    p, q = (softmax_on_paper(z[0].tolist(), 1) for z in (teacher, student))
    found = kd.jensen_shannon(student[:1], teacher[:1], beta=0.2)
    assert found.item() == pytest.approx(js_on_paper(p, q, 0.2), rel=1e-12)


def test_models_with_no_token_in_common_reach_the_bounds():
    student, teacher = 1000 * torch.eye(2), 1000 * torch.eye(2).flip(0)
    assert kd.jensen_shannon(student, teacher).item() == pytest.approx(math.log(2))
    assert kd.total_variation(student, teacher).item() == pytest.approx(1)


@pytest.mark.parametrize(("other", "beta"), [(kd.forward_kl, 1e-6), (kd.reverse_kl, 1 - 1e-6)])
def test_jensen_shannon_tends_to_zero_at_its_ends_and_divided_by_its_weight_to_a_kl(other, beta):
    student, teacher = two(2, 4, 11, scale=1)
    found = kd.jensen_shannon(student, teacher, 2, beta=beta).item()
    assert found == pytest.approx(0, abs=1e-4)
    assert found / min(beta, 1 - beta) == pytest.approx(other(student, teacher, 2).item(), rel=1e-3)


@pytest.mark.parametrize("beta", [0, 1, -0.1, 1.1, math.nan])
def test_the_ends_of_jensen_shannon_are_refused(beta):
    with pytest.raises(kd.InputError, match=f"beta is {beta}; it must lie between 0 and 1, both"):
        kd.jensen_shannon(*two(2, 4, 11), beta=beta)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.8])
def test_jensen_shannon_is_a_mix_of_the_skewed_kls(beta):
    student, teacher = two(2, 4, 11)
    parts = (
        beta * kd.skewed_forward_kl(student, teacher, 2, MASK, skew=beta),
        (1 - beta) * kd.skewed_reverse_kl(student, teacher, 2, MASK, skew=1 - beta),
    )
    whole = kd.jensen_shannon(student, teacher, 2, MASK, beta=beta)
    assert whole.item() == pytest.approx(sum(parts).item(), rel=1e-12)
    torch.testing.assert_close(gradient(whole, student), gradient(sum(parts), student))


@pytest.mark.parametrize("direction", ["forward_kl", "reverse_kl"])
@each_cut
def test_without_skew_a_skewed_kl_is_the_plain_one_and_with_a_little_close_to_it(direction, cut):
    student, teacher = two(4, 11, cut=cut)
    plain, skewed = DIVERGENCES[direction], DIVERGENCES[f"skewed_{direction}"]
    expected = plain(student, teacher, 2)
    assert torch.equal(skewed.with_parameters(skew=0)(student, teacher, 2), expected)
    little = skewed.with_parameters(skew=1e-6)(student, teacher, 2)
    assert little.isfinite()
    assert expected.isinf() or little.item() == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize("divergence", [kd.skewed_forward_kl, kd.skewed_reverse_kl])
def test_a_skewed_kl_of_models_with_no_token_in_common_is_its_bound(divergence):
    student, teacher = 1000 * torch.eye(2), 1000 * torch.eye(2).flip(0)
    assert divergence(student, teacher, skew=0.3).item() == pytest.approx(-math.log(0.3))


@pytest.mark.parametrize("skew", [1, -0.1, 1.1, math.nan])
def test_a_skew_that_leaves_nothing_to_compare_is_refused(skew):
    for divergence in (kd.skewed_forward_kl, kd.skewed_reverse_kl):
        with pytest.raises(kd.InputError, match=f"skew is {skew}; it must be at least 0"):
            divergence(*two(2, 4, 11), skew=skew)


@pytest.mark.parametrize(
    ("beta", "ours"), [(0, kd.forward_kl), (0.5, kd.jensen_shannon), (1, kd.reverse_kl)]
)
def test_trls_gkd_loss_is_this_one_without_the_factor_of_the_temperature(beta, ours):
    theirs = pytest.importorskip("trl.experimental.gkd").GKDTrainer.generalized_jsd_loss
    student, teacher = two(2, 4, 11)
    labels = torch.where(MASK, 1, -100)
    for temperature in (1.0, 3.0):
        expected = theirs(student, teacher, labels, beta=beta, temperature=temperature)
        found = ours(student, teacher, temperature, MASK) / temperature**2
        assert found.item() == pytest.approx(expected.item(), rel=1e-10)
        torch.testing.assert_close(gradient(found, student), gradient(expected, student))


# -- hidden states ---------------------------------------------------------------------


def test_the_cosine_distance_of_worked_examples():
    teacher = torch.tensor([[3.0, 0, 0], [1, 1, 0], [0, 2, 0], [0, 0, 1]])
    student = torch.tensor([[6.0, 0, 0], [1, 0, 0], [0, 0, 5], [0, 0, -1]])
    expected = [0, 1 - math.sqrt(0.5), 1, 2]
    each = [kd.cosine_distance(s, t).item() for s, t in zip(student, teacher, strict=True)]
    assert each == pytest.approx(expected, abs=1e-6)
    mask = torch.tensor([0, 1, 1, 0])
    found = kd.cosine_distance(student, teacher, mask).item()
    assert found == pytest.approx(sum(expected[1:3]) / 2)


def test_the_gradient_of_the_cosine_distance_is_its_closed_form():
    """(cos · s/|s| - t/|t|) / |s|, over the tokens that count; the teacher gets none."""
    student, teacher = two(2, 4, 11)
    teacher.requires_grad_()
    found = torch.autograd.grad(
        kd.cosine_distance(student, teacher, MASK), [student, teacher], allow_unused=True
    )
    length = student.norm(dim=-1, keepdim=True)
    s, t = student / length, teacher / teacher.norm(dim=-1, keepdim=True)
    expected = ((s * t).sum(dim=-1, keepdim=True) * s - t) / length * MASK[..., None] / MASK.sum()
    torch.testing.assert_close(found[0], expected.detach(), rtol=1e-10, atol=1e-12)
    assert found[1] is None


def test_the_cosine_distance_is_zero_at_equality_and_in_float32_at_least():
    student, teacher = two(2, 4, 11, dtype=torch.bfloat16)
    same = kd.cosine_distance(teacher.clone().requires_grad_(), teacher)
    assert same.item() == pytest.approx(0, abs=1e-6)
    found = kd.cosine_distance(student, teacher)
    assert found.dtype == torch.float32
    assert torch.equal(found, kd.cosine_distance(student.float(), teacher.float()))


@pytest.mark.parametrize("poison", [0.0, math.nan, INF])
def test_the_cosine_distance_honours_the_mask(poison):
    student, teacher = two(2, 4, 11)
    expected = gradient(kd.cosine_distance(student[MASK], teacher[MASK]), student)
    poisoned = [torch.where(MASK[..., None], h.detach(), poison) for h in (student, teacher)]
    poisoned[0].requires_grad_()
    found = gradient(kd.cosine_distance(*poisoned, MASK), poisoned[0])
    torch.testing.assert_close(found, expected)
    nothing = kd.cosine_distance(*poisoned, torch.zeros(2, 4))
    assert nothing == 0
    assert gradient(nothing, poisoned[0]).abs().sum() == 0


def test_hidden_states_of_different_widths_are_refused_with_both_named():
    with pytest.raises(kd.InputError) as error:
        kd.cosine_distance(torch.zeros(2, 4, 8), torch.zeros(2, 4, 12))
    assert str(error.value) == (
        "the student's hidden states have shape (2, 4, 8), the teacher's (2, 4, 12); "
        "they must be equal"
    )


# -- hard labels, the mix, the shift ---------------------------------------------------


def test_the_hard_label_loss_of_a_worked_example():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    expected = -(math.log(0.25) + math.log(0.8)) / 2
    assert kd.hard_label_loss(logits, torch.tensor([1, 2])).item() == pytest.approx(expected)


def test_the_hard_label_loss_is_forward_kl_from_a_teacher_that_has_one_token_left():
    student, _ = two(2, 4, 11)
    labels = torch.arange(8).view(2, 4)
    certain = torch.zeros(2, 4, 11).scatter(-1, labels[..., None], 1).log().double()
    losses = kd.hard_label_loss(student, labels), kd.forward_kl(student, certain)
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-12)
    torch.testing.assert_close(*(gradient(loss, student) for loss in losses))


@pytest.mark.parametrize("poison", [0.0, math.nan, INF])
def test_the_hard_label_loss_honours_the_mask(poison):
    student, _ = two(2, 4, 11)
    labels = torch.arange(8).view(2, 4)
    expected = F.cross_entropy(student[MASK], labels[MASK])
    poisoned = torch.where(MASK[..., None], student, poison)
    assert kd.hard_label_loss(poisoned, labels, MASK).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_hard_label_loss_of_half_precision_logits_is_taken_in_float32(dtype):
    student, _ = two(2, 4, 11, dtype=dtype)
    labels = torch.arange(8).view(2, 4)
    loss = kd.hard_label_loss(student, labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, kd.hard_label_loss(student.float(), labels))


@pytest.mark.parametrize("labels", [torch.zeros(4, 2).long(), torch.zeros(2, 4)])
def test_labels_that_are_no_token_ids_or_not_one_for_each_token_are_refused(labels):
    with pytest.raises(kd.InputError, match=r"must be token ids \(torch.long\) of shape \(2, 4\)"):
        kd.hard_label_loss(torch.zeros(2, 4, 11), labels)


@pytest.mark.parametrize(("alpha", "expected"), [(0, 10.0), (1, 2.0), (0.25, 8.0)])
def test_alpha_weighs_the_hard_labels(alpha, expected):
    assert kd.mix(torch.tensor(2.0), torch.tensor(10.0), alpha).item() == expected


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_an_alpha_that_is_no_weight_is_refused(alpha):
    with pytest.raises(kd.InputError, match=f"alpha is {alpha}; it must lie between 0"):
        kd.mix(1.0, 2.0, alpha)


def test_a_prediction_is_paired_with_the_token_that_comes_next():
    ids = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    knows_the_next = 50.0 * F.one_hot(ids.roll(-1, dims=1), 10)
    logits, labels = kd.shift(knows_the_next, ids)
    assert logits.shape == (2, 4, 10)
    assert labels.tolist() == [[1, 4, 1, 5], [2, 6, 5, 3]]
    assert kd.hard_label_loss(logits, labels).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("shapes", [((2, 5, 10), (2, 4)), ((5, 10), (5,))])
def test_logits_that_do_not_go_with_the_ids_are_refused_with_both_named(shapes):
    with pytest.raises(kd.InputError) as error:
        kd.shift(torch.zeros(shapes[0]), torch.zeros(shapes[1]).long())
    assert f"logits of shape {shapes[0]} do not go with ids of shape {shapes[1]}" in str(
        error.value
    )
