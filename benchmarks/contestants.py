"""Who takes part in `race.py`: whole training loops, and losses by themselves.

Every training loop gets the same teacher, the same start of the student, the same blocks in the
same order, and the same optimiser and learning rates. All minimise the forward KL at T = 1 and
nothing else. A loop is made by `CONTESTANTS[name](course, student, on_step)`, which returns the
function that trains; that function calls `on_step` after each step with its loss and the tokens
seen so far, and goes on until `on_step` raises.
"""

import contextlib
import dataclasses
import functools
import io
import itertools
import tempfile
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from unittest.mock import patch

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

import willows_kd as kd
from willows_kd.corpus import split
from willows_kd.distillation import epoch_batches, parameter_groups, warm_up_and_cosine
from willows_kd.models import best_device
from willows_kd.scale.chunked_loss import chunked_distillation_loss

LINE_WIDTH = 72  # characters: as Project Gutenberg breaks the lines of a book
STEPS = 10_000  # of the schedule: no race is as long, so after the warm-up the rate stays put
WARMUP_STEPS = 10
SEED = 0
DEVICE = best_device()


# -- the course ------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """The size of a teacher with random weights, and of a training step."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    block_size: int
    batch_size: int


GPT2 = Shape(layers=12, width=768, heads=12, vocabulary=50257, block_size=128, batch_size=8)


class Course:
    """What every contestant is given.

    Attributes:
        teacher, student: models; each contestant trains a copy of the student.
        blocks: as many training blocks as fill whole steps.
        lines: token ids of single lines of text, for the loop that takes them one by one.
        config: the settings.
        folder: a temporary directory for what a contestant must write.
    """

    def __init__(self, teacher, blocks: kd.Blocks, lines=(), batch_size: int = 8):
        self.teacher = teacher.to(DEVICE).requires_grad_(False).eval()
        self.student = kd.student_from_teacher(teacher).requires_grad_(True)
        for module in self.student.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        whole = len(blocks.train) // batch_size * batch_size
        self.blocks = kd.Blocks(blocks.train[:whole], blocks.validation, blocks.test, {})
        self.lines = lines
        self.config = kd.DistillConfig(
            temperature=1.0,
            epochs=-(-STEPS * batch_size // whole),
            batch_size=batch_size,
            warmup_ratio=WARMUP_STEPS / STEPS,
            weight_decay=0.0,
            seed=SEED,
        )
        self.folder = tempfile.TemporaryDirectory()

    @functools.cached_property
    def cache(self) -> tuple[torch.nn.Module, float]:
        """The teacher's answers to these blocks, made now, and how many seconds that took."""
        start = time.perf_counter()
        quiet = io.StringIO()  # it says where it keeps the answers
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            cache = kd.cache_teacher(self.teacher, self.blocks, folder=self.folder.name)
        return cache, time.perf_counter() - start

    def order(self) -> torch.Tensor:
        """Which block comes when, over all epochs: as `distill` takes them."""
        epochs = range(self.config.epochs)
        steps = (epoch_batches(self.blocks.train, self.config, epoch) for epoch in epochs)
        return torch.cat(list(itertools.chain.from_iterable(steps)))

    def optimizer(self, student) -> tuple[torch.optim.Optimizer, LambdaLR]:
        """AdamW and its learning rates: those of `distill`."""
        total = self.config.epochs * len(self.blocks.train) // self.config.batch_size
        groups = parameter_groups(student, self.config)
        optimizer = torch.optim.AdamW(groups, lr=self.config.learning_rate)
        return optimizer, LambdaLR(
            optimizer,
            lambda step: warm_up_and_cosine(step, self.config.warmup_ratio * total, total),
        )


@functools.cache
def book() -> tuple[kd.Blocks, list[torch.Tensor]]:
    """The book packed into blocks, and its training text line by line, shuffled, as token ids."""
    _, tokenizer = kd.load_teacher()
    corpus = kd.load_corpus()
    paragraphs = "\n\n".join(split(corpus).train).split("\n")
    lines = [line for text in paragraphs for line in textwrap.wrap(text, LINE_WIDTH)]
    ids = [torch.tensor(row) for row in tokenizer(lines)["input_ids"] if len(row) > 1]
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(SEED)).tolist()
    return kd.pack(corpus, tokenizer, 128), [ids[i] for i in order]


@functools.cache
def tiny_course() -> Course:
    """The teacher that ships with the package, and the book."""
    return Course(kd.load_teacher()[0], *book())


def gpt2_course() -> Course:
    """A GPT-2 with random weights; random tokens, in lines as long as those of the book."""
    generator = torch.Generator().manual_seed(SEED)
    lengths = [len(line) for line in book()[1][:200]]
    lines = [torch.randint(GPT2.vocabulary, (n,), generator=generator) for n in lengths]
    return random_course(GPT2, lines)


def random_course(shape: Shape, lines=()) -> Course:
    """A teacher of this shape with random weights, and random tokens: four steps' worth."""
    config = GPT2Config(
        n_layer=shape.layers,
        n_embd=shape.width,
        n_head=shape.heads,
        vocab_size=shape.vocabulary,
        n_positions=max(128, shape.block_size),
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        teacher = GPT2LMHeadModel(config)
        size = (4 * shape.batch_size, shape.block_size)
        train, held_out = (torch.randint(shape.vocabulary, (n, size[1])) for n in (size[0], 1))
    return Course(teacher, kd.Blocks(train, held_out, held_out, {}), lines, shape.batch_size)


# -- training loops --------------------------------------------------------------------

OnStep = Callable[[dict], None]


def ours(course: Course, student, on_step: OnStep, cached=False, chunked=True, **settings):
    """`kd.distill`, without the look at the validation blocks that the others do not take."""
    teacher = course.cache[0] if cached else course.teacher
    config = dataclasses.replace(course.config, **settings)

    def train():
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))  # the progress bar
            stack.enter_context(patch("willows_kd.distillation.end_of_epoch", return_value={}))
            loss = kd.ChunkedLoss if chunked else None
            kd.distill(teacher, student, course.blocks, config, on_step, loss)

    return train


def line_by_line(course: Course, student, on_step: OnStep):
    """The loop of many tutorials: a line of text, a step."""
    optimizer, schedule = course.optimizer(student)
    temperature = course.config.temperature

    def train():
        student.train()
        tokens = 0
        for line in itertools.cycle(course.lines):
            ids = line[None].to(DEVICE)
            with torch.no_grad():
                teacher_logits = course.teacher(ids).logits
            logits = student(ids).logits
            loss = F.kl_div(
                F.log_softmax(logits / temperature, dim=-1),
                F.softmax(teacher_logits / temperature, dim=-1),
                reduction="batchmean",
            )
            loss = loss * temperature**2
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), course.config.max_grad_norm)
            optimizer.step()
            schedule.step()
            tokens += ids.numel()
            on_step({"loss": loss.item(), "tokens": tokens})

    return train


def hugging_face(course: Course, student, on_step: OnStep):
    """`transformers.Trainer` with the `compute_loss` that is usually written for it."""
    temperature = course.config.temperature

    class DistillationTrainer(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            outputs = model(input_ids=ids, attention_mask=mask)
            with torch.no_grad():
                teacher_logits = course.teacher(input_ids=ids, attention_mask=mask).logits
            loss = F.kl_div(
                F.log_softmax(outputs.logits[:, :-1] / temperature, dim=-1).flatten(0, 1),
                F.softmax(teacher_logits[:, :-1] / temperature, dim=-1).flatten(0, 1),
                reduction="batchmean",
            )
            loss = loss * temperature**2
            return (loss, outputs) if return_outputs else loss

    return prepare(DistillationTrainer, TrainingArguments, course, student, on_step)


def trl(course: Course, student, on_step: OnStep, lmbda: float = 0.0, bf16: bool = False):
    """TRL's `GKDTrainer` with the forward KL, on the blocks, or (`lmbda` 1) on-policy.

    Its temperature is that of sampling; the loss is at T = 1 always.
    """
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    settings = functools.partial(
        GKDConfig,
        lmbda=lmbda,
        beta=0.0,
        temperature=1.0,
        max_new_tokens=course.blocks.block_size - course.blocks.block_size // 4,
        seq_kd=False,
        bf16=bf16,
        gradient_checkpointing=False,
        max_length=course.blocks.block_size,
    )
    parts = {"teacher_model": course.teacher, "processing_class": kd.load_teacher()[1]}
    return prepare(GKDTrainer, settings, course, student, on_step, collate_prompts, **parts)


def modelopt(course: Course, student, on_step: OnStep, bf16: bool = False):
    """NVIDIA ModelOpt's `KDTrainer`."""
    from modelopt.torch.distill.plugins.huggingface import KDTrainer

    asked = {"teacher_model": course.teacher, "temperature": course.config.temperature}
    settings = functools.partial(TrainingArguments, bf16=bf16)
    return prepare(KDTrainer, settings, course, student, on_step, distill_args=asked)


def prepare(trainer_class, settings, course, student, on_step: OnStep, collator=None, **parts):
    """A trainer of the Hugging Face kind that takes the blocks in our order."""
    config = course.config
    arguments = settings(
        output_dir=course.folder.name,
        use_cpu=DEVICE.type == "cpu",
        per_device_train_batch_size=config.batch_size,
        max_steps=STEPS,
        max_grad_norm=config.max_grad_norm,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    blocks = Dataset.from_dict({"input_ids": course.blocks.train.numpy()}).with_format("torch")
    trainer = trainer_class(
        model=student,
        args=arguments,
        train_dataset=blocks.select(course.order().tolist()),
        data_collator=collator or collate,
        optimizers=course.optimizer(student),
        **parts,
    )
    losses = []
    training_step = trainer.training_step

    def remember_loss(*args, **kwargs):
        loss = training_step(*args, **kwargs)
        losses.append(loss)
        return loss

    class Steps(TrainerCallback):
        def on_step_end(self, *_, **__):
            seen = len(losses) * config.batch_size * course.blocks.block_size
            on_step({"loss": losses[-1].item(), "tokens": seen})

    trainer.training_step = remember_loss
    trainer.add_callback(Steps())
    return trainer.train


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """A batch of whole blocks; the first token of each is nobody's prediction."""
    ids = torch.stack([row["input_ids"] for row in rows])
    labels = ids.clone()
    labels[:, 0] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def collate_prompts(rows: list[dict]) -> dict[str, torch.Tensor]:
    """The same, and the openings that the student is to continue if it writes."""
    batch = collate(rows)
    prompts = batch["input_ids"][:, : batch["input_ids"].shape[1] // 4]
    return batch | {"prompts": prompts, "prompt_attention_mask": torch.ones_like(prompts)}


REFERENCE = "ours, full-logits loss"
CACHED = "ours, cached teacher"
LINES = "line by line"
CONTESTANTS = {
    "ours": ours,
    CACHED: functools.partial(ours, cached=True),
    "ours, bfloat16": functools.partial(ours, dtype="bfloat16"),
    "ours, cached teacher, bfloat16": functools.partial(ours, cached=True, dtype="bfloat16"),
    REFERENCE: functools.partial(ours, chunked=False),
    "ours, full-logits loss, cached teacher": functools.partial(ours, cached=True, chunked=False),
    LINES: line_by_line,
    "Hugging Face Trainer": hugging_face,
    "TRL GKDTrainer": trl,
    "ModelOpt KDTrainer": modelopt,
}
if DEVICE.type == "cuda":  # where nobody would train in float32
    CONTESTANTS["TRL GKDTrainer, bfloat16"] = functools.partial(trl, bf16=True)
    CONTESTANTS["ModelOpt KDTrainer, bfloat16"] = functools.partial(modelopt, bf16=True)
ON_POLICY = {
    "ours, on-policy": functools.partial(ours, on_policy_share=1.0),
    "TRL GKDTrainer, on-policy": functools.partial(trl, lmbda=1.0),
}


# -- losses by themselves --------------------------------------------------------------

CHUNK = 128  # tokens, for the losses that go chunk by chunk


def loss_inputs(tokens: int, width: int = GPT2.width, vocabulary: int = GPT2.vocabulary):
    """Hidden states and head of a student, the same of a teacher, and labels, all random."""
    generator = torch.Generator().manual_seed(SEED)
    shapes = [(tokens, width), (vocabulary, width)] * 2
    scales = [1.0, 0.05] * 2
    tensors = [
        torch.randn(shape, generator=generator).mul_(scale).to(DEVICE)
        for shape, scale in zip(shapes, scales, strict=True)
    ]
    for tensor in tensors[:2]:
        tensor.requires_grad_(True)
    return *tensors, torch.randint(vocabulary, (tokens,), generator=generator).to(DEVICE)


def naive_loss(hidden, head, teacher_hidden, teacher_head, labels):
    """All logits at once."""
    return kd.forward_kl(hidden @ head.T, teacher_hidden @ teacher_head.T)


def our_loss(hidden, head, teacher_hidden, teacher_head, labels):
    """`willows_kd.chunked_distillation_loss`."""
    return chunked_distillation_loss(hidden, head, teacher_hidden, teacher_head, labels)[0]


def liger_loss(hidden, head, teacher_hidden, teacher_head, labels):
    """Liger Kernel's chunked loss, which is PyTorch only and so runs on a CPU."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=False, chunk_size=CHUNK
    )
    return loss(hidden, head, teacher_hidden, teacher_head, labels)


def checkpointed_loss(hidden, head, teacher_hidden, teacher_head, labels):
    """All of a chunk's logits at once, and once more in the backward pass."""
    total = 0
    for part, teacher_part in zip(hidden.split(CHUNK), teacher_hidden.split(CHUNK), strict=True):
        inputs = part, head, teacher_part, teacher_head, None
        loss = checkpoint(naive_loss, *inputs, use_reentrant=False)
        total = total + loss * (len(part) / len(hidden))
    return total


NAIVE = "all logits at once"
LOSSES = {
    NAIVE: naive_loss,
    "ours, chunked": our_loss,
    "Liger, chunked": liger_loss,
    "torch checkpoint over chunks": checkpointed_loss,
}
