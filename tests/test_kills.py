"""Real processes, killed at any point of writing or without room to write: nothing is lost."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from willows_kd.files import SETTINGS_FILE, cache_folder

ASIDE = ("the earlier output stands aside", "the earlier output is to be put back")
FINISHED = ("the output is in its place", "a checkpoint is cleared")
ALONE = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
LAUNCH = "-m accelerate.commands.launch --multi_gpu --num_processes 2 -m willows_kd distill"
NO_LARGE_FILES = """
import resource, sys
from willows_kd.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
sys.exit(main(sys.argv[1:]))
"""

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
    given = f"--model_dir {model_dir} --dataset_path {text} --block_size 32 --epochs 2 "
    return (given + "--checkpoint_minutes 0").split()


def python(*arguments, code: int = 0) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", env=os.environ | ALONE, timeout=600
    )
    assert done.returncode == code, done.stderr
    return done


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
    found = json.loads(python(script, 0, killed, *again, *options).stdout)
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


def test_two_processes_that_are_stopped_go_on_together(options, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    launch = [*LAUNCH.split(), *options, "--output_dir"]
    python(*launch, whole)
    with subprocess.Popen([sys.executable, *launch, stopped], env=os.environ | ALONE) as running:
        deadline = time.monotonic() + 300
        while not list(tmp_path.glob("stopped.checkpoints/step_*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert running.poll() is None, "it ended before it was stopped"
        running.terminate()  # and with it both processes
    python(*launch, stopped, "--resume")
    (weights, history), (again, history_again) = outputs(whole), outputs(stopped)
    torch.testing.assert_close(again, weights)
    pd.testing.assert_frame_equal(history_again, history)
    assert not (tmp_path / "stopped.checkpoints").exists()


def test_where_no_file_can_grow_the_earlier_output_stays(options, tmp_path):
    before, output = set(tmp_path.iterdir()), tmp_path / "student"
    output.mkdir()
    (output / SETTINGS_FILE).write_text("{}")
    arguments = ["distill", *options, "--output_dir", output, "--overwrite"]
    done = python("-c", NO_LARGE_FILES, *arguments, code=3)
    assert done.stderr.splitlines()[-1].startswith(f"error: {output} cannot be written")
    assert "Traceback" not in done.stderr
    assert "⚠️ No checkpoint at step" in done.stdout
    assert [path.name for path in output.iterdir()] == [SETTINGS_FILE]
    assert set(tmp_path.iterdir()) == before | {output}
