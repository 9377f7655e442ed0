"""Checkpoints: what a training run needs to go on from where it was stopped.

A checkpoint is one safetensors file, `step_00000120.safetensors`: the student's weights,
AdamW's moments, and a record of the run so far. There are no random states in it, since
all that is random follows from the seed and the number of the step.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import time
import zlib
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm

from willows_kd.config import DistillConfig
from willows_kd.corpus import Blocks
from willows_kd.errors import InputError, require
from willows_kd.models import weights_digest

KEPT = 2
LOCK = "lock"
RECORD = "record"  # JSON as bytes: a tensor among the others, as a header has a size limit


class Checkpoints:
    """A folder of checkpoints, the last two of a run."""

    def __init__(self, folder: str | Path, minutes: float = 5.0):
        """Say where and how often; nothing is written yet.

        Args:
            folder: where. One run at a time can use it.
            minutes: how long to train between two; each epoch's end has one besides. 0
                is after every step.

        Raises:
            InputError: that is no length of time.
        """
        number = isinstance(minutes, int | float) and not isinstance(minutes, bool)
        if not (number and 0 <= minutes < math.inf):
            raise InputError(f"checkpoint minutes are {minutes!r}; they must be at least 0")
        self.folder, self.minutes = Path(folder), minutes
        self.last_time = time.monotonic()  # which goes on where the clock is set

    @contextlib.contextmanager
    def locked(self):
        """Keep other runs out until the end, however this one ends; may be nested.

        Raises:
            InputError: another run is there, or the folder cannot be written.
        """
        made = [p for p in (self.folder, *self.folder.parents) if not p.exists()]
        place = self.folder.absolute() / LOCK
        lock = FileLock(place, timeout=0, is_singleton=True)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise InputError(
                f"another run is writing to {self.folder}; wait for it, or choose another directory"
            ) from None
        except OSError as error:
            raise InputError(f"{self.folder} cannot be written: {error.strerror}") from error
        try:
            yield
        finally:
            outermost = lock.lock_counter == 1
            if outermost and not self.files():
                self.clear()
                place.unlink(missing_ok=True)
            lock.release()
            if outermost and not place.exists():
                for folder in made or [self.folder]:
                    with contextlib.suppress(OSError):
                        folder.rmdir()

    def files(self) -> list[Path]:
        """The checkpoints, newest first."""
        return sorted(self.folder.glob("step_*.safetensors"), reverse=True)

    def newest(self) -> "Checkpoint | None":
        """The newest that is whole, if there is any."""
        for file in self.files():
            with contextlib.suppress(OSError, SafetensorError, ValueError, KeyError, TypeError):
                return Checkpoint(file)
        return None

    def due(self) -> bool:
        """Whether it is time for the next."""
        return time.monotonic() - self.last_time >= 60 * self.minutes

    def save(self, student: nn.Module, optimizer, history: list[dict], run: dict) -> None:
        """Write a checkpoint, whole or not at all, and drop all but the last two.

        Raises:
            OSError: it cannot be written. The earlier ones stay.
        """
        tensors = student_tensors(student) | optimizer_tensors(student, optimizer)
        tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
        record = json.dumps({"run": run, "history": history}).encode()
        tensors[RECORD] = torch.frombuffer(bytearray(record), dtype=torch.uint8)
        file = self.folder / f"step_{len(history):08d}.safetensors"
        partial = file.with_suffix(".partial")
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            save_file(tensors, partial, {"crc32": str(checksum(tensors))})
            with partial.open("rb") as written:
                os.fsync(written.fileno())  # on the disk before it takes its name
            partial.replace(file)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        finally:
            partial.unlink(missing_ok=True)
        kept = [name for name in self.files() if name <= file][:KEPT]
        for other in set(self.files()) - set(kept):  # older ones, and an earlier run's later ones
            other.unlink(missing_ok=True)
        self.last_time = time.monotonic()

    def try_save(self, student: nn.Module, optimizer, history: list[dict], run: dict) -> None:
        """Save; where that cannot be done, say so, for the training to go on."""
        try:
            self.save(student, optimizer, history, run)
        except OSError as error:
            self.last_time = time.monotonic()
            reason = error.strerror or error
            tqdm.write(f"⚠️ No checkpoint at step {len(history)}: {reason}. Training goes on.")

    def describe(self, teacher, student, blocks: Blocks, config: DistillConfig) -> dict:
        """What has to be the same for a run to be resumed."""
        return describe_run(teacher, student, blocks, config)

    def clear(self) -> None:
        """Remove all checkpoints, and what a killed run left of one."""
        for pattern in ("step_*.safetensors", "step_*.partial", ".tmp*"):  # the last: safetensors'
            for file in self.folder.glob(pattern):
                file.unlink(missing_ok=True)


class NoCheckpoints:
    """Stands in for `Checkpoints` if none are to be written: nothing is, and none is ever due."""

    locked = staticmethod(contextlib.nullcontext)

    def files(self) -> list[Path]:
        """None."""
        return []

    def describe(self, *_) -> None:
        """Nothing: no checkpoint needs it."""

    def due(self) -> bool:
        """Never."""
        return False

    def try_save(self, *_) -> None:
        """Write nothing."""


class Checkpoint:
    """One that was read, and found whole."""

    def __init__(self, file: Path):
        """Read it.

        Raises:
            OSError, SafetensorError, ValueError, KeyError, TypeError: it is not whole.
        """
        self.file = file
        with safe_open(file, "pt") as opened:
            self.tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            if checksum(self.tensors) != int(opened.metadata()["crc32"]):
                raise ValueError("damaged")
        record = json.loads(self.tensors.pop(RECORD).numpy().tobytes())
        self.run, self.history = record["run"], record["history"]

    def check(self, student: nn.Module, run: dict) -> None:
        """Refuse to go on with another run than it is of.

        Raises:
            InputError: with what differs.
        """
        found = differences(self.run, run)
        mine = student_tensors(student)
        fits = {k: v.shape for k, v in mine.items()} == {
            name: tensor.shape for name, tensor in self.tensors.items() if name in mine
        }
        as_it_stopped = fits and all(torch.equal(t.cpu(), self.tensors[k]) for k, t in mine.items())
        if run["student"] != self.run["student"] and not as_it_stopped:
            found.append("the student is neither as it began nor as it stopped")
        if found:
            raise InputError(
                f"cannot resume from {self.file}: {', '.join(found)}; "
                "go on with what it began with, or start afresh"
            )

    def restore(self, student: nn.Module, optimizer) -> list[dict]:
        """Put student and optimiser back where they were, in place; returns the history."""
        with torch.no_grad():
            for name, tensor in student_tensors(student).items():
                tensor.copy_(self.tensors[name])
        parameters = dict(student.named_parameters())
        for name, tensor in self.tensors.items():
            kind, _, parameter = name.partition("/")
            if kind.startswith("adamw."):
                owner = parameters[parameter]
                place = owner.device if tensor.ndim else "cpu"  # its step count stays on the CPU
                state = optimizer.state[owner]
                state[kind.removeprefix("adamw.")] = tensor.to(place, copy=True)
        return list(self.history)


def resume_run(accelerator, checkpoints: Checkpoints, student, optimizer, run: dict) -> list[dict]:
    """Put student and optimiser where the newest checkpoint has them; returns its history.

    Raises:
        InputError: it is of another run, or not the same on all machines.
    """
    found = checkpoints.newest()
    history = []
    if found:
        found.check(student, run)
        run["student"] = found.run["student"]  # as it began
        history = found.restore(student, optimizer)
    far = accelerator.gather(torch.tensor([len(history)], device=accelerator.device))
    shared = "is not the same on all machines; put it on a disk that they share"
    require(far.min() == far.max(), f"{checkpoints.folder} {shared}")
    if accelerator.is_main_process and found:
        place = f"{checkpoints.folder.name}/{found.file.name}"
        tqdm.write(f"Going on after step {len(history)}, from {place}")
    elif accelerator.is_main_process:
        tqdm.write(f"Nothing to resume in {checkpoints.folder}: starting from the beginning")
    return history


def describe_run(teacher, student, blocks: Blocks, config: DistillConfig) -> dict:
    """What has to be the same for a run to go on."""
    asked = teacher.digest if hasattr(teacher, "digest") else weights_digest(teacher)
    text = hashlib.sha256()
    for part in (blocks.train, blocks.validation):
        text.update(str(tuple(part.shape)).encode() + part.contiguous().numpy().tobytes())
    return {
        "settings": dataclasses.asdict(config),
        "teacher": asked,
        "text": text.hexdigest(),
        "student": weights_digest(student),
    }


def differences(before: dict, now: dict) -> list[str]:
    """How two runs differ, in words; the student is looked at elsewhere."""
    was, settings = before["settings"], now["settings"]
    found = [
        f"{name} was {was.get(name)!r}, is {value!r}"
        for name, value in settings.items()
        if was.get(name) != value
    ]
    if before["teacher"] != now["teacher"]:
        found.append("the teacher is another")
    if before["text"] != now["text"]:
        found.append("the text or its blocks are others")
    return found


def student_tensors(student: nn.Module) -> dict[str, torch.Tensor]:
    """Weights and buffers by name, tied ones once."""
    return {
        f"student/{name}": tensor
        for found in (student.named_parameters(), student.named_buffers())
        for name, tensor in found
    }


def optimizer_tensors(student: nn.Module, optimizer) -> dict[str, torch.Tensor]:
    """AdamW's moments and step counts, by the names of the weights they belong to."""
    return {
        f"adamw.{kind}/{name}": value
        for name, parameter in student.named_parameters()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def checksum(tensors: dict[str, torch.Tensor]) -> int:
    """CRC-32 of all names, types, shapes and bytes."""
    value = 0
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), value)
    return value
