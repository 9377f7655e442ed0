"""Long and large: nothing piles up over the steps, and memory is a multiple of the text."""

import gc
import os
import sys

import pytest
import torch

import willows_kd as kd
from conftest import python

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
]

TEXT = 20_000_000  # characters
FACTOR = 16  # bytes of memory per character, at most: twice what it takes


def test_tensors_and_open_files_stay_as_many_over_the_steps(make_gpt2, blocks, tmp_path):
    few = kd.Blocks(blocks.train[:8, :8], blocks.validation[:1], blocks.test, blocks.remainder)
    teacher, student = (make_gpt2(layers=1, n_embd=16, seed=seed) for seed in (0, 1))
    config = kd.DistillConfig(epochs=20, batch_size=1, alpha=0.5)
    alive = []

    def watch(row):
        if "average_loss" in row:
            gc.collect()
            tensors = sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())
            alive.append((tensors, len(os.listdir("/proc/self/fd"))))

    places = kd.Checkpoints(tmp_path, minutes=0)
    kd.distill(teacher, student, few, config, watch, checkpoints=places)
    assert set(alive[2:]) == {alive[2]}  # until then it makes what it needs


PACK = """
import re, sys, willows_kd as kd
from willows_kd.models import BUNDLED_TEACHER, load_tokenizer

def most():
    with open("/proc/self/status") as status:
        return 1024 * int(re.search(r"VmHWM:\\s*(\\d+)", status.read())[1])

tokenizer = load_tokenizer(BUNDLED_TEACHER)
kd.pack(kd.load_corpus("sample"), tokenizer)  # what it takes whatever the text
before = most()
blocks = kd.pack(kd.load_corpus(sys.argv[1]), tokenizer)
print(most() - before, blocks.train.numel())
"""


def test_a_large_text_is_packed_in_memory_that_is_a_multiple_of_it(story, tmp_path):
    text = "\n\n".join([story.text] * (TEXT // len(story.text)))
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    held, tokens = map(int, python("-c", PACK, path).stdout.split())
    assert tokens > len(text) / 8
    assert held < FACTOR * len(text)
