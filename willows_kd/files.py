"""Files and directories that a crash or a full disk cannot spoil: written whole or not at all."""

import contextlib
import json
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from willows_kd.errors import WriteError, one_line, require

SETTINGS_FILE = "distillation.json"  # in an output directory: how its student was made


def cache_folder() -> Path:
    """Where this user's caches are: `XDG_CACHE_HOME`, else `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "willows_kd"


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a path for a new file or directory; it replaces `path` once it is complete on the disk.

    Raises:
        WriteError: it cannot be written. What was at `path` stays.
    """
    path = path.resolve()
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(".partial", f".{path.name}.", path.parent))
        try:
            yield work / "new"
            for file in filter(Path.is_file, work.rglob("*")):
                with file.open("rb+") as opened:
                    os.fsync(opened.fileno())
            if path.is_dir():  # in whose place nothing can be put
                os.rename(path, work / "old")
            os.replace(work / "new", path)
        finally:
            end_write(work, path)


def end_write(work: Path, path: Path) -> None:
    """Put back what was moved aside, if nothing new is in its place; then remove the rest."""
    if (work / "old").exists() and not path.exists():
        os.rename(work / "old", path)
    shutil.rmtree(work, ignore_errors=True)


def clean_up_interrupted_writes(folder: Path, names: str = "*") -> None:
    """Put back what killed processes had moved aside, and remove what they had not finished.

    Args:
        folder: where they wrote.
        names: a pattern of the files and directories that no other process may be writing.
    """
    for work in folder.glob(f".{names}.????????.partial"):
        end_write(work, folder / work.name[1:].rsplit(".", 2)[0])


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn the error of a failed write into a `WriteError`, one line long."""
    try:
        yield
    except (OSError, UnicodeError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        if isinstance(error, UnicodeError):
            reason = "it has letters that this locale does not know; set PYTHONUTF8=1"
        raise WriteError(f"{path} cannot be written: {reason}") from error


def check_output(directory: str | Path, overwrite: bool = False) -> None:
    """Refuse an output directory that is a file, holds anything or cannot be written."""
    directory = Path(directory)
    is_file = directory.exists() and not directory.is_dir()
    require(not is_file, f"{directory} is a file; give a directory to write to")
    is_below = directory.resolve().name
    require(is_below, f"{directory} is the root of a disk; give a directory below it")
    held = "" if overwrite else what_it_holds(directory)
    choice = "choose another directory, or add --overwrite to replace it"
    require(not held, f"{directory} holds {held}; {choice}")
    parent = next(path for path in directory.absolute().parents if path.exists())
    with write_errors(directory):
        str(directory.resolve()).encode()  # as libraries written in Rust do
        tempfile.TemporaryDirectory(dir=parent).cleanup()


def what_it_holds(directory: Path) -> str:
    """What is in a directory: a student, when and how it was made, or other files; or nothing."""
    settings = directory / SETTINGS_FILE
    if settings.exists():
        made: dict = {}
        with contextlib.suppress(ValueError, TypeError):  # of a file that is damaged
            made = dict(json.loads(settings.read_text(encoding="utf-8")))
        when = f"{datetime.fromtimestamp(settings.stat().st_mtime):%Y-%m-%d %H:%M}"
        how = [made.get(name, "unknown") for name in ("temperature", "epochs_finished")]
        return f"a student ({when}, T = {how[0]}, epochs: {how[1]})"
    return "other files" if directory.is_dir() and any(directory.iterdir()) else ""


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: Mapping = {}) -> None:
    """Write tensors on the CPU as a safetensors file with its checksum, whole or not at all.

    Raises:
        WriteError: it cannot be written. An earlier file of that name stays.
    """
    with atomic_write(path) as partial:
        told = {name: str(value) for name, value in metadata.items()}
        save_file(tensors, partial, told | {"crc32": str(checksum(tensors))})


def load_tensors(path: Path) -> dict[str, torch.Tensor] | None:
    """What `save_tensors` wrote, memory-mapped; None if it is not there or damaged."""
    damaged = OSError, SafetensorError, ValueError, KeyError, TypeError
    with contextlib.suppress(*damaged), safe_open(path, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        if checksum(tensors) == int(opened.metadata()["crc32"]):
            return tensors
    return None


def checksum(tensors: Mapping[str, torch.Tensor]) -> int:
    """CRC-32 of the names, dtypes, shapes and bytes of tensors on the CPU."""
    value = 0
    for name, tensor in sorted(tensors.items()):
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        # as bytes, since NumPy has no bfloat16
        value = zlib.crc32(tensor.contiguous().view(-1).view(torch.uint8).numpy(), value)
    return value
