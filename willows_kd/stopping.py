"""How a training ends before its time: Ctrl-C, no memory left, a loss that is no number."""

import contextlib
import math
import signal
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import torch

from willows_kd.checkpoints import Checkpoints
from willows_kd.errors import InputError


def check_finite(row: dict) -> None:
    """Refuse a step that would spoil the student."""
    for name in ("loss", "gradient_norm"):
        if not math.isfinite(row[name]):
            raise InputError(
                f"the {name.replace('_', ' ')} became {row[name]} at step {row['step']}; "
                "lower the learning rate or the temperature"
            )


@contextlib.contextmanager
def failures_as_input_errors(step: int, checkpoints: Checkpoints | None):
    """What ends a training, in one line: with the step, and where one can go on from."""
    try:
        yield
    except (InputError, RuntimeError, MemoryError) as error:
        full = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not full and "DefaultCPUAllocator" not in str(error) and error.__class__ != InputError:
            raise
        reason = error
        if error.__class__ != InputError:
            reason = (
                f"out of memory at step {step}; lower the batch size, and raise "
                "gradient_accumulation_steps to keep the steps as they are, or set "
                "gradient_checkpointing"
            )
        files = checkpoints.files() if checkpoints else []
        last = f" (the last good checkpoint: {files[0]})" if files else ""
        raise InputError(f"{reason}{last}") from error


@contextlib.contextmanager
def graceful_interrupt(allowed: bool) -> Iterator[SimpleNamespace]:
    """Turn the first Ctrl-C into `asked`, for the step at hand to end; a second stops at once.

    Several processes are told of it at different steps, so these stop at once.
    """
    stop = SimpleNamespace(requested=False)
    if not allowed or threading.current_thread() is not threading.main_thread():
        yield stop
        return

    before = signal.getsignal(signal.SIGINT)

    def ask(*_):
        stop.requested = True
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, ask)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
