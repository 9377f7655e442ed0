"""Text that a model writes: a prompt's continuation to read, or many as token ids to train on."""

import math
import numbers

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import GenerationConfig, LogitsProcessor

from willows_kd.errors import is_integer, require, type_name
from willows_kd.models import (
    check_token_ids,
    eval_mode,
    max_positions,
    quiet_transformers,
    require_model,
    vocabulary_size,
)

PROMPTS_AT_ONCE = 64


@torch.inference_mode()
def complete(
    model,
    tokenizer,
    prompt: str,
    max_new_tokens: int = 60,
    temperature: float = 0.8,
    seed: int = 0,
    top_k: int = 50,
    streamer=None,
) -> str:
    """Continue a prompt; the same seed gives the same words.

    Each token is drawn from the `top_k` likeliest ones (0: from all) at a temperature
    of sampling; temperature 0 takes the likeliest. A prompt that leaves too little room loses
    its beginning, but half of the model's positions are always its own. A streamer of
    `transformers` is given prompt and tokens as they come.
    """
    require_model(model, "model")
    check_sampling(temperature, seed, max_new_tokens)
    require(is_integer(top_k, 0), f"top_k is {top_k!r}; it is at least 0, 0 for all tokens")
    prompt = prompt.encode(errors="replace").decode()  # a lone surrogate is no text
    given = tokenizer(prompt or tokenizer.eos_token, return_tensors="pt", verbose=False)
    check_token_ids(given["input_ids"], model)
    ids = given["input_ids"].to(model.device)
    if positions := max_positions(model.config):
        room = min(max_new_tokens, positions // 2)
        ids = ids[:, -(positions - room) :]  # a long prompt loses its beginning
        max_new_tokens = min(max_new_tokens, positions - ids.shape[1])
    with eval_mode(model), torch.random.fork_rng(), quiet_transformers():
        torch.manual_seed(seed)
        likeliest = {"top_k": top_k, "top_p": 1.0}  # whatever the model's own settings are
        sampling = {"do_sample": True, "temperature": float(temperature), **likeliest}
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.eos_token_id,
            use_cache=True,  # whatever the model is set to for training
            streamer=streamer,
            **(sampling if temperature else {"do_sample": False}),
        )
    return tokenizer.decode(out[0], skip_special_tokens=True)


@torch.no_grad()
def sample_continuations(
    model,
    prompts: torch.Tensor | list[torch.Tensor],
    new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
    beams: int = 1,
) -> torch.Tensor:
    """Continue prompts by so many tokens each, drawn from a model's own distribution.

    Nothing is cut off that distribution but the end-of-text token, so that each text has
    its full length. What is drawn for a prompt depends on the seed and the prompt's number,
    not on how many are written at once.

    Args:
        model: a causal language model.
        prompts: token ids, shape (prompts, length), or a list of rows of any lengths.
        new_tokens: how many to write for each.
        temperature: of sampling; 0 takes the likeliest token each time (greedy).
        seed: for the draws.
        beams: more than 1 for a beam search, which keeps so many texts, and draws nothing.

    Returns:
        the tokens written, without the prompts, shape (prompts, new_tokens).

    Raises:
        InputError: these are no prompts for this model, or text and prompt together are longer
            than it reads.
    """
    check_sampling(temperature, seed, new_tokens)
    check_prompts(model, prompts, new_tokens)
    draws = uniform_draws(len(prompts), new_tokens, seed) if temperature and beams == 1 else None
    written = []
    starts = range(0, len(prompts), PROMPTS_AT_ONCE)
    for start in tqdm(starts, unit="pass", leave=False, disable=len(starts) == 1):
        some = slice(start, start + PROMPTS_AT_ONCE)
        drawn = None if draws is None else draws[some]
        written.append(continued(model, prompts[some], new_tokens, drawn, temperature, beams))
    return torch.cat(written)


def check_prompts(model, prompts, new_tokens: int, name: str = "model") -> None:
    """Require prompts of token ids that a model knows, with room for so many more."""
    require_model(model, name)
    are_ids = len(prompts) > 0 and all(torch.is_tensor(row) and row.ndim == 1 for row in prompts)
    wanted = "give token ids of shape (prompts, length), or a list of rows, of a token at least"
    require(are_ids and all(map(len, prompts)), f"prompts are {type_name(prompts)}; {wanted}")
    check_token_ids(torch.cat(list(prompts)), model)
    longest, given = max_positions(model.config), max(map(len, prompts)) + new_tokens
    fits = f"prompt and text have {given} tokens together; the {name} reads {longest}"
    require(longest is None or given <= longest, fits)


def check_sampling(temperature: float, seed: int, new_tokens: int) -> None:
    """Require a temperature of sampling, a seed that `torch` takes, and tokens to write."""
    number = isinstance(temperature, numbers.Real) and 0 <= temperature < math.inf
    require(number, f"temperature is {temperature!r}; it must be at least 0")
    seeds = is_integer(seed, 0) and seed < 2**63
    require(seeds, f"seed is {seed!r}; it must be from 0 to 2**63 - 1")
    require(is_integer(new_tokens), f"{new_tokens!r} tokens cannot be written; at least 1 can")


def uniform_draws(texts: int, tokens: int, seed: int) -> torch.Tensor:
    """A random number from 0 to 1 for each token of each text, shape (texts, tokens)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(texts, tokens, dtype=torch.float64, generator=generator)


@torch.no_grad()
def continued(
    model, prompts, new_tokens: int, draws=None, temperature=1.0, beams=1, vocabulary=None
) -> torch.Tensor:
    """The continuations of some prompts at once, shape (prompts, new_tokens).

    Args:
        draws: for each token a random number from 0 to 1; None takes the likeliest.
        vocabulary: write only the first so many tokens, such as those that a teacher knows.
        model, prompts, new_tokens, temperature, beams: as in `sample_continuations`.
    """
    rows = [prompt.to(model.device) for prompt in prompts]
    ids = pad_sequence(rows, batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], True, padding_side="left")
    known = vocabulary_size(model)
    settings = GenerationConfig(
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,  # for which `generate` leaves out the end-of-text tokens
        eos_token_id=end_of_text(model) or None,
        pad_token_id=0,
        do_sample=False,
        num_beams=beams,
        use_cache=True,  # whatever the model is set to for training
        suppress_tokens=list(range(vocabulary or known, known)) or None,
    )
    draw = [] if draws is None else [Draw(draws, ids, temperature)]
    own, model.generation_config = model.generation_config, settings  # its own would fill gaps
    try:
        with eval_mode(model), quiet_transformers():
            out = model.generate(
                ids, attention_mask=mask, generation_config=settings, logits_processor=draw
            )
    finally:
        model.generation_config = own
    return out[:, ids.shape[1] :]


def end_of_text(model) -> list[int]:
    """The tokens that end a text, by a model's config or by its config of generation.

    They may differ: an instruction-tuned model ends an answer and a text with different tokens.
    """
    found: set[int] = set()
    for settings in (model.config, model.generation_config):
        ids = getattr(settings, "eos_token_id", None)
        found.update([] if ids is None else [ids] if isinstance(ids, int) else ids)
    return sorted(found)


class Draw(LogitsProcessor):
    """Leaves one token at each step: the one that a given random number draws.

    `generate` then takes the likeliest of what is left. With draws of our own, a text does
    not depend on the others that are written at the same time, nor on the process.
    """

    def __init__(self, draws: torch.Tensor, prompts: torch.Tensor, temperature: float):
        """Take a number from 0 to 1 for each token to come, shape (texts, tokens)."""
        self.dtype = torch.float32 if prompts.device.type == "mps" else torch.float64
        self.draws = draws.to(self.dtype).to(prompts.device)
        self.prompt_length = prompts.shape[1]
        self.temperature = temperature

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Choose where the cumulative probability passes the number (inverse transform)."""
        draw = self.draws[:, input_ids.shape[1] - self.prompt_length, None]
        p = (scores / self.temperature).softmax(dim=-1)
        cumulative = p.cumsum(dim=-1, dtype=self.dtype)  # float64: no rare token is lost
        token = torch.searchsorted(cumulative, draw * cumulative[:, -1:], right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0)


def prompt_length(block_size: int) -> int:
    """How much of a block is kept as the prompt if a model writes the rest: a quarter."""
    return max(1, block_size // 4)
