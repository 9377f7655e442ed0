"""The teacher's cache: the same student as from the teacher itself, and never a stale answer."""

import copy
import dataclasses
import errno
import shutil

import numpy as np
import pytest
import torch

import willows_kd as kd
from willows_kd import files as files_module
from willows_kd.distillation import DistillationLoss
from willows_kd.files import cache_folder
from willows_kd.models import weights_digest
from willows_kd.scale import teacher_cache
from willows_kd.scale.teacher_cache import Kept, TeacherCache, blocks_to_cache, digest


@pytest.fixture
def teacher(make_gpt2):
    return make_gpt2(layers=3, initializer_range=0.15)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "caches"


def forbid(model):
    """Any pass through the model from here on is an error."""

    def refuse(*_):
        raise AssertionError("the teacher was asked")

    return model.base_model.register_forward_pre_hook(refuse)


def train(teacher, blocks, student, **changes):
    student = copy.deepcopy(student)
    config = kd.DistillConfig(**{"epochs": 2, "batch_size": 4} | changes)
    return student, kd.distill(teacher, student, blocks, config)


def files(folder):
    return sorted(folder.glob("*/*"))


@pytest.fixture
def shards_of_8(monkeypatch):
    """A cache of the test's blocks in four files or five."""
    monkeypatch.setattr(teacher_cache, "SHARD", 8)


# -- the same answers ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_student_is_the_same_to_the_bit_and_the_teacher_is_not_asked(
    teacher, blocks, folder, make_gpt2, dtype
):
    teacher.to(dtype)
    student = make_gpt2(layers=1, seed=1)
    how = {"temperature": 4.0, "alpha": 0.5}
    live, history = train(teacher, blocks, student, **how)
    cache = kd.cache_teacher(teacher, blocks, folder=folder)
    forbid(teacher)
    cached, cached_history = train(cache, blocks, student, **how)
    pairs = zip(live.state_dict().values(), cached.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    for row, other in zip(history, cached_history, strict=True):
        assert row | {"seconds": 0} == other | {"seconds": 0}


def test_it_answers_quality_as_the_teacher_does(teacher, blocks, folder):
    student = kd.student_from_teacher(teacher)
    cache = kd.cache_teacher(teacher, blocks, folder=folder)
    assert kd.quality(student, blocks.validation, teacher=cache) == kd.quality(
        student, blocks.validation, teacher=teacher
    )


def test_a_block_that_it_does_not_know_is_refused(teacher, blocks, folder):
    cache = kd.cache_teacher(teacher, blocks, folder=folder)
    with pytest.raises(kd.InputError, match="made for other blocks"):
        cache(blocks.test[:1])


def test_float16_halves_it_and_says_what_that_costs(teacher, blocks, folder, capsys):
    whole = kd.cache_teacher(teacher, blocks, folder=folder)
    assert "KL" not in capsys.readouterr().out
    half = kd.cache_teacher(teacher, blocks, dtype="float16", folder=folder)
    assert half.nbytes == whole.nbytes / 2
    said = capsys.readouterr().out
    lost = float(said.split("error is ")[1].split()[0])
    ids = blocks_to_cache(blocks, teacher.config.vocab_size, Kept())
    with torch.no_grad():
        few = ids[:: max(1, len(ids) // 8)][:8]
        wanted = kd.forward_kl(half(few).logits, teacher(few).logits).item()
    assert lost == pytest.approx(wanted, rel=0.1, abs=1e-8)
    assert lost < 1e-4


def test_top_k_keeps_the_k_largest_and_the_rest_as_one_lump(teacher, blocks, folder):
    k, vocabulary = 5, teacher.config.vocab_size
    cache = kd.cache_teacher(teacher, blocks, top_k=np.int64(k), folder=folder)
    assert len(list(folder.iterdir())) == 1
    kd.cache_teacher(teacher, blocks, top_k=k, folder=folder)
    assert len(list(folder.iterdir())) == 1  # the same cache for the same number
    ids = blocks.train[:2]
    with torch.no_grad():
        p = teacher(ids).logits.softmax(-1)
    q = cache(ids).logits.softmax(-1)
    kept = p.topk(k).indices
    torch.testing.assert_close(q.gather(-1, kept), p.gather(-1, kept), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(q.sum(-1), torch.ones(q.shape[:2]))
    rest = (1 - p.gather(-1, kept).sum(-1)) / (vocabulary - k)
    torch.testing.assert_close(q.min(-1).values, rest, rtol=1e-3, atol=1e-8)
    assert cache.nbytes == blocks_to_cache(blocks, vocabulary, Kept()).numel() * k * 8


def test_more_of_the_k_lose_less_and_a_student_learns_from_them(teacher, blocks, folder):
    perplexity = {
        k: kd.quality(kd.cache_teacher(teacher, blocks, top_k=k, folder=folder), blocks.validation)
        for k in (4, 64, teacher.config.vocab_size - 1)
    }
    exact = kd.quality(teacher, blocks.validation)["perplexity"]
    gaps = [abs(np.log(found["perplexity"] / exact)) for found in perplexity.values()]
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-4
    cache = kd.cache_teacher(teacher, blocks, top_k=64, folder=folder)
    _, history = train(cache, blocks, kd.student_from_teacher(teacher), epochs=4)
    assert history[-1]["loss"] < history[0]["loss"]


# -- samples of its distribution -------------------------------------------------------


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

    for samples in (1, 4, 64):
        cache = kd.cache_teacher(teacher, blocks, samples=samples, folder=folder)
        error = gradients(cache(blocks.train).logits) - gradients(logits)
        variance = (p * (1 - p)).sum(dim=-1).mean().item() / samples
        assert error.square().sum(dim=-1).mean().item() == pytest.approx(variance, rel=0.05)
        mean = error.mean(dim=(0, 1))
        assert n * mean.square().sum().item() == pytest.approx(variance, rel=0.25)


def test_samples_are_small_the_same_each_time_and_of_the_training_blocks_only(
    teacher, blocks, folder, tmp_path, capsys
):
    cache = kd.cache_teacher(teacher, blocks, samples=np.int64(5), folder=folder)
    assert (cache.samples, cache.top_k) == (5, None)
    assert cache.nbytes == blocks.train.numel() * 5 * 2
    said = "10 bytes per token; 5 drawn at each position, right only on average"
    assert said in capsys.readouterr().out
    again = kd.cache_teacher(teacher, blocks, samples=5, folder=tmp_path / "again")
    ids = blocks.train[3:5]
    assert torch.equal(again(ids).logits, cache(ids).logits)
    assert cache(ids).logits.exp().sum(-1).numpy() == pytest.approx(1)
    with pytest.raises(kd.InputError, match="samples of the training blocks only, so ask the"):
        kd.quality(kd.student_from_teacher(teacher), blocks.validation, teacher=cache)


@pytest.mark.parametrize(("vocabulary", "nbytes"), [(200, 1), (65_536, 2), (65_537, 4)])
def test_a_sampled_token_takes_the_fewest_bytes_that_hold_it(
    make_gpt2, blocks, folder, vocabulary, nbytes
):
    teacher = make_gpt2(vocab_size=vocabulary, n_embd=4, initializer_range=1.0)
    few = dataclasses.replace(blocks, train=blocks.train[:2] % vocabulary)
    cache = kd.cache_teacher(teacher, few, samples=30, folder=folder)
    assert cache.nbytes == few.train.numel() * 30 * nbytes
    with torch.no_grad():
        nats = kd.forward_kl(teacher(few.train).logits, cache(few.train).logits)
    assert nats.isfinite()  # every token that was drawn is one that the teacher knows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_student_learns_from_samples_with_finite_gradients(teacher, blocks, folder, dtype):
    cache = kd.cache_teacher(teacher, blocks, samples=5, folder=folder)
    student = kd.student_from_teacher(teacher)
    ids = blocks.train[:4]
    objective = DistillationLoss(cache, student, kd.DistillConfig(dtype=dtype), ids[:1])
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    losses = []
    for _ in range(8):
        losses.append(objective(cache, ids)[0])
        losses[-1].backward()
        assert all(weight.grad.isfinite().all() for weight in student.parameters())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


# -- kept, found again, never stale ----------------------------------------------------


def test_it_is_found_again_without_asking_the_teacher(teacher, blocks, folder, capsys):
    kd.cache_teacher(teacher, blocks, folder=folder)
    said = capsys.readouterr().out
    size = (
        blocks_to_cache(blocks, teacher.config.vocab_size, Kept()).numel()
        * teacher.config.n_embd
        * 4
    )
    assert f"{size / 1e6:,.1f} MB" in said
    with torch.no_grad():
        ids = blocks.train[:1]
        wanted = teacher(ids).logits
    teacher.transformer.register_forward_pre_hook(lambda _m, args: assert_one_block(args))
    again = kd.cache_teacher(teacher, blocks, folder=folder)
    assert isinstance(again, TeacherCache)
    assert capsys.readouterr().out == ""
    torch.testing.assert_close(again(ids).logits, wanted)


def assert_one_block(args):
    """Whether logits are hidden states times weights is seen by one block; no more is asked."""
    assert len(args[0]) == 1


OTHER = {"dtype": "float16", "top_k": 3, "samples": 3}


@pytest.mark.parametrize("what", ["weights", "blocks", "validation", "settings", *OTHER])
def test_another_question_gets_another_cache(teacher, blocks, folder, what):
    kd.cache_teacher(teacher, blocks, folder=folder)
    how = {}
    if what == "weights":
        with torch.no_grad():
            teacher.transformer.h[0].attn.c_attn.bias[0] += 1e-3
    elif what in ("blocks", "validation"):
        part = "train" if what == "blocks" else "validation"
        blocks = dataclasses.replace(blocks, **{part: getattr(blocks, part).flip(0)})
    elif what == "settings":
        teacher.config.layer_norm_epsilon = 1e-4
    else:
        how = {what: OTHER[what]}
    kd.cache_teacher(teacher, blocks, folder=folder, **how)
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("samples", [None, 5])
@pytest.mark.parametrize("damage", ["flip a bit", "cut", "gone"])
def test_a_damaged_shard_is_noticed_and_made_again_alone(
    teacher, blocks, folder, shards_of_8, damage, samples
):
    first = kd.cache_teacher(teacher, blocks, samples=samples, folder=folder)
    with torch.no_grad():
        wanted = first(blocks.train).logits
    file = files(folder)[1]
    whole = file.read_bytes()
    before = {other: other.stat().st_mtime_ns for other in files(folder) if other != file}
    if damage == "flip a bit":
        file.write_bytes(whole[:-7] + bytes([whole[-7] ^ 16]) + whole[-6:])
    elif damage == "cut":
        file.write_bytes(whole[: len(whole) // 2])
    else:
        file.unlink()
    cache = kd.cache_teacher(teacher, blocks, samples=samples, folder=folder)
    assert file.read_bytes() == whole
    assert {other: other.stat().st_mtime_ns for other in before} == before
    with torch.no_grad():
        assert torch.equal(cache(blocks.train).logits, wanted)


def test_what_a_killed_run_left_is_removed(teacher, blocks, folder):
    ids = blocks_to_cache(blocks, teacher.config.vocab_size, Kept())
    place = folder / digest(weights_digest(teacher), ids, Kept())
    left = place / ".000000.safetensors.12345.partial"
    left.mkdir(parents=True)
    (left / "000000.safetensors").write_bytes(b"half")
    (place / "000000.lock").touch()
    kd.cache_teacher(teacher, blocks, folder=folder)
    assert [file.name for file in files(folder)] == ["000000.safetensors", "000001.safetensors"]


@pytest.mark.parametrize("kept", [{}, {"top_k": 3}, {"samples": 3}], ids=str)
def test_a_stopped_run_goes_on_where_it_stopped_with_the_same_bits(
    teacher, blocks, folder, tmp_path, shards_of_8, kept
):
    kd.cache_teacher(teacher, blocks, folder=folder, **kept)
    whole = [file.read_bytes() for file in files(folder)]
    passes = []

    def stop(_module, args):
        passes.extend(args[0] if len(args[0]) > 1 else [])
        if len(passes) == 3 * 8:
            raise KeyboardInterrupt

    again = tmp_path / "again"
    teacher.transformer.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        kd.cache_teacher(teacher, blocks, folder=again, **kept)
    assert [file.read_bytes() for file in files(again) if file.suffix != ".lock"] == whole[:2]
    passes.clear()
    teacher.transformer._forward_pre_hooks.clear()
    teacher.transformer.register_forward_pre_hook(stop)
    kd.cache_teacher(teacher, blocks, folder=again, **kept)
    assert [file.read_bytes() for file in files(again)] == whole


def test_where_nothing_can_be_written_the_teacher_is_asked_and_a_warning_says_so(
    teacher, blocks, tmp_path
):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="no cache, the teacher is asked each time"):
        found = kd.cache_teacher(teacher, blocks, folder=tmp_path / "file")
    assert found is teacher


def test_a_disk_without_room_is_noticed_before_the_teacher_is_asked(
    teacher, blocks, folder, monkeypatch
):
    full = shutil._ntuple_diskusage(2_000, 1_000, 1_000)
    monkeypatch.setattr(teacher_cache.shutil, "disk_usage", lambda _: full)
    teacher.transformer.register_forward_pre_hook(lambda _m, args: assert_one_block(args))
    with pytest.warns(UserWarning, match="it takes 0.1 MB, and 0.0 MB are free"):
        assert kd.cache_teacher(teacher, blocks, folder=folder) is teacher


def test_a_disk_that_fills_up_keeps_the_shards_that_were_written(
    teacher, blocks, folder, shards_of_8, monkeypatch
):
    save_file = files_module.save_file

    def full(tensors, path, *more):
        save_file(tensors, path, *more)
        if path.name > "000002":
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files_module, "save_file", full)
    with pytest.warns(UserWarning, match="asked each time: .*: No space left on device"):
        assert kd.cache_teacher(teacher, blocks, folder=folder) is teacher
    written = [file for file in files(folder) if file.suffix != ".lock"]
    assert [file.name for file in written] == ["000000.safetensors", "000001.safetensors"]
    before = [file.stat().st_mtime_ns for file in written]
    monkeypatch.undo()
    monkeypatch.setattr(teacher_cache, "SHARD", 8)
    assert isinstance(kd.cache_teacher(teacher, blocks, folder=folder), TeacherCache)
    assert [file.stat().st_mtime_ns for file in written] == before


def test_by_default_it_lies_in_the_users_cache(teacher, blocks):
    kd.cache_teacher(teacher, blocks)
    assert files(cache_folder() / "teachers")


# -- what cannot be --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8'; it must be one of float32, float16"),
        ({"top_k": True}, "top_k is True; it must be a whole number from 1 to 4095"),
        ({"top_k": 4096}, "top_k is 4096; it must be a whole number from 1 to 4095"),
        ({"samples": 0}, "samples is 0; it must be a whole number, at least 1"),
        ({"samples": 2.5}, "samples is 2.5; it must be a whole number, at least 1"),
        ({"samples": 5, "top_k": 5}, "top_k is 5 and samples is 5; give only one of them"),
    ],
)
def test_a_setting_that_cannot_be_is_named(teacher, blocks, folder, how, message):
    with pytest.raises(kd.InputError, match=message):
        kd.cache_teacher(teacher, blocks, folder=folder, **how)
    assert not folder.exists()


def test_a_teacher_whose_logits_are_more_than_a_product_needs_top_k(teacher, blocks, folder):
    head = torch.nn.Linear(teacher.config.n_embd, teacher.config.vocab_size)
    torch.nn.init.normal_(head.bias)
    teacher.set_output_embeddings(head)
    with pytest.raises(kd.InputError, match="give top_k to keep log-probabilities instead"):
        kd.cache_teacher(teacher, blocks, folder=folder)
    cache = kd.cache_teacher(teacher, blocks, top_k=4, folder=folder)
    with torch.no_grad():
        best = teacher(blocks.train[:2]).logits.argmax(-1)
    assert torch.equal(cache(blocks.train[:2]).logits.argmax(-1), best)


def test_tokens_that_the_teacher_rules_out_get_no_probability(teacher, blocks, folder):
    possible, k = 10, 20
    forward = teacher.forward

    def ruled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits[..., possible:] = -torch.inf
        return output

    teacher.forward = ruled
    with pytest.raises(kd.InputError, match="give top_k"):
        kd.cache_teacher(teacher, blocks, folder=folder)
    cache = kd.cache_teacher(teacher, blocks, top_k=k, folder=folder)
    ids = blocks.train[:2]
    with torch.no_grad():
        wanted = teacher(ids).logits.softmax(-1)
    torch.testing.assert_close(cache(ids).logits.softmax(-1), wanted, rtol=1e-5, atol=1e-6)


def test_a_teacher_without_a_head_or_with_too_few_positions_is_refused(
    teacher, blocks, folder, make_gpt2
):
    with pytest.raises(kd.InputError, match="predicts no tokens; load it with AutoModelFor"):
        kd.cache_teacher(teacher.base_model, blocks, top_k=3, folder=folder)
    with pytest.raises(kd.InputError, match="blocks have 32 tokens, the teacher takes at most 16"):
        kd.cache_teacher(make_gpt2(n_positions=16), blocks, folder=folder)
