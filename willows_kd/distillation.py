"""The loop: a student learns from its teacher's soft labels."""

import contextlib
import dataclasses
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm

from willows_kd.compress.layers import layer_stack
from willows_kd.config import DistillConfig
from willows_kd.corpus import Blocks
from willows_kd.errors import InputError, require, type_name
from willows_kd.evaluation import quality
from willows_kd.generation import continued, prompt_length, uniform_draws
from willows_kd.losses import DIVERGENCES, cosine_distance, hard_label_loss, mix
from willows_kd.models import (
    check_positions,
    common_vocabulary,
    distributed_state,
    dropout_set_to,
    eval_mode,
    has_linear_head,
    output_weights,
    require_model,
)
from willows_kd.scale.checkpoints import Checkpoints, NoCheckpoints, resume_run
from willows_kd.scale.chunked_loss import chunked_distillation_loss
from willows_kd.scale.stopping import (
    check_finite,
    failures_as_input_errors,
    graceful_interrupt,
    is_half_precision,
)
from willows_kd.scale.teacher_cache import TeacherCache

LOSSES = ("loss", "soft_loss", "hard_loss", "hidden_loss")


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
        loss, soft_loss, hard_loss and hidden_loss (nats per token; None if it has no weight),
        gradient_norm, learning_rate, tokens (seen so far) and seconds (of training). The
        last row of an epoch also has average_loss, validation_perplexity and
        validation_kl (None if the teacher is a cache of samples). If Ctrl-C stopped the
        run, the history ends with the last finished step, and the student is as of that step.

    Raises:
        InputError: teacher, student or blocks do not fit together, the loss or gradient is
            not finite, memory runs out, or the checkpoints belong to a different run.
    """
    config = DistillConfig() if config is None else config
    check(teacher, student, blocks, config)
    config = dataclasses.replace(config, batch_size=config.blocks_per_pass(blocks.block_size))
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
    vocabulary = objective.vocabulary
    optimizer = torch.optim.AdamW(parameter_groups(student, config))
    optimizer.zero_grad()
    plan = plan_steps(len(blocks.train), config)
    written = checkpoints if main_process else NoCheckpoints()  # one process writes for all

    with contextlib.ExitStack() as stack:
        stack.enter_context(written.locked())
        run = checkpoints.describe(teacher, student, blocks, config)
        history = resume_run(accelerator, checkpoints, student, optimizer, run) if resume else []
        objective = accelerator.prepare_model(objective, device_placement=False)
        shown = {"unit": "step", "leave": False, "disable": not main_process}
        bar = stack.enter_context(tqdm(total=len(plan), initial=len(history), **shown))
        stack.enter_context(torch.random.fork_rng())  # the caller's random state stays as it is
        stack.enter_context(train_mode(teacher, student, config))
        stack.enter_context(failures_as_input_errors(history, checkpoints))
        stop = stack.enter_context(graceful_interrupt(processes == 1))
        for epoch, step, ends_epoch in plan[len(history) :]:
            start = time.perf_counter()
            row = {"step": len(history) + 1, "epoch": epoch}
            # dropout follows from seed and step, so that a resumed run draws the same
            torch.manual_seed(config.seed * 2**31 + row["step"])

            losses = torch.zeros(4)
            text, counted = blocks.train[step], None
            if config.on_policy_share:
                text, counted = written_by_student(
                    student, vocabulary, text, row["step"], config, accelerator
                )
            for ids, mask, weight, is_last in micro_batches(text, counted, config, accelerator):
                with contextlib.nullcontext() if is_last else accelerator.no_sync(objective):
                    mask = mask if mask is None else mask.to(student.device)
                    parts = objective(teacher, ids.to(student.device), mask)
                    # DistributedDataParallel averages over the processes; we want the sum
                    accelerator.backward(parts[0] * weight * processes)
                losses += weight * torch.stack(parts).detach().float().cpu()
            losses = accelerator.reduce(losses.to(accelerator.device), "sum").tolist()
            weights = 1, 1 - config.alpha, config.alpha, config.hidden_weight
            for name, value, weight in zip(LOSSES, losses, weights, strict=True):
                row[name] = value if weight else None

            norm = accelerator.clip_grad_norm_(student.parameters(), config.max_grad_norm)
            row["gradient_norm"] = norm.item()
            check_finite(row, teacher if asks_teacher(config) else None, student, text)
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
    """Require models, blocks and settings that fit together, before anything is done."""
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
    if isinstance(teacher, TeacherCache):
        require(
            not config.on_policy_share,
            "the teacher's cache knows only the text it was made for, not what the student will "
            "write; for on_policy_share give the teacher itself",
        )
        require(
            not teacher.samples or (config.divergence, config.temperature) == ("forward_kl", 1),
            "sampled labels are right on average for the forward KL at temperature 1 only",
        )
        require(
            not config.hidden_weight
            or (not config.hidden_layers and teacher.get_output_embeddings()),
            "the teacher's cache holds its final hidden states, with top_k or samples none at "
            "all; to match others give the teacher itself",
        )


def asks_teacher(config: DistillConfig) -> bool:
    """Whether the loss depends on the teacher."""
    return config.alpha < 1 or config.hidden_weight > 0


def shard_teacher(teacher):
    """Divide a teacher that fits no single device among the processes of a run, in place.

    Each process holds its share of every layer, and gathers one layer at a time while it
    computes (fully sharded data parallel: Zhao et al. 2023); embeddings and output weights
    are whole in each. The layers go to the process's device one by one, so load the teacher
    on the CPU, and make the student from it first. From then on it answers only if all
    processes ask at once, as they do in `distill`.

    Returns:
        the teacher.

    Raises:
        InputError: there is only one process, or the teacher has no list of layers.
    """
    from torch.distributed.fsdp import fully_shard  # slow to import

    require_model(teacher, "teacher")
    state = distributed_state()
    require(
        state.num_processes > 1,
        "there is one process, and nothing to divide a teacher among; start several: "
        "torchrun --nproc_per_node N script.py",
    )
    for layer in teacher.get_submodule(layer_stack(teacher)):
        fully_shard(layer, reshard_after_forward=True)
    return teacher.to(state.device)


class DistillationLoss(nn.Module):
    """The loss of a student: one module, for DistributedDataParallel to wrap.

    If the logits of teacher and student are hidden states times output weights, as in
    GPT-2, `chunked_distillation_loss` computes it without holding all logits; if not, the
    functions of `losses` do. The values are the same.
    """

    def __init__(self, teacher, student, config: DistillConfig, ids: torch.Tensor):
        """Choose the way that suits these models; `ids` are a few blocks to try them on."""
        super().__init__()
        self.student, self.config = student, config
        self.vocabulary = common_vocabulary(teacher, student)
        ids = ids.to(student.device)
        asked = {"student": student} | ({"teacher": teacher} if asks_teacher(config) else {})
        self.chunked = all(has_linear_head(model, ids) for model in asked.values())
        if not self.chunked:
            for name, model in asked.items():
                require_logits(name, model, ids)
        pairs = config.hidden_layers or ()
        self.layers = {"student": [a for a, _ in pairs], "teacher": [b for _, b in pairs]}
        if config.hidden_weight:
            self.check_hidden_states(asked, ids)

    def forward(self, teacher, ids: torch.Tensor, mask: torch.Tensor | None = None):
        """The loss of some blocks, and without gradient its parts: soft, hard, hidden.

        Args:
            teacher: in eval mode; asked only if the loss depends on it.
            ids: token ids, shape (blocks, block_size).
            mask: True for each prediction that counts, shape (blocks, block_size - 1).
        """
        config = self.config
        target, states = None, []
        if asks_teacher(config):
            with torch.no_grad(), self.autocast(ids):
                target, states = self.look(teacher, ids, self.layers["teacher"])
        with self.autocast(ids):
            output, own_states = self.look(self.student, ids, self.layers["student"])
            loss, soft, hard = self.compare(output, teacher, target, ids[:, 1:], mask)
            hidden = torch.zeros_like(loss)
            if config.hidden_weight:
                pairs = zip(own_states, states, strict=True)
                hidden = torch.stack([cosine_distance(a, b, mask) for a, b in pairs]).mean()
                loss = loss + config.hidden_weight * hidden
        return loss, soft, hard, hidden

    def look(self, model, ids: torch.Tensor, layers: list[int]):
        """Final hidden states or logits, and the hidden states that are matched.

        Each is that of the positions that have a next token. Without layers the hidden
        states that are matched are the final ones.
        """
        matched = self.config.hidden_weight > 0
        more = {"output_hidden_states": True} if layers or matched and not self.chunked else {}
        if self.chunked:
            found = model.base_model(ids, use_cache=False, **more)
            output = final = found.last_hidden_state
        else:
            found = model(ids, use_cache=False, **more)
            output = found.logits[..., : self.vocabulary]
            final = found.hidden_states[-1] if matched else None
        states = [found.hidden_states[i] for i in layers] or [final] * matched
        return output[:, :-1], [state[:, :-1] for state in states]

    @torch.no_grad()
    def check_hidden_states(self, models: dict, ids: torch.Tensor) -> None:
        """Require layers that are there, and hidden states of one width."""
        widths = {}
        for name, model in models.items():
            with eval_mode(model):
                try:
                    _, states = self.look(model, ids, self.layers[name])
                except IndexError:
                    wrong = f"hidden_layers names layer {max(self.layers[name])} of the {name}"
                    raise InputError(f"{wrong}, which has none of that number") from None
            widths[name] = [state.shape[-1] for state in states]
        require(
            widths["student"] == widths["teacher"],
            f"the hidden states of the student are {widths['student']} wide, the teacher's "
            f"{widths['teacher']}; for hidden_weight they must be equal",
        )

    def compare(self, output, teacher, target, labels, mask):
        """The loss from the outputs of student and teacher, and its soft and hard parts."""
        config = self.config
        if self.chunked:
            return chunked_distillation_loss(
                student_hidden=output,
                student_head=output_weights(self.student, self.vocabulary),
                teacher_hidden=target,
                teacher_head=None if target is None else output_weights(teacher, self.vocabulary),
                labels=labels,
                temperature=config.temperature,
                alpha=config.alpha,
                divergence=config.divergence,
                mask=mask,
                beta=config.beta,
                skew=config.skew,
            )
        soft = hard = torch.zeros((), device=labels.device)
        if config.alpha > 0:
            hard = hard_label_loss(output, labels, mask)
        if config.alpha < 1:
            parameters = {"beta": config.beta, "skew": config.skew}
            divergence = DIVERGENCES[config.divergence].with_parameters(**parameters)
            soft = divergence(output, target, config.temperature, mask)
        return mix(hard, soft, config.alpha), soft, hard

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


def written_by_student(student, vocabulary, ids, step: int, config, accelerator):
    """The text of a step, of which the student has written a share: on-policy distillation.

    The writing is data: no gradient goes through it. A process writes only what it will
    see; which tokens are drawn depends on the seed, the step and the block alone. Returns
    the text and what counts of it, shape (blocks, block_size - 1): all of a book's block, of
    a written one what was written.
    """
    prompt, count = prompt_length(ids.shape[1]), round(config.on_policy_share * len(ids))
    counted = torch.ones(len(ids), ids.shape[1] - 1, dtype=torch.bool)
    counted[:count, : prompt - 1] = False
    row = torch.arange(count)
    mine = row[row % config.batch_size % accelerator.num_processes == accelerator.process_index]
    if len(mine):
        draws = uniform_draws(count, ids.shape[1] - prompt, config.seed * 2**31 + step)
        ids = ids.clone()
        prompts = ids[mine, :prompt]
        ids[mine, prompt:] = continued(
            student, prompts, draws.shape[1], draws[mine], vocabulary=vocabulary
        ).to(ids.device)
    return ids, counted


def micro_batches(ids: torch.Tensor, counted: torch.Tensor | None, config, accelerator):
    """The forward passes of one optimiser step, as far as they are this process's.

    Each weighs as much as the tokens that count in it, out of those of the whole step, all
    processes together: how a step is cut up does not change it. Yields token ids, the mask
    of those that count or None, their weight, and whether they are the last of the step.
    """
    tokens = torch.ones(len(ids)) if counted is None else counted.sum(dim=1)
    batches = torch.arange(len(ids)).split(config.batch_size)
    for i, batch in enumerate(batches, start=1):
        mine = batch[accelerator.process_index :: accelerator.num_processes]
        weight = tokens[mine].sum().item() / tokens.sum().item()
        # a process without a block of its own still has to take part: with weight 0
        mine = mine if len(mine) else batch[:1]
        yield ids[mine], None if counted is None else counted[mine], weight, i == len(batches)


def end_of_epoch(teacher, student, blocks: Blocks, history: list[dict], config) -> dict:
    """The epoch's average loss over its blocks, and the student's quality on held-out blocks."""
    epoch = history[-1]["epoch"]
    sizes = [len(step) for step in steps_of_epoch(len(blocks.train), config, epoch - 1)]
    weighted = (row["loss"] * n for row, n in zip(history[-len(sizes) :], sizes, strict=True))
    teacher = None if getattr(teacher, "samples", None) else teacher  # it knows no other blocks
    mask = blocks.masks.get("validation")
    found = quality(student, blocks.validation, teacher=teacher, mask=mask)
    return {
        "average_loss": sum(weighted) / sum(sizes),
        "validation_perplexity": found["perplexity"],
        "validation_kl": found.get("kl_to_teacher"),
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
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def parameter_groups(student: nn.Module, config: DistillConfig) -> list[dict]:
    """AdamW's groups: weight decay for matrices, none for biases and normalisation."""
    trained = [p for p in student.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


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
