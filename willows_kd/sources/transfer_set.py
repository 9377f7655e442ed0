"""Text that a model wrote to be learnt from: kept on disk, and what it is worth."""

import hashlib
import json
import warnings

import torch

from willows_kd.errors import WriteError, require, type_name
from willows_kd.evaluation import token_scores
from willows_kd.files import cache_folder, load_tensors, save_tensors
from willows_kd.generation import prompt_length, sample_continuations
from willows_kd.models import distributed_state, fingerprint


def make_transfer_set(
    model, blocks: torch.Tensor, temperature: float = 1.0, seed: int = 0, beams: int = 1
) -> torch.Tensor:
    """Blocks that a model wrote, each from the first quarter of a given one.

    They are kept in the user's cache, with writer and settings in the file's metadata, and
    found again; a damaged file is written anew. If the cache cannot be written, a warning
    says so.

    Args:
        model: the writer, such as a teacher.
        blocks: token ids, shape (blocks, block_size).
        temperature, seed, beams: as in `sample_continuations`.

    Returns:
        token ids, shape (blocks, block_size).

    Raises:
        InputError: as `sample_continuations`.
    """
    are_blocks = isinstance(blocks, torch.Tensor) and blocks.ndim == 2 and blocks.shape[1] > 1
    require(are_blocks, f"blocks are {type_name(blocks)}; give what pack returns, such as .train")
    prompts = blocks[:, : prompt_length(blocks.shape[1])].contiguous()
    made = {
        "writer": fingerprint(model),
        "prompts": hashlib.sha256(prompts.numpy().tobytes()).hexdigest(),
        **{"shape": list(blocks.shape), "temperature": temperature, "seed": seed, "beams": beams},
    }
    name = hashlib.sha256(json.dumps(made).encode()).hexdigest()[:24]
    file = cache_folder() / "texts" / f"{name}.safetensors"
    with distributed_state().local_main_process_first():
        if kept := load_tensors(file):
            written = kept["blocks"].long()
        else:
            new_tokens = blocks.shape[1] - prompts.shape[1]
            text = sample_continuations(model, prompts, new_tokens, temperature, seed, beams).cpu()
            written = torch.cat([prompts, text], dim=1)
            try:
                save_tensors(file, {"blocks": written.int()}, made)
            except WriteError as error:
                warnings.warn(f"the text is not kept for another run: {error}", stacklevel=2)
    return written


def text_quality(model, teacher, prompts: torch.Tensor, text: torch.Tensor) -> dict[str, float]:
    """What a model wrote: how likely its teacher finds it, how varied and repetitive it is.

    Args:
        model, teacher: causal language models with one vocabulary.
        prompts: token ids, shape (prompts, length).
        text: what `sample_continuations` continued them with, shape (prompts, at least 3).

    Returns:
        teacher_nll: cross-entropy of the text under the teacher, in nats per token; low
            for text that the teacher would write.
        kl_to_teacher: KL(teacher || model) on this text, in nats per token.
        distinct: share of different ones among all runs of three tokens (distinct-3, Li et
            al. 2016, section 5.3).
        repetition: share of the runs of three tokens that stand earlier in the same text.
    """
    ids, first = torch.cat([prompts.to(text.device), text], dim=1), prompts.shape[1] - 1
    teacher_nll = token_scores(teacher, None, ids)["nll"][:, first:]
    kl_to_teacher = token_scores(model, teacher, ids)["kl"][:, first:]
    runs = [list(zip(row, row[1:], row[2:], strict=False)) for row in text.tolist()]
    total = sum(map(len, runs))
    return {
        "teacher_nll": teacher_nll.double().mean().item(),
        "kl_to_teacher": kl_to_teacher.double().mean().item(),
        "distinct": len({run for row in runs for run in row}) / total,
        "repetition": sum(len(row) - len(set(row)) for row in runs) / total,
    }
