"""Notebook 05: its bugs and its score, the stored evidence, and the page of symptoms."""

import ast
import re
from pathlib import Path

import pytest

import willows_kd as kd
from willows_kd.exercises import your_own
from willows_kd.exercises.your_own import BROKEN_RUNS, EVIDENCE, check_bugs


def said(capsys) -> str:
    return re.sub(r"\s+", " ", capsys.readouterr().out)


def test_a_bug_that_is_not_found_gets_the_evidence_that_was_overlooked(capsys):
    assert check_bugs(BROKEN_RUNS)
    for run, name in BROKEN_RUNS.items():
        other = next(each for each in EVIDENCE if each != name)
        assert not check_bugs(BROKEN_RUNS | {run: other})
        printed = said(capsys)
        assert f"5 of 6 are right. Run {run} is not {other!r}" in printed
        assert EVIDENCE[name] in printed
    for wrong in (None, {"A": "mask"}, BROKEN_RUNS | {"A": "luck"}):
        assert not check_bugs(wrong)


def test_the_stored_evidence_points_to_each_bug():
    """What the hints say is true of what `benchmarks/broken_runs.py` stored."""
    found = kd.stored_results("broken_runs").set_index("run").rename(BROKEN_RUNS)
    losses = kd.stored_results("broken_histories").pivot(index="step", columns="run", values="loss")
    assert (losses.iloc[-4:].mean() < losses.iloc[:4].mean()).all()  # no history gives it away
    sound, first, second = found.loc["sound"], found["itself"], found["itself_again"]
    seen = {
        "rows": first.gt(1) & first.round(3).eq(second.round(3)),
        "train mode": first.round(3).ne(second.round(3)),
        "mask": (found["first_token"] > 2 * sound["first_token"])
        & (found["later_tokens"] < 2 * sound["later_tokens"])
        & (found["second_half"] < 2 * found["first_half"]),
        "positions": found["second_half"] > 2 * found["first_half"],
        "tokenizer": ~found["reads"].str.contains("does the"),
    }
    assert set(seen) | {"sound"} == set(found.index)
    for name, where in seen.items():
        assert list(found.index[where]) == [name]


@pytest.fixture
def small_task(teacher, blocks, monkeypatch):
    monkeypatch.setattr(your_own, "score_task", lambda: (teacher, blocks))
    monkeypatch.setattr(your_own, "plain_score", lambda: 0.5)
    monkeypatch.setattr(your_own, "PARAMETERS", teacher.num_parameters())


def test_a_score_counts_within_its_budget_only(small_task, teacher, monkeypatch, capsys):
    history = [{"tokens": your_own.TOKENS}]
    assert your_own.check_score(teacher, history)  # the nearest there is
    assert not your_own.check_score(teacher, [{"tokens": your_own.TOKENS + 1}])
    monkeypatch.setattr(your_own, "plain_score", lambda: 0.0)
    far = kd.student_from_teacher(teacher, 1, init="random")
    assert not your_own.check_score(far, history)
    monkeypatch.setattr(your_own, "PARAMETERS", teacher.num_parameters() - 1)
    assert not your_own.check_score(teacher, history)
    printed = said(capsys)
    for hint in ("well done", "and 12,801 tokens; at most", "come below", "parameters and 12,800"):
        assert hint in printed


def test_the_plain_student_keeps_the_rules_of_the_game():
    teacher, blocks = your_own.score_task()
    assert blocks.train.numel() <= your_own.TOKENS < blocks.train.numel() + blocks.block_size
    assert kd.student_from_teacher(teacher).num_parameters() <= your_own.PARAMETERS


# -- the page of symptoms ----------------------------------------------------------------

PACKAGE = Path(kd.__file__).parent


def messages() -> str:
    """All texts in the package's code, with dots for what is filled in."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "…" for p in node.values)
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_the_page_of_symptoms_quotes_what_the_package_says():
    page = (PACKAGE.parent / "docs" / "symptoms.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("|")]
    quoted = [quote for row in rows for quote in re.findall('"([^"]+)"', row.split("|")[1])]
    quoted = [quote for quote in quoted if "element 0" not in quote]  # PyTorch's
    assert len(quoted) > 10
    said = messages()
    assert [quote for quote in quoted if quote not in said] == []
