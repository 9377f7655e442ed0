"""Real processes, killed at any point of their writing and resumed: the same student."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from willows_kd.files import SETTINGS_FILE, cache_folder

KILLS_OF_TWO = 3
ASIDE = ("the earlier output stands aside", "the earlier output is to be put back")
FINISHED = ("the output is in its place", "a checkpoint is cleared")
ALONE = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
LAUNCH = "-m accelerate.commands.launch --multi_gpu --num_processes 2 -m willows_kd distill"

pytestmark = [
    pytest.mark.kills,
    pytest.mark.skipif(sys.platform != "linux", reason="kills as Linux does"),
]


@pytest.fixture
def teacher(make_gpt2):
    """A tiny teacher with opinions."""
    return make_gpt2(initializer_range=0.15)


@pytest.fixture
def options(model_dir, story, tmp_path) -> list[str]:
    """A job of some forty steps, each followed by a checkpoint."""
    text = tmp_path / "text.txt"
    text.write_text(story.text[:40_000], encoding="utf-8")
    given = (
        f"--model_dir {model_dir} --dataset_path {text} --block_size 32 --epochs 2 --dtype float32"
    )
    return [*given.split(), "--checkpoint_minutes", "0"]


def python(*arguments) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        encoding="utf-8",
        env=os.environ | ALONE,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def outputs(folder: Path) -> tuple[dict[str, torch.Tensor], pd.DataFrame]:
    weights = load_file(folder / "model.safetensors")
    return weights, pd.read_csv(folder / "history.csv").drop(columns="seconds")


def test_killed_at_any_point_of_its_writing_nothing_is_lost(options, tmp_path):
    before, whole, killed = set(tmp_path.iterdir()), tmp_path / "whole", tmp_path / "killed"
    python("-m", "willows_kd", "distill", "--output_dir", whole, *options)
    killed.mkdir()
    (killed / SETTINGS_FILE).write_text("{}")  # an earlier output
    script = Path(__file__).with_name("killed_runs.py")
    again = ["--resume", "--overwrite", "--cache_teacher"]
    found = json.loads(python(script, 0, killed, *again, *options))
    assert found["end"] == 0
    earlier, new = [SETTINGS_FILE], sorted(path.name for path in whole.iterdir())
    for point, names in found["after"].items():
        assert names == ([] if point in ASIDE else new if point in FINISHED else earlier), point
    (weights, history), (again, history_again) = outputs(whole), outputs(killed)
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    pd.testing.assert_frame_equal(history_again, history, check_exact=True)
    assert set(tmp_path.iterdir()) == before | {whole, killed}
    [kept] = (cache_folder() / "teachers").iterdir()
    assert not list(kept.glob(".*"))  # nothing half written


def test_two_processes_that_are_killed_go_on_together(options, tmp_path):
    before, whole, killed = set(tmp_path.iterdir()), tmp_path / "whole", tmp_path / "killed"
    launch = [*LAUNCH.split(), *options, "--output_dir"]
    python(*launch, whole)
    draw = random.Random(0)
    for _ in range(KILLS_OF_TWO):
        last = newest(killed)
        running = subprocess.Popen(
            [sys.executable, *launch, str(killed), "--resume"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=os.environ | ALONE,
        )
        deadline = time.monotonic() + 300
        while newest(killed) == last and running.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 0.2))
        assert running.poll() is None, "it ended before it was killed"
        kill_family(running.pid)
        running.wait()
    python(*launch, killed, "--resume")
    (weights, history), (again, history_again) = outputs(whole), outputs(killed)
    torch.testing.assert_close(again, weights)
    pd.testing.assert_frame_equal(history_again, history)
    left = {path.name for path in set(tmp_path.iterdir()) - before}
    assert left == {"whole", "killed"}, left


def family(pid: int) -> list[int]:
    """A process and all that it has started; a launcher's are in sessions of their own."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it may end while we look
            state, parent = stat.read_text().rsplit(")", 1)[1].split()[:2]
            if state != "Z":
                parents[int(stat.parent.name)] = int(parent)
    found = [pid]
    for member in found:
        found += [child for child, parent in parents.items() if parent == member]
    return found


def kill_family(pid: int) -> None:
    """Kill them all at once, and wait until all are gone."""
    members = family(pid)
    for member in members:
        with contextlib.suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while any(is_alive(member) for member in members) and time.monotonic() < deadline:
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    """Whether a process still holds what it held: it is neither gone nor a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def newest(output: Path) -> str:
    """The name of the newest checkpoint beside an output directory."""
    found = output.with_name(f"{output.name}.checkpoints").glob("step_*.safetensors")
    return max((file.name for file in found), default="")
