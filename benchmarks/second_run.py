"""What a second run at another temperature costs, once the teacher's cache is there.

    python benchmarks/second_run.py [--rounds 5] [--epochs 1]

A GPT-2 of 12 layers with random weights and GPT-2's vocabulary, a student of 6, 32 blocks of 128
random tokens. Each round, in one process: a run at T = 1 that has to make the cache, a run at
T = 4 that finds it, and one at T = 4 with the teacher itself. Medians of each round's ratios go
to `results/second_run.csv`.
"""

import argparse
import contextlib
import copy
import io
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
from contestants import gpt2_course

import willows_kd as kd

RESULT = Path(__file__).parent / "results" / "second_run.csv"


def main() -> None:
    """Measure, print, write down."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=1)
    options = parser.parse_args()
    course = gpt2_course()
    seconds = []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            seconds.append(
                {
                    "first": run(course, 1.0, options.epochs, folder),
                    "second": run(course, 4.0, options.epochs, folder),
                    "no cache": run(course, 4.0, options.epochs),
                }
            )
        print({name: f"{value:.1f} s" for name, value in seconds[-1].items()}, flush=True)
    frame = pd.DataFrame(seconds)
    frame["second / first"] = frame["second"] / frame["first"]
    frame["second / no cache"] = frame["second"] / frame["no cache"]
    frame.assign(epochs=options.epochs, date=time.strftime("%Y-%m-%d")).to_csv(RESULT, index=False)
    print(frame[["second / first", "second / no cache"]].median().round(3).to_string())


def run(course, temperature: float, epochs: int, cache: str | None = None) -> float:
    """Seconds of a whole run, the cache made or found as it may be."""
    student = copy.deepcopy(course.student)
    config = replace(course.config, temperature=temperature, epochs=epochs)
    silence = io.StringIO()
    start = time.perf_counter()
    with contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        teacher = course.teacher
        if cache:
            teacher = kd.cache_teacher(teacher, course.blocks, folder=cache)
        kd.distill(teacher, student, course.blocks, config, loss=kd.ChunkedLoss)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
