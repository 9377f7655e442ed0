"""The loop: it trains the student it says, on the loss it says, and leaves all else alone."""

import copy
import dataclasses
import hashlib
import math

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import willows_kd as kd
from willows_kd.config import DIVERGENCE_NAMES
from willows_kd.distillation import steps_of_epoch
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
        teacher, student, blocks, kd.DistillConfig(**{"epochs": 1} | changes), on_step
    )


def trained(teacher, student, blocks, **changes) -> nn.Module:
    """A copy of the student after training."""
    student = copy.deepcopy(student)
    run(teacher, student, blocks, **changes)
    return student


def fingerprint(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


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
    count, epochs = len(blocks.train), range(config.epochs)
    steps = [step for epoch in epochs for step in steps_of_epoch(count, config, epoch)]
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
        temperature, alpha, epochs=2, warmup_ratio=0, max_grad_norm=0.3, learning_rate=3e-3
    )
    history = kd.distill(teacher, student, blocks, config)
    rows = by_hand(teacher, same_student, blocks, config)
    found = numbers(history, "loss", "gradient_norm", "learning_rate")
    assert found == pytest.approx([value for row in rows for value in row], rel=1e-6)
    assert furthest_apart(student, same_student) < 1e-6


@pytest.mark.parametrize(("batch_size", "gradient_accumulation_steps"), [(2, 4), (4, 2)])
def test_how_a_step_is_cut_up_does_not_change_it(
    teacher, student, blocks, batch_size, gradient_accumulation_steps
):
    few = first(blocks, 21)  # so that the last step is an uneven one
    teacher, whole, cut = teacher.double(), student.double(), copy.deepcopy(student).double()
    settings = {"alpha": 0.3, "seed": 5}
    expected = run(teacher, whole, few, batch_size=8, gradient_accumulation_steps=1, **settings)
    found = run(
        teacher,
        cut,
        few,
        batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        **settings,
    )
    columns = "loss", "soft_loss", "hard_loss", "gradient_norm", "learning_rate", "tokens"
    assert numbers(found, *columns) == pytest.approx(numbers(expected, *columns), rel=1e-5)
    assert furthest_apart(whole, cut) < 1e-5


# -- whose text, and what else is matched ----------------------------------------------


def test_a_student_that_writes_is_scored_on_what_it_wrote(teacher, student, blocks):
    seen = []
    teacher.base_model.register_forward_pre_hook(lambda _, given: seen.append(given[0].clone()))
    few, writer = first(blocks, 8), copy.deepcopy(student)
    config = kd.DistillConfig(epochs=1, on_policy_share=1.0, seed=3)
    row = kd.distill(teacher, student, few, config)[0]
    step = next(ids for ids in seen if len(ids) == 8 and not torch.equal(ids, few.train))
    (order,) = steps_of_epoch(8, config, 0)
    expected = few.train[order]
    draws = uniform_draws(8, 24, 3 * 2**31 + 1)
    expected = torch.cat([expected[:, :8], continued(writer, expected[:, :8], 24, draws)], dim=1)
    assert torch.equal(step, expected)
    with torch.no_grad():
        z_t, z_s = (model(step).logits[:, 7:-1] for model in (teacher, writer))
    assert row["loss"] == pytest.approx(kd.forward_kl(z_s, z_t).item(), rel=1e-4)


def test_no_text_of_its_own_is_the_book_and_half_is_half(teacher, student, blocks):
    book = trained(teacher, student, blocks)
    assert furthest_apart(book, trained(teacher, student, blocks, on_policy_share=0.0)) == 0
    losses = [
        run(teacher, copy.deepcopy(student), first(blocks, 8), on_policy_share=share)[0]["loss"]
        for share in (0.0, 0.5, 1.0)
    ]
    assert len(set(losses)) == 3


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_how_a_step_is_cut_up_does_not_change_what_is_written(teacher, student, blocks, share):
    whole, cut = copy.deepcopy(student), student
    settings = {"on_policy_share": share, "temperature": 2.0}
    expected = run(teacher, whole, first(blocks, 21), batch_size=8, **settings)
    found = run(
        teacher,
        cut,
        first(blocks, 21),
        batch_size=2,
        gradient_accumulation_steps=4,
        **settings,
    )
    columns = "loss", "gradient_norm"
    assert numbers(found, *columns) == pytest.approx(numbers(expected, *columns), rel=1e-3)


def test_the_writing_takes_no_gradient_and_no_dropout(teacher, student, blocks):
    written = []

    def generate(*arguments, **more):
        assert not torch.is_grad_enabled() and not student.training
        written.append(type(student).generate(student, *arguments, **more))
        return written[-1]

    student.generate = generate
    run(teacher, student, first(blocks, 8), on_policy_share=1.0, dropout=0.5)
    assert len(written) == 1 and not written[0].requires_grad


def test_without_layers_the_final_hidden_states_are_matched(teacher, student, blocks):
    few, start = first(blocks, 8), copy.deepcopy(student)
    row = run(teacher, student, few, hidden_weight=0.5)[0]
    with torch.no_grad():
        states = [kd.hidden_states(model, few.train)[:, :-1] for model in (start, teacher)]
    cosine = F.cosine_similarity(*states, dim=-1)
    assert row["hidden_loss"] == pytest.approx(1 - cosine.mean().item(), rel=1e-4)
    assert row["loss"] == pytest.approx(row["soft_loss"] + 0.5 * row["hidden_loss"], rel=1e-5)


@pytest.mark.parametrize("bias", [False, True], ids=["chunked", "full"])
def test_layers_are_matched_in_pairs(teacher, student, blocks, bias):
    if bias:  # of the head, so that logits are more than hidden states times output weights
        head = nn.Linear(32, teacher.config.vocab_size)
        head.weight = teacher.lm_head.weight
        teacher.lm_head = head
    few, start = first(blocks, 8), copy.deepcopy(student)
    pairs = [(0, 0), (1, 2)]
    row = run(teacher, student, few, hidden_weight=1.0, hidden_layers=pairs)[0]
    with torch.no_grad():
        own, its = (m(few.train, output_hidden_states=True).hidden_states for m in (start, teacher))
    cosines = [F.cosine_similarity(own[a][:, :-1], its[b][:, :-1], dim=-1).mean() for a, b in pairs]
    assert row["hidden_loss"] == pytest.approx(1 - sum(cosines).item() / 2, rel=1e-4)


def test_matching_hidden_states_brings_them_nearer_without_any_label(teacher, student, blocks):
    history = run(teacher, student, blocks, alpha=1.0, hidden_weight=10.0, epochs=8)
    assert history[-1]["hidden_loss"] < 0.7 * history[0]["hidden_loss"]


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        (None, r"student are \[16\] wide, the teacher's \[32\]"),
        (((1, 9),), "names layer 9 of the teacher, which has none"),
    ],
)
def test_hidden_states_that_cannot_be_matched_are_refused(teacher, make_gpt2, blocks, pairs, said):
    narrow = make_gpt2(layers=1, n_embd=16)
    with pytest.raises(kd.InputError, match=said):
        run(teacher, narrow, blocks, hidden_weight=1.0, hidden_layers=pairs)


def test_a_cache_is_refused_where_it_cannot_answer(teacher, student, blocks):
    cache = kd.cache_teacher(teacher, blocks)
    with pytest.raises(kd.InputError, match="knows only the text it was made for"):
        run(cache, student, blocks, on_policy_share=0.5)
    with pytest.raises(kd.InputError, match="holds its final hidden states"):
        run(cache, student, blocks, hidden_weight=1.0, hidden_layers=[(1, 1)])
    sampled = kd.cache_teacher(teacher, blocks, samples=4)
    for changes in (dict(divergence="reverse_kl"), dict(temperature=2.0)):
        with pytest.raises(kd.InputError, match="forward KL at temperature 1 only"):
            run(sampled, student, blocks, **changes)
    with pytest.raises(kd.InputError, match="with top_k or samples none at all"):
        run(sampled, student, blocks, hidden_weight=1.0)
    expected = trained(teacher, student, blocks, hidden_weight=1.0)
    assert furthest_apart(expected, trained(cache, student, blocks, hidden_weight=1.0)) < 1e-6


def test_sampled_labels_teach_what_the_full_ones_do(teacher, student, blocks):
    sampled = kd.cache_teacher(teacher, blocks, samples=64)
    before = kd.quality(student, blocks.train, teacher=teacher)["kl_to_teacher"]
    history = run(sampled, student, blocks, epochs=8, learning_rate=3e-3)
    assert history[-1]["validation_kl"] is None and history[-1]["validation_perplexity"] > 0
    after = kd.quality(student, blocks.train, teacher=teacher)["kl_to_teacher"]
    assert after < 0.8 * before


# -- what is trained, and what is not --------------------------------------------------


@pytest.mark.parametrize(("training", "takes_gradients"), [(True, False), (False, True)])
def test_the_teacher_is_left_as_it_was(teacher, student, blocks, training, takes_gradients):
    teacher.train(training).requires_grad_(takes_gradients)
    before = fingerprint(teacher)
    run(teacher, student, blocks, alpha=0.5, dropout=0.1)
    assert fingerprint(teacher) == before
    assert {module.training for module in teacher.modules()} == {training}
    assert {p.requires_grad for p in teacher.parameters()} == {takes_gradients}
    assert all(p.grad is None for p in teacher.parameters())


def test_a_teacher_in_train_mode_teaches_without_its_dropout(make_gpt2, student, blocks):
    noise = dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.5)
    teacher = make_gpt2(layers=3, **noise)
    calm = trained(teacher.eval(), student, blocks)
    assert fingerprint(trained(teacher.train(), student, blocks)) == fingerprint(calm)


@pytest.mark.parametrize("alpha", [0, 0.5, 1])
def test_every_weight_of_the_student_is_trained(teacher, student, blocks, alpha):
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    run(teacher, student, blocks, alpha=alpha)
    unchanged = [name for name, p in student.named_parameters() if torch.equal(p, before[name])]
    assert unchanged == []


def test_a_frozen_part_of_the_student_stays(teacher, student, blocks):
    positions = student.transformer.wpe.weight.requires_grad_(False)
    before = positions.clone()
    run(teacher, student, blocks)
    assert torch.equal(positions, before)


def test_even_a_single_step_teaches(teacher, student, blocks):
    before = fingerprint(student)
    assert len(run(teacher, student, first(blocks, 4))) == 1
    assert fingerprint(student) != before


def test_gradients_from_before_do_not_leak_into_the_first_step(teacher, student, blocks):
    expected = trained(teacher, student, blocks)
    student(blocks.train[:2]).logits.sum().backward()
    run(teacher, student, blocks)
    assert furthest_apart(student, expected) == 0


def test_with_alpha_1_the_teacher_is_never_asked_while_training(teacher, student, blocks):
    asked_while_training = []
    teacher.register_forward_pre_hook(lambda *_: asked_while_training.append(student.training))
    history = run(teacher, student, blocks, alpha=1)
    assert not any(asked_while_training)
    assert history[-1]["validation_kl"] > 0  # the look at the validation blocks does ask it


def test_with_alpha_below_1_the_teacher_is_asked_once_for_each_forward_pass(
    teacher, student, blocks
):
    asked_while_training = []
    note = lambda *_: asked_while_training.append(student.training)  # noqa: E731
    teacher.base_model.register_forward_pre_hook(note)
    student.eval()
    run(teacher, student, blocks, batch_size=4, gradient_accumulation_steps=2)
    assert sum(asked_while_training) == 6


def test_the_student_sees_each_training_block_once_an_epoch(teacher, student, blocks):
    seen = []

    def remember(module, inputs):
        if module.training:
            seen.extend(map(tuple, inputs[0].tolist()))

    student.base_model.register_forward_pre_hook(remember)
    run(teacher, student, first(blocks, 21), epochs=2, batch_size=4)
    train = sorted(map(tuple, blocks.train[:21].tolist()))
    assert sorted(seen[:21]) == sorted(seen[21:]) == train
    assert seen[:21] != seen[21:]


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
    steps = steps_of_epoch(blocks, config, epoch)
    assert sorted(torch.cat(steps).tolist()) == list(range(blocks))
    assert all(len(step) == batch_size * gradient_accumulation_steps for step in steps[:-1])
    assert 1 <= len(steps[-1]) <= batch_size * gradient_accumulation_steps


def test_the_order_of_the_blocks_follows_from_seed_and_epoch():
    orders = {
        (seed, epoch): torch.cat(steps_of_epoch(50, kd.DistillConfig(seed=seed), epoch))
        for seed in (0, 1, 2)
        for epoch in (0, 1, 2)
    }
    assert len({tuple(order.tolist()) for order in orders.values()}) == 9
    assert torch.equal(orders[1, 2], torch.cat(steps_of_epoch(50, kd.DistillConfig(seed=1), 2)))


# -- random numbers --------------------------------------------------------------------


def test_the_same_seed_gives_the_same_student_whatever_came_before(teacher, student, blocks):
    students = []
    for number in (1, 2):
        torch.manual_seed(number)
        students.append(fingerprint(trained(teacher, student, blocks, seed=3, dropout=0.1)))
    assert students[0] == students[1]


def test_another_seed_gives_another_student(teacher, student, blocks):
    students = [fingerprint(trained(teacher, student, blocks, seed=seed)) for seed in (0, 1)]
    assert students[0] != students[1]


def test_the_seed_also_draws_the_dropout(teacher, student, blocks):
    """A single step sees all blocks: only the dropout is left to differ."""
    losses = [
        run(teacher, student, blocks, seed=seed, dropout=0.5, batch_size=24, learning_rate=1e-9)
        for seed in (0, 1)
    ]
    assert losses[0][0]["loss"] != pytest.approx(losses[1][0]["loss"], rel=1e-6)


def test_the_random_numbers_of_the_caller_go_on_undisturbed(teacher, student, blocks):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    run(teacher, student, blocks, dropout=0.1)
    assert torch.equal(torch.get_rng_state(), before)


# -- losses that mean what they say ----------------------------------------------------


@pytest.mark.parametrize("divergence", DIVERGENCE_NAMES)
def test_the_student_comes_closer_to_its_teacher(teacher, student, blocks, divergence):
    history = run(
        *(teacher, student, first(blocks, 4)),
        **{"divergence": divergence, "epochs": 15, "batch_size": 4, "learning_rate": 1e-2},
    )
    averages = [row["average_loss"] for row in history]
    assert averages[-1] < 0.8 * averages[0]


def test_the_student_learns_hard_labels_by_heart(teacher, student, blocks):
    few = first(blocks, 2)
    run(teacher, student, few, alpha=1, epochs=20, batch_size=2, learning_rate=3e-2)
    assert kd.quality(student, few.train)["perplexity"] < 20


def test_a_copy_of_the_teacher_has_nothing_to_learn(teacher, blocks):
    row = run(teacher, copy.deepcopy(teacher), blocks)[0]
    assert row["soft_loss"] == row["loss"] == 0
    assert row["gradient_norm"] == pytest.approx(0, abs=1e-6)


def test_the_divergence_is_the_one_that_was_asked_for(teacher, student, blocks):
    at_start = [teacher(blocks.train).logits, student(blocks.train).logits]
    z_t, z_s = (logits.detach()[:, :-1] for logits in at_start)
    for name in DIVERGENCE_NAMES:
        config = {"divergence": name, "temperature": 3, "batch_size": 24}
        row = run(teacher, copy.deepcopy(student), blocks, **config)[0]
        assert row["soft_loss"] == pytest.approx(getattr(kd, name)(z_s, z_t, 3).item(), rel=1e-5)


@pytest.mark.parametrize(
    ("alpha", "missing"), [(0, {"hard_loss"}), (0.3, set()), (1, {"soft_loss"})]
)
def test_a_loss_that_has_no_weight_is_none(teacher, student, blocks, alpha, missing):
    for row in run(teacher, student, blocks, alpha=alpha):
        assert {name for name in ("soft_loss", "hard_loss") if row[name] is None} == missing
        hard, soft = (row[name] or 0.0 for name in ("hard_loss", "soft_loss"))
        assert row["loss"] == pytest.approx(alpha * hard + (1 - alpha) * soft, rel=1e-6)


def test_a_loss_that_is_no_number_stops_the_training_and_names_the_step(teacher, student, blocks):
    def break_student(row):
        if row["step"] == 2:
            student.lm_head.weight.data.fill_(math.nan)

    with pytest.raises(kd.InputError, match=r"the loss became nan at step 3; lower"):
        run(teacher, student, blocks, break_student, batch_size=4)


def hide_token(model, token: int) -> None:
    """Give a token the logit -inf, and so probability 0, as a mask over the vocabulary does."""

    def hide(_module, _inputs, output):
        logits = output.logits.clone()
        logits[..., token] = -math.inf
        output["logits"] = logits

    model.register_forward_hook(hide)


def test_an_infinite_loss_names_whose_logits_are_infinite(teacher, student, blocks):
    token = blocks.train[0, 1].item()
    hide_token(student, token)
    with pytest.raises(kd.InputError, match="at step 1; the student's logits hold infinities"):
        run(teacher, student, blocks)
    hide_token(teacher, token)
    run(teacher, copy.deepcopy(student), blocks)  # both give it 0: nothing is wrong
    student._forward_hooks.clear()
    run(teacher, copy.deepcopy(student), blocks)  # nor if it is the teacher alone
    with pytest.raises(kd.InputError, match="at step 1; the teacher's logits hold infinities"):
        run(teacher, student, blocks, divergence="reverse_kl")


def test_half_precision_is_refused_in_a_student_and_named_in_a_teacher(teacher, student, blocks):
    with pytest.raises(kd.InputError, match=r"weights are float16.* student\.float\(\)"):
        run(teacher, copy.deepcopy(student).half(), blocks)
    teacher.bfloat16()
    assert run(teacher, copy.deepcopy(student), blocks)[-1]["loss"] > 0
    teacher.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(kd.InputError, match=r"the teacher's weights are in half precision"):
        run(teacher, student, blocks)


def test_it_trains_inside_no_grad_and_inference_mode(teacher, student, blocks):
    expected = fingerprint(trained(teacher, student, blocks))
    for without_gradients in (torch.no_grad, torch.inference_mode):
        fresh = copy.deepcopy(student)
        with without_gradients():
            run(teacher, fresh, blocks)
        assert fingerprint(fresh) == expected


def test_a_model_without_a_head_is_refused(teacher, student, blocks):
    for models in ((teacher, student.transformer), (teacher.transformer, student)):
        with pytest.raises(kd.InputError, match="a GPT2Model, which predicts no tokens"):
            run(*models, blocks)


def test_gradient_checkpointing_needs_a_model_that_has_it(teacher, student, blocks, monkeypatch):
    monkeypatch.setattr(type(student), "supports_gradient_checkpointing", False)
    with pytest.raises(kd.InputError, match="a GPT2LMHeadModel has no gradient checkpointing"):
        run(teacher, student, blocks, gradient_checkpointing=True)


@pytest.mark.parametrize("linear_head", [True, False])
@pytest.mark.parametrize(
    ("divergence", "parameters"),
    [("jensen_shannon", {"beta": 0.2}), ("skewed_forward_kl", {"skew": 0.5})],
)
def test_beta_and_skew_reach_the_divergence(
    teacher, student, blocks, monkeypatch, linear_head, divergence, parameters
):
    with torch.no_grad():
        z_t, z_s = (model(blocks.train).logits[:, :-1] for model in (teacher, student))
    if not linear_head:
        monkeypatch.setattr("willows_kd.distillation.has_linear_head", lambda *_: False)
    row = run(teacher, student, blocks, divergence=divergence, batch_size=24, **parameters)[0]
    expected = getattr(kd, divergence)(z_s, z_t, **parameters).item()
    assert row["soft_loss"] == pytest.approx(expected, rel=1e-5)


def test_bfloat16_gives_nearly_the_same_losses_and_keeps_float32_weights(teacher, student, blocks):
    half = copy.deepcopy(student)
    columns = "loss", "soft_loss", "hard_loss"
    expected = numbers(run(teacher, student, blocks, alpha=0.5), *columns)
    found = numbers(run(teacher, half, blocks, alpha=0.5, dtype="bfloat16"), *columns)
    assert found == pytest.approx(expected, rel=0.02)
    assert found != expected  # or the arithmetic was in float32 all along
    assert {p.dtype for p in half.parameters()} == {torch.float32}


# -- vocabularies ----------------------------------------------------------------------


def test_another_vocabulary_is_refused_before_anything_is_trained(teacher, make_gpt2, blocks):
    student = make_gpt2(layers=1, vocab_size=5000)
    before = fingerprint(student)
    with pytest.raises(kd.InputError, match=r"the teacher predicts 4096 tokens, the student 5000"):
        run(teacher, student, blocks, on_step=lambda row: pytest.fail("a step was made"))
    assert fingerprint(student) == before


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
    assert fingerprint(noisy) == fingerprint(calm)
    without = [trained(teacher, model, blocks, dropout=0) for model in (noisy, calm)]
    with_some = [trained(teacher, model, blocks, dropout=0.2) for model in (noisy, calm)]
    assert furthest_apart(*without) == furthest_apart(*with_some) == 0
    assert furthest_apart(without[0], with_some[0]) > 0
    assert set(dropouts(without[0])) == set(dropouts(with_some[0])) == {0.4}


@pytest.mark.parametrize(("training", "interrupted"), [(True, False), (False, True)])
def test_modes_dropout_and_random_numbers_are_as_before(
    teacher, student, blocks, training, interrupted
):
    teacher.train(training)
    student.train(training)
    before = dropouts(student), torch.get_rng_state()

    def on_step(row):
        assert student.training
        assert not teacher.training
        assert set(dropouts(student)) == {0.3}
        if interrupted:
            raise KeyboardInterrupt

    try:
        run(teacher, student, blocks, on_step, dropout=0.3)
    except KeyboardInterrupt:
        assert interrupted
    assert (teacher.training, student.training) == (training, training)
    assert dropouts(student) == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


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


def test_on_step_is_called_for_each_step_with_its_row(teacher, student, blocks):
    rows = []
    history = run(teacher, student, blocks, rows.append, epochs=2)
    assert len(rows) == 6
    assert all(row is kept for row, kept in zip(rows, history, strict=True))


def test_the_last_row_of_an_epoch_says_what_the_validation_blocks_say(teacher, student, blocks):
    measured = []

    def on_step(row):
        if "validation_kl" in row:
            found = kd.quality(student, blocks.validation, teacher=teacher)
            measured.append((row["epoch"], found["perplexity"], found["kl_to_teacher"]))

    history = run(teacher, student, blocks, on_step, epochs=2)
    ends = [row for row in history if "validation_kl" in row]
    columns = "epoch", "validation_perplexity", "validation_kl"
    assert [tuple(row[column] for column in columns) for row in ends] == measured
    assert [row["step"] for row in ends] == [3, 6]


def test_the_average_loss_weighs_each_step_by_its_blocks(teacher, student, blocks):
    history = run(teacher, student, first(blocks, 21), epochs=2)
    for epoch in (history[:3], history[3:]):
        losses = [row["loss"] for row in epoch]
        expected = (8 * losses[0] + 8 * losses[1] + 5 * losses[2]) / 21
        assert epoch[-1]["average_loss"] == pytest.approx(expected)


def test_the_learning_rate_rises_to_its_peak_and_then_falls(teacher, student, blocks):
    history = run(teacher, student, blocks, batch_size=2, warmup_ratio=0.25, learning_rate=2e-3)
    rise = [1 / 4, 2 / 4, 3 / 4]  # a quarter of twelve steps, none of them idle
    fall = [(1 + math.cos(math.pi * step / 9)) / 2 for step in range(9)]
    rates = numbers(history, "learning_rate")
    assert rates == pytest.approx([2e-3 * share for share in rise + fall])


def test_without_settings_the_defaults_hold(teacher, student, blocks):
    history = kd.distill(teacher, student, first(blocks, 8))
    assert [row["epoch"] for row in history] == [1, 2, 3]
