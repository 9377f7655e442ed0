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

processes = pytest.mark.processes


@pytest.fixture
def teacher(make_gpt2):
    """A tiny teacher with opinions."""
    return make_gpt2(initializer_range=0.15)


@pytest.fixture
def text(tmp_path, story):
    path = tmp_path / "text.txt"
    path.write_text(story.text[:30_000], encoding="utf-8")
    return path


def start(command: list, fails: bool = False) -> str:
    """Run Python in new processes, with one thread each; returns what they said."""
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        capture_output=True,
        encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        timeout=300,
    )
    assert (result.returncode != 0) == fails, result.stderr
    return result.stderr if fails else result.stdout


def run(launcher: list[str], model_dir, text, output, *more: str) -> str:
    """Distil in new processes; returns what they said."""
    options = f"--model_dir {model_dir} --dataset_path {text} --output_dir {output}".split()
    options += ["--block_size", "32", "--batch_size", "5", "--gradient_accumulation_steps", "2"]
    options += ["--epochs", "2", "--dtype", "float32"]
    return start(["-m", *launcher, "willows_kd", "distill", *options, *more])


TORCHRUN = ["torch.distributed.run", "--nproc_per_node", "2", "-m"]
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "-m"]


@processes
@pytest.mark.skipif(sys.platform != "linux", reason="names the loopback device as Linux does")
@pytest.mark.parametrize(
    ("launcher", "more"),
    [
        (TORCHRUN, ["--cache_teacher"]),
        (ACCELERATE, []),
        (TORCHRUN, ["--on_policy_share", "0.5", "--hidden_weight", "0.5"]),
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
    one, two = (load_file(folder / "model.safetensors") for folder in (alone, together))
    start = kd.student_from_teacher(kd.load_teacher(model_dir)[0]).state_dict()
    assert_trained_alike(start, one, two, a, b)


def assert_trained_alike(start: dict, one: dict, two: dict, history, other_history) -> None:
    """Two trained students and their histories are the same but for rounding."""
    for column in ("loss", "gradient_norm", "validation_perplexity", "validation_kl"):
        values, others = (h[column].dropna().tolist() for h in (history, other_history))
        assert values == pytest.approx(others, rel=1e-3)
    moved = torch.cat([(one[name] - start[name]).flatten() for name in one])
    apart = torch.cat([(one[name] - two[name]).flatten() for name in one])
    assert moved.norm() > 0
    assert apart.norm() < 0.02 * moved.norm()  # Adam makes steps of gradients that are rounding


@processes
def test_of_two_processes_only_one_says_what_is_wrong(tmp_path):
    command = [*TORCHRUN, "willows_kd", "distill", "--model_dir", str(tmp_path / "nowhere")]
    said = start(["-m", *command], fails=True)
    assert said.count("nowhere does not exist") == 1


SHARD = """
import json, sys
from safetensors.torch import save_file
import willows_kd as kd
from willows_kd import models

model_dir, output = sys.argv[1:]
state = models.distributed_state()
teacher, tokenizer = kd.load_teacher(model_dir, "cpu")
packed = kd.pack(kd.load_corpus("sample"), tokenizer, 32)
blocks = kd.Blocks(packed.train[:20], packed.validation[:6], packed.test[:6], packed.remainder)
student = kd.student_from_teacher(teacher, 1)
digest = kd.fingerprint(teacher)
if state.num_processes > 1:
    held = lambda: sum(getattr(w, "to_local", lambda: w)().numel() for w in layers.parameters())
    layers = teacher.transformer.h
    whole = held()
    kd.shard_teacher(teacher)
    assert held() == whole / 2
    try:
        kd.cache_teacher(teacher, blocks)
        raise AssertionError("a sharded teacher cannot be cached")
    except kd.InputError as error:
        assert "the teacher is sharded" in str(error)
config = kd.DistillConfig(epochs=2, batch_size=4, hidden_weight=0.5, temperature=2)
folder = kd.Checkpoints(output + ".checkpoints")
history = kd.distill(teacher, student, blocks, config, loss=kd.ChunkedLoss, checkpoints=folder)
assert kd.fingerprint(teacher) == digest
if state.is_main_process:
    save_file({name: w for name, w in student.named_parameters()}, output)
    print(json.dumps(history))
"""


@processes
def test_a_teacher_sharded_over_two_processes_makes_the_student_that_it_makes_whole(
    model_dir, tmp_path
):
    script = tmp_path / "shard.py"
    script.write_text(SHARD)
    alone, together = tmp_path / "alone", tmp_path / "together"
    said = [start([script, model_dir, alone])]
    said.append(start(["-m", *TORCHRUN[:-1], script, model_dir, together]))
    histories = [pd.DataFrame(json.loads(each.splitlines()[-1])) for each in said]
    before = kd.student_from_teacher(kd.load_teacher(model_dir)[0], 1).state_dict()
    assert_trained_alike(before, load_file(alone), load_file(together), *histories)


def test_one_process_has_nothing_to_shard(teacher):
    with pytest.raises(kd.InputError, match="there is one process, .*torchrun"):
        kd.shard_teacher(teacher)
