"""What the public functions say to what they cannot use: one line, with what would do."""

import copy
import dataclasses
import math

import pytest
import torch

import willows_kd as kd
from willows_kd.checkpoints import Checkpoints

LOGITS = torch.zeros(2, 3, 10)
HIDDEN, HEAD = torch.zeros(4, 8), torch.zeros(10, 8)
LABELS = torch.zeros(4, dtype=torch.long)


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


def stream(**changes):
    given = {
        "student_hidden": HIDDEN,
        "student_head": HEAD,
        "teacher_hidden": HIDDEN,
        "teacher_head": HEAD,
        "labels": LABELS,
    }
    return kd.chunked_loss(**(given | changes))


BAD = {
    # reading and packing
    "load_corpus(5)": (lambda t: kd.load_corpus(5), "the source is 5; give the path"),
    "load_corpus('')": (lambda t: kd.load_corpus(""), "give the path of a text file"),
    "load_corpus(bytes)": (lambda t: kd.load_corpus(b"book.txt"), "give the path of a text file"),
    "load_corpus(null)": (lambda t: kd.load_corpus("a\0b"), "cannot be read"),
    "load_corpus(missing)": (lambda t: kd.load_corpus(t.folder / "no.txt"), "does not exist"),
    "load_corpus(directory)": (lambda t: kd.load_corpus(t.folder), "is a directory"),
    "load_corpus(empty)": (lambda t: kd.load_corpus(t.file(b"")), "holds no text"),
    "load_corpus(blank)": (lambda t: kd.load_corpus(t.file(b" \r\n\t ")), "holds no text"),
    "load_corpus(binary)": (lambda t: kd.load_corpus(t.file(bytes(range(32)) * 9)), "is not text"),
    "load_corpus(surrogate)": (
        lambda t: kd.load_corpus(t.file(b"\xff\xfe" + 50 * b"\x00\xd8a\x00")),
        "is not text",
    ),
    "pack(text)": (lambda t: kd.pack("text", t.tokenizer), "give what load_corpus returns"),
    "pack(swapped)": (lambda t: kd.pack(t.tokenizer, t.story), "give what load_corpus returns"),
    "pack(no tokenizer)": (lambda t: kd.pack(t.story, None), "give that of the teacher"),
    "pack(1)": (lambda t: kd.pack(t.story, t.tokenizer, 1), "needs at least 2 tokens"),
    "pack(-5)": (lambda t: kd.pack(t.story, t.tokenizer, -5), "needs at least 2 tokens"),
    "pack(2.5)": (lambda t: kd.pack(t.story, t.tokenizer, 2.5), "a whole number, at least 2"),
    "pack('128')": (lambda t: kd.pack(t.story, t.tokenizer, "128"), "a whole number, at least 2"),
    "pack(nan)": (lambda t: kd.pack(t.story, t.tokenizer, math.nan), "a whole number, at least 2"),
    "pack(1e9)": (lambda t: kd.pack(t.story, t.tokenizer, 10**9), "is too short"),
    # models
    "load_teacher(5)": (lambda t: kd.load_teacher(5), "the model is 5; give a directory"),
    "load_teacher('')": (lambda t: kd.load_teacher(""), "give a directory or a name"),
    "load_teacher(' ')": (lambda t: kd.load_teacher(" "), "give a directory or a name"),
    "load_teacher(null)": (lambda t: kd.load_teacher("a\0b"), "the model hub did not give it"),
    "load_teacher(file)": (lambda t: kd.load_teacher(t.file()), "is a file"),
    "load_teacher(empty)": (lambda t: kd.load_teacher(t.folder), "no config.json"),
    "load_student(no tokenizer)": (
        lambda t: kd.load_student(kd.models.BUNDLED_TEACHER, None),
        "give that of the teacher",
    ),
    "student(0)": (lambda t: kd.student_from_teacher(t.teacher, 0), "allows 1 to 4"),
    "student(5)": (lambda t: kd.student_from_teacher(t.teacher, 5), "allows 1 to 4"),
    "student(2.5)": (lambda t: kd.student_from_teacher(t.teacher, 2.5), "allows 1 to 4"),
    "student('2')": (lambda t: kd.student_from_teacher(t.teacher, "2"), "allows 1 to 4"),
    "student(True)": (lambda t: kd.student_from_teacher(t.teacher, True), "allows 1 to 4"),
    "student(pair)": (
        lambda t: kd.student_from_teacher((t.teacher, t.tokenizer)),
        "teacher is a tuple; give a model: teacher, tokenizer = load_teacher()",
    ),
    "complete(prompt)": (lambda t: kd.complete(t.teacher, t.tokenizer, 5), "prompt is an int"),
    "complete(no prompt)": (lambda t: kd.complete(t.teacher, t.tokenizer, None), "give a text"),
    "complete(0 tokens)": (lambda t: kd.complete(t.teacher, t.tokenizer, "A", 0), "at least 1"),
    "complete(-1 tokens)": (lambda t: kd.complete(t.teacher, t.tokenizer, "A", -1), "at least 1"),
    "complete(T=-1)": (lambda t: kd.complete(t.teacher, t.tokenizer, "A", 3, -1), "at least 0"),
    "complete(T=nan)": (
        lambda t: kd.complete(t.teacher, t.tokenizer, "A", 3, math.nan),
        "temperature is nan",
    ),
    "complete(T=inf)": (
        lambda t: kd.complete(t.teacher, t.tokenizer, "A", 3, math.inf),
        "temperature is inf",
    ),
    "complete(seed)": (
        lambda t: kd.complete(t.teacher, t.tokenizer, "A", 3, seed=2**70),
        "from 0 to 2**64 - 1",
    ),
    "complete(top_k)": (
        lambda t: kd.complete(t.teacher, t.tokenizer, "A", 3, top_k=-1),
        "0 for all tokens",
    ),
    "complete(pair)": (
        lambda t: kd.complete((t.teacher, t.tokenizer), t.tokenizer, "A"),
        "model is a tuple",
    ),
    "save_model(file)": (
        lambda t: kd.save_model(t.student, t.tokenizer, t.file()),
        "is a file; give a directory",
    ),
    # soft labels and losses
    "soften(T=0)": (lambda t: kd.soften(LOGITS, 0), "a positive, finite number"),
    "soften(T='2')": (lambda t: kd.soften(LOGITS, "2"), "a positive, finite number"),
    "soften(T=None)": (lambda t: kd.soften(LOGITS, None), "a positive, finite number"),
    "soften(list)": (lambda t: kd.soften([1.0, 2.0]), "logits are a list; give a tensor"),
    "top_k(0)": (lambda t: kd.top_k(LOGITS, 0), "a whole number from 1 to 10"),
    "top_k(11)": (lambda t: kd.top_k(LOGITS, 11), "a whole number from 1 to 10"),
    "top_k(2.5)": (lambda t: kd.top_k(LOGITS, 2.5), "a whole number from 1 to 10"),
    "forward_kl(shapes)": (lambda t: kd.forward_kl(LOGITS, LOGITS[:1]), "they must be equal"),
    "reverse_kl(T=nan)": (lambda t: kd.reverse_kl(LOGITS, LOGITS, math.nan), "temperature is nan"),
    "jensen_shannon(beta=1)": (
        lambda t: kd.jensen_shannon(LOGITS, LOGITS, beta=1),
        "between 0 and 1, both excluded",
    ),
    "total_variation(mask)": (
        lambda t: kd.total_variation(LOGITS, LOGITS, 1.0, torch.ones(3, 2)),
        "the mask has shape (3, 2); it must have (2, 3)",
    ),
    "hard_label_loss(shape)": (
        lambda t: kd.hard_label_loss(LOGITS, torch.zeros(2, 2, dtype=torch.long)),
        "of shape (2, 3)",
    ),
    "hard_label_loss(floats)": (
        lambda t: kd.hard_label_loss(LOGITS, torch.zeros(2, 3)),
        "they must be token ids",
    ),
    "mix(2)": (lambda t: kd.mix(1.0, 1.0, 2), "between 0 (soft only) and 1 (hard only)"),
    "mix(nan)": (lambda t: kd.mix(1.0, 1.0, math.nan), "alpha is nan"),
    "shift(2-D)": (lambda t: kd.shift(LOGITS[0], LABELS), "(batch, block_size, vocabulary)"),
    "shift(lengths)": (lambda t: kd.shift(LOGITS, torch.zeros(2, 4)), "do not go with ids"),
    "chunked_loss(alpha)": (lambda t: stream(alpha=2), "alpha is 2"),
    "chunked_loss(divergence)": (lambda t: stream(divergence="l2"), "one of forward_kl"),
    "chunked_loss(chunk)": (lambda t: stream(chunk=0), "at least 1 token"),
    "chunked_loss(labels)": (lambda t: stream(labels=LABELS[:3]), "of shape (4,)"),
    "chunked_loss(tokens)": (lambda t: stream(teacher_hidden=HIDDEN[:3]), "must be equal"),
    "chunked_loss(vocabulary)": (lambda t: stream(teacher_head=HEAD[:9]), "must be equal"),
    "chunked_loss(no teacher)": (
        lambda t: stream(teacher_hidden=None, teacher_head=None),
        "the teacher's hidden states and output weights are needed",
    ),
    # training
    "distill(pair)": (
        lambda t: kd.distill((t.teacher, t.tokenizer), t.student, t.blocks),
        "teacher is a tuple",
    ),
    "distill(itself)": (
        lambda t: kd.distill(t.teacher, t.teacher, t.blocks),
        "make the student with student_from_teacher",
    ),
    "distill(tensor)": (
        lambda t: kd.distill(t.teacher, t.student, t.blocks.train),
        "blocks are a Tensor; give what pack returns",
    ),
    "distill(dict)": (
        lambda t: kd.distill(t.teacher, t.student, t.blocks, {}),
        "config is a dict; give a DistillConfig",
    ),
    "distill(frozen)": (
        lambda t: kd.distill(t.teacher, t.frozen(), t.blocks),
        "set requires_grad_(True)",
    ),
    "distill(long blocks)": (
        lambda t: kd.distill(t.teacher, t.student, t.long()),
        "blocks have 65 tokens, the teacher takes at most 64",
    ),
    "distill(resume nothing)": (
        lambda t: kd.distill(t.teacher, t.student, t.blocks, resume=True),
        "name the folder",
    ),
    "distill(checkpoints in a file)": (
        lambda t: kd.distill(t.teacher, t.student, t.blocks, checkpoints=t.file() / "below"),
        "cannot be written",
    ),
    "Checkpoints(-1)": (lambda t: Checkpoints(t.folder / "new", -1), "must be at least 0"),
    "cache_teacher(dtype)": (
        lambda t: kd.cache_teacher(t.teacher, t.blocks, "int8"),
        "one of float32, float16",
    ),
    "cache_teacher(top_k)": (
        lambda t: kd.cache_teacher(t.teacher, t.blocks, top_k=0),
        "from 1 to 4095",
    ),
    "cache_teacher(tensor)": (
        lambda t: kd.cache_teacher(t.teacher, t.blocks.train),
        "give what pack returns",
    ),
    # measuring
    "quality(blocks)": (lambda t: kd.quality(t.teacher, t.blocks), "such as Blocks.test"),
    "quality(one row)": (lambda t: kd.quality(t.teacher, t.ids[0]), "(blocks, block_size)"),
    "quality(none)": (lambda t: kd.quality(t.teacher, t.ids[:0]), "at least one block"),
    "quality(ids)": (lambda t: kd.quality(t.teacher, t.ids + 5000), "the model knows 4096"),
    "compare(list)": (lambda t: kd.compare([t.teacher], t.blocks, t.tokenizer), "in a dict"),
    "compare(none)": (lambda t: kd.compare({}, t.blocks, t.tokenizer), "at least one"),
    "compare(split)": (
        lambda t: kd.compare({"teacher": t.teacher}, t.blocks, t.tokenizer, split="tests"),
        "must be test or validation",
    ),
    "verbatim(0)": (lambda t: kd.verbatim("a b", "a b", 0), "at least 1"),
    "latency(blocks)": (lambda t: kd.latency({"a": t.teacher}, t.blocks), "(batch, tokens)"),
    "latency(repeats)": (lambda t: kd.latency({"a": t.teacher}, t.ids, 2, 0), "repeats is 0"),
    "latency(tokens)": (lambda t: kd.latency({"a": t.teacher}, t.ids, 0), "new_tokens is 0"),
    "peak_memory(blocks)": (lambda t: kd.peak_memory(t.teacher, t.blocks), "(batch, tokens)"),
    # drawing
    "plot_history()": (lambda t: kd.plot_history({}), "give what distill returned"),
    "plot_history(none)": (lambda t: kd.plot_history({"a": []}), "give what distill returned"),
    "explore_temperature()": (
        lambda t: kd.explore_temperature(t.teacher, t.tokenizer, []),
        "at least one text",
    ),
    "explore_tokens('')": (
        lambda t: kd.explore_tokens(t.teacher, t.student, t.tokenizer, ""),
        "at least two tokens",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_used_is_refused_in_one_line(name, things, tmp_path):
    call, said = BAD[name]
    weights = copy.deepcopy(things.student).state_dict()
    with pytest.raises(kd.InputError) as refused:
        call(things)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"file.txt", "cache"}
    after = things.student.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in weights.items())


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


@pytest.mark.parametrize("name", ODD_TEXTS)
def test_odd_texts_are_read_and_packed(name, tokenizer, tmp_path, recwarn):
    (tmp_path / "text.txt").write_bytes(ODD_TEXTS[name].encode())
    corpus = kd.load_corpus(tmp_path / "text.txt")
    blocks = kd.pack(corpus, tokenizer, block_size=64)
    assert min(map(len, (blocks.train, blocks.validation, blocks.test))) >= 1
    assert "\0" not in corpus.text


def test_an_odd_prompt_is_continued(teacher, tokenizer):
    for prompt in ("", "\ud800", "\0", "شجرة", "🐀", "<|endoftext|>", " \n "):
        assert isinstance(kd.complete(teacher, tokenizer, prompt, 2), str)
