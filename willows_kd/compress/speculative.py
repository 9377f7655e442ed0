"""Speculative decoding: a student drafts some tokens, its teacher checks them in one pass."""

from typing import NamedTuple

import torch
from torch import nn
from transformers import DynamicCache

from willows_kd.cost import check_ids, in_turns, timed
from willows_kd.errors import is_integer, require
from willows_kd.generation import check_prompts, check_sampling, end_of_text
from willows_kd.models import CACHE, common_vocabulary, eval_mode


class Speculated(NamedTuple):
    """A text, and what each pass of the teacher brought.

    Attributes:
        tokens: what was written, without the prompt, shape (new_tokens,), on the CPU.
        drafted: for each pass of the teacher, how many tokens the draft model proposed.
        accepted: how many of these were accepted; each pass adds one token of the teacher's.
    """

    tokens: torch.Tensor
    drafted: list[int]
    accepted: list[int]

    @property
    def acceptance(self) -> float:
        """The share accepted of the tokens tested: in each pass up to the first rejected one."""
        tested = sum(min(a + 1, d) for a, d in zip(self.accepted, self.drafted, strict=True))
        return sum(self.accepted) / max(1, tested)


@torch.inference_mode()
def speculative_decode(
    teacher,
    draft,
    prompt: torch.Tensor,
    new_tokens: int,
    k: int = 4,
    temperature: float = 1.0,
    seed: int = 0,
) -> Speculated:
    """Continue a prompt by text of the teacher's own distribution, with fewer of its passes.

    Algorithm 1 of Leviathan et al. 2023, with a key-value cache for each model, cut back
    after a rejection. As in `sample_continuations`, the end-of-text token is never drawn.

    Args:
        teacher: whose text it is.
        draft: proposes tokens: a student with the teacher's vocabulary; one of the heads may be
            padded.
        prompt: token ids, shape (length,), at least one.
        new_tokens: how many tokens to write.
        k: how many tokens the draft model proposes before the teacher checks them; 0 lets the
            teacher write alone, as what speed is to be compared with.
        temperature: of sampling, for both; 0 takes the teacher's likeliest token each time.
        seed: for the draws.

    Raises:
        InputError: these are no models, no prompt, or prompt and text are longer than both read.
    """
    check_sampling(temperature, seed, new_tokens)
    require(is_integer(k, 0), f"k is {k!r}; it must be a whole number, at least 0")
    for name, model in (("teacher", teacher), ("draft", draft)):
        check_prompts(model, [prompt], new_tokens, name)
    never, vocabulary = end_of_text(teacher), common_vocabulary(teacher, draft)
    generator = torch.Generator().manual_seed(seed)
    p_of, q_of = (Reader(model, temperature, never, vocabulary) for model in (teacher, draft))
    text, found, length = prompt.cpu(), Speculated(None, [], []), len(prompt)
    with eval_mode(teacher, draft):
        while (left := length + new_tokens - len(text)) > 0:
            known, q = len(text), []
            for _ in range(min(k, left - 1)):  # the teacher adds the last token
                q.append(q_of.next(text)[-1])
                text = torch.cat([text, draw(q[-1], generator)])
            p = p_of.next(text)[-len(q) - 1 :]
            accepted, token = verify(p, q, text[known:], generator)
            text = torch.cat([text[: known + accepted], token])
            for reader in (p_of, q_of):
                reader.forget_beyond(known + accepted)
            found.drafted.append(len(q))
            found.accepted.append(accepted)
    return found._replace(tokens=text[length:])


def verify(p, q, drafted: torch.Tensor, generator) -> tuple[int, torch.Tensor]:
    """How many drafted tokens are accepted, and the token that follows them, shape (1,).

    A token is accepted with probability min(1, p/q). The first that is not is replaced by a
    draw from max(0, p - q), normalised; if all are, one more is drawn from the last p.

    Args:
        p: the teacher's probabilities, shape (drafted + 1, vocabulary).
        q: of each drafted token, the draft model's probabilities, shape (vocabulary,).
        drafted: the proposed tokens, shape (drafted,).
    """
    for i, token in enumerate(drafted.tolist()):
        u = torch.rand((), dtype=p.dtype, generator=generator)
        if u * q[i][token] >= p[i, token]:
            return i, draw((p[i] - q[i]).clamp(min=0), generator)
    return len(drafted), draw(p[-1], generator)


def draw(weights: torch.Tensor, generator) -> torch.Tensor:
    """One token, shape (1,), in proportion to weights, shape (vocabulary,)."""
    return torch.multinomial(weights, 1, generator=generator)


class Reader:
    """A model that reads each token of a growing text once."""

    def __init__(self, model, temperature: float, never: list[int], vocabulary: int):
        """Probabilities are softened by a temperature, 0 for the likeliest token alone.

        They are over the first tokens of the vocabulary, but those that are never to be drawn.
        """
        self.model, self.temperature = model, temperature
        self.never, self.vocabulary = never, vocabulary
        self.cache = DynamicCache()

    def next(self, text: torch.Tensor) -> torch.Tensor:
        """Probabilities after each token that is new, in float64, shape (new, vocabulary)."""
        new = text[None, self.cache.get_seq_length() :].to(self.model.device)
        logits = self.model(new, **{CACHE: self.cache}, use_cache=True).logits[0]
        logits = logits[:, : self.vocabulary].cpu().double()
        logits[:, self.never] = -torch.inf
        if self.temperature:
            return (logits / self.temperature).softmax(-1)
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).double()

    def forget_beyond(self, length: int) -> None:
        """Cut the cache back to the first so many tokens of the text."""
        beyond = self.cache.get_seq_length() - length
        if beyond > 0:  # crop(0) empties the cache in some releases
            self.cache.crop(-beyond)


def decode_latency(
    models: dict[str, nn.Module], ids: torch.Tensor, new_tokens=(1,), repeats: int = 15
) -> dict[str, list[float]]:
    """Seconds of one forward pass over so many new tokens, with what is before them cached.

    The models take turns, and the median of the repeats is reported, as in `latency`.

    Args:
        models: by name.
        ids: shape (batch, tokens); its last ones, as many as ever needed, are the new tokens.
        new_tokens: numbers of tokens, one value of the result for each.
        repeats: rounds that count.
    """
    check_ids(ids, *models.values())
    fits = new_tokens and all(is_integer(count) and count < ids.shape[1] for count in new_tokens)
    require(fits, f"new_tokens are {new_tokens!r}; give numbers from 1 to {ids.shape[1] - 1}")
    before, new = ids.split([ids.shape[1] - max(new_tokens), max(new_tokens)], dim=1)

    def seconds(model) -> dict[int, float]:
        cached = {CACHE: DynamicCache(), "use_cache": True}
        found = {}
        timed(lambda: model(before.to(model.device), **cached), model)
        for i, count in enumerate(new_tokens):
            some = new[:, :count].to(model.device)
            found[i] = timed(lambda some=some: model(some, **cached), model)
            cached[CACHE].crop(-count)
        return found

    medians = in_turns(seconds, models, repeats)
    return {name: list(found.values()) for name, found in medians.items()}


def expected_tokens(acceptance: float, k: int) -> float:
    """Tokens for each pass of the teacher, (1 - a^(k+1)) / (1 - a).

    Leviathan et al. 2023, equation (1), if each of k tokens is accepted with probability a.
    """
    return float(sum(acceptance**i for i in range(k + 1)))  # the sum holds at a = 1 as well


def expected_speedup(acceptance: float, k: int, cost: float, check: float = 1.0) -> float:
    """How many times as fast as the teacher alone, E / (k c + check) with E `expected_tokens`.

    Leviathan et al. 2023, theorem 3.8, where a check takes as long as one token (check = 1).

    Args:
        acceptance: the share of drafted tokens that the teacher accepts.
        k: how many tokens are drafted.
        cost: seconds of a draft model's token, the teacher's being 1.
        check: seconds of the teacher's pass over k + 1 tokens, in the same unit.
    """
    return expected_tokens(acceptance, k) / (k * cost + check)
