"""How fast, how lean, how good: our training loop beside others that do the same.

    python benchmarks/race.py [--size tiny|gpt2|both] [--parts parity,speed,...]

All take turns on the same machine, so that a slow moment falls on all of them. First it is
made sure that all compute the same thing. A contestant whose package is missing or broken
is named and left out.
`pip install -e ".[bench]"` installs the packages; `race_report.py` writes what was found.
"""

import argparse
import contextlib
import copy
import dataclasses
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import psutil
import torch
from contestants import (
    CONTESTANTS,
    DEVICE,
    LINES,
    LOSSES,
    ON_POLICY,
    REFERENCE,
    SEED,
    Course,
    Shape,
    gpt2_course,
    loss_inputs,
    random_course,
    tiny_course,
)
from race_report import write_report

import willows_kd as kd

COURSES = {"tiny": tiny_course, "gpt2": gpt2_course}
STEPS = {"tiny": (2, 10), "gpt2": (1, 2)}  # uncounted and counted, of each contestant's turn
LINES_A_STEP = 8  # a turn of line by line has as many lines as the others have blocks
PARITY_STEPS = 6
TOLERANCE = 1e-5  # relative difference of losses
LOSS_TOKENS = (1024, 4096)
EVALUATIONS = 12  # on each curve, after the start
BASE = Shape(layers=6, width=224, heads=4, vocabulary=4096, block_size=128, batch_size=8)
GROWTH = {
    "tokens in a step": [(128 * n, {"batch_size": n}) for n in (4, 8, 16, 32)],
    "block length": [(n, {"block_size": n, "batch_size": 1024 // n}) for n in (64, 128, 256, 512)],
    "vocabulary": [(n, {"vocabulary": n}) for n in (2048, 4096, 8192, 16384)],
    "layers of the teacher": [(n, {"layers": n}) for n in (2, 6, 12, 24)],
}


class Finished(Exception):
    """Raised at a step's end to stop a training loop, whosever it is."""


def main() -> None:
    """Measure the parts that are asked for, and write them down."""
    options = read_options()
    torch.set_num_threads(options.threads)
    if options.probe:
        print(peak_memory(options.probe, options.size))
        return
    options.output_dir.mkdir(parents=True, exist_ok=True)
    left_out = {} if options.parts <= {"growth"} else find_broken()
    names = [name for name in CONTESTANTS if name not in left_out]
    sizes = list(COURSES) if options.size == "both" else [options.size]
    parts = {
        "parity": lambda: parity(names),
        "speed": lambda: speed(names, sizes, options),
        "memory": lambda: memory(names, sizes, options.threads),
        "curves": lambda: curves(names, options.seconds),
        "loss": lambda: losses([name for name in LOSSES if name not in left_out], options),
        "growth": lambda: growth(options),
        "on_policy": lambda: speed([n for n in ON_POLICY if n not in left_out], sizes, options),
    }
    for part, measure in parts.items():
        if part in options.parts:
            print(f"\n{part}", flush=True)
            frame = measure().assign(date=time.strftime("%Y-%m-%d"))
            name = "race.csv" if part == "speed" else f"race_{part}.csv"
            frame.to_csv(options.output_dir / name, index=False)
            if part == "parity" and frame["difference"].max() > TOLERANCE:
                sys.exit("no race: these do not compute the same thing")
    print("\n" + write_report(options.output_dir, left_out))


def read_options() -> argparse.Namespace:
    """The command line."""
    parts = ("parity", "speed", "memory", "curves", "loss", "growth", "on_policy")
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="both", help="tiny, gpt2 or both (default)")
    parser.add_argument("--repeats", type=int, default=7, help="rounds")
    parser.add_argument("--steps", type=int, help="counted in a turn (default: 10 tiny, 2 gpt2)")
    parser.add_argument("--seconds", type=float, default=20, help="of training, for each curve")
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--parts", default=",".join(parts), help=f"of {', '.join(parts)}")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--probe", help="print the peak memory of this contestant, in MB")
    options = parser.parse_args()
    options.parts = set(options.parts.split(","))
    if unknown := options.parts - set(parts):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    if not options.probe and options.size not in (*COURSES, "both"):
        parser.error(f"size is {options.size!r}; it must be tiny, gpt2 or both")
    return options


def find_broken() -> dict[str, str]:
    """The contestants that do not even manage one step, and why; ours must."""
    left_out = {}
    tried = {
        name: lambda name=name: seen_steps(name, tiny_course(), 1)
        for name in CONTESTANTS | ON_POLICY
    }
    tried |= {name: lambda f=f: f(*loss_inputs(4, 8, 16)).backward() for name, f in LOSSES.items()}
    for name, attempt in tried.items():
        try:
            attempt()
        except Exception as error:
            if name.startswith("ours"):
                raise
            reason = " ".join(str(error).split())[:150]
            left_out[name] = f"{type(error).__name__}: {reason}"
            print(f"{name} is left out: {left_out[name]}", flush=True)
    return left_out


def go(train) -> None:
    """Train until somebody says that it is enough; leave no memory behind."""
    with contextlib.suppress(Finished):
        train()
    gc.collect()


def synchronize() -> None:
    """Wait for the GPU's work, if there is one, before a clock is read."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seen_steps(name: str, course: Course, steps: int) -> list[dict]:
    """What a contestant reports of its first steps, and when it does."""
    rows = []

    def on_step(row):
        synchronize()
        rows.append(row | {"time": time.perf_counter()})
        if len(rows) == steps:
            raise Finished

    student = copy.deepcopy(course.student)
    start = time.perf_counter()
    train = (CONTESTANTS | ON_POLICY)[name](course, student, on_step)
    setup = time.perf_counter() - start
    go(train)
    return [row | {"setup": setup} for row in rows]


# -- do they compute the same thing? ---------------------------------------------------


def parity(names: list[str]) -> pd.DataFrame:
    """How far each contestant's first losses are from those of our full-logits loss."""
    course, rows = tiny_course(), []
    reference = [row["loss"] for row in seen_steps(REFERENCE, course, PARITY_STEPS)]
    for name in names:
        if name not in (REFERENCE, LINES) and "bfloat16" not in name:
            found = [row["loss"] for row in seen_steps(name, course, PARITY_STEPS)]
            apart = (abs(a - b) / b for a, b in zip(found, reference, strict=True))
            rows.append({"contestant": name, "difference": max(apart)})
            verdict = "the same" if rows[-1]["difference"] <= TOLERANCE else "NOT THE SAME"
            print(f"{name}: {rows[-1]['difference']:.1e}, {verdict}", flush=True)
    return pd.DataFrame(rows)


# -- how fast? -------------------------------------------------------------------------


def speed(names: list[str], sizes: list[str], options) -> pd.DataFrame:
    """Tokens a second of each contestant, and of a machine that only multiplied matrices."""
    rows, shuffler = [], random.Random(SEED)
    for size in sizes:
        course = COURSES[size]()
        uncounted, counted = STEPS[size]
        counted = options.steps or counted
        for repeat in range(options.repeats):
            turns = shuffler.sample([*names, "matmul"], len(names) + 1)
            found = {}
            for name in turns:
                if name == "matmul":
                    rates = {d: matmul_rates(course, d) for d in set(map(dtype_of, names))}
                else:
                    found[name] = turn(name, course, uncounted, counted)
                    print(size, repeat, name, found[name], flush=True)
            rows += [
                {
                    "size": size,
                    "repeat": repeat,
                    "contestant": name,
                    "blocks": len(course.blocks.train),
                }
                | {"limit": 1 / least_seconds(name, course, rates[dtype_of(name)]), **found[name]}
                for name in names
            ]
    return pd.DataFrame(rows)


def turn(name: str, course: Course, uncounted: int, counted: int) -> dict[str, float]:
    """Tokens a second over some steps, and the seconds before the first of them."""
    scale = LINES_A_STEP if name == LINES else 1
    rows = seen_steps(name, course, scale * (uncounted + counted))
    first, last = rows[scale * uncounted - 1], rows[-1]
    setup = first["setup"] + ("cached" in name) * course.cache[1]
    rate = (last["tokens"] - first["tokens"]) / (last["time"] - first["time"])
    return {"tokens_per_second": rate, "setup": setup}


def dtype_of(name: str) -> torch.dtype:
    """The numbers in which a contestant multiplies, and by whose rate it is judged."""
    return torch.bfloat16 if "bfloat16" in name else torch.float32


def matmul_rates(
    course: Course, dtype: torch.dtype, tokens: int = 1024, times: int = 5
) -> tuple[float, float]:
    """FLOP a second of the matrix products of a layer and of the head."""
    config = course.teacher.config
    like, rates = {"dtype": dtype, "device": DEVICE}, []
    for columns in (4 * config.n_embd, config.vocab_size):
        a = torch.randn(tokens, config.n_embd, **like)
        b = torch.randn(config.n_embd, columns, **like)
        out, seconds = torch.empty(tokens, columns, **like), []
        for _ in range(times):
            synchronize()
            start = time.perf_counter()
            torch.mm(a, b, out=out)
            synchronize()
            seconds.append(time.perf_counter() - start)
        rates.append(2 * tokens * config.n_embd * columns / statistics.median(seconds))
    return rates[0], rates[1]


def least_seconds(name: str, course: Course, rates: tuple[float, float]) -> float:
    """Seconds a token if there were nothing but the matrix products that have to be.

    That is the student three times (forward, and backward for inputs and for weights)
    and the teacher once, or of a cached teacher its head; attention is counted causal.
    """
    length = course.blocks.block_size
    if name == LINES:
        length = sum(map(len, course.lines)) / len(course.lines)

    def seconds(model, passes=1):
        config = model.config
        layer = 24 * config.n_embd**2 + 2 * length * config.n_embd
        head = 2 * config.n_embd * config.vocab_size
        return passes * config.n_layer * layer / rates[0] + head / rates[1]

    passes = 0 if "cached" in name else 1
    times = 4 if name in ON_POLICY else 3  # once more to write
    return times * seconds(course.student) + seconds(course.teacher, passes)


# -- how lean? -------------------------------------------------------------------------


def memory(names: list[str], sizes: list[str], threads: int) -> pd.DataFrame:
    """MB that training takes at most beyond the models, each in a process of its own."""
    rows = []
    for size in sizes:
        for name in names:
            rows.append({"size": size, "contestant": name, "mb": probe(name, size, threads)})
            print(rows[-1], flush=True)
    return pd.DataFrame(rows)


def probe(name: str, size: str, threads: int) -> float:
    """`peak_memory` in a new process that gives back at once what it frees."""
    asked = ["--probe", name, "--size", size, "--threads", str(threads)]
    done = subprocess.run(
        [sys.executable, __file__, *asked],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},  # glibc's; others do not mind
        stdout=subprocess.PIPE,
        encoding="utf-8",
        check=True,
    )
    return float(done.stdout.splitlines()[-1])


def peak_memory(name: str, size: str) -> float:
    """MB at most while training, or while computing a loss, beyond those before.

    Args:
        name: of a contestant or of a loss.
        size: for a contestant, that of a course or a `Shape` as JSON; for a loss, tokens.
    """
    if name in LOSSES:
        LOSSES[name](*loss_inputs(4, 8, 16)).backward()  # whatever is loaded when first used
        inputs = loss_inputs(int(size))
        return watch_memory(lambda: LOSSES[name](*inputs).backward())
    course = COURSES[size]() if size in COURSES else random_course(Shape(**json.loads(size)))
    seen_steps(name, course, 1)
    steps = []

    def on_step(row):
        steps.append(row)
        if len(steps) == (2 * LINES_A_STEP if name == LINES else 2):
            raise Finished

    train = CONTESTANTS[name](course, copy.deepcopy(course.student), on_step)
    return watch_memory(lambda: go(train))


def watch_memory(action, interval: float = 0.001) -> float:
    """MB that this process, or the GPU, holds at most during an action, beyond those before."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    process, done, seen = psutil.Process(), threading.Event(), []

    def watch():
        while not done.wait(interval):
            seen.append(process.memory_info().rss)

    gc.collect()
    before = process.memory_info().rss
    watcher = threading.Thread(target=watch)
    watcher.start()
    action()
    done.set()
    watcher.join()
    return (max(seen) - before) / 1e6


# -- how good, after the same time? ----------------------------------------------------


def curves(names: list[str], seconds: float) -> pd.DataFrame:
    """Validation KL against seconds of training, each contestant once.

    Line by line a second time, at a tenth of the learning rate: its steps are so small that
    the rate which suits the others is too much for them.
    """
    course, slower = tiny_course(), copy.copy(tiny_course())
    rate = course.config.learning_rate / 10
    slower.config = dataclasses.replace(course.config, learning_rate=rate)
    runs = [(name, name, course) for name in names]
    runs.append((f"{LINES}, a tenth of the rate", LINES, slower))
    rows = []
    for label, name, where in runs:
        rows += [{"contestant": label} | row for row in curve(name, where, seconds)]
        print(rows[-1], flush=True)
    return pd.DataFrame(rows)


def curve(name: str, course: Course, seconds: float) -> list[dict]:
    """One contestant's; the clock stands still while it is looked at."""
    student = copy.deepcopy(course.student)
    rows, clock, since = [], 0.0, 0.0

    def look(tokens):
        found = kd.evaluate(student, course.blocks.validation[:16], teacher=course.teacher)
        rows.append({"seconds": clock, "tokens": tokens, "kl": found["kl_to_teacher"]})

    def on_step(row):
        nonlocal clock, since
        clock += time.perf_counter() - since
        if clock >= len(rows) * seconds / EVALUATIONS:
            look(row["tokens"])
        if clock >= seconds:
            raise Finished
        since = time.perf_counter()

    look(tokens=0)
    train = (CONTESTANTS | ON_POLICY)[name](course, student, on_step)
    since = time.perf_counter()
    go(train)
    return rows


# -- the loss alone --------------------------------------------------------------------


def losses(names: list[str], options) -> pd.DataFrame:
    """Seconds and MB of each loss, forward and backward, for GPT-2's width and vocabulary."""
    rows, shuffler = [], random.Random(SEED)
    for tokens in LOSS_TOKENS:
        inputs = loss_inputs(tokens)
        peaks = {name: probe(name, str(tokens), options.threads) for name in names}
        for repeat in range(options.repeats + 1):
            for name in shuffler.sample(names, len(names)):
                for leaf in inputs[:2]:
                    leaf.grad = None
                synchronize()
                start = time.perf_counter()
                loss = LOSSES[name](*inputs)
                loss.backward()
                synchronize()
                seconds = time.perf_counter() - start
                row = {"tokens": tokens, "repeat": repeat, "contestant": name, "loss": loss.item()}
                rows.append(row | {"seconds": seconds, "mb": peaks[name]})
                print(rows[-1], flush=True)
    frame = pd.DataFrame(rows)
    spread = frame.groupby("tokens")["loss"].agg(lambda found: found.max() / found.min() - 1)
    if spread.max() > TOLERANCE:
        sys.exit(f"no race: the losses differ by {spread.max():.1e}")
    return frame[frame["repeat"] > 0]


# -- how the cost grows ----------------------------------------------------------------


def growth(options) -> pd.DataFrame:
    """Seconds and MB of one of our steps, as one size grows and the others stay."""
    points = [
        (axis, x, dataclasses.replace(BASE, **change))
        for axis, changes in GROWTH.items()
        for x, change in changes
    ]
    shapes = list(dict.fromkeys(shape for *_, shape in points))
    seconds = {shape: [] for shape in shapes}
    for _ in range(options.repeats):
        for shape in shapes:
            rows = seen_steps("ours", random_course(shape), 4)
            step = (rows[-1]["time"] - rows[0]["time"]) / 3
            seconds[shape].append(step)
    peaks = {}
    for shape in shapes:
        peaks[shape] = probe("ours", json.dumps(dataclasses.asdict(shape)), options.threads)
        print(shape, statistics.median(seconds[shape]), peaks[shape], flush=True)
    return pd.DataFrame(
        {"axis": axis, "x": x, "seconds": statistics.median(seconds[shape]), "mb": peaks[shape]}
        for axis, x, shape in points
    )


if __name__ == "__main__":
    main()
