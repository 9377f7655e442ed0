"""The loop: a student learns from its teacher's soft labels."""

import contextlib
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from tqdm.auto import tqdm

from willows_kd.checkpoints import Checkpoints, describe_run, resume_run
from willows_kd.chunked_loss import chunked_loss
from willows_kd.config import DistillConfig
from willows_kd.corpus import Blocks
from willows_kd.errors import require, type_name
from willows_kd.evaluation import quality
from willows_kd.losses import DIVERGENCES, hard_label_loss, mix, shift
from willows_kd.models import (
    common_vocabulary,
    distributed_state,
    has_linear_head,
    hidden_states,
    output_weights,
    require_model,
)
from willows_kd.stopping import check_finite, failures_as_input_errors, graceful_interrupt


def distill(
    teacher: nn.Module,
    student: nn.Module,
    blocks: Blocks,
    config: DistillConfig | None = None,
    on_step: Callable[[dict], None] | None = None,
    checkpoints: Checkpoints | str | Path | None = None,
    resume: bool = False,
) -> list[dict]:
    """Train a student, in place, on its teacher's soft labels.

    The teacher is in eval mode throughout, takes no gradient, and is left as it was.
    The same seed, machine and thread count give the same student, stopped and resumed
    or not. Ctrl-C ends the training after the step at hand, a second one at once.

    Args:
        teacher, student: causal language models with one vocabulary.
        blocks: the packed corpus; the student is trained on `blocks.train` and looked
            at on `blocks.validation` after each epoch.
        config: the settings; the defaults where None. `alpha=1` never asks the
            teacher: it is the hard-label control, on the same path.
        on_step: called after each optimiser step with that step's row.
        checkpoints: a folder to keep the last two checkpoints in, or `Checkpoints`,
            which also says how often; None keeps none.
        resume: go on from the newest checkpoint there, where there is one.

    Returns:
        The history, a row (dict) a step, ready for `pandas.DataFrame`: step, epoch,
        loss, soft_loss and hard_loss (nats per token, None where not asked for),
        learning_rate, gradient_norm, tokens (seen so far) and seconds (of training).
        The last row of an epoch also has average_loss, validation_perplexity and
        validation_kl. Where Ctrl-C stopped it, the history is that far, and the student
        as of its last row.

    Raises:
        InputError: teacher and student do not share a vocabulary, the loss or gradient is no
            longer a number, memory is out, or the checkpoints are of another run.
    """
    config = DistillConfig() if config is None else config
    checkpoints = Checkpoints(checkpoints) if isinstance(checkpoints, str | Path) else checkpoints
    check(teacher, student, blocks, config)
    require(not resume or checkpoints, "to resume, name the folder: checkpoints=...")
    distributed_state()
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        student.to(accelerator.device)
    teacher.to(student.device)
    objective = Objective(teacher, student, config, blocks.train[:1].to(student.device))
    optimizer = torch.optim.AdamW(parameter_groups(student, config), lr=config.learning_rate)
    optimizer.zero_grad()
    plan = plan_steps(len(blocks.train), config)
    main_process = accelerator.is_main_process
    with contextlib.ExitStack() as stack:
        if checkpoints and main_process:
            stack.enter_context(checkpoints.locked())
        run = describe_run(teacher, student, blocks, config) if checkpoints else None
        history = resume_run(accelerator, checkpoints, student, optimizer, run) if resume else []
        done = len(history)
        schedule = LambdaLR(
            optimizer,
            lambda s: warm_up_and_cosine(s + done, config.warmup_ratio * len(plan), len(plan)),
        )
        objective = accelerator.prepare_model(objective, device_placement=False)
        bar = stack.enter_context(progress(plan, done, main_process))
        stack.enter_context(reproducible())
        stack.enter_context(train_mode(teacher, student, config))
        stop = stack.enter_context(graceful_interrupt(accelerator.num_processes == 1))
        for epoch, step, ends_epoch in plan[done:]:
            start = time.perf_counter()
            so_far = history[-1] if history else {"tokens": 0, "seconds": 0.0}
            row = {"step": len(history) + 1, "epoch": epoch}
            # dropout that follows from seed and step, so that a resumed run draws it alike
            torch.manual_seed(config.seed * 2**31 + row["step"])
            with failures_as_input_errors(row["step"], checkpoints):
                row |= backward(accelerator, teacher, objective, blocks.train[step], config)
                norm = accelerator.clip_grad_norm_(student.parameters(), config.max_grad_norm)
                row |= {"gradient_norm": norm.item(), "learning_rate": schedule.get_last_lr()[0]}
                check_finite(row)
                optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            row["tokens"] = so_far["tokens"] + len(step) * blocks.block_size
            row["seconds"] = so_far["seconds"] + time.perf_counter() - start
            history.append(row)
            if ends_epoch:
                row |= end_of_epoch(teacher, student, blocks, history, config)
            bar.set_postfix_str(
                f"loss {row['loss']:.3f}, {row['tokens'] / row['seconds']:,.0f} tokens/s",
                refresh=False,
            )
            bar.update()
            if on_step and main_process:
                on_step(row)
            if checkpoints and main_process and (ends_epoch or stop.requested or checkpoints.due()):
                checkpoints.try_save(student, optimizer, history, run)
            if stop.requested and len(history) < len(plan):
                tqdm.write(f"stopped after step {len(history)} of {len(plan)}")
                break
    return history


def check(teacher, student, blocks: Blocks, config: DistillConfig) -> None:
    """Refuse what cannot be distilled, before anything is done.

    Raises:
        InputError: with what would be accepted.
    """
    require_model(teacher, "teacher")
    require_model(student, "student")
    require(isinstance(blocks, Blocks), f"blocks are {type_name(blocks)}; give what pack returns")
    require(
        isinstance(config, DistillConfig), f"config is {type_name(config)}; give a DistillConfig"
    )
    same = "teacher and student are one model; make the student with student_from_teacher"
    require(student is not teacher, same)
    trained = any(p.requires_grad for p in student.parameters())
    require(trained, "no weight of the student takes gradients; set requires_grad_(True)")
    for name, model in (("teacher", teacher), ("student", student)):
        longest = getattr(model.config, "max_position_embeddings", None) or math.inf
        fits = f"the {name} takes at most {longest}; pack the corpus again with that block_size"
        require(blocks.block_size <= longest, f"blocks have {blocks.block_size} tokens, {fits}")


def progress(plan: list, done: int, shown: bool) -> tqdm:
    """A progress bar over the optimiser steps, for one process of several."""
    return tqdm(total=len(plan), initial=done, unit="step", leave=False, disable=not shown)


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
    in GPT-2, the loss goes straight from these to gradients (`chunked_loss.py`); else it
    is the same loss of the logits.
    """

    def __init__(self, teacher, student, config: DistillConfig, ids: torch.Tensor):
        """As it suits these models; `ids` are a few blocks to try them on."""
        super().__init__()
        self.student, self.config = student, config
        self.vocabulary = common_vocabulary(teacher, student)
        asked = [student, teacher] if config.alpha < 1 else [student]
        self.chunked = all(has_linear_head(model, ids) for model in asked)
        if self.chunked:
            self.teacher_head = output_weights(asked[-1], self.vocabulary).detach()

    @torch.no_grad()
    def ask(self, teacher, ids: torch.Tensor) -> torch.Tensor | None:
        """What the loss needs of the teacher: hidden states or logits, or nothing."""
        if self.config.alpha == 1:
            return None
        with self.autocast(ids):
            if self.chunked:
                return hidden_states(teacher, ids)
            return teacher(ids, use_cache=False).logits[..., : self.vocabulary]

    def forward(self, ids: torch.Tensor, answer: torch.Tensor | None):
        """The loss of some blocks, and its soft-label and hard-label parts without gradient."""
        config = self.config
        with self.autocast(ids):
            if self.chunked:
                hidden = hidden_states(self.student, ids)[:, :-1]
                head = output_weights(self.student, self.vocabulary)
                teacher = (None, None) if answer is None else (answer[:, :-1], self.teacher_head)
                how = config.temperature, config.alpha, config.divergence
                return chunked_loss(hidden, head, *teacher, ids[:, 1:], *how)
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


def end_of_epoch(teacher, student, blocks: Blocks, history: list[dict], config) -> dict:
    """The epoch's average loss over its blocks, and what the validation blocks say."""
    epoch = history[-1]["epoch"]
    sizes = [len(step) for step in steps_of_epoch(len(blocks.train), config, epoch - 1)]
    weighted = (row["loss"] * n for row, n in zip(history[-len(sizes) :], sizes, strict=True))
    found = quality(student, blocks.validation, teacher=teacher)
    return {
        "average_loss": sum(weighted) / sum(sizes),
        "validation_perplexity": found["perplexity"],
        "validation_kl": found["kl_to_teacher"],
    }


def plan_steps(blocks: int, config: DistillConfig) -> list[tuple[int, torch.Tensor, bool]]:
    """All optimiser steps: the epoch, which blocks it sees, and whether the epoch ends there."""
    plan = []
    for epoch in range(1, config.epochs + 1):
        steps = steps_of_epoch(blocks, config, epoch - 1)
        plan += [(epoch, step, step is steps[-1]) for step in steps]
    return plan


def steps_of_epoch(blocks: int, config: DistillConfig, epoch: int) -> tuple[torch.Tensor, ...]:
    """Which blocks each optimiser step of an epoch sees: all of them once, shuffled anew."""
    generator = torch.Generator().manual_seed(config.seed * 1_000 + epoch)
    order = torch.randperm(blocks, generator=generator)
    return order.split(config.batch_size * config.gradient_accumulation_steps)


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
def reproducible():
    """The caller's random numbers go on undisturbed, whatever is drawn here."""
    with torch.random.fork_rng():
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
        without_future_warnings(student.gradient_checkpointing_enable, {"use_reentrant": False})
    try:
        yield
    finally:
        if config.gradient_checkpointing:
            without_future_warnings(student.gradient_checkpointing_disable)
        for layer, p in zip(layers, before, strict=True):
            layer.p = p
        teacher.train(modes[0])
        student.train(modes[1])


def without_future_warnings(action: Callable, *arguments) -> None:
    """Call what newer versions of `transformers` have renamed, without their warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        action(*arguments)
