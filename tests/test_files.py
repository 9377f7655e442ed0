"""Whole or not at all: what is on the disk after a write that failed or was killed."""

import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from willows_kd.errors import InputError, WriteError
from willows_kd.files import (
    SETTINGS_FILE,
    atomic_directory,
    atomic_file,
    cache_folder,
    check_output,
    checksum,
    clean_up_interrupted_writes,
    load_tensors,
    save_tensors,
)


def write_file(path: Path, text: str) -> None:
    with atomic_file(path) as partial:
        partial.write_text(text)


def write_directory(path: Path, text: str) -> None:
    with atomic_directory(path) as partial:
        (partial / "a").write_text(text)
        (partial / "folder").mkdir()


def texts(folder: Path) -> list[str]:
    """What all files below a folder hold; the hidden ones too."""
    return [path.read_text() for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("before", [[], ["old"]], ids=["new", "old"])
@pytest.mark.parametrize(
    ("write", "call", "error"),
    [
        (write_file, "mkdir", OSError(28, "No space left on device")),
        (write_file, "fsync", OSError(28, "No space left on device")),
        (write_file, "replace", KeyboardInterrupt()),
        (write_directory, "mkdir", KeyboardInterrupt()),
        (write_directory, "fsync", OSError(28, "No space left on device")),
        (write_directory, "rename", OSError(28, "No space left on device")),
    ],
)
def test_a_write_that_fails_leaves_what_was_there(
    before, write, call, error, tmp_path, monkeypatch
):
    path = tmp_path / "new" / "work"
    for text in before:
        write(path, text)
    real, failures = getattr(os, call), [error]

    def fail_once(*arguments):  # and then put back what was there
        if failures and not str(arguments[-1]).endswith(".replaced"):  # that has been moved aside
            raise failures.pop()
        return real(*arguments)

    monkeypatch.setattr(os, call, fail_once)
    expected = WriteError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match=getattr(error, "strerror", None)):
        write(path, "half")
    assert texts(tmp_path) == before
    if write is write_directory and not before:
        assert not path.parent.exists()  # which was made for it
    write(path, "whole")
    assert texts(tmp_path) == ["whole"]


def test_the_error_is_one_line_that_names_the_place(tmp_path):
    (tmp_path / "file").touch()
    for write in (write_file, write_directory):
        with pytest.raises(WriteError, match="cannot be written: Not a directory") as raised:
            write(tmp_path / "file" / "below", "")
        assert str(raised.value).startswith(str(tmp_path / "file" / "below"))
    lines = pytest.raises(WriteError, match="cannot be written: no such type$")
    with lines, atomic_file(tmp_path / "weights"):
        raise SafetensorError("no such\n  type")


@pytest.mark.parametrize("replaced_too", [False, True])
def test_what_a_killed_process_left_is_restored_or_removed(replaced_too, tmp_path):
    work, neighbour = tmp_path / "work[1]", tmp_path / ".work1.00ff.partial"
    neighbour.mkdir()
    for name in (".work[1].00ff.replaced", ".work[1].00ff.partial"):
        write_directory(tmp_path / name, "old")
    if replaced_too:
        write_directory(work, "new")
    clean_up_interrupted_writes(work)
    assert (work / "a").read_text() == ("new" if replaced_too else "old")
    assert sorted(tmp_path.iterdir()) == sorted([work, neighbour])


def test_the_directory_may_be_the_current_one(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    (tmp_path / ".work.00ff.partial").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    clean_up_interrupted_writes(Path("."))
    write_directory(Path("."), "new")
    assert list(tmp_path.iterdir()) == [tmp_path / "work"]
    assert texts(tmp_path) == ["new"]


def test_an_output_directory_is_new_empty_ours_or_to_be_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file, theirs, ours = Path("file"), Path("theirs"), Path("ours")
    file.touch()
    for folder, name in ((theirs, "notes"), (ours, SETTINGS_FILE)):
        folder.mkdir()
        (folder / name).touch()
    Path("empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for good in ("new", "new/below", "empty", "ours"):
        check_output(good)
    check_output(theirs, overwrite=True)
    refused = [(file, "is a file"), ("/", "the root of a disk"), (theirs, "no distillation wrote")]
    for directory, said in [*refused, (file / "new", "cannot be written: Not a directory")]:
        with pytest.raises(InputError, match=said):
            check_output(directory)
    assert sorted(tmp_path.rglob("*")) == before


def test_tensors_are_read_as_they_were_written_and_damaged_ones_not_at_all(tmp_path):
    file = tmp_path / "tensors"
    tensors = {"a": torch.arange(6).to(torch.uint16), "b": torch.ones(2, dtype=torch.bfloat16)}
    assert load_tensors(file) is None
    save_tensors(file, tensors, {"seed": 1})
    found = load_tensors(file)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name].double(), tensors[name].double()) for name in tensors)
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1]), b""):
        file.write_bytes(damaged)
        assert load_tensors(file) is None
    save_file(tensors, file)  # without a checksum
    assert load_tensors(file) is None
    a = torch.arange(6, dtype=torch.int32)
    others = {"b": a}, {"a": a.view(torch.uint32)}, {"a": a.view(2, 3)}, {"a": a.flip(0)}
    assert len({checksum(each) for each in ({"a": a}, *others)}) == 5


def test_the_cache_is_the_users_own(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "theirs"))
    assert cache_folder() == tmp_path / "theirs" / "willows_kd"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder() == Path.home() / ".cache" / "willows_kd"
