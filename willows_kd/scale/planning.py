"""What a training run will take, before anything is spent: memory, operations, disk and hours.

Two steps of the run are rehearsed with fake tensors, which have a shape and a device but no
numbers: the code that will train runs, and operations and bytes are counted as it goes.
"""

import copy
import functools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import flop_counter
from transformers import AutoModelForCausalLM, PreTrainedConfig

from willows_kd.config import DistillConfig
from willows_kd.corpus import Blocks
from willows_kd.cost import MemoryWatch
from willows_kd.distillation import (
    DistillationLoss,
    asks_teacher,
    parameter_groups,
    train_mode,
    validate_inputs,
)
from willows_kd.errors import is_integer, require, type_name
from willows_kd.models import load_config, quiet_transformers
from willows_kd.scale.linear_head import has_linear_head
from willows_kd.scale.teacher_cache import blocks_to_cache, cache_bytes, outputs
from willows_kd.students import config_of_layers, depth_of, layers_to_keep

ATEN = torch.ops.aten
COUNTED = {  # what `FlopCounterMode` leaves out, in PyTorch 2.13
    ATEN.addmm_: lambda c, a, b, **_: flop_counter.mm_flop(a, b),
    ATEN._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *_, **__: flop_counter.sdpa_flop_count(q, k, v)
    ),
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: flop_counter.sdpa_backward_flop_count(grad, q, k, v)
    ),
}


@dataclass(frozen=True)
class Plan:
    """What a run takes; printed, a table.

    Attributes:
        parameters: of "teacher" and "student".
        memory: bytes at the peak, by part: weights, gradients, AdamW's two moments, and
            what else is alive then: activations and the logits of a chunk, or all logits.
        cache: bytes of the teacher's cache with its default settings; None if the teacher's
            logits are more than hidden states times output weights.
        flops: floating-point operations of one epoch: "teacher", its layers, which a cache
            saves, and "student", with the loss and so the teacher's head.
        epochs: how many.
        rate: FLOP a second.
        measured: what the rate was measured on.
    """

    parameters: dict[str, int]
    memory: dict[str, int]
    cache: int | None
    flops: dict[str, float]
    epochs: int
    rate: float
    measured: str

    @property
    def peak_memory(self) -> int:
        """Bytes of all parts."""
        return sum(self.memory.values())

    def seconds(self, cached: bool = False) -> float:
        """Seconds of training, without evaluation; with a cache the teacher runs once."""
        runs = {"teacher": 1 if cached else self.epochs, "student": self.epochs}
        return sum(runs[name] * flops for name, flops in self.flops.items()) / self.rate

    def __str__(self):
        parts = ", ".join(f"{name} {size / 1e6:,.0f}" for name, size in self.memory.items())
        flops = {name: f"{name} {flops / 1e12:,.2f}" for name, flops in self.flops.items()}
        how_long = f"{duration(self.seconds())} for {self.epochs} epochs"
        cache = "only with top_k"
        if self.cache is not None:
            cache = f"{self.cache / 1e6:,.1f} MB on disk"
            how_long += f", {duration(self.seconds(cached=True))} with a cache"
        rows = {
            "parameters": ", ".join(f"{name} {n:,}" for name, n in self.parameters.items()),
            "peak memory": f"{self.peak_memory / 1e6:,.0f} MB: {parts}",
            "teacher's cache": cache,
            "an epoch": f"{', '.join(flops.values())} TFLOP",
            "rate": f"{self.rate / 1e9:,.1f} GFLOP/s ({self.measured})",
            "time": how_long,
        }
        return "\n".join(f"{name:16} {text}" for name, text in rows.items())


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    return f"{seconds / 3600:,.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"


def plan(
    teacher,
    student,
    blocks: Blocks,
    config: DistillConfig | None = None,
    rate: float | None = None,
    loss: Callable[..., nn.Module] | None = None,
) -> Plan:
    """What `distill` would take, without loading, downloading or training anything new.

    Args:
        teacher: a model; or its config, or the directory or hub name to read the config from.
            A name stands for a teacher in float32, a config for one in the config's own dtype.
        student: likewise; or how many of the teacher's layers it takes.
        blocks: the packed corpus.
        config: the settings; None for the defaults. Sampling, as for `on_policy_share`, is
            not counted.
        rate: FLOP a second, such as that of a machine you may rent. None measures it here, on a
            step's forward and backward pass; for that both models are needed.
        loss: as for `distill`.

    Raises:
        InputError: teacher, student or blocks do not fit together.
    """
    config = DistillConfig() if config is None else config
    real, mode = (teacher, student), FakeTensorMode(allow_non_fake_inputs=True)
    measured = "given"
    if rate is None:
        measured, are_models = "a step of this run", [isinstance(m, nn.Module) for m in real]
        require(all(are_models), "a step of what is no model cannot be timed; give rate, in FLOP/s")
    teacher = fake(teacher, mode).eval()
    if is_integer(student):
        kept = layers_to_keep(teacher, student, "spaced")
        student = config_of_layers(teacher.config, depth_of(teacher), kept)
    student = fake(student, mode, torch.float32)
    validate_inputs(teacher, student, blocks, config)
    parts = blocks_to_cache(blocks, teacher, samples=None)
    with mode:
        at_once = min(config.blocks_per_pass(blocks.block_size), len(blocks.train))
        ids = torch.zeros(at_once, blocks.block_size, dtype=torch.long, device=student.device)
        objective = (loss or DistillationLoss)(teacher, student, config, ids[:1])
        linear = has_linear_head(teacher, ids[:1])
        with train_mode(teacher, student, config):
            passes = count_flops(objective, teacher, ids, linear)
            memory = memory_parts(objective, teacher, ids)
        kept = functools.partial(outputs, teacher, None, None)
        cached = cache_bytes(parts, kept) if linear else None
    if rate is None:
        rate = sum(passes.values()) / step_seconds(*real, ids, config, loss)
    return Plan(
        parameters={
            name: sum(p.numel() for p in model.parameters())
            for name, model in (("teacher", teacher), ("student", student))
        },
        memory=memory,
        cache=cached,
        flops={name: n * len(blocks.train) / len(ids) for name, n in passes.items()},
        epochs=config.epochs,
        rate=rate,
        measured=measured,
    )


def fake(model, mode: FakeTensorMode, dtype: torch.dtype | None = None) -> nn.Module:
    """A model whose weights have no numbers, from one that has, a config or a name."""
    if isinstance(model, nn.Module):
        tensors = [*model.parameters(), *model.buffers()]
        with mode:
            copies = {id(tensor): mode.from_tensor(tensor) for tensor in tensors}
            return copy.deepcopy(model, copies)
    if isinstance(model, str | os.PathLike):
        model, dtype = load_config(model), torch.float32
    accepted = "give a model, its config, its directory or its name on the hub"
    require(isinstance(model, PreTrainedConfig), f"the model is {type_name(model)}; {accepted}")
    with mode, quiet_transformers():
        return AutoModelForCausalLM.from_config(model, dtype=dtype or model.dtype or torch.float32)


def count_flops(objective: DistillationLoss, teacher, ids, linear: bool) -> dict[str, float]:
    """Floating-point operations of one batch, forward and backward."""
    teacher_flops, all_flops = (
        flop_counter.FlopCounterMode(display=False, custom_mapping=COUNTED) for _ in range(2)
    )
    with all_flops:
        objective(teacher, ids)[0].backward()
    if asks_teacher(objective.config):
        layers = teacher.base_model if linear else teacher
        with teacher_flops, torch.no_grad(), objective.autocast(ids):
            layers(ids, use_cache=False)
    flops = teacher_flops.get_total_flops()
    return {"teacher": flops, "student": all_flops.get_total_flops() - flops}


def memory_parts(objective: DistillationLoss, teacher, ids: torch.Tensor) -> dict[str, int]:
    """Bytes at the peak of the second step, when AdamW's moments are there."""
    student, config = objective.student, objective.config
    optimizer = torch.optim.AdamW(parameter_groups(student, config))
    with MemoryWatch() as watch:
        for _ in range(2):
            for _ in range(min(2, config.gradient_accumulation_steps)):
                objective(teacher, ids)[0].backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
    trained = sum(p.nbytes for p in student.parameters() if p.requires_grad)
    return {
        "teacher's weights": sum(p.nbytes for p in teacher.parameters()),
        "student's weights": sum(p.nbytes for p in student.parameters()),
        "gradients": trained,
        "moments": 2 * trained,
        "activations and logits": watch.most - 3 * trained,
    }


def step_seconds(teacher, student, ids: torch.Tensor, config, loss) -> float:
    """What a batch's forward and backward pass takes: the second of two."""
    ids = torch.zeros(ids.shape, dtype=torch.long, device=student.device)
    trained = [p for p in student.parameters() if p.requires_grad]
    with torch.random.fork_rng(), train_mode(teacher, student, config):
        objective = (loss or DistillationLoss)(teacher, student, config, ids[:1])
        for _ in range(2):
            start = time.perf_counter()
            torch.autograd.grad(objective(teacher, ids)[0], trained, allow_unused=True)
            if student.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
    return seconds
