"""The checks of the exercises: each usual mistake gets its hint, a right answer its praise."""

import ast
import importlib
import inspect
import math
import pkgutil
import re
import statistics

import nbformat
import pytest
import torch
import torch.nn.functional as F
from notebook_runs import SOLUTIONS

import willows_kd as kd
from willows_kd import exercises

judge = exercises.judge
MODULES = [
    importlib.import_module(f"willows_kd.exercises.{module.name}")
    for module in pkgutil.iter_modules(exercises.__path__)
]
CHECKS = {  # of a function
    name.removeprefix("check_"): check
    for module in MODULES
    for name, check in vars(module).items()
    if name.startswith("check_") and name not in ("check_bugs", "check_score")
}


def solved() -> dict:
    """The functions that the notebooks of solutions define, by name."""
    space = {"torch": torch, "F": F, "kd": kd, "math": math, "statistics": statistics}
    for path in SOLUTIONS:
        for cell in nbformat.read(path, as_version=4).cells:
            if "def my_" in cell.source:
                defined = [n for n in ast.parse(cell.source).body if isinstance(n, ast.FunctionDef)]
                exec(compile(ast.Module(defined, []), path.name, "exec"), space)
    return space


MY = solved()
RIGHT = {
    name: MY[next(iter(inspect.signature(check).parameters))] for name, check in CHECKS.items()
}


def kl_div(s, t, T, first=F.log_softmax, reduction="batchmean"):
    """Forward KL as most learners write it."""
    return T**2 * F.kl_div(first(s / T, -1), F.softmax(t / T, -1), reduction=reduction)


def kl(s, t, T, dim=-1, power=2):
    log_q, log_p = (s / T).log_softmax(dim), (t / T).log_softmax(dim)
    return T**power * (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def cross_entropy(s, t, T):
    return T**2 * F.cross_entropy(s.flatten(0, 1) / T, (t.flatten(0, 1) / T).softmax(-1))


def loss(s, t, labels, T, alpha, soften=1, power=2):
    hard = F.cross_entropy((s / soften).flatten(0, 1), labels.flatten())
    return alpha * hard + (1 - alpha) * kl(s, t, T, power=power)


def in_place(s, t, T):
    t /= T
    return T**2 * kl(s / T, t, 1)


def guesser(train, test, vocabulary, extra=1, more=1):
    """The mean surprise, in nats, of a token of the test."""
    counts = torch.bincount(train.flatten(), minlength=vocabulary)
    return -((counts + extra) / (train.numel() + vocabulary * more))[test].log().mean()


def skewed(s, t, skew):
    q, p = s.softmax(-1), t.softmax(-1)
    return (p * (p / (skew * p + (1 - skew) * q)).log()).sum(-1)


ANSWERS = [
    ("count", lambda c: c.vocab_size * c.n_embd, "one more n_positions adds 0, not 100"),
    ("count", lambda c: 17, "one more vocab_size adds 0, not 100"),
    ("count", lambda c: RIGHT["count"](c) - 9 * c.n_embd * c.n_layer, "adds 120,400, not 121,300"),
    ("count", lambda c: RIGHT["count"](c) + 17, "on one example you return"),
    ("count", lambda c: [1, 2], "your result has shape (2,); it is one number"),
    ("guesser", guesser, "take exp of it"),
    ("guesser", lambda *a: guesser(*a, more=0).exp(), "the total by `vocabulary`"),
    ("guesser", lambda *a: guesser(*a, extra=0).exp(), "add 1 to every count"),
    ("bits", lambda nats, text: nats.mean(), "that is nats per token"),
    ("bits", lambda nats, text: nats.sum() / math.log(2) / len(text), "have three bytes"),
    ("bits", lambda nats, text: nats, "your result has shape (11,); it is one number"),
    ("bits", lambda nats, text: "many", "your function returns str"),
    ("forward_kl", lambda *z: kl_div(*z) / 5, "well done"),
    ("forward_kl", in_place, "well done"),
    ("forward_kl", lambda *z: kl(*z).item(), "leave out .item() and .detach()"),
    ("perplexity", lambda b, n, t: 32.0, "for 2.0, 90, 30 you return 32; it should be 64"),
    ("forward_kl", kl_div, "batchmean grows with the length"),
    ("forward_kl", lambda *z: kl_div(*z, reduction="sum") / 140, "sum over the vocabulary, then"),
    ("forward_kl", lambda *z: kl_div(*z, first=F.softmax) / 5, "got the student's probabilities"),
    ("forward_kl", lambda s, t, T: kl_div(t, s, T) / 5, "this is reverse KL"),
    ("forward_kl", lambda *z: kl(*z, dim=1), "your softmax runs over time"),
    ("forward_kl", lambda *z: kl(*z, power=0), "T² is missing"),
    ("forward_kl", cross_entropy, "that is the soft cross-entropy"),
    ("find_temperature", lambda z, nats: z, "your result has shape (50,); it is one number"),
    ("find_temperature", lambda z, nats: 1.0, "search for it"),
    ("equal_say", lambda *z: 1 - RIGHT["equal_say"](*z), "the larger gradient has more say"),
    ("equal_say", lambda s, t, y, T: RIGHT["equal_say"](s, t, y, 1.0), "needs the temperature"),
    ("shift", lambda z, ids: (z, ids), "position i is paired with token i, just read"),
    ("shift", lambda z, ids: (z[:, 1:], ids[:, :-1]), "position i is paired with token i - 1"),
    ("shift", lambda z, ids: (z[:, :-1], ids), "(2, 5, 5) and labels (2, 6) do not pair off"),
    ("shift", lambda z, ids: (z, ids.roll(-1, 1)), "do not roll it"),
    ("shift", lambda z, ids: (z[:-1], ids[1:]), "time is the second dimension"),
    ("shift", lambda z, ids: z[:, :, :, 0], "your function stops with IndexError"),
    ("loss", lambda *z: loss(*z[:4], 1 - z[4]), "alpha weighs the hard labels"),
    ("loss", lambda s, t, y, T, a: loss(s, t, y, T, a, soften=T), "the hard labels are softened"),
    ("loss", lambda *z: z[3] ** 2 * loss(*z, power=0), "T² multiplies the hard labels too"),
    ("loss", lambda *z: loss(*z, power=0), "T² is missing"),
    ("loss", lambda s, t, y, T, a: 2 * loss(s, t, y, T, 0.5), "alpha is missing"),
    ("steps", lambda blocks, size, times, epochs: epochs * -(-blocks // size), "forward passes"),
    ("steps", lambda *_: 6, "for 48, 8, 1, 2 you return 6; it should be 12"),
    ("steps", lambda *_: 0, "returns 0, whatever it is given"),
    ("agreement", lambda t, s: (t.amax(-1) == s.amax(-1)).float().mean(), "by argmax"),
    ("agreement", lambda t, s: t.argmax() == s.argmax(), "an argmax without dim"),
    ("agreement", lambda t, s: (t.argmax(-1) == s.argmax(-1)).mean(), "stops with RuntimeError"),
    ("half_width", lambda x: 4.30 * statistics.pstdev(x) / 3**0.5, "divide by n - 1"),
    ("perplexity", lambda bits, size, n: math.exp(bits * size / n), "raised with the base e"),
    ("mask", lambda n, prompt: (torch.arange(1, n) >= prompt).tolist(), "well done"),
    ("mask", lambda n, prompt: torch.arange(n) >= prompt, "the first token is not predicted"),
    ("mask", lambda n, prompt: torch.arange(1, n) > prompt, "position prompt - 1 predicts"),
    ("skewed_kl", lambda *z: skewed(*z).mean(), "well done"),
    ("skewed_kl", lambda s, t, a: skewed(t, s, a).mean(), "teacher's distribution comes first"),
    ("reward_loss", lambda q, p: ((q - p) ** 2 / 2).mean(), "well done"),  # k2
    ("reward_loss", lambda q, p: (q - p).mean(), "its gradient is 0 on average"),
    ("reward_loss", lambda q, p: ((p - q).exp() - 1 - p + q).mean(), "as of k3"),
    ("reward_loss", lambda q, p: (q - p).detach().mean(), "its gradient is 0 on average"),
    ("reward_loss", lambda q, p: (q - p).detach() * q, "only for scalar outputs"),
    ("cosine", lambda a, b, m: (m * (1 - F.cosine_similarity(a, b, -1))).mean(), "you divide by"),
    ("units", lambda a, keep: a.abs().sum((0, 1)).topk(keep).indices.tolist(), "well done"),
    ("units", lambda a, keep: a.mean((0, 1)).topk(keep).indices, "negatives are passed on, too"),
    ("units", lambda a, keep: range(keep), "you return [0, 1, 2, 3, 4]; it should be"),
    ("rounding", lambda w, bits: RIGHT["rounding"](w.T, bits).T, "a scale for each column"),
    ("rounding", lambda w, bits: w, "nothing is rounded yet"),
    ("emitted", lambda p, q, token, u: p, "all of the probability is on `token`"),
    ("bytes", lambda t, s: 16 * (t + s), "the teacher is not trained"),
    ("flops", lambda t, s, n: 6 * (t + s) * n, "the teacher only runs forward"),
    ("tokens", lambda a, k: (1 - a**k) / (1 - a), "one term too early"),
    ("stop", lambda p, patience: RIGHT["stop"](p, 1), "you stop at the first epoch"),
]


def said(capsys) -> str:
    return re.sub(r"\s+", " ", capsys.readouterr().out)


@pytest.mark.parametrize("name", CHECKS)
def test_a_right_answer_is_praised_and_a_stub_is_not(name, capsys):
    assert CHECKS[name](RIGHT[name])
    assert said(capsys).startswith("well done: ")
    for stub in (None, ...):
        assert not CHECKS[name](lambda *_, stub=stub: stub)
        assert said(capsys).startswith("not yet: your function ")


@pytest.mark.parametrize("name", CHECKS)
def test_each_answer_gets_its_hint(name, capsys):
    for exercise, answer, hint in ANSWERS:
        if exercise == name:
            assert CHECKS[name](answer) == (hint == "well done")
            assert hint in said(capsys)


@pytest.mark.parametrize("name", CHECKS)
def test_no_mistake_gets_the_hint_of_another(name, capsys, monkeypatch):
    """What a check takes for a mistake, given to it as an answer."""
    judged = []
    module = importlib.import_module(CHECKS[name].__module__)
    monkeypatch.setattr(module, "judge", lambda *given, **more: judged.append((given, more)))
    CHECKS[name](RIGHT[name])
    ((_, right, mistakes, *rest), more), *_ = judged
    for hint, mistake in mistakes.items():
        assert not judge(mistake, right, mistakes, *rest, **more)
        assert hint in said(capsys)
