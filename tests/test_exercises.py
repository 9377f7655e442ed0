"""The checks of the exercises: each usual mistake gets its hint, a right answer its praise."""

import importlib
import math
import pkgutil
import re
import statistics

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

import willows_kd as kd
from willows_kd import exercises
from willows_kd.exercises import soft_labels
from willows_kd.exercises.teacher import count

judge = exercises.judge


def parameters(config, depth=None, without=0):
    """A count by formula: `without` is what a layer lacks, per layer."""
    width, depth = config.n_embd, depth or config.n_layer
    tables = (config.vocab_size + config.n_positions) * width
    return tables + depth * (12 * width**2 + 13 * width - without) + 2 * width


COUNT = [
    (parameters, "well done"),
    (lambda c: c.vocab_size * c.n_embd, "the table of positions is missing"),
    (lambda c: parameters(c, without=8 * c.n_embd**2), "weights of the MLP are missing"),
    (lambda c: parameters(c, 1, without=9 * c.n_embd), "After that, 1 more to find"),
    (lambda c: parameters(c, depth=3), "right for one example, wrong for another"),
    (lambda c: 17, "on one example you return 17; it should be"),
]


def test_the_formula_of_the_check_counts_what_transformers_builds():
    config = GPT2Config(vocab_size=90, n_positions=31, n_embd=12, n_layer=3, n_head=2)
    assert count(config) == GPT2LMHeadModel(config).num_parameters()


def guesser(train, test, vocabulary, extra=1, more=None):
    """The surprise, in nats, of each token of the test."""
    counts = torch.bincount(train.flatten(), minlength=vocabulary)
    total = train.numel() + (vocabulary * extra if more is None else more)
    return -((counts + extra) / total)[test].log()


GUESSER = [
    (lambda *a: guesser(*a).mean().exp(), "well done"),
    (lambda train, test, v: guesser(test, test, v).mean().exp(), "you count in the test text"),
    (lambda *a: 2 ** guesser(*a).mean(), "the power is of 2"),
    (lambda *a: guesser(*a, more=0).mean().exp(), "sum to more than 1"),
    (lambda *a: guesser(*a, extra=0).mean().exp(), "Add 1 to every count"),
    (lambda *a: 0, "returns 0, whatever it is given"),
]

BITS = [
    (lambda nats, text: nats.sum() / math.log(2) / len(text.encode()), "well done"),
    (lambda nats, text: nats.mean() / math.log(2), "divide by the number of tokens"),
    (lambda nats, text: None, "Does it end with `return`?"),
    (lambda nats, text: nats, "your result has shape (11,); it is one number"),
    (lambda nats, text: "many", "your function returns str"),
]


def my_kl(z_s, z_t, t, dim=-1, factor=2):
    log_q, log_p = (z_s / t).log_softmax(dim), (z_t / t).log_softmax(dim)
    return t**factor * (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def library_kl(z_s, z_t, t, reduction="sum", first=F.log_softmax, second=F.softmax):
    """With `F.kl_div`, as most learners write it."""
    value = F.kl_div(first(z_s / t, -1), second(z_t / t, -1), reduction=reduction)
    return t**2 * value / (z_s[..., 0].numel() if reduction == "sum" else 1)


FORWARD_KL = [
    (my_kl, "well done"),
    (library_kl, "well done"),
    (lambda *a: my_kl(*a, dim=1), "your softmax runs over dim=1"),
    (
        lambda s, t, T: -(T**2) * (kd.soften(t, T) * (s / T).log_softmax(-1)).sum(-1).mean(),
        "it is the cross-entropy with the soft labels",
    ),
    (lambda *a: library_kl(*a, first=F.softmax), "it wants their logarithms"),
    (lambda s, t, T: my_kl(t, s, T), "this is reverse KL"),
    (lambda s, t, T: T**2 * my_kl(s, t / T, 1), "only the teacher is softened"),
    (lambda s, t, T: T**2 * my_kl(s / T, t, 1), "only the student is softened"),
    (lambda *a: library_kl(*a, reduction="batchmean"), "the KL grows with the length"),
    (lambda *a: library_kl(*a, reduction="mean"), "the KL shrinks as the vocabulary grows"),
    (lambda *a: my_kl(*a, factor=0), "T² is missing"),
    (lambda s, t, T: library_kl(s, t, T, "batchmean") / T**2, "1 more to find"),
    (lambda *a: library_kl(*a, second=F.log_softmax), "log_target=True"),
    (lambda *a: my_kl(*a).item(), "no gradient reaches the student"),
    (lambda s, t, T: my_kl(s, t, T).detach() + 0 * s.sum(), "the gradient is not"),
]


def temperature_for(logits, nats, halvings=40, low=0.01, high=100.0):
    for _ in range(halvings):
        middle = (low * high) ** 0.5
        enough = kd.entropy(kd.soften(logits, middle)) >= nats
        low, high = (low, middle) if enough else (middle, high)
    return (low * high) ** 0.5


FIND_TEMPERATURE = [
    (temperature_for, "well done"),
    (lambda z, nats: 1.0, "whatever entropy is asked for, you return 1"),
    (lambda z, nats: -1.0, "one positive, finite number"),
    (lambda z, nats: temperature_for(z, nats * math.log(2)), "you measure in bits"),
    (lambda z, nats: 1 / temperature_for(z, nats), "multiplies the logits"),
    (lambda z, nats: temperature_for(z, nats, 8), "that is near"),
    (lambda z, nats: 100.0 if nats < 2 else 0.01, "the lower end moves up to the middle"),
    (lambda z, nats: z, "one positive, finite number"),
]


def alpha(s, t, labels, T, soft=kd.forward_kl):
    """Where the sizes of both gradients are equal."""
    s = s.clone().requires_grad_()
    terms = kd.hard_label_loss(s, labels), soft(s, t, T)
    a, b = (torch.autograd.grad(term, s)[0].norm() for term in terms)
    return b / (a + b)


EQUAL_SAY = [
    (alpha, "well done"),
    (lambda *a: 1 - alpha(*a), "yours gives the larger gradient the larger say"),
    (lambda *a: alpha(*a, soft=lambda *z: my_kl(*z, factor=0)), "T² is missing from the soft"),
    (lambda *a: alpha(*a, soft=lambda s, t, T: kd.forward_kl(s, t)), "Give kd.forward_kl the"),
]

SHIFT = [
    (lambda z, ids: (z[:, :-1], ids[:, 1:]), "well done"),
    (lambda z, ids: (z, ids), "position i is paired with token i, which"),
    (lambda z, ids: (z[:, 1:], ids[:, :-1]), "position i is paired with token i - 1"),
    (lambda z, ids: (z[:, :-1], ids), "the shapes are (2, 5, 5) and (2, 6), not (2, 5, 5)"),
    (lambda z, ids: (z, ids.roll(-1, 1)), "cut it off, do not roll it round"),
    (lambda z, ids: (z[:-1], ids[1:]), "Time is the second dimension"),
    (lambda z, ids: (z[:, 1:-1], ids[:, 2:]), "not every position but the last"),
    (lambda z, ids: z[:, :-1].sum(), "return two tensors"),
    (lambda z, ids: z[:, :, :, 0], "your function stops with IndexError"),
]


def my_loss(s, t, labels, T, alpha, kl=my_kl, side=1, soften_hard=False):
    hard = F.cross_entropy((s / T if soften_hard else s).flatten(0, 1), labels.flatten())
    first, second = (hard, kl(s, t, T))[::side]
    return alpha * first + (1 - alpha) * second


LOSS = [
    (my_loss, "well done"),
    (lambda *a: my_loss(*a, side=-1), "alpha is on the wrong side"),
    (lambda *a: my_loss(*a, soften_hard=True), "the hard labels are softened"),
    (
        lambda s, t, labels, T, a: T**2 * my_loss(s, t, labels, T, a, lambda *x: my_kl(*x, -1, 0)),
        "T² multiplies the hard labels too",
    ),
    (lambda *a: my_loss(*a, kl=lambda *x: my_kl(*x, factor=0)), "T² is missing. Multiply the KL"),
    (lambda *a: my_loss(*a, kl=lambda *x: my_kl(*x, factor=0), side=-1), "alpha is on the wrong"),
]

STEPS = [
    (lambda blocks, size, times, epochs: epochs * -(-blocks // (size * times)), "well done"),
    (lambda blocks, size, times, epochs: epochs * -(-blocks // size), "those are forward passes"),
]


def same(teacher, student, dim=-1):
    return (teacher.argmax(dim) == student.argmax(dim)).float()


AGREEMENT = [
    (lambda t, s: same(t, s).mean(), "well done"),
    (lambda t, s: same(t, s).sum(), "this is a number of positions"),
    (lambda t, s: (t.max(-1).values == s.max(-1).values).float().mean(), "argmax, not max"),
    (lambda t, s: (t.argmax() == s.argmax()).float(), "an argmax without dim"),
    (lambda t, s: (t.argmax(-1) == s.argmax(-1)).mean(), "True and False have no mean"),
    (lambda t, s: ..., "returns nothing"),
]


def half(values, t=4.30, spread=statistics.stdev):
    return t * spread(values) / len(values) ** 0.5


HALF_WIDTH = [
    (half, "well done"),
    (lambda values: half(values, spread=statistics.pstdev), "too small for a sample"),
    (lambda values: 2 * half(values, t=1.96), "1.96 is the normal's"),
]

PERPLEXITY = [
    (lambda bits, size, tokens: math.exp(math.log(2) * bits * size / tokens), "well done"),
    (lambda bits, size, tokens: math.exp(bits * size / tokens), "raised with the base e"),
]

MASK = [
    (lambda length, prompt: torch.arange(1, length) >= prompt, "well done"),
    (lambda length, prompt: (torch.arange(1, length) >= prompt).tolist(), "well done"),
    (lambda length, prompt: torch.arange(length) >= prompt, "The first token is not predicted"),
    (lambda length, prompt: torch.arange(1, length) > prompt, "first written token is left out"),
]


def some_skewed_kl(z_s, z_t, skew):
    q, p = z_s.softmax(-1), z_t.softmax(-1)
    return (p * (p / (skew * p + (1 - skew) * q)).log()).sum(-1)


SKEWED_KL = [
    (lambda *a: some_skewed_kl(*a).mean(), "well done"),
    (lambda z_s, z_t, skew: some_skewed_kl(z_t, z_s, skew).mean(), "student's distribution comes"),
    (lambda *a: some_skewed_kl(*a).sum(), "it grows with the number of tokens"),
]

REWARD_LOSS = [
    (lambda log_q, log_p: ((log_q - log_p).detach() * log_q).mean(), "well done"),
    (lambda log_q, log_p: ((log_q - log_p) ** 2 / 2).mean(), "well done"),  # k2
    (lambda log_q, log_p: (log_q - log_p).mean(), "the gradient is 0 on average"),
    (lambda log_q, log_p: ((log_p - log_q).exp() - 1 - log_p + log_q).mean(), "as of k3"),
    (lambda log_q, log_p: ((log_p - log_q).detach() * log_q).mean(), "the sign is wrong"),
    (lambda log_q, log_p: ((log_q - log_p).detach() * log_q).sum(), "take the mean"),
    (lambda log_q, log_p: (log_q - log_p).detach().mean(), "no gradient comes out"),
    (lambda log_q, log_p: (log_q - log_p).detach() * log_q, "return one number"),
]


def distances(a, b, dim=-1):
    return 1 - F.cosine_similarity(a, b, dim=dim)


COSINE = [
    (lambda a, b, mask: distances(a, b)[mask].mean(), "well done"),
    (lambda a, b, mask: distances(a, b).mean(), "the padding counts too"),
    (lambda a, b, mask: (distances(a, b) * mask).mean(), "you divide by the padding, too"),
    (lambda a, b, mask: distances(a, b)[mask].sum(), "this is a sum over the tokens"),
]

UNITS = [
    (lambda a, keep: a.abs().mean((0, 1)).topk(keep).indices.tolist(), "well done"),
    (lambda a, keep: a.mean((0, 1)).topk(keep).indices, "is passed on too"),
    (lambda a, keep: a.abs().mean((0, 1)).topk(keep + 1).indices, "your result has shape (6,)"),
    (lambda a, keep: None, "returns nothing"),
]


def uld(z_s, z_t):
    total = 0
    for mine, other in zip(z_s.softmax(-1).tolist(), z_t.softmax(-1).tolist(), strict=True):
        mine, other = (sorted(row, reverse=True) + 9 * [0] for row in (mine, other))
        total += sum(abs(a - b) for a, b in zip(mine, other, strict=False))
    return total / len(z_s)


ULD = [
    (uld, "well done"),
    (lambda z_s, z_t: 4 * uld(z_s, z_t), "it grows with the number of tokens"),
]


def emitted(p, q, token, u, ratio=lambda p, q: p / q, left=lambda p, q: (p - q).clamp(min=0)):
    if u < ratio(p[token], q[token]):
        return F.one_hot(torch.tensor(token), len(p)).double()
    return left(p, q) / left(p, q).sum()


EMITTED = [
    (emitted, "well done"),
    (lambda *a: emitted(*a, left=lambda p, q: p), "and not from p"),
    (lambda *a: emitted(*a, ratio=lambda p, q: 1), "a rejected token is replaced"),
    (lambda *a: emitted(*a, ratio=lambda p, q: q / p), "the token is accepted"),
]

TOKENS = [
    (lambda a, k: (1 - a ** (k + 1)) / (1 - a), "well done"),
    (lambda a, k: (1 - a**k) / (1 - a), "one term too early"),
]


def rounding(weight, bits):
    scales = [row.abs().max() / (2 ** (bits - 1) - 1) for row in weight]
    return torch.stack([(r / s).round() * s for r, s in zip(weight, scales, strict=True)])


ROUNDING = [
    (rounding, "well done"),
    (lambda w, bits: rounding(w.T, bits).T, "a scale for each column"),
    (lambda w, bits: rounding(w, 6), "on one example you return"),
]

BYTES = [(lambda t, s: 4 * (t + s) + 3 * 4 * s, "well done")]
FLOPS = [(lambda t, s, n: n * (2 * t + 6 * s), "well done")]


def stop(perplexities, patience, first=1):
    best = 0
    for epoch, value in enumerate(perplexities):
        best = epoch if value < perplexities[best] else best
        if epoch - best == patience:
            break
    return best + first


STOP = [
    (stop, "well done"),
    (lambda p, patience: stop(p, patience, first=0), "you count from 0"),
    (lambda p, patience: stop(p, 1), "you stop at the first epoch that is no better"),
]

MODULES = [
    importlib.import_module(f"willows_kd.exercises.{module.name}")
    for module in pkgutil.iter_modules(exercises.__path__)
]
TABLES = {  # each check of a function has a list of answers of its name
    check: globals()[name.removeprefix("check_").upper()]
    for module in MODULES
    for name, check in vars(module).items()
    if name.startswith("check_") and name not in ("check_bugs", "check_score")
}


def said(capsys) -> str:
    return re.sub(r"\s+", " ", capsys.readouterr().out)


@pytest.mark.parametrize("check", TABLES, ids=lambda check: check.__name__)
def test_each_answer_gets_its_hint(check, capsys):
    for answer, hint in TABLES[check]:
        assert check(answer) == (hint == "well done")
        assert hint in said(capsys)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.split(".")[-1])
def test_no_mistake_gets_the_hint_of_another(module, capsys, monkeypatch):
    """What each check takes for a mistake, given to it as an answer."""
    judged = []
    for place in (exercises, module):
        monkeypatch.setattr(
            place, "judge", lambda *given, **more: judged.append((given, more)), raising=False
        )
    for check in TABLES:
        if check.__module__ == module.__name__:
            check(TABLES[check][0][0])
    for (_, cases, right, mistakes, *rest), more in judged:
        for hint, wrong in exercises.wrong_answers(right, mistakes, most=1):
            assert not judge(wrong, cases, right, mistakes, *rest, **more)
            assert hint in said(capsys)


def test_an_answer_may_change_its_arguments():
    def in_place(student_logits, teacher_logits, temperature):
        teacher_logits /= temperature
        return temperature**2 * my_kl(student_logits / temperature, teacher_logits, 1)

    assert soft_labels.check_forward_kl(in_place)
