"""What a model costs: bytes that can be counted by hand, and fair turns at the clock."""

import pytest
import torch
from torch import nn

import willows_kd as kd
from willows_kd import cost
from willows_kd.cost import MemoryWatch
from willows_kd.models import CACHE

KILOBYTE = 250  # float32 elements


def weight_bytes(model: nn.Module) -> int:
    return sum(p.nbytes for p in model.parameters())


def test_memory_is_counted_as_it_comes_and_goes_and_views_keep_that_of_their_base():
    with MemoryWatch() as watch:
        held = []
        a = torch.ones(1 * KILOBYTE)
        held.append(watch.held)
        b = torch.ones(3 * KILOBYTE)
        held.append(watch.held)
        view = a[:1]
        del a
        held.append(watch.held)
        del view
        held.append(watch.held)
        c = b[: 2 * KILOBYTE].clone()
        held.append(watch.held)
        del b
        held.append(watch.held)
        values, indices = torch.ones(100).topk(10)  # each result counts
        held.append(watch.held)
    assert held == [1000, 4000, 4000, 3000, 5000, 2000, 2000 + 10 * (4 + 8)]
    assert watch.most == 5000
    assert c.nbytes == 2000
    del values, indices
    assert watch.held == 2000


def test_views_and_operations_in_place_take_no_memory():
    before = torch.ones(4, KILOBYTE)
    with MemoryWatch() as watch:
        before.add_(1).t().reshape(-1, 4).mul_(2)[1:].chunk(2)
        assert watch.most == 0
        a = torch.ones(4, KILOBYTE)
        a.relu_().view(2, -1).transpose(0, 1).unsqueeze(0).add_(before.view(1, -1, 2))
        assert watch.most == a.nbytes


def test_peak_memory_lies_between_what_is_needed_and_all_that_is_ever_made(make_gpt2, blocks):
    """The most that a GPT-2 without reuse could hold: every result of every operation."""
    model, ids = make_gpt2(layers=2), blocks.train[:3]
    batch, tokens, width, heads = 3, 32, 32, 2
    logits = batch * tokens * 4096 * 4
    attention = batch * heads * tokens * tokens * 4
    activation = batch * tokens * width * 4
    per_layer = 4 * attention + 60 * activation  # the feed-forward ones are four times as wide
    peak = cost.peak_memory(model, ids)
    assert peak >= weight_bytes(model) + logits
    assert peak <= weight_bytes(model) + logits + 2 * per_layer + 10 * activation


def test_the_size_on_disk_is_that_of_the_saved_weights_and_tied_ones_count_once(
    make_gpt2, blocks, tmp_path
):
    tied, untied = (make_gpt2(layers=1, tie_word_embeddings=tie) for tie in (True, False))
    ids = blocks.train[:1]
    head = untied.lm_head.weight.nbytes
    assert cost.peak_memory(untied, ids) - cost.peak_memory(tied, ids) == head
    untied.save_pretrained(tmp_path)
    size = kd.size_on_disk(untied)
    assert size == (tmp_path / "model.safetensors").stat().st_size
    assert size - kd.size_on_disk(tied) == pytest.approx(head, abs=1000)


def test_models_take_turns_at_a_block_and_then_at_a_token_at_a_time_that_none_ends(
    make_gpt2, blocks
):
    ids, order = blocks.train[:2, :22], []
    models = {name: make_gpt2(layers=1, initializer_range=0.3) for name in "ab"}
    for name, model in models.items():
        with torch.inference_mode():
            likeliest = model(ids[:, :10]).logits[:, -1].argmax(dim=-1)
        model.generation_config.eos_token_id = likeliest.tolist()  # would end it at once
        hook = lambda m, _, out, name=name: order.append((name, out.logits.shape[1]))  # noqa: E731
        model.register_forward_hook(hook)
    found = kd.latency(models, ids, new_tokens=12, repeats=2)
    sizes = [22, 1, *[1] * 11]  # with the cache, and `generate` asks for a prompt's last only
    assert order == 3 * [(name, size) for name in "ab" for size in sizes]
    assert list(found) == ["a", "b"]
    assert all(seconds > 0 for times in found.values() for seconds in times.values())


def test_the_first_round_does_not_count_and_the_median_of_the_others_is_reported(
    teacher, blocks, monkeypatch
):
    #        warm-up    then (forward pass, four tokens) in turn
    clock = iter([99, 99, 1, 40, 50, 8, 3, 12])
    monkeypatch.setattr(cost, "timed", lambda action, model: next(clock))
    found = kd.latency({"teacher": teacher}, blocks.train[:1], new_tokens=4, repeats=3)
    assert found == {"teacher": {"forward": 3, "per_token": 12 / 4}}
    assert next(clock, None) is None


def test_what_is_timed_runs_without_dropout_and_gradients(teacher):
    seen = []
    teacher.train()
    cost.timed(lambda: seen.append((teacher.training, torch.is_inference_mode_enabled())), teacher)
    assert seen == [(False, True)]
    assert teacher.training


def test_a_pass_over_new_tokens_reads_these_after_the_cached_ones(make_gpt2, monkeypatch, blocks):
    model = make_gpt2(1)
    read, forward = [], model.forward

    def counted(ids, **settings):
        read.append((settings[CACHE].get_seq_length(), ids.shape[1]))
        return forward(ids, **settings)

    monkeypatch.setattr(model, "forward", counted)
    found = kd.decode_latency({"model": model}, blocks.train[:1, :20], (1, 5), repeats=2)
    assert read == [(0, 15), (15, 1), (15, 5)] * 3
    assert list(found) == ["model"] and len(found["model"]) == 2
    assert min(found["model"]) > 0
