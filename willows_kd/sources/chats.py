"""Chats as tokens, with a mask of those that are answers: only these are to be learnt."""

from array import array
from collections.abc import Iterable

import numpy as np
import torch

from willows_kd.corpus import encode, first_token
from willows_kd.errors import InputError, one_line, require

NO_CHATS = "take the tokenizer of a model for chats, or give rows with prompt and completion"


def tokenize_chats(
    rows: Iterable[dict], tokenizer, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The token ids of some chats and which of them are answers, each of shape (tokens,).

    Every chat is filled up to a multiple of `width` tokens, with end-of-text tokens that
    are no answers.
    """
    first = first_token(tokenizer)
    tokens, is_answer = array("q"), array("b")
    for row in rows:
        begin = len(tokens)
        for text, answers in turns_of(row, tokenizer):
            ids = encode(text, tokenizer)
            if len(tokens) == begin and ids[:1] == [first]:  # a template's own
                ids = ids[1:]
            tokens.extend(ids)
            is_answer.extend([answers] * len(ids))
        missing = -len(tokens) % width
        tokens.extend([tokenizer.eos_token_id or 0] * missing)
        is_answer.extend([False] * missing)
    return torch.from_numpy(np.asarray(tokens)), torch.from_numpy(np.asarray(is_answer)) > 0


def turns_of(row: dict, tokenizer) -> list[tuple[str, bool]]:
    """A chat in pieces, each with whether it is an answer; an answer ends with its end mark."""
    if "messages" not in row:
        answer = row["completion"] + (tokenizer.eos_token or "")
        return [(row["prompt"] or "", False), (answer, True)]
    # a table has every key in every row
    messages = [{k: v for k, v in m.items() if v is not None} for m in row["messages"]]
    pieces, seen = [], ""
    for number, message in enumerate(messages):
        if message.get("role") == "assistant":
            asked = form(messages[:number], tokenizer, add_generation_prompt=True)
            answered = form(messages[: number + 1], tokenizer).rstrip()
            require(
                asked.startswith(seen) and answered.startswith(asked),
                f"the tokenizer's chat template rewrites a chat once it is answered; {NO_CHATS}",
            )
            pieces += [(asked[len(seen) :], False), (answered[len(asked) :], True)]
            seen = answered
    require(bool(pieces), "a row of messages has no answer, a message of the role 'assistant'")
    return pieces


def form(messages: list[dict], tokenizer, **settings) -> str:
    """Messages as one text, by the tokenizer's chat template."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **settings)
    except Exception as error:  # what a template raises is its author's choice
        refused = f"the tokenizer's chat template refuses a row ({one_line(error)}); {NO_CHATS}"
        raise InputError(refused) from error
