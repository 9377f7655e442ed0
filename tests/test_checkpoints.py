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


@pytest.fixture(autouse=True)
def sigint_raises():
    """Ctrl-C interrupts, even if it is ignored where the tests were started (`nohup`)."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "checkpoints"


@pytest.fixture
def student(make_gpt2):
    """A tiny student whose start has nothing to do with the teacher."""
    model = make_gpt2(layers=1, seed=1)
    positions = model.transformer.wpe.weight
    positions.data = positions.data.T.contiguous().T  # safetensors writes contiguous ones only
    return model


@pytest.fixture
def run(teacher, student, blocks, folder):
    """A function that trains a student, and returns what became of it."""
    usual = {"teacher": teacher, "blocks": blocks, "config": CONFIG}

    def train(on_step=None, resume=False, minutes=0.0, **changes):
        given = usual | {"student": copy.deepcopy(student)} | changes
        places = Checkpoints(folder, minutes)
        try:
            history = kd.distill(**given, on_step=on_step, checkpoints=places, resume=resume)
        except kd.Stopped as stopped:
            history = stopped.history
        return outcome(history, given["student"])

    return train


@pytest.fixture(scope="module")
def whole(make_gpt2, blocks):
    """What `run` returns of a run that nothing happens to."""
    student = make_gpt2(layers=1, seed=1)
    return outcome(kd.distill(make_gpt2(), student, blocks, CONFIG), student)


def outcome(history: list[dict], student) -> tuple[list[dict], str]:
    """A history but for its times, and the fingerprint of a student's weights."""
    return [row | {"seconds": 0} for row in history], kd.fingerprint(student)


def ctrl_c(step: int):
    """What presses Ctrl-C once a step is done."""
    return lambda row: row["step"] == step and signal.raise_signal(signal.SIGINT)


def killed(step: int):
    """What ends a run after a step as suddenly as Python can."""
    return lambda row: row["step"] == step and sys.exit()


def steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, newest first."""
    return [int(file.stem.removeprefix("step_")) for file in Checkpoints(folder).files()]


# -- stopped and resumed ---------------------------------------------------------------


@pytest.mark.parametrize(("presses", "ended"), [(1, 4), (2, 3)])
def test_ctrl_c_lets_the_step_end_a_second_one_does_not_and_the_run_goes_on_as_if_untouched(
    presses, ended, teacher, student, blocks, run, whole, folder
):
    stopped, passes = copy.deepcopy(student), []

    def in_the_middle(block, *_):
        passes.append(block.training and torch.is_grad_enabled())
        if sum(passes) == 6:  # with two passes a step but the last of an epoch: in the fourth
            for _ in range(presses):
                signal.raise_signal(signal.SIGINT)

    hook = stopped.transformer.h[0].register_forward_hook(in_the_middle)
    before, kept = signal.getsignal(signal.SIGINT), Checkpoints(folder, minutes=1e6)
    with pytest.raises(KeyboardInterrupt) as end:
        kd.distill(teacher, stopped, blocks, CONFIG, checkpoints=kept)
    hook.remove()
    assert sum(passes) == (7 if presses == 1 else 6)
    assert isinstance(end.value, kd.Stopped) == (presses == 1)
    assert presses == 2 or str(end.value) == f"stopped after step 4 of {STEPS}"
    assert signal.getsignal(signal.SIGINT) is before
    assert steps(folder)[0] == ended  # where it stopped, or at the end of its epoch
    for again in [stopped] * (presses == 1) + [student]:  # the next cell, or a new kernel
        assert run(resume=True, student=again) == whole


def test_a_student_that_writes_its_own_text_goes_on_as_well(run):
    config = dataclasses.replace(CONFIG, epochs=1, alpha=0.0, on_policy_share=1.0)
    config = dataclasses.replace(config, hidden_weight=0.5, hidden_layers=((1, 2),))
    run(ctrl_c(2), config=config)
    assert run(resume=True, config=config) == run(config=config)


def test_a_run_may_die_again_and_again(run, folder, whole):
    for step in range(2, STEPS + 1):
        with pytest.raises(SystemExit):
            run(killed(step), resume=True)
        assert steps(folder)[0] == step - 1  # killed before step's own
    assert steps(folder) == [5, 4, 3]  # the last two, and that of the last epoch
    assert len(Checkpoints(folder).newest(ends_epoch=True).history) == 3
    assert run(resume=True) == whole
    history = Checkpoints(folder).newest().history
    assert history == sorted(history, key=lambda row: row["seconds"])  # time adds up, too
    assert steps(folder) == [6, 5]
    Checkpoints(folder).clear()
    assert steps(folder) == []


def test_a_finished_run_is_not_run_again(run, folder, whole, capsys):
    assert run(resume=True, minutes=1e6) == whole
    assert f"No checkpoint found in {folder}: training from scratch" in capsys.readouterr().out
    assert steps(folder) == [6, 3]  # of the last two epochs
    assert run(lambda row: pytest.fail("a step"), resume=True) == whole
    with pytest.raises(SystemExit):  # a new run in the same folder replaces it
        run(killed(3))
    assert steps(folder)[0] == 2


def test_the_cache_stands_in_for_its_teacher(run, teacher, blocks, whole):
    run(ctrl_c(2))
    assert run(resume=True, teacher=kd.cache_teacher(teacher, blocks)) == whole
    with pytest.raises(kd.InputError, match="the teacher's fingerprint was"):
        run(resume=True, teacher=kd.cache_teacher(teacher, blocks, top_k=3))


def test_what_is_no_folder_or_no_time_is_refused(teacher, student, blocks, folder):
    with pytest.raises(kd.InputError, match="checkpoint minutes are -1; they must be at least 0"):
        Checkpoints(folder, minutes=-1)
    with pytest.raises(kd.InputError, match=r"give kd.Checkpoints\(folder\)"):
        kd.distill(teacher, student, blocks, checkpoints=folder, resume=True)


def test_another_run_is_refused_by_what_differs(run, blocks, folder, make_gpt2):
    run(ctrl_c(2))
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    settings = dataclasses.replace(CONFIG, seed=1, alpha=0.0)
    deeper = make_gpt2(layers=2, seed=7)  # a layer more than the checkpoint, and the same below
    deeper.load_state_dict(Checkpoints(folder).newest().tensors, strict=False)
    masks = {"validation": torch.ones_like(blocks.validation, dtype=torch.bool)}
    for said, changes in (
        (": alpha was 0.3, is 0.0, seed was 0, is 1; resume with", {"config": settings}),
        (": the teacher's fingerprint was", {"teacher": make_gpt2(seed=5)}),
        *(
            (": the text's checksum was", {"blocks": dataclasses.replace(blocks, **{part: other})})
            for part, other in (
                ("train", blocks.train.flip(0)),
                ("validation", blocks.validation.flip(0)),
                ("masks", masks),
            )
        ),
        (": the student's fingerprint was", {"student": make_gpt2(layers=1, seed=7)}),
        (": the student's fingerprint was", {"student": deeper}),
    ):
        weights = "student" in changes and kd.fingerprint(changes["student"])
        with pytest.raises(kd.InputError, match=f"cannot resume from {folder}.*{said}"):
            run(resume=True, **changes)
        assert not weights or kd.fingerprint(changes["student"]) == weights
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


# -- what is on the disk ---------------------------------------------------------------


def test_the_interval_is_one_of_time_that_no_clock_disturbs(run, monkeypatch):
    now, saved = [1000.0], []
    monkeypatch.setattr(checkpoints_file.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "time", lambda: -1e9)  # the clock jumps
    save = Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda *a: (saved.append(len(a[3])), save(*a)))

    def on_step(row):
        now[0] += 30

    run(on_step, minutes=1)
    assert saved == [2, 3, 5, 6]  # after a minute; an epoch; a minute more; an epoch


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(run, folder, whole, capsys):
    run(ctrl_c(4))
    newest, before = Checkpoints(folder).files()
    newest.write_bytes(newest.read_bytes()[:-1])
    assert run(resume=True) == whole
    assert f"Resuming from step 3 (checkpoints/{before.name})" in capsys.readouterr().out


def test_where_a_checkpoint_cannot_be_written_training_goes_on(
    run, folder, whole, monkeypatch, capsys
):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    save_file = files.save_file
    monkeypatch.setattr(
        files, "save_file", lambda *a: full() if "00004" in str(a[1]) else save_file(*a)
    )
    with pytest.raises(SystemExit):
        run(killed(5))
    reason = f"{folder / 'step_00000004.safetensors'} cannot be written: No space left on device"
    said = f"No checkpoint at step 4: {reason}. Training goes on."
    assert capsys.readouterr().out.count(said) == 1
    assert steps(folder) == [3, 2]
    assert not list(folder.glob(".*"))
    assert run(resume=True) == whole


# -- faults -----------------------------------------------------------------------------


@pytest.mark.parametrize("spoiled", ["loss", "gradient_norm"])
def test_a_step_to_what_is_no_number_is_not_taken(spoiled, run, student, folder):
    def spoil(row):
        if row["step"] == 4:
            with torch.no_grad():
                if spoiled == "loss":
                    student.transformer.ln_f.weight.fill_(math.nan)
                else:  # a gradient that overflows, of a loss that does not
                    student.lm_head.weight.register_hook(lambda grad: grad * math.inf)

    said = f"{spoiled.replace('_', ' ')} became .* at step 5"
    with pytest.raises(kd.InputError, match=said):
        run(spoil, student=student)
    newest = Checkpoints(folder).newest()
    assert len(newest.history) == 4
    weights = newest.tensors["transformer.wte.weight"]
    assert weights.isfinite().all()
    assert torch.equal(student.transformer.wte.weight, weights)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError(), RuntimeError("DefaultCPUAllocator")])
def test_memory_that_is_out_is_one_line_with_what_to_lower(error, run, student):
    def full(model, given):
        if model.training and torch.is_grad_enabled():
            raise error

    student.transformer.register_forward_pre_hook(full)
    with pytest.raises(kd.InputError, match="out of memory at step 1; lower the batch size"):
        run(student=student)


# -- one run at a time -----------------------------------------------------------------


def test_a_second_run_is_refused_while_the_first_one_lives(run, student, folder, whole):
    folder.mkdir()
    weights = kd.fingerprint(student)
    with FileLock(folder / LOCK), pytest.raises(kd.InputError, match="another run is writing to"):
        run(student=student)
    assert kd.fingerprint(student) == weights
    assert run(student=student) == whole


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
    (tmp_path / "new").rmdir()  # empty
    (tmp_path / ".step_00000001.safetensors.0123abcd.partial").mkdir()  # of a killed run
    with Checkpoints(tmp_path).locked():
        pass
    assert sorted(tmp_path.iterdir()) == sorted(mine)
