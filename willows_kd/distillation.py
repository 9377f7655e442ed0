"""The loop: a student learns from its teacher's soft labels."""

import contextlib
import math
import time
import warnings
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm

from willows_kd.config import DistillConfig
from willows_kd.corpus import Blocks
from willows_kd.errors import InputError
from willows_kd.evaluation import quality
from willows_kd.losses import DIVERGENCES, hard_label_loss, mix, shift
from willows_kd.models import (
    can_stream,
    common_vocabulary,
    hidden_states,
    output_weights,
    processes,
)
from willows_kd.streaming import streaming_loss


def distill(
    teacher: nn.Module,
    student: nn.Module,
    blocks: Blocks,
    config: DistillConfig | None = None,
    on_step: Callable[[dict], None] | None = None,
) -> list[dict]:
    """Train a student, in place, on its teacher's soft labels.

    The teacher is in eval mode throughout, takes no gradient, and is left as it was.
    The same seed, machine and thread count give the same student.

    Args:
        teacher, student: causal language models with one vocabulary.
        blocks: the packed corpus; the student is trained on `blocks.train` and looked
            at on `blocks.validation` after each epoch.
        config: the settings; the defaults where None. `alpha=1` never asks the
            teacher: it is the hard-label control, on the same path.
        on_step: called after each optimiser step with that step's row.

    Returns:
        The history, a row (dict) a step, ready for `pandas.DataFrame`: step, epoch,
        loss, soft_loss and hard_loss (nats per token, None where not asked for),
        learning_rate, gradient_norm, tokens (seen so far) and seconds (of training).
        The last row of an epoch also has average_loss, validation_perplexity and
        validation_kl.

    Raises:
        InputError: teacher and student do not share a vocabulary.
    """
    config = config or DistillConfig()
    processes()
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        student.to(accelerator.device)
    teacher.to(student.device)
    objective = Objective(teacher, student, config, blocks.train[:1].to(student.device))
    plan = [steps_of_epoch(len(blocks.train), config, epoch) for epoch in range(config.epochs)]
    total_steps = sum(map(len, plan))
    optimizer = torch.optim.AdamW(parameter_groups(student, config), lr=config.learning_rate)
    optimizer.zero_grad()
    schedule = LambdaLR(
        optimizer, lambda step: warm_up_and_cosine(step, config.warmup * total_steps, total_steps)
    )
    objective = accelerator.prepare_model(objective, device_placement=False)
    main_process = accelerator.is_main_process
    history: list[dict] = []
    tokens, seconds = 0, 0.0
    bar = tqdm(total=total_steps, unit="step", leave=False, disable=not main_process)
    with bar, reproducible(config.seed), train_mode(teacher, student, config):
        for epoch, steps in enumerate(plan, start=1):
            for step in steps:
                start = time.perf_counter()
                row = {"step": len(history) + 1, "epoch": epoch}
                seen = blocks.train[step]
                row |= backward(accelerator, teacher, objective, seen, config)
                if not math.isfinite(row["loss"]):
                    raise InputError(
                        f"the loss became {row['loss']} at step {row['step']}; "
                        "lower the learning rate or the temperature"
                    )
                norm = accelerator.clip_grad_norm_(student.parameters(), config.max_grad_norm)
                row |= {"gradient_norm": norm.item(), "learning_rate": schedule.get_last_lr()[0]}
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                tokens += seen.numel()
                seconds += time.perf_counter() - start
                row |= {"tokens": tokens, "seconds": seconds}
                history.append(row)
                if step is steps[-1]:
                    row |= end_of_epoch(teacher, student, blocks, steps, history)
                bar.set_postfix_str(
                    f"loss {row['loss']:.3f}, {tokens / seconds:,.0f} tokens/s", refresh=False
                )
                bar.update()
                if on_step and main_process:
                    on_step(row)
    return history


def backward(accelerator, teacher, objective, blocks, config) -> dict:
    """The gradient of one optimiser step, and its losses in nats per token.

    Each forward pass weighs as much as the tokens it holds, out of those of the whole
    step, all processes together: how a step is cut up does not change it.

    Args:
        objective: an `Objective`, as `accelerator.prepare_model` returned it.
        blocks: the token ids of the step, shape (blocks, block_size).
    """
    device = accelerator.unwrap_model(objective).student.device
    sums = torch.zeros(3)
    parts = blocks.split(config.batch_size)
    for i, part in enumerate(parts):
        mine = part[accelerator.process_index :: accelerator.num_processes]
        weight = len(mine) / len(blocks)
        # a process without a block of its own still has to take part: with weight 0
        ids = (mine if len(mine) else part[:1]).to(device)
        is_last = i == len(parts) - 1
        with contextlib.nullcontext() if is_last else accelerator.no_sync(objective):
            answer = accelerator.unwrap_model(objective).ask(teacher, ids)
            loss, soft, hard = objective(ids, answer)
            # DistributedDataParallel takes the mean over processes where the sum is wanted
            accelerator.backward(loss * weight * accelerator.num_processes)
        sums += weight * torch.stack([loss, soft, hard]).detach().float().cpu()
    loss, soft, hard = accelerator.reduce(sums.to(accelerator.device), "sum").tolist()
    return {
        "loss": loss,
        "soft_loss": soft if config.alpha < 1 else None,
        "hard_loss": hard if config.alpha > 0 else None,
    }


class Objective(nn.Module):
    """A student and what it is to minimise: one module, for DistributedDataParallel to wrap.

    Where the logits of teacher and student are hidden states times output weights, as
    in GPT-2, the loss goes straight from these to gradients (`streaming.py`); else it
    is the same loss of the logits.
    """

    def __init__(self, teacher, student, config: DistillConfig, ids: torch.Tensor):
        """As it suits these models; `ids` are a few blocks to try them on."""
        super().__init__()
        self.student, self.config = student, config
        self.vocabulary = common_vocabulary(teacher, student)
        asked = [student, teacher] if config.alpha < 1 else [student]
        self.streaming = all(can_stream(model, ids) for model in asked)
        if self.streaming:
            self.teacher_head = output_weights(asked[-1], self.vocabulary).detach()

    @torch.no_grad()
    def ask(self, teacher, ids: torch.Tensor) -> torch.Tensor | None:
        """What the loss needs of the teacher: hidden states or logits, or nothing."""
        if self.config.alpha == 1:
            return None
        with self.autocast(ids):
            if self.streaming:
                return hidden_states(teacher, ids)
            return teacher(ids, use_cache=False).logits[..., : self.vocabulary]

    def forward(self, ids: torch.Tensor, answer: torch.Tensor | None):
        """The loss of some blocks, and its soft-label and hard-label parts without gradient."""
        config = self.config
        with self.autocast(ids):
            if self.streaming:
                hidden = hidden_states(self.student, ids)[:, :-1]
                head = output_weights(self.student, self.vocabulary)
                teacher = (None, None) if answer is None else (answer[:, :-1], self.teacher_head)
                how = config.temperature, config.alpha, config.divergence
                return streaming_loss(hidden, head, *teacher, ids[:, 1:], *how)
            logits, labels = shift(self.student(ids, use_cache=False).logits, ids)
            logits = logits[..., : self.vocabulary]
            soft = hard = torch.zeros((), device=ids.device)
            if config.alpha > 0:
                hard = hard_label_loss(logits, labels)
            if config.alpha < 1:
                divergence = DIVERGENCES[config.divergence]
                soft = divergence(logits, answer[:, :-1], config.temperature)
            return mix(hard, soft, config.alpha), soft, hard

    def autocast(self, ids: torch.Tensor):
        """Half-precision arithmetic where the settings ask for it."""
        wanted = self.config.dtype == "bfloat16"
        return torch.autocast(ids.device.type, torch.bfloat16, enabled=wanted)


def end_of_epoch(teacher, student, blocks: Blocks, steps, history: list[dict]) -> dict:
    """The epoch's average loss over its blocks, and what the validation blocks say."""
    sizes = [len(step) for step in steps]
    weighted = (row["loss"] * n for row, n in zip(history[-len(steps) :], sizes, strict=True))
    found = quality(student, blocks.validation, teacher=teacher)
    return {
        "average_loss": sum(weighted) / sum(sizes),
        "validation_perplexity": found["perplexity"],
        "validation_kl": found["kl_to_teacher"],
    }


def steps_of_epoch(blocks: int, config: DistillConfig, epoch: int) -> tuple[torch.Tensor, ...]:
    """Which blocks each optimiser step of an epoch sees: all of them once, shuffled anew."""
    generator = torch.Generator().manual_seed(config.seed * 1_000 + epoch)
    order = torch.randperm(blocks, generator=generator)
    return order.split(config.batch_size * config.accumulation)


def warm_up_and_cosine(step: int, warmup_steps: float, total_steps: int) -> float:
    """The share of the peak learning rate at a step, counted from 0: no step is idle."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def parameter_groups(student: nn.Module, config: DistillConfig) -> list[dict]:
    """Weight decay for matrices, none for biases and normalisation."""
    trained = [p for p in student.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


@contextlib.contextmanager
def reproducible(seed: int):
    """Random numbers that follow from the seed alone; the caller's own go on undisturbed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def train_mode(teacher: nn.Module, student: nn.Module, config: DistillConfig):
    """Teacher in eval mode, student in train mode as configured; then all as before."""
    modes = teacher.training, student.training
    layers = [module for module in student.modules() if isinstance(module, nn.Dropout)]
    before = [layer.p for layer in layers]
    teacher.eval()
    student.train()
    for layer in layers:
        layer.p = config.dropout
    if config.gradient_checkpointing:
        quietly(student.gradient_checkpointing_enable, {"use_reentrant": False})
    try:
        yield
    finally:
        if config.gradient_checkpointing:
            quietly(student.gradient_checkpointing_disable)
        for layer, p in zip(layers, before, strict=True):
            layer.p = p
        teacher.train(modes[0])
        student.train(modes[1])


def quietly(action: Callable, *arguments) -> None:
    """Call what newer versions of `transformers` have renamed, without their warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        action(*arguments)
