"""Few bits: the rounding is right, reaches every matrix, and can be trained through."""

import copy
from dataclasses import replace

import pytest
import torch
from families import random_teacher
from torch import nn
from transformers.pytorch_utils import Conv1D

import willows_kd as kd
from conftest import logits
from willows_kd.compress.quantization import quantize
from willows_kd.distillation import DistillationLoss
from willows_kd.models import load_model, merge_adapters
from willows_kd.scale.linear_head import ChunkedLoss, has_linear_head

MATRIX = torch.tensor([[1.0, -3.0, 0.4], [0.0, 0.0, 0.0], [-70.0, 10.0, 35.0]])


@pytest.fixture(scope="module")
def student():
    """The bundled student."""
    return kd.load_bundled("student", "cpu")


def test_a_row_becomes_integers_times_its_scale():
    integers, scale = quantize(MATRIX, bits=3)
    assert integers.dtype == torch.int8
    assert integers.tolist() == [[1, -3, 0], [0, 0, 0], [-3, 0, 2]]
    torch.testing.assert_close(scale, torch.tensor([[1.0], [0.0], [70 / 3]]))


@pytest.mark.parametrize(("bits", "dim"), [(2, 0), (4, 1), (8, 0)])
def test_each_channel_uses_all_its_integers_and_is_off_by_half_a_step(bits, dim):
    weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(bits))
    integers, scale = quantize(weight, bits, dim)
    assert scale.shape == ((20, 1), (1, 30))[dim]
    assert (integers.abs().amax(dim=1 - dim) == 2 ** (bits - 1) - 1).all()
    assert ((integers * scale - weight).abs() <= 0.5001 * scale).all()


def test_the_gradient_goes_straight_through_the_rounding():
    weight = MATRIX.clone().requires_grad_()
    rounded = kd.fake_quantize(weight, bits=3)
    integers, scale = quantize(MATRIX, bits=3)
    torch.testing.assert_close(rounded, integers * scale)
    slope = torch.arange(9.0).reshape(3, 3)
    (gradient,) = torch.autograd.grad((rounded * slope).sum(), weight)
    assert torch.equal(gradient, slope)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_every_matrix_is_rounded_along_its_inputs(family, student, ids):
    student = random_teacher("llama") if family == "llama" else student
    by_hand, before = copy.deepcopy(student), kd.fingerprint(student)
    rounded = {}
    for module in by_hand.modules():
        if isinstance(module, nn.Linear | nn.Embedding | Conv1D):
            inputs = 0 if isinstance(module, Conv1D) else 1
            scale = module.weight.data.abs().amax(inputs, keepdim=True) / 7
            rounded[id(module.weight)] = module.weight, (module.weight / scale).round() * scale
    for weight, values in rounded.values():
        weight.data = values.data
    model = kd.quantized(student, bits=4)
    torch.testing.assert_close(logits(model, ids), logits(by_hand, ids), rtol=1e-4, atol=1e-4)
    assert kd.fingerprint(student) == before


def test_the_quantized_size_counts_bits_scales_and_the_rest(student):
    expected = 0
    for name, weight in student.named_parameters():
        channels = weight.shape[1] if ".h." in name and weight.ndim == 2 else len(weight)
        expected += weight.numel() * 3 / 8 + 4 * channels if weight.ndim == 2 else weight.nbytes
    assert kd.quantized_size(kd.quantized(student, 3)) == expected
    assert kd.quantized_size(student) == 4 * student.num_parameters()


def test_what_is_saved_is_a_usual_model_of_rounded_weights(student, tokenizer, ids, tmp_path):
    model = kd.quantized(student, bits=3)
    kd.save_model(model, tokenizer, tmp_path / "saved")
    loaded = load_model(tmp_path / "saved", "cpu").eval()
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), rtol=0, atol=1e-4)
    assert not any("parametrizations" in name for name in loaded.state_dict())
    assert kd.quantized_size(model) < 0.2 * kd.size_on_disk(student), "saving takes no rounding out"
    assert kd.fingerprint(loaded) == kd.fingerprint(model)
    merged = merge_adapters(model)
    assert merged.lm_head.weight is merged.transformer.wte.weight
    assert type(merged.lm_head) is nn.Linear


def test_distillation_repairs_what_the_rounding_broke(teacher, student, blocks):
    few = replace(blocks, train=blocks.train[:8], validation=blocks.validation[:1])
    model, before = kd.quantized(student, bits=3), kd.fingerprint(teacher)
    start = kd.evaluate(model, few.train, teacher=teacher)["kl_to_teacher"]
    kd.distill(teacher, model, few, kd.DistillConfig(epochs=3, learning_rate=3e-4))
    assert kd.evaluate(model, few.train, teacher=teacher)["kl_to_teacher"] < 0.9 * start
    assert kd.fingerprint(teacher) == before
    integers, scale = quantize(model.lm_head.weight.detach(), bits=3)
    torch.testing.assert_close(integers * scale, model.lm_head.weight.detach())


def test_the_chunked_loss_sees_the_rounded_head(teacher, student, blocks):
    model, config, ids = kd.quantized(student, bits=3), kd.DistillConfig(), blocks.train[:2]
    assert has_linear_head(model, ids)
    gradients = []
    for loss_of in (ChunkedLoss, DistillationLoss):
        loss = loss_of(teacher, model, config, ids)(teacher, ids)[0]
        gradients.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("bits", [1, 9, 2.5])
def test_bits_that_no_integer_has_are_refused(student, bits):
    with pytest.raises(kd.InputError, match="bits is .* whole number from 2 to 8"):
        kd.quantized(student, bits)
