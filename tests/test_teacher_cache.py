"""The teacher's cache: the same student as from the teacher itself, and never a stale answer."""

import copy
import dataclasses
import shutil

import pytest
import torch

import willows_kd as kd
from willows_kd.files import cache_folder
from willows_kd.scale import teacher_cache


@pytest.fixture
def teacher(make_gpt2):
    return make_gpt2(layers=3, initializer_range=0.15)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "caches"


def train(teacher, blocks, student, loss=None, **changes):
    student = copy.deepcopy(student)
    config = kd.DistillConfig(**{"epochs": 2, "batch_size": 4} | changes)
    return student, kd.distill(teacher, student, blocks, config, loss=loss)


def tokens_of(blocks, teacher) -> int:
    return sum(part.numel() for part in teacher_cache.blocks_to_cache(blocks, teacher, None))


def files(folder):
    return sorted(folder.glob("*/*.safetensors"))


# -- the same answers ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "loss"), [(torch.float32, None), (torch.bfloat16, kd.ChunkedLoss)]
)
def test_it_is_found_again_and_gives_the_same_student_to_the_bit_without_the_teacher(
    teacher, blocks, folder, make_gpt2, dtype, loss, capsys
):
    teacher.to(dtype)
    student = make_gpt2(layers=1, seed=1)
    how = {"temperature": 4.0, "alpha": 0.5, "hidden_weight": 0.5, "loss": loss}
    live, history = train(teacher, blocks, student, **how)
    made = kd.cache_teacher(teacher, blocks, folder=folder)
    assert made.nbytes == tokens_of(blocks, teacher) * teacher.config.n_embd * 4
    assert f"outputs: {made.nbytes / 1e6:,.1f} MB in {folder}" in capsys.readouterr().out
    asked = []
    teacher.transformer.register_forward_pre_hook(lambda _, given: asked.append(len(given[0])))
    cache = kd.cache_teacher(teacher, blocks, folder=folder)
    cached, cached_history = train(cache, blocks, student, **how)
    assert asked == [1, 1]  # to see that logits are hidden states times weights
    assert capsys.readouterr().out == ""
    assert kd.fingerprint(cached) == kd.fingerprint(live)
    for row, other in zip(history, cached_history, strict=True):
        assert row | {"seconds": 0} == other | {"seconds": 0}
    with pytest.raises(kd.InputError, match="made for other blocks"):
        cache(blocks.test[:1])


def test_it_knows_the_windows_and_the_masked_blocks_that_a_student_is_evaluated_on(
    teacher, blocks, folder, make_gpt2
):
    student = make_gpt2(layers=1, seed=1)
    for masks in ({}, {"validation": torch.arange(32).expand(len(blocks.validation), -1) > 7}):
        given = dataclasses.replace(blocks, masks=masks)
        cache = kd.cache_teacher(teacher, given, folder=folder)
        rows = [train(each, given, student, epochs=1)[1][-1] for each in (teacher, cache)]
        assert rows[0]["validation_kl"] == rows[1]["validation_kl"] > 0
    with pytest.raises(kd.InputError, match="student reads 32 tokens, .* windows of 64"):
        train(cache, blocks, make_gpt2(layers=1, n_positions=32))


# -- the likeliest tokens, or drawn ones -----------------------------------------------


@pytest.mark.parametrize("possible", [None, 10], ids=["all", "few"])
def test_top_k_keeps_the_k_largest_and_the_rest_as_one_lump(
    teacher, blocks, folder, possible, capsys
):
    k, vocabulary = 20, teacher.config.vocab_size

    def rule_out(_module, _given, output):
        output.logits[..., possible:] = -torch.inf

    if possible:
        teacher.register_forward_hook(rule_out)
        with pytest.raises(kd.InputError, match="give top_k"):
            kd.cache_teacher(teacher, blocks, folder=folder)
    cache = kd.cache_teacher(teacher, blocks, top_k=k, folder=folder)
    assert cache.nbytes == tokens_of(blocks, teacher) * k * 8
    ids = blocks.train[:8]
    with torch.no_grad():
        logits = teacher(ids).logits
    error = kd.forward_kl(cache(ids).logits, logits).item()
    said = f"160 bytes per token; the error is {error:.2g} nats per token (KL)"
    assert said in capsys.readouterr().out
    p, q = logits.softmax(-1), cache(ids).logits.softmax(-1)
    kept = p.topk(k).indices
    torch.testing.assert_close(q.gather(-1, kept), p.gather(-1, kept), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(q.sum(-1), torch.ones(q.shape[:2]))
    rest = (1 - p.gather(-1, kept).sum(-1)) / (vocabulary - k)
    torch.testing.assert_close(q.min(-1).values, rest, rtol=1e-3, atol=1e-8)


def test_the_gradient_from_samples_is_on_average_that_from_the_teacher(teacher, blocks, folder):
    """The errors have the variance of multinomial draws, sum p (1 - p) / k, and no mean.

    Over n positions the square of their mean is then that variance / n; a bias would not
    shrink with n.
    """
    n = blocks.train.numel()
    student = torch.randn(*blocks.train.shape, 4096, generator=torch.Generator().manual_seed(0))
    student.requires_grad_()
    with torch.no_grad():
        logits = teacher(blocks.train).logits
    p = logits.softmax(-1)

    def gradients(of_teacher):
        return n * torch.autograd.grad(kd.forward_kl(student, of_teacher), student)[0]

    cache = kd.cache_teacher(teacher, blocks, samples=4, folder=folder)
    error = gradients(cache(blocks.train).logits) - gradients(logits)
    variance = (p * (1 - p)).sum(dim=-1).mean().item() / 4
    assert error.square().sum(dim=-1).mean().item() == pytest.approx(variance, rel=0.05)
    mean = error.mean(dim=(0, 1))
    assert n * mean.square().sum().item() == pytest.approx(variance, rel=0.25)


@pytest.mark.parametrize(("vocabulary", "nbytes"), [(65_536, 2), (65_537, 4)])
def test_samples_are_small_the_same_each_time_and_of_the_training_blocks_only(
    make_gpt2, blocks, folder, capsys, vocabulary, nbytes
):
    teacher = make_gpt2(vocab_size=vocabulary, n_embd=4, initializer_range=1.0)
    blocks = dataclasses.replace(blocks, train=blocks.train[:3])
    cache = kd.cache_teacher(teacher, blocks, samples=30, folder=folder)
    assert cache.nbytes == blocks.train.numel() * 30 * nbytes
    said = f"{30 * nbytes} bytes per token; 30 drawn at each position, right only on average"
    assert said in capsys.readouterr().out
    again = kd.cache_teacher(teacher, blocks, samples=30, folder=folder / "again")
    logits = cache(blocks.train).logits
    assert torch.equal(again(blocks.train).logits, logits)
    assert logits.exp().sum(-1).numpy() == pytest.approx(1)
    assert logits.exp().max() > 1.5 / 30  # a likely token is drawn again
    assert cache.fingerprint != kd.fingerprint(teacher)
    with torch.no_grad():  # every token that was drawn is one that the teacher knows
        assert kd.forward_kl(teacher(blocks.train).logits, logits).isfinite()
    with pytest.raises(kd.InputError, match="with samples for those of training only"):
        cache(blocks.validation)


def test_with_samples_a_student_is_evaluated_without_the_teacher(
    teacher, blocks, folder, make_gpt2
):
    cache = kd.cache_teacher(teacher, blocks, samples=5, folder=folder)
    _, history = train(cache, blocks, make_gpt2(layers=1, n_positions=32), epochs=1)
    assert history[-1]["validation_kl"] is None


# -- kept, never stale -----------------------------------------------------------------


def test_another_question_gets_another_cache(teacher, blocks):
    other = copy.deepcopy(teacher)
    other.transformer.h[0].attn.c_attn.bias.data[0] += 1e-3
    rebuilt = copy.deepcopy(teacher)
    rebuilt.config.layer_norm_epsilon = 1e-4
    train, validation = (
        dataclasses.replace(blocks, **{part: getattr(blocks, part).flip(0)})
        for part in ("train", "validation")
    )
    asked = [
        *((teacher, blocks, {}), (other, blocks, {}), (rebuilt, blocks, {})),
        *((teacher, train, {}), (teacher, validation, {})),
        *((teacher, blocks, {"top_k": 3}), (teacher, blocks, {"samples": 3})),
    ]
    for model, text, how in asked + asked:
        kd.cache_teacher(model, text, **how)
    assert len(list((cache_folder() / "teachers").iterdir())) == len(asked)


def test_a_stopped_run_goes_on_where_it_stopped_and_a_damaged_shard_alone_is_made_again(
    teacher, blocks, folder, monkeypatch
):
    monkeypatch.setattr(teacher_cache, "SHARD", 8)
    kd.cache_teacher(teacher, blocks, folder=folder, samples=3)
    whole = [file.read_bytes() for file in files(folder)]
    passes = []

    def stop(_module, args):
        passes.extend(args[0] if len(args[0]) > 1 else [])
        if len(passes) == 3 * 8:
            raise KeyboardInterrupt

    again = folder / "again"
    teacher.transformer.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        kd.cache_teacher(teacher, blocks, folder=again, samples=3)
    first, second = files(again)
    assert [file.read_bytes() for file in files(again)] == whole[:2]
    (first.parent / ".000002.safetensors.12345678.partial").mkdir()  # half written
    second.write_bytes(whole[1][: len(whole[1]) // 2])
    made = first.stat().st_mtime_ns
    teacher.transformer._forward_pre_hooks.clear()
    kd.cache_teacher(teacher, blocks, folder=again, samples=3)
    assert [file.read_bytes() for file in files(again)] == whole
    assert first.stat().st_mtime_ns == made
    assert not list(again.glob("*/.*"))


@pytest.mark.parametrize("full", [False, True])
def test_where_nothing_can_be_written_the_teacher_is_asked_and_a_warning_says_so(
    teacher, blocks, folder, monkeypatch, full
):
    if full:
        no_room = shutil._ntuple_diskusage(2_000, 1_000, 1_000)
        monkeypatch.setattr(teacher_cache.shutil, "disk_usage", lambda _: no_room)
    else:
        folder.write_text("in the way")
    said = "it takes 0.1 MB, and 0.0 MB are free" if full else "no cache, the teacher is asked"
    with pytest.warns(UserWarning, match=said):
        assert kd.cache_teacher(teacher, blocks, folder=folder) is teacher
    assert not files(folder)


def test_what_allows_no_cache_is_refused(teacher, blocks, folder, make_gpt2):
    for said, model, how in (
        ("top_k is 4096; it must be a whole number from 1 to 4095", teacher, {"top_k": 4096}),
        ("samples is 0; it must be a whole number from 1", teacher, {"samples": 0}),
        ("top_k and samples are 5 and 5; give only one", teacher, {"samples": 5, "top_k": 5}),
        ("predicts no tokens; load it with AutoModelFor", teacher.base_model, {"top_k": 3}),
        ("blocks have 32 tokens, the teacher takes at most 16", make_gpt2(n_positions=16), {}),
    ):
        with pytest.raises(kd.InputError, match=said):
            kd.cache_teacher(model, blocks, folder=folder, **how)
    assert not folder.exists()
