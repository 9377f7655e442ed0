"""The town of notebook S1: a task with right and wrong answers, which small models learn."""

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from willows_kd.corpus import Blocks

SIDE, WALLS = 6, 6
CELLS = SIDE * SIDE
MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1), (0, 0))  # up, down, left, right, none
HALT = 4  # the last of the moves
UP, STOP = CELLS, CELLS + HALT  # tokens: the cells, then the moves, then two words
FROM, TO = CELLS + 5, CELLS + 6
VOCABULARY = CELLS + 7
PROMPT, ANSWER = 4, 12  # tokens: FROM start TO goal, then the moves


class Town:
    """A square town with walls, and what is a right way through it.

    A move against a wall stays where it is. An answer is right if it says STOP on the goal.

    Attributes:
        after: the cell after a move, shape (cells, moves).
        best: shares of the moves that are on a shortest way, shape (cells, goals, moves).
        prompts: token ids of all starts and goals in random order, shape (prompts, 4).
    """

    def __init__(self, seed: int = 0):
        """Draw walls until every way fits into an answer."""
        generator = torch.Generator().manual_seed(seed)
        longest = ANSWER
        while longest >= ANSWER:
            self.free = torch.randperm(CELLS, generator=generator)[WALLS:].sort().values
            self.after = cells_after(self.free)
            steps = steps_between(self.after)
            longest = steps[self.free][:, self.free].max()
        best = (steps[self.after] < steps[:, None]).transpose(1, 2)
        best[:, :, HALT] = torch.eye(CELLS, dtype=torch.bool)
        self.best = best / best.sum(dim=2, keepdim=True)
        pairs = torch.cartesian_prod(self.free, self.free)
        pairs = pairs[pairs[:, 0] != pairs[:, 1]]
        self.prompts = torch.tensor([FROM, 0, TO, 0]).repeat(len(pairs), 1)
        self.prompts[:, [1, 3]] = pairs[torch.randperm(len(pairs), generator=generator)]

    def cells(self, texts: torch.Tensor) -> torch.Tensor:
        """Where each text is before each token of its answer, and at its end."""
        answers, visited = texts[:, PROMPT:], [texts[:, 1]]
        going = (answers == STOP).cumsum(dim=1) == 0
        moves = going & (answers >= UP) & (answers < STOP)
        for move in torch.where(moves, answers - UP, HALT).T:
            visited.append(self.after[visited[-1], move])
        return torch.stack(visited, dim=1)

    def right(self, texts: torch.Tensor) -> torch.Tensor:
        """Whether each text says STOP, and first says it on its goal."""
        stops = (texts[:, PROMPT:] == STOP).any(dim=1)
        return stops & (self.cells(texts)[:, -1] == texts[:, 3])

    def walks(self, prompts: torch.Tensor, noise: torch.Tensor, generator):
        """Ways by the map with a share of random moves: token ids, shape (prompts, 16)."""
        ids, cell = prompts, prompts[:, 1]
        for _ in range(ANSWER):
            best = self.best[cell, prompts[:, 3]]
            move = torch.multinomial(best, 1, generator=generator)[:, 0]
            odd = torch.rand(len(prompts), generator=generator) < noise
            random = torch.randint(0, HALT, move.shape, generator=generator)
            move = torch.where(odd & (ids[:, -1] != STOP), random, move)
            cell = self.after[cell, move]
            ids = torch.cat([ids, move[:, None] + UP], dim=1)
        return ids

    def drawn(self, text: torch.Tensor) -> str:
        """A map with the way of one text: # a wall, o the way, S its start, G its goal."""
        picture = np.full(CELLS, "#")
        marks = {"·": self.free, "o": self.cells(text[None])[0], "S": text[1], "G": text[3]}
        for mark, cells in marks.items():
            picture[cells] = mark
        return "\n".join(" ".join(row) for row in picture.reshape(SIDE, SIDE))


def cells_after(free: torch.Tensor) -> torch.Tensor:
    """The cell after each move from each cell, shape (cells, moves)."""
    cells = {divmod(cell, SIDE): cell for cell in free.tolist()}
    after = [
        [cells.get((cell // SIDE + down, cell % SIDE + right), cell) for down, right in MOVES]
        for cell in range(CELLS)
    ]
    return torch.tensor(after)


def steps_between(after: torch.Tensor) -> torch.Tensor:
    """The length of a shortest way from each cell to each, shape (cells, cells)."""
    steps = torch.full((CELLS, CELLS), CELLS).fill_diagonal_(0)
    for _ in range(CELLS):
        steps = torch.minimum(steps, steps[after].amin(dim=1) + 1)
    return steps


def small_gpt2(layers: int, seed: int) -> GPT2LMHeadModel:
    """An untrained GPT-2, 64 wide, that knows the town's words."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        sizes = dict(n_layer=layers, n_embd=64, n_head=4, n_positions=PROMPT + ANSWER)
        no_end = dict(bos_token_id=None, eos_token_id=None)
        return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes, **no_end)).eval()


def train_teacher(town: Town, steps: int = 2000, seed: int = 0) -> GPT2LMHeadModel:
    """A GPT-2 of three layers that learns the best moves, on the way and off it."""
    teacher, generator = small_gpt2(3, seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(teacher.parameters(), fused=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1, (step + 1) / 100, (steps - step) / (0.4 * steps))
        chosen = torch.randint(0, len(town.prompts), (64,), generator=generator)
        noise = torch.rand(64, generator=generator)
        ids = town.walks(town.prompts[chosen], noise, generator)
        best = town.best[town.cells(ids)[:, :-1], ids[:, 3:4]]
        logits = teacher(ids, use_cache=False).logits[:, PROMPT - 1 : -1]
        loss = -(best * logits.log_softmax(-1)[..., UP : STOP + 1]).sum(-1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return teacher


def walk(model, prompts: torch.Tensor, noise: float = 0.0, seed: int = 0) -> torch.Tensor:
    """Texts that a model writes, each move replaced by a random one as often as `noise` says."""
    ids, generator = prompts, torch.Generator().manual_seed(seed)
    for _ in range(ANSWER):
        with torch.no_grad():
            p = model(ids).logits[:, -1].softmax(dim=-1)
        token = torch.multinomial(p, 1, generator=generator)
        random = torch.randint(UP, STOP, token.shape, generator=generator)
        odd = torch.rand(token.shape, generator=generator) < noise
        token = torch.where(odd & (token != STOP), random, token)
        ids = torch.cat([ids, token], dim=1)
    return ids


def as_blocks(texts: torch.Tensor, steps: int, batch_size: int) -> Blocks:
    """Blocks for so many steps of `distill`: texts again and again, their answers to learn.

    What follows STOP counts, as it does on-policy.
    """
    train = texts[torch.arange(steps * batch_size) % len(texts)]
    mask = (torch.arange(PROMPT + ANSWER) >= PROMPT).expand_as(train)
    return Blocks(train, texts[:8], texts[:8], {}, {"train": mask, "validation": mask[:8]})
