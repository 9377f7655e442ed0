"""The town of notebook S1: what is a way, what is right, which moves are best."""

import pytest
import torch

from willows_kd.exercises.town import ANSWER, CELLS, HALT, PROMPT, STOP, UP, Town, as_blocks


@pytest.fixture(scope="module")
def town():
    return Town(0)


def ways(town, noise: float):
    generator = torch.Generator().manual_seed(1)
    return town.walks(town.prompts[:200], torch.full((200,), noise), generator)


def test_a_way_by_the_map_is_right_and_keeps_to_the_streets(town):
    texts = ways(town, 0.0)
    assert town.right(texts).all()
    cells = town.cells(texts)
    apart = (cells // 6).diff().abs() + (cells % 6).diff().abs()
    assert (apart <= 1).all() and torch.isin(cells, town.free).all()


def test_an_answer_is_right_only_if_it_first_stops_on_its_goal(town):
    texts = ways(town, 0.0)
    early, never, late = texts.clone(), texts.clone(), texts.clone()
    early[:, PROMPT] = STOP  # start and goal differ
    never[never == STOP] = UP
    first_stop = (texts == STOP).int().argmax(dim=1)
    late[torch.arange(200), (first_stop + 1).clamp(max=PROMPT + ANSWER - 1)] = UP
    late[torch.arange(200), first_stop] = STOP
    assert not town.right(early).any()
    assert not town.right(never).any()
    assert town.right(late).all(), "what follows STOP does not count"


def test_off_the_way_the_best_moves_still_lead_to_the_goal(town):
    texts = ways(town, 0.5)
    cells, goals = town.cells(texts), texts[:, 3:4]
    best = town.best[cells, goals]
    torch.testing.assert_close(best.sum(dim=-1), torch.ones(200, ANSWER + 1))
    assert ((best[..., HALT] == 1) == (cells == goals)).all()
    stopped = (texts[:, PROMPT:] == STOP).any(dim=1)
    assert (town.right(texts) == stopped).all(), "only the goal is a place to stop"


def test_a_move_against_a_wall_stays(town):
    walls = set(range(CELLS)) - set(town.free.tolist())
    assert len(walls) == 6
    assert town.after[0, 0] == 0, "the town ends above cell 0"
    assert not torch.isin(town.after[town.free], torch.tensor(sorted(walls))).any()


def test_blocks_count_answers_alone(town):
    blocks = as_blocks(ways(town, 0.0), steps=5, batch_size=50)
    assert blocks.train.shape == (250, PROMPT + ANSWER)
    assert not blocks.masks["train"][:, :PROMPT].any()
    assert blocks.masks["train"][:, PROMPT:].all()
