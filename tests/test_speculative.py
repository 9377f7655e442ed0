"""Speculative decoding writes what the teacher would, and the test of that can fail."""

import pytest
import torch

import willows_kd as kd
from willows_kd.compress import speculative


@pytest.fixture
def pair(make_gpt2):
    """A teacher and a draft model with opinions of their own."""
    look = {"initializer_range": 0.15, "n_positions": 32}
    return make_gpt2(2, **look), make_gpt2(1, seed=1, **look)


PROMPT = torch.tensor([5, 300, 41, 7])


# -- greedy: the teacher's own text ----------------------------------------------------


@pytest.mark.parametrize(("k", "new_tokens"), [(0, 2), (1, 1), (3, 17), (50, 28)])  # 28: the last
def test_greedy_text_is_the_teachers_own(k, new_tokens, pair):
    alone = kd.sample_continuations(pair[0], PROMPT[None], new_tokens, temperature=0)[0]
    for draft in (pair[1], pair[0]):
        found = kd.speculative_decode(pair[0], draft, PROMPT, new_tokens, k, temperature=0)
        assert torch.equal(found.tokens, alone)
        assert sum(found.accepted) + len(found.accepted) == new_tokens
        assert all(a <= d <= k for a, d in zip(found.accepted, found.drafted, strict=True))
    # all that the teacher drafts for itself is accepted
    assert found.accepted == found.drafted
    assert len(found.accepted) == -(-new_tokens // (k + 1))


def test_the_end_of_text_is_never_drawn(make_gpt2):
    teacher = make_gpt2(2, initializer_range=0.15)
    (likeliest,) = kd.sample_continuations(teacher, PROMPT[None], 1, temperature=0)[0].tolist()
    teacher.config.eos_token_id = teacher.generation_config.eos_token_id = likeliest
    alone = kd.sample_continuations(teacher, PROMPT[None], 12, temperature=0)[0]
    draft = make_gpt2(2, seed=1)
    assert torch.equal(kd.speculative_decode(teacher, draft, PROMPT, 12, 4, 0).tokens, alone)
    drawn = kd.speculative_decode(teacher, draft, PROMPT, 40, temperature=1.0).tokens
    assert likeliest not in alone and likeliest not in drawn
    teacher.config.eos_token_id = teacher.generation_config.eos_token_id = None  # none to leave out
    assert kd.speculative_decode(teacher, draft, PROMPT, 1, 4, 0).tokens.tolist() == [likeliest]


def test_a_draft_with_a_padded_head_drafts_the_teachers_tokens(pair, make_gpt2):
    padded = make_gpt2(2, seed=1, initializer_range=0.15, vocab_size=4096 + 64)
    alone = kd.sample_continuations(pair[0], PROMPT[None], 12, temperature=0)[0]
    for draft, teacher in ((padded, pair[0]), (pair[0], padded)):
        found = kd.speculative_decode(teacher, draft, PROMPT, 12, 3, temperature=0).tokens
        assert torch.equal(found, alone) == (teacher is pair[0])
        assert found.max() < 4096


def test_each_token_is_read_once(pair):
    read = []
    for model in pair:
        model.register_forward_pre_hook(lambda m, args: read.append((m, args[0].shape[1])))
    found = kd.speculative_decode(*pair, PROMPT, 20, 3)
    calls, drafted = len(found.accepted), sum(found.drafted)
    of_teacher = sum(tokens for model, tokens in read if model is pair[0])
    assert of_teacher == len(PROMPT) + calls - 1 + drafted
    assert sum(tokens for _, tokens in read) - of_teacher <= of_teacher


def test_the_draws_follow_from_their_seed(pair):
    texts = [kd.speculative_decode(*pair, PROMPT, 9, seed=seed).tokens for seed in (1, 1, 2)]
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


# -- sampling: the teacher's own distribution ------------------------------------------


def test_what_is_emitted_is_the_teachers_and_acceptance_is_one_minus_total_variation():
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]).double()
    q = torch.tensor([0.2, 0.2, 0.6]).double()
    generator, count = torch.Generator().manual_seed(0), 4000
    first, second = torch.zeros(2, 3)
    for _ in range(count):
        drafted = speculative.draw(q, generator)
        accepted, token = speculative.verify(p, [q], drafted, generator)
        first[drafted if accepted else token] += 1
        second[token] += accepted
    spread = {"rtol": 0, "atol": 4 * 0.5 / count**0.5}
    torch.testing.assert_close(first / count, p[0].float(), **spread)
    torch.testing.assert_close(second / second.sum(), p[1].float(), **spread)
    expected = 1 - kd.total_variation(q.log()[None], p[:1].log()).item()
    assert second.sum() / count == pytest.approx(expected, abs=spread["atol"])


# -- acceptance and what it brings -----------------------------------------------------


def test_only_tokens_up_to_the_first_rejected_one_were_tested():
    found = speculative.Speculated(None, drafted=[4, 4, 2, 0], accepted=[4, 1, 0, 0])
    assert found.acceptance == 5 / (4 + 2 + 1)


def test_expected_tokens_and_speedup():
    assert kd.expected_tokens(0.8, 4) == pytest.approx((1 - 0.8**5) / 0.2)
    assert kd.expected_tokens(1, 4) == 5
    assert kd.expected_tokens(0.0, 4) == 1
    assert kd.expected_speedup(0.8, 4, 0.1) == pytest.approx((1 - 0.8**5) / (0.2 * 1.4))
    assert kd.expected_speedup(0.8, 4, 0.1, check=2) == pytest.approx((1 - 0.8**5) / (0.2 * 2.4))
