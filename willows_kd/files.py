"""Files that a crash or a full disk cannot spoil: each is written whole or not at all."""

import contextlib
import glob
import os
import shutil
import tempfile
import uuid
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from willows_kd.errors import InputError, WriteError, one_line, require

SETTINGS_FILE = "distillation.json"  # marks an output directory as ours


def cache_folder() -> Path:
    """Where this user's caches are: `XDG_CACHE_HOME`, else `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "willows_kd"


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a path to write to; the file replaces `path` once it is complete on the disk.

    Raises:
        WriteError: it cannot be written. An earlier file of that name stays.
    """
    partial = temporary_name(path, "partial")  # a folder, for what the writer may put beside it
    with write_errors(path):
        try:
            partial.mkdir(parents=True)
            yield partial / path.name
            flush_to_disk(partial / path.name)
            os.replace(partial / path.name, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def atomic_directory(directory: Path) -> Iterator[Path]:
    """Give a new directory to fill; it replaces `directory` once it is complete on the disk.

    Raises:
        WriteError: it cannot be written. An earlier directory of that name stays.
    """
    directory = directory.resolve()
    partial, replaced = (temporary_name(directory, end) for end in ("partial", "replaced"))
    created = missing_folders(directory.parent)
    with write_errors(directory):
        try:
            partial.mkdir(parents=True)
            yield partial
            for file in partial.rglob("*"):
                flush_to_disk(file)
            if directory.exists():
                os.rename(directory, replaced)
            os.rename(partial, directory)
        finally:
            if replaced.exists() and not directory.exists():
                os.rename(replaced, directory)
            for leftover in (partial, replaced):
                shutil.rmtree(leftover, ignore_errors=True)
            remove_empty(created)


def temporary_name(path: Path, ending: str) -> Path:
    """A hidden name beside a path that no other process uses."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.{ending}")


def flush_to_disk(path: Path) -> None:
    """Return only when a file's bytes are on the disk and no longer in a buffer."""
    if path.is_file():
        with path.open("rb+") as file:
            os.fsync(file.fileno())


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn the error of a failed write into a `WriteError`, one line long."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise WriteError(f"{path} cannot be written: {reason}") from error


def missing_folders(folder: Path) -> list[Path]:
    """A folder and those around it, as far as they do not exist yet, innermost first."""
    return [path for path in (folder, *folder.parents) if not path.exists()]


def remove_empty(folders: list[Path]) -> None:
    """Remove those folders that hold nothing."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def clean_up_interrupted_writes(directory: Path) -> None:
    """Restore a directory that a killed process had moved aside, and remove its partial ones.

    Call it only if no other process may be writing that directory.
    """
    directory = directory.resolve()
    name = glob.escape(directory.name)
    for replaced in directory.parent.glob(f".{name}.*.replaced"):
        if not directory.exists():
            os.rename(replaced, directory)
        shutil.rmtree(replaced, ignore_errors=True)
    remove_partial_writes(directory.parent, name)


def remove_partial_writes(folder: Path, names: str) -> None:
    """Remove what killed processes left of files or directories whose names match a pattern."""
    for partial in folder.glob(f".{names}.*.partial"):
        shutil.rmtree(partial, ignore_errors=True)


def check_output(directory: str | Path, overwrite: bool = False) -> None:
    """Refuse an output directory that is a file, cannot be written or holds other files."""
    directory = Path(directory)
    is_file = directory.exists() and not directory.is_dir()
    require(not is_file, f"{directory} is a file; give a directory to write to")
    is_root = directory.resolve() == Path(directory.resolve().anchor)
    require(not is_root, f"{directory} is the root of a disk; give a directory below it")
    try:
        str(directory.resolve()).encode()
    except UnicodeEncodeError:  # some libraries cannot write there
        unread = "has letters that this locale does not know; set the variable PYTHONUTF8=1"
        raise InputError(f"{ascii(str(directory))} {unread}") from None
    taken = directory.is_dir() and any(directory.iterdir())
    require(
        not taken or overwrite or (directory / SETTINGS_FILE).exists(),
        f"{directory} holds files that no distillation wrote; "
        "choose another directory, or add --overwrite to replace it",
    )
    parent = next(path for path in directory.absolute().parents if path.exists())
    try:
        tempfile.TemporaryDirectory(dir=parent).cleanup()
    except OSError as error:
        raise InputError(f"{directory} cannot be written: {error.strerror}") from error


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: Mapping = {}) -> None:
    """Write tensors on the CPU as a safetensors file with its checksum, whole or not at all.

    Raises:
        WriteError: it cannot be written. An earlier file of that name stays.
    """
    with atomic_file(path) as partial:
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
