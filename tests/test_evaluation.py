"""The evaluation: each number is what a slow and obvious reading of the text would give."""

import math
import statistics
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

import willows_kd as kd
from conftest import padded_head
from willows_kd import cost, evaluation
from willows_kd.evaluation import calibration_error, number, token_scores, window_length, windows


@pytest.fixture
def teacher(make_gpt2):
    """A tiny teacher with opinions: its weights are spread more widely than at a usual start."""
    return make_gpt2(layers=2, initializer_range=0.3)


@pytest.fixture
def model(make_gpt2):
    """Another such model, with room for a long continuation."""
    return make_gpt2(layers=1, seed=1, initializer_range=0.3, n_positions=128)


def reshaped(blocks: torch.Tensor, count: int, size: int) -> torch.Tensor:
    return blocks.flatten()[: count * size].view(count, size)


def test_a_first_token_begins_each_window_and_is_never_scored():
    text = torch.arange(1, 25)
    blocks = torch.cat([torch.full((4, 1), 99), text.view(4, 6)], dim=1)
    assert window_length(blocks) == 25
    found = [pair for w, m in windows(blocks, 9, vocabulary=100) for pair in zip(w, m, strict=True)]
    assert all(row[0] == 99 and row[1:].max() < 99 and len(row) == 9 for row, _ in found)
    assert all(mask.any() for _, mask in found)  # none is read in vain
    assert torch.cat([row[mask] for row, mask in found]).tolist() == text.tolist()


# -- quality ---------------------------------------------------------------------------


def predictions(model, blocks: torch.Tensor, size: int) -> torch.Tensor:
    """log p of every token but the first, one forward pass a token: (tokens - 1, vocabulary).

    Each is predicted from what stands before it in the first window of `size` that holds it.
    """
    stream = blocks.flatten()
    starts = [*range(0, len(stream) - size, size // 2), len(stream) - size]
    logits = []
    for position in range(1, len(stream)):
        start = next(start for start in starts if position < start + size)
        logits.append(model(stream[None, start:position]).logits[0, -1])
    return torch.stack(logits).detach().double().log_softmax(dim=-1)


@pytest.mark.parametrize(
    ("count", "size", "positions", "windows_at_once"),
    [(2, 16, 20, 1), (5, 7, 14, 2), (6, 2, 64, 9)],
)
def test_quality_is_that_of_a_slow_reading(
    make_gpt2, teacher, blocks, count, size, positions, windows_at_once, monkeypatch
):
    """Finite, too, although the teacher rules some tokens out."""
    model = make_gpt2(layers=1, seed=1, initializer_range=0.3, n_positions=max(positions, size))

    def rule_out(module, given, output):
        output.logits[..., ::7] = -math.inf

    teacher.register_forward_hook(rule_out)
    few = reshaped(blocks.test, count, size).clone()
    for i in range(1, size, 2):  # the model shall be right about some tokens
        few[0, i] = model(few[:1, :i]).logits[0, -1].argmax()
    length = min(model.config.n_positions, count * size)  # of a window: not that of a block
    monkeypatch.setattr(evaluation, "LOGITS_AT_ONCE", windows_at_once * length * 4096)
    log_q, log_p = predictions(model, few, length), predictions(teacher, few, length)
    labels = few.flatten()[1:]
    confidence, choice = log_q.exp().max(dim=-1)
    assert 0 < (choice == labels).sum() < len(labels)
    distributions = (torch.distributions.Categorical(logits=x) for x in (log_p, log_q))
    expected = {
        "perplexity": math.exp(-log_q[range(len(labels)), labels].mean()),
        "calibration_error": calibration_error(confidence, choice == labels),
        "kl_to_teacher": torch.distributions.kl_divergence(*distributions).mean().item(),
        "agreement": (log_p.argmax(dim=-1) == choice).double().mean().item(),
    }
    assert kd.evaluate(model, few, teacher=teacher) == pytest.approx(expected, rel=1e-4)


def test_a_model_that_is_whole_only_as_far_as_its_blocks_is_found_out(teacher, blocks):
    torch.manual_seed(0)
    settings = dict(do_sample=True, top_k=0, min_new_tokens=63, max_new_tokens=63, pad_token_id=0)
    text = teacher.generate(blocks.test[:, :1], **settings).view(-1, 16)  # what it finds likely
    whole, curve = kd.evaluate(teacher, text), kd.loss_by_position(teacher, text)
    with torch.no_grad():
        teacher.transformer.wpe.weight[16:].normal_(std=3)  # as if never trained
    found, spoilt = kd.evaluate(teacher, text), kd.loss_by_position(teacher, text)
    assert found["perplexity"] > 1.5 * whole["perplexity"]
    assert found == kd.evaluate(teacher, text.view(-1, 4))
    assert curve.shape == (63,)
    assert torch.equal(spoilt[:15], curve[:15]) and spoilt[15:].mean() > curve[15:].mean() + 0.5


def test_the_loss_by_position_is_the_mean_over_windows(teacher, blocks):
    stream = blocks.test.flatten()
    assert len(stream) == 192 and teacher.config.n_positions == 64
    losses = []
    for start in range(0, 129, 8):
        ids = stream[None, start : start + 64]
        log_q = teacher(ids).logits[0, :-1].double().log_softmax(-1)
        losses.append(-log_q[range(63), ids[0, 1:]])
    expected = torch.stack(losses).mean(0).detach()
    assert torch.allclose(kd.loss_by_position(teacher, blocks.test), expected, atol=1e-5)


def test_with_a_mask_each_block_stands_alone_and_only_what_counts_is_scored(teacher, blocks):
    mask = torch.zeros_like(blocks.test, dtype=torch.bool)
    mask[1, 5:9] = mask[3, 20:] = mask[4, 0] = True  # the first token is never predicted
    nats = kd.token_scores(teacher, None, blocks.test)["nll"]
    expected = torch.cat([nats[1, 4:8], nats[3, 19:]]).double().mean().exp().item()
    poisoned = blocks.test.clone()
    poisoned[1, 9:] = poisoned[0] = 7
    for ids in (blocks.test, poisoned):
        found = kd.evaluate(teacher, ids, mask=mask)
        assert found["perplexity"] == pytest.approx(expected, rel=1e-6)


def test_a_window_is_no_longer_than_positions_text_and_1024(make_gpt2, blocks):
    small, large = make_gpt2(1, n_positions=40), make_gpt2(1, n_positions=2048)
    few, many = torch.arange(24).view(3, 8), torch.arange(4096).view(2, 2048)
    assert [window_length(ids, large) for ids in (few, many)] == [24, 1024]
    assert window_length(many, large, small) == 40


def test_bits_per_byte_are_those_of_all_tokens_by_byte_of_text(model, blocks, tokenizer):
    with_end = reshaped(blocks.test, 2, 16).clone()
    with_end[1, 5] = tokenizer.eos_token_id  # which has no bytes
    found = kd.evaluate(model, with_end, tokenizer)
    written = [token for token in with_end.flatten()[1:] if token != tokenizer.eos_token_id]
    bits = math.log2(found["perplexity"]) * 31
    assert found["bits_per_byte"] == pytest.approx(bits / len(tokenizer.decode(written).encode()))


def test_the_padding_of_a_head_is_no_token(model, teacher, blocks):
    padded = padded_head(teacher, 8)
    for pair, same in [((model, padded), (model, teacher)), ((padded, model), (teacher, model))]:
        found, expected = (kd.evaluate(m, blocks.test, teacher=t) for m, t in (pair, same))
        assert found == pytest.approx(expected, rel=1e-6)


def test_models_in_half_precision_are_compared_in_float32_without_dropout_or_gradients(
    model, teacher, blocks
):
    model, teacher = model.bfloat16(), teacher.bfloat16()
    found = token_scores(model.train(), teacher.train(), blocks.test)
    assert not any(values.requires_grad for values in found.values())
    assert model.training and teacher.training
    model, teacher = model.eval(), teacher.eval()
    log_p, log_q = (
        m(blocks.test).logits[:, :-1].double().log_softmax(dim=-1) for m in (teacher, model)
    )
    nats = -log_q.gather(-1, blocks.test[:, 1:, None]).squeeze(-1)
    torch.testing.assert_close(found["nll"].double(), nats, rtol=1e-5, atol=1e-5)
    expected = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    torch.testing.assert_close(found["kl"].double(), expected, rtol=1e-4, atol=1e-5)


def test_the_quality_of_what_a_model_wrote(model, teacher, blocks):
    prompts = blocks.test[:2, :4]
    text = torch.tensor([[1, 2, 1, 2, 1, 2], [3, 4, 1, 2, 1, 5]])
    found = kd.text_quality(model, teacher, prompts, text)
    ids = torch.cat([prompts, text], dim=1)
    log_p, log_q = (m(ids).logits[:, 3:-1].double().log_softmax(dim=-1) for m in (teacher, model))
    assert found == pytest.approx(
        {
            "teacher_nll": -log_p.gather(-1, text[..., None]).mean().item(),
            "kl_to_teacher": (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean().item(),
            "distinct": 5 / 8,  # 121, 212; 341, 412, 121, 215
            "repetition": 2 / 8,  # the second 121 and 212 of the first text
        },
        rel=1e-4,
    )


# -- two models on the same blocks -----------------------------------------------------


def test_the_nats_of_a_block_are_those_of_reading_it_alone(model, blocks, monkeypatch):
    monkeypatch.setattr(evaluation, "LOGITS_AT_ONCE", 4 * 32 * 4096)
    sizes = []
    hook = model.register_forward_hook(lambda m, args, output: sizes.append(len(output.logits)))
    found = kd.block_nll(model, blocks.test)
    assert sizes == [4, 2]
    hook.remove()
    perplexities = [kd.evaluate(model, block[None])["perplexity"] for block in blocks.test]
    assert found.exp().tolist() == pytest.approx(perplexities, rel=1e-5)
    assert len(kd.block_nll(model, blocks.test[:1, :2])) == 1  # the shortest that can be read


def test_a_model_does_not_differ_from_itself_and_a_shift_is_certain():
    nats = torch.rand(20, generator=torch.Generator().manual_seed(0)).double()
    assert kd.paired_bootstrap(nats, nats) == (0, 0, 0)
    assert kd.paired_bootstrap(nats, nats + 0.25) == pytest.approx((-0.25, -0.25, -0.25))
    some = nats, nats.flip(0), 200
    first, again, other = (kd.paired_bootstrap(*some, seed=seed) for seed in (3, 3, 4))
    assert first == again != other


def test_the_interval_of_many_blocks_is_that_of_the_normal_distribution():
    draw = np.random.default_rng(0).normal
    a, b = draw(3.0, 0.5, size=2_000), draw(2.9, 0.4, size=2_000)
    difference, low, high = kd.paired_bootstrap(a, b, resamples=4_000)
    half_width = 1.96 * np.std(a - b) / math.sqrt(2_000)
    assert difference == pytest.approx((a - b).mean())
    assert [high - difference, difference - low] == pytest.approx([half_width] * 2, rel=0.06)


def test_what_is_hard_for_both_widens_nothing_only_if_the_blocks_are_paired():
    draw = np.random.default_rng(1).normal
    hard, noise = draw(3.0, 1.0, size=200), draw(0.1, 0.01, size=200)
    _, low, high = kd.paired_bootstrap(hard + noise, hard, resamples=500)
    assert 0 < low < 0.1 < high < 0.11
    _, low, high = kd.paired_bootstrap(hard + noise, hard[::-1], resamples=500)
    assert low < 0 < high


@pytest.mark.parametrize(
    ("confidence", "correct", "expected"),
    [
        ([0.0, 1.0], [0, 0], 0.5),
        # one bin: confidence 0.62, accuracy 1/2; another: 0.95 and 1; weighed by their tokens
        ([0.61, 0.63, 0.94, 0.95, 0.96], [1, 0, 1, 1, 1], (2 * 0.12 + 3 * 0.05) / 5),
        # errors of opposite sign cancel within a bin, never between bins
        ([0.62, 0.62, 0.95], [1, 0, 0], (2 * 0.12 + 0.95) / 3),
        ([0.03, 0.1], [1, 0], (0.97 + 0.1) / 2),
    ],
)
def test_the_calibration_error_of_worked_examples(confidence, correct, expected):
    found = calibration_error(torch.tensor(confidence), torch.tensor(correct))
    assert found == pytest.approx(expected, abs=1e-6)


def test_the_copy_gain_is_the_loss_after_other_text_less_that_after_the_copy(teacher, blocks):
    ids = blocks.test[:, :16]
    text, losses = ids[:, 8:], []
    for before in (ids[:, :8], text):
        logits = teacher(torch.cat([before, text], dim=1)).logits[:, 8:-1]
        losses.append(F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten()).item())
    assert kd.copy_gain(teacher, ids) == pytest.approx(losses[0] - losses[1], abs=1e-4)


# -- one table -------------------------------------------------------------------------

QUALITY = ["perplexity", "bits_per_byte", "calibration_error", "kl_to_teacher", "agreement"]
COSTS = ["parameters", "disk_mb", "memory_mb", "forward_ms", "token_ms"]


def test_a_model_is_one_row_compared_with_the_first(model, teacher, blocks, tokenizer, monkeypatch):
    def latency(models, ids):
        assert ids.shape == (1, 32)
        return dict.fromkeys(models, {"forward": 0.5, "per_token": 0.25})

    monkeypatch.setattr(evaluation, "latency", latency)
    models, texts = {"teacher": teacher, "model": model}, {"a licence": blocks.train[:3]}
    table = kd.compare(models, blocks, tokenizer, texts)
    assert table.index.tolist() == ["teacher", "model"]
    assert set(table.columns) == {*COSTS, *QUALITY, "perplexity on a licence"}
    for name, each in models.items():
        row = table.loc[name]
        assert row[QUALITY].to_dict() == kd.evaluate(each, blocks.test, tokenizer, teacher)
        further = kd.evaluate(each, texts["a licence"], teacher=teacher)
        assert row["perplexity on a licence"] == further["perplexity"]
    assert row["parameters"] == sum(p.numel() for p in model.parameters())
    assert row["disk_mb"] == pytest.approx(kd.size_on_disk(model) / 1e6)
    assert row["memory_mb"] == pytest.approx(cost.peak_memory(model, blocks.test[:1]) / 1e6)
    assert (row["forward_ms"], row["token_ms"]) == (500, 250)
    shown = kd.as_markdown(table).splitlines()
    assert len(shown) == 2 + len(table.columns)
    assert shown[-1].split("|")[1].strip() == "perplexity on a licence"


def test_a_model_with_a_short_context_can_be_compared(make_gpt2, blocks, tokenizer):
    table = kd.compare({"model": make_gpt2(layers=1, n_positions=32)}, blocks, tokenizer)
    assert table.notna().all(axis=None)


sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from intervals import with_intervals  # noqa: E402

T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)  # of 1, 2, 3 ... degrees


@pytest.mark.parametrize(("repeats", "t"), [(2, T[0]), (3, T[1]), (11, T[-1]), (50, T[-1])])
def test_an_interval_is_students(repeats, t):
    values = list(range(repeats))
    half_width = t * statistics.stdev(values) / math.sqrt(repeats)
    expected = {"a": statistics.mean(values), "± a": pytest.approx(half_width)}
    assert with_intervals([{"a": value} for value in values]) == expected
    assert with_intervals([{"a": 1.5}]) == {"a": 1.5}, "one repeat has no interval"


def test_a_table_is_markdown_with_a_column_a_model():
    rows = {
        "teacher": {"perplexity": 12.345, "parameters": 2_345_678, "token_ms": 1.5},
        "student": {"perplexity": 45.678, "parameters": 123, "token_ms": 0.25},
    }
    table = pd.DataFrame.from_dict(rows, orient="index")
    assert kd.as_markdown(table).split("\n") == [
        "|                         | teacher | student |",
        "| ----------------------- | ------- | ------- |",
        "| perplexity              | 12.3    | 45.7    |",
        "| parameters              | 2.35 M  | 123.0   |",
        "| generating a token (ms) | 1.50    | 0.250   |",
    ]


def test_a_number_has_the_digits_that_matter():
    shown = {-0.5: "-0.500", 0.9994: "0.999", 1.0: "1.00", 10.0: "10.0", 999.9: "999.9"}
    shown |= {1000.0: "1,000", 1_754_000: "1,754,000", math.nan: "-"}
    assert [number(value) for value in shown] == list(shown.values())
    shown = {1_543_210_000: "1,543.21 M", 1e5: "0.10 M", 99_999: "99,999"}
    assert [number(value, count=True) for value in shown] == list(shown.values())
