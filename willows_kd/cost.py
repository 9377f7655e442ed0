"""What a model costs to keep and to run: its size, its memory, its speed on this machine."""

import tempfile
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from willows_kd.errors import is_integer, require, type_name
from willows_kd.files import write_errors
from willows_kd.generation import continued
from willows_kd.models import check_token_ids, eval_mode, quiet_transformers, write_weights


def size_on_disk(model) -> int:
    """Bytes of the weights as `save_pretrained` writes them."""
    with tempfile.TemporaryDirectory() as folder, quiet_transformers(), write_errors(Path(folder)):
        write_weights(model, folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def peak_memory(model, ids: torch.Tensor) -> int:
    """Bytes that a forward pass needs at most: weights, activations and logits.

    Args:
        model: where it is decides how: PyTorch's own count on a GPU, on the CPU the most
            that `MemoryWatch` counts.
        ids: token ids, shape (batch, tokens).
    """
    check_ids(ids, model)
    ids = ids.to(model.device)
    weights = sum(tensor.nbytes for tensor in {id(p): p for p in model.parameters()}.values())
    with torch.inference_mode(), eval_mode(model):
        model(ids)  # the first call allocates what later ones keep
        if model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            model(ids)
            return weights + torch.cuda.max_memory_allocated() - before
        with MemoryWatch() as watch:
            model(ids)
    return weights + watch.most


class MemoryWatch(TorchDispatchMode):
    """Counts the bytes of what operations return and is still alive, and their most."""

    def __init__(self):
        super().__init__()
        self.held = self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Run one operation and count the memory that it newly took."""
        given = {t.untyped_storage() for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
        result = function(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, tree_leaves(result)):
            storage = tensor.untyped_storage()
            if storage not in given:
                self.held += storage.nbytes()
                self.most = max(self.most, self.held)
                weakref.finalize(storage, self.release, storage.nbytes())
        return result

    def release(self, nbytes: int) -> None:
        """A tensor's memory was freed."""
        self.held -= nbytes


def latency(
    models: dict[str, nn.Module], ids: torch.Tensor, new_tokens: int = 16, repeats: int = 7
) -> dict[str, dict[str, float]]:
    """Seconds of a forward pass and of each generated token, side by side.

    The models take turns, so that a slow moment of the machine falls on all of them,
    and the median of the repeats is reported after one round that is not counted.

    Args:
        models: by name.
        ids: shape (batch, tokens). Generation goes on from all but its end, so that a
            prompt and what follows never take more positions than `ids` does.
        new_tokens: how many to generate, greedily, with the key-value cache.
        repeats: rounds that count.
    """
    check_ids(ids, *models.values())
    for name, value in (("new_tokens", new_tokens), ("repeats", repeats)):
        require(is_integer(value), f"{name} is {value!r}; it must be a whole number, at least 1")
    prompt = ids[:, : max(1, ids.shape[1] - new_tokens)]

    def seconds(model) -> dict[str, float]:
        forward = timed(lambda: model(ids.to(model.device)), model)
        generate = timed(lambda: continued(model, prompt, new_tokens), model)
        return {"forward": forward, "per_token": generate / new_tokens}

    return in_turns(seconds, models, repeats)


def in_turns(measure: Callable, models: dict[str, nn.Module], repeats: int) -> dict[str, dict]:
    """Medians of the numbers that `measure` gives for each model, after a round not counted."""
    rows: dict[str, list] = {name: [] for name in models}
    for _ in range(repeats + 1):
        for name, model in models.items():
            rows[name].append(measure(model))
    return {name: pd.DataFrame(found[1:]).median().to_dict() for name, found in rows.items()}


def check_ids(ids: torch.Tensor, *models) -> None:
    """Require a batch of token ids that models know."""
    usable = isinstance(ids, torch.Tensor) and ids.ndim == 2 and ids.numel() > 0
    require(usable, f"ids are {type_name(ids)}; give token ids of shape (batch, tokens)")
    for model in models:
        check_token_ids(ids, model)


def timed(action: Callable, model) -> float:
    """Seconds that an action takes in inference mode, the GPU's work included."""
    with torch.inference_mode(), eval_mode(model):
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        action()
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start
