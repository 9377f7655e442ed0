"""Weights in a few bits: rounded, trained through the rounding, and counted."""

import copy
import math

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from willows_kd.errors import is_integer, require
from willows_kd.models import merge_adapters, require_model

MATRICES = nn.Linear, nn.Embedding, Conv1D
BYTES_OF_SCALE = 4  # float32


def quantize(weight: torch.Tensor, bits: int = 8, dim: int = 0):
    """Round a matrix to integers, with one scale for each output channel: symmetric, absmax.

    Args:
        weight: a matrix.
        bits: of each integer, 2 to 8. The integers go from -(2^(bits-1) - 1) to 2^(bits-1) - 1.
        dim: the dimension of the output channels: 0 in nn.Linear, 1 in GPT-2's Conv1D.

    Returns:
        integers (int8, of the same shape) and scale (one number a channel, for broadcasting):
        weight ≈ integers * scale, off by half a scale at most.
    """
    accepted = is_integer(bits, 2) and bits <= 8
    require(accepted, f"bits is {bits!r}; it must be a whole number from 2 to 8")
    scale = weight.abs().amax(dim=1 - dim, keepdim=True) / (2 ** (bits - 1) - 1)
    above_zero = scale.clamp(min=torch.finfo(scale.dtype).tiny)  # a channel may be all zeros
    return (weight / above_zero).round().to(torch.int8), scale


def fake_quantize(weight: torch.Tensor, bits: int = 8, dim: int = 0) -> torch.Tensor:
    """What `quantize` makes of a matrix, as floats; its gradient is that of the matrix itself.

    Rounding has no useful derivative, so the gradient goes straight through it (Bengio et al.
    2013; Jacob et al. 2018, "Quantization and Training of Neural Networks").
    """
    integers, scale = quantize(weight.detach(), bits, dim)
    return weight + (integers * scale - weight).detach()


class FakeQuantize(nn.Module):
    """`fake_quantize` with its settings, as `torch.nn.utils.parametrize` takes it."""

    def __init__(self, bits: int, dim: int):
        super().__init__()
        self.bits, self.dim = bits, dim

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """A matrix as few bits hold it."""
        return fake_quantize(weight, self.bits, self.dim)


def quantized(model, bits: int = 8):
    """A copy of a model that computes with fake-quantized matrices, embeddings and head included.

    It keeps the float weights and rounds them in each forward pass: `evaluate` measures what the
    rounding costs, and `distill` trains through it (quantization-aware training). It is neither
    smaller nor faster than the model; `quantized_size` says how small its integers are. Saved or
    exported, it is a usual model whose weights are rounded.

    Args:
        model: a causal language model; LoRA adapters are merged first.
        bits: of each integer, 2 to 8.
    """
    require_model(model, "model")
    model = copy.deepcopy(merge_adapters(model))
    for module in list(model.modules()):
        if isinstance(module, MATRICES):  # a head tied to the embeddings stays tied to them
            rounding = FakeQuantize(bits, dim=int(isinstance(module, Conv1D)))
            parametrize.register_parametrization(module, "weight", rounding)
    return model


def quantized_size(model) -> int:
    """Bytes of a `quantized` model if its integers are packed, with a scale for each channel.

    Biases, norms and whatever else was not quantized count as they are.
    """
    sizes = {id(weight): weight.nbytes for weight in model.parameters()}
    for part in model.modules():
        if isinstance(part, parametrize.ParametrizationList) and isinstance(part[0], FakeQuantize):
            weight, rounding = part.original, part[0]
            channels = weight.shape[rounding.dim]
            sizes[id(weight)] = weight.numel() * rounding.bits / 8 + channels * BYTES_OF_SCALE
    return math.ceil(sum(sizes.values()))
