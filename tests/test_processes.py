"""Several processes on one job: the same student as from one, and only one that speaks."""

import json
import os
import subprocess
import sys

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import willows_kd as kd


@pytest.fixture
def teacher(make_gpt2):
    """A tiny teacher with opinions."""
    return make_gpt2(initializer_range=0.15)


@pytest.fixture
def text(tmp_path, story):
    path = tmp_path / "text.txt"
    path.write_text(story.text[:30_000], encoding="utf-8")
    return path


def start(command: list) -> str:
    """Run Python in new processes, with one thread each; returns what they said."""
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def run(launcher: list[str], model_dir, text, output, *more: str) -> str:
    """Distil in new processes; returns what they said."""
    options = f"--model_dir {model_dir} --dataset_path {text} --output_dir {output}".split()
    options += [
        "--block_size",
        "32",
        "--batch_size",
        "5",
        "--gradient_accumulation_steps",
        "2",
        "--epochs",
        "2",
    ]
    return start(["-m", *launcher, "willows_kd", "distill", *options, *more])


TORCHRUN = ["torch.distributed.run", "--nproc_per_node", "2", "-m"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "-m"]


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="names the loopback device as Linux does")
@pytest.mark.parametrize(
    ("launcher", "more"),
    [
        (TORCHRUN, ["--cache_teacher"]),
        (ACCELERATE, []),
        (TORCHRUN, ["--text", "mix", "--hidden_weight", "0.5"]),
    ],
    ids=["run", "launch", "writing"],
)
def test_two_processes_make_the_student_that_one_makes(model_dir, text, tmp_path, launcher, more):
    alone, together = tmp_path / "alone", tmp_path / "together"
    run([], model_dir, text, alone, *(word for word in more if word != "--cache_teacher"))
    said = run(launcher, model_dir, text, together, *more)
    assert said.count("Distilled model saved successfully") == 1
    a, b = (pd.read_csv(folder / "history.csv").set_index("step") for folder in (alone, together))
    assert list(a.tokens) == list(b.tokens)
    for column in ("loss", "gradient_norm", "validation_perplexity", "validation_kl"):
        assert a[column].dropna().tolist() == pytest.approx(b[column].dropna().tolist(), rel=1e-3)
    start = kd.student_from_teacher(kd.load_teacher(model_dir)[0]).state_dict()
    one, two = (load_file(folder / "model.safetensors") for folder in (alone, together))
    moved = torch.cat([(one[name] - start[name]).flatten() for name in one])
    apart = torch.cat([(one[name] - two[name]).flatten() for name in one])
    assert moved.norm() > 0
    assert apart.norm() < 0.02 * moved.norm()  # Adam makes steps of gradients that are rounding


@pytest.mark.processes
def test_of_two_processes_only_one_says_what_is_wrong(tmp_path):
    command = [*TORCHRUN, "willows_kd", "distill", "--model_dir", str(tmp_path / "nowhere")]
    result = subprocess.run(
        [sys.executable, "-m", *command],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
        timeout=300,
    )
    assert result.returncode != 0
    assert result.stderr.count("nowhere does not exist") == 1


FILL = """
import json, sys
import torch
import willows_kd as kd
from willows_kd import models, teacher_cache

model_dir, folder, samples = sys.argv[1:]
state, made = models.distributed_state(), []
outputs = teacher_cache.outputs

def counted(*arguments, **seed):
    if not made:  # each of the processes begins with a shard before any has written one
        state.wait_for_everyone()
    made.append(seed["seed"])
    return outputs(*arguments, **seed)

teacher_cache.outputs, teacher_cache.SHARD = counted, 16
teacher, tokenizer = kd.load_teacher(model_dir, "cpu")
blocks = kd.pack(kd.load_corpus("sample"), tokenizer, 32)
cache = kd.cache_teacher(teacher, blocks, samples=int(samples) or None, folder=folder)
with torch.no_grad():
    assert cache(blocks.train[-3:]).logits.isfinite().any()
print(json.dumps(made) + "\\n", end="")
"""


@pytest.mark.processes
@pytest.mark.parametrize("samples", [0, 3])
def test_two_processes_fill_one_cache_with_the_bits_that_one_writes(model_dir, tmp_path, samples):
    script = tmp_path / "fill.py"
    script.write_text(FILL)
    alone, together = tmp_path / "alone", tmp_path / "together"
    start([script, model_dir, alone, samples])
    said = start(["-m", *TORCHRUN[:-1], script, model_dir, together, samples])
    made = [json.loads(line) for line in said.splitlines() if line.startswith("[")]
    files = {file.relative_to(alone): file.read_bytes() for file in alone.glob("*/*")}
    assert all(made)
    assert sorted(made[0] + made[1]) == list(range(len(files)))  # each shard by one of them
    assert files == {f.relative_to(together): f.read_bytes() for f in together.glob("*/*")}
