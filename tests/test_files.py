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
    atomic_write,
    cache_folder,
    check_output,
    checksum,
    clean_up_interrupted_writes,
    load_tensors,
    save_tensors,
)


def write_file(path: Path, text: str) -> None:
    with atomic_write(path) as partial:
        partial.write_text(text)


def write_directory(path: Path, text: str) -> None:
    with atomic_write(path) as partial:
        partial.mkdir()
        (partial / "a").write_text(text)
        (partial / "folder").mkdir()


def texts(folder: Path) -> list[str]:
    """What all files below a folder hold; the hidden ones too."""
    return [path.read_text() for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("write", [write_file, write_directory])
@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("mkdir", KeyboardInterrupt()),
        ("fsync", OSError(28, "No space left on device")),
        ("replace", OSError(28, "No space left on device")),
        ("replace", KeyboardInterrupt()),
    ],
)
def test_a_write_that_fails_leaves_what_was_there(write, call, error, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise error

    expected = WriteError if isinstance(error, OSError) else KeyboardInterrupt
    for before in ([], ["old"]):
        for text in before:
            write(tmp_path / "work", text)
        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            with pytest.raises(expected, match=getattr(error, "strerror", None)):
                write(tmp_path / "work", "half")
        assert texts(tmp_path) == before
    write(tmp_path / "work", "whole")
    assert texts(tmp_path) == ["whole"]
    assert [path.name for path in tmp_path.iterdir()] == ["work"]


def test_what_cannot_be_put_back_at_once_is_put_back_later(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    write_directory(tmp_path / "work", "old")
    with monkeypatch.context() as patch, pytest.raises(WriteError):
        moves = iter([os.rename])  # of which the second one fails
        patch.setattr(os, "rename", lambda *paths: next(moves, fail)(*paths))
        patch.setattr(os, "replace", fail)
        write_directory(tmp_path / "work", "half")
    assert not (tmp_path / "work").exists()
    clean_up_interrupted_writes(tmp_path)
    assert texts(tmp_path) == ["old"]


def test_the_error_is_one_line_that_names_the_place(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="file/below cannot be written: File exists$"):
        write_file(tmp_path / "file" / "below", "")
    lines = pytest.raises(WriteError, match="weights cannot be written: no such type$")
    with lines, atomic_write(tmp_path / "weights"):
        raise SafetensorError("no such\n  type")


@pytest.mark.parametrize("replaced_too", [False, True])
def test_what_a_killed_process_left_is_restored_or_removed(replaced_too, tmp_path):
    work, left = tmp_path / "work[1]", tmp_path / ".work[1].12345678.partial"
    others = [tmp_path / f".{name}.12345678.partial" for name in ("work1", "work[1].more")]
    for other in others:
        other.mkdir()
    write_directory(left / "old", "old")
    write_directory(left / "new", "half")
    if replaced_too:
        write_directory(work, "new")
    clean_up_interrupted_writes(tmp_path, "work[[]1]")
    assert (work / "a").read_text() == ("new" if replaced_too else "old")
    assert sorted(tmp_path.iterdir()) == sorted([work, *others])


def test_the_directory_may_be_the_current_one(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    write_directory(Path("."), "new")
    assert list(tmp_path.iterdir()) == [tmp_path / "work"]
    assert texts(tmp_path) == ["new"]


def test_an_output_directory_is_new_or_empty_or_to_be_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in {"theirs/notes": "", f"ours/{SETTINGS_FILE}": '{"temperature": 2}'}.items():
        Path(name).parent.mkdir()
        Path(name).write_text(text)
    Path("file").touch()
    Path("empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for good in ("new", "new/below", "empty"):
        check_output(good)
    check_output("theirs", overwrite=True)
    for directory, said in {
        "file": "is a file",
        "/": "the root of a disk",
        "theirs": "theirs holds other files; .*add --overwrite",
        "ours": r"ours holds a student \(20\d\d-\d\d-\d\d \d\d:\d\d, T = 2, epochs: unknown\)",
        "file/new": "cannot be written: Not a directory",
        "Sch\udcc3ler": "locale does not know; set PYTHONUTF8=1",  # a byte that is no UTF-8
    }.items():
        with pytest.raises(InputError, match=said):
            check_output(directory)
    assert sorted(tmp_path.rglob("*")) == before
    for damaged in ("", "{", "[1]"):
        Path("ours", SETTINGS_FILE).write_text(damaged)
        with pytest.raises(InputError, match="a student .*, T = unknown"):
            check_output("ours")


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
