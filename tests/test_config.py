"""The settings: what cannot work is refused when they are made, with what would be accepted."""

import dataclasses
import math
import re

import numpy as np
import pytest

import willows_kd as kd
from willows_kd.config import DIVERGENCE_NAMES, DTYPES
from willows_kd.losses import DIVERGENCES

# setting: what is accepted, in the words of the message; good values; bad values
ACCEPTED = {
    "temperature": ("above 0 and at most 1000", [0.01, 1, 2.5, 1000], [0, 0.0, -1, 1000.1]),
    "alpha": ("from 0 (soft labels only) to 1 (hard labels only)", [0, 0.5, 1], [-0.1, 1.1, None]),
    "beta": ("above 0 and below 1", [0.1, 0.5, 0.9], [0, 1, -0.1]),
    "skew": ("above 0 and below 1", [0.1, 0.99], [0, 1, 1.1]),
    "hidden_weight": ("at least 0", [0, 0.5, 100], [-0.1]),
    "on_policy_share": ("from 0 (the text as it is) to 1 (on-policy)", [0, 0.5, 1], [-0.1, 1.1]),
    "learning_rate": ("above 0 and at most 1", [1e-6, 1], [0, -1e-3, 1.1]),
    "warmup_ratio": ("from 0 to 1", [0, 0.1, 1], [-0.1, 1.1]),
    "weight_decay": ("at least 0", [0, 0.1, 10], [-0.1]),
    "max_grad_norm": ("above 0", [0.1, 1, 1e9], [0, -1]),
    "dropout": ("at least 0 and below 1", [0, 0.5, 0.99], [-0.1, 1, 1.5]),
    "epochs": ("a whole number, at least 1", [1, 100], [0, -1, 1.0, None]),
    "batch_size": ("a whole number, at least 1", [None, 1, 64], [0, -8, 1.0]),
    "gradient_accumulation_steps": ("a whole number, at least 1", [1, 16], [0, -1, 1.0]),
    "seed": ("a whole number, from 0 to 2**32 - 1", [0, 7, 2**32 - 1], [-1, 2**32, 10**400]),
    "divergence": (f"one of {', '.join(DIVERGENCES)}", DIVERGENCE_NAMES, ["FORWARD_KL", None]),
    "dtype": (f"one of {', '.join(DTYPES)}", DTYPES, ["float16", None, 1, ["float32"]]),
    "gradient_checkpointing": ("True or False", [True, False], [None, 0, 1, "yes"]),
    "hidden_layers": (
        "pairs of layer numbers (student's, teacher's), such as ((1, 2), (3, 6)), or None",
        [None, ((1, 2),)],
        [3, [1, 2], [(1, 2, 3)], [(0, 1), (1, -1)], [(1, 2.0)], "12", [("1", "2")]],
    ),
}
NEVER = ["1", "", b"2", [], [1], 1j, math.nan, -math.inf, -(10**400)]


def test_every_setting_stands_in_the_table_above_and_is_documented():
    fields = {field.name: field for field in dataclasses.fields(kd.DistillConfig)}
    assert set(fields) == {*ACCEPTED}
    assert tuple(DIVERGENCES) == DIVERGENCE_NAMES
    for name, field in fields.items():
        assert f"\n    {name}: {field.metadata['help']}" in kd.DistillConfig.__doc__
        assert field.metadata["accepted"] in kd.DistillConfig.__doc__


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_setting_is_kept_or_refused_with_what_would_be_accepted(name):
    accepted, good, bad = ACCEPTED[name]
    for value in good:
        assert getattr(kd.DistillConfig(**{name: value}), name) == value
    for value in [*bad, *NEVER, *([True] if good != [True, False] else [])]:
        with pytest.raises(kd.InputError) as error:
            kd.DistillConfig(**{name: value})
        assert str(error.value) == f"{name} is {value!r}; it must be {accepted}"


def test_a_pass_has_1024_tokens_unless_its_blocks_are_counted():
    found = [kd.DistillConfig().blocks_per_pass(size) for size in (1, 128, 1000, 1024, 4096)]
    assert found == [1024, 8, 1, 1, 1]
    assert kd.DistillConfig(batch_size=3).blocks_per_pass(128) == 3


def test_text_of_the_students_own_has_no_hard_labels():
    with pytest.raises(kd.InputError, match="alpha is 0.5; it must be 0 if the student writes"):
        kd.DistillConfig(alpha=0.5, on_policy_share=0.5)


def test_numpys_numbers_are_numbers_and_become_pythons():
    assert kd.DistillConfig(hidden_layers=[[1, np.int64(2)]]).hidden_layers == ((1, 2),)
    config = kd.DistillConfig(temperature=np.float32(2.5), seed=np.int32(7), alpha=np.int64(1))
    assert dataclasses.asdict(config) == dataclasses.asdict(kd.DistillConfig(2.5, 1.0, seed=7))
    assert [type(v) for v in (config.temperature, config.seed)] == [float, int]
    with pytest.raises(kd.InputError, match="alpha is .*it must be from 0"):
        kd.DistillConfig(alpha=np.float32("nan"))


def test_settings_cannot_be_changed_and_a_changed_copy_is_checked_again():
    with pytest.raises(dataclasses.FrozenInstanceError):
        kd.DistillConfig().temperature = -1
    with pytest.raises(kd.InputError, match="alpha is 2; it must be from 0"):
        dataclasses.replace(kd.DistillConfig(), alpha=2)


def test_a_notebooks_dial_says_in_one_line_what_cannot_be():
    for values, said in (
        ({"temperature": -1}, "temperature is -1; it must be above 0"),
        ({"train_blocks": -1}, "train_blocks is -1; it must be a whole number, at least 1"),
        ({"texts": "a"}, "texts is 'a'; it must be a whole number, at least 1"),
    ):
        with pytest.raises(kd.InputError, match=re.escape(said)) as caught:
            kd.check_dial(**values)
        [line] = caught.value._render_traceback_()  # what a notebook shows
        assert said in line
    kd.check_dial(temperature=2, seed=0, train_blocks=None, texts=8)
