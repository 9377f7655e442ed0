"""A plan is held against what then happens: parameters, bytes, operations, files."""

import pytest
from transformers import LlamaConfig

import willows_kd as kd
from willows_kd.cost import MemoryWatch

RATE = 1e9
LAYERS, WIDTH, LENGTH, VOCABULARY = 4, 32, 32, 4096


@pytest.fixture
def student(teacher):
    return kd.student_from_teacher(teacher)


def weights(*models) -> int:
    return sum(p.nbytes for model in models for p in model.parameters())


def test_models_configs_and_directories_give_one_plan(
    teacher, student, blocks, model_dir, tmp_path
):
    plans = [
        kd.plan(a, b, blocks, rate=RATE)
        for a, b in ((teacher, student), (teacher.config, 2), (model_dir, student.config))
    ]
    assert plans[0].parameters["teacher"] == teacher.num_parameters()
    assert plans[0].parameters["student"] == student.num_parameters()
    assert plans[0] == plans[1] == plans[2]
    assert plans[0].cache == kd.cache_teacher(teacher, blocks, folder=tmp_path / "cache").nbytes


@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        (None, {"batch_size": 8}),
        (None, {"batch_size": 8, "dtype": "bfloat16", "gradient_checkpointing": True}),
        (kd.ChunkedLoss, {"batch_size": 4, "gradient_accumulation_steps": 2}),
    ],
)
def test_the_peak_of_memory_is_that_of_training(teacher, student, blocks, loss, settings):
    config = kd.DistillConfig(epochs=1, **settings)
    plan = kd.plan(teacher, student, blocks, config, RATE, loss)
    assert min(plan.memory.values()) > 0
    peaks = []
    with MemoryWatch() as watch:
        kd.distill(teacher, student, blocks, config, lambda row: peaks.append(watch.most), loss)
    assert plan.peak_memory == pytest.approx(peaks[1] + weights(teacher, student), rel=0.02)


def test_logits_that_cannot_be_chunked_take_memory_and_allow_no_exact_cache(make_gpt2, blocks):
    plans = []
    for scale in (1, 2):
        teacher, student = make_gpt2(), make_gpt2(layers=2)
        if scale == 2:
            for model in (teacher, student):
                model.register_forward_hook(
                    lambda _module, _inputs, out: out.__setitem__("logits", 2 * out.logits)
                )
        plans.append(kd.plan(teacher, student, blocks, None, RATE, kd.ChunkedLoss))
    assert plans[0].cache and plans[1].cache is None
    logits = len(blocks.train) * (LENGTH - 1) * VOCABULARY * 4
    assert plans[1].peak_memory > plans[0].peak_memory + logits
    assert "only with top_k" in str(plans[1])


def test_operations_are_counted_as_by_hand_and_seconds_are_operations_at_a_rate(
    teacher, student, blocks
):
    plan = kd.plan(teacher, student, blocks, kd.DistillConfig(epochs=5), RATE, kd.ChunkedLoss)
    tokens, predicted = blocks.train.numel(), len(blocks.train) * (LENGTH - 1)
    layer, attention = 24 * WIDTH**2 * tokens, 4 * LENGTH * WIDTH * tokens
    head = 2 * WIDTH * VOCABULARY * predicted
    a, b = plan.flops["teacher"], plan.flops["student"]
    assert a == LAYERS * (layer + attention)
    # backward twice the forward pass; attention computes its scores once more
    assert b == 2 * (3 * layer + 3.5 * attention) + (3 + 1) * head
    assert plan.seconds() == pytest.approx(5 * (a + b) / RATE)
    assert plan.seconds(cached=True) == pytest.approx((a + 5 * b) / RATE)
    assert "1.0 GFLOP/s (given)" in str(plan)
    measured = kd.plan(teacher, student, blocks)
    assert measured.rate > 0 and measured.measured == "a step of this run"


@pytest.mark.slow
def test_seven_billion_parameters_are_planned_without_one(blocks):
    plan = kd.plan(LlamaConfig(dtype="bfloat16"), 1, blocks, rate=RATE)
    assert plan.parameters["teacher"] == 6_738_415_616
    assert plan.memory["teacher's weights"] == 2 * plan.parameters["teacher"]
    assert plan.memory["moments"] == 8 * plan.parameters["student"]


def test_what_fits_no_plan_is_refused(teacher, student, blocks):
    short = type(teacher.config)(n_positions=16)
    for said, given in (
        ("cannot be timed; give rate", (teacher, 2, blocks)),
        ("the model is a list; give a model, its config", ([], student, blocks, None, RATE)),
        ("layers is 5; this teacher allows 1 to 4", (teacher, 5, blocks, None, RATE)),
        ("32 tokens, the teacher takes at most 16", (short, 2, blocks, None, RATE)),
        ("no_such_folder is no local directory", ("./no_such_folder", 2, blocks, None, RATE)),
    ):
        with pytest.raises(kd.InputError, match=said):
            kd.plan(*given)
