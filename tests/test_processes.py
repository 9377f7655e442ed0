"""Several processes on one job: the same student as from one, and only one that speaks."""

import json
import os
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import willows_kd as kd
from conftest import python

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(sys.platform != "linux", reason="names the loopback device as Linux does"),
]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
DISTIL = ["-m", "willows_kd", "distill"]


@pytest.fixture
def teacher(make_gpt2):
    """A tiny teacher with opinions."""
    return make_gpt2(initializer_range=0.15)


@pytest.fixture
def options(model_dir, tmp_path, story) -> list[str]:
    """A job of two epochs; the output directory comes last."""
    text = tmp_path / "text.txt"
    text.write_text(story.text[:12_000], encoding="utf-8")
    given = f"--model_dir {model_dir} --dataset_path {text} --block_size 32 --batch_size 5 "
    given += "--gradient_accumulation_steps 2 --epochs 2 --dtype float32 --output_dir"
    return given.split()


def assert_trained_alike(start: dict, files, histories) -> None:
    """Two trained students and their histories are the same but for rounding."""
    one, two = map(load_file, files)
    for column in ("tokens", "loss", "gradient_norm", "validation_perplexity", "validation_kl"):
        values, others = (history[column].dropna().tolist() for history in histories)
        assert values == pytest.approx(others, rel=1e-3)
    moved = torch.cat([(one[name] - start[name]).flatten() for name in one])
    apart = torch.cat([(one[name] - two[name]).flatten() for name in one])
    assert moved.norm() > 0
    assert apart.norm() < 0.02 * moved.norm()  # Adam makes steps of gradients that are rounding


def stop_at_a_checkpoint(command: list, folder) -> None:
    """Start processes and end all of them once a checkpoint is there."""
    alone = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with subprocess.Popen([sys.executable, *map(str, command)], env=alone) as running:
        deadline = time.monotonic() + 300
        while not list(folder.glob("step_*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert running.poll() is None, "it ended before it was stopped"
        running.terminate()


@pytest.mark.parametrize(
    ("launcher", "more", "stopped"),
    [
        (TORCHRUN, ["--cache_teacher"], False),
        (ACCELERATE, ["--checkpoint_minutes", "0"], True),
        (TORCHRUN, ["--on_policy_share", "0.5", "--hidden_weight", "0.5"], False),
    ],
    ids=["cached", "stopped and resumed", "writing"],
)
def test_two_processes_make_the_student_that_one_makes(
    options, model_dir, tmp_path, launcher, more, stopped
):
    folders = alone, together = tmp_path / "alone", tmp_path / "together"
    python(*DISTIL, *options, alone, *(word for word in more if word != "--cache_teacher"))
    command = [*launcher, *DISTIL, *options, together, *more]
    if stopped:
        stop_at_a_checkpoint(command, tmp_path / "together.checkpoints")
        command.append("--resume")
    said = python(*command).stdout
    assert said.count("Distilled model saved successfully") == 1
    assert said.count("Resuming from step") == stopped
    assert not (tmp_path / "together.checkpoints").exists()
    assert_trained_alike(
        kd.student_from_teacher(kd.load_teacher(model_dir)[0]).state_dict(),
        [folder / "model.safetensors" for folder in folders],
        [pd.read_csv(folder / "history.csv") for folder in folders],
    )


def test_of_two_processes_only_one_says_what_is_wrong(tmp_path):
    failed = python(*TORCHRUN, *DISTIL, "--model_dir", tmp_path / "nowhere", code=1)
    assert failed.stderr.count("nowhere does not exist") == 1


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


def test_a_teacher_sharded_over_two_processes_makes_the_student_that_it_makes_whole(
    model_dir, tmp_path
):
    script, files = tmp_path / "shard.py", [tmp_path / "alone", tmp_path / "together"]
    script.write_text(SHARD)
    said = [
        python(*launcher, script, model_dir, file).stdout
        for launcher, file in zip(([], TORCHRUN), files, strict=True)
    ]
    start = kd.student_from_teacher(kd.load_teacher(model_dir)[0], 1).state_dict()
    histories = [pd.DataFrame(json.loads(each.splitlines()[-1])) for each in said]
    assert_trained_alike(start, files, histories)
