"""The text to learn from: what is held out of it, and its blocks of tokens."""

import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

from willows_kd.config import LONGEST_BLOCK
from willows_kd.errors import is_integer, require, type_name
from willows_kd.texts import WILLOWS, Corpus

# -- splits ----------------------------------------------------------------------------

BETWEEN_TEXTS = "\n\n\n"  # one line end more than between paragraphs


@dataclass(frozen=True)
class Splits:
    """The texts to train on, to choose by, and to test on once."""

    train: Sequence
    validation: Sequence
    test: Sequence


def split(corpus: Corpus) -> Splits:
    """Hold out the end of a text, never shuffled lines.

    *The Wind in the Willows*: chapters I-X train, XI validates, XII tests. Any other text:
    the last tenth tests and the tenth before validates, cut where a paragraph ends, or, in
    one longer than a tenth of the text, a word. A table is cut between rows.
    """
    texts = corpus.texts
    if corpus.title == WILLOWS and len(texts) == 12:
        return Splits(list(texts[:10]), list(texts[10:11]), list(texts[11:]))
    if corpus.in_rows:
        tenth = max(1, len(texts) // 10)
        validation, test = max(0, len(texts) - 2 * tenth), len(texts) - tenth
        return Splits(texts[:validation], texts[validation:test], texts[test:])
    whole = BETWEEN_TEXTS.join(texts)
    ends = [0, place_of(whole, 0.8), place_of(whole, 0.9), len(whole)]
    parts = (whole[start:end].split(BETWEEN_TEXTS) for start, end in pairwise(ends))
    return Splits(*([text.strip() for text in part if text.strip()] for part in parts))


def place_of(text: str, share: float) -> int:
    """The end of the paragraph nearest to a share of a text, or of a word in a long paragraph."""
    at = int(share * len(text))
    before, end = text.rfind("\n\n", 0, at + 2), text.find("\n\n", at)
    start, end = 0 if before < 0 else before + 2, len(text) if end < 0 else end
    if end - start > len(text) / 10:
        space = max(text.rfind(" ", start, at + 1), text.rfind("\n", start, at + 1))
        return space if space > start else at
    return start if at - start <= end - at else end


# -- blocks ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Blocks:
    """A corpus as tensors of token ids, each of shape (blocks, block_size).

    Attributes:
        train: int64 tensor, to learn from.
        validation: int64 tensor, to choose by.
        test: int64 tensor, to look at once.
        remainder: for each split, the tokens at its end that fill no block.
        masks: for a split of chats, a bool tensor of its shape, True where a token is part
            of an answer: only these are targets. Without an entry, all tokens are.
        first_token: the token that begins every block, of a tokenizer that begins every
            text so; else None.
    """

    train: torch.Tensor
    validation: torch.Tensor
    test: torch.Tensor
    remainder: dict[str, int]
    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    first_token: int | None = None

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self.train.shape[1]


def pack(corpus: Corpus, tokenizer, block_size: int | None = None) -> Blocks:
    """Tokenize a corpus once and cut each split into blocks of `block_size` tokens.

    Texts follow each other in a block, the tokenizer's end-of-text token between them, so
    that a row of a table sees its neighbours. Every token is kept in order, but for the few
    at a split's end that do not fill a block: their number is in `Blocks.remainder`. A chat
    has blocks of its own, filled up with tokens that are no targets; the targets are the
    tokens of its answers. If the tokenizer begins a text with a certain token, as Llama's
    and Gemma's do, every block begins with it.

    Args:
        corpus: what `load_corpus` returns.
        tokenizer: the teacher's.
        block_size: at least 2; by default the model's positions, at most 1,024.

    Raises:
        InputError: a split is too short for one block; or there are chats with `messages`,
            and the tokenizer has no chat template or one that cannot be used.
    """
    given = type_name(corpus)
    require(isinstance(corpus, Corpus), f"corpus is {given}; give what load_corpus returns")
    if block_size is None:
        block_size = min(tokenizer.model_max_length, LONGEST_BLOCK)
    fits = is_integer(block_size, 2)
    require(fits, f"block_size is {block_size!r}; a block needs a whole number, at least 2 tokens")
    first = first_token(tokenizer)
    width = int(block_size) - (first is not None)  # tokens of the text in a block
    tensors, masks, remainder = {}, {}, {}
    for name, texts in vars(split(corpus)).items():
        if corpus.tokenize:
            tokens, counts = corpus.tokenize(texts, tokenizer, width)
            masks[name] = in_blocks(counts, width, None if first is None else False)
        else:
            tokens = tokenize(texts, tokenizer)
        require(
            len(tokens) >= width,
            f"{corpus.provenance} is too short: its {name} part holds {len(tokens)} tokens, "
            f"less than one block of {block_size}; give a longer text or a smaller block size",
        )
        remainder[name] = len(tokens) % width
        tensors[name] = in_blocks(tokens, width, first)
    return Blocks(**tensors, remainder=remainder, masks=masks, first_token=first)


def first_token(tokenizer) -> int | None:
    """The token that a tokenizer puts before each text; None if it puts none."""
    ids, plain = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (True, False))
    return ids[0] if ids[:1] != plain[:1] else None


def in_blocks(tokens: torch.Tensor, width: int, first: int | None) -> torch.Tensor:
    """A row of tokens cut into blocks of so many, each with the first token before it."""
    blocks = tokens[: len(tokens) // width * width].view(-1, width)
    return blocks if first is None else torch.nn.functional.pad(blocks, (1, 0), value=first)


# A tokenizer's memory grows with the longest text, so it gets pieces of 100,000 characters. Each
# but the first begins with white space, as the words of a byte-level BPE do: its tokens are those
# of the whole.
PIECE = re.compile(r".{1,100000}(?:\Z|(?<=\S)(?=\s))|.{1,100000}", re.DOTALL)


def tokenize(texts: Iterable[str], tokenizer) -> torch.Tensor:
    """The token ids of some texts in a row, an end-of-text token between them, shape (tokens,)."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens = array("q")  # int64, of a quarter of the memory that a list takes
    for text in texts:
        for piece in PIECE.finditer(text):
            tokens.extend(encode(piece[0], tokenizer))
        tokens.extend(end)
    return torch.from_numpy(np.asarray(tokens)[: len(tokens) - len(end)])


def encode(text: str, tokenizer) -> list[int]:
    """The token ids of a text and nothing before or after them."""
    # verbose=False: a text longer than the model's context is what we are here to cut
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
