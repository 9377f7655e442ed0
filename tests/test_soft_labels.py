"""Soft labels: distributions whose order stays and whose entropy follows the temperature."""

import math

import numpy as np
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_softened_in_float32(dtype):
    logits = random_logits(3, 50).to(dtype)
    soft = kd.soften(logits, 2)
    assert soft.dtype == torch.float32
    assert kd.soften(logits.double()).dtype == torch.float64
    assert torch.equal(soft, kd.soften(logits.float(), 2))


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("function", [kd.soften, lambda logits, t: kd.top_k(logits, 2, t)])
def test_a_temperature_that_no_softmax_can_take_is_refused(function, temperature):
    with pytest.raises(ValueError, match=f"temperature is {temperature}; it must be a positive"):
        function(random_logits(5), temperature)


def test_tokens_of_minus_infinity_have_no_probability_and_change_nothing_else():
    logits = random_logits(4, 10).double()
    cut = torch.cat([logits, torch.full((4, 3), -math.inf)], dim=-1)
    assert torch.equal(kd.soften(cut, 2)[:, :10], kd.soften(logits, 2))
    assert torch.equal(kd.entropy(kd.soften(cut, 2)), kd.entropy(kd.soften(logits, 2)))
    assert kd.top_k(cut, 13).probabilities[:, 10:].tolist() == [[0, 0, 0]] * 4


@pytest.mark.parametrize("k", [0, 51, 2.0, True])
def test_a_k_that_the_vocabulary_does_not_have_is_refused(k):
    with pytest.raises(kd.InputError, match=f"k is {k}; it must be a whole number from 1 to 50"):
        kd.top_k(random_logits(50), k)


def test_numbers_of_numpy_are_numbers():
    logits = random_logits(50)
    found, expected = kd.top_k(logits, np.int64(50), np.float32(2)), kd.top_k(logits, 50, 2)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_what_is_no_number_or_no_tensor_is_refused():
    with pytest.raises(kd.InputError, match="temperature is '2'; it must be a positive"):
        kd.soften(random_logits(5), "2")
    with pytest.raises(kd.InputError, match="logits are a list; give a tensor"):
        kd.soften([1.0, 2.0])


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
