"""Soft labels: distributions whose order stays and whose entropy follows the temperature."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import willows_kd as kd

EXAMPLES = settings(max_examples=30, deadline=None, derandomize=True)
shapes = st.lists(st.integers(1, 5), max_size=2).flatmap(
    lambda leading: st.integers(2, 40).map(lambda vocabulary: (*leading, vocabulary))
)
temperatures = st.floats(0.05, 100)
seeds = st.integers(0, 2**16)


def random_logits(*shape: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@EXAMPLES
@given(shapes, temperatures, seeds)
def test_soft_labels_are_distributions_over_the_vocabulary(shape, temperature, seed):
    soft = kd.soften(random_logits(*shape, seed=seed), temperature)
    assert soft.shape == shape
    assert (soft >= 0).all()
    assert torch.allclose(soft.sum(dim=-1), torch.ones(shape[:-1]))


def test_soft_labels_are_the_softmax_written_out():
    logits = [2.0, 1.0, -1.0]
    weights = [math.exp(z / 4) for z in logits]
    expected = torch.tensor([weight / sum(weights) for weight in weights])
    assert torch.allclose(kd.soften(torch.tensor(logits), 4), expected)


@EXAMPLES
@given(shapes, temperatures, seeds)
def test_a_temperature_keeps_the_order_of_the_tokens(shape, temperature, seed):
    logits = random_logits(*shape, seed=seed)
    in_order = kd.soften(logits, temperature).gather(-1, logits.argsort(dim=-1))
    assert (in_order.diff(dim=-1) >= 0).all()


def test_a_high_temperature_makes_all_tokens_equally_likely():
    soft = kd.soften(random_logits(4, 50), 1e6)
    assert torch.allclose(soft, torch.full((4, 50), 1 / 50), atol=1e-6)


def test_a_low_temperature_leaves_only_the_first_choice():
    logits = random_logits(4, 50)
    first_choice = torch.nn.functional.one_hot(logits.argmax(dim=-1), 50).float()
    assert torch.allclose(kd.soften(logits, 1e-3), first_choice, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_softened_in_float32(dtype):
    logits = random_logits(3, 50).to(dtype)
    soft = kd.soften(logits, 2)
    assert soft.dtype == torch.float32
    assert torch.equal(soft, kd.soften(logits.float(), 2))


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("function", [kd.soften, lambda logits, t: kd.top_k(logits, 2, t)])
def test_a_temperature_that_no_softmax_can_take_is_refused(function, temperature):
    with pytest.raises(ValueError, match=f"temperature is {temperature}; it must be a positive"):
        function(random_logits(5), temperature)


@pytest.mark.parametrize("vocabulary", [2, 50, 4096])
def test_the_entropy_of_no_idea_is_the_logarithm_of_the_vocabulary(vocabulary):
    uniform = torch.full((vocabulary,), 1 / vocabulary)
    assert kd.entropy(uniform).item() == pytest.approx(math.log(vocabulary), rel=1e-5)


def test_the_entropy_of_a_hard_label_is_zero():
    assert torch.equal(kd.entropy(torch.eye(5)), torch.zeros(5))


def test_the_entropy_of_a_worked_example_is_in_nats():
    expected = 0.5 * math.log(2) + 2 * 0.25 * math.log(4)
    assert kd.entropy(torch.tensor([0.5, 0.25, 0.25])).item() == pytest.approx(expected)


@EXAMPLES
@given(shapes, seeds)
def test_the_entropy_grows_with_the_temperature(shape, seed):
    logits = random_logits(*shape, seed=seed).double()
    by_temperature = torch.stack([kd.entropy(kd.soften(logits, t)) for t in (0.5, 1, 2, 5, 20)])
    assert by_temperature.shape == (5, *shape[:-1])
    assert (by_temperature.diff(dim=0) >= -1e-6).all()
    assert (by_temperature <= math.log(shape[-1]) + 1e-5).all()


@EXAMPLES
@given(shapes, temperatures, seeds)
def test_the_top_k_and_the_rest_are_the_whole_mass(shape, temperature, seed):
    k = 1 + seed % shape[-1]
    top = kd.top_k(random_logits(*shape, seed=seed), k, temperature)
    assert top.probabilities.shape == top.tokens.shape == (*shape[:-1], k)
    assert top.rest.shape == shape[:-1]
    assert (top.rest >= 0).all()
    assert torch.allclose(top.probabilities.sum(dim=-1) + top.rest, torch.ones(shape[:-1]))


def test_the_top_k_are_the_likeliest_tokens_in_falling_order():
    logits = torch.log(torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15]))
    top = kd.top_k(logits, k=3)
    assert top.tokens.tolist() == [1, 3, 4]
    assert top.probabilities.tolist() == pytest.approx([0.4, 0.3, 0.15])
    assert top.rest.item() == pytest.approx(0.15)


def test_the_top_k_are_the_same_tokens_at_every_temperature():
    logits = random_logits(6, 50)
    chosen = [kd.top_k(logits, 10, temperature).tokens for temperature in (0.5, 1, 2, 10)]
    assert all(torch.equal(tokens, chosen[0]) for tokens in chosen)
