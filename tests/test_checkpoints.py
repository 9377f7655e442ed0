"""Checkpoints: stopped anywhere and resumed, the student is the same, to the bit."""

import copy
import dataclasses
import errno
import math
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from filelock import FileLock
from torch import nn

import willows_kd as kd
from willows_kd import files
from willows_kd.errors import WriteError
from willows_kd.scale import checkpoints as checkpoints_file
from willows_kd.scale.checkpoints import LOCK, Checkpoints

CONFIG = kd.DistillConfig(
    epochs=2,
    batch_size=5,
    gradient_accumulation_steps=2,
    dropout=0.2,
    alpha=0.3,
    learning_rate=3e-3,
)
STEPS = 6  # of two epochs over 24 blocks, ten at a time
EVERY_STEP = 0.0


@pytest.fixture
def student(make_gpt2):
    """A tiny student whose start has nothing to do with the teacher."""
    return make_gpt2(layers=1, seed=1)


@pytest.fixture(autouse=True)
def sigint_raises():
    """Ctrl-C interrupts, even if it is ignored where the tests were started (`nohup`)."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "checkpoints"


def run(teacher, student, blocks, folder=None, resume=False, on_step=None, minutes=EVERY_STEP):
    kept = folder and Checkpoints(folder, minutes)
    return kd.distill(teacher, student, blocks, CONFIG, on_step, kept, resume)


def ctrl_c(step: int):
    """What presses Ctrl-C once a step is done."""

    def on_step(row):
        if row["step"] == step:
            signal.raise_signal(signal.SIGINT)

    return on_step


def killed(step: int):
    """What ends a run after a step as suddenly as Python can."""

    def on_step(row):
        if row["step"] == step:
            raise SystemExit

    return on_step


def without_time(history: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history]


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.fixture
def uninterrupted(teacher, student, blocks):
    """The history and the student of a run that nothing happened to."""
    trained = copy.deepcopy(student)
    return run(teacher, trained, blocks), trained


# -- stopped and resumed ---------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 3, STEPS])  # the first, the end of an epoch, the last
def test_a_run_stopped_by_ctrl_c_goes_on_as_if_nothing_had_happened(
    step, teacher, student, blocks, folder, uninterrupted
):
    stopped = copy.deepcopy(student)
    history = run(teacher, stopped, blocks, folder, on_step=ctrl_c(step), minutes=1e6)
    assert without_time(history) == without_time(uninterrupted[0][:step])
    assert same(stopped, uninterrupted[1]) == (step == STEPS)

    for again in (stopped, copy.deepcopy(student)):  # the next cell, or a new kernel
        history = run(teacher, again, blocks, folder, resume=True)
        assert without_time(history) == without_time(uninterrupted[0])
        assert same(again, uninterrupted[1])


def test_a_student_that_writes_its_own_text_goes_on_as_well(teacher, student, blocks, folder):
    config = dataclasses.replace(
        CONFIG, alpha=0.0, on_policy_share=1.0, hidden_weight=0.5, hidden_layers=((1, 2),)
    )
    whole, stopped = copy.deepcopy(student), copy.deepcopy(student)
    expected = kd.distill(teacher, whole, blocks, config)
    kd.distill(teacher, stopped, blocks, config, ctrl_c(4), folder)
    history = kd.distill(teacher, student, blocks, config, None, folder, resume=True)
    assert without_time(history) == without_time(expected)
    assert same(student, whole)


def test_a_run_may_die_again_and_again(teacher, student, blocks, folder, uninterrupted):
    for step in range(2, STEPS + 1):
        with pytest.raises(SystemExit):
            run(teacher, copy.deepcopy(student), blocks, folder, True, killed(step))
        assert len(Checkpoints(folder).newest().history) == step - 1  # killed before step's own
    history = run(teacher, student, blocks, folder, resume=True)
    assert without_time(history) == without_time(uninterrupted[0])
    assert same(student, uninterrupted[1])
    assert history == sorted(history, key=lambda row: row["seconds"])  # time adds up, too


def test_a_finished_run_is_not_run_again(teacher, student, blocks, folder, uninterrupted):
    history = run(teacher, copy.deepcopy(student), blocks, folder)
    assert run(teacher, student, blocks, folder, True, lambda row: pytest.fail("a step")) == history
    assert same(student, uninterrupted[1])


def test_with_nothing_to_resume_it_starts_afresh_and_says_so(
    teacher, student, blocks, folder, uninterrupted, capsys
):
    history = run(teacher, student, blocks, folder, resume=True)
    assert f"Nothing to resume in {folder}: starting from the beginning" in capsys.readouterr().out
    assert without_time(history) == without_time(uninterrupted[0])
    assert same(student, uninterrupted[1])


def test_resume_without_a_folder_is_refused(teacher, student, blocks):
    with pytest.raises(kd.InputError, match="name the folder"):
        run(teacher, student, blocks, resume=True)


def test_the_cache_stands_in_for_its_teacher(
    teacher, student, blocks, folder, uninterrupted, tmp_path
):
    run(teacher, copy.deepcopy(student), blocks, folder, on_step=ctrl_c(2))
    cache = kd.cache_teacher(teacher, blocks, folder=tmp_path / "cache")
    run(cache, student, blocks, folder, resume=True)
    assert same(student, uninterrupted[1])

    rounded = kd.cache_teacher(teacher, blocks, "float16", folder=tmp_path / "cache")
    with pytest.raises(kd.InputError, match="the teacher's weights or config differ"):
        run(rounded, student, blocks, folder, resume=True)


def test_a_frozen_part_is_restored_and_stays_frozen(teacher, student, blocks, folder):
    student.transformer.wte.weight.requires_grad_(False)
    whole, stopped = copy.deepcopy(student), copy.deepcopy(student)
    run(teacher, whole, blocks)
    run(teacher, stopped, blocks, folder, on_step=ctrl_c(3))
    run(teacher, student, blocks, folder, resume=True)
    assert same(student, whole)


# -- another run than the checkpoint's -------------------------------------------------


def test_other_settings_are_refused_by_name(teacher, student, blocks, folder):
    run(teacher, copy.deepcopy(student), blocks, folder, on_step=ctrl_c(2))
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    weights = copy.deepcopy(student)
    with pytest.raises(kd.InputError, match="cannot resume from") as refused:
        config = dataclasses.replace(CONFIG, seed=1, alpha=0.0)
        kd.distill(teacher, student, blocks, config, None, folder, True)
    assert ": alpha was 0.3, is 0.0, seed was 0, is 1; resume with" in str(refused.value)
    assert same(student, weights)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize("what", ["teacher", "text", "student", "layers"])
def test_another_teacher_text_or_student_is_refused(
    what, teacher, student, blocks, folder, make_gpt2
):
    run(teacher, copy.deepcopy(student), blocks, folder, on_step=ctrl_c(2))
    said = {"teacher": "the teacher's weights or config differ", "text": "the text or its blocks"}
    if what == "teacher":
        teacher = make_gpt2(seed=5)
    elif what == "text":
        blocks = dataclasses.replace(blocks, train=blocks.train.flip(0))
    else:
        student = make_gpt2(layers=2 if what == "layers" else 1, seed=7)
    weights = copy.deepcopy(student)
    with pytest.raises(kd.InputError, match="cannot resume from") as refused:
        run(teacher, student, blocks, folder, resume=True)
    assert said.get(what, "the student's weights are neither") in str(refused.value)
    assert same(student, weights)


def test_a_new_run_in_the_same_folder_replaces_the_old_one(teacher, student, blocks, folder):
    run(teacher, copy.deepcopy(student), blocks, folder)
    with pytest.raises(SystemExit):
        run(teacher, copy.deepcopy(student), blocks, folder, on_step=killed(3))
    assert Checkpoints(folder).files()[0].name == "step_00000002.safetensors"


# -- what is on the disk ---------------------------------------------------------------


def test_the_last_two_are_kept_at_each_epochs_end(teacher, student, blocks, folder):
    run(teacher, student, blocks, folder, minutes=1e6)
    assert [file.name for file in Checkpoints(folder).files()] == [
        "step_00000006.safetensors",
        "step_00000003.safetensors",
    ]


def test_the_interval_is_one_of_time_that_no_clock_disturbs(
    teacher, student, blocks, folder, monkeypatch
):
    now, saved = [1000.0], []
    monkeypatch.setattr(checkpoints_file.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: -1e9)  # the clock jumps
    save = Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda *a: (saved.append(len(a[3])), save(*a)))

    def on_step(row):
        now[0] += 30

    run(teacher, student, blocks, folder, on_step=on_step, minutes=1)
    assert saved == [2, 3, 5, 6]  # after a minute; an epoch; a minute more; an epoch


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: b"<html>not found</html>",
        lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
    ],
    ids=["half", "empty", "a web page", "a bit"],
)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    damage, teacher, student, blocks, folder, uninterrupted, capsys
):
    run(teacher, copy.deepcopy(student), blocks, folder, on_step=ctrl_c(4))
    newest, before = Checkpoints(folder).files()
    newest.write_bytes(damage(newest.read_bytes()))
    run(teacher, student, blocks, folder, resume=True)
    assert f"Going on after step 3, from checkpoints/{before.name}" in capsys.readouterr().out
    assert same(student, uninterrupted[1])


def test_with_all_damaged_it_starts_afresh(teacher, student, blocks, folder, uninterrupted, capsys):
    run(teacher, copy.deepcopy(student), blocks, folder, on_step=ctrl_c(4))
    for file in Checkpoints(folder).files():
        file.write_bytes(b"")
    run(teacher, student, blocks, folder, resume=True)
    assert "Nothing to resume" in capsys.readouterr().out
    assert same(student, uninterrupted[1])


def test_bits_flipped_anywhere_are_noticed_or_harmless(teacher, student, blocks, folder):
    run(teacher, copy.deepcopy(student), blocks, folder, on_step=ctrl_c(4))
    newest = Checkpoints(folder).files()[0]
    expected, data = Checkpoints(folder).newest(), newest.read_bytes()
    draw = random.Random(0)
    header = 8 + int.from_bytes(data[:8], "little")
    places = [draw.randrange(end) for end in 30 * (header, len(data))]
    noticed = 0
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1 << draw.randrange(8)
        newest.write_bytes(changed)
        found = Checkpoints(folder).newest()
        if found.file == newest:
            assert found.history == expected.history
            assert found.tensors.keys() == expected.tensors.keys()
            assert all(torch.equal(found.tensors[k], v) for k, v in expected.tensors.items())
        noticed += found.file != newest
    assert noticed > 50


def test_a_history_larger_than_a_safetensors_header_fits(student, folder):
    history = [{"step": step, "note": "x" * 1_000_000} for step in range(101)]
    Checkpoints(folder).save(student, torch.optim.AdamW(student.parameters()), history, {})
    assert Checkpoints(folder).newest().history == history


def test_an_interval_that_is_none_is_refused(folder):
    for minutes in (-1, math.nan, math.inf, "5", True, None):
        with pytest.raises(kd.InputError, match=f"minutes are {minutes!r}; they must be at least"):
            Checkpoints(folder, minutes)
    assert Checkpoints(folder, np.float32(0.5)).minutes == 0.5
    assert not folder.exists()


def test_a_checkpoint_holds_a_student_if_every_weight_is_the_same(student, make_gpt2, folder):
    positions = student.transformer.wpe.weight
    positions.data = positions.data.T.contiguous().T  # safetensors writes contiguous ones only
    Checkpoints(folder).save(student, torch.optim.AdamW(student.parameters()), [], {})
    found = Checkpoints(folder).newest()
    assert found.holds(student)
    positions.data[0, 0] += 1
    assert not found.holds(student)
    assert not found.holds(make_gpt2(layers=1, n_positions=32))
    assert not found.holds(make_gpt2(layers=5))


def test_numpy_numbers_can_be_saved(student, folder):
    row, run_of = {"loss": np.float32(0.5)}, {"settings": {"epochs": np.int64(2)}}
    Checkpoints(folder).save(student, torch.optim.AdamW(student.parameters()), [row], run_of)
    assert Checkpoints(folder).newest().history == [row]
    assert Checkpoints(folder).newest().run == run_of


# -- faults ----------------------------------------------------------------------------


def test_an_old_checkpoint_that_cannot_be_removed_stays(
    teacher, student, blocks, folder, monkeypatch
):
    """On Windows a file that somebody has open is kept."""
    monkeypatch.setattr(Path, "unlink", mock.Mock(side_effect=PermissionError))
    run(teacher, student, blocks, folder)
    assert len(Checkpoints(folder).files()) == STEPS


def test_where_a_checkpoint_cannot_be_written_training_goes_on(
    teacher, student, blocks, folder, uninterrupted, monkeypatch, capsys
):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    save_file = files.save_file
    monkeypatch.setattr(
        files, "save_file", lambda *a: full() if "00004" in str(a[1]) else save_file(*a)
    )
    with pytest.raises(SystemExit):
        run(teacher, copy.deepcopy(student), blocks, folder, on_step=killed(5))
    said = capsys.readouterr().out
    path = folder / "step_00000004.safetensors"
    reason = f"{path} cannot be written: No space left on device"
    assert said.count(f"No checkpoint at step 4: {reason}. Training goes on.") == 1
    assert [f.name[-13:-12] for f in Checkpoints(folder).files()] == ["3", "2"]
    assert not list(folder.glob(".*"))
    run(teacher, student, blocks, folder, resume=True)
    assert same(student, uninterrupted[1])


def test_a_folder_that_vanishes_is_made_again(teacher, student, blocks, folder, uninterrupted):
    def on_step(row):
        if row["step"] in (2, 5):
            shutil.rmtree(folder)

    run(teacher, copy.deepcopy(student), blocks, folder, on_step=on_step)
    run(teacher, student, blocks, folder, resume=True)
    assert same(student, uninterrupted[1])


def test_a_folder_that_cannot_be_written_is_refused_before_training(
    teacher, student, blocks, tmp_path
):
    (tmp_path / "file").touch()
    weights = copy.deepcopy(student)
    with pytest.raises(WriteError, match="cannot be written"):
        run(teacher, student, blocks, tmp_path / "file" / "checkpoints")
    assert same(student, weights)


@pytest.mark.parametrize("spoiled", ["loss", "gradient_norm"])
def test_a_loss_that_is_no_number_names_the_last_good_checkpoint(
    spoiled, teacher, student, blocks, folder, monkeypatch
):
    def spoil(row):
        if row["step"] == 4:
            with torch.no_grad():
                if spoiled == "loss":
                    student.transformer.ln_f.weight.fill_(math.nan)
                else:  # a gradient that overflows, of a loss that does not
                    student.lm_head.weight.register_hook(lambda grad: grad * math.inf)

    with pytest.raises(kd.InputError, match=f"{spoiled.replace('_', ' ')} became .* at step 5"):
        run(teacher, student, blocks, folder, on_step=spoil)
    newest = Checkpoints(folder).newest()
    assert len(newest.history) == 4
    weights = newest.tensors["student/transformer.wte.weight"]
    assert weights.isfinite().all()
    assert torch.equal(student.transformer.wte.weight, weights)  # the bad step was not taken


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
    ids=["GPU", "Python", "CPU"],
)
def test_memory_that_is_out_is_one_line_with_what_to_lower(
    error, teacher, student, blocks, folder, monkeypatch
):
    forward = student.transformer.forward

    def full(*args, **kwargs):
        if student.training and len(Checkpoints(folder).files()):
            raise error
        return forward(*args, **kwargs)

    monkeypatch.setattr(student.transformer, "forward", full)
    with pytest.raises(kd.InputError, match="out of memory at step 2; lower the batch") as said:
        run(teacher, student, blocks, folder)
    assert str(said.value).endswith(
        f"(the last good checkpoint: {folder}/step_00000001.safetensors)"
    )
    assert "\n" not in str(said.value)


def test_any_other_error_stays_what_it_is(teacher, student, blocks, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(student.transformer, "forward", broken)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        run(teacher, student, blocks)


# -- Ctrl-C ----------------------------------------------------------------------------


def test_ctrl_c_keeps_the_history_and_the_kernel(teacher, student, blocks, capsys):
    before = signal.getsignal(signal.SIGINT)
    history = run(teacher, student, blocks, on_step=ctrl_c(2))
    assert len(history) == 2
    assert f"stopped after step 2 of {STEPS}" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGINT) is before
    assert len(run(teacher, student, blocks)) == STEPS  # the next cell runs


def test_ctrl_c_in_the_middle_of_a_step_lets_it_end(
    teacher, student, blocks, uninterrupted, folder
):
    stopped = copy.deepcopy(student)
    calls = []

    def in_the_middle(*_):
        calls.append(1)
        if len(calls) == 6:
            signal.raise_signal(signal.SIGINT)

    stopped.transformer.h[0].register_forward_hook(in_the_middle)
    history = run(teacher, stopped, blocks, folder)
    assert 0 < len(history) < STEPS
    assert without_time(history) == without_time(uninterrupted[0][: len(history)])
    run(teacher, student, blocks, folder, resume=True)
    assert same(student, uninterrupted[1])


def test_a_second_ctrl_c_stops_at_once(teacher, student, blocks):
    def on_step(row):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        pytest.fail("it went on")

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(teacher, student, blocks, on_step=on_step)
    assert signal.getsignal(signal.SIGINT) is before


# -- one run at a time -----------------------------------------------------------------

HOLD = """
import sys, time
from filelock import FileLock
with FileLock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(300)
"""


def test_a_second_run_is_refused_until_the_first_one_dies(teacher, student, blocks, folder):
    folder.mkdir()
    hold = [sys.executable, "-c", HOLD, folder / LOCK]
    owner = subprocess.Popen(hold, stdout=subprocess.PIPE)
    assert owner.stdout.readline() == b"held\n"
    weights = copy.deepcopy(student)
    with pytest.raises(kd.InputError, match="another run is writing to"):
        run(teacher, student, blocks, folder)
    assert same(student, weights)
    owner.kill()  # without a chance to tidy up
    owner.wait()
    owner.stdout.close()
    assert len(run(teacher, student, blocks, folder)) == STEPS


def test_a_lock_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "new" / "checkpoints"
    with Checkpoints(folder).locked():
        with Checkpoints("new/checkpoints").locked():  # the same folder
            pass
        assert (folder / "lock").exists()
    assert list(tmp_path.iterdir()) == []
    with Checkpoints(folder).locked():
        shutil.rmtree(folder)


def test_a_lock_ends_with_an_error_even_if_somebody_keeps_the_traceback(folder):
    folder.mkdir()
    (folder / "step_00000001.safetensors").touch()
    with pytest.raises(ZeroDivisionError) as kept, Checkpoints(folder).locked():
        raise ZeroDivisionError
    assert kept.traceback
    with FileLock(folder / LOCK, timeout=0):
        pass


def test_what_a_killed_run_left_of_a_checkpoint_goes_with_the_folder(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "lock").touch()
    (folder / ".step_00000001.safetensors.0123abcd.partial").mkdir()
    with Checkpoints(folder).locked():
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_lock_touches_no_other_files(tmp_path):
    mine = [tmp_path / ".tmp_notes", tmp_path / "step_1.txt", tmp_path / ".notes.partial"]
    for file in mine:
        file.touch()
    with Checkpoints(tmp_path).locked():
        pass
    assert sorted(tmp_path.iterdir()) == sorted(mine)
