"""Real processes, killed at any point of writing or without room to write: nothing is lost."""

import json
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from conftest import python
from willows_kd.files import SETTINGS_FILE, cache_folder

ASIDE = ("the earlier output stands aside", "the earlier output is to be put back")
FINISHED = ("the output is in its place", "a checkpoint is cleared")
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
def options(model_dir, story, tmp_path) -> list[str]:
    """A job of some twelve steps, each followed by a checkpoint."""
    text = tmp_path / "text.txt"
    text.write_text(story.text[:22_000], encoding="utf-8")
    given = f"--model_dir {model_dir} --dataset_path {text} --block_size 32 --epochs 2 "
    return (given + "--checkpoint_minutes 0").split()


def test_killed_at_any_point_of_its_writing_nothing_is_lost(options, tmp_path):
    before, whole, killed = set(tmp_path.iterdir()), tmp_path / "whole", tmp_path / "killed"
    python("-m", "willows_kd", "distill", "--output_dir", whole, *options)
    killed.mkdir()
    (killed / SETTINGS_FILE).write_text("{}")  # an earlier output
    script = Path(__file__).with_name("killed_runs.py")
    again = ["--resume", "--overwrite", "--cache_teacher"]
    found = json.loads(python(script, killed, *again, *options).stdout)
    assert found["end"] == 0
    earlier, new = [SETTINGS_FILE], sorted(path.name for path in whole.iterdir())
    for point, names in found["after"].items():
        assert names == ([] if point in ASIDE else new if point in FINISHED else earlier), point
    weights, others = (load_file(folder / "model.safetensors") for folder in (whole, killed))
    assert all(torch.equal(others[name], weights[name]) for name in weights)
    rows = [pd.read_csv(folder / "history.csv").assign(seconds=0) for folder in (whole, killed)]
    pd.testing.assert_frame_equal(*rows, check_exact=True)
    assert set(tmp_path.iterdir()) == before | {whole, killed}
    [kept] = (cache_folder() / "teachers").iterdir()
    assert not list(kept.glob(".*"))  # nothing half written


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
