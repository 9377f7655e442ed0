"""A cache of a teacher's outputs: computed once, kept on disk, used instead of the teacher.

It keeps the final hidden states, 768 numbers per token for GPT-2, whose logits are 50,257.
The logits are these times the output weights, so soft labels at any temperature cost one
matrix product and no pass through the teacher's layers. Smaller, but not exact: the likeliest
tokens only, or tokens drawn from the teacher's distribution.
"""

import contextlib
import hashlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock
from torch import nn
from tqdm.auto import tqdm
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from willows_kd.corpus import Blocks
from willows_kd.errors import InputError, WriteError, is_integer, require, type_name
from willows_kd.evaluation import windows
from willows_kd.files import (
    atomic_directory,
    cache_folder,
    checksum,
    clean_up_interrupted_writes,
    write_errors,
)
from willows_kd.losses import forward_kl
from willows_kd.models import (
    check_positions,
    distributed_state,
    eval_mode,
    has_linear_head,
    hidden_states,
    require_model,
    weights_digest,
)

BATCH_SIZE = 8  # blocks per pass through the teacher: as in training, for the same rounding
RECORD = "cache.json"
DTYPES = ("float32", "float16")


class Kept(NamedTuple):
    """What is kept of a teacher: hidden states, or the k likeliest tokens, or k drawn ones."""

    dtype: str = "float32"
    top_k: int | None = None
    samples: int | None = None


def cache_teacher(
    teacher,
    blocks: Blocks,
    dtype: str = "float32",
    top_k: int | None = None,
    samples: int | None = None,
    folder: str | Path | None = None,
) -> nn.Module:
    """Run a teacher once over the training and validation blocks, and keep its outputs.

    The cache is found again by a digest of the teacher's weights and config, of the blocks'
    token ids and of the arguments: a stale cache is never used, and a damaged one is made
    again. It stays until its folder is deleted.

    Args:
        teacher: a causal language model.
        blocks: the blocks that training and validation will ask it about.
        dtype: of hidden states and log-probabilities: "float32", or "float16" for half the
            size; the error is then printed.
        top_k: keep the k largest log-probabilities at T = 1 instead of hidden states, and
            spread the rest evenly over the other tokens: smaller yet for a small k, but not
            exact. Works with any teacher.
        samples: keep k tokens drawn from the teacher's distribution at T = 1 instead, each
            with probability count / k (Anshumann et al. 2025, sparse logit sampling): on
            average this is the teacher's distribution, and the gradient of the forward KL at
            T = 1, for which alone it is meant, that of the teacher itself. Training blocks
            only. Works with any teacher.
        folder: where caches are kept; None for a folder in the user's cache.

    Returns:
        what `distill` and `quality` take in place of the teacher, for these blocks. If the
        folder cannot be written: the teacher itself, with a warning.

    Raises:
        InputError: an argument does not fit this teacher.
    """
    check(teacher, blocks, Kept(dtype, top_k, samples))
    kept = Kept(dtype, top_k and int(top_k), samples and int(samples))
    ids = blocks_to_cache(blocks, teacher.config.vocab_size, kept)
    folder = Path(folder) if folder else cache_folder() / "teachers"
    weights = weights_digest(teacher)
    place = folder / digest(weights, ids, kept)
    shapes = layout(teacher, ids, kept)
    with distributed_state().local_main_process_first():
        if not is_intact(place, shapes):
            nbytes = sum(np.dtype(form).itemsize * np.prod(s) for s, form in shapes.values())
            size = f"{nbytes / 1e6:,.1f} MB"
            print(f"Caching the teacher's outputs: {size} in {with_tilde(folder)}")
            try:
                write(place, teacher, ids, shapes, kept)
            except WriteError as error:
                warnings.warn(f"no cache, the teacher is asked each time: {error}", stacklevel=2)
                return teacher
    cache = TeacherCache(teacher, ids, place, shapes, kept)
    exact = kept == Kept()
    cache.digest = weights if exact else place.name  # whether it may stand in for the teacher
    if not exact:
        print_cache_error(teacher, cache, ids)
    return cache


def with_tilde(path: Path) -> str:
    """A path as a person writes it, with ~ for the home directory."""
    home = Path.home()
    return f"~/{path.relative_to(home)}" if path.is_relative_to(home) else str(path)


class TeacherCache(nn.Module):
    """Stands in for its teacher: answers from a file, for the blocks it was made for.

    It has the parts of a `transformers` model that the losses and `quality` use.

    Attributes:
        top_k, samples: the arguments of `cache_teacher`. If `samples` is not None, only the
            forward KL at T = 1 can use the answers, and only for training blocks.
    """

    def __init__(self, teacher, ids: torch.Tensor, place: Path, shapes: dict, kept: Kept):
        """Open the files in `place`, memory-mapped."""
        super().__init__()
        self.config, self.top_k, self.samples = teacher.config, kept.top_k, kept.samples
        files = {name: np.load(place / f"{name}.npy", mmap_mode="r") for name in shapes}
        self.head = teacher.get_output_embeddings()
        self.base_model = CachedHiddenStates(ids, files, self.head.weight.dtype)
        self.nbytes = sum(file.nbytes for file in files.values())

    @property
    def device(self) -> torch.device:
        """The device of the teacher's head, on which it answers."""
        return self.head.weight.device

    def get_output_embeddings(self) -> nn.Module | None:
        """The teacher's head; None if the cache holds no hidden states."""
        return None if self.top_k or self.samples else self.head

    def forward(self, ids: torch.Tensor, use_cache: bool = False) -> CausalLMOutput:
        """Logits of blocks of shape (blocks, block_size).

        Raises:
            InputError: a block is not among those that the cache was made for.
        """
        if self.samples:
            drawn = self.base_model.read("samples", ids).long()
            counts = torch.zeros(*ids.shape, self.config.vocab_size, device=ids.device)
            counts.scatter_add_(-1, drawn, torch.ones_like(drawn, dtype=counts.dtype))
            return CausalLMOutput(logits=counts.div_(self.samples).log_())
        if not self.top_k:
            return CausalLMOutput(logits=self.head(self.base_model(ids).last_hidden_state))
        tokens, values = (self.base_model.read(name, ids) for name in ("tokens", "values"))
        values = values.float()
        others = self.config.vocab_size - self.top_k
        rest = -torch.expm1(values.logsumexp(dim=-1, keepdim=True).clamp(max=-1e-7))
        logits = (rest / others).log().expand(*values.shape[:-1], self.config.vocab_size)
        return CausalLMOutput(logits=logits.scatter(-1, tokens.long(), values))


class CachedHiddenStates(nn.Module):
    """Looks up the rows of a block by its token ids."""

    def __init__(self, ids: torch.Tensor, files: dict[str, np.ndarray], dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype
        self.rows = {block.tobytes(): row for row, block in enumerate(ids.numpy())}
        self.files = files

    def forward(self, ids: torch.Tensor, use_cache: bool = False) -> BaseModelOutput:
        """Final hidden states, shape (blocks, block_size, width), in the teacher's dtype."""
        return BaseModelOutput(last_hidden_state=self.read("hidden", ids).to(self.dtype))

    def read(self, name: str, ids: torch.Tensor) -> torch.Tensor:
        """The rows of a file that belong to some blocks, on their device."""
        try:
            rows = [self.rows[block.tobytes()] for block in ids.cpu().numpy()]
        except KeyError:
            advice = "make it again with cache_teacher"
            if name == "samples":
                advice = "it holds samples of the training blocks only, so ask the teacher itself"
            raise InputError(f"the teacher's cache was made for other blocks; {advice}") from None
        return torch.from_numpy(self.files[name][rows]).to(ids.device)


def check(teacher, blocks: Blocks, kept: Kept) -> None:
    """Refuse arguments that allow no cache."""
    require_model(teacher, "teacher")
    require(isinstance(blocks, Blocks), f"blocks are {type_name(blocks)}; give what pack returns")
    check_positions(teacher, blocks.train, "teacher")
    dtype, top_k, samples = kept
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}")
    vocabulary = teacher.config.vocab_size
    require(
        top_k is None or samples is None,
        f"top_k is {top_k!r} and samples is {samples!r}; give only one of them",
    )
    require(
        samples is None or is_integer(samples),
        f"samples is {samples!r}; it must be a whole number, at least 1",
    )
    if top_k is not None and not (is_integer(top_k) and top_k < vocabulary):
        raise InputError(
            f"top_k is {top_k!r}; it must be a whole number from 1 to {vocabulary - 1}"
        )
    require(
        top_k or samples or has_linear_head(teacher, blocks.train[:1].to(teacher.device)),
        "this teacher's logits are more than its hidden states times its output weights; "
        "give top_k to keep log-probabilities instead, or samples to keep drawn tokens",
    )


def blocks_to_cache(blocks: Blocks, vocabulary: int, kept: Kept) -> torch.Tensor:
    """All that `distill` asks a teacher about: training blocks, windows of validation blocks.

    Samples are for training only: the KL to a few drawn tokens says little of a student.
    """
    if kept.samples:
        return blocks.train.contiguous()
    seen = [window for window, _ in windows(blocks.validation, vocabulary)]
    return torch.cat([blocks.train, *seen]).contiguous()


def digest(weights: str, ids: torch.Tensor, kept: Kept) -> str:
    """A name that changes with anything that the answers depend on."""
    parts = [weights, kept.dtype, kept.top_k, tuple(ids.shape)]
    parts += [kept.samples] if kept.samples else []  # not None: older caches keep their names
    made = hashlib.sha256(json.dumps(parts).encode())
    made.update(ids.numpy().tobytes())
    return made.hexdigest()[:24]


def layout(teacher, ids: torch.Tensor, kept: Kept) -> dict:
    """The files of a cache: the shape and dtype of each, by name."""
    dtype, top_k, samples = kept
    if samples:  # in the fewest bytes that hold a token id
        smallest = np.min_scalar_type(teacher.config.vocab_size - 1)
        return {"samples": ((*ids.shape, samples), smallest)}
    if top_k:
        shape = *ids.shape, top_k
        return {"values": (shape, dtype), "tokens": (shape, "int32")}
    return {"hidden": ((*ids.shape, teacher.get_output_embeddings().in_features), dtype)}


def is_intact(place: Path, shapes: dict) -> bool:
    """Whether a cache exists, is complete, and is as it was written."""
    try:
        sums = json.loads((place / RECORD).read_text())["checksums"]
        for name, (shape, dtype) in shapes.items():
            file = np.load(place / f"{name}.npy", mmap_mode="r")
            if file.shape != shape or file.dtype != dtype or checksum({name: file}) != sums[name]:
                return False
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return True


def write(place: Path, teacher, ids: torch.Tensor, shapes: dict, kept: Kept) -> None:
    """Ask the teacher, and write a cache, whole or not at all.

    It waits for another run that is writing the same cache, and removes what a killed one
    left.

    Raises:
        WriteError: the place cannot be written.
    """
    lock = place.with_name(f".{place.name}.lock")
    with write_errors(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(lock):
            try:
                clean_up_interrupted_writes(place)
                if not is_intact(place, shapes):
                    fill(place, teacher, ids, shapes, kept)
            finally:
                with contextlib.suppress(OSError):  # Windows keeps a file that is open
                    lock.unlink()


def fill(place: Path, teacher, ids: torch.Tensor, shapes: dict, kept: Kept) -> None:
    """Write the teacher's outputs, a few blocks at a time."""
    with atomic_directory(place) as partial:
        files = {
            name: np.lib.format.open_memmap(partial / f"{name}.npy", "w+", dtype, shape)
            for name, (shape, dtype) in shapes.items()
        }
        starts = tqdm(range(0, len(ids), BATCH_SIZE), unit="pass", leave=False)
        outputs = teacher_outputs(teacher, ids, kept)
        for start, output in zip(starts, outputs, strict=True):
            for name, tensor in output.items():
                files[name][start : start + len(tensor)] = tensor.cpu().numpy()
        record = kept._asdict() | {"tokens": ids.numel()}
        record["checksums"] = {name: checksum({name: file}) for name, file in files.items()}
        while files:  # close them: Windows moves no folder whose files are open
            files.popitem()[1].flush()
        (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n")


@torch.no_grad()
def teacher_outputs(teacher, ids: torch.Tensor, kept: Kept) -> Iterator[dict[str, torch.Tensor]]:
    """A teacher's outputs for the blocks, a few blocks at a time."""
    generator = torch.Generator(teacher.device).manual_seed(0)
    with eval_mode(teacher):
        for part in ids.split(BATCH_SIZE):
            part = part.to(teacher.device)
            if not (kept.top_k or kept.samples):
                yield {"hidden": hidden_states(teacher, part).float()}
                continue
            log_p = torch.log_softmax(teacher(part, use_cache=False).logits.float(), dim=-1)
            if kept.top_k:
                values, tokens = log_p.topk(kept.top_k, dim=-1)
                yield {"values": values, "tokens": tokens.int()}
            else:
                p = log_p.exp_().flatten(0, -2)
                drawn = p.multinomial(kept.samples, replacement=True, generator=generator)
                yield {"samples": drawn.view(*part.shape, -1)}


@torch.no_grad()
def print_cache_error(teacher, cache: TeacherCache, ids: torch.Tensor) -> None:
    """Print the size of a cache that is not exact, and its error on a few blocks."""
    size = f"{cache.nbytes / ids.numel():,.0f} bytes per token"
    if cache.samples:
        print(f"{size}; {cache.samples} drawn at each position, right only on average")
        return
    few = ids[:: max(1, len(ids) // 8)][:8].to(teacher.device)
    with eval_mode(teacher):
        error = forward_kl(cache(few).logits.float(), teacher(few).logits.float()).item()
    print(f"{size}; the error is {error:.2g} nats per token (KL)")
