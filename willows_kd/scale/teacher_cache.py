"""A cache of a teacher's outputs: computed once, kept on disk, used instead of the teacher.

It keeps the final hidden states, 768 numbers per token for GPT-2, whose logits are 50,257.
The logits are these times the output weights, so soft labels at any temperature cost one
matrix product and no pass through the teacher's layers. Smaller, but not exact: the likeliest
tokens only, or tokens drawn from the teacher's distribution.

It lies in shards, files of a few blocks each, so that a run that is stopped goes on after the last.
"""

import functools
import hashlib
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock
from torch import nn
from tqdm.auto import tqdm
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from willows_kd.config import LONGEST_BLOCK, DistillConfig
from willows_kd.corpus import Blocks
from willows_kd.errors import InputError, WriteError, is_integer, require, type_name
from willows_kd.evaluation import check_blocks, window_length, windows
from willows_kd.files import (
    cache_folder,
    clean_up_interrupted_writes,
    load_tensors,
    save_tensors,
    write_errors,
)
from willows_kd.losses import forward_kl
from willows_kd.models import eval_mode, fingerprint, max_positions
from willows_kd.scale.linear_head import has_linear_head

SHARD = 32  # blocks in a file


def cache_teacher(
    teacher,
    blocks: Blocks,
    top_k: int | None = None,
    samples: int | None = None,
    folder: str | Path | None = None,
) -> nn.Module:
    """Run a teacher once over the training and validation blocks, and keep its outputs.

    The cache is found again by a digest of the teacher's weights and config, of the blocks'
    token ids and of the arguments: a stale cache is never used, and what is damaged or missing
    of it is made again; of several processes one makes it. It stays until its folder is deleted.

    Args:
        teacher: a causal language model.
        blocks: the blocks that training and validation will ask it about.
        top_k: keep the k largest log-probabilities at T = 1 instead of hidden states, and
            spread the rest evenly over the other tokens: smaller for a small k, but not exact;
            the error is printed. Works with any teacher.
        samples: keep k tokens drawn from the teacher's distribution at T = 1 instead, each
            with probability count / k (Anshumann et al. 2025, sparse logit sampling): on
            average this is the teacher's distribution, and the gradient of the forward KL at
            T = 1, for which alone it is meant, that of the teacher itself. Training blocks
            only. Works with any teacher.
        folder: where caches are kept; None for a folder in the user's cache.

    Returns:
        what `distill` and `evaluate` take in place of the teacher, for these blocks. If the
        folder cannot be written: the teacher itself, with a warning.

    Raises:
        InputError: an argument does not fit this teacher.
    """
    validate_inputs(teacher, blocks, top_k, samples)
    parts = blocks_to_cache(blocks, teacher, samples)
    folder = Path(folder) if folder else cache_folder() / "teachers"
    weights = fingerprint(teacher)
    place = folder / digest(weights, parts, top_k, samples)
    ask = functools.partial(outputs, teacher, top_k, samples)
    try:
        shards = load_or_build(place, parts, ask)
    except WriteError as error:
        warnings.warn(f"no cache, the teacher is asked each time: {error}", stacklevel=2)
        return teacher
    cache = TeacherCache(teacher, parts, shards, top_k, samples)
    exact = not (top_k or samples)
    cache.fingerprint = weights if exact else place.name  # a run may go on with it or the teacher
    if not exact:
        print_cache_error(teacher, cache, parts)
    return cache


class TeacherCache(nn.Module):
    """Stands in for its teacher: answers from files, for the blocks it was made for.

    It has the parts of a `transformers` model that the losses and `evaluate` use.

    Attributes:
        top_k, samples: the arguments of `cache_teacher`. If `samples` is not None, only the
            forward KL at T = 1 can use the answers, and only for training blocks.
        fingerprint: the teacher's if the answers are exact, else the cache's own.
        nbytes: of all answers.
    """

    def __init__(self, teacher, parts: list[torch.Tensor], shards: list[dict], top_k, samples):
        """Stand in for a teacher with its outputs for some blocks, part by part."""
        super().__init__()
        self.config, self.top_k, self.samples = teacher.config, top_k, samples
        self.training_blocks_only = samples is not None
        self.head = teacher.get_output_embeddings()
        self.nbytes = sum(tensor.nbytes for shard in shards for tensor in shard.values())
        self.rows = {
            block.tobytes(): (shard, row)
            for shard, part in zip(shards, parts, strict=True)
            for row, block in enumerate(part.numpy())
        }

    @property
    def device(self) -> torch.device:
        """The device of the teacher's head, on which it answers."""
        return self.head.weight.device

    def validate(self, config: DistillConfig, student) -> None:
        """Require what lets the cache stand in for its teacher in `distill`."""
        own, others = (
            min(max_positions(model.config) or LONGEST_BLOCK, LONGEST_BLOCK)
            for model in (self, student)
        )
        require(
            own <= others or self.training_blocks_only,
            f"the student reads {others} tokens, and the teacher's cache is of windows of {own}; "
            "give the teacher itself",
        )
        require(
            not self.samples or (config.divergence, config.temperature) == ("forward_kl", 1),
            "sampled labels are right on average for the forward KL at temperature 1 only",
        )
        require(
            not config.hidden_weight or (not config.hidden_layers and self.get_output_embeddings()),
            "the teacher's cache holds its final hidden states, with top_k or samples none at "
            "all; to match others give the teacher itself",
        )

    def get_output_embeddings(self) -> nn.Module | None:
        """The teacher's head; None if the cache holds no hidden states."""
        return None if self.top_k or self.samples else self.head

    def forward(self, ids: torch.Tensor, **_) -> CausalLMOutput:
        """Logits of blocks of shape (blocks, block_size), and the final hidden states if kept.

        Raises:
            InputError: a block is not among those that the cache was made for.
        """
        if self.samples:
            drawn = self.read("samples", ids).long()
            counts = torch.zeros(*ids.shape, self.config.vocab_size, device=ids.device)
            counts.scatter_add_(-1, drawn, torch.ones_like(drawn, dtype=counts.dtype))
            return CausalLMOutput(logits=counts.div_(self.samples).log_())
        if not self.top_k:
            hidden = self.base_model(ids).last_hidden_state
            return CausalLMOutput(logits=self.head(hidden), hidden_states=(hidden,))
        tokens, values = self.read("tokens", ids).long(), self.read("values", ids)
        others = self.config.vocab_size - self.top_k
        rest = -torch.expm1(values.logsumexp(dim=-1, keepdim=True).clamp(max=-1e-7))
        logits = (rest / others).log().expand(*values.shape[:-1], self.config.vocab_size)
        return CausalLMOutput(logits=logits.scatter(-1, tokens, values))

    def base_model(self, ids: torch.Tensor, **_) -> BaseModelOutput:
        """Final hidden states, shape (blocks, block_size, width), in the teacher's dtype."""
        hidden = self.read("hidden", ids).to(self.head.weight.dtype)
        return BaseModelOutput(last_hidden_state=hidden)

    def read(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        """What is kept under a name for some blocks, on their device."""
        try:
            found = [self.rows[block.tobytes()] for block in ids.cpu().numpy()]
        except KeyError:
            raise InputError(
                "the teacher's cache was made for other blocks, with samples for those of training "
                "only; make it again with cache_teacher, or ask the teacher itself"
            ) from None
        return torch.stack([shard[name][row] for shard, row in found]).to(ids.device)


def validate_inputs(teacher, blocks: Blocks, top_k: int | None, samples: int | None) -> None:
    """Refuse arguments that allow no cache."""
    require(isinstance(blocks, Blocks), f"blocks are {type_name(blocks)}; give what pack returns")
    check_blocks(teacher, blocks.train, "teacher")
    check_blocks(teacher, blocks.validation, "teacher")
    require(
        not any(hasattr(weight, "full_tensor") for weight in teacher.parameters()),
        "the teacher is sharded, and answers only if all processes ask at once, while a cache is "
        "made by each on its own; give distill the teacher itself",
    )
    known, given = teacher.config.vocab_size, {"top_k": top_k, "samples": samples}
    require(None in given.values(), f"top_k and samples are {top_k} and {samples}; give only one")
    for name, value in given.items():
        whole = value is None or is_integer(value) and value < known
        require(whole, f"{name} is {value!r}; it must be a whole number from 1 to {known - 1}")
    require(
        top_k or samples or has_linear_head(teacher, blocks.train[:1].to(teacher.device)),
        "this teacher's logits are more than its hidden states times its output weights; "
        "give top_k to keep log-probabilities instead, or samples to keep drawn tokens",
    )


def blocks_to_cache(blocks: Blocks, teacher, samples: int | None) -> list[torch.Tensor]:
    """All that `distill` asks a teacher about, in parts of the size of a shard: training
    blocks, and the validation blocks as `evaluate` reads them.

    Samples are for training only: the KL to a few drawn tokens says little of a student.
    """
    asked = [blocks.train]
    if "validation" in blocks.masks and not samples:
        asked.append(blocks.validation)
    elif not samples:
        length = window_length(blocks.validation, teacher)
        found = windows(blocks.validation, length, teacher.config.vocab_size)
        asked.append(torch.cat([window for window, _ in found]))
    return [part.contiguous() for each in asked for part in each.split(SHARD)]


def digest(weights: str, parts: list[torch.Tensor], top_k, samples) -> str:
    """A name that changes with anything that the answers, or their files, depend on."""
    shapes = [tuple(part.shape) for part in parts]
    made = hashlib.sha256(f"{weights} {top_k} {samples} {shapes}".encode())
    for part in parts:
        made.update(part.numpy().tobytes())
    return made.hexdigest()[:24]


def load_or_build(place: Path, parts: list[torch.Tensor], ask: Callable) -> list[dict]:
    """The shards of a cache, memory-mapped; those that are missing or damaged are made.

    `ask(ids, seed)` gives what is kept of some blocks.

    Raises:
        WriteError: one cannot be written, or the disk has no room for all. Those that were
            written stay.
    """
    files = [place / f"{i:06d}.safetensors" for i in range(len(parts))]
    shards = [load_tensors(file) for file in files]
    if None in shards:
        with write_errors(place):
            place.mkdir(parents=True, exist_ok=True)
            with FileLock(place / "lock"):  # one process makes them while the others wait
                shards = [load_tensors(file) for file in files]
                missing = [i for i, shard in enumerate(shards) if shard is None]
                if missing:
                    check_room(place.parent, cache_bytes([parts[i] for i in missing], ask))
                for i in tqdm(missing, unit="shard", leave=False):
                    save_tensors(files[i], ask(parts[i], seed=i))
                    shards[i] = load_tensors(files[i])
    clean_up_interrupted_writes(place)  # of killed runs: all shards are there
    return shards


def check_room(folder: Path, size: int) -> None:
    """Say what a cache takes, in bytes, and refuse it if the disk has no room."""
    room = shutil.disk_usage(folder).free
    if size > room:
        raise OSError(f"it takes {size / 1e6:,.1f} MB, and {room / 1e6:,.1f} MB are free")
    where = str(folder).replace(str(Path.home()), "~", 1)
    print(f"Caching the teacher's outputs: {size / 1e6:,.1f} MB in {where}")


def cache_bytes(parts: list[torch.Tensor], ask: Callable) -> int:
    """What is kept of some blocks takes as much a token as what is kept of one block."""
    block = parts[0][:1]
    size = sum(kept.nbytes for kept in ask(block).values())
    return size * sum(part.numel() for part in parts) // block.numel()


@torch.no_grad()
def outputs(teacher, top_k, samples, ids: torch.Tensor, seed: int = 0) -> dict[str, torch.Tensor]:
    """What is kept of a teacher's outputs for a shard of blocks."""
    generator = torch.Generator(teacher.device).manual_seed(seed)
    found = []
    with eval_mode(teacher):
        # as many at a time as in training, for the same rounding
        for part in ids.to(teacher.device).split(DistillConfig().blocks_per_pass(ids.shape[1])):
            if not (top_k or samples):
                hidden = teacher.base_model(part, use_cache=False).last_hidden_state
                found.append({"hidden": hidden.float()})
                continue
            log_p = torch.log_softmax(teacher(part, use_cache=False).logits.float(), dim=-1)
            if top_k:
                values, tokens = log_p.topk(top_k, dim=-1)
                found.append({"values": values, "tokens": tokens.int()})
            else:
                p = log_p.exp_().flatten(0, -2)
                drawn = p.multinomial(samples, replacement=True, generator=generator)
                dtype = torch.uint16 if p.shape[-1] <= 2**16 else torch.int32
                found.append({"samples": drawn.to(dtype).view(*part.shape, -1)})
    return {name: torch.cat([each[name].cpu() for each in found]) for name in found[0]}


@torch.no_grad()
def print_cache_error(teacher, cache: TeacherCache, parts: list[torch.Tensor]) -> None:
    """Print the size of a cache that is not exact, and its error on a few blocks."""
    size = f"{cache.nbytes / sum(part.numel() for part in parts):,.0f} bytes per token"
    if cache.samples:
        print(f"{size}; {cache.samples} drawn at each position, right only on average")
        return
    few = parts[0][:8].to(teacher.device)
    with eval_mode(teacher):
        error = forward_kl(cache(few).logits.float(), teacher(few).logits.float()).item()
    print(f"{size}; the error is {error:.2g} nats per token (KL)")
