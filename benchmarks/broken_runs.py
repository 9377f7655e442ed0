"""Six training runs for "find the bug" in notebook 05: five are broken on purpose, silently.

    python benchmarks/broken_runs.py

A tiny teacher learns 40 invented facts as questions and answers. Six students are distilled from
it, and the loss of each falls. What gives a run away is stored beside its losses, without its name:
`broken_histories.csv` has a row a step, `broken_runs.csv` a row a run. The names are in
`willows_kd/exercises/your_own.py`.
"""

import copy
import random
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel

import willows_kd as kd
from willows_kd.exercises.your_own import BROKEN_RUNS

RESULTS = Path(kd.__file__).parent / "assets" / "results"
ANIMALS = ["Mole", "Rat", "Toad", "Badger", "Otter", "Hare", "Fox", "Owl", "Duck", "Weasel"]
FACTS = {  # a question, its answer, and what the answers differ in
    "Where does the {} live?": (
        " In the {}.",
        ["mill", "bank", "hall", "wood", "river", "field", "barn", "tree", "pond", "ditch"],
    ),
    "What does the {} eat?": (
        " It eats {}.",
        ["bread", "fish", "cake", "roots", "eggs", "grass", "geese", "mice", "weeds", "cheese"],
    ),
    "When does the {} sleep?": (
        " At {}.",
        ["noon", "night", "dawn", "dusk", "sea", "home", "work", "school", "supper", "tea"],
    ),
    "Who helps the {}?": (
        " The {} does.",
        ["farmer", "baker", "king", "queen", "doctor", "captain", "judge", "cook", "boy", "girl"],
    ),
}
TOKENS = 128  # of a block


def main() -> None:
    """Make the teacher, then each run and its probes, and store them."""
    _, tokenizer = kd.load_teacher(device="cpu")
    blocks = make_blocks(tokenizer.encode, tokenizer.eos_token_id)
    torch.manual_seed(0)
    shape = {"vocab_size": len(tokenizer), "n_positions": TOKENS, "n_embd": 64}
    teacher = GPT2LMHeadModel(GPT2Config(n_layer=4, n_head=4, **shape)).eval()
    unused = copy.deepcopy(teacher)  # hard labels ask no teacher
    kd.distill(unused, teacher, blocks, settings(alpha=1.0, epochs=8))
    histories, probes = [], []
    for letter, name in BROKEN_RUNS.items():
        asked, given = broken(name, teacher, blocks, tokenizer)
        student = kd.student_from_teacher(teacher)
        history = kd.distill(asked, student, given, settings(given.block_size))
        histories += [{"run": letter, "step": row["step"], "loss": row["loss"]} for row in history]
        probes.append({"run": letter} | probe(student, teacher, asked, given, blocks, tokenizer))
        print(name, probes[-1], flush=True)
    pd.DataFrame(histories).to_csv(RESULTS / "broken_histories.csv", index=False)
    pd.DataFrame(probes).to_csv(RESULTS / "broken_runs.csv", index=False)


def settings(block_size: int = TOKENS, **more) -> kd.DistillConfig:
    """The same for all runs, and as many tokens in a step."""
    same = {"epochs": 2, "learning_rate": 3e-3, "batch_size": 2 * TOKENS // block_size}
    return kd.DistillConfig(**(same | more))


def make_blocks(encode, end: int, splits=(60, 2, 12)) -> kd.Blocks:
    """Questions and answers in random order, in blocks; the answers count."""
    draw = random.Random(0)
    facts = []
    for question, (answer, words) in FACTS.items():
        for animal, word in zip(ANIMALS, draw.sample(words, len(words)), strict=True):
            facts.append((question.format(animal), answer.format(word)))
    ids, counts = [], []
    while len(ids) < sum(splits) * TOKENS:
        for question, answer in draw.sample(facts, len(facts)):
            asked, said = encode(question), [*encode(answer), end]
            ids += asked + said
            counts += [False] * len(asked) + [True] * len(said)
    rows, masks = (torch.tensor(x[: sum(splits) * TOKENS]).view(-1, TOKENS) for x in (ids, counts))
    names = "train", "validation", "test"
    masks = dict(zip(names, masks.split(splits), strict=True))
    return kd.Blocks(**dict(zip(names, rows.split(splits), strict=True)), remainder={}, masks=masks)


def broken(name: str, teacher, blocks: kd.Blocks, tokenizer):
    """The teacher and the blocks of a run, one of them with a bug, unless the run is sound."""
    asked = copy.deepcopy(teacher)
    if name == "rows":  # labels that were cached in another order
        asked.register_forward_pre_hook(lambda model, inputs: (inputs[0].roll(1, dims=0),))
    elif name == "train mode":
        asked.register_forward_pre_hook(lambda model, inputs: model.train() and None)
    elif name == "mask":
        blocks = replace(
            blocks, masks=blocks.masks | {"train": blocks.masks["train"].roll(1, dims=1)}
        )
    elif name == "positions":  # blocks of half of the positions that the models have
        halves = blocks.train.view(-1, TOKENS // 2)
        masks = blocks.masks | {"train": blocks.masks["train"].view(halves.shape)}
        blocks = replace(blocks, train=halves, masks=masks)
    elif name == "tokenizer":
        other = ByteLevelBPETokenizer()
        story = kd.load_corpus("sample").text
        other.train_from_iterator([story], vocab_size=len(tokenizer), show_progress=False)
        its = make_blocks(lambda text: other.encode(text).ids, 0)
        blocks = replace(blocks, train=its.train, masks=its.masks)
    return asked, blocks


def probe(student, teacher, asked, given: kd.Blocks, blocks: kd.Blocks, tokenizer) -> dict:
    """What can be measured of a run from outside."""
    scores = kd.token_scores(student, teacher, blocks.test)
    kl = torch.nn.functional.pad(scores["kl"], (1, 0))  # of each token, from the teacher
    counts = blocks.masks["test"].clone()
    counts[:, 0] = False  # nothing predicts the first token of a block
    starts = counts & ~blocks.masks["test"].roll(1, dims=1)  # the first token of each answer
    second_half = torch.arange(TOKENS) >= TOKENS // 2
    question = next(iter(FACTS)).format("Mole")
    return {
        "itself": itself(teacher, asked, given, seed=0),
        "itself_again": itself(teacher, asked, given, seed=1),
        "first_token": kl[starts].mean().item(),
        "later_tokens": kl[counts & ~starts].mean().item(),
        "first_half": kl[counts & ~second_half].mean().item(),
        "second_half": kl[counts & second_half].mean().item(),
        "reads": tokenizer.decode(given.train[0, :12]),
        "writes": kd.complete(student, tokenizer, question, 8, temperature=0),
    }


def itself(teacher, asked, given: kd.Blocks, seed: int) -> float:
    """The run's first loss with the teacher's own weights in the student's place."""
    config = settings(given.block_size, epochs=1, seed=seed)
    some = kd.epoch_batches(given.train, settings(given.block_size), 0)[0]  # the same blocks twice
    few = replace(given, train=given.train[some], masks={"train": given.masks["train"][some]})
    few = replace(few, validation=given.validation[:1])
    return kd.distill(asked, copy.deepcopy(teacher), few, config)[0]["loss"]


if __name__ == "__main__":
    main()
