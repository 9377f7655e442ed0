"""Real processes, killed at any point of writing or without room to write: nothing is lost.

    python tests/test_kills.py OUTPUT OPTION...

does what the first test looks at: it runs the command line again and again, each time killed at a
point named below and then resumed. Each run is forked from this process, which has done the slow
imports. Prints as JSON what was in the output directory after each kill.
"""

import json
import os
import signal
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from conftest import python
from willows_kd import files
from willows_kd.cli import distill as commands  # noqa: F401  a slow import, before any fork
from willows_kd.cli import main

# when to die at a call of a function: which call, among those with a path that contains a text
POINTS = {
    "a shard of the cache is half written": ("half of", files, "save_file", "teachers", 2),
    "a shard is in its place": ("after", os, "replace", "teachers", 1),
    "a checkpoint is half written": ("half of", files, "save_file", "step_", 3),
    "a checkpoint has no name": ("before", os, "replace", "step_", 3),
    "older checkpoints are still there": ("after", os, "replace", "step_", 3),
    "an older checkpoint is removed": ("after", os, "unlink", "step_", 2),
    "the output is half written": ("before", Path, "write_text", "history.csv", 1),
    "the output is not on the disk": ("before", os, "fsync", "model.safetensors", 1),
    "the earlier output stands aside": ("after", os, "rename", ".partial/old", 1),
    "the earlier output is to be put back": ("before", os, "rename", ".partial/old", 1),
    "the earlier output is put back": ("after", os, "rename", ".partial/old", 1),
    "the output is in its place": ("after", os, "replace", "/.killed.", 1),
    "a checkpoint is cleared": ("after", os, "unlink", "step_", 1),
}
SETTINGS = files.SETTINGS_FILE
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
    (killed / SETTINGS).write_text("{}")  # an earlier output
    again = ["--resume", "--overwrite", "--cache_teacher"]
    found = json.loads(python(__file__, killed, *again, *options).stdout)
    assert found.pop("end") == 0
    earlier, new = [SETTINGS], sorted(path.name for path in whole.iterdir())
    for point, names in found.items():
        assert names == ([] if point in ASIDE else new if point in FINISHED else earlier), point
    weights, others = (load_file(folder / "model.safetensors") for folder in (whole, killed))
    assert all(torch.equal(others[name], weights[name]) for name in weights)
    rows = [pd.read_csv(folder / "history.csv").assign(seconds=0) for folder in (whole, killed)]
    pd.testing.assert_frame_equal(*rows, check_exact=True)
    assert set(tmp_path.iterdir()) == before | {whole, killed}
    [kept] = (files.cache_folder() / "teachers").iterdir()
    assert not list(kept.glob(".*"))  # nothing half written


def test_where_no_file_can_grow_the_earlier_output_stays(options, tmp_path):
    before, output = set(tmp_path.iterdir()), tmp_path / "student"
    output.mkdir()
    (output / SETTINGS).write_text("{}")
    arguments = ["distill", *options, "--output_dir", output, "--overwrite"]
    done = python("-c", NO_LARGE_FILES, *arguments, code=3)
    assert done.stderr.splitlines()[-1].startswith(f"error: {output} cannot be written")
    assert "Traceback" not in done.stderr
    assert "⚠️ No checkpoint at step" in done.stdout
    assert [path.name for path in output.iterdir()] == [SETTINGS]
    assert set(tmp_path.iterdir()) == before | {output}


# -- in the process that is run as a script --------------------------------------------


def kill_at(moment: str, module, name: str, text: str, number: int) -> None:
    """Make this process kill itself at a call of a function."""
    real = getattr(module, name)
    calls = []

    def hooked(*arguments, **keywords):
        if text in described(arguments):
            calls.append(arguments)
        if len(calls) < number or text not in described(arguments):
            return real(*arguments, **keywords)
        if moment != "before":
            real(*arguments, **keywords)
        if moment == "half of":
            os.truncate(arguments[1], os.path.getsize(arguments[1]) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(module, name, hooked)


def described(arguments: tuple) -> str:
    """The paths among the arguments; that of an open file is looked up."""
    paths = [a for a in arguments if isinstance(a, str | Path)]
    paths += [os.readlink(f"/proc/self/fd/{a}") for a in arguments if type(a) is int and a > 2]
    return " ".join(map(str, paths))


def run(arguments: list[str], *point) -> int:
    """Run the command line in a child; returns its exit code, or minus what killed it."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
    code = 1
    try:
        if point:
            kill_at(*point)
        code = main(arguments)
    finally:
        os._exit(code)


if __name__ == "__main__":
    torch.set_num_threads(1)
    output, found = Path(sys.argv[1]), {}
    arguments = ["distill", "--output_dir", str(output), *sys.argv[2:]]
    for name, point in POINTS.items():
        code = run(arguments, *point)
        assert code == -signal.SIGKILL, f"{name}: it ended with {code} before it was killed"
        found[name] = sorted(path.name for path in output.glob("*"))
    print(json.dumps(found | {"end": run(arguments)}))
