"""What distillation bought and what it cost, measured on text that nobody trained on."""

import math
import os
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn

from willows_kd.config import LONGEST_BLOCK
from willows_kd.corpus import Blocks
from willows_kd.cost import latency, peak_memory, size_on_disk
from willows_kd.errors import require, type_name
from willows_kd.losses import kl
from willows_kd.models import (
    check_positions,
    check_token_ids,
    common_vocabulary,
    eval_mode,
    max_positions,
    require_model,
    vocabulary_size,
)

LOGITS_AT_ONCE = 2**24  # elements: 64 MiB of float32, so that a real vocabulary fits a laptop


def evaluate(
    model, blocks: torch.Tensor, tokenizer=None, teacher=None, mask: torch.Tensor | None = None
) -> dict[str, float]:
    """How well a model predicts held-out text, and how like its teacher.

    The blocks are read as one stream in windows as long as the models' positions allow, at
    most 1,024, whatever the length of a block is: a model may be good only as far as it was
    trained. The windows overlap by half, so that every token but the first is predicted once,
    and all but those of the first window with at least half a window of context.

    Args:
        model: a causal language model.
        blocks: held-out token ids, shape (blocks, block_size).
        tokenizer: for bits per byte, which is comparable across tokenizers.
        teacher: for the divergence and agreement.
        mask: True for each token that counts, shape (blocks, block_size), as in
            `Blocks.masks`. Each block is then read by itself.

    Returns:
        perplexity: exp of the mean cross-entropy in nats per token.
        bits_per_byte: the same entropy, by byte of text.
        calibration_error: mean gap of confidence and accuracy of the first choice
            over 15 equal bins (Guo et al. 2017, equation 3).
        kl_to_teacher: KL(teacher || model) in nats per token, at T = 1.
        agreement: share of tokens where both have the same first choice.
    """
    check_blocks(model, blocks, "model")
    if teacher is not None:
        check_blocks(teacher, blocks, "teacher")
    vocabulary = vocabulary_size(model)
    if mask is None:
        parts = windows(blocks, window_length(blocks, model, teacher), vocabulary)
    else:
        parts = at_once(blocks, mask, vocabulary=vocabulary)
    counted: list[torch.Tensor] = []
    per_token: dict[str, list[torch.Tensor]] = {}
    for window, scored in parts:
        counted.append(window[:, 1:][scored[:, 1:]])
        for name, values in token_scores(model, teacher, window.to(model.device)).items():
            per_token.setdefault(name, []).append(values.cpu()[scored[:, 1:]])
    found = {name: torch.cat(values).double() for name, values in per_token.items()}
    result = {"perplexity": found["nll"].mean().exp().item()}
    if tokenizer is not None:
        text = tokenizer.decode(torch.cat(counted).tolist(), skip_special_tokens=True)
        bits = found["nll"].sum().item() / math.log(2)
        result["bits_per_byte"] = bits / len(text.encode())
    result["calibration_error"] = calibration_error(found["confidence"], found["correct"])
    if teacher is not None:
        result["kl_to_teacher"] = found["kl"].mean().item()
        result["agreement"] = found["agreement"].mean().item()
    return result


def loss_by_position(model, blocks: torch.Tensor) -> torch.Tensor:
    """The cross-entropy at each position of a window, averaged over windows.

    The blocks are read as one stream in windows as long as the model's positions allow, at
    most 1,024, that begin an eighth of that length apart. More context helps, so the loss
    falls from left to right. If it rises, the model was not trained so far.

    Returns:
        nats per token, shape (window length - 1,): element i is the loss of token i + 1.
    """
    check_blocks(model, blocks, "model")
    length = window_length(blocks, model)
    stream, first = one_stream(blocks)
    rows = stream.unfold(0, length - len(first), max(1, length // 8))
    return nll_of_rows(model, torch.cat([first.expand(len(rows), -1), rows], dim=1)).mean(dim=0)


def copy_gain(model, ids: torch.Tensor) -> float:
    """What an earlier copy of a text is worth to a model.

    The same tokens at the same positions are predicted twice: after other text, and after
    themselves. A model that can copy finds them easier the second time; induction heads do
    it (Olsson et al. 2022).

    Args:
        model: a causal language model.
        ids: token ids, shape (rows, 2 * span). The second half of each row is predicted, after
            the first half and after itself; without its first token, before which nothing
            says that a copy begins.

    Returns:
        nats per token: the loss after other text minus the loss after the copy.
    """
    check_blocks(model, ids, "model")
    span = ids.shape[1] // 2
    other, text = ids[:, :span], ids[:, -span:]

    def loss(before: torch.Tensor) -> float:
        return nll_of_rows(model, torch.cat([before, text], dim=1))[:, span:].mean().item()

    return loss(other) - loss(text)


def check_blocks(model, blocks: torch.Tensor, name: str) -> None:
    """Require blocks of token ids that a model knows, no longer than it can read."""
    require_model(model, name)
    require(
        isinstance(blocks, torch.Tensor) and blocks.ndim == 2 and blocks[:, 1:].numel() > 0,
        f"blocks are {type_name(blocks)}; give token ids of shape (blocks, block_size), at least "
        "one block of two tokens, such as Blocks.test",
    )
    check_token_ids(blocks, model, name)
    check_positions(model, blocks, name)


def one_stream(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The blocks in a row, and the token that a tokenizer puts before each text, if it does.

    Every block then begins with it: it is taken out of the row, shape (tokens,), and stands by
    itself, shape (1,) or, if there is none, (0,).
    """
    if len(blocks) > 1 and (blocks[:, 0] == blocks[0, 0]).all():
        return blocks[:, 1:].flatten(), blocks[0, :1]
    return blocks.flatten(), blocks[0, :0]


def window_length(blocks: torch.Tensor, *models) -> int:
    """Tokens of a window: the models' positions, at most 1,024, and no more than there are."""
    positions = [max_positions(model.config) for model in models if model is not None]
    tokens = sum(map(len, one_stream(blocks)))
    return min([LONGEST_BLOCK, tokens, *(p for p in positions if p is not None)])


def at_once(*tensors: torch.Tensor, vocabulary: int):
    """Tensors of shape (windows, length) in parts of which the logits fit in memory."""
    many = max(1, LOGITS_AT_ONCE // (tensors[0].shape[1] * vocabulary))
    return zip(*(tensor.split(many) for tensor in tensors), strict=True)


def windows(blocks: torch.Tensor, length: int, vocabulary: int):
    """Overlapping windows of so many tokens over the blocks read as one stream, several at a time.

    Returns:
        pairs of token ids, shape (windows, length), and a mask of the same shape that is
        True where a token is to be scored: each token of the stream that has one before it
        is scored in exactly one window.
    """
    stream, first = one_stream(blocks)
    length -= len(first)
    starts = list(range(0, len(stream) - length + 1, max(1, length // 2)))
    if starts[-1] + length < len(stream):
        starts.append(len(stream) - length)
    scored_up_to = [1 - len(first), *(start + length for start in starts[:-1])]
    positions = torch.tensor(starts)[:, None] + torch.arange(length)
    scored = positions >= torch.tensor(scored_up_to)[:, None]
    before = first.expand(len(starts), -1)
    ids = torch.cat([before, stream[positions]], dim=1)
    scored = torch.cat([torch.zeros_like(before, dtype=torch.bool), scored], dim=1)
    return at_once(ids, scored, vocabulary=vocabulary)


@torch.inference_mode()
def token_scores(model, teacher, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each prediction of tokens 1... is worth, each of shape (windows, block_size - 1)."""
    with eval_mode(model, teacher):
        logits = model(ids, use_cache=False).logits[:, :-1].float()
        if teacher is not None:  # which may be on another device
            teacher_logits = teacher(ids.to(teacher.device), use_cache=False).logits[:, :-1]
    labels = ids[:, 1:]
    vocabulary = logits.shape[-1] if teacher is None else common_vocabulary(teacher, model)
    log_q = F.log_softmax(logits[..., :vocabulary], dim=-1)
    confidence, choice = log_q.max(dim=-1)
    result = {
        "nll": -log_q.gather(-1, labels[..., None]).squeeze(-1),
        "confidence": confidence.exp(),
        "correct": choice == labels,
    }
    if teacher is not None:
        teacher_logits = teacher_logits[..., :vocabulary].to(ids.device)
        log_p = F.log_softmax(teacher_logits.float(), dim=-1)
        result["kl"] = kl(log_p, log_q)
        result["agreement"] = log_p.argmax(dim=-1) == choice
    return result


def block_nll(model, blocks: torch.Tensor) -> torch.Tensor:
    """The mean cross-entropy of each block by itself, in nats per token, shape (blocks,).

    Unlike in `evaluate`, no block sees the one before it: the blocks are then separate
    measurements, which `paired_bootstrap` can draw from.

    Args:
        model: a causal language model.
        blocks: token ids, shape (blocks, block_size).
    """
    check_blocks(model, blocks, "model")
    return nll_of_rows(model, blocks).mean(dim=1)


def nll_of_rows(model, rows: torch.Tensor) -> torch.Tensor:
    """The cross-entropy of each prediction of rows read by themselves, (rows, length - 1)."""
    parts = at_once(rows, vocabulary=vocabulary_size(model))
    scores = [token_scores(model, None, part.to(model.device)) for (part,) in parts]
    return torch.cat([score["nll"].double().cpu() for score in scores])


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """By how much two models differ on the same blocks, and how sure that is.

    The blocks are drawn again, as many, with replacement, and the mean difference is
    taken each time: its 2.5 and 97.5 % quantiles are the interval (Efron 1979). Both
    models are scored on the same draw, so that a hard block counts against both (as
    Koehn 2004 compares translations). The interval is for other text of the same
    kind; it says nothing of other seeds.

    Args:
        a, b: a value for each block, such as from `block_nll`, in the same order.
        resamples: how many times to draw.
        seed: for the draws.

    Returns:
        the mean of a - b, and the lower and upper end of its 95 % interval.
    """
    first, second = (np.asarray(each, dtype=np.float64) for each in (a, b))
    require(
        first.shape == second.shape and first.ndim == 1 and len(first),
        f"a and b have shapes {first.shape} and {second.shape}; give one number a block, for both",
    )
    differences = first - second
    draw = np.random.default_rng(seed).integers
    size = len(differences)
    means = [differences[draw(size, size=size)].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [0.025, 0.975])
    return differences.mean().item(), low.item(), high.item()


def calibration_error(confidence: torch.Tensor, correct: torch.Tensor, bins: int = 15) -> float:
    """Expected calibration error of predictions, both arguments of shape (tokens,)."""
    which = (confidence * bins).ceil().clamp(1, bins).long() - 1
    gaps = torch.zeros(bins, dtype=torch.float64)
    gaps.index_add_(0, which, confidence.double() - correct.double())
    return (gaps.abs().sum() / len(confidence)).item()


# -- one table -------------------------------------------------------------------------

LABELS = {
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
    "kl_to_teacher": "KL from the teacher (nats per token)",
    "agreement": "top-1 agreement with the teacher",
    "calibration_error": "expected calibration error",
    "parameters": "parameters",
    "disk_mb": "size on disk (MB)",
    "memory_mb": "peak memory of a forward pass (MB)",
    "forward_ms": "forward pass of one block (ms)",
    "token_ms": "generating a token (ms)",
}


def compare(
    models: dict[str, nn.Module],
    blocks: Blocks,
    tokenizer,
    texts: Mapping[str, torch.Tensor] = {},
) -> pd.DataFrame:
    """One row a model: how good on the test text, how large, how fast, on this machine.

    Args:
        models: by name; the first one is the teacher that all are compared with.
        blocks: the packed corpus.
        tokenizer: the one that packed it.
        texts: other held-out text by name, token ids of shape (blocks, block_size). Each adds
            a column, "perplexity on NAME".
    """
    by_name = isinstance(models, dict) and models
    require(by_name, f"models are {type_name(models)}; give at least one in a dict, by name")
    for name, model in models.items():
        for ids in (blocks.test, *texts.values()):
            check_blocks(model, ids, name)
    teacher = next(iter(models.values()))
    speed = latency(models, blocks.test[:1])
    rows = {}
    for name, model in models.items():
        rows[name] = {
            "parameters": model.num_parameters(),
            "disk_mb": size_on_disk(model) / 1e6,
            "memory_mb": peak_memory(model, blocks.test[:1]) / 1e6,
            "forward_ms": speed[name]["forward"] * 1e3,
            "token_ms": speed[name]["per_token"] * 1e3,
            **evaluate(model, blocks.test, tokenizer, teacher, blocks.masks.get("test")),
            **{
                f"perplexity on {text}": evaluate(model, ids, teacher=teacher)["perplexity"]
                for text, ids in texts.items()
            },
        }
    table = pd.DataFrame.from_dict(rows, orient="index")
    table.attrs["threads"] = torch.get_num_threads()
    table.attrs["machine"] = f"{os.cpu_count()} cores, device {teacher.device}"
    return table


def as_markdown(table: pd.DataFrame) -> str:
    """A table from `compare` for a terminal, a model card or a README: one column a model."""
    lines = [["", *map(str, table.index)]]
    labels = LABELS | {column: str(column) for column in table if column not in LABELS}
    for column, label in labels.items():
        if column in table:
            count = column == "parameters"
            lines.append([label, *(number(value, count) for value in table[column])])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = ([cell.ljust(w) for cell, w in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def number(value: float, count: bool = False) -> str:
    """A number with the digits that matter: 0.532, 9.14, 67.3, 1,254; of a count 4.61 M."""
    size = abs(value)
    if math.isnan(value):
        return "-"
    if count and size >= 1e5:
        return f"{value / 1e6:,.2f} M"
    return f"{value:,.{0 if size >= 1000 else 1 if size >= 10 else 2 if size >= 1 else 3}f}"
