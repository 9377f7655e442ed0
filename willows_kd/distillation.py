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
from tqdm.auto import tqdm

from willows_kd.checkpoints import Checkpoints, NoCheckpoints, resume_run
from willows_kd.chunked_loss import chunked_distillation_loss
from willows_kd.config import DistillConfig
from willows_kd.corpus import Blocks
from willows_kd.errors import require, type_name
from willows_kd.evaluation import quality
from willows_kd.losses import DIVERGENCES, hard_label_loss, mix, shift
from willows_kd.models import (
    check_positions,
    common_vocabulary,
    distributed_state,
    dropout_set_to,
    eval_mode,
    has_linear_head,
    hidden_states,
    output_weights,
    require_model,
)
from willows_kd.stopping import (
    check_finite,
    failures_as_input_errors,
    graceful_interrupt,
    is_half_precision,
)


@torch.inference_mode(False)  # which allows gradients, even inside a caller's no_grad
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
    The same seed, machine and thread count give the same student, whether the run was
    stopped and resumed or not. Ctrl-C ends the run after the current step, a second
    Ctrl-C at once.

    Args:
        teacher, student: causal language models with one vocabulary. The student's weights
            are in float32 or float64.
        blocks: the packed corpus. The student is trained on `blocks.train` and evaluated
            on `blocks.validation` after each epoch.
        config: the settings; None for the defaults. With `alpha=1` the teacher is not asked
            for soft labels: this is the hard-label control, on the same path.
        on_step: called after each optimiser step with that step's row of the history.
        checkpoints: a folder for the last two checkpoints, or `Checkpoints`, which also
            sets how often they are written; None writes none.
        resume: continue from the newest checkpoint, if there is one.

    Returns:
        The history, a row (dict) per step, ready for `pandas.DataFrame`: step, epoch,
        loss, soft_loss and hard_loss (nats per token; None if it has no weight),
        gradient_norm, learning_rate, tokens (seen so far) and seconds (of training). The
        last row of an epoch also has average_loss, validation_perplexity and
        validation_kl. If Ctrl-C stopped the run, the history ends with the last finished
        step, and the student is as of that step.

    Raises:
        InputError: teacher, student or blocks do not fit together, the loss or gradient is
            not finite, memory runs out, or the checkpoints belong to a different run.
    """
    config = DistillConfig() if config is None else config
    check(teacher, student, blocks, config)
    require(not resume or checkpoints is not None, "to resume, name the folder: checkpoints=...")
    if not isinstance(checkpoints, Checkpoints):
        checkpoints = NoCheckpoints() if checkpoints is None else Checkpoints(checkpoints)

    distributed_state()
    accelerator = Accelerator()
    main_process, processes = accelerator.is_main_process, accelerator.num_processes
    if processes > 1:
        student.to(accelerator.device)
    teacher.to(student.device)
    objective = DistillationLoss(teacher, student, config, blocks.train[:1])
    optimizer = torch.optim.AdamW(parameter_groups(student, config))
    optimizer.zero_grad()
    plan = plan_steps(len(blocks.train), config)
    written = checkpoints if main_process else NoCheckpoints()  # one process writes for all

    with contextlib.ExitStack() as stack:
        stack.enter_context(written.locked())
        run = checkpoints.describe(teacher, student, blocks, config)
        history = resume_run(accelerator, checkpoints, student, optimizer, run) if resume else []
        objective = accelerator.prepare_model(objective, device_placement=False)
        bar = stack.enter_context(progress_bar(len(plan), len(history), main_process))
        stack.enter_context(torch.random.fork_rng())  # the caller's random state stays as it is
        stack.enter_context(train_mode(teacher, student, config))
        stack.enter_context(failures_as_input_errors(history, checkpoints))
        stop = stack.enter_context(graceful_interrupt(processes == 1))
        for epoch, step, ends_epoch in plan[len(history) :]:
            start = time.perf_counter()
            row = {"step": len(history) + 1, "epoch": epoch}
            # dropout follows from seed and step, so that a resumed run draws the same
            torch.manual_seed(config.seed * 2**31 + row["step"])

            losses = torch.zeros(3)
            for ids, weight, is_last in micro_batches(blocks.train[step], config, accelerator):
                with contextlib.nullcontext() if is_last else accelerator.no_sync(objective):
                    parts = objective(teacher, ids.to(student.device))
                    # DistributedDataParallel averages over the processes; we want the sum
                    accelerator.backward(parts[0] * weight * processes)
                losses += weight * torch.stack(parts).detach().float().cpu()
            loss, soft, hard = accelerator.reduce(losses.to(accelerator.device), "sum").tolist()
            row["loss"] = loss
            row["soft_loss"] = soft if config.alpha < 1 else None
            row["hard_loss"] = hard if config.alpha > 0 else None

            norm = accelerator.clip_grad_norm_(student.parameters(), config.max_grad_norm)
            row["gradient_norm"] = norm.item()
            check_finite(row, teacher if config.alpha < 1 else None, student, blocks.train[step])
            row["learning_rate"] = learning_rate(len(history), len(plan), config)
            for group in optimizer.param_groups:
                group["lr"] = row["learning_rate"]
            optimizer.step()
            optimizer.zero_grad()

            before = history[-1] if history else {"tokens": 0, "seconds": 0.0}
            row["tokens"] = before["tokens"] + len(step) * blocks.block_size
            row["seconds"] = before["seconds"] + time.perf_counter() - start
            history.append(row)
            if ends_epoch:
                row |= end_of_epoch(teacher, student, blocks, history, config)
            advance(bar, row)
            if on_step and main_process:
                on_step(row)
            if ends_epoch or stop.requested or written.due():
                written.try_save(student, optimizer, history, run)
            if stop.requested and len(history) < len(plan):
                tqdm.write(f"stopped after step {len(history)} of {len(plan)}")
                break
    return history


def check(teacher, student, blocks: Blocks, config: DistillConfig) -> None:
    """Require models, blocks and settings that fit together, before anything is done.

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
    trained = [p for p in student.parameters() if p.requires_grad]
    require(trained, "no weight of the student takes gradients; set requires_grad_(True)")
    half = sorted({str(p.dtype).removeprefix("torch.") for p in trained if is_half_precision(p)})
    require(
        not half,
        f"the student's weights are {', '.join(half)}, in which small updates are lost; train "
        'student.float(), and for speed set DistillConfig(dtype="bfloat16")',
    )
    require(
        not config.gradient_checkpointing
        or getattr(student, "supports_gradient_checkpointing", False),
        f"{type_name(student)} has no gradient checkpointing; leave gradient_checkpointing out",
    )
    for name, model in (("teacher", teacher), ("student", student)):
        check_positions(model, blocks.train, name)


class DistillationLoss(nn.Module):
    """The loss of a student: one module, for DistributedDataParallel to wrap.

    If the logits of teacher and student are hidden states times output weights, as in
    GPT-2, `chunked_distillation_loss` computes it without holding all logits; if not, the
    functions of `losses` do. The values are the same.
    """

    def __init__(self, teacher, student, config: DistillConfig, ids: torch.Tensor):
        """Choose the way that suits these models; `ids` are a few blocks to try them on.

        Raises:
            InputError: they share no vocabulary, or one has no logits.
        """
        super().__init__()
        self.student, self.config = student, config
        self.vocabulary = common_vocabulary(teacher, student)
        ids = ids.to(student.device)
        asked = {"student": student} | ({"teacher": teacher} if config.alpha < 1 else {})
        self.chunked = all(has_linear_head(model, ids) for model in asked.values())
        if not self.chunked:
            for name, model in asked.items():
                require_logits(name, model, ids)

    def forward(self, teacher, ids: torch.Tensor):
        """The loss of some blocks, and without gradient its soft-label and hard-label parts.

        Args:
            teacher: in eval mode; with `alpha=1` it is not asked.
            ids: token ids, shape (blocks, block_size).
        """
        config = self.config
        target = self.ask(teacher, ids) if config.alpha < 1 else None
        with self.autocast(ids):
            if self.chunked:
                return chunked_distillation_loss(
                    student_hidden=hidden_states(self.student, ids)[:, :-1],
                    student_head=output_weights(self.student, self.vocabulary),
                    teacher_hidden=target,
                    teacher_head=None
                    if target is None
                    else output_weights(teacher, self.vocabulary),
                    labels=ids[:, 1:],
                    temperature=config.temperature,
                    alpha=config.alpha,
                    divergence=config.divergence,
                    beta=config.beta,
                )
            logits, labels = shift(self.student(ids, use_cache=False).logits, ids)
            logits = logits[..., : self.vocabulary]
            soft = hard = torch.zeros((), device=ids.device)
            if config.alpha > 0:
                hard = hard_label_loss(logits, labels)
            if config.alpha < 1:
                divergence = DIVERGENCES[config.divergence].with_parameters(beta=config.beta)
                soft = divergence(logits, target, config.temperature)
            return mix(hard, soft, config.alpha), soft, hard

    @torch.no_grad()
    def ask(self, teacher, ids: torch.Tensor) -> torch.Tensor:
        """The teacher's hidden states, or its logits, at each position that has a next token."""
        with self.autocast(ids):
            if self.chunked:
                return hidden_states(teacher, ids)[:, :-1]
            return teacher(ids, use_cache=False).logits[:, :-1, : self.vocabulary]

    def autocast(self, ids: torch.Tensor):
        """bfloat16 arithmetic, if the settings ask for it."""
        wanted = self.config.dtype == "bfloat16"
        return torch.autocast(ids.device.type, torch.bfloat16, enabled=wanted)


@torch.no_grad()
def require_logits(name: str, model, ids: torch.Tensor) -> None:
    """Require a model that returns logits, as `AutoModel` without a head does not."""
    with eval_mode(model):
        found = hasattr(model(ids, use_cache=False), "logits")
    headless = f"the {name}, {type_name(model)}, has no language-model head"
    require(found, f"{headless}; load it with AutoModelForCausalLM")


def micro_batches(ids: torch.Tensor, config: DistillConfig, accelerator):
    """The forward passes of one optimiser step, as far as they are this process's.

    Each weighs as much as the tokens it holds, out of those of the whole step, all
    processes together: how a step is cut up does not change it.

    Args:
        ids: the token ids of the step, shape (blocks, block_size).

    Yields:
        token ids, their weight, and whether they are the last of the step.
    """
    batches = ids.split(config.batch_size)
    for i, batch in enumerate(batches, start=1):
        mine = batch[accelerator.process_index :: accelerator.num_processes]
        weight = len(mine) / len(ids)
        # a process without a block of its own still has to take part: with weight 0
        yield mine if len(mine) else batch[:1], weight, i == len(batches)


def end_of_epoch(teacher, student, blocks: Blocks, history: list[dict], config) -> dict:
    """The epoch's average loss over its blocks, and the student's quality on held-out blocks."""
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
    """All optimiser steps: the epoch (from 1), the blocks to see, and whether it ends the epoch."""
    plan = []
    for epoch in range(1, config.epochs + 1):
        steps = steps_of_epoch(blocks, config, epoch - 1)
        plan += [(epoch, step, step is steps[-1]) for step in steps]
    return plan


def steps_of_epoch(blocks: int, config: DistillConfig, epoch: int) -> tuple[torch.Tensor, ...]:
    """Which blocks each optimiser step of an epoch sees: all of them once, shuffled anew.

    Args:
        blocks: how many there are.
        config: for its batch size, gradient accumulation steps and seed.
        epoch: counted from 0.

    Returns:
        for each step the indices of its blocks; the last step may have fewer.
    """
    generator = torch.Generator().manual_seed(config.seed * 1_000 + epoch)
    order = torch.randperm(blocks, generator=generator)
    return order.split(config.batch_size * config.gradient_accumulation_steps)


def learning_rate(step: int, total_steps: int, config: DistillConfig) -> float:
    """The learning rate of a step, counted from 0."""
    warmup_steps = config.warmup_ratio * total_steps
    return config.learning_rate * warm_up_and_cosine(step, warmup_steps, total_steps)


def warm_up_and_cosine(step: int, warmup_steps: float, total_steps: int) -> float:
    """The share of the peak learning rate at a step, counted from 0: no step is idle."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def parameter_groups(student: nn.Module, config: DistillConfig) -> list[dict]:
    """AdamW's groups: weight decay for matrices, none for biases and normalisation."""
    trained = [p for p in student.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def progress_bar(total: int, done: int, shown: bool) -> tqdm:
    """A bar over the optimiser steps, for one process of several."""
    return tqdm(total=total, initial=done, unit="step", leave=False, disable=not shown)


def advance(bar: tqdm, row: dict) -> None:
    """Move the bar by a step, with the loss and the speed so far."""
    speed = row["tokens"] / row["seconds"]
    bar.set_postfix_str(f"loss {row['loss']:.3f}, {speed:,.0f} tokens/s", refresh=False)
    bar.update()


@contextlib.contextmanager
def train_mode(teacher: nn.Module, student: nn.Module, config: DistillConfig):
    """Teacher in eval mode, student in train mode as configured; then all as before."""
    modes = teacher.training, student.training
    teacher.eval()
    student.train()
    if config.gradient_checkpointing:
        without_future_warnings(student.gradient_checkpointing_enable, {"use_reentrant": False})
    try:
        with dropout_set_to(student, config.dropout):
            yield
    finally:
        if config.gradient_checkpointing:
            without_future_warnings(student.gradient_checkpointing_disable)
        teacher.train(modes[0])
        student.train(modes[1])


def without_future_warnings(action: Callable, *arguments) -> None:
    """Call what newer versions of `transformers` have renamed, without their warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        action(*arguments)
