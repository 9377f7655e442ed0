"""A plan is held against what then happens: parameters, bytes, operations, files."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

import willows_kd as kd
from willows_kd.cost import MemoryWatch
from willows_kd.distillation import DistillationLoss, train_mode
from willows_kd.scale import planning

RATE = 1e9
LAYERS, WIDTH, LENGTH, VOCABULARY = 4, 32, 32, 4096


@pytest.fixture
def student(teacher):
    return kd.student_from_teacher(teacher)


def weights(*models) -> int:
    return sum(p.nbytes for model in models for p in model.parameters())


def test_models_configs_and_directories_give_one_plan(teacher, student, blocks, model_dir):
    plans = [
        kd.plan(a, b, blocks, rate=RATE)
        for a, b in ((teacher, student), (teacher.config, 2), (model_dir, student.config))
    ]
    assert plans[0].parameters["teacher"] == teacher.num_parameters()
    assert plans[0].parameters["student"] == student.num_parameters()
    assert plans[0] == plans[1] == plans[2]


def test_a_plan_changes_nothing(teacher, student, blocks):
    before = [kd.fingerprint(model) for model in (teacher, student)]
    state = torch.get_rng_state()
    kd.plan(teacher.train(), student.eval(), blocks, kd.DistillConfig(dropout=0.1))
    assert [kd.fingerprint(model) for model in (teacher, student)] == before
    assert torch.equal(torch.get_rng_state(), state)
    assert teacher.training and not student.training
    assert all(p.grad is None for p in student.parameters())


@pytest.mark.parametrize("loss", [None, kd.ChunkedLoss])
@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 8},
        {"batch_size": 8, "dtype": "bfloat16", "gradient_checkpointing": True},
        {"batch_size": 4, "gradient_accumulation_steps": 2},
    ],
    ids=str,
)
def test_the_peak_of_memory_is_that_of_training(teacher, student, blocks, settings, loss):
    config = kd.DistillConfig(epochs=1, **settings)
    plan = kd.plan(teacher, student, blocks, config, RATE, loss)
    assert min(plan.memory.values()) > 0
    peaks = []
    with MemoryWatch() as watch:
        kd.distill(teacher, student, blocks, config, lambda row: peaks.append(watch.most), loss)
    assert plan.peak_memory == pytest.approx(peaks[1] + weights(teacher, student), rel=0.02)


def test_logits_that_cannot_be_chunked_take_memory_and_allow_no_exact_cache(make_gpt2, blocks):
    plans = []
    for bias in (False, True):
        teacher, student = make_gpt2(), make_gpt2(layers=2)
        for model in (teacher, student):
            model.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=bias)
        plans.append(kd.plan(teacher, student, blocks, None, RATE, kd.ChunkedLoss))
    assert plans[0].cache and plans[1].cache is None
    logits = len(blocks.train) * (LENGTH - 1) * VOCABULARY * 4
    assert plans[1].peak_memory > plans[0].peak_memory + logits
    assert "only with top_k" in str(plans[1])


def test_operations_are_counted_as_by_hand(teacher, student, blocks):
    flops = kd.plan(teacher, student, blocks, None, RATE, kd.ChunkedLoss).flops
    tokens, predicted = blocks.train.numel(), len(blocks.train) * (LENGTH - 1)
    layer, attention = 24 * WIDTH**2 * tokens, 4 * LENGTH * WIDTH * tokens
    head = 2 * WIDTH * VOCABULARY * predicted
    assert flops["teacher"] == LAYERS * (layer + attention)
    # backward twice the forward pass; attention computes its scores once more
    assert flops["student"] == 2 * (3 * layer + 3.5 * attention) + (3 + 1) * head


@pytest.mark.parametrize("loss", [DistillationLoss, kd.ChunkedLoss])
def test_operations_are_those_of_a_real_step(teacher, student, blocks, loss):
    config = kd.DistillConfig(hidden_weight=1.0, batch_size=8)
    flops = kd.plan(teacher, student, blocks, config, RATE, loss).flops
    objective = loss(teacher, student, config, blocks.train[:1])
    counter = FlopCounterMode(display=False, custom_mapping=planning.COUNTED)
    with train_mode(teacher, student, config), counter:
        objective(teacher, blocks.train[:8])[0].backward()
    assert sum(flops.values()) == counter.get_total_flops() * len(blocks.train) / 8


def test_gradient_checkpointing_costs_one_more_forward_pass(teacher, student, blocks):
    config = kd.DistillConfig(gradient_checkpointing=True)
    plain, saving = (kd.plan(teacher, student, blocks, c, rate=RATE) for c in (None, config))
    again = saving.flops["student"] - plain.flops["student"]
    last = 8 * WIDTH**2 * blocks.train.numel()  # a layer's last product is not needed again
    assert again == 2 * (plain.flops["teacher"] / LAYERS - last)


def test_the_cache_is_as_large_as_its_files(teacher, student, blocks, tmp_path):
    planned = kd.plan(teacher, student, blocks, rate=RATE).cache
    assert planned == kd.cache_teacher(teacher, blocks, folder=tmp_path).nbytes
    on_disk = sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
    assert 0 < on_disk - planned < 1_000  # their headers


def test_seconds_are_operations_at_a_rate_and_a_cache_saves_the_teachers(teacher, student, blocks):
    plan = kd.plan(teacher, student, blocks, kd.DistillConfig(epochs=5), rate=RATE)
    a, b = plan.flops.values()
    assert plan.seconds() == pytest.approx(5 * (a + b) / RATE)
    assert plan.seconds(cached=True) == pytest.approx((a + 5 * b) / RATE)
    assert plan.measured == "given"
    hard = kd.plan(teacher, student, blocks, kd.DistillConfig(alpha=1), rate=RATE)
    assert hard.flops["teacher"] == 0
    measured = kd.plan(teacher, student, blocks), kd.plan(teacher.config, 2, blocks)
    assert [plan.rate > 0 for plan in measured] == [True, True]
    assert [plan.measured.split()[-1] for plan in measured] == ["run", "slower"]


def test_a_plan_is_printed_as_a_table(teacher, student, blocks):
    plan = kd.plan(teacher, student, blocks, rate=RATE)
    rows = dict(row.split("  ", 1) for row in str(plan).splitlines())
    assert f"teacher {teacher.num_parameters():,}" in rows["parameters"]
    assert f"{plan.peak_memory / 1e6:,.0f} MB" in rows["peak memory"]
    assert rows["rate"].strip() == "1.0 GFLOP/s (given)"
    assert f"{planning.duration(plan.seconds())} for 3 epochs" in rows["time"]
    assert max(map(len, str(plan).splitlines())) < 160


@pytest.mark.slow
def test_seven_billion_parameters_are_planned_without_one(blocks):
    plan = kd.plan(LlamaConfig(dtype="bfloat16"), 1, blocks, rate=RATE)
    assert plan.parameters["teacher"] == 6_738_415_616
    assert plan.memory["teacher's weights"] == 2 * plan.parameters["teacher"]
    assert plan.memory["moments"] == 8 * plan.parameters["student"]


def test_what_fits_no_plan_is_refused(teacher, student, blocks):
    with pytest.raises(kd.InputError, match="the model is a list; give a model, its config"):
        kd.plan([], student, blocks)
    with pytest.raises(kd.InputError, match="layers is 5; this teacher allows 1 to 4"):
        kd.plan(teacher, 5, blocks)
    with pytest.raises(kd.InputError, match="blocks have 32 tokens, the teacher takes at most 16"):
        kd.plan(type(teacher.config)(n_positions=16), 2, blocks)
    with pytest.raises(kd.InputError, match="no_such_folder does not exist"):
        kd.plan("./no_such_folder", 2, blocks)
