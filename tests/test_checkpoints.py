"""Checkpoints: stopped anywhere and resumed, the student is the same, to the bit."""

import copy
import dataclasses
import errno
import math
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch import nn

import willows_kd as kd
from willows_kd import files
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


@pytest.fixture
def student(make_gpt2):
    """A tiny student whose start has nothing to do with the teacher."""
    model = make_gpt2(layers=1, seed=1)
    positions = model.transformer.wpe.weight
    positions.data = positions.data.T.contiguous().T  # safetensors writes contiguous ones only
    return model


@pytest.fixture(autouse=True)
def sigint_raises():
    """Ctrl-C interrupts, even if it is ignored where the tests were started (`nohup`)."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "checkpoints"


def run(
    teacher, student, blocks, folder=None, resume=False, on_step=None, minutes=0.0, config=CONFIG
):
    """The history, whether the run ended by itself or by Ctrl-C."""
    checkpoints = folder and Checkpoints(folder, minutes)
    try:
        return kd.distill(teacher, student, blocks, config, on_step, None, checkpoints, resume)
    except kd.Stopped as stopped:
        return stopped.history


def ctrl_c(step: int):
    """What presses Ctrl-C once a step is done."""
    return lambda row: row["step"] == step and signal.raise_signal(signal.SIGINT)


def killed(step: int):
    """What ends a run after a step as suddenly as Python can."""
    return lambda row: row["step"] == step and sys.exit()


def without_time(history: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history]


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.fixture(scope="module")
def uninterrupted(make_gpt2, blocks):
    """The history and the student of a run that nothing happened to."""
    student = make_gpt2(layers=1, seed=1)
    return run(make_gpt2(), student, blocks), student


# -- stopped and resumed ---------------------------------------------------------------


@pytest.mark.parametrize("step", [1, STEPS])
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
    expected = run(teacher, whole, blocks, config=config)
    run(teacher, stopped, blocks, folder, on_step=ctrl_c(4), config=config)
    history = run(teacher, student, blocks, folder, resume=True, config=config)
    assert without_time(history) == without_time(expected)
    assert same(student, whole)


def test_a_run_may_die_again_and_again(teacher, student, blocks, folder, uninterrupted):
    for step in range(2, STEPS + 1):
        with pytest.raises(SystemExit):
            run(teacher, copy.deepcopy(student), blocks, folder, True, killed(step))
        assert len(Checkpoints(folder).newest().history) == step - 1  # killed before step's own
    kept = [int(file.stem.removeprefix("step_")) for file in Checkpoints(folder).files()]
    assert kept == [5, 4, 3]  # the last two, and that of the last epoch
    history = run(teacher, student, blocks, folder, resume=True)
    assert without_time(history) == without_time(uninterrupted[0])
    assert same(student, uninterrupted[1])
    assert history == sorted(history, key=lambda row: row["seconds"])  # time adds up, too


def test_a_finished_run_is_not_run_again(teacher, student, blocks, folder, uninterrupted, capsys):
    history = run(teacher, copy.deepcopy(student), blocks, folder, resume=True, minutes=1e6)
    assert f"No checkpoint found in {folder}: training from scratch" in capsys.readouterr().out
    assert without_time(history) == without_time(uninterrupted[0])
    names = [file.name for file in Checkpoints(folder).files()]  # of the last two epochs
    assert names == ["step_00000006.safetensors", "step_00000003.safetensors"]
    assert run(teacher, student, blocks, folder, True, lambda row: pytest.fail("a step")) == history
    assert same(student, uninterrupted[1])
    with pytest.raises(SystemExit):  # a new run in the same folder replaces it
        run(teacher, student, blocks, folder, on_step=killed(3))
    assert Checkpoints(folder).files()[0].name == "step_00000002.safetensors"


def test_resume_without_a_folder_is_refused(teacher, student, blocks):
    for given in (None, "folder"):
        with pytest.raises(kd.InputError, match=r"give kd.Checkpoints\(folder\)"):
            kd.distill(teacher, student, blocks, checkpoints=given, resume=True)


def test_the_cache_stands_in_for_its_teacher(
    teacher, student, blocks, folder, uninterrupted, tmp_path
):
    run(teacher, copy.deepcopy(student), blocks, folder, on_step=ctrl_c(2))
    cache = kd.cache_teacher(teacher, blocks, folder=tmp_path / "cache")
    run(cache, student, blocks, folder, resume=True)
    assert same(student, uninterrupted[1])

    rounded = kd.cache_teacher(teacher, blocks, top_k=3, folder=tmp_path / "cache")
    with pytest.raises(kd.InputError, match="the teacher's fingerprint was"):
        run(rounded, student, blocks, folder, resume=True)


# -- another run than the checkpoint's -------------------------------------------------


def test_another_run_is_refused_by_what_differs(teacher, student, blocks, folder, make_gpt2):
    run(teacher, copy.deepcopy(student), blocks, folder, on_step=ctrl_c(2))
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    given = {"teacher": teacher, "student": student, "blocks": blocks, "config": CONFIG}
    settings = dataclasses.replace(CONFIG, seed=1, alpha=0.0)
    flipped = dataclasses.replace(blocks, train=blocks.train.flip(0))
    for changes, said in (
        ({"config": settings}, ": alpha was 0.3, is 0.0, seed was 0, is 1; resume with"),
        ({"teacher": make_gpt2(seed=5)}, ": the teacher's fingerprint was"),
        ({"blocks": flipped}, ": the text's checksum was"),
        ({"student": make_gpt2(layers=1, seed=7)}, ": the student's fingerprint was"),
        ({"student": make_gpt2(layers=2, seed=7)}, ": the student's fingerprint was"),
    ):
        other = given | changes
        weights = copy.deepcopy(other["student"])
        with pytest.raises(kd.InputError, match="cannot resume from") as refused:
            run(folder=folder, resume=True, **other)
        assert said in str(refused.value)
        assert same(other["student"], weights)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


# -- what is on the disk ---------------------------------------------------------------


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


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    teacher, student, blocks, folder, uninterrupted, capsys
):
    run(teacher, copy.deepcopy(student), blocks, folder, on_step=ctrl_c(4))
    newest, before = Checkpoints(folder).files()
    newest.write_bytes(newest.read_bytes()[:-1])
    run(teacher, student, blocks, folder, resume=True)
    assert f"Resuming from step 3 (checkpoints/{before.name})" in capsys.readouterr().out
    assert same(student, uninterrupted[1])


# -- faults ----------------------------------------------------------------------------


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

    said = f"{spoiled.replace('_', ' ')} became .* at step 5; "
    with pytest.raises(kd.InputError, match=said):
        run(teacher, student, blocks, folder, on_step=spoil)
    newest = Checkpoints(folder).newest()
    assert len(newest.history) == 4
    weights = newest.tensors["transformer.wte.weight"]
    assert weights.isfinite().all()
    assert torch.equal(student.transformer.wte.weight, weights)  # the bad step was not taken


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
    ids=["GPU", "CPU"],
)
def test_memory_that_is_out_is_one_line_with_what_to_lower(error, teacher, student, blocks):
    def full(model, given):
        if model.training and torch.is_grad_enabled():
            raise error

    student.transformer.register_forward_pre_hook(full)
    with pytest.raises(kd.InputError, match="out of memory at step 1; lower the batch size"):
        run(teacher, student, blocks)


# -- Ctrl-C ----------------------------------------------------------------------------


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_lets_the_step_end_and_a_second_one_does_not(
    presses, teacher, student, blocks, uninterrupted, folder
):
    stopped, passes = copy.deepcopy(student), []

    def in_the_middle(block, *_):
        passes.append(block.training and torch.is_grad_enabled())
        if sum(passes) == 6:  # with two passes a step but the last of an epoch: in the fourth
            for _ in range(presses):
                signal.raise_signal(signal.SIGINT)

    stopped.transformer.h[0].register_forward_hook(in_the_middle)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as end:
        kd.distill(teacher, stopped, blocks, CONFIG, None, None, Checkpoints(folder, 0))
    assert isinstance(end.value, kd.Stopped) == (presses == 1)
    assert sum(passes) == (7 if presses == 1 else 6)
    if presses == 1:
        assert str(end.value) == f"stopped after step 4 of {STEPS}"
        assert without_time(end.value.history) == without_time(uninterrupted[0][:4])
    assert signal.getsignal(signal.SIGINT) is before
    run(teacher, student, blocks, folder, resume=True)
    assert same(student, uninterrupted[1])


# -- one run at a time -----------------------------------------------------------------


def test_a_second_run_is_refused_while_the_first_one_lives(teacher, student, blocks, folder):
    folder.mkdir()
    weights = copy.deepcopy(student)
    with FileLock(folder / LOCK), pytest.raises(kd.InputError, match="another run is writing to"):
        run(teacher, student, blocks, folder)
    assert same(student, weights)
    assert len(run(teacher, student, blocks, folder)) == STEPS


def test_a_lock_ends_with_an_error_and_leaves_all_other_files(tmp_path):
    mine = [tmp_path / ".tmp_notes", tmp_path / "step_1.txt", tmp_path / ".notes.partial"]
    for file in mine:
        file.touch()
    folder = tmp_path / "new" / "checkpoints"
    with pytest.raises(ZeroDivisionError), Checkpoints(folder).locked():
        with Checkpoints(tmp_path / "new" / ".." / "new" / "checkpoints").locked():
            pass  # the same folder, by another name
        assert (folder / LOCK).exists()
        raise ZeroDivisionError
    (tmp_path / ".step_00000001.safetensors.0123abcd.partial").mkdir()  # of a killed run
    with Checkpoints(tmp_path).locked():
        pass
    assert sorted(tmp_path.iterdir()) == sorted(mine)
