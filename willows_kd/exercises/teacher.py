"""Checks for notebook 01: parameters from a config, a guesser that counts, bits per byte."""

import math
from collections.abc import Callable
from functools import partial

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from willows_kd.exercises import attempt, judge, not_yet

LOG_2 = math.log(2)  # nats of a bit


def count(config: GPT2Config) -> int:
    """The parameters of the GPT-2 that transformers builds; here they take no memory."""
    with torch.device("meta"):
        return GPT2LMHeadModel(config).num_parameters()


def check_count(my_count: Callable) -> bool:
    """Check `my_count(config)`: the parameters of a GPT-2 with that `GPT2Config`.

    Asked is what one more token, position or layer adds: at a width of 100 its digits tell
    which part is missing.
    """
    sizes = {"vocab_size": 90, "n_positions": 30, "n_layer": 3}
    gpt2 = partial(GPT2Config, n_embd=100, n_head=2, bos_token_id=None, eos_token_id=None)
    config = gpt2(**sizes)
    counted = attempt(my_count, (config,))
    if isinstance(counted, str):
        return not_yet(counted)
    for name, size in sizes.items():
        larger = gpt2(**sizes | {name: size + 1})
        mine, right = attempt(my_count, (larger,)) - counted, count(larger) - count(config)
        if mine.ndim == 0 and mine != right:
            return not_yet(f"if n_embd is 100, one more {name} adds {mine:,.0f}, not {right:,}")
    mistakes = {"the last layer norm is missing: 2 × width": lambda c: count(c) - 2 * c.n_embd}
    praise = "every parameter of four more GPT-2s is accounted for"
    return judge(my_count, count, mistakes, praise, (config,), tolerance=0)


def check_guesser(my_guesser: Callable) -> bool:
    """Check `my_guesser(train, test, vocabulary)`: the perplexity of a guesser that counts."""
    train = torch.tensor([[0, 0, 0, 0, 1, 1], [2, 2, 0, 3, 3, 0]])
    test = torch.tensor([[0, 1, 4, 0], [3, 0, 2, 2]])

    def right(train, test, vocabulary, more=1) -> float:
        counts = torch.bincount(train.flatten(), minlength=vocabulary).double() + 1
        return (counts / (train.numel() + more * vocabulary))[test].log().mean().neg().exp().item()

    mistakes = {
        "it knows nothing yet: count the tokens of `train`": lambda train, test, v: v,
        "that is the mean surprise in nats: take exp of it": lambda *case: math.log(right(*case)),
        "counts grow by 1, so the total by `vocabulary`": lambda *case: right(*case, more=0),
        "a token of `test` is not in `train`: add 1 to every count": lambda *_: math.inf,
    }
    praise = "it counts in one text and is tested on another"
    return judge(my_guesser, right, mistakes, praise, (train, test, 6))


def check_bits(my_bits: Callable) -> bool:
    """Check `my_bits(nats, text)`: the surprise of each token in, bits per byte out."""
    text = "“Tea?” said the Mole—and there was tea."
    nats = torch.tensor([2.1, 0.4, 3.3, 1.2, 0.7, 5.9, 2.8, 0.1, 1.6, 2.2, 0.9])

    def right(nats, text, parts=None, unit=LOG_2) -> float:
        return nats.sum().item() / unit / (parts or len(text.encode()))

    mistakes = {
        "that is nats per token; wanted are bits per byte": lambda n, t: right(n, t, len(n), 1),
        "you divide by tokens; take len(text.encode())": lambda n, t: right(n, t, len(n)),
        "some characters have three bytes: text.encode()": lambda n, t: right(n, t, len(t)),
        "that is in nats; a bit is log 2 nats: divide by it": lambda n, t: right(n, t, unit=1),
    }
    return judge(my_bits, right, mistakes, "a number to compare any models by", (nats, text))
