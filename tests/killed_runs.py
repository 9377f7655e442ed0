"""A command line that is killed at each point of its writing in turn, and resumed.

    python tests/killed_runs.py OUTPUT OPTION...

Each run is a process of its own, forked from one that has done the slow imports. It kills itself
with SIGKILL at a point named below; the last one is left to end. Prints as JSON what was in the
output directory after each kill, and how the last one ended.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

from willows_kd import files  # noqa: F401  the slow imports, before any fork
from willows_kd.cli import distill as commands  # noqa: F401
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
    output = Path(sys.argv[1])
    arguments = ["distill", "--output_dir", str(output), *sys.argv[2:]]
    found = {}
    for name, point in POINTS.items():
        code = run(arguments, *point)
        assert code == -signal.SIGKILL, f"{name}: it ended with {code} before it was killed"
        found[name] = sorted(path.name for path in output.glob("*"))
    print(json.dumps({"after": found, "end": run(arguments)}))
