"""The checks of the exercises: each usual mistake gets its hint, a right answer its praise."""

import importlib
import math
import pkgutil
import re
import statistics

import pytest
import torch
import torch.nn.functional as F

import willows_kd as kd
from willows_kd import exercises

judge = exercises.judge


def parameters(config, depth=None, biases=9):
    width = config.n_embd
    tables = (config.vocab_size + config.n_positions) * width
    return tables + (depth or config.n_layer) * (12 * width + biases + 4) * width + 2 * width


COUNT = [
    (parameters, "well done"),
    (lambda c: c.vocab_size * c.n_embd, "one more n_positions adds 0, not 100"),
    (lambda c: parameters(c, depth=3), "one more n_layer adds 0, not 121,300"),
    (lambda c: parameters(c, biases=0), "one more n_layer adds 120,400, not 121,300"),
    (lambda c: parameters(c) + 17, "on one example you return"),
    (lambda c: [1, 2], "your result has shape (2,); it is one number"),
]


def guesser(train, test, vocabulary, extra=1, more=1):
    """The mean surprise, in nats, of a token of the test."""
    counts = torch.bincount(train.flatten(), minlength=vocabulary)
    return -((counts + extra) / (train.numel() + vocabulary * more))[test].log().mean()


GUESSER = [
    (lambda *a: guesser(*a).exp(), "well done"),
    (guesser, "take exp of it"),
    (lambda *a: guesser(*a, more=0).exp(), "the total by `vocabulary`"),
    (lambda *a: guesser(*a, extra=0).exp(), "add 1 to every count"),
]

BITS = [
    (lambda nats, text: nats.sum() / math.log(2) / len(text.encode()), "well done"),
    (lambda nats, text: nats.mean(), "that is nats per token"),
    (lambda nats, text: nats, "your result has shape (11,); it is one number"),
    (lambda nats, text: "many", "your function returns str"),
]


def my_kl(z_s, z_t, t, dim=-1, factor=2):
    log_q, log_p = (z_s / t).log_softmax(dim), (z_t / t).log_softmax(dim)
    return t**factor * (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def library_kl(z_s, z_t, t, reduction="batchmean", first=F.log_softmax):
    """With `F.kl_div`, as most learners write it, of all tokens as one batch."""
    q, p = first(z_s / t, -1).flatten(0, 1), F.softmax(z_t / t, -1).flatten(0, 1)
    return t**2 * F.kl_div(q, p, reduction=reduction)


def in_place(z_s, z_t, t):
    z_t /= t
    return t**2 * my_kl(z_s / t, z_t, 1)


FORWARD_KL = [
    (my_kl, "well done"),
    (library_kl, "well done"),
    (in_place, "well done"),
    (lambda *a: my_kl(*a, dim=1), "your softmax runs over time"),
    (lambda *a: library_kl(*a, first=F.softmax), "F.kl_div got the student's probabilities"),
    (lambda s, t, T: my_kl(t, s, T), "this is reverse KL"),
    (lambda *a: 5 * library_kl(*a), "batchmean grows with the length"),
    (lambda *a: my_kl(*a, factor=0), "T² is missing"),
    (
        lambda s, t, T: -(T**2) * (kd.soften(t, T) * (s / T).log_softmax(-1)).sum(-1).mean(),
        "that is the soft cross-entropy",
    ),
]


def temperature_for(logits, nats, low=0.01, high=100.0):
    for _ in range(40):
        middle = (low + high) / 2
        enough = kd.entropy(kd.soften(logits, middle)) >= nats
        low, high = (low, middle) if enough else (middle, high)
    return middle


FIND_TEMPERATURE = [
    (temperature_for, "well done"),
    (lambda z, nats: 1.0, "search for it"),
    (lambda z, nats: temperature_for(z, nats * math.log(2)), "you measure in bits"),
    (lambda z, nats: z, "your result has shape (50,); it is one number"),
]


def alpha(s, t, labels, T, soft=kd.forward_kl):
    """Where the sizes of both gradients are equal."""
    s = s.clone().requires_grad_()
    terms = kd.hard_label_loss(s, labels), soft(s, t, T)
    a, b = (torch.autograd.grad(term, s)[0].norm() for term in terms)
    return b / (a + b)


EQUAL_SAY = [
    (alpha, "well done"),
    (lambda *a: 1 - alpha(*a), "the larger gradient has more say"),
    (lambda *a: alpha(*a, soft=lambda s, t, T: kd.forward_kl(s, t)), "needs the temperature"),
]

SHIFT = [
    (lambda z, ids: (z[:, :-1], ids[:, 1:]), "well done"),
    (lambda z, ids: (z, ids), "position i is paired with token i, just read"),
    (lambda z, ids: (z[:, 1:], ids[:, :-1]), "position i is paired with token i - 1"),
    (lambda z, ids: (z[:, :-1], ids), "predictions (2, 5, 5) and labels (2, 6) do not pair off"),
    (lambda z, ids: (z, ids.roll(-1, 1)), "do not roll it"),
    (lambda z, ids: (z[:-1], ids[1:]), "time is the second dimension"),
    (lambda z, ids: z[:, :, :, 0], "your function stops with IndexError"),
]


def my_loss(s, t, labels, T, alpha, kl=my_kl, soften_hard=False):
    hard = F.cross_entropy((s / T if soften_hard else s).flatten(0, 1), labels.flatten())
    return alpha * hard + (1 - alpha) * kl(s, t, T)


LOSS = [
    (my_loss, "well done"),
    (lambda *a: my_loss(*a[:4], 1 - a[4]), "alpha weighs the hard labels"),
    (lambda *a: my_loss(*a, soften_hard=True), "the hard labels are softened"),
    (lambda *a: my_loss(*a, kl=lambda *x: my_kl(*x, factor=0)), "T² is missing"),
]

STEPS = [
    (lambda blocks, size, times, epochs: epochs * -(-blocks // (size * times)), "well done"),
    (lambda blocks, size, times, epochs: epochs * -(-blocks // size), "those are forward passes"),
    (lambda blocks, size, times, epochs: 6, "for (48, 8, 1, 2) you return 6; it should be 12"),
    (lambda blocks, size, times, epochs: 0, "returns 0, whatever it is given"),
]

AGREEMENT = [
    (lambda t, s: (t.argmax(-1) == s.argmax(-1)).float().mean(), "well done"),
    (lambda t, s: (t.max(-1).values == s.max(-1).values).float().mean(), "by argmax"),
    (lambda t, s: (t.argmax() == s.argmax()).float(), "an argmax without dim"),
    (lambda t, s: (t.argmax(-1) == s.argmax(-1)).mean(), "your function stops with RuntimeError"),
]

HALF_WIDTH = [
    (lambda values: 4.30 * statistics.stdev(values) / 3**0.5, "well done"),
    (lambda values: 4.30 * statistics.pstdev(values) / 3**0.5, "divide by n - 1"),
]

PERPLEXITY = [
    (lambda bits, size, tokens: math.exp(math.log(2) * bits * size / tokens), "well done"),
    (lambda bits, size, tokens: math.exp(bits * size / tokens), "raised with the base e"),
]

MASK = [
    (lambda length, prompt: (torch.arange(1, length) >= prompt).tolist(), "well done"),
    (lambda length, prompt: torch.arange(length) >= prompt, "the first token is not predicted"),
    (lambda length, prompt: torch.arange(1, length) > prompt, "position prompt - 1 predicts"),
]


def some_skewed_kl(z_s, z_t, skew):
    q, p = z_s.softmax(-1), z_t.softmax(-1)
    return (p * (p / (skew * p + (1 - skew) * q)).log()).sum(-1)


SKEWED_KL = [
    (lambda *a: some_skewed_kl(*a).mean(), "well done"),
    (lambda z_s, z_t, skew: some_skewed_kl(z_t, z_s, skew).mean(), "teacher's distribution comes"),
    (lambda *a: some_skewed_kl(*a).sum(), "it grows with the number of tokens"),
]

REWARD_LOSS = [
    (lambda log_q, log_p: ((log_q - log_p).detach() * log_q).mean(), "well done"),
    (lambda log_q, log_p: ((log_q - log_p) ** 2 / 2).mean(), "well done"),  # k2
    (lambda log_q, log_p: (log_q - log_p).mean(), "its gradient is 0 on average"),
    (lambda log_q, log_p: ((log_p - log_q).exp() - 1 - log_p + log_q).mean(), "as of k3"),
    (lambda log_q, log_p: (log_q - log_p).detach().mean(), "does not require grad"),
    (lambda log_q, log_p: (log_q - log_p).detach() * log_q, "only for scalar outputs"),
]


def distances(a, b):
    return 1 - F.cosine_similarity(a, b, dim=-1)


COSINE = [
    (lambda a, b, mask: distances(a, b)[mask].mean(), "well done"),
    (lambda a, b, mask: (distances(a, b) * mask).mean(), "you divide by the padding, too"),
]

UNITS = [
    (lambda a, keep: a.abs().mean((0, 1)).topk(keep).indices.tolist(), "well done"),
    (lambda a, keep: a.abs().sum((0, 1)).topk(keep).indices, "well done"),
    (lambda a, keep: a.mean((0, 1)).topk(keep).indices, "negatives are passed on, too"),
    (lambda a, keep: range(keep), "on one example you return [0, 1, 2, 3, 4]; it should be"),
]


def uld(z_s, z_t):
    total = 0
    for mine, other in zip(z_s.softmax(-1).tolist(), z_t.softmax(-1).tolist(), strict=True):
        mine, other = (sorted(row, reverse=True) + 9 * [0] for row in (mine, other))
        total += sum(abs(a - b) for a, b in zip(mine, other, strict=False))
    return total / len(z_s)


ULD = [(uld, "well done")]


def emitted(p, q, token, u, left=lambda p, q: (p - q).clamp(min=0)):
    if u * q[token] < p[token]:
        return F.one_hot(torch.tensor(token), len(p)).double()
    return left(p, q) / left(p, q).sum()


EMITTED = [
    (emitted, "well done"),
    (lambda *a: emitted(*a, left=lambda p, q: p), "draw from max(0, p - q), not p"),
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
]

BYTES = [(lambda t, s: 4 * (t + s) + 3 * 4 * s, "well done")]
FLOPS = [(lambda t, s, n: n * (2 * t + 6 * s), "well done")]


def stop(perplexities, patience):
    for epoch in range(len(perplexities)):
        best = perplexities.index(min(perplexities[: epoch + 1]))
        if epoch - best == patience:
            break
    return best + 1


STOP = [
    (stop, "well done"),
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
    for stub in (None, ...):
        assert not check(lambda *_, stub=stub: stub)
        assert said(capsys).startswith("not yet: your function ")


@pytest.mark.parametrize("check", TABLES, ids=lambda check: check.__name__)
def test_no_mistake_gets_the_hint_of_another(check, capsys, monkeypatch):
    """What a check takes for a mistake, given to it as an answer."""
    judged = []
    module = importlib.import_module(check.__module__)
    monkeypatch.setattr(module, "judge", lambda *given, **more: judged.append((given, more)))
    check(TABLES[check][0][0])
    ((_, right, mistakes, *rest), more), *_ = judged
    for hint, mistake in mistakes.items():
        assert not judge(mistake, right, mistakes, *rest, **more)
        assert hint in said(capsys)
