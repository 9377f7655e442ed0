"""The checks of the exercises: each usual mistake gets its hint, a right answer its praise."""

import math
import re
import statistics

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

import willows_kd as kd
from willows_kd.exercises import (
    distillation_loop,
    evaluation,
    inside_the_teacher,
    its_own_words,
    real_teacher,
    soft_labels,
    student_at_work,
    teacher,
)
from willows_kd.exercises.teacher import COUNTED, count


def parameters(config, head=0, depth=None, without=0):
    """A count by formula: `without` is what a layer lacks, per layer."""
    width, depth = config.n_embd, depth or config.n_layer
    tables = (config.vocab_size * (1 + head) + config.n_positions) * width
    return tables + depth * (12 * width**2 + 13 * width - without) + 2 * width


COUNT = [
    (parameters, "well done"),
    (lambda c: c.vocab_size * c.n_embd, "the table of positions is missing"),
    (lambda c: parameters(c) - c.vocab_size * c.n_embd, "the table of tokens is missing"),
    (lambda c: parameters(c, head=1), "the head is counted too"),
    (lambda c: parameters(c, depth=1), "one layer is counted"),
    (lambda c: parameters(c, without=8 * c.n_embd**2), "weights of the MLP are missing"),
    (lambda c: parameters(c, without=3 * c.n_embd**2), "query, key and value are missing"),
    (lambda c: parameters(c, without=c.n_embd**2), "what leaves attention is missing"),
    (lambda c: parameters(c, without=9 * c.n_embd), "the biases are missing"),
    (lambda c: parameters(c, without=4 * c.n_embd), "norms of the layers are missing"),
    (lambda c: parameters(c) - 2 * c.n_embd, "norm after the last layer is missing"),
    (lambda c: parameters(c, without=9 * c.n_embd, head=1), "1 more to find"),
    (lambda c: parameters(c, depth=3), "right for one example, wrong for another"),
    (lambda c: 17, "on one example you return 17; it should be"),
]


def test_the_formula_of_the_check_counts_what_transformers_builds():
    config = GPT2Config(vocab_size=90, n_positions=31, n_embd=12, n_layer=3, n_head=2)
    right = [next(iter(choice)) for choice in COUNTED]
    assert count(*right, config) == GPT2LMHeadModel(config).num_parameters()


def guesser(train, test, vocabulary, extra=1, more=None):
    """The surprise, in nats, of each token of the test."""
    counts = torch.bincount(train.flatten(), minlength=vocabulary)
    total = train.numel() + (vocabulary * extra if more is None else more)
    return -((counts + extra) / total)[test].log()


GUESSER = [
    (lambda *a: guesser(*a).mean().exp(), "well done"),
    (lambda train, test, vocabulary: float(vocabulary), "a guesser that knows nothing"),
    (lambda train, test, v: guesser(test, test, v).mean().exp(), "you count in the test text"),
    (lambda *a: guesser(*a).mean(), "the mean surprise in nats"),
    (lambda *a: (guesser(*a) / math.log(2)).mean().exp(), "base 2 and exp to base e"),
    (lambda *a: 2 ** guesser(*a).mean(), "the power is of 2"),
    (lambda *a: (-guesser(*a)).mean().exp(), "the sign is lost"),
    (lambda train, test, v: guesser(train, train, v).mean().exp(), "test on the training text"),
    (lambda *a: guesser(*a).sum().exp(), "exp of the sum"),
    (lambda *a: guesser(*a, more=0).mean().exp(), "sum to more than 1"),
    (lambda *a: guesser(*a, extra=0).mean().exp(), "Add 1 to every count"),
    (lambda *a: 0, "returns 0, whatever it is given"),
]

BITS = [
    (lambda nats, text: nats.sum() / math.log(2) / len(text.encode()), "well done"),
    (lambda nats, text: nats.sum() / math.log(2) / len(text), "you divide by characters"),
    (lambda nats, text: nats.mean() / math.log(2), "divide by the number of tokens"),
    (lambda nats, text: nats.mean(), "1 more to find"),
    (lambda nats, text: nats.sum() / math.log(2), "that is for the whole text"),
    (lambda nats, text: nats.sum() / len(text.encode()), "that is in nats"),
    (lambda nats, text: nats.sum() * math.log(2) / len(text.encode()), "more bits than nats"),
    (lambda nats, text: None, "Does it end with `return`?"),
    (lambda nats, text: nats, "your result has shape (11,)"),
    (lambda nats, text: "many", "your function returns str"),
    (lambda nats, text: nats / text, "your function stops with TypeError"),
]


def my_kl(z_s, z_t, t, dim=-1, factor=2):
    log_q, log_p = (z_s / t).log_softmax(dim), (z_t / t).log_softmax(dim)
    return t**factor * (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def library_kl(z_s, z_t, t, reduction="sum", first=F.log_softmax, second=F.softmax, **options):
    """With `F.kl_div`, as most learners write it."""
    value = F.kl_div(first(z_s / t, -1), second(z_t / t, -1), reduction=reduction, **options)
    return t**2 * value / (z_s[..., 0].numel() if reduction == "sum" else 1)


FORWARD_KL = [
    (my_kl, "well done"),
    (library_kl, "well done"),
    (lambda *a: my_kl(*a, dim=1), "your softmax runs over dim=1"),
    (lambda *a: my_kl(*a, dim=0), "your softmax runs over dim=0"),
    (
        lambda s, t, T: -(T**2) * (kd.soften(t, T) * (s / T).log_softmax(-1)).sum(-1).mean(),
        "it is the cross-entropy with the soft labels",
    ),
    (lambda *a: library_kl(*a, first=F.softmax), "it wants their logarithms"),
    (lambda s, t, T: my_kl(t, s, T), "this is reverse KL"),
    (lambda s, t, T: T**2 * my_kl(s, t / T, 1), "only the teacher is softened"),
    (lambda s, t, T: T**2 * my_kl(s / T, t, 1), "only the student is softened"),
    (lambda s, t, T: T**2 * my_kl(s, t, 1), "your softmax knows no temperature"),
    (lambda *a: library_kl(*a, reduction="batchmean"), "the KL grows with the length"),
    (lambda *a: library_kl(*a, reduction="mean"), "the KL shrinks as the vocabulary grows"),
    (lambda *a: 20 * library_kl(*a), "the KL grows with the number of tokens"),
    (lambda *a: my_kl(*a, factor=0), "T² is missing"),
    (lambda *a: my_kl(*a, factor=1), "your factor is T"),
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
    (lambda z, nats: -1.0, "a temperature is a positive, finite number"),
    (lambda z, nats: temperature_for(z, nats * math.log(2)), "you measure in bits"),
    (lambda z, nats: 1 / temperature_for(z, nats), "multiplies the logits"),
    (lambda z, nats: temperature_for(z, nats, 8), "that is near"),
    (lambda z, nats: 100.0 if nats < 2 else 0.01, "the lower end moves up to the middle"),
    (lambda z, nats: z, "your result has shape (50,)"),
]


def alpha(s, t, labels, T, hard=None, soft=None, size=torch.norm):
    """Where the sizes of both terms, or of their gradients, are equal."""
    s = s.clone().requires_grad_()
    terms = kd.hard_label_loss(s, labels), (soft or kd.forward_kl)(s, t, T)
    a, b = (size(torch.autograd.grad(term, s)[0]) for term in terms)
    return b / (a + b)


EQUAL_SAY = [
    (alpha, "well done"),
    (lambda *a: 1 - alpha(*a), "yours gives the larger gradient the larger say"),
    (lambda *a: alpha(*a) / (1 - alpha(*a)), "that is soft / hard, a ratio"),
    (lambda *a: 0.5, "equal weights are not an equal say"),
    (
        lambda s, t, labels, T: (
            kd.forward_kl(s, t, T) / (kd.forward_kl(s, t, T) + kd.hard_label_loss(s, labels))
        ),
        "you compare the losses",
    ),
    (lambda *a: alpha(*a, size=lambda g: g.norm() ** 2), "you compare squared norms"),
    (
        lambda *a: alpha(*a, soft=lambda s, t, T: kd.forward_kl(s, t, T) / T**2),
        "T² is missing from the soft labels",
    ),
    (lambda *a: alpha(*a, soft=lambda s, t, T: kd.forward_kl(s, t, T) * T**2), "T² is there twice"),
    (lambda *a: alpha(*a, soft=lambda s, t, T: kd.forward_kl(s, t)), "Give kd.forward_kl the"),
]


SHIFT = [
    (lambda z, ids: (z[:, :-1], ids[:, 1:]), "well done"),
    (lambda z, ids: (z, ids), "position i is paired with token i, which"),
    (lambda z, ids: (z[:, 1:], ids[:, :-1]), "position i is paired with token i - 1"),
    (lambda z, ids: (z[:, :-1], ids), "the shapes are (2, 5, 5) and (2, 6), not (2, 5, 5)"),
    (lambda z, ids: (z, ids.roll(-1, 1)), "cut it off, do not roll it round"),
    (lambda z, ids: (z[:-1], ids[1:]), "Time is the second dimension"),
    (lambda z, ids: (z[:, 0], ids[:, 1]), "Time is the second dimension"),
    (lambda z, ids: (z[:, 1:-1], ids[:, 2:]), "not every position but the last"),
    (lambda z, ids: z[:, :-1].sum(), "return two tensors"),
    (lambda z, ids: None, "Does it end with `return`?"),
    (lambda z, ids: z[:, :, :, 0], "your function stops with IndexError"),
]


def my_loss(s, t, labels, T, alpha, kl=my_kl, side=1, soften_hard=False):
    hard = F.cross_entropy((s / T if soften_hard else s).flatten(0, 1), labels.flatten())
    first, second = (hard, kl(s, t, T))[::side]
    return alpha * first + (1 - alpha) * second


LOSS = [
    (my_loss, "well done"),
    (lambda *a: my_loss(*a, side=-1), "alpha is on the wrong side"),
    (lambda s, t, labels, T, a: kd.hard_label_loss(s, labels), "the hard labels alone"),
    (lambda s, t, labels, T, a: my_kl(s, t, T), "the soft labels alone"),
    (lambda *a: my_loss(*a, soften_hard=True), "the hard labels are softened"),
    (
        lambda s, t, labels, T, a: T**2 * my_loss(s, t, labels, T, a, lambda *x: my_kl(*x, -1, 0)),
        "T² multiplies the hard labels too",
    ),
    (lambda *a: my_loss(*a, kl=lambda *x: my_kl(*x, factor=0)), "T² is missing. Multiply the KL"),
    (lambda *a: my_loss(*a, kl=lambda *x: library_kl(*x, "batchmean")), "the batch only"),
    (lambda *a: my_loss(*a, kl=lambda *x: my_kl(*x, factor=0), side=-1), "alpha is on the wrong"),
    (lambda s, t, labels, T, a: s[0, 0], "your result has shape (7,)"),
]


def steps(blocks, size, times, epochs):
    return epochs * math.ceil(blocks / (size * times))


STEPS = [
    (steps, "well done"),
    (lambda b, s, t, e: steps(b, s, t, 1), "that is one epoch"),
    (lambda b, s, t, e: e * (b // (s * t)), "the last step of an epoch is missing"),
    (lambda b, s, t, e: steps(b, s, 1, e), "those are forward passes"),
    (lambda b, s, t, e: steps(b * e, s, t, 1), "no step reaches over the end of an epoch"),
]


def same(teacher, student, dim=-1):
    return (teacher.argmax(dim) == student.argmax(dim)).float()


AGREEMENT = [
    (lambda t, s: same(t, s).mean(), "well done"),
    (lambda t, s: same(t, s, 1).mean(), "your argmax runs over dim=1"),
    (lambda t, s: same(t, s, 0).mean(), "your argmax runs over dim=0"),
    (lambda t, s: same(t[:, :-1], s[:, 1:]).mean(), "the student is one position ahead"),
    (lambda t, s: same(t[:, :-1], s[:, :-1]).mean(), "the last position is left out"),
    (lambda t, s: 1 - same(t, s).mean(), "the share of positions that differ"),
    (lambda t, s: same(t, s).sum(), "this is a number of positions"),
    (lambda t, s: 100 * same(t, s).mean(), "this is a percentage"),
    (lambda t, s: (t.max(-1).values == s.max(-1).values).float().mean(), "argmax, not max"),
    (lambda t, s: 1.0, "an argmax without dim"),
    (lambda t, s: (t.argmax(-1) == s.argmax(-1)).mean(), "True and False have no mean"),
    (lambda t, s: ..., "returns nothing"),
]


def half(values, t=4.30, spread=statistics.stdev, root=math.sqrt):
    return t * spread(values) / root(len(values))


HALF_WIDTH = [
    (half, "well done"),
    (lambda values: half(values, t=4.302653), "well done"),
    (lambda values: half(values, t=1.96), "1.96 is the normal's"),
    (lambda values: half(values, t=3.18), "3.18 is for three degrees of freedom"),
    (lambda values: half(values, t=1), "Student's t is missing"),
    (lambda values: half(values, root=lambda n: 1), "the square root of n is missing"),
    (lambda values: half(values, root=lambda n: n), "it is divided by n"),
    (lambda values: half(values, spread=statistics.pstdev), "too small for a sample"),
    (lambda values: half(values, spread=statistics.variance), "this is the variance"),
    (lambda values: 2 * half(values), "this is the whole width"),
    (lambda values: 2 * half(values, t=1.96), "1.96 is the normal's"),
]

PERPLEXITY = [
    (lambda bits, size, tokens: 2 ** (bits * size / tokens), "well done"),
    (lambda bits, size, tokens: 2**bits, "you raise 2 to the bits of a byte"),
    (lambda bits, size, tokens: 2 ** (bits * tokens / size), "the wrong way round"),
    (lambda bits, size, tokens: math.exp(bits * size / tokens), "raised with the base e"),
    (lambda bits, size, tokens: bits * size / tokens, "these are bits per token"),
    (lambda bits, size, tokens: bits * size, "the bits of the whole text"),
]


def mask(length, prompt, begin=0, end=0):
    counts = torch.zeros(length - 1 + end, dtype=torch.bool)
    counts[prompt - 1 + begin :] = True
    return counts


def some_skewed_kl(z_s, z_t, skew, order=lambda p, m: (p, m), of=torch.exp, mean=True):
    log_q, log_p = z_s.log_softmax(-1), z_t.log_softmax(-1)
    mix = (skew * log_p.exp() + (1 - skew) * log_q.exp()).log()
    a, b = order(log_p, mix)
    total = (a.exp() * (a - b)).sum(-1)
    return total.mean() if mean else total.sum()


MASK = [
    (mask, "well done"),
    (lambda length, prompt: mask(length, prompt).tolist(), "well done"),
    (lambda length, prompt: mask(length, prompt, end=1), "The first token is not predicted"),
    (lambda length, prompt: torch.zeros(length - 1), "nothing counts"),
    (lambda length, prompt: torch.ones(length - 1), "the openings count too"),
    (lambda length, prompt: mask(length, prompt, 1), "first written token is left out"),
    (lambda length, prompt: mask(length, prompt, 3), "on one example you return"),
    (lambda length, prompt: torch.arange(length - 1) == prompt - 1, "all that follows the first"),
]

SKEWED_KL = [
    (some_skewed_kl, "well done"),
    (lambda z_s, z_t, skew: some_skewed_kl(z_s, z_t, 0), "without any skew"),
    (lambda z_s, z_t, skew: some_skewed_kl(z_s, z_t, 1 - skew), "the shares are swapped"),
    (
        lambda z_s, z_t, skew: some_skewed_kl(skew * z_t + (1 - skew) * z_s, z_t, 0),
        "the mix is one of probabilities",
    ),
    (lambda z_s, z_t, skew: some_skewed_kl(z_t, z_s, skew), "the student's distribution comes"),
    (lambda *a: some_skewed_kl(*a, mean=False), "it grows with the number of tokens"),
    (lambda *a: some_skewed_kl(*a) / 7, "it is divided by the vocabulary too"),
    (lambda *a: torch.tensor(0.0), "Write it first"),
]

REWARD_LOSS = [
    (lambda log_q, log_p: ((log_q - log_p).detach() * log_q).mean(), "well done"),
    (lambda log_q, log_p: ((log_q - log_p) ** 2 / 2).mean(), "well done"),  # k2
    (lambda log_q, log_p: (log_q - log_p).mean(), "the gradient is 0 on average"),
    (lambda log_q, log_p: (0 * log_q).sum(), "the gradient is 0 on average"),
    (lambda log_q, log_p: ((log_p - log_q).exp() - 1 - log_p + log_q).mean(), "as of k3"),
    (lambda log_q, log_p: ((log_p - log_q).detach() * log_q).mean(), "the sign is wrong"),
    (lambda log_q, log_p: ((log_q - log_p).detach() * log_q).sum(), "take the mean"),
    (lambda log_q, log_p: (log_q - log_p).detach().mean(), "no gradient comes out"),
    (lambda log_q, log_p: (log_q - log_p).detach() * log_q, "return one number"),
    (lambda log_q, log_p: (log_q**3).mean(), "on one example you return ["),
]


def distances(a, b, dim=-1):
    return 1 - F.cosine_similarity(a, b, dim=dim)


def units(activations, keep, score=lambda a: a.abs().mean((0, 1))):
    return score(activations).topk(keep).indices


def downwards(p):
    return p.sort(descending=True).values


def uld(z_s, z_t, of=lambda z: z.softmax(-1), sort=downwards, power=1, end=None):
    p, q = (sort(of(z)) for z in (z_s, z_t))
    width = max(p.shape[-1], q.shape[-1])
    p, q = (F.pad(x, (0, width - x.shape[-1]))[:, :end] for x in (p, q))
    return (p - q).abs().pow(power).sum(-1).mean()


COSINE = [
    (lambda a, b, mask: distances(a, b)[mask].mean(), "well done"),
    (lambda a, b, mask: distances(a, b).mean(), "the padding counts too"),
    (lambda a, b, mask: (distances(a, b) * mask).mean(), "you divide by all tokens"),
    (lambda a, b, mask: distances(a, b)[mask].sum(), "this is a sum over the tokens"),
    (lambda a, b, mask: 1 - distances(a, b)[mask].mean(), "subtract it from 1"),
    (lambda a, b, mask: distances(a, b, 1).mean(), "the cosine runs over the tokens"),
]

UNITS = [
    (units, "well done"),
    (lambda a, keep: units(a, keep).tolist(), "well done"),
    (lambda a, keep: units(-a.abs(), keep, lambda x: x.mean((0, 1))), "the units that do least"),
    (lambda a, keep: units(a, keep, lambda x: x.mean((0, 1))), "is passed on too"),
    (lambda a, keep: units(a, keep, lambda x: x.mean((0, 1)).abs()), "before the mean"),
    (lambda a, keep: units(a, keep, lambda x: x.abs().amax((0, 1))), "one outlier decides"),
    (lambda a, keep: units(a, keep + 1), "your result has shape (6,)"),
    (lambda a, keep: range(keep), "on one example you return [0, 1"),
]

ULD = [
    (uld, "well done"),
    (lambda z_s, z_t: uld(z_s, z_t, sort=lambda p: p), "the probabilities are not sorted"),
    (lambda z_s, z_t: uld(z_s, z_t, sort=lambda p: p.sort().values), "sort them downwards"),
    (lambda z_s, z_t: uld(z_s, z_t, end=min(z_s.shape[-1], z_t.shape[-1])), "the longer list"),
    (lambda z_s, z_t: uld(z_s, z_t, of=lambda z: z), "you compare logits"),
    (lambda z_s, z_t: uld(z_s, z_t, power=2), "take absolute values"),
    (lambda z_s, z_t: 4 * uld(z_s, z_t), "it grows with the number of tokens"),
    (lambda z_s, z_t: uld(z_s, z_t) / 9, "it is divided by the vocabulary too"),
]


def emitted(
    p,
    q,
    token,
    u,
    ratio=lambda p, q: p / q,
    residual=lambda p, q: (p - q).clamp(min=0),
    norm=True,
):
    if u < ratio(p[token], q[token]):
        return F.one_hot(torch.tensor(token), len(p)).double()
    left = residual(p, q)
    return left / left.sum() if norm else left


EMITTED = [
    (emitted, "well done"),
    (lambda *a: emitted(*a).tolist(), "well done"),
    (lambda *a: emitted(*a, residual=lambda p, q: p), "and not from p"),
    (lambda *a: emitted(*a, norm=False), "divide it by its sum"),
    (lambda *a: emitted(*a, residual=lambda p, q: (q - p).clamp(min=0)), "too much of"),
    (lambda *a: emitted(*a, residual=lambda p, q: (p - q).abs()), "take absolute values nowhere"),
    (lambda *a: emitted(*a, ratio=lambda p, q: 1), "a rejected token is replaced"),
    (lambda *a: emitted(*a, ratio=lambda p, q: q / p), "the token is accepted"),
    (lambda *a: emitted(*a, ratio=lambda p, q: p), "the token is accepted"),
    (lambda p, q, token, u: p, "the token is accepted"),
    (lambda *a: emitted(*a, residual=lambda p, q: q), "on one example you return"),
    (lambda *a: emitted(*a)[None], "a tensor of shape (5,)"),
]

TOKENS = [
    (lambda a, k: (1 - a ** (k + 1)) / (1 - a), "well done"),
    (lambda a, k: sum(a**i for i in range(k + 1)), "well done"),
    (lambda a, k: sum(a**i for i in range(1, k + 1)), "comes with every pass"),
    (lambda a, k: (1 - a**k) / (1 - a), "one term too early"),
    (lambda a, k: k * a + 1, "only if all before it were accepted"),
    (lambda a, k: k * a, "leave the teacher's own token out"),
    (lambda a, k: 1 / (1 - a), "endless drafting"),
    (lambda a, k: a**k, "the chance that all are accepted"),
]


def rounder(most=lambda bits: 2 ** (bits - 1) - 1, size=torch.abs, near=torch.round, dim=1):
    """A quantizer with a choice of each step."""

    def my_rounding(weight, bits):
        scale = size(weight).amax(dim, keepdim=True) / most(bits)
        return near(weight / scale) * scale

    return my_rounding


ROUNDING = [
    (rounder(), "well done"),
    (lambda w, bits: rounder()(w, bits).float(), "well done"),
    (lambda w, bits: w, "nothing is rounded yet"),
    (rounder(dim=(0, 1)), "one scale for the whole matrix"),
    (rounder(dim=0), "a scale for each column"),
    (rounder(size=torch.clone), "take .abs() first"),
    (rounder(near=torch.trunc), "cut off what is behind the point"),
    (rounder(near=torch.floor), "you round down"),
    (rounder(most=lambda bits: 2 ** (bits - 1)), "not one more"),
    (rounder(most=lambda bits: 2**bits - 1), "twice as far"),
    (lambda w, b: (w / w.abs().amax(1, True) * (2 ** (b - 1) - 1)).round(), "are the integers"),
    (lambda w, bits: rounder()(w, 6), "on one example you return"),
    (lambda w, bits: w[0], "a tensor of shape (6, 9)"),
    (lambda w, bits: w @ w, "stops with RuntimeError"),
]


BYTES = [
    (lambda t, s: 4 * t + 16 * s, "well done"),
    (lambda t, s: 16 * (t + s), "the teacher is not trained"),
    (lambda t, s: 4 * (t + s), "these are the weights alone"),
    (lambda t, s: 4 * t + 8 * s, "AdamW's moments are missing"),
    (lambda t, s: 4 * t + 12 * s, "AdamW keeps two moments"),
    (lambda t, s: 16 * s, "the teacher's weights are missing"),
    (lambda t, s: t + 4 * s, "in float32 each takes 4 bytes"),
]

FLOPS = [
    (lambda t, s, n: (2 * t + 6 * s) * n, "well done"),
    (lambda t, s, n: 6 * (t + s) * n, "the teacher only runs forward"),
    (lambda t, s, n: 2 * (t + s) * n, "the backward pass is missing"),
    (lambda t, s, n: (2 * t + 4 * s) * n, "two products for each of the forward pass"),
    (lambda t, s, n: 6 * s * n, "the teacher's forward pass is missing"),
    (lambda t, s, n: (t + 3 * s) * n, "are two operations"),
    (lambda t, s, n: 2 * t + 6 * s, "that is for one token"),
]


MODULES = (teacher, soft_labels, distillation_loop, evaluation, its_own_words, inside_the_teacher)
MODULES += (student_at_work, real_teacher)
TABLES = {  # each check has a list of answers of its name
    check: globals()[name.removeprefix("check_").upper()]
    for module in MODULES
    for name, check in vars(module).items()
    if name.startswith("check_")
}


@pytest.mark.parametrize("check", TABLES, ids=lambda check: check.__name__)
def test_each_answer_gets_its_hint(check, capsys):
    for answer, hint in TABLES[check]:
        passed = check(answer)
        said = re.sub(r"\s+", " ", capsys.readouterr().out)
        assert hint in said
        assert passed == (hint == "well done")


def test_an_answer_may_change_its_arguments():
    def in_place(student_logits, teacher_logits, temperature):
        teacher_logits /= temperature
        return temperature**2 * my_kl(student_logits / temperature, teacher_logits, 1)

    assert soft_labels.check_forward_kl(in_place)
