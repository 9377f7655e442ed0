"""The loop: it trains the student it says, on the loss it says, and leaves all else alone."""

import contextlib
import copy
import dataclasses
import math
import warnings

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

import willows_kd as kd
from willows_kd.config import DIVERGENCE_NAMES
from willows_kd.distillation import DistillationLoss, epoch_batches
from willows_kd.generation import continued, uniform_draws

EXAMPLES = settings(max_examples=50, deadline=None, derandomize=True)
COLUMNS = [
    *("step", "epoch", "loss", "soft_loss", "hard_loss", "hidden_loss"),
    *("gradient_norm", "learning_rate", "tokens", "seconds"),
]
END_OF_EPOCH = ["average_loss", "validation_perplexity", "validation_kl"]


@pytest.fixture
def teacher(make_gpt2):
    """A tiny teacher with opinions: its weights are spread more widely than at a usual start."""
    return make_gpt2(layers=3, initializer_range=0.15)


@pytest.fixture
def student(make_gpt2):
    """A tiny student whose start has nothing to do with the teacher."""
    return make_gpt2(layers=1, seed=1)


def first(blocks: kd.Blocks, count: int) -> kd.Blocks:
    """The same blocks, but only so many to train on."""
    return dataclasses.replace(blocks, train=blocks.train[:count])


def run(teacher, student, blocks, on_step=None, **changes) -> list[dict]:
    return kd.distill(
        teacher,
        student,
        blocks,
        kd.DistillConfig(**{"epochs": 1, "batch_size": 8} | changes),
        on_step,
    )


def trained(teacher, student, blocks, **changes) -> nn.Module:
    """A copy of the student after training."""
    student = copy.deepcopy(student)
    run(teacher, student, blocks, **changes)
    return student


def furthest_apart(a: nn.Module, b: nn.Module) -> float:
    """The largest difference between two models' weights."""
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return max((x - y).abs().max().item() for x, y in pairs)


def numbers(history: list[dict], *columns: str) -> list[float]:
    return [row[column] for row in history for column in columns]


# -- the same as by hand ---------------------------------------------------------------


def by_hand(teacher, student, blocks, config) -> list[tuple[float, float, float]]:
    """Distillation with nothing but PyTorch: loss, gradient norm, learning rate of each step."""
    matrices = [p for p in student.parameters() if p.ndim > 1]
    vectors = [p for p in student.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors}],
        weight_decay=0,
    )
    steps = [
        step
        for epoch in range(config.epochs)
        for step in epoch_batches(blocks.train, config, epoch)
    ]
    rows = []
    for done, step in enumerate(steps):
        ids, t = blocks.train[step], config.temperature
        z_s, z_t = student(ids).logits[:, :-1], teacher(ids).logits[:, :-1].detach()
        p, q = torch.softmax(z_t / t, dim=-1), torch.softmax(z_s / t, dim=-1)
        soft = t**2 * (p * (p.log() - q.log())).sum() / ids[:, 1:].numel()
        hard = F.cross_entropy(z_s.transpose(1, 2), ids[:, 1:])
        loss = config.alpha * hard + (1 - config.alpha) * soft
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(student.parameters(), config.max_grad_norm)
        rate = config.learning_rate * (1 + math.cos(math.pi * done / len(steps))) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        rows.append((loss.item(), norm.item(), rate))
    return rows


@pytest.mark.parametrize(
    ("alpha", "temperature"), [(0, 1), (0, 2), (0.3, 4), (1, 2)], ids=lambda value: f"{value}"
)
def test_the_loop_is_the_loop_written_by_hand(teacher, student, blocks, alpha, temperature):
    teacher, student = teacher.double(), student.double()
    same_student = copy.deepcopy(student)
    config = kd.DistillConfig(
        temperature,
        alpha,
        epochs=2,
        batch_size=8,
        warmup_ratio=0,
        max_grad_norm=0.3,
        learning_rate=3e-3,
    )
    history = kd.distill(teacher, student, blocks, config)
    rows = by_hand(teacher, same_student, blocks, config)
    found = numbers(history, "loss", "gradient_norm", "learning_rate")
    assert found == pytest.approx([value for row in rows for value in row], rel=1e-6)
    assert furthest_apart(student, same_student) < 1e-6


CUTS = [(8, 1), (2, 4), (4, 2)]  # blocks in a pass, passes in a step


@pytest.mark.parametrize("changes", [{"alpha": 0.3}, {"on_policy_share": 0.5}], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_how_a_step_is_cut_up_does_not_change_it(teacher, student, blocks, changes, masked):
    few = first(blocks, 21)  # so that the last step is an uneven one
    if masked:  # unevenly: some blocks have no token that counts
        mask = torch.rand(few.train.shape, generator=torch.Generator().manual_seed(0))
        few = dataclasses.replace(few, masks={"train": mask < torch.linspace(0, 1, 21)[:, None]})
    teacher, found = teacher.double(), []
    for batch_size, passes in CUTS:
        cut = {"batch_size": batch_size, "gradient_accumulation_steps": passes}
        model = copy.deepcopy(student).double()
        rows = run(teacher, model, few, seed=5, **cut, **changes)
        columns = "loss", "soft_loss", "gradient_norm", "learning_rate", "tokens", "average_loss"
        found.append((numbers(rows[:2], *columns[:-1]) + numbers(rows[2:], *columns), model))
    for values, model in found[1:]:
        assert values == pytest.approx(found[0][0], rel=1e-5)
        assert furthest_apart(model, found[0][1]) < 1e-5


def test_what_a_masked_token_is_changes_nothing_and_the_others_are_all_that_counts(
    teacher, student, blocks
):
    """Poisoned are tokens at a block's end: nothing that counts reads them."""
    few = first(blocks, 8)
    mask = torch.ones_like(few.train, dtype=torch.bool)
    mask[::2, 20:] = False
    mask[:, :5] = False
    poisoned = few.train.clone()
    poisoned[::2, 20:] = 7
    found = []
    for ids in (few.train, poisoned):
        given = dataclasses.replace(few, train=ids, masks={"train": mask})
        model = copy.deepcopy(student)
        row = run(teacher, model, given, alpha=0.3, hidden_weight=0.5)[0]
        found.append((row["loss"], row["gradient_norm"], model))
    assert found[0][:2] == found[1][:2]
    assert furthest_apart(found[0][2], found[1][2]) == 0
    with torch.no_grad():
        z_t, z_s = (model(few.train).logits[:, :-1] for model in (teacher, student))
    assert row["soft_loss"] == pytest.approx(kd.forward_kl(z_s, z_t, mask=mask[:, 1:]).item(), 1e-5)
    hard = F.cross_entropy(z_s[mask[:, 1:]], few.train[:, 1:][mask[:, 1:]]).item()
    assert row["hard_loss"] == pytest.approx(hard, rel=1e-5)


def test_a_mask_that_fits_no_block_is_refused(teacher, student, blocks):
    for mask in (torch.zeros_like(blocks.train).bool(), torch.ones(2, 3).bool()):
        given = dataclasses.replace(blocks, masks={"train": mask})
        with pytest.raises(kd.InputError, match="have the shape of blocks.train and let a token"):
            run(teacher, student, given)


# -- whose text, and what else is matched ----------------------------------------------


def test_a_student_that_writes_is_scored_on_what_it_wrote(teacher, student, blocks):
    seen = []
    teacher.base_model.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    few, writer = first(blocks, 8), copy.deepcopy(student)
    config = kd.DistillConfig(epochs=1, on_policy_share=1.0, seed=3)
    row = kd.distill(teacher, student, few, config)[0]
    step = next(ids for ids in seen if len(ids) == 8 and not torch.equal(ids, few.train))
    (order,) = epoch_batches(few.train, config, 0)
    expected = few.train[order]
    draws = uniform_draws(8, 24, 3 * 2**31 + 1)
    expected = torch.cat([expected[:, :8], continued(writer, expected[:, :8], 24, draws)], dim=1)
    assert torch.equal(step, expected)
    with torch.no_grad():
        z_t, z_s = (model(step).logits[:, 7:-1] for model in (teacher, writer))
    assert row["loss"] == pytest.approx(kd.forward_kl(z_s, z_t).item(), rel=1e-4)


def test_half_a_share_is_half_the_blocks_and_the_masks_of_the_others_count(
    teacher, student, blocks, monkeypatch
):
    few, seen = first(blocks, 8), []
    mask = torch.rand(few.train.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    forward = DistillationLoss.forward
    monkeypatch.setattr(
        DistillationLoss, "forward", lambda self, *a: seen.append(a[1:]) or forward(self, *a)
    )
    given = dataclasses.replace(few, masks={"train": mask})
    run(teacher, student, given, on_policy_share=0.5)
    (order,) = epoch_batches(few.train, kd.DistillConfig(batch_size=8), 0)
    ids, counts = seen[0]
    assert torch.equal(ids[4:], few.train[order][4:])
    assert torch.equal(ids[:, :8], few.train[order][:, :8])
    assert not any(torch.equal(a, b) for a, b in zip(ids[:4], few.train[order][:4], strict=True))
    assert torch.equal(counts[4:], mask[order][4:, 1:])
    assert (~counts[:4, :7]).all() and counts[:4, 7:].all()


def test_the_writing_takes_no_gradient_and_no_dropout(teacher, student, blocks):
    written = []

    def generate(*arguments, **more):
        assert not torch.is_grad_enabled() and not student.training
        written.append(type(student).generate(student, *arguments, **more))
        return written[-1]

    student.generate = generate
    run(teacher, student, first(blocks, 8), on_policy_share=1.0, dropout=0.5)
    assert len(written) == 1 and not written[0].requires_grad


@pytest.mark.parametrize("pairs", [None, [(0, 0), (1, 2)]])
def test_hidden_states_are_matched_in_pairs_or_the_final_ones(teacher, student, blocks, pairs):
    few, start = first(blocks, 8), copy.deepcopy(student)
    row = run(teacher, student, few, hidden_weight=0.5, hidden_layers=pairs)[0]
    with torch.no_grad():
        own, its = (m(few.train, output_hidden_states=True).hidden_states for m in (start, teacher))
    states = [(own[a][:, :-1], its[b][:, :-1]) for a, b in pairs or [(-1, -1)]]
    expected = [1 - F.cosine_similarity(a, b, dim=-1).mean().item() for a, b in states]
    assert row["hidden_loss"] == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    assert row["loss"] == pytest.approx(row["soft_loss"] + 0.5 * row["hidden_loss"], rel=1e-5)


# -- what is trained, and what is not --------------------------------------------------


def by_name(model) -> dict:
    return {
        name: (module.training, getattr(module, "p", None))
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("end", ["finished", "an error"])
def test_what_is_given_is_left_as_it_was(teacher, student, blocks, end):
    """Modes of each module, dropout, gradients, the teacher's weights, random numbers."""
    teacher.train().transformer.h[1].eval()
    student.eval().transformer.h[0].mlp.train()
    positions = student.transformer.wpe.weight.requires_grad_(False)
    student(blocks.train[:2]).logits.sum().backward()  # of which nothing leaks into the run
    before = by_name(teacher), by_name(student), torch.get_rng_state(), positions.clone()
    weights = kd.fingerprint(teacher)
    expected = trained(teacher.eval(), student, blocks, alpha=0.5, dropout=0.3)
    teacher.train().transformer.h[1].eval()

    def on_step(row):
        assert all(module.training for module in student.modules())
        assert not any(module.training for module in teacher.modules())
        assert {m.p for m in student.modules() if isinstance(m, nn.Dropout)} == {0.3}
        if end == "an error":
            raise ZeroDivisionError

    with contextlib.suppress(ZeroDivisionError):
        run(teacher, student, blocks, on_step, alpha=0.5, dropout=0.3)
        assert furthest_apart(student, expected) == 0
    assert (by_name(teacher), by_name(student)) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])
    assert torch.equal(positions, before[3])
    assert kd.fingerprint(teacher) == weights
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("alpha", [0, 0.5, 1])
def test_every_weight_is_trained_and_the_teacher_asked_once_a_pass(teacher, student, blocks, alpha):
    """With hard labels alone it is asked about the validation blocks only."""
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    asked = []
    note = lambda *_: asked.append(torch.is_grad_enabled() or student.training)  # noqa: E731
    teacher.base_model.register_forward_pre_hook(note)
    history = run(
        *(teacher, student.eval(), blocks),
        **{"batch_size": 4, "gradient_accumulation_steps": 2, "alpha": alpha},
    )
    assert sum(asked) == (6 if alpha < 1 else 0)
    assert history[-1]["validation_kl"] > 0
    unchanged = [name for name, p in student.named_parameters() if torch.equal(p, before[name])]
    assert unchanged == []


@EXAMPLES
@given(
    blocks=st.integers(1, 200),
    batch_size=st.integers(1, 20),
    gradient_accumulation_steps=st.integers(1, 6),
    epoch=st.integers(0, 9),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_steps_of_an_epoch_are_all_blocks_once(
    blocks, batch_size, gradient_accumulation_steps, epoch, seed
):
    config = kd.DistillConfig(
        batch_size=batch_size, gradient_accumulation_steps=gradient_accumulation_steps, seed=seed
    )
    steps = epoch_batches(torch.zeros(blocks, 4), config, epoch)
    assert sorted(torch.cat(steps).tolist()) == list(range(blocks))
    assert all(len(step) == batch_size * gradient_accumulation_steps for step in steps[:-1])
    assert 1 <= len(steps[-1]) <= batch_size * gradient_accumulation_steps


def test_the_order_of_the_blocks_follows_from_seed_and_epoch():
    configs, blocks = [kd.DistillConfig(seed=seed) for seed in (0, 1, 0)], torch.zeros(50, 1024)
    orders = [
        [torch.cat(epoch_batches(blocks, config, epoch)).tolist() for epoch in range(3)]
        for config in configs
    ]
    assert orders[0] == orders[2]
    assert len({tuple(order) for seed in orders for order in seed}) == 6


# -- random numbers --------------------------------------------------------------------


def test_the_same_seed_gives_the_same_student_whatever_came_before(teacher, student, blocks):
    students = []
    for number in (1, 2):
        torch.manual_seed(number)
        students.append(kd.fingerprint(trained(teacher, student, blocks, seed=3, dropout=0.1)))
    assert students[0] == students[1]


# -- losses that mean what they say ----------------------------------------------------


@pytest.mark.parametrize("divergence", DIVERGENCE_NAMES)
def test_the_student_comes_closer_to_its_teacher(teacher, student, blocks, divergence):
    history = run(
        *(teacher, student, first(blocks, 4)),
        **{"divergence": divergence, "epochs": 15, "batch_size": 4, "learning_rate": 1e-2},
    )
    averages = [row["average_loss"] for row in history]
    assert averages[-1] < 0.8 * averages[0]


@pytest.mark.parametrize(
    ("alpha", "missing"), [(0, {"hard_loss"}), (0.3, set()), (1, {"soft_loss"})]
)
def test_a_loss_that_has_no_weight_is_none(teacher, student, blocks, alpha, missing):
    for row in run(teacher, student, blocks, alpha=alpha):
        assert {name for name in ("soft_loss", "hard_loss") if row[name] is None} == missing
        hard, soft = (row[name] or 0.0 for name in ("hard_loss", "soft_loss"))
        assert row["loss"] == pytest.approx(alpha * hard + (1 - alpha) * soft, rel=1e-6)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_family_with_dropout_of_its_own_is_warned_of(teacher, blocks, dropout):
    sizes = {"vocab_size": 4096, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64}
    config = OPTConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    student = OPTForCausalLM(config)
    with pytest.warns(UserWarning, match="OPTForCausalLM has dropout .* before the model is made"):
        run(teacher, student, first(blocks, 4), dropout=dropout)
    calm = copy.deepcopy(config)
    calm.dropout = calm.attention_dropout = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(teacher, OPTForCausalLM(calm), first(blocks, 4), dropout=dropout)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_loss_that_is_no_number_stops_the_training_and_names_the_step(
    teacher, student, blocks, poison
):
    def break_student(row):
        if row["step"] == 2:
            student.lm_head.weight.data[0] = poison

    with pytest.raises(kd.InputError, match=r"the loss became nan at step 3; lower") as error:
        run(teacher, student, blocks, break_student, batch_size=4)
    assert "\n" not in str(error.value)


def refusals(teacher, student, blocks, make_gpt2) -> dict:
    narrow, headless = make_gpt2(layers=1, n_embd=16), student.transformer
    cache, sampled = kd.cache_teacher(teacher, blocks), kd.cache_teacher(teacher, blocks, samples=4)
    return {
        r"weights; train student.float\(\)": (teacher, copy.deepcopy(student).half(), {}),
        "a GPT2Model, which predicts no tokens": (teacher, headless, {}),
        "GPT2Model, which predicts no tokens": (teacher.transformer, student, {}),
        "teacher predicts 4096 tokens, the student 5": (teacher, make_gpt2(1, vocab_size=5000), {}),
        r"student's hidden states have shape \(8, 31, 16\), the teacher's \(8, 31, 32\)": (
            teacher,
            narrow,
            {"hidden_weight": 1.0},
        ),
        "names layer 9 of the teacher, which has 3": (
            *(teacher, narrow),
            {"hidden_weight": 1.0, "hidden_layers": ((1, 9),)},
        ),
        "knows only the text it was made for": (cache, student, {"on_policy_share": 0.5}),
        "holds its final hidden states": (
            *(cache, student),
            {"hidden_weight": 1.0, "hidden_layers": [(1, 1)]},
        ),
        "forward KL at temperature 1 only": (sampled, student, {"divergence": "reverse_kl"}),
        "KL at temperature 1 only": (sampled, student, {"temperature": 2.0}),
        "with top_k or samples none at all": (sampled, student, {"hidden_weight": 1.0}),
    }


def test_two_vocabularies_are_refused_without_a_warning(teacher, blocks, make_gpt2):
    with warnings.catch_warnings(), pytest.raises(kd.InputError, match="share a vocabulary"):
        warnings.simplefilter("error")
        kd.distill(teacher, make_gpt2(1, vocab_size=5000), blocks)


def test_what_does_not_fit_together_is_refused_before_a_step(
    teacher, student, blocks, make_gpt2, monkeypatch
):
    before = kd.fingerprint(student)
    for said, (a, b, changes) in refusals(teacher, student, blocks, make_gpt2).items():
        with pytest.raises(kd.InputError, match=said):
            run(a, b, blocks, on_step=lambda row: pytest.fail("a step was made"), **changes)
    monkeypatch.setattr(type(student), "supports_gradient_checkpointing", False)
    with pytest.raises(kd.InputError, match="a GPT2LMHeadModel has no gradient checkpointing"):
        run(teacher, student, blocks, gradient_checkpointing=True)
    assert kd.fingerprint(student) == before


def test_it_trains_inside_no_grad_and_inference_mode(teacher, student, blocks):
    expected = kd.fingerprint(trained(teacher, student, blocks))
    for without_gradients in (torch.no_grad, torch.inference_mode):
        fresh = copy.deepcopy(student)
        with without_gradients():
            run(teacher, fresh, blocks)
        assert kd.fingerprint(fresh) == expected


def test_bfloat16_gives_nearly_the_same_losses_and_keeps_float32_weights(teacher, student, blocks):
    half = copy.deepcopy(student)
    columns = "loss", "soft_loss", "hard_loss"
    expected = numbers(run(teacher, student, blocks, alpha=0.5), *columns)
    found = numbers(run(teacher, half, blocks, alpha=0.5, dtype="bfloat16"), *columns)
    assert found == pytest.approx(expected, rel=0.02)
    assert found != expected  # or the arithmetic was in float32 all along
    assert {p.dtype for p in half.parameters()} == {torch.float32}


# -- vocabularies ----------------------------------------------------------------------


def padded(model, make_gpt2, size: int = 4104):
    """The same model with a head (and embeddings) of more rows, which mean nothing."""
    larger = make_gpt2(layers=model.config.n_layer, vocab_size=size, initializer_range=0.5, seed=9)
    weights = model.state_dict()
    for name in ("transformer.wte.weight", "lm_head.weight"):
        tokens = weights[name]
        weights[name] = torch.cat([tokens, larger.state_dict()[name][len(tokens) :]])
    larger.load_state_dict(weights)
    return larger


@pytest.mark.parametrize("whose", ["teacher", "student"])
def test_a_padded_head_changes_nothing(teacher, student, blocks, make_gpt2, whose):
    models = {"teacher": teacher, "student": copy.deepcopy(student)}
    models[whose] = padded(models[whose], make_gpt2)
    expected = run(teacher, student, blocks, alpha=0.5)
    found = run(**models, blocks=blocks, alpha=0.5)
    columns = "loss", "soft_loss", "hard_loss", "gradient_norm"
    assert numbers(found, *columns) == pytest.approx(numbers(expected, *columns), rel=1e-5)
    last = "average_loss", "validation_perplexity", "validation_kl"
    assert numbers(found[-1:], *last) == pytest.approx(numbers(expected[-1:], *last), rel=1e-5)


# -- dropout and modes -----------------------------------------------------------------


def dropouts(model) -> list[float]:
    return [module.p for module in model.modules() if isinstance(module, nn.Dropout)]


def test_the_dropout_of_the_settings_replaces_the_models_own(teacher, make_gpt2, blocks):
    own = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.4)
    noisy, calm = make_gpt2(layers=1, seed=1, **own), make_gpt2(layers=1, seed=1)
    assert furthest_apart(noisy, calm) == 0
    without = [trained(teacher, model, blocks, dropout=0) for model in (noisy, calm)]
    with_some = [trained(teacher, model, blocks, dropout=0.2) for model in (noisy, calm)]
    assert furthest_apart(*without) == furthest_apart(*with_some) == 0
    assert furthest_apart(without[0], with_some[0]) > 0
    assert set(dropouts(without[0])) == set(dropouts(with_some[0])) == {0.4}


# -- the history -----------------------------------------------------------------------


def test_the_history_has_a_row_a_step_ready_for_pandas(teacher, student, blocks):
    table = pd.DataFrame(run(teacher, student, first(blocks, 20), epochs=3, alpha=0.5))
    assert set(table.columns) == {*COLUMNS, *END_OF_EPOCH}
    assert table["step"].tolist() == list(range(1, 10))
    assert table["epoch"].tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    blocks_seen = [8, 16, 20, 28, 36, 40, 48, 56, 60]
    assert table["tokens"].tolist() == [32 * count for count in blocks_seen]
    assert table["hidden_loss"].isna().all()  # it has no weight
    assert table[COLUMNS].drop(columns="hidden_loss").notna().all(axis=None)
    assert table[END_OF_EPOCH].notna().all(axis=1).tolist() == [False, False, True] * 3
    assert table[END_OF_EPOCH].isna().all(axis=1).tolist() == [True, True, False] * 3
    assert all(map(pd.api.types.is_numeric_dtype, table.drop(columns="hidden_loss").dtypes))


def test_without_a_batch_size_a_step_has_1024_tokens(teacher, student, blocks):
    rows = []
    longer = dataclasses.replace(blocks, train=blocks.train.repeat(2, 1)[:40])
    history = kd.distill(teacher, student, longer, on_step=rows.append)
    assert [row["tokens"] for row in history] == [1024, 1280, 2304, 2560, 3584, 3840]
    assert all(row is kept for row, kept in zip(rows, history, strict=True))


def test_the_last_row_of_an_epoch_says_what_the_validation_blocks_say(teacher, student, blocks):
    measured = []

    def on_step(row):
        if "validation_kl" in row:
            found = kd.evaluate(student, blocks.validation, teacher=teacher)
            measured.append((row["epoch"], found["perplexity"], found["kl_to_teacher"]))

    history = run(teacher, student, blocks, on_step, epochs=2)
    ends = [row for row in history if "validation_kl" in row]
    columns = "epoch", "validation_perplexity", "validation_kl"
    assert [tuple(row[column] for column in columns) for row in ends] == measured
    assert [row["step"] for row in ends] == [3, 6]


def test_the_learning_rate_rises_to_its_peak_and_then_falls(teacher, student, blocks):
    history = run(teacher, student, blocks, batch_size=2, warmup_ratio=0.25, learning_rate=2e-3)
    rise = [1 / 4, 2 / 4, 3 / 4]  # a quarter of twelve steps, none of them idle
    fall = [(1 + math.cos(math.pi * step / 9)) / 2 for step in range(9)]
    rates = numbers(history, "learning_rate")
    assert rates == pytest.approx([2e-3 * share for share in rise + fall])
