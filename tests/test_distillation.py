"""The loop: it trains the student it says, on the loss it says, and leaves all else alone."""

import copy
import dataclasses
import itertools
import math
import warnings
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import OPTConfig, OPTForCausalLM

import willows_kd as kd
from conftest import padded_head
from willows_kd.distillation import DistillationLoss, epoch_batches, micro_batches
from willows_kd.generation import continued, uniform_draws

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
    config = kd.DistillConfig(**{"epochs": 1, "batch_size": 8} | changes)
    return kd.distill(teacher, student, blocks, config, on_step)


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


def by_hand(teacher, student, blocks, config, rates: list[float]) -> list[tuple[float, float]]:
    """Distillation with nothing but PyTorch: loss and gradient norm of each step."""
    matrices = [p for p in student.parameters() if p.ndim > 1]
    vectors = [p for p in student.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors}],
        weight_decay=0,
    )
    epochs = [epoch_batches(blocks.train, config, epoch) for epoch in range(config.epochs)]
    rows = []
    for rate, step in zip(rates, [step for epoch in epochs for step in epoch], strict=True):
        ids, t = blocks.train[step], config.temperature
        z_s, z_t = student(ids).logits[:, :-1], teacher(ids).logits[:, :-1].detach()
        p, q = torch.softmax(z_t / t, dim=-1), torch.softmax(z_s / t, dim=-1)
        soft = t**2 * (p * (p.log() - q.log())).sum() / ids[:, 1:].numel()
        hard = F.cross_entropy(z_s.transpose(1, 2), ids[:, 1:])
        loss = config.alpha * hard + (1 - config.alpha) * soft
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(student.parameters(), config.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        rows.append((loss.item(), norm.item()))
    return rows


def test_the_loop_is_the_loop_written_by_hand(teacher, student, blocks):
    """Its learning rate rises for a third of six steps, none of them idle, and then falls."""
    teacher, student = teacher.double(), student.double()
    same_student = copy.deepcopy(student)
    some = {"epochs": 2, "batch_size": 8, "max_grad_norm": 0.3, "weight_decay": 0.2}
    config = kd.DistillConfig(4, 0.3, **some, warmup_ratio=1 / 3, learning_rate=3e-3)
    history = kd.distill(teacher, student, blocks, config)
    fall = [(1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    rates = [3e-3 * share for share in (1 / 3, 2 / 3, *fall)]
    rows = by_hand(teacher, same_student, blocks, config, rates)
    assert numbers(history, "learning_rate") == pytest.approx(rates)
    found = numbers(history, "loss", "gradient_norm")
    assert found == pytest.approx([value for row in rows for value in row], rel=1e-6)
    assert furthest_apart(student, same_student) < 1e-6


@pytest.mark.parametrize("changes", [{"alpha": 0.3}, {"on_policy_share": 0.5}], ids=str)
def test_how_a_step_is_cut_up_does_not_change_it(teacher, student, blocks, changes):
    few = first(blocks, 21)  # so that the last step is an uneven one
    if "alpha" in changes:  # masked unevenly: some blocks have no token that counts
        mask = torch.rand(few.train.shape, generator=torch.Generator().manual_seed(0))
        few = dataclasses.replace(few, masks={"train": mask < torch.linspace(0, 1, 21)[:, None]})
    teacher, found = teacher.double(), []
    for batch_size, passes in [(8, 1), (2, 4)]:  # blocks in a pass, passes in a step
        cut = {"batch_size": batch_size, "gradient_accumulation_steps": passes}
        model = copy.deepcopy(student).double()
        rows = run(teacher, model, few, seed=5, **cut, **changes)
        config = kd.DistillConfig(seed=5, **cut)
        columns = "loss", "soft_loss", "gradient_norm", "learning_rate", "tokens", "average_loss"
        found.append((numbers(rows[:2], *columns[:-1]) + numbers(rows[2:], *columns), model))
    counts = few.masks.get("train", torch.ones(21, 32))[:, 1:].sum(dim=1)
    sizes = [counts[step].sum().item() for step in epoch_batches(few.train, config, 0)]
    average = sum(row["loss"] * size for row, size in zip(rows, sizes, strict=True)) / sum(sizes)
    assert rows[-1]["average_loss"] == pytest.approx(average)
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert furthest_apart(found[1][1], found[0][1]) < 1e-5


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


# -- whose text, and what else is matched ----------------------------------------------


def test_a_share_of_the_text_is_the_students_and_the_masks_of_the_rest_count(
    teacher, student, blocks, monkeypatch
):
    few, writer, seen = first(blocks, 8), copy.deepcopy(student), []
    mask = torch.rand(few.train.shape, generator=torch.Generator().manual_seed(0)) < 0.5
    forward = DistillationLoss.forward
    monkeypatch.setattr(
        DistillationLoss, "forward", lambda self, *a: seen.append(a[1:]) or forward(self, *a)
    )
    given = dataclasses.replace(few, masks={"train": mask})
    run(teacher, student, given, on_policy_share=0.5, seed=3, dropout=0.5)
    ids, counts = seen[0]
    (order,) = epoch_batches(few.train, kd.DistillConfig(batch_size=8, seed=3), 0)
    prompts, rest = few.train[order][:4, :8], few.train[order][4:]
    written = continued(writer, prompts, 24, uniform_draws(4, 24, 3 * 2**31 + 1))  # no dropout
    assert torch.equal(ids, torch.cat([torch.cat([prompts, written], dim=1), rest]))
    assert torch.equal(counts[4:], mask[order][4:, 1:])
    assert (~counts[:4, :7]).all() and counts[:4, 7:].all()


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


def test_modes_dropout_and_gradients_are_those_of_training_and_after_an_error_as_before(
    teacher, student, blocks
):
    """That all is left as it was after a run that ends well, `test_left_alone` sees."""
    expected = trained(teacher, student, blocks, dropout=0.3)
    torch.manual_seed(7)  # which draws none of the dropout
    teacher.train()
    student.eval().transformer.h[0].mlp.train()
    student(blocks.train[:2]).logits.sum().backward()  # of which nothing leaks into the run
    modes = [module.training for model in (teacher, student) for module in model.modules()]

    def on_step(row):
        assert all(module.training for module in student.modules())
        assert not any(module.training for module in teacher.modules())
        assert {m.p for m in student.modules() if isinstance(m, nn.Dropout)} == {0.3}
        if row["step"] == 3:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(teacher, student, blocks, on_step, dropout=0.3)
    assert furthest_apart(student, expected) == 0
    after = [module.training for model in (teacher, student) for module in model.modules()]
    assert after == modes
    assert 0.3 not in {m.p for m in student.modules() if isinstance(m, nn.Dropout)}
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("alpha", [0, 0.5, 1])
def test_every_weight_is_trained_and_the_teacher_asked_once_a_pass(teacher, student, blocks, alpha):
    """With hard labels alone it is asked about the validation blocks only.

    A loss without weight is None.
    """
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
    for row in history:
        assert (row["soft_loss"] is None, row["hard_loss"] is None) == (alpha == 1, alpha == 0)
        hard, soft = (row[name] or 0.0 for name in ("hard_loss", "soft_loss"))
        assert row["loss"] == pytest.approx(alpha * hard + (1 - alpha) * soft, rel=1e-6)
    unchanged = [name for name, p in student.named_parameters() if torch.equal(p, before[name])]
    assert unchanged == []


def test_the_steps_of_an_epoch_are_all_blocks_once_in_an_order_of_seed_and_epoch():
    orders = []
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1), (0, 0)):
        config = kd.DistillConfig(batch_size=3, gradient_accumulation_steps=2, seed=seed)
        steps = epoch_batches(torch.zeros(13, 4), config, epoch)
        assert [len(step) for step in steps] == [6, 6, 1]
        orders.append(torch.cat(steps).tolist())
        assert sorted(orders[-1]) == list(range(13))
    assert len(epoch_batches(torch.zeros(40, 32), kd.DistillConfig(), 0)[0]) == 1024 / 32
    assert orders[0] == orders[4]
    assert len(set(map(tuple, orders))) == 4


def test_a_family_with_dropout_of_its_own_is_warned_of(teacher, blocks):
    sizes = {"vocab_size": 4096, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64}
    config = OPTConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    student = OPTForCausalLM(config)
    with pytest.warns(UserWarning, match="OPTForCausalLM has dropout .* before the model is made"):
        run(teacher, student, first(blocks, 4), dropout=0.1)
    calm = copy.deepcopy(config)
    calm.dropout = calm.attention_dropout = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(teacher, OPTForCausalLM(calm), first(blocks, 4), dropout=0.1)


def test_it_trains_inside_inference_mode(teacher, student, blocks):
    expected = kd.fingerprint(trained(teacher, student, blocks))
    with torch.inference_mode():
        run(teacher, student, blocks)
    assert kd.fingerprint(student) == expected


def test_bfloat16_gives_nearly_the_same_losses_and_keeps_float32_weights(teacher, student, blocks):
    half = copy.deepcopy(student)
    columns = "loss", "soft_loss", "hard_loss"
    expected = numbers(run(teacher, student, blocks, alpha=0.5), *columns)
    found = numbers(run(teacher, half, blocks, alpha=0.5, dtype="bfloat16"), *columns)
    assert found == pytest.approx(expected, rel=0.02)
    assert found != expected  # or the arithmetic was in float32 all along
    assert {p.dtype for p in half.parameters()} == {torch.float32}


@pytest.mark.parametrize("whose", ["teacher", "student"])
def test_a_padded_head_changes_nothing(teacher, student, blocks, whose):
    models = {"teacher": teacher, "student": copy.deepcopy(student)}
    models[whose] = padded_head(models[whose])
    expected = run(teacher, student, blocks, alpha=0.5)
    sizes = " and ".join(str(model.config.vocab_size) for model in models.values())
    said = f"teacher and student predict {sizes} tokens: the loss is over the first 4096"
    with pytest.warns(UserWarning, match=said):
        found = run(**models, blocks=blocks, alpha=0.5)
    columns = "loss", "soft_loss", "hard_loss", "gradient_norm"
    for rows, names in ((slice(None), columns), (slice(-1, None), END_OF_EPOCH)):
        wanted = pytest.approx(numbers(expected[rows], *names), rel=1e-5)
        assert numbers(found[rows], *names) == wanted
    run(**models, blocks=blocks, on_policy_share=1.0)  # no token of the padding is written


def test_the_dropout_of_the_settings_replaces_the_models_own(teacher, make_gpt2, blocks):
    own = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.4)
    noisy, calm = make_gpt2(layers=1, seed=1, **own), make_gpt2(layers=1, seed=1)
    without, some = (
        [trained(teacher, model, blocks, dropout=p) for model in (noisy, calm)] for p in (0, 0.2)
    )
    assert furthest_apart(*without) == furthest_apart(*some) == 0
    assert furthest_apart(without[0], some[0]) > 0


def test_the_history_has_a_row_a_step_and_the_last_of_an_epoch_the_validation_blocks(
    teacher, student, blocks
):
    measured = []

    def on_step(row):
        if "validation_kl" in row:
            found = kd.evaluate(student, blocks.validation, teacher=teacher)
            measured.append((found["perplexity"], found["kl_to_teacher"]))

    table = pd.DataFrame(run(teacher, student, first(blocks, 20), on_step, epochs=2, alpha=0.5))
    assert set(table.columns) == {*COLUMNS, *END_OF_EPOCH}
    assert table["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert table["epoch"].tolist() == [1, 1, 1, 2, 2, 2]
    assert table["tokens"].tolist() == [32 * count for count in (8, 16, 20, 28, 36, 40)]
    assert table["hidden_loss"].isna().all()  # it has no weight
    assert table[COLUMNS].drop(columns="hidden_loss").notna().all(axis=None)
    assert table[END_OF_EPOCH].notna().all(axis=1).tolist() == [False, False, True] * 2
    ends = table.dropna(subset="validation_kl")[["validation_perplexity", "validation_kl"]]
    assert list(ends.itertuples(index=False, name=None)) == measured


def test_seconds_are_those_of_the_steps_so_far(teacher, blocks, monkeypatch):
    monkeypatch.setattr("time.perf_counter", itertools.count().__next__)
    history = kd.distill(teacher, kd.student_from_teacher(teacher, 1), blocks)
    assert [row["seconds"] for row in history] == [row["step"] for row in history]


def test_where_one_token_counts_it_has_all_the_weight(blocks):
    alone = SimpleNamespace(process_index=0, num_processes=1)
    mask = torch.zeros(len(blocks.train), blocks.block_size - 1, dtype=torch.bool)
    mask[2, 5] = True
    parts = micro_batches(blocks.train, mask, kd.DistillConfig(batch_size=1), alone)
    assert [weight for _, _, weight, _ in parts] == [float(i == 2) for i in range(len(mask))]
