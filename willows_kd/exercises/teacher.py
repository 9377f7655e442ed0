"""Checks for notebook 01: parameters from a config, a guesser that counts, bits per byte."""

import math
from collections.abc import Callable

import torch
from transformers import GPT2Config

from willows_kd.exercises import judge

LOG_2 = math.log(2)  # nats of a bit

MISCOUNTED = {  # the hint: what goes wrong in `count`
    "one layer is counted; there are config.n_layer of them": {"layers": 1},
    "the head is counted too; it is the table of tokens, used again": {"head": 1},
    "the table of tokens is missing: one row of the width for each": {"tokens": 0},
    "the table of positions is missing: one row of the width for each": {"positions": 0},
    "the weights of the MLP are missing: 4 width² in and out": {"mlp": 0},
    "the weights of query, key and value are missing": {"qkv": 0},
    "the weight of what leaves attention is missing: width × width": {"out": 0},
    "the biases are missing: 9 times the width in each layer": {"biases": 0},
    "the layer norms of the layers are missing: two in each": {"norms": 0},
    "the layer norm after the last layer is missing: 2 × width": {"last_norm": 0},
}


def count(config: GPT2Config, layers: int | None = None, head: int = 0, **times: int) -> int:
    """The parameters of a GPT-2: each part as often as `times` says, once if it says nothing."""
    width, layers = config.n_embd, layers or config.n_layer
    parts = {
        "tokens": config.vocab_size * width,
        "positions": config.n_positions * width,
        "mlp": 8 * width**2 * layers,
        "qkv": 3 * width**2 * layers,
        "out": width**2 * layers,
        "biases": 9 * width * layers,
        "norms": 4 * width * layers,
        "last_norm": 2 * width,
    }
    return head * parts["tokens"] + sum(times.get(name, 1) * n for name, n in parts.items())


def check_count(my_count: Callable) -> bool:
    """Check `my_count(config)`: the parameters of a GPT-2 with that `GPT2Config`."""
    names = "vocab_size", "n_positions", "n_embd", "n_layer"
    shapes = (2003, 53, 40, 3), (2011, 71, 28, 5)  # such that no two mistakes are alike
    rest = {"n_head": 2, "bos_token_id": None, "eos_token_id": None}
    cases = [(GPT2Config(**dict(zip(names, shape, strict=True)), **rest),) for shape in shapes]
    praise = "every parameter of two more GPT-2s is accounted for"
    return judge(my_count, cases, count, MISCOUNTED, praise, most=len(MISCOUNTED), tolerance=0)


def check_guesser(my_perplexity: Callable) -> bool:
    """Check `my_perplexity(train, test, vocabulary)`: token ids in, a perplexity out.

    The guesser gives token t the probability (count of t in train + 1) / (tokens in
    train + vocabulary), whatever stands before it.
    """
    train = torch.tensor([[0, 0, 0, 0, 1, 1], [2, 2, 0, 3, 3, 0]])
    test = torch.tensor([[0, 1, 4, 0], [3, 0, 2, 2]])

    def right(train, test, vocabulary, texts=lambda train, test: (train, test), power=math.exp):
        counted, read = texts(train, test)
        counts = torch.bincount(counted.flatten(), minlength=vocabulary).double() + 1
        return power(-(counts / counts.sum())[read].log().mean().item())

    mistakes = {
        "that is the perplexity of a guesser that knows nothing: the vocabulary. Count the tokens "
        "of the training text": lambda train, test, v: v,
        "you count in the test text; count in the training text": {"texts": lambda a, b: (b, b)},
        "that is the mean surprise in nats. Take exp of it": {"power": float},
        "the logarithm is to base 2 and exp to base e": {"power": lambda x: math.exp(x / LOG_2)},
        "the logarithm is natural and the power is of 2": {"power": lambda x: 2**x},
        "the sign is lost: a surprise is minus the logarithm": {"power": lambda x: math.exp(-x)},
        "you test on the training text. Take `test`": {"texts": lambda a, b: (a, a)},
        "you take exp of the sum. A perplexity is exp of the mean": {
            "power": lambda x: math.exp(8 * x)
        },
        "your probabilities sum to more than 1: if every count has one more, the total has "
        "`vocabulary` more": {"power": lambda x: math.exp(x) * 12 / 18},
        "a token of the test is not in the training text. Add 1 to every count": {
            "power": lambda x: math.inf
        },
    }
    praise = "it counts in one text and is tested on another"
    return judge(my_perplexity, [(train, test, 6)], right, mistakes, praise)


def check_bits(my_bits: Callable) -> bool:
    """Check `my_bits(nats, text)`: the surprise of each token in, bits per byte out."""
    text = "“Tea?” said the Mole—and there was tea."
    nats = torch.tensor([2.1, 0.4, 3.3, 1.2, 0.7, 5.9, 2.8, 0.1, 1.6, 2.2, 0.9])

    def right(nats, text, by=lambda nats, text: len(text.encode()), unit=1 / LOG_2) -> float:
        return nats.sum().item() * unit / by(nats, text)

    mistakes = {
        "you divide by characters: some have three bytes. Take len(text.encode())": {
            "by": lambda nats, text: len(text)
        },
        "you divide by the number of tokens. Another tokenizer makes other tokens; bytes are the "
        "same for all: len(text.encode())": {"by": lambda nats, text: len(nats)},
        "that is for the whole text. Divide by its bytes": {"by": lambda nats, text: 1},
        "that is in nats. One bit is log 2 nats: divide by it": {"unit": 1},
        "there are more bits than nats. Divide by math.log(2)": {"unit": LOG_2},
    }
    return judge(my_bits, [(nats, text)], right, mistakes, "a number to compare any models by")
