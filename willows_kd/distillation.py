"""The loop: a student learns from its teacher's soft labels."""

import contextlib
import math
import time
import warnings
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import nn
from tqdm.auto import tqdm

from willows_kd.config import DistillConfig
from willows_kd.corpus import Blocks
from willows_kd.errors import Stopped, require, type_name
from willows_kd.evaluation import check_blocks, evaluate
from willows_kd.generation import continued, prompt_length, uniform_draws
from willows_kd.losses import cosine_distance, divergence_of, hard_label_loss, mix
from willows_kd.models import (
    common_vocabulary,
    distributed_state,
    dropout_set_to,
    eval_mode,
    is_placed,
    vocabulary_size,
)
from willows_kd.stopping import check_finite, graceful_interrupt, memory_errors_as_input_errors


@torch.inference_mode(False)  # which allows gradients, even inside a caller's no_grad
def distill(
    teacher: nn.Module,
    student: nn.Module,
    blocks: Blocks,
    config: DistillConfig | None = None,
    on_step: Callable[[dict], None] | None = None,
    loss: Callable[..., nn.Module] | None = None,
    checkpoints=None,
    resume: bool = False,
) -> list[dict]:
    """Train a student, in place, on its teacher's soft labels.

    The teacher is in eval mode throughout, takes no gradient, and is left as and where it was.
    The same seed, machine and thread count give the same student, whether the run was
    stopped and resumed or not.

    Args:
        teacher, student: causal language models with one vocabulary. The student's weights
            are in float32 or float64.
        blocks: the packed corpus. The student is trained on `blocks.train`, on the tokens that
            `blocks.masks` lets count, and evaluated on `blocks.validation` after each epoch.
        config: the settings; None for the defaults. With `alpha=1` the teacher is not asked
            for soft labels: this is the hard-label control, on the same path.
        on_step: called after each optimiser step with that step's row of the history.
        loss: what makes the loss of teacher, student, config and a block: None for
            `DistillationLoss`; `kd.ChunkedLoss` is the same in less memory and time.
        checkpoints: `kd.Checkpoints(folder)` writes the last two; None writes none.
        resume: continue from the newest checkpoint, if there is one.

    Returns:
        The history, a row (dict) per step, ready for `pandas.DataFrame`: step, epoch,
        loss, soft_loss, hard_loss and hidden_loss (nats per token; None if it has no weight),
        gradient_norm, learning_rate, tokens (seen so far) and seconds (of training). The
        last row of an epoch also has average_loss, validation_perplexity and
        validation_kl (None if the teacher is a cache of samples).

    Raises:
        InputError: teacher, student or blocks do not fit together, the loss or gradient is
            not finite, memory runs out, or the checkpoints belong to a different run.
        Stopped: a `KeyboardInterrupt`: Ctrl-C ended the run after the current step. Its
            `history` has the rows so far. A second Ctrl-C ends the run at once.

    Warns:
        UserWarning: the student drops out by itself, whatever `config.dropout` is.
    """
    config = DistillConfig() if config is None else config
    validate_inputs(teacher, student, blocks, config, checkpoints, resume)
    distributed_state()  # joins the processes that a launcher started
    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        student.to(accelerator.device)
    with (
        torch.random.fork_rng(),  # the caller's random state stays as it is
        train_mode(teacher, student, config),
    ):
        warn_of_other_dropout(student, blocks.train[:1])
        objective = (loss or DistillationLoss)(teacher, student, config, blocks.train[:1])
        optimizer = torch.optim.AdamW(parameter_groups(student, config))
        optimizer.zero_grad()  # of what came before
        plan = [
            (epoch, batch)
            for epoch in range(1, config.epochs + 1)
            for batch in epoch_batches(blocks.train, config, epoch - 1)
        ]
        shown = {"unit": "step", "leave": False, "disable": not accelerator.is_main_process}
        run: contextlib.AbstractContextManager = contextlib.nullcontext(([], None))
        if checkpoints is not None:
            run = checkpoints.opened(teacher, student, optimizer, blocks, config, resume)
        with (
            run as (history, save),
            tqdm(total=len(plan), initial=len(history), **shown) as bar,
            memory_errors_as_input_errors(history),
            graceful_interrupt(accelerator.num_processes == 1) as stop,
        ):
            objective = accelerator.prepare_model(objective, device_placement=False)
            for epoch, indices in plan[len(history) :]:
                start = time.perf_counter()
                row: dict = {"step": len(history) + 1, "epoch": epoch}
                # dropout follows from seed and step, so that a resumed run draws the same
                torch.manual_seed(config.seed * 2**31 + row["step"])

                ids, mask = blocks.train[indices], blocks.masks.get("train")
                mask = None if mask is None else mask[indices, 1:]
                if config.on_policy_share:
                    ids, mask = sample_on_policy(
                        teacher, student, ids, mask, row["step"], config, accelerator
                    )

                losses = torch.zeros(4)
                for part, counts, weight, is_last in micro_batches(ids, mask, config, accelerator):
                    with contextlib.nullcontext() if is_last else accelerator.no_sync(objective):
                        parts = objective(teacher, part, counts)
                        # DistributedDataParallel averages over the processes; we want the sum
                        accelerator.backward(parts[0] * weight * accelerator.num_processes)
                    losses += weight * torch.stack(parts).detach().float().cpu()
                row |= named_losses(losses, config, accelerator)

                norm = accelerator.clip_grad_norm_(student.parameters(), config.max_grad_norm)
                row["gradient_norm"] = norm.item()
                check_finite(row)

                share = warm_up_and_cosine(len(history), config.warmup_ratio * len(plan), len(plan))
                row["learning_rate"] = config.learning_rate * share
                for group in optimizer.param_groups:
                    group["lr"] = row["learning_rate"]
                optimizer.step()
                optimizer.zero_grad()

                before = history[-1] if history else {"tokens": 0, "seconds": 0.0}
                row["tokens"] = before["tokens"] + ids.numel()
                row["seconds"] = before["seconds"] + time.perf_counter() - start
                history.append(row)
                ends_epoch = len(history) % (len(plan) // config.epochs) == 0
                if ends_epoch:
                    row |= end_of_epoch(teacher, student, blocks, history, config)

                speed = row["tokens"] / row["seconds"]
                bar.set_postfix_str(f"loss {row['loss']:.3f}, {speed:,.0f} tokens/s", refresh=False)
                bar.update()
                if on_step and accelerator.is_main_process:
                    on_step(row)
                if save:
                    save(history, at_once=ends_epoch or stop.requested)
                if stop.requested:
                    raise Stopped(history, len(plan))
    return history


class DistillationLoss(nn.Module):
    """The loss of a student, from all logits: one module, for DistributedDataParallel to wrap.

    (1 - alpha) · soft + alpha · hard + hidden_weight · hidden, each a mean over the tokens
    that count.
    """

    def __init__(self, teacher, student, config: DistillConfig, ids: torch.Tensor):
        """Require hidden states that are there; `ids` are a block that a subclass may try."""
        super().__init__()
        self.student, self.config = student, config
        self.vocabulary = common_vocabulary(teacher, student)
        self.matches_hidden = config.hidden_weight > 0
        pairs = config.hidden_layers or ()
        self.layers = {"student": [a for a, _ in pairs], "teacher": [b for _, b in pairs]}
        for name, model in (("student", student), ("teacher", teacher)):
            if self.matches_hidden and (highest := max(self.layers[name], default=0)):
                depth = model.config.get_text_config(decoder=True).num_hidden_layers
                wrong = f"hidden_layers names layer {highest} of the {name}, which has {depth}"
                require(highest <= depth, wrong)

    def forward(self, teacher, ids: torch.Tensor, mask: torch.Tensor | None = None):
        """The loss of some blocks, and without gradient its parts: soft, hard, hidden.

        Args:
            teacher: in eval mode; asked only if the loss depends on it.
            ids: token ids, shape (blocks, block_size).
            mask: True for each prediction that counts, shape (blocks, block_size - 1).
        """
        ids, mask = (x if x is None else x.to(self.student.device) for x in (ids, mask))
        target, states = None, []
        with self.autocast(ids):
            if asks_teacher(self.config):
                with torch.no_grad():
                    target, states = self.forward_states(teacher, ids, self.layers["teacher"])
            output, own = self.forward_states(self.student, ids, self.layers["student"])
            loss, soft, hard = self.combine_losses(output, teacher, target, ids[:, 1:], mask)
            hidden = torch.zeros_like(loss)
            if self.matches_hidden:
                pairs = zip(own, states, strict=True)
                hidden = torch.stack([cosine_distance(a, b, mask) for a, b in pairs]).mean()
                loss = loss + self.config.hidden_weight * hidden
        return loss, soft, hard, hidden

    def forward_states(self, model, ids: torch.Tensor, layers: list[int]):
        """Logits, and the hidden states that are matched: of some layers, or the final ones.

        Each is that of the positions that have a next token.
        """
        more = {"output_hidden_states": True} if self.matches_hidden else {}
        found = model(ids, use_cache=False, **more)
        states = [found.hidden_states[i] for i in layers or [-1]] if self.matches_hidden else []
        return found.logits[:, :-1, : self.vocabulary], [state[:, :-1] for state in states]

    def combine_losses(self, output, teacher, target, labels, mask):
        """The loss from the logits of student and teacher, and its soft and hard parts."""
        config = self.config
        soft = hard = torch.zeros((), device=labels.device)
        if config.alpha > 0:
            hard = hard_label_loss(output, labels, mask)
        if config.alpha < 1:
            soft = divergence_of(config)(output, target, config.temperature, mask)
        return mix(hard, soft, config.alpha), soft, hard

    def autocast(self, ids: torch.Tensor):
        """bfloat16 arithmetic, if the settings ask for it."""
        wanted = self.config.dtype == "bfloat16"
        return torch.autocast(ids.device.type, torch.bfloat16, enabled=wanted)


# -- before the first step -------------------------------------------------------------


def validate_inputs(
    teacher, student, blocks: Blocks, config: DistillConfig, checkpoints=None, resume=False
) -> None:
    """Require models, blocks and settings that fit together, before anything is done."""
    require(isinstance(blocks, Blocks), f"blocks are {type_name(blocks)}; give what pack returns")
    is_config = isinstance(config, DistillConfig)
    require(is_config, f"config is {type_name(config)}; give a DistillConfig")
    for name, model in (("teacher", teacher), ("student", student)):
        for split in (blocks.train, blocks.validation):
            check_blocks(model, split, name)
    require(
        hasattr(checkpoints, "opened") or checkpoints is None and not resume,
        f"checkpoints is {checkpoints!r}; give kd.Checkpoints(folder)",
    )
    same = "teacher and student are one model; make the student with student_from_teacher"
    require(student is not teacher, same)
    trained = [p for p in student.parameters() if p.requires_grad]
    require(trained, "no weight of the student takes gradients; set requires_grad_(True)")
    require(
        all(p.dtype in (torch.float32, torch.float64) for p in trained),
        "small updates are lost in the student's half-precision weights; train student.float(), "
        'and for speed set DistillConfig(dtype="bfloat16")',
    )
    common = common_vocabulary(teacher, student)
    sizes = vocabulary_size(teacher), vocabulary_size(student)
    if sizes[0] != sizes[1]:
        warnings.warn(
            f"teacher and student predict {sizes[0]} and {sizes[1]} tokens: the loss is over the "
            f"first {common}, to which all tokens of the text belong",
            stacklevel=3,
        )
    mask = blocks.masks.get("train")
    require(
        mask is None or mask.shape == blocks.train.shape and mask[:, 1:].any(),
        'blocks.masks["train"] must have the shape of blocks.train and let a token count',
    )
    if hasattr(teacher, "validate"):  # a cache says itself what it cannot answer
        teacher.validate(config, student)


def asks_teacher(config: DistillConfig) -> bool:
    """Whether the loss depends on the teacher."""
    return config.alpha < 1 or config.hidden_weight > 0


@contextlib.contextmanager
def train_mode(teacher: nn.Module, student: nn.Module, config: DistillConfig):
    """Teacher in eval mode on the student's device, student in train mode; then all as before.

    A teacher that `transformers` placed itself stays where it is.
    """
    with contextlib.ExitStack() as stack:
        if teacher.device != student.device and not is_placed(teacher):
            stack.callback(teacher.to, teacher.device)
            teacher.to(student.device)
        stack.enter_context(eval_mode(teacher, student))
        stack.enter_context(dropout_set_to(student, config.dropout))
        student.train()
        if config.gradient_checkpointing:  # newer versions of `transformers` have renamed it
            stack.enter_context(warnings.catch_warnings(action="ignore", category=FutureWarning))
            stack.callback(student.gradient_checkpointing_disable)
            student.gradient_checkpointing_enable({"use_reentrant": False})
        yield


@torch.no_grad()
def warn_of_other_dropout(student: nn.Module, ids: torch.Tensor) -> None:
    """Warn if a student in train mode is random although the dropout of its layers is 0."""
    with dropout_set_to(student, 0.0):
        first, second = (student(ids.to(student.device), use_cache=False) for _ in range(2))
    if not torch.allclose(first.logits, second.logits, 1e-3, 1e-4, equal_nan=True):
        warnings.warn(
            f"{type_name(student)} has dropout or noise that is no nn.Dropout: it trains with its "
            "own, whatever config.dropout is; set it to 0 in its config before the model is made",
            stacklevel=3,
        )


def epoch_batches(
    blocks: torch.Tensor, config: DistillConfig, epoch: int
) -> tuple[torch.Tensor, ...]:
    """Which blocks each optimiser step of an epoch sees: all of them once, shuffled anew.

    Args:
        blocks: token ids, shape (blocks, block_size).
        config: for its batch size, gradient accumulation steps and seed.
        epoch: counted from 0.

    Returns:
        for each step the indices of its blocks; the last step may have fewer.
    """
    generator = torch.Generator().manual_seed(config.seed * 1_000 + epoch)
    order = torch.randperm(len(blocks), generator=generator)
    at_once = config.blocks_per_pass(blocks.shape[1])
    return order.split(at_once * config.gradient_accumulation_steps)


def parameter_groups(student: nn.Module, config: DistillConfig) -> list[dict]:
    """AdamW's groups: weight decay for matrices, none for biases and normalisation."""
    trained = [p for p in student.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


# -- in a step -------------------------------------------------------------------------


def sample_on_policy(teacher, student, ids, mask, step: int, config, accelerator):
    """The text of a step with a share of its blocks sampled from the student: on-policy.

    The text is data: no gradient goes through the sampling. A process samples only what it
    will see; which tokens are drawn depends on the seed, the step and the block alone.

    Returns:
        token ids, and the mask of the predictions that count: of a sampled block those that
        were sampled.
    """
    prompt, count = prompt_length(ids.shape[1]), round(config.on_policy_share * len(ids))
    mask = torch.ones_like(ids[:, 1:], dtype=torch.bool) if mask is None else mask.clone()
    mask[:count] = torch.arange(ids.shape[1] - 1) >= prompt - 1
    row, at_once = torch.arange(count), config.blocks_per_pass(ids.shape[1])
    mine = row[row % at_once % accelerator.num_processes == accelerator.process_index]
    if len(mine):
        draws = uniform_draws(count, ids.shape[1] - prompt, config.seed * 2**31 + step)
        ids = ids.clone()
        ids[mine, prompt:] = continued(
            student,
            ids[mine, :prompt],
            draws.shape[1],
            draws[mine],
            vocabulary=common_vocabulary(teacher, student),
        ).to(ids.device)
    return ids, mask


def micro_batches(ids: torch.Tensor, mask: torch.Tensor | None, config, accelerator):
    """The forward passes of one optimiser step, as far as they are this process's.

    Each weighs as much as the tokens that count in it, out of those of the whole step, all
    processes together: how a step is cut up does not change it. Yields token ids, the mask
    of those that count or None, their weight, and whether they are the last of the step.
    """
    tokens = torch.ones(len(ids)) if mask is None else mask.sum(dim=1)
    batches = torch.arange(len(ids)).split(config.blocks_per_pass(ids.shape[1]))
    for i, batch in enumerate(batches, start=1):
        mine = batch[accelerator.process_index :: accelerator.num_processes]
        weight = tokens[mine].sum().item() / max(1, tokens.sum().item())
        # a process without a block of its own still has to take part: with weight 0
        mine = mine if len(mine) else batch[:1]
        yield ids[mine], None if mask is None else mask[mine], weight, i == len(batches)


def named_losses(losses: torch.Tensor, config: DistillConfig, accelerator) -> dict:
    """The columns for loss, soft, hard and hidden loss, all processes together."""
    values = accelerator.reduce(losses.to(accelerator.device), "sum").tolist()
    names = "loss", "soft_loss", "hard_loss", "hidden_loss"
    weights = 1, 1 - config.alpha, config.alpha, config.hidden_weight
    return {n: v if w else None for n, v, w in zip(names, values, weights, strict=True)}


def warm_up_and_cosine(step: int, warmup_steps: float, total_steps: int) -> float:
    """The share of the peak learning rate at a step, counted from 0: no step is idle."""
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def end_of_epoch(teacher, student, blocks: Blocks, history: list[dict], config) -> dict:
    """The epoch's average loss over its tokens, and the student's quality on held-out blocks."""
    steps = epoch_batches(blocks.train, config, history[-1]["epoch"] - 1)
    mask = blocks.masks.get("train")
    sizes = [len(s) if mask is None else mask[s, 1:].sum().item() for s in steps]
    losses = [row["loss"] for row in history[-len(steps) :]]
    asked = None if getattr(teacher, "training_blocks_only", False) else teacher
    mask = blocks.masks.get("validation")
    found = evaluate(student, blocks.validation, teacher=asked, mask=mask)
    return {
        "average_loss": sum(a * n for a, n in zip(losses, sizes, strict=True)) / sum(sizes),
        "validation_perplexity": found["perplexity"],
        "validation_kl": found.get("kl_to_teacher"),
    }
