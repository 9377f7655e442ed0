"""What the functions and the commands say to what they cannot use: one line, with what would do."""
# ruff: noqa: F811  a fixture's name is that of an argument

import copy
import dataclasses
import importlib.util
import math
import re
import shlex

import pytest
import torch
from test_cli import place, run  # noqa: F401 (a fixture)

import willows_kd as kd


class Things:
    """What the calls below are made with."""

    def __init__(self, teacher, tokenizer, story, blocks, folder):
        self.teacher, self.tokenizer, self.story, self.blocks = teacher, tokenizer, story, blocks
        self.student = kd.student_from_teacher(teacher, 1)
        self.ids, self.folder = blocks.train[:1], folder

    def frozen(self):
        return copy.deepcopy(self.student).requires_grad_(False)

    def long(self):
        return dataclasses.replace(self.blocks, train=torch.zeros(2, 65, dtype=torch.long))

    def file(self):
        path = self.folder / "file.txt"
        path.write_text("words")
        return path


@pytest.fixture
def things(teacher, tokenizer, story, blocks, tmp_path):
    return Things(teacher, tokenizer, story, blocks, tmp_path)


# What is said, and a call that breaks the rule. Losses, checkpoints, caches and the settings have
# theirs in their own files.
BAD = [
    ("give what load_corpus returns", lambda t: kd.pack(t.tokenizer, t.story)),
    ("block_size is 1; ", lambda t: kd.pack(t.story, t.tokenizer, 1)),
    # models
    ("holds no tokenizer; give the directory of a model", lambda t: kd.load_teacher(t.file())),
    ("config.json", lambda t: kd.load_teacher(t.folder)),
    ("is a file; give a directory", lambda t: kd.save_model(t.student, t.tokenizer, t.file())),
    # writing
    ("model is a tuple", lambda t: kd.complete((t.teacher, t.tokenizer), t.tokenizer, "A")),
    ("at least 1", lambda t: kd.complete(t.teacher, t.tokenizer, "A", 0)),
    ("at least 0", lambda t: kd.complete(t.teacher, t.tokenizer, "A", 3, math.nan)),
    ("from 0 to 2**63 - 1", lambda t: kd.complete(t.teacher, t.tokenizer, "A", 3, seed=2**70)),
    ("shape (prompts, length)", lambda t: kd.sample_continuations(t.teacher, "The Mole", 3)),
    ("shape (prompts, length)", lambda t: kd.sample_continuations(t.teacher, t.ids[0], 3)),
    ("the model knows", lambda t: kd.sample_continuations(t.teacher, t.ids * 0 + 10**6, 3)),
    ("the model reads 64", lambda t: kd.sample_continuations(t.teacher, t.ids, 64)),
    ("give what pack returns", lambda t: kd.make_transfer_set(t.teacher, t.ids[0])),
    ("shape (prompts, length)", lambda t: kd.speculative_decode(t.teacher, t.student, t.ids, 3)),
    ("at least", lambda t: kd.speculative_decode(t.teacher, t.student, t.ids[0], 3, k=-1)),
    ("reads 64", lambda t: kd.speculative_decode(t.teacher, t.student, t.ids[0], 64)),
    # training
    ("teacher is a tuple", lambda t: kd.distill((t.teacher, t.tokenizer), t.student, t.blocks)),
    ("with student_from_teacher", lambda t: kd.distill(t.teacher, t.teacher, t.blocks)),
    ("give what pack returns", lambda t: kd.distill(t.teacher, t.student, t.blocks.train)),
    ("give what pack returns", lambda t: kd.cache_teacher(t.teacher, t.blocks.train)),
    ("config is a dict", lambda t: kd.distill(t.teacher, t.student, t.blocks, {})),
    ("requires_grad_(True)", lambda t: kd.distill(t.teacher, t.frozen(), t.blocks)),
    ("takes at most 64", lambda t: kd.distill(t.teacher, t.student, t.long())),
    # measuring and drawing
    ("in a dict", lambda t: kd.compare([t.teacher], t.blocks, t.tokenizer)),
    ("(batch, tokens)", lambda t: kd.peak_memory(t.teacher, t.blocks)),
    ("repeats is 0", lambda t: kd.latency({"a": t.teacher}, t.ids, 2, 0)),
    ("numbers from 1", lambda t: kd.decode_latency({"a": t.teacher}, t.ids, [t.ids.shape[1]])),
    # one process has nothing to divide a teacher among
    ("there is one process", lambda t: kd.shard_teacher(t.teacher)),
]


@pytest.mark.parametrize(("said", "call"), BAD)
def test_what_cannot_be_used_is_refused_in_one_line(said, call, things, tmp_path):
    weights = copy.deepcopy(things.student).state_dict()
    with pytest.raises(kd.InputError) as refused:
        call(things)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"file.txt"}
    after = things.student.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in weights.items())


# -- the command line ------------------------------------------------------------------


DISTILL = (
    "distill --model_dir {teacher} --dataset_path {place}/text.txt --output_dir {new} --epochs 1 "
    "--block_size 32 --device cpu "
)

# One row for each source of an error; the ranges of the settings are tested in test_config.py.
BAD_COMMANDS = [
    # the command line itself
    ("train", "invalid choice: 'train'"),
    (DISTILL + "--bogus 1", "--bogus"),
    (DISTILL + "--epochs 1.5", "invalid int value: '1.5'"),
    (DISTILL + "--dtype float16", "float32"),
    # settings, checkpoints, devices
    (DISTILL + "--epochs 0", "epochs is 0; it must be a whole number, at least 1"),
    (DISTILL + "--checkpoint_minutes nan", "checkpoint minutes are nan; they must be at least 0"),
    (DISTILL + "--device meta", "device meta cannot be used here"),
    # models
    (DISTILL + "--block_size 129", "block_size is 129; these models take 2 to 128"),
    (DISTILL + "--layers 5", "layers is 5; this teacher allows 1 to 4"),
    (DISTILL + "--layers 2 --student {narrow}", "leave out --student"),
    (DISTILL + "--init last", "'last' is none of auto, spaced, first, influence, contiguous"),
    (DISTILL + "--init 0,4", "init is [0, 4]; layer numbers must rise and lie between 0 and 3"),
    (DISTILL + "--model_dir {place}/missing", "missing"),
    (DISTILL + "--model_dir ''", "model_dir is empty"),
    (DISTILL + "--student no-such-owner/no-such-model", "--student half"),
    # texts
    (DISTILL + "--dataset_path {place}/missing.txt", "missing.txt does not exist"),
    (DISTILL + "--dataset_path {place}/short.txt", "too short"),
    # where the student goes
    (DISTILL + "--output_dir {place}/folder", "holds other files; choose another"),
    (DISTILL + "--output_dir {place}/student --resume", "holds a student (20"),
    (DISTILL + "--overwrite --output_dir {place}/short.txt", "is a file"),
    (DISTILL + "--overwrite --output_dir /", "root of a disk"),
    (DISTILL + "--overwrite --output_dir {teacher}", "would be replaced"),
    (
        DISTILL + "--overwrite --output_dir {place}/folder --dataset_path {place}/folder/poem.txt",
        "would be replaced",
    ),
    # the other commands
    ("generate {place}/missing", "missing"),
    ("generate {narrow} --top_k -1", "0 for all tokens"),
    ("compare {narrow}", "at least two models"),
    ("compare {narrow} {narrow}", "each once"),
    ("compare {narrow} {teacher} --block_size 65", "these models take 2 to 64"),
    ("export {narrow} --to pickle --output_dir {new}", "invalid choice: 'pickle'"),
    ("export {narrow} --to gguf --output_dir {place}/student", "holds a student"),
    ("export {narrow} --to gguf --output_dir {place}/folder", "add --overwrite"),
    ("export {narrow} --to gguf --output_dir {place} --overwrite", "would be replaced"),
]


@pytest.mark.parametrize(("arguments", "said"), BAD_COMMANDS, ids=[row[0] for row in BAD_COMMANDS])
def test_a_bad_command_is_one_line_and_exit_code_2_and_writes_nothing(
    arguments, said, place, tmp_path, capsys
):
    before = sorted(place.rglob("*"))
    given = {"place": place, "new": tmp_path / "new"}
    given |= {name: place / name for name in ("narrow", "teacher")}
    assert run(shlex.split(arguments.format(**given))) == 2
    shown = capsys.readouterr()
    assert re.fullmatch(r"error: [^\n]+\n", shown.err)
    assert said in shown.err
    assert sorted(place.rglob("*")) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["onnx", "gguf"])
def test_without_its_packages_export_says_what_to_install(to, place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    output = tmp_path / "out"
    assert run(["export", str(place / "narrow"), "--to", to, "--output_dir", str(output)]) == 2
    shown = capsys.readouterr().err
    assert re.fullmatch(r'error: .* needs .*; pip install "willows-kd\[export\]"\n', shown)
    assert not output.exists()


# -- odd, but good ---------------------------------------------------------------------


def test_an_odd_prompt_is_continued(teacher, tokenizer):
    for prompt in ("", "\ud800", "\0", "شجرة", "<|endoftext|>", " \n "):
        assert isinstance(kd.complete(teacher, tokenizer, prompt, 2), str)
