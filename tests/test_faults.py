"""A full disk, no memory, no permission: one clear line each, and nothing is lost."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import willows_kd as kd
from willows_kd.scale.checkpoints import Checkpoints

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits as Linux has them")

DISK = 16 * 2**20  # bytes


@pytest.fixture
def teacher(make_gpt2):
    """A tiny teacher with opinions."""
    return make_gpt2(initializer_range=0.15)


@pytest.fixture
def job(model_dir, story, tmp_path):
    """A function that runs a command line in a process of its own, under a limit."""
    text = tmp_path / "text.txt"
    text.write_text(story.text[:30_000], encoding="utf-8")
    given = f"--model_dir {model_dir} --dataset_path {text} --block_size 32 --epochs 2 "
    given += "--dtype float32"

    def job(output: Path, *more: str, limit: str = "pass"):
        code = f"import resource, sys\nfrom willows_kd.cli import distill as commands\n{limit}\n"
        code += "from willows_kd.cli import main\nsys.exit(main(sys.argv[1:]))"
        arguments = ["distill", *given.split(), "--output_dir", str(output), *more]
        return subprocess.run(
            [sys.executable, "-c", code, *arguments],
            capture_output=True,
            encoding="utf-8",
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            timeout=300,
        )

    return job


def one_line(stderr: str) -> str:
    """The error, which is all but the progress bars."""
    lines = [line for line in stderr.splitlines() if "step" not in line or "error" in line]
    lines = [line[line.find("error: ") :] for line in lines if "error: " in line]
    assert len(lines) == 1, stderr
    assert "Traceback" not in stderr
    return lines[0]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


NO_LARGE_FILES = "resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, {0}))"


@pytest.mark.slow
def test_where_no_file_can_grow_the_earlier_output_and_the_checkpoints_stay(job, tmp_path):
    output = tmp_path / "student"
    assert job(output, "--seed", "1").returncode == 0
    before = {file.name: file.read_bytes() for file in output.iterdir()}
    done = job(output, "--overwrite", limit=NO_LARGE_FILES.format(100_000))
    assert done.returncode == 3
    assert "cannot be written" in one_line(done.stderr)
    assert "⚠️ No checkpoint at step" in done.stdout
    assert {file.name: file.read_bytes() for file in output.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"teacher", "text.txt", "student"}


def test_without_room_for_temporary_files_the_student_is_saved_all_the_same(job, tmp_path):
    limit = """
from willows_kd import cost

def full(model):
    raise OSError(28, "No space left on device")

from willows_kd import evaluation
evaluation.size_on_disk = full
"""
    done = job(tmp_path / "student", limit=limit)
    assert done.returncode == 3
    assert "the student is trained and saved, but was not compared" in done.stdout
    assert "Traceback" not in done.stderr
    assert weights(tmp_path / "student")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own of a few megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small disk needs root, and leave to mount")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.slow
def test_a_disk_that_is_full_when_the_student_is_saved_keeps_the_checkpoint(
    job, small_disk, tmp_path
):
    whole = tmp_path / "whole"
    assert job(whole).returncode == 0
    size = sum(file.stat().st_size for file in whole.iterdir())
    checkpoint = 3 * (whole / "model.safetensors").stat().st_size  # weights and two moments
    filler = small_disk / "filler"  # leaves room for one, but not for the output as well
    filler.write_bytes(bytes(DISK - checkpoint - size // 2))
    output = small_disk / "student"
    done = job(output)
    assert done.returncode == 3, done.stdout
    assert "No space left on device" in one_line(done.stderr)
    assert not output.exists()
    assert list(small_disk.glob(".*")) == []  # nothing half-written
    newest = Checkpoints(small_disk / "student.checkpoints").newest()
    assert newest is not None
    filler.unlink()  # room again
    done = job(output, "--resume")
    assert done.returncode == 0, done.stderr
    for name, tensor in weights(output).items():
        assert torch.equal(tensor, weights(whole)[name])


LITTLE_MEMORY = """
distill = commands.distill

def limited(*arguments, **options):
    with open("/proc/self/statm") as statm:
        held = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + 30_000_000, held + 30_000_000))
    return distill(*arguments, **options)

commands.distill = limited
"""


def test_memory_that_runs_out_is_one_line_with_what_to_lower(job, tmp_path):
    done = job(tmp_path / "student", "--batch_size", "100000", limit=LITTLE_MEMORY)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "out of memory at step 1; lower the batch size" in one_line(done.stderr)
    assert {path.name for path in tmp_path.iterdir()} == {"teacher", "text.txt"}


@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_without_permission_is_refused_before_anything_is_loaded(job, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    done = job(locked / "student")
    assert done.returncode == 2
    assert "cannot be written" in one_line(done.stderr)
    assert done.stdout == ""


def test_an_output_directory_that_vanishes_is_made_again(job, tmp_path, teacher, blocks):
    output = tmp_path / "far" / "student"
    output.parent.mkdir()

    def vanish(row):
        shutil.rmtree(output.parent, ignore_errors=True)

    student = kd.student_from_teacher(teacher, 1)
    kept = Checkpoints(output.with_name("student.checkpoints"), 0)
    kd.distill(teacher, student, blocks, kd.DistillConfig(epochs=1), vanish, None, kept)
    assert kept.newest() is not None
