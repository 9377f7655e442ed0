"""How a training run ends early: Ctrl-C, out of memory, a loss that is not finite."""

import contextlib
import math
import signal
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import torch

from willows_kd.errors import InputError


def check_finite(row: dict) -> None:
    """Stop before a step that would spoil the student, with the usual causes."""
    for name in ("loss", "gradient_norm"):
        if not math.isfinite(row[name]):
            raise InputError(
                f"the {name.replace('_', ' ')} became {row[name]} at step {row['step']}; lower the "
                "learning rate or a high temperature; weights in half precision may overflow "
                "(teacher.float()), and logits of -inf make a KL infinite (give finite ones)"
            )


@contextlib.contextmanager
def memory_errors_as_input_errors(history: list[dict]):
    """Turn memory that runs out into one line, with the step and what to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        full = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not full and "DefaultCPUAllocator" not in str(error):
            raise
        raise InputError(
            f"out of memory at step {len(history) + 1}; lower the batch size, and raise "
            "gradient_accumulation_steps to keep the steps as they are, or set "
            "gradient_checkpointing"
        ) from error


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
