"""How a training run ends early: Ctrl-C, out of memory, a loss that is not finite."""

import contextlib
import math
import signal
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import torch

from willows_kd.errors import InputError
from willows_kd.scale.checkpoints import Checkpoints, NoCheckpoints


def check_finite(row: dict, teacher, student, ids: torch.Tensor) -> None:
    """Stop before a step that would spoil the student, with the likely cause."""
    for name in ("loss", "gradient_norm"):
        if not math.isfinite(row[name]):
            raise InputError(
                f"the {name.replace('_', ' ')} became {row[name]} at step {row['step']}; "
                f"{likely_cause(teacher, student, ids)}"
            )


def likely_cause(teacher, student, ids: torch.Tensor) -> str:
    """Why a loss is not finite, and what to do: the first of the usual causes that applies."""
    if teacher is not None and any(is_half_precision(p) for p in teacher.parameters()):
        return "the teacher's weights are in half precision, which may overflow: teacher.float()"
    if has_infinite_logits(student, ids):
        return (
            "the student's logits hold infinities, and a token with logit -inf that the teacher "
            "or the text can have makes the loss infinite; give it finite logits"
        )
    if teacher is not None and has_infinite_logits(teacher, ids):
        return (
            "the teacher's logits hold infinities; +inf has no softmax, and -inf makes reverse_kl "
            "infinite, where forward_kl and jensen_shannon are finite"
        )
    return "lower the learning rate, or the temperature if it is high"


@torch.no_grad()
def has_infinite_logits(model, ids: torch.Tensor) -> bool:
    """Whether a model answers some blocks with infinities."""
    blocks = ids.to(model.device).split(1)
    return any(model(block, use_cache=False).logits.isinf().any() for block in blocks)


def is_half_precision(tensor: torch.Tensor) -> bool:
    """Whether a tensor is float16 or bfloat16."""
    return tensor.dtype in (torch.float16, torch.bfloat16)


@contextlib.contextmanager
def failures_as_input_errors(history: list[dict], checkpoints: Checkpoints | NoCheckpoints):
    """Turn what ends a training run into one line, with the step and the last checkpoint."""
    try:
        yield
    except (InputError, RuntimeError, MemoryError) as error:
        full = isinstance(error, torch.OutOfMemoryError | MemoryError)
        full = full or "DefaultCPUAllocator" in str(error)
        if not full and not isinstance(error, InputError):
            raise
        reason = error
        if full:
            reason = (
                f"out of memory at step {len(history) + 1}; lower the batch size, and raise "
                "gradient_accumulation_steps to keep the steps as they are, or set "
                "gradient_checkpointing"
            )
        files = checkpoints.files()
        last = f" (the last good checkpoint: {files[0]})" if files else ""
        raise InputError(f"{reason}{last}") from error


@contextlib.contextmanager
def graceful_interrupt(allowed: bool) -> Iterator[SimpleNamespace]:
    """Turn the first Ctrl-C into `requested`, so that the step ends; a second stops at once.

    Several processes would notice it at different steps, so they stop at once (`allowed` is
    False).
    """
    stop = SimpleNamespace(requested=False)
    if not allowed or threading.current_thread() is not threading.main_thread():
        yield stop
        return

    before = signal.getsignal(signal.SIGINT)

    def request(*_):
        stop.requested = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, request)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
