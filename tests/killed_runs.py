"""A command line that is killed again and again, each time as it stands, and resumed.

    python tests/killed_runs.py KILLS SEED OUTPUT OPTION...

Each run is a process of its own, forked from one that has done the slow imports, and is
killed with SIGKILL after a random time, or as soon as it begins to write a file. The last
one is left to end. Prints as JSON how many were killed, and how many of these while writing.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from willows_kd import commands  # noqa: F401  the slow imports, before any fork
from willows_kd.cli import main

LONGEST = 2.0  # seconds until a kill


def start(arguments: list[str]) -> int:
    """Run the command line in a child; returns its process id."""
    child = os.fork()
    if child:
        return child
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
    code = 1
    try:
        code = main(arguments)
    finally:
        os._exit(code)


def is_writing(output: Path) -> bool:
    """Whether a checkpoint or the output is half written at this moment."""
    checkpoints = output.with_name(f"{output.name}.checkpoints")
    return any(checkpoints.glob("*.partial")) or any(output.parent.glob(".*.partial"))


def end_of(child: int) -> int | None:
    """A child's exit code, as `waitpid` has it; None while it runs."""
    done, status = os.waitpid(child, os.WNOHANG)
    return status if done else None


def killed_at(child: int, moment: float, output: Path, while_writing: bool) -> tuple[bool, bool]:
    """Kill a child at a moment; returns whether it was killed, and whether it was writing."""
    fallback = time.monotonic() + 30
    while end_of(child) is None:
        now, writing = time.monotonic(), is_writing(output)
        if (now >= moment and (writing or not while_writing)) or now > fallback:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return True, writing
        time.sleep(0 if while_writing else 0.002)
    return False, False


if __name__ == "__main__":
    torch.set_num_threads(1)
    kills, seed, output = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    arguments = ["distill", "--output_dir", str(output), *sys.argv[4:]]
    draw = random.Random(seed)
    killed = writing = 0
    while killed < kills:
        child = start(arguments)
        moment = time.monotonic() + draw.uniform(0, LONGEST)
        was_killed, was_writing = killed_at(child, moment, output, while_writing=killed % 2 == 1)
        killed, writing = killed + was_killed, writing + was_writing
    _, status = os.waitpid(start(arguments), 0)
    print(json.dumps({"killed": killed, "writing": writing, "end": status}))
