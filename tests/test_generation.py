"""Text that a model writes: its own distribution, the same whoever else is written beside it."""

from types import SimpleNamespace

import pytest
import torch

import willows_kd as kd
from willows_kd import generation
from willows_kd.errors import WriteError
from willows_kd.files import load_tensors
from willows_kd.sources import transfer_set


@pytest.fixture
def writer(make_gpt2):
    """A tiny model with opinions: its weights are spread more widely than at a usual start."""
    return make_gpt2(layers=2, initializer_range=0.15)


@pytest.fixture
def prompts():
    """Prompts of several lengths, none of which has the end-of-text token."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 4000, (length,), generator=generator) for length in (5, 1, 12, 5)]


@torch.inference_mode()
def next_logits(model, ids: torch.Tensor) -> torch.Tensor:
    """The logits of the next token, without the end-of-text token, shape (vocabulary,)."""
    logits = model(ids[None]).logits[0, -1].double()
    logits[model.config.eos_token_id] = -torch.inf
    return logits


def test_the_same_seed_goes_on_with_a_prompt_by_the_same_text_without_dropout(writer, tokenizer):
    prompt = "“It’s  a ,”\r\n\n\tsaid 🚣🏽‍♀️ ру́, e\u0301"
    first = kd.complete(writer, tokenizer, prompt, 12, seed=1)
    assert first.startswith(prompt) and len(first) > len(prompt)
    assert first == kd.complete(writer.train(), tokenizer, prompt, 12, seed=1)
    assert first != kd.complete(writer, tokenizer, prompt, 12, seed=2)


def test_temperature_0_takes_the_likeliest_token_each_time(writer, tokenizer):
    ids = tokenizer("The river", return_tensors="pt").input_ids[0]
    for _ in range(8):
        ids = torch.cat([ids, next_logits(writer, ids).argmax()[None]])
    text = kd.complete(writer, tokenizer, "The river", 8, temperature=0, seed=1)
    assert text == tokenizer.decode(ids)


def test_a_prompt_that_leaves_no_room_loses_its_beginning(writer, tokenizer):
    words = tokenizer("The river ran on and on", return_tensors="pt").input_ids[0]
    longest, asked = writer.config.n_positions, []
    streamer = SimpleNamespace(put=lambda ids: asked.append(ids.numel()), end=lambda: None)
    for count, new_tokens, kept in ((200, 10, longest - 10), (200, 999, longest // 2), (9, 999, 9)):
        prompt = tokenizer.decode(words.repeat(count)[:count])
        asked.clear()
        kd.complete(writer, tokenizer, prompt, new_tokens, streamer=streamer)
        given = len(tokenizer(prompt, verbose=False).input_ids)
        assert asked[0] == min(given, kept)
        assert len(asked) - 1 <= min(new_tokens, longest - asked[0])


def test_an_empty_prompt_begins_where_a_text_begins(writer, tokenizer):
    text = kd.complete(writer, tokenizer, "", 8)
    assert text
    assert tokenizer.eos_token not in text
    assert text == kd.complete(writer, tokenizer, tokenizer.eos_token, 8)


def test_each_token_is_where_the_cumulative_probability_passes_its_draw(writer, prompts):
    writer.generation_config.update(top_k=1, temperature=0.1, repetition_penalty=5.0)  # no matter
    written = kd.sample_continuations(writer, prompts, 6, temperature=1.5, seed=4)
    draws = generation.uniform_draws(len(prompts), 6, seed=4)
    for prompt, text, row in zip(prompts, written, draws, strict=True):
        for i, token in enumerate(text):
            p = (next_logits(writer, torch.cat([prompt, text[:i]])) / 1.5).softmax(-1)
            before = p[:token].sum()
            assert before - 1e-6 <= row[i] <= before + p[token] + 1e-6


def test_a_text_does_not_depend_on_those_written_beside_it(writer, prompts, monkeypatch):
    together = kd.sample_continuations(writer, prompts, 10, seed=2)
    monkeypatch.setattr(generation, "PROMPTS_AT_ONCE", 1)  # without padding, then
    assert torch.equal(kd.sample_continuations(writer.train(), prompts, 10, seed=2), together)
    assert not torch.equal(kd.sample_continuations(writer, prompts, 10, seed=3), together)


def test_a_text_has_its_length_whatever_ends_one_and_whatever_the_model_is_set_to(writer, prompts):
    """A base model and its instruction-tuned one end texts with different tokens."""
    writer.config.eos_token_id = 7
    ends = {7, 8, *kd.sample_continuations(writer, prompts, 6, temperature=0).flatten().tolist()}
    writer.generation_config.update(eos_token_id=sorted(ends), max_length=3, max_time=0.0)
    writer.generation_config.update(no_repeat_ngram_size=1, stop_strings=["e"])
    before = writer.generation_config.to_dict()
    written = kd.sample_continuations(writer, prompts, 30, temperature=0)
    assert written.shape == (4, 30)
    assert not ends & set(written.flatten().tolist())
    assert writer.generation_config.to_dict() == before


def test_a_beam_search_finds_likelier_text_than_greedy(writer, prompts):
    def nats(texts):
        ids = [torch.cat(pair) for pair in zip(prompts, texts, strict=True)]
        scores = [kd.token_scores(writer, None, row[None])["nll"][0, -8:] for row in ids]
        return torch.stack(scores).sum().item()

    greedy, beams = (kd.sample_continuations(writer, prompts, 8, 0, beams=n) for n in (1, 8))
    assert nats(beams) < nats(greedy)


def test_written_blocks_keep_the_first_quarter_of_each(writer, blocks):
    written = kd.make_transfer_set(writer, blocks.train, seed=3)
    prompt = 8
    assert prompt == 8
    assert written.shape == blocks.train.shape
    assert torch.equal(written[:, :prompt], blocks.train[:, :prompt])
    expected = kd.sample_continuations(writer, blocks.train[:, :prompt], 24, seed=3)
    assert torch.equal(written[:, prompt:], expected)


def test_written_blocks_are_kept_for_the_same_writer_prompts_and_settings(
    writer, make_gpt2, blocks, monkeypatch
):
    few, calls = blocks.train[:2], []
    first = kd.make_transfer_set(writer, few)
    monkeypatch.setattr(
        transfer_set, "sample_continuations", lambda *a: calls.append(a) or first[:, 8:]
    )
    assert torch.equal(kd.make_transfer_set(writer, few), first) and not calls
    kd.make_transfer_set(make_gpt2(seed=5), few)
    kd.make_transfer_set(writer, blocks.validation[:2])
    kd.make_transfer_set(writer, few, seed=1)
    kd.make_transfer_set(writer, few, temperature=0.5)
    assert len(calls) == 4


def test_a_damaged_file_of_blocks_is_written_anew(writer, blocks):
    first = kd.make_transfer_set(writer, blocks.train[:2])
    (file,) = (transfer_set.cache_folder() / "texts").glob("*.safetensors")
    damaged = bytearray(file.read_bytes())
    damaged[-40] ^= 1
    file.write_bytes(damaged)
    assert load_tensors(file) is None
    assert torch.equal(kd.make_transfer_set(writer, blocks.train[:2]), first)
    assert torch.equal(load_tensors(file)["blocks"], first.int())


def test_where_blocks_cannot_be_kept_a_warning_says_so(writer, blocks, monkeypatch):
    def full(*_):
        raise WriteError("the disk is full")

    monkeypatch.setattr(transfer_set, "save_tensors", full)
    with pytest.warns(UserWarning, match="not kept for another run: the disk is full"):
        assert kd.make_transfer_set(writer, blocks.train).shape == blocks.train.shape
