"""Checks for notebook 05: when to stop, which run has which bug, and a score to beat."""

import functools
from collections.abc import Callable
from dataclasses import replace

import torch

from willows_kd.config import DistillConfig
from willows_kd.corpus import Blocks, pack
from willows_kd.distillation import distill
from willows_kd.evaluation import evaluate
from willows_kd.exercises import judge, not_yet, well_done
from willows_kd.models import load_teacher
from willows_kd.students import student_from_teacher
from willows_kd.texts import SAMPLE_STORY, read_file


def check_stop(my_stop: Callable) -> bool:
    """Check `my_stop(perplexities, patience)`: the epoch, from 1, whose weights are kept.

    Training ends once so many epochs in a row were no better than the best before them.
    """

    def right(perplexities, patience) -> int:
        best = 0
        for epoch, value in enumerate(perplexities):
            if value < perplexities[best]:
                best = epoch
            elif epoch - best == patience:
                break
        return best + 1

    mistakes = {
        "you keep the last epoch, whatever it is worth": lambda p, _: len(p),
        "you look at epochs that were never run": lambda p, _: p.index(min(p)) + 1,
        "you count from 0; the first epoch is 1": lambda *case: right(*case) - 1,
        "there training ends; keep the best one": lambda p, n: min(right(p, n) + n, len(p)),
        "you stop at the first epoch that is no better": lambda p, _: right(p, 1),
    }
    cases = [([50.0, 45.0, 46.0, 44.0, 47.0, 48.0, 40.0], 2), ([9.0, 8.0, 8.5, 7.0, 7.5], 3)]
    praise = "patience looks past a bad epoch, and is paid for in epochs that are thrown away"
    return judge(my_stop, right, mistakes, praise, *cases)


# The runs of benchmarks/broken_runs.py. Reading on spoils the exercise.
BROKEN_RUNS = dict(A="mask", B="train mode", C="sound", D="tokenizer", E="rows", F="positions")
EVIDENCE = {
    "sound": "every number of this run is as it should be",
    "rows": "itself and itself_again are alike, and not 0: it learns labels of other text",
    "train mode": "itself and itself_again differ: something in it is random",
    "mask": "compare first_token with later_tokens, in both halves of a block",
    "tokenizer": "read what it reads: is that the text?",
    "positions": "compare first_half with second_half: it is good only as far as blocks reached",
}


def check_bugs(my_bugs: dict[str, str]) -> bool:
    """Check `my_bugs`: for each run's letter what is wrong with it, one of EVIDENCE's names."""
    if not isinstance(my_bugs, dict) or my_bugs.keys() != BROKEN_RUNS.keys():
        return not_yet(f"give a dict with an answer for each of {', '.join(BROKEN_RUNS)}")
    wrong = [run for run, name in BROKEN_RUNS.items() if my_bugs[run] != name]
    if not wrong:
        return well_done("six runs whose loss fell, and you told them apart by what they predict")
    told = f"{6 - len(wrong)} of 6 are right. Run {wrong[0]} is not {my_bugs[wrong[0]]!r}"
    return not_yet(f"{told}: {EVIDENCE[BROKEN_RUNS[wrong[0]]]}")


PARAMETERS, TOKENS = 2_800_000, 12_800  # what a student may have, and see
BETTER = 0.95  # of the plain student's KL: less is no luck of a seed


def score_task() -> tuple[torch.nn.Module, Blocks]:
    """The teacher to come near, and blocks of the sample story, as many as may be seen once."""
    teacher, tokenizer = load_teacher()
    blocks = pack(read_file(SAMPLE_STORY), tokenizer)
    return teacher, replace(blocks, train=blocks.train[: TOKENS // blocks.block_size])


@functools.cache
def plain_score() -> float:
    """KL from the teacher, in nats per token, of the student that all defaults make."""
    teacher, blocks = score_task()
    student = student_from_teacher(teacher)
    return distill(teacher, student, blocks, DistillConfig(epochs=1))[-1]["validation_kl"]


def check_score(student, history: list[dict]) -> bool:
    """Check that a student, whose `distill` returned `history`, is nearer than the plain one."""
    parameters, tokens = student.num_parameters(), history[-1]["tokens"]
    if parameters > PARAMETERS or tokens > TOKENS:
        spent = f"{parameters:,} parameters and {tokens:,} tokens"
        return not_yet(f"{spent}; at most {PARAMETERS:,} and {TOKENS:,} are allowed")
    teacher, blocks = score_task()
    found = evaluate(student, blocks.validation, teacher=teacher)["kl_to_teacher"]
    plain = plain_score()
    told = f"{found:.3f} nats per token from the teacher, the plain student is {plain:.3f}"
    if found > BETTER * plain:
        return not_yet(f"{told}; come below {BETTER * plain:.3f}")
    return well_done(f"{told}. Write it down, and beat it")
