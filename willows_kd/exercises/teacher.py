"""Checks for notebook 01: parameters from a config, a guesser that counts, bits per byte."""

import math
from collections.abc import Callable

import torch
from transformers import GPT2Config

from willows_kd.exercises import judge, judge_choices

PARTS = {  # of v tokens, p positions, width w and n layers: the hint if they are forgotten
    lambda v, p, w, n: v * w: "the table of tokens is missing: one row of the width for each",
    lambda v, p, w, n: p * w: "the table of positions is missing: one row of the width for each",
    lambda v, p, w, n: 8 * w * w * n: "the weights of the MLP are missing: 4 width² in and out",
    lambda v, p, w, n: 3 * w * w * n: "the weights of query, key and value are missing",
    lambda v, p, w, n: w * w * n: "the weight of what leaves attention is missing: width × width",
    lambda v, p, w, n: 9 * w * n: "the biases are missing: 9 times the width in each layer",
    lambda v, p, w, n: 4 * w * n: "the layer norms of the layers are missing: two in each",
    lambda v, p, w, n: 2 * w: "the layer norm after the last layer is missing: 2 × width",
}
COUNTED = (
    {"all layers": None, "one layer": "one layer is counted; there are config.n_layer of them"},
    {1: None, 2: "the head is counted too; it is the table of tokens, used again"},
    *({part: None, (lambda *_: 0): hint} for part, hint in PARTS.items()),
)


def check_count(my_count: Callable) -> bool:
    """Check `my_count(config)`: the parameters of a GPT-2 with that `GPT2Config`."""
    shapes = (2003, 53, 40, 3), (2011, 71, 28, 5)  # such that no two mistakes are alike
    names = "vocab_size", "n_positions", "n_embd", "n_layer"
    rest = {"n_head": 2, "bos_token_id": None, "eos_token_id": None}
    cases = [(GPT2Config(**dict(zip(names, shape, strict=True)), **rest),) for shape in shapes]
    praise = "every parameter of two more GPT-2s is accounted for"
    return judge_choices(my_count, cases, COUNTED, count, praise, most=len(COUNTED), tolerance=0)


def count(layers: str, tables: int, *parts_and_config) -> float:
    """The parameters of a GPT-2 with these parts, from its config."""
    *parts, config = parts_and_config
    depth = config.n_layer if layers == "all layers" else 1
    shape = config.vocab_size, config.n_positions, config.n_embd, depth
    head = (tables - 1) * config.vocab_size * config.n_embd
    return head + sum(part(*shape) for part in parts)


def check_guesser(my_perplexity: Callable) -> bool:
    """Check `my_perplexity(train, test, vocabulary)`: token ids in, a perplexity out.

    The guesser gives token t the probability (count of t in train + 1) / (tokens in
    train + vocabulary), whatever stands before it.
    """
    train = torch.tensor([[0, 0, 0, 0, 1, 1], [2, 2, 0, 3, 3, 0]])
    test = torch.tensor([[0, 1, 4, 0], [3, 0, 2, 2]])

    def surprise(train, test, vocabulary=6) -> float:
        """The mean surprise of a text by counts in another, in nats per token."""
        counts = torch.bincount(train.flatten(), minlength=vocabulary).double() + 1
        return -(counts / counts.sum())[test].log().mean().item()

    nats = surprise(train, test)
    wrong = {
        6.0: "that is the perplexity of a guesser that knows nothing: the vocabulary. Count the "
        "tokens of the training text",
        math.exp(surprise(test, test)): "you count in the test text; count in the training text",
        nats: "that is the mean surprise in nats. Take exp of it",
        math.exp(nats / math.log(2)): "the logarithm is to base 2 and exp to base e",
        2**nats: "the logarithm is natural and the power is of 2",
        math.exp(-nats): "the sign is lost: a surprise is minus the logarithm",
        math.exp(surprise(train, train)): "you test on the training text. Take `test`",
        math.exp(nats * 8): "you take exp of the sum. A perplexity is exp of the mean",
        math.exp(nats - math.log(18 / 12)): "your probabilities sum to more than 1: if every "
        "count has one more, the total has `vocabulary` more",
        math.inf: "a token of the test is not in the training text. Add 1 to every count",
    }
    mistakes = [(lambda *_, value=value: value, hint) for value, hint in wrong.items()]
    praise = "it counts in one text and is tested on another"
    return judge(my_perplexity, [(train, test, 6)], lambda *_: math.exp(nats), mistakes, praise)


READ = (
    {
        "bytes": None,
        "characters": "you divide by characters: some have three bytes. Take len(text.encode())",
        "tokens": "you divide by the number of tokens. Another tokenizer makes other tokens; "
        "bytes are the same for all: len(text.encode())",
        "nothing": "that is for the whole text. Divide by its bytes",
    },
    {
        "bits": None,
        "nats": "that is in nats. One bit is log 2 nats: divide by it",
        "upside down": "there are more bits than nats. Divide by math.log(2)",
    },
)


def check_bits(my_bits: Callable) -> bool:
    """Check `my_bits(nats, text)`: the surprise of each token in, bits per byte out."""
    text = "“Tea?” said the Mole—and there was tea."
    nats = torch.tensor([2.1, 0.4, 3.3, 1.2, 0.7, 5.9, 2.8, 0.1, 1.6, 2.2, 0.9])

    def answer(by: str, unit: str, nats, text) -> float:
        size = {"bytes": len(text.encode()), "characters": len(text), "tokens": len(nats)}
        factor = {"bits": 1 / math.log(2), "nats": 1, "upside down": math.log(2)}
        return nats.sum().item() / size.get(by, 1) * factor[unit]

    return judge_choices(my_bits, [(nats, text)], READ, answer, "a number to compare any models by")
