"""Checkpoints: what a training run needs to resume from where it was stopped.

A checkpoint is one safetensors file, `step_00000120.safetensors`: the student's weights,
AdamW's moments, and a record of the run so far. It holds no random state, since every
random number follows from the seed and the step.
"""

import contextlib
import dataclasses
import json
import math
import time
from pathlib import Path

import torch
from accelerate.utils import gather
from filelock import FileLock, Timeout
from torch import nn
from tqdm.auto import tqdm

from willows_kd.config import DistillConfig
from willows_kd.corpus import Blocks
from willows_kd.errors import InputError, WriteError, require
from willows_kd.files import (
    checksum,
    clean_up_interrupted_writes,
    load_tensors,
    save_tensors,
    write_errors,
)
from willows_kd.models import distributed_state, fingerprint

KEPT = 2
NAME, NAMES = "step_{:08d}.safetensors", "step_*.safetensors"
LOCK = "lock"
RECORD = "record"  # JSON as bytes: a tensor among the others, as a header has a size limit
STUDENT = "the student's fingerprint"


class Checkpoints:
    """The last two checkpoints of a training run, in a folder."""

    def __init__(self, folder: str | Path, minutes: float = 5.0):
        """Choose the folder and the interval; nothing is written yet.

        Args:
            folder: where the checkpoints go. One run at a time can use it.
            minutes: how long to train between two checkpoints; 0 saves after every step.
                Each epoch ends with one in any case.

        Raises:
            InputError: `minutes` is no length of time.
        """
        accepted = "they must be at least 0"
        require(0 <= minutes < math.inf, f"checkpoint minutes are {minutes!r}; {accepted}")
        self.folder, self.minutes = Path(folder), minutes
        self.last_time = time.monotonic()  # unlike time.time(), unmoved when the clock is set

    @contextlib.contextmanager
    def locked(self):
        """Keep other runs out of the folder; may be nested, and ends when the process dies.

        Raises:
            InputError: another run uses the folder, or (`WriteError`) it cannot be written.
        """
        path = self.folder.absolute() / LOCK
        lock = FileLock(path, timeout=0, is_singleton=True)
        with write_errors(self.folder):
            try:
                lock.acquire()  # makes the folder, too
            except Timeout:
                raise InputError(
                    f"another run is writing to {self.folder}; "
                    "wait for it, or choose another directory"
                ) from None
        outermost = lock.lock_counter == 1
        if outermost:
            clean_up_interrupted_writes(self.folder, NAMES)
        try:
            yield
        finally:
            if outermost and not self.files():
                with contextlib.suppress(OSError):  # Windows keeps a file that is open
                    path.unlink()
            lock.release()
            with contextlib.suppress(OSError):  # there are checkpoints
                self.folder.rmdir()

    @contextlib.contextmanager
    def opened(self, teacher, student, optimizer, blocks, config: DistillConfig, resume=False):
        """The folder while a run uses it; the arguments are those of `distill`, and its AdamW.

        Of several processes the main one writes for all.

        Yields:
            the history of the run that is resumed (empty if none is), whose student and
            optimiser are then restored; and what saves a checkpoint if one is due.
        """
        speaks = distributed_state().is_main_process
        with self.locked() if speaks else contextlib.nullcontext():
            run = describe(teacher, student, blocks, config)
            history = self.resume(student, optimizer, run) if resume else []

            def save(history: list[dict], at_once: bool) -> None:
                due = at_once or time.monotonic() - self.last_time >= 60 * self.minutes
                if not (speaks and due):
                    return
                try:
                    self.save(student, optimizer, history, run)
                except WriteError as error:
                    reason = f"{error}. Training goes on."
                    tqdm.write(f"⚠️ No checkpoint at step {len(history)}: {reason}")
                self.last_time = time.monotonic()

            yield history, save

    def resume(self, student: nn.Module, optimizer, run: dict) -> list[dict]:
        """Restore student and optimiser from the newest checkpoint, if any; returns its history."""
        found, history, state = self.newest(), [], distributed_state()
        if found:
            if found.holds(student):
                run[STUDENT] = found.run[STUDENT]  # it is the run's own, further on
            found.check(run)
            found.restore(student, optimizer)
            history = found.history
        steps = gather(torch.tensor([len(history)], device=state.device))
        shared = "differs between the machines; put it on a disk that they share"
        require(steps.min() == steps.max(), f"{self.folder} {shared}")
        if state.is_main_process and found:
            place = f"{self.folder.name}/{found.file.name}"
            tqdm.write(f"Resuming from step {len(history)} ({place})")
        elif state.is_main_process:
            tqdm.write(f"No checkpoint found in {self.folder}: training from scratch")
        return history

    def files(self) -> list[Path]:
        """The checkpoints, newest first."""
        return sorted(self.folder.glob(NAMES), reverse=True)

    def newest(self, ends_epoch: bool = False) -> "Checkpoint | None":
        """The newest checkpoint that is intact, and ends an epoch if asked to; None without."""
        for file in self.files():
            if tensors := load_tensors(file):
                found = Checkpoint(file, tensors)
                if not ends_epoch or "average_loss" in found.history[-1]:
                    return found
        return None

    def save(self, student: nn.Module, optimizer, history: list[dict], run: dict) -> None:
        """Write a checkpoint, whole or not at all; the last two stay, and the last epoch's.

        Raises:
            WriteError: it cannot be written. The earlier ones stay.
        """
        tensors = student_tensors(student)
        for number, state in optimizer.state_dict()["state"].items():
            tensors |= {f"adamw/{number}/{field}": value for field, value in state.items()}
        tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        record = json.dumps({"run": run, "history": history}).encode()
        tensors[RECORD] = torch.frombuffer(bytearray(record), dtype=torch.uint8)
        ends = [row["step"] for row in history if "average_loss" in row]
        path, *last = (self.folder / NAME.format(step) for step in (len(history), *ends[-1:]))
        save_tensors(path, tensors)
        kept = [file for file in self.files() if file <= path][:KEPT] + last
        for other in set(self.files()) - set(kept):  # older ones, and later ones of another run
            with contextlib.suppress(OSError):
                other.unlink()

    def clear(self) -> None:
        """Remove all checkpoints."""
        for file in self.files():
            file.unlink(missing_ok=True)


class Checkpoint:
    """A checkpoint that was read and found intact."""

    def __init__(self, file: Path, tensors: dict[str, torch.Tensor]):
        """Take what a file holds."""
        self.file, self.tensors = file, tensors
        record = json.loads(self.tensors.pop(RECORD).numpy().tobytes())
        self.run, self.history = record["run"], record["history"]

    def check(self, run: dict) -> None:
        """Refuse to resume a run that differs from the checkpoint's."""
        found = [
            f"{name} was {self.run.get(name)!r}, is {value!r}"
            for name, value in run.items()
            if self.run.get(name) != value
        ]
        require(
            not found,
            f"cannot resume from {self.file}: {', '.join(found)}; "
            "resume with what the run began with, or start a new run",
        )

    def holds(self, student: nn.Module) -> bool:
        """Whether a student's weights are those of the checkpoint."""
        mine, its = student_tensors(student), self.tensors
        return all(name in its and torch.equal(t.cpu(), its[name]) for name, t in mine.items())

    @torch.no_grad()
    def load(self, student: nn.Module) -> None:
        """Give a student its saved weights, in place."""
        for name, tensor in student_tensors(student).items():
            tensor.copy_(self.tensors[name])

    def restore(self, student: nn.Module, optimizer) -> None:
        """Give student and optimiser their saved state, in place."""
        self.load(student)
        state: dict = {}
        for name, tensor in self.tensors.items():
            if name.startswith("adamw/"):
                _, number, field = name.split("/")
                state.setdefault(int(number), {})[field] = tensor.clone()  # no file's any more
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def describe(teacher, student, blocks: Blocks, config: DistillConfig) -> dict:
    """What has to be the same for a run to be resumed, by its name in a message."""
    masks = {f"mask of {name}": mask for name, mask in blocks.masks.items()}
    text = {"training": blocks.train, "validation": blocks.validation} | masks
    return {
        **json.loads(json.dumps(dataclasses.asdict(config))),  # as they are read again
        "the teacher's fingerprint": getattr(teacher, "fingerprint", None) or fingerprint(teacher),
        "the text's checksum": checksum(text),
        STUDENT: fingerprint(student),
    }


def student_tensors(student: nn.Module) -> dict[str, torch.Tensor]:
    """A student's weights and buffers by name, tied ones once."""
    return {**dict(student.named_parameters()), **dict(student.named_buffers())}
