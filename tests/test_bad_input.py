"""What the functions and the commands say to what they cannot use: one line, with what would do."""
# ruff: noqa: F811  a fixture's name is that of an argument

import dataclasses
import importlib.util
import math
import re
import shlex
from copy import deepcopy

import pytest
import torch
from test_cli import place, run  # noqa: F401 (a fixture)
from test_corpus import CHAT, TEMPLATE, chats, own_tables, with_template  # noqa: F401 (a fixture)

import willows_kd as kd
from willows_kd import cost, losses

LONG = torch.zeros(2, 65, dtype=torch.long)
Z, IDS = torch.zeros(2, 4, 11), torch.zeros(2, 4, dtype=torch.long)
CYRILLIC = "Крот".encode("cp1251")
HTML = b"\xef\xbb\xbf\n <!DOCTYPE HTML>\n<p>It rained."
OTHERS = b'{"a": "b", "c": "d"}'
NO_ROWS = b'{"text": " "}'
LISTS = b'{"prompt": "a", "completion": ["b"]}'
LARGER = {"vocab_size": 5000}
HIDDEN, FAR = {"hidden_weight": 1.0}, {"hidden_layers": ((1, 9),)}
NONE, ODD = torch.zeros(24, 32, dtype=torch.bool), torch.ones(2, 3, dtype=torch.bool)
REWRITES, REFUSES = "{{ messages | length }}", "{{ raise_exception('no\n system') }}"


class Things:
    """What the calls below are made with."""

    folder = None  # an empty one

    def __init__(self, make_gpt2, tokenizer, story, blocks):
        self.make, self.teacher, self.tokenizer = make_gpt2, make_gpt2(), tokenizer
        self.story, self.blocks, self.ids = story, blocks, blocks.train[:1]
        self.student = kd.student_from_teacher(self.teacher, 1)
        self.headless, self.unknown = self.teacher.transformer, torch.full((1, 8), 4096)

    def file(self, raw=b"words", name="file.txt"):
        path = self.folder / name
        path.write_bytes(raw)
        return path

    def read(self, name, raw, column=None, encoding=None):
        return kd.load_corpus(self.file(raw, name), column, encoding)

    def short(self):
        return kd.Corpus("a", "the text", ("The Mole had been working.",))

    def form(self, messages, template):
        return kd.pack(chats({"messages": messages}), with_template(self.tokenizer, template), 16)

    def cut(self, layers, init="spaced"):
        return kd.student_from_teacher(self.teacher, layers, init)

    def text(self, **changes):
        return dataclasses.replace(self.blocks, **changes)

    def distill(self, teacher=None, student=None, blocks=None, **settings):
        """Training that must not reach the end of its first step."""
        given = teacher or self.teacher, student or self.student, blocks or self.blocks
        failed = lambda row: pytest.fail("a step was made")  # noqa: E731
        return kd.distill(*given, kd.DistillConfig(batch_size=1, **settings), failed)

    def evaluate(self, teacher):
        return kd.evaluate(self.student, self.ids, teacher=teacher)

    def compare(self, model):
        return kd.compare({"a": self.teacher, "small": model}, self.blocks, self.tokenizer)

    def frozen(self):
        return deepcopy(self.student).requires_grad_(False)

    def sampled(self):
        return kd.cache_teacher(self.teacher, self.blocks, samples=4)

    def padded(self):
        padded = deepcopy(self.tokenizer)
        padded.add_special_tokens({"pad_token": "[PAD]"})
        return padded


# What is said, and a call that breaks the rule. Downloads, damaged models, checkpoints, caches and
# the settings have theirs in their own files.
BAD = [
    # texts
    ("here/no.txt cannot be read: No such file", lambda t: kd.load_corpus("here/no.txt")),
    ("no.csv cannot be read as csv ([Errno 2] No such", lambda t: kd.load_corpus("no.csv")),
    ("here/no cannot be read as a file or as a data set", lambda t: kd.load_corpus("here/no")),
    ("cannot be read: Is a directory", lambda t: kd.load_corpus(t.folder)),
    ("a.txt holds no text", lambda t: t.read("a.txt", b"")),
    ("a.txt holds no text", lambda t: t.read("a.txt", b"[Illustration]\n\n* * *")),
    ("a.txt is not text in UTF-8; ", lambda t: t.read("a.txt", CYRILLIC)),
    ("encoding= (--encoding)", lambda t: t.read("a.txt", "It rained.".encode("utf-16-le"))),
    ("not text in utf-8; ", lambda t: t.read("a.txt", CYRILLIC, None, "utf-8")),
    ("'cp1' is no known encoding", lambda t: t.read("a.txt", b"It rained.", None, "cp1")),
    ("a.txt is a PDF; save it as plain text", lambda t: t.read("a.txt", b"%PDF-1.7\n%\xe2\xe3")),
    ("a.txt is HTML", lambda t: t.read("a.txt", HTML)),
    ("a.txt is HTML", lambda t: t.read("a.txt", HTML[3:].decode().encode("utf-16"))),
    # tables
    ("no column 'text' of text; its columns are a, c: ", lambda t: t.read("a.jsonl", OTHERS)),
    ("no column 'n' of text", lambda t: t.read("a.jsonl", b'{"n": 1, "text": "a"}', "n")),
    ("holds no text", lambda t: t.read("a.jsonl", NO_ROWS)),
    ("'completion' of text", lambda t: t.read("a.jsonl", LISTS)),
    ("one column, 'id;text'; put commas", lambda t: t.read("a.csv", b"id;text\n1;It rained.\n")),
    ("cannot be read as json", lambda t: t.read("a.jsonl", b'{"text": "It rained.')),
    ("name its encoding (--encoding)", lambda t: t.read("a.csv", b"text\n" + CYRILLIC)),
    ("has no columns", lambda t: t.read("a.txt", b"It rained.", "text")),
    # blocks and chats
    ("give what load_corpus returns", lambda t: kd.pack(t.tokenizer, t.story)),
    ("block_size is 1; ", lambda t: kd.pack(t.story, t.tokenizer, 1)),
    ("text is too short: its train part", lambda t: kd.pack(t.short(), t.tokenizer, 32)),
    ("chat_template is not set", lambda t: t.form(CHAT, None)),
    ("template refuses a row (no system); take", lambda t: t.form(CHAT, REFUSES)),
    ("rewrites a chat once it is answered; take", lambda t: t.form(CHAT, REWRITES)),
    ("has no answer", lambda t: t.form(CHAT[:1], TEMPLATE)),
    # losses
    ("logits have shape (2, 4, 11), the teacher's (4, 11); ", lambda t: kd.forward_kl(Z, Z[0])),
    ("hidden states have shape (2, 4, 11), the", lambda t: kd.cosine_distance(Z, Z[..., :8])),
    ("mask has shape (4, 2); it must have (2, 4)", lambda t: kd.forward_kl(Z, Z, mask=IDS.T)),
    ("must be token ids (torch.long) of shape (2, 4)", lambda t: kd.hard_label_loss(Z, Z[..., 0])),
    ("of shape (4, 2); they must be token ids", lambda t: kd.hard_label_loss(Z, IDS.T)),
    ("(2, 4, 11) and ids of shape (2, 3) do not go together", lambda t: kd.shift(Z, IDS[:, :3])),
    ("logits are a list; give a tensor", lambda t: kd.soften([1.0, 2.0])),
    ("temperature is 0; it must be", lambda t: kd.reverse_kl(Z, Z, 0)),
    ("temperature is inf; it must be", lambda t: kd.top_k(Z, 2, math.inf)),
    ("k is 0; it must", lambda t: kd.top_k(Z, 0)),
    ("k is 12; it must", lambda t: kd.top_k(Z, 12)),
    ("alpha is 1.1; it must", lambda t: losses.mix(1.0, 2.0, 1.1)),
    ("mixture is 0; beta and skew must", lambda t: kd.jensen_shannon(Z, Z, beta=0)),
    ("mixture is 1; beta and skew must", lambda t: losses.skewed_forward_kl(Z, Z, skew=1)),
    ("mixture is nan; beta and skew", lambda t: losses.skewed_reverse_kl(Z, Z, skew=math.nan)),
    # models
    ("'pupil'; there are base, teacher, student, student_h", lambda t: kd.load_bundled("pupil")),
    ("'marks'; there are ", lambda t: kd.stored_results("marks")),
    ("holds no tokenizer; give the directory of a model", lambda t: kd.load_teacher(t.file())),
    ("config.json", lambda t: kd.load_teacher(t.folder)),
    ("is a file; give a directory", lambda t: kd.save_model(t.student, t.tokenizer, t.file())),
    # students
    ("layers is 0; this teacher allows 1 to 4", lambda t: t.cut(0)),
    ("layers is 5; this teacher allows 1 to 4", lambda t: t.cut(5, "random")),
    ("layers is 2.0; this teacher allows 1 to 4", lambda t: t.cut(2.0, "first")),
    ("init is 'last'; it must be spaced, first, random or a list", lambda t: t.cut(2, "last")),
    ("init is None; it must be spaced, first, random or a list", lambda t: t.cut(2, None)),
    ("init is '012'; it must be spaced", lambda t: t.cut(None, "012")),
    ("layer numbers must rise and lie between 0 and 3", lambda t: t.cut(None, [])),
    ("init is [2, 1]; layer numbers must rise", lambda t: t.cut(None, [2, 1])),
    ("init is [1, 1]; layer numbers must rise", lambda t: t.cut(None, [1, 1])),
    ("init is [0, 4]; layer numbers must rise", lambda t: t.cut(None, [0, 4])),
    ("init is [-1, 2]; layer numbers must rise", lambda t: t.cut(None, [-1, 2])),
    ("and be as many as layers, 2", lambda t: t.cut(2, [0, 1, 3])),
    # writing
    ("model is a tuple", lambda t: kd.complete((t.teacher, t.tokenizer), t.tokenizer, "A")),
    ("at least 1", lambda t: kd.complete(t.teacher, t.tokenizer, "A", 0)),
    ("at least 0", lambda t: kd.complete(t.teacher, t.tokenizer, "A", 3, math.nan)),
    ("from 0 to 2**63 - 1", lambda t: kd.complete(t.teacher, t.tokenizer, "A", 3, seed=2**70)),
    ("a token id is 4096; the model knows", lambda t: kd.complete(t.teacher, t.padded(), "[PAD]")),
    ("shape (prompts, length)", lambda t: kd.sample_continuations(t.teacher, "The Mole", 3)),
    ("shape (prompts, length)", lambda t: kd.sample_continuations(t.teacher, t.ids[0], 3)),
    ("the model knows", lambda t: kd.sample_continuations(t.teacher, t.unknown, 3)),
    ("the model reads 64", lambda t: kd.sample_continuations(t.teacher, t.ids, 64)),
    ("temperature is -1", lambda t: kd.sample_continuations(t.teacher, t.ids, 3, -1)),
    ("give what pack returns", lambda t: kd.make_transfer_set(t.teacher, t.ids[0])),
    ("shape (prompts, length)", lambda t: kd.speculative_decode(t.teacher, t.student, t.ids, 3)),
    ("at least", lambda t: kd.speculative_decode(t.teacher, t.student, t.ids[0], 3, k=-1)),
    ("reads 64", lambda t: kd.speculative_decode(t.teacher, t.student, t.ids[0], 64)),
    # training
    ("teacher is a tuple", lambda t: t.distill((t.teacher, t.tokenizer))),
    ("with student_from_teacher", lambda t: t.distill(student=t.teacher)),
    ("give what pack returns", lambda t: kd.distill(t.teacher, t.student, t.blocks.train)),
    ("give what pack returns", lambda t: kd.cache_teacher(t.teacher, t.blocks.train)),
    ("config is a dict", lambda t: kd.distill(t.teacher, t.student, t.blocks, {})),
    ("requires_grad_(True)", lambda t: t.distill(student=t.frozen())),
    ("takes at most 64", lambda t: t.distill(blocks=t.text(train=LONG))),
    ("is 4096; the teacher", lambda t: t.distill(blocks=t.text(validation=t.unknown))),
    ("weights; train student.float()", lambda t: t.distill(student=t.make(1).half())),
    ("student is a GPT2Model, which predicts no tokens", lambda t: t.distill(student=t.headless)),
    ("predicts 4096 tokens, the student 5000", lambda t: t.distill(student=t.make(1, **LARGER))),
    ("hidden states have shape", lambda t: t.distill(student=t.make(1, n_embd=16), **HIDDEN)),
    ("names layer 9 of the teacher, which has 4", lambda t: t.distill(**HIDDEN, **FAR)),
    ("forward KL at temperature 1 only", lambda t: t.distill(t.sampled(), temperature=2.0)),
    ("with top_k or samples none at all", lambda t: t.distill(t.sampled(), **HIDDEN)),
    ("let a token count", lambda t: t.distill(blocks=t.text(masks={"train": NONE}))),
    ("the shape of blocks.train", lambda t: t.distill(blocks=t.text(masks={"train": ODD}))),
    # measuring and drawing
    ("blocks are a list", lambda t: kd.evaluate(t.teacher, [[1, 2, 3]])),
    ("shape (blocks, block_size)", lambda t: kd.evaluate(t.teacher, t.ids[0])),
    ("one block of two tokens", lambda t: kd.evaluate(t.teacher, t.ids[:, :1])),
    ("65 tokens, the model takes at most 64", lambda t: kd.evaluate(t.teacher, LONG)),
    ("a token id is 4096; the model knows 4096", lambda t: kd.evaluate(t.teacher, t.unknown)),
    ("32 tokens, the teacher takes at most 16", lambda t: t.evaluate(t.make(1, n_positions=16))),
    ("the teacher predicts 5000 tokens, the st", lambda t: t.evaluate(t.make(1, **LARGER))),
    ("teacher is a GPT2Model, which predicts no tokens", lambda t: t.evaluate(t.headless)),
    ("a token id is -1", lambda t: kd.evaluate(t.teacher, t.ids * 0 - 1)),
    ("shapes", lambda t: kd.paired_bootstrap([1.0, 2.0], [1.0])),
    ("shapes", lambda t: kd.paired_bootstrap([], [])),
    ("shapes", lambda t: kd.paired_bootstrap([[1.0]], [[1.0]])),
    ("in a dict", lambda t: kd.compare([t.teacher], t.blocks, t.tokenizer)),
    ("32 tokens, the small takes at most 16", lambda t: t.compare(t.make(1, n_positions=16))),
    ("(batch, tokens)", lambda t: cost.peak_memory(t.teacher, t.blocks)),
    ("a token id is 4096; the model", lambda t: kd.latency({"a": t.teacher}, t.unknown)),
    ("repeats is 0", lambda t: kd.latency({"a": t.teacher}, t.ids, 2, 0)),
    ("a token id is 4096; the", lambda t: kd.decode_latency({"a": t.teacher}, t.unknown)),
    ("from 1 to 31", lambda t: kd.decode_latency({"a": t.teacher}, t.ids, [t.ids.shape[1]])),
    # one process has nothing to divide a teacher among
    ("there is one process", lambda t: kd.shard_teacher(t.teacher)),
]


@pytest.fixture(scope="module")
def shared(make_gpt2, tokenizer, story, blocks):
    return Things(make_gpt2, tokenizer, story, blocks)


@pytest.fixture
def things(shared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shared.folder = tmp_path
    return shared


@pytest.mark.parametrize(("said", "call"), BAD)
def test_what_cannot_be_used_is_refused_in_one_line(said, call, things, tmp_path, capfd):
    before = [kd.fingerprint(model) for model in (things.teacher, things.student)]
    with pytest.raises(kd.InputError) as refused:
        call(things)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "rror" not in capfd.readouterr().err  # as libraries log one
    assert {path.name for path in tmp_path.iterdir()} <= {"file.txt", "a.txt", "a.csv", "a.jsonl"}
    assert [kd.fingerprint(model) for model in (things.teacher, things.student)] == before


# -- the command line ------------------------------------------------------------------


DISTILL = (
    "distill --model_dir {teacher} --dataset_path {place}/text.txt --output_dir {new} --epochs 1 "
    "--block_size 32 --device cpu "
)

# What a command refuses of itself, and one row for each function that it hands things to.
BAD_COMMANDS = [
    # the command line itself
    ("train", "invalid choice: 'train'"),
    (DISTILL + "--bogus 1", "--bogus"),
    (DISTILL + "--epochs 1.5", "invalid int value: '1.5'"),
    (DISTILL + "--dtype float16", "float32"),
    # settings, checkpoints, devices
    (DISTILL + "--checkpoint_minutes nan", "checkpoint minutes are nan; they must be at least 0"),
    (DISTILL + "--device meta", "device meta cannot be used here"),
    # models
    (DISTILL + "--block_size 129", "block_size is 129; these models take 2 to 128"),
    (DISTILL + "--layers 2 --student {narrow}", "leave out --student"),
    (DISTILL + "--init last", "'last' is none of auto, spaced, first, influence, contiguous"),
    (DISTILL + "--model_dir {place}/missing", "missing"),
    (DISTILL + "--model_dir ''", "model_dir is empty"),
    (DISTILL + "--student no-such-owner/no-such-model", "--student half"),
    # texts
    (DISTILL + "--dataset_path {place}/missing.txt", "missing.txt does not exist"),
    # where the student goes
    (DISTILL + "--output_dir {place}/folder", "holds other files; choose another"),
    (DISTILL + "--output_dir {place}/student --resume", "holds a student (20"),
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


def test_an_odd_prompt_is_continued(teacher, tokenizer):
    for prompt in ("", "\ud800", "\0", "شجرة", "<|endoftext|>", " \n "):
        assert isinstance(kd.complete(teacher, tokenizer, prompt, 2), str)
