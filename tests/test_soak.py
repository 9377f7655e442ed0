"""Long and large: memory and open files stay flat over thousands of steps, and with the text."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import willows_kd as kd
from willows_kd.checkpoints import Checkpoints

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

STEPS = 3_000
WARM = 500  # steps until allocators have what they need
GROWTH = 2_000  # bytes a step: a row of the history has half of that
TEXT = 20_000_000  # characters
FACTOR = 26  # bytes of memory a character, at most: some ten copies of the text, and its tokens


def resident() -> int:
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_and_open_files_are_flat_over_thousands_of_steps(make_gpt2, blocks, tmp_path):
    few = kd.Blocks(blocks.train[:, :8], blocks.validation[:1], blocks.test, blocks.remainder)
    teacher = make_gpt2(layers=1, n_embd=16)
    student = make_gpt2(layers=1, n_embd=16, seed=1)
    config = kd.DistillConfig(epochs=STEPS // len(few.train), batch_size=1, alpha=0.5)
    memory, files = {}, {}

    def watch(row):
        if row["step"] % 100 == 0:
            memory[row["step"]] = resident()
            files[row["step"]] = len(os.listdir("/proc/self/fd"))

    kd.distill(teacher, student, few, config, watch, Checkpoints(tmp_path, minutes=1 / 60))
    start = next(step for step in memory if step >= WARM)
    growth = {step: held - memory[start] for step, held in memory.items() if step > start}
    slope = sum(growth[s] * (s - start) for s in growth) / sum((s - start) ** 2 for s in growth)
    print(f"{slope:.0f} bytes a step over {max(memory)} steps, {set(files.values())} open files")
    assert slope < GROWTH
    assert len({files[step] for step in files if step >= start}) == 1


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


@pytest.mark.parametrize("shape", ["a book", "one line"])
def test_a_large_text_is_packed_in_memory_that_is_a_multiple_of_it(shape, story, tmp_path):
    text = "\n\n".join([story.text] * (TEXT // len(story.text)))
    if shape == "one line":
        text = " ".join(text.split())
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-c", PACK, path], capture_output=True, encoding="utf-8", timeout=600
    )
    assert done.returncode == 0, done.stderr
    held, tokens = map(int, done.stdout.split())
    print(f"{held / len(text):.1f} bytes a character")
    assert tokens > len(text) / 8
    assert held < FACTOR * len(text)
