"""Checks for notebook 01: parameters from a config, a guesser that counts, bits per byte.

Each prints "well done: ..." and returns True, or says what it saw, what that hints
at, and returns False.
"""

import itertools
import math
from collections.abc import Callable

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from willows_kd.exercises import not_yet, well_done

# -- exercise 1 ------------------------------------------------------------------------

# vocabulary, positions, width, layers: chosen so that each set of parts has a size of its own
SHAPES = ((2003, 53, 40, 3), (2011, 71, 28, 5))
FORGOTTEN = {
    "head": "the head is counted as well. It is the table of tokens, used a second time.",
    "tokens": "the table of tokens is missing: one row of the width for each.",
    "positions": "the table of positions is missing: one row of the width for each.",
    "MLP": "the weights of the MLP are missing: width x 4 width in, and 4 width x width out.",
    "attention": "the weights of query, key and value are missing: width x width for each.",
    "projection": "the weight of what leaves attention is missing: width x width.",
    "biases": "the biases are missing: 3, 1, 4 and 1 times the width in each layer.",
    "norms": "the layer norms of the layers are missing: two in each, each 2 x width.",
    "last norm": "the layer norm after the last layer is missing: 2 x width.",
}


def check_count(my_count: Callable) -> bool:
    """Check `my_count(config)`: the parameters of a GPT-2 with that `GPT2Config`."""
    gaps = []
    for vocabulary, positions, width, layers in SHAPES:
        config = GPT2Config(
            vocab_size=vocabulary,
            n_positions=positions,
            n_embd=width,
            n_layer=layers,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
        )
        with torch.device("meta"):  # shapes without memory
            wanted = GPT2LMHeadModel(config).num_parameters()
        found, problem = one_number(my_count, config)
        if problem:
            return not_yet(problem)
        gaps.append((found - wanted, part_sizes(config)))
        where = f"for {layers} layers of width {width} you count {found:,.0f} of {wanted:,}"
    if all(gap == 0 for gap, _ in gaps):
        return well_done("every parameter of two more GPT-2s is accounted for.")
    if any(gap == 0 for gap, _ in gaps):
        return not_yet("right for one size, wrong for another. Is a number of yours written out?")
    for how_many in range(1, len(FORGOTTEN) + 1):
        for names in itertools.combinations(FORGOTTEN, how_many):
            if all(gap == sum(sizes[name] for name in names) for gap, sizes in gaps):
                return not_yet(f"{where}: {FORGOTTEN[names[0]]}")  # one thing at a time
    if all(gap == sizes["one layer only"] for gap, sizes in gaps):
        return not_yet(f"{where}: one layer is counted. There are config.n_layer of them.")
    return not_yet(f"{where}. Compare with `for name, p in teacher.named_parameters()`.")


def part_sizes(config: GPT2Config) -> dict[str, int]:
    """By what a count is off when that part is forgotten, or the head counted as well."""
    width, layers = config.n_embd, config.n_layer
    return {
        "head": config.vocab_size * width,
        "tokens": -config.vocab_size * width,
        "positions": -config.n_positions * width,
        "attention": -3 * width**2 * layers,
        "projection": -(width**2) * layers,
        "MLP": -8 * width**2 * layers,
        "biases": -9 * width * layers,
        "norms": -4 * width * layers,
        "last norm": -2 * width,
        "one layer only": -(12 * width**2 + 13 * width) * (layers - 1),
    }


# -- exercise 2 ------------------------------------------------------------------------


def check_guesser(my_perplexity: Callable) -> bool:
    """Check `my_perplexity(train, test, vocabulary)`: token ids in, a perplexity out.

    The guesser gives token t the probability (count of t in train + 1) / (tokens in
    train + vocabulary), whatever stands before it.
    """
    train = torch.tensor([[0, 0, 0, 0, 1, 1], [2, 2, 0, 3, 3, 0]])
    test = torch.tensor([[0, 1, 4, 0], [3, 0, 2, 2]])
    found, problem = one_number(my_perplexity, train, test, 6)
    if problem:
        return not_yet(problem)
    if found == math.inf or math.isnan(found):
        return not_yet(
            f"your perplexity is {found}: a token of the test never stands in the training text, "
            "and its probability is 0. Add 1 to every count."
        )
    p = guesser(train, 1)
    wrong = {
        6.0: "that is the perplexity of a guesser that knows nothing: the vocabulary. "
        "Count the tokens of the training text.",
        math.exp(surprise(guesser(test, 1), test)): "you count in the test text: that is looking "
        "at the answers. Count in the training text.",
        surprise(p, test): "that is the mean surprise in nats. Take exp of it.",
        surprise(p, test) / math.log(2): "that is the mean surprise in bits. Take the natural "
        "logarithm, and exp of the mean.",
        math.exp(surprise(p, test) / math.log(2)): "the logarithm is to base 2 and exp to base e. "
        "Take the same base for both.",
        2 ** surprise(p, test): "the logarithm is natural and the power is of 2. "
        "Take the same base for both.",
        math.exp(-surprise(p, test)): "the sign is lost: a surprise is minus the logarithm.",
        math.exp(surprise(p, train)): "you test on the training text. Take `test` to test on.",
        math.exp(surprise(p, test) * test.numel()): "you take exp of the sum. A perplexity is "
        "exp of the mean.",
        (1 / p[test]).mean().item(): "you take the mean of 1 / p. Take the mean of -log p "
        "first, exp after it.",
        math.exp(surprise(p * 18 / 12, test)): "your probabilities sum to more than 1: where "
        "every count has one more, the total has `vocabulary` more.",
    }
    for value, hint in wrong.items():
        if math.isclose(found, value, rel_tol=1e-4):
            return not_yet(hint)
    wanted = math.exp(surprise(p, test))
    if not math.isclose(found, wanted, rel_tol=1e-4):
        return not_yet(f"on one example you return {found:.4f}; it should be {wanted:.4f}.")
    return well_done("it counts in one text and is tested on another.")


def guesser(ids: torch.Tensor, extra: int) -> torch.Tensor:
    """The probabilities of six tokens by their counts, shape (6,)."""
    counts = torch.bincount(ids.flatten(), minlength=6).double() + extra
    return counts / counts.sum()


def surprise(p: torch.Tensor, ids: torch.Tensor) -> float:
    """The mean surprise of a text under fixed probabilities, in nats per token."""
    return -p[ids].log().mean().item()


# -- exercise 3 ------------------------------------------------------------------------


def check_bits(my_bits: Callable) -> bool:
    """Check `my_bits(nats, text)`: the surprise of each token in, bits per byte out."""
    text = "“Tea?” said the Mole—and there was tea."
    nats = torch.tensor([2.1, 0.4, 3.3, 1.2, 0.7, 5.9, 2.8, 0.1, 1.6, 2.2, 0.9])
    found, problem = one_number(my_bits, nats, text)
    if problem:
        return not_yet(problem)
    total, size = nats.sum().item(), len(text.encode())
    readings = {
        "by byte": (total / size, ""),
        "by character": (
            total / len(text),
            "you divide by characters: a dash or a curly "
            "quotation mark is one, and three bytes. Take len(text.encode()).",
        ),
        "by token": (
            total / len(nats),
            "you divide by the number of tokens. Another tokenizer "
            "makes other tokens; bytes are the same for all: len(text.encode()).",
        ),
        "by nothing": (total, "that is for the whole text. Divide by its bytes."),
        "mean by byte": (
            total / len(nats) / size,
            "you begin with the mean. The surprises of the tokens add up: take the sum.",
        ),
    }
    units = {
        "bits": (1 / math.log(2), ""),
        "nats": (1.0, "that is in nats. One bit is log 2 nats: divide by it."),
        "the wrong way": (
            math.log(2),
            "one bit is log 2 nats, less than one: there are more "
            "bits than nats. Divide by math.log(2).",
        ),
    }
    for (value, first), (unit, second) in itertools.product(readings.values(), units.values()):
        if math.isclose(found, value * unit, rel_tol=1e-4):
            hint = first or second  # one thing at a time
            return not_yet(hint) if hint else well_done("a number to compare any models by.")
    wanted = total / size / math.log(2)
    return not_yet(f"on one example you return {found:.4f}; it should be {wanted:.4f}.")


# -- what all three share --------------------------------------------------------------


def one_number(function: Callable, *arguments) -> tuple[float, str | None]:
    """What a learner's function returns, or why it is no number."""
    try:
        result = function(*arguments)
    except Exception as error:  # whatever a learner's code raises is worth telling
        return math.nan, f"your function stops with {type(error).__name__}: {error}"
    if result is None:
        return math.nan, "your function returns nothing. Does it end with `return`?"
    if isinstance(result, torch.Tensor) and result.numel() != 1:
        shape = tuple(result.shape)
        return math.nan, f"your function returns a tensor of shape {shape}; one number is wanted."
    try:
        found = float(result)
    except (TypeError, ValueError):
        return math.nan, f"your function returns a {type(result).__name__}; a number is wanted."
    return found, "your function returns 0: write it first." if found == 0 else None
