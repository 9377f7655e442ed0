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

    def file(self, content: bytes = b"words"):
        path = self.folder / "file.txt"
        path.write_bytes(content)
        return path


@pytest.fixture
def things(teacher, tokenizer, story, blocks, tmp_path):
    return Things(teacher, tokenizer, story, blocks, tmp_path)


# A row is a rule: what is said, and the calls that break it. Losses, checkpoints, caches and the
# settings have theirs in their own files.
BAD = {
    # reading and packing
    "a source is a path": (
        "give the path of a text file",
        lambda t: kd.load_corpus(5),
        lambda t: kd.load_corpus(""),
        lambda t: kd.load_corpus(b"book.txt"),
    ),
    "a source can be read": ("cannot be read", lambda t: kd.load_corpus("a\0b")),
    "a source is text": (
        "is not text",
        lambda t: kd.load_corpus(t.file(bytes(range(32)) * 9)),
        lambda t: kd.load_corpus(t.file(b"\xff\xfe" + 50 * b"\x00\xd8a\x00")),
    ),
    "a corpus is packed": (
        "give what load_corpus returns",
        lambda t: kd.pack("text", t.tokenizer),
        lambda t: kd.pack(t.tokenizer, t.story),
    ),
    "packing needs a tokenizer": ("give that of the teacher", lambda t: kd.pack(t.story, None)),
    # models
    "a model is named": (
        "give a directory or a name",
        lambda t: kd.load_teacher(""),
        lambda t: kd.load_teacher(" "),
    ),
    "a model's name is text": ("the model is 5; give a directory", lambda t: kd.load_teacher(5)),
    "a model's name is one": ("does not exist", lambda t: kd.load_teacher("a\0b")),
    "a model is no file": ("is a file", lambda t: kd.load_teacher(t.file())),
    "a model has a config": ("no config.json", lambda t: kd.load_teacher(t.folder)),
    "a student needs a tokenizer": (
        "give that of the teacher",
        lambda t: kd.load_student(kd.models.BUNDLED_TEACHER, None),
    ),
    "a teacher comes without its tokenizer": (
        "teacher is a tuple",
        lambda t: kd.student_from_teacher((t.teacher, t.tokenizer)),
        lambda t: kd.distill((t.teacher, t.tokenizer), t.student, t.blocks),
    ),
    "a model comes without its tokenizer": (
        "model is a tuple",
        lambda t: kd.complete((t.teacher, t.tokenizer), t.tokenizer, "A"),
    ),
    "a completion has tokens": (
        "at least 1",
        lambda t: kd.complete(t.teacher, t.tokenizer, "A", 0),
        lambda t: kd.complete(t.teacher, t.tokenizer, "A", -1),
    ),
    "a prompt to write on from is token ids": (
        "give token ids of shape (prompts, length)",
        lambda t: kd.sample_continuations(t.teacher, "The Mole", 3),
        lambda t: kd.sample_continuations(t.teacher, [[1, 2]], 3),
        lambda t: kd.sample_continuations(t.teacher, t.ids[0], 3),
        lambda t: kd.sample_continuations(t.teacher, t.ids[:, :0], 3),
        lambda t: kd.sample_continuations(t.teacher, [], 3),
    ),
    "a prompt has ids that the model knows": (
        "the model knows",
        lambda t: kd.sample_continuations(t.teacher, t.ids * 0 - 1, 3),
        lambda t: kd.sample_continuations(t.teacher, t.ids * 0 + 10**6, 3),
    ),
    "a text ends where the positions end": (
        "the model reads 64",
        lambda t: kd.sample_continuations(t.teacher, t.ids, 64),
    ),
    "blocks are written from blocks": (
        "give what pack returns",
        lambda t: kd.make_transfer_set(t.teacher, t.blocks),
        lambda t: kd.make_transfer_set(t.teacher, t.ids[0]),
        lambda t: kd.make_transfer_set(t.teacher, t.ids[:, :1]),
    ),
    "a sampling temperature is not negative": (
        "at least 0",
        lambda t: kd.sample_continuations(t.teacher, t.ids, 3, math.nan),
        lambda t: kd.sample_continuations(t.teacher, t.ids, 3, "hot"),
        lambda t: kd.complete(t.teacher, t.tokenizer, "A", 3, -1),
        lambda t: kd.complete(t.teacher, t.tokenizer, "A", 3, math.nan),
        lambda t: kd.complete(t.teacher, t.tokenizer, "A", 3, math.inf),
    ),
    "a seed fits torch": (
        "from 0 to 2**63 - 1",
        lambda t: kd.sample_continuations(t.teacher, t.ids, 3, seed=-1),
        lambda t: kd.complete(t.teacher, t.tokenizer, "A", 3, seed=2**70),
    ),
    "sampling among k": (
        "0 for all tokens",
        lambda t: kd.complete(t.teacher, t.tokenizer, "A", 3, top_k=-1),
    ),
    "a text is drafted from one prompt": (
        "give token ids of shape (prompts, length)",
        lambda t: kd.speculative_decode(t.teacher, t.student, "The Mole", 3),
        lambda t: kd.speculative_decode(t.teacher, t.student, t.ids, 3),
        lambda t: kd.speculative_decode(t.teacher, t.student, t.ids[0, :0], 3),
    ),
    "so many tokens are drafted": (
        "a whole number, at least",
        lambda t: kd.speculative_decode(t.teacher, t.student, t.ids[0], 3, k=-1),
        lambda t: kd.speculative_decode(t.teacher, t.student, t.ids[0], 3, k=2.5),
    ),
    "a drafted text ends where the positions end": (
        "the teacher reads 64",
        lambda t: kd.speculative_decode(t.teacher, t.student, t.ids[0], 64),
    ),
    "a pass has tokens before it": (
        "give numbers from 1",
        lambda t: kd.decode_latency({"teacher": t.teacher}, t.ids, [t.ids.shape[1]]),
    ),
    "a model is saved in a directory": (
        "is a file; give a directory",
        lambda t: kd.save_model(t.student, t.tokenizer, t.file()),
    ),
    # training
    "a student is not its teacher": (
        "make the student with student_from_teacher",
        lambda t: kd.distill(t.teacher, t.teacher, t.blocks),
    ),
    "blocks come from pack": (
        "give what pack returns",
        lambda t: kd.distill(t.teacher, t.student, t.blocks.train),
        lambda t: kd.cache_teacher(t.teacher, t.blocks.train),
    ),
    "settings are a DistillConfig": (
        "config is a dict; give a DistillConfig",
        lambda t: kd.distill(t.teacher, t.student, t.blocks, {}),
    ),
    "a student can learn": (
        "set requires_grad_(True)",
        lambda t: kd.distill(t.teacher, t.frozen(), t.blocks),
    ),
    "blocks fit the teacher": (
        "blocks have 65 tokens, the teacher takes at most 64",
        lambda t: kd.distill(t.teacher, t.student, t.long()),
    ),
    # measuring
    "models have names": (
        "in a dict",
        lambda t: kd.compare([t.teacher], t.blocks, t.tokenizer),
    ),
    "there is a model": ("at least one", lambda t: kd.compare({}, t.blocks, t.tokenizer)),
    "costs are measured on ids": (
        "(batch, tokens)",
        lambda t: kd.latency({"a": t.teacher}, t.blocks),
        lambda t: kd.peak_memory(t.teacher, t.blocks),
    ),
    "latency is repeated": ("repeats is 0", lambda t: kd.latency({"a": t.teacher}, t.ids, 2, 0)),
    "latency of tokens": ("new_tokens is 0", lambda t: kd.latency({"a": t.teacher}, t.ids, 0)),
}


@pytest.mark.parametrize("rule", BAD)
def test_what_cannot_be_used_is_refused_in_one_line(rule, things, tmp_path):
    said, *calls = BAD[rule]
    weights = copy.deepcopy(things.student).state_dict()
    for call in calls:
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
COMPARE = "compare {narrow} {teacher} --block_size 32 --device cpu "

# One row for each source of an error; the ranges of the settings are tested in test_config.py.
BAD_COMMANDS = [
    # the command line itself
    ("train", "invalid choice: 'train'"),
    ("--epochs 1", "command"),
    (DISTILL + "--bogus 1", "--bogus"),
    (DISTILL + "surplus", "surplus"),
    (DISTILL + "--epochs", "expected one argument"),
    (DISTILL + "--epochs 1.5", "invalid int value: '1.5'"),
    (DISTILL + "--temperature warm", "invalid float value"),
    (DISTILL + "--dtype float16", "float32"),
    (DISTILL + "--divergence l2", "forward_kl"),
    # settings, checkpoints, devices
    (DISTILL + "--beta 1", "beta is 1.0; it must be above 0 and below 1"),
    (DISTILL + "--epochs 0", "epochs is 0; it must be a whole number, at least 1"),
    (DISTILL + "--checkpoint_minutes nan", "checkpoint minutes are nan; they must be at least 0"),
    (DISTILL + "--device meta", "device meta cannot be used here"),
    (DISTILL + "--on_policy_share 1 --cache_teacher", "leave it out"),
    (DISTILL + "--on_policy_share 1 --alpha 0.5", "must be 0 if the student writes the text"),
    # models
    (DISTILL + "--block_size 129", "block_size is 129; this model takes 2 to 128"),
    (DISTILL + "--layers 5", "layers is 5; this teacher allows 1 to 4"),
    (DISTILL + "--layers 2 --student {narrow}", "leave out --student"),
    (DISTILL + "--init last", "'last' is none of auto, spaced, first, influence, contiguous"),
    (DISTILL + "--init 0,4", "init is [0, 4]; layer numbers must rise and lie between 0 and 3"),
    (DISTILL + "--init 0,3 --layers 3", "be as many as layers, 3"),
    (DISTILL + "--model_dir {place}/missing", "does not exist"),
    (DISTILL + "--model_dir no-such-owner/no-such-model", "no-such-model"),
    (DISTILL + "--model_dir ''", "--model_dir: it is empty"),
    (DISTILL + "--student {place}/folder", "no config.json"),
    (DISTILL + "--student no-such-owner/no-such-model", "--student half"),
    (DISTILL + "--student {narrow} --block_size 65", "2 to 64"),
    # texts
    (DISTILL + "--dataset_path {place}/missing.txt", "does not exist"),
    (DISTILL + "--dataset_path {place}/short.txt", "too short"),
    (DISTILL + "--encoding nope", "nope"),
    (DISTILL + "--text_column body", "no columns"),
    # where the student goes
    (DISTILL + "--output_dir {place}/folder", "no distillation wrote"),
    (DISTILL + "--output_dir {place}/student", "T = 2.0, 3 epochs); choose another --output_dir"),
    (DISTILL + "--output_dir {place}/student --resume", "holds a student"),
    (DISTILL + "--output_dir {place}/short.txt/below/student", "cannot be written"),
    (DISTILL + "--overwrite --output_dir {place}/short.txt", "is a file"),
    (DISTILL + "--overwrite --output_dir /", "root of a disk"),
    (DISTILL + "--overwrite --output_dir {teacher}", "would be replaced"),
    (DISTILL + "--overwrite --output_dir {narrow} --student {narrow}", "would be replaced"),
    (
        DISTILL + "--overwrite --output_dir {place}/folder --dataset_path {place}/folder/poem.txt",
        "would be replaced",
    ),
    # the other commands
    ("generate --prompt A", "DIR"),
    ("generate {place}/missing", "does not exist"),
    ("generate {narrow} --max_new_tokens 0", "at least 1"),
    ("generate {narrow} --temperature nan", "at least 0"),
    ("generate {narrow} --top_k -1", "0 for all tokens"),
    ("generate {narrow} --seed -1", "from 0 to"),
    ("compare {narrow}", "at least two models"),
    ("compare {narrow} {narrow}", "each once"),
    ("compare {narrow} {teacher} --block_size 65", "this model takes 2 to 64"),
    (COMPARE + "--device tpu9", "cannot be used here"),
    (COMPARE + "--dataset_path {place}/short.txt", "too short"),
    (COMPARE + "--output_dir {place}/folder", "add --overwrite"),
    (COMPARE + "--output_dir {place}/student", "holds a student"),
    (COMPARE + "--output_dir {narrow} --overwrite", "would be replaced"),
    ("export {narrow} --output_dir {new}", "--to"),
    ("export {narrow} --to pickle --output_dir {new}", "invalid choice: 'pickle'"),
    ("export {narrow} --to gguf --output_dir {place}/text.txt", "is a file"),
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


@pytest.mark.parametrize("to", ["onnx", "onnx-int8", "gguf"])
def test_without_its_packages_export_says_what_to_install(to, place, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    output = tmp_path / "out"
    assert run(["export", str(place / "narrow"), "--to", to, "--output_dir", str(output)]) == 2
    shown = capsys.readouterr().err
    assert re.fullmatch(r'error: .* needs .*; pip install "willows-kd\[export\]"\n', shown)
    assert not output.exists()


# -- odd, but good ---------------------------------------------------------------------

ODD_TEXTS = {
    "one endless line": "the river ran on and on " * 8_000,
    "mixed line ends": "\r\n\r\n".join(f"The {n}th\rday\nof rain." for n in range(3_000)),
    "right to left": "\n\n".join(f"شجرة الصفصاف {n} عند النهر" for n in range(600)),
    "emoji": "\n\n".join(f"🐀🚣 {n} 🌊👨‍👩‍👧" for n in range(900)),
    "null characters": ("The Mole had been working. " * 40 + "\0") * 30,
    "a page of HTML": "<script>alert(1)</script><img src=x onerror=alert(1)>\n\n" * 300,
    "only headings": "\n\n".join(f"CHAPTER {n}\n\nText." for n in range(1, 900)),
}


def test_odd_texts_are_read_and_packed(tokenizer, tmp_path):
    for name, text in ODD_TEXTS.items():
        (tmp_path / "text.txt").write_bytes(text.encode())
        corpus = kd.load_corpus(tmp_path / "text.txt")
        blocks = kd.pack(corpus, tokenizer, block_size=64)
        assert min(map(len, (blocks.train, blocks.validation, blocks.test))) >= 1, name
        assert "\0" not in corpus.text, name


def test_an_odd_prompt_is_continued(teacher, tokenizer):
    for prompt in ("", "\ud800", "\0", "شجرة", "🐀", "<|endoftext|>", " \n "):
        assert isinstance(kd.complete(teacher, tokenizer, prompt, 2), str)
