"""The notebooks as they are stored, and as learners re-run them."""

import os
import re

import nbformat
import pytest
from check_notebooks import problems
from IPython.core.inputtransformer2 import TransformerManager
from notebook_runs import BLOCK_SIZE, NOTEBOOKS, SERIES, SOLUTIONS, TOKENS, small, stderr, twice

import willows_kd as kd
from willows_kd.exercises import your_own

DIALLED = [path for path in SERIES if '"TEMPERATURE = ' in path.read_text(encoding="utf-8")]


def test_notebooks_are_numbered_in_order_mapped_and_each_has_solutions():
    stems = [path.stem for path in SERIES]
    course, appendices, trips = ([s for s in stems if s[0] == first] for first in "0AS")
    for first, part in {"0": course, "A": appendices, "S": trips}.items():
        assert [stem[:3] for stem in part] == [f"{first}{n}_" for n in range(1, len(part) + 1)]
    with_solutions = {path.stem.removesuffix("_solutions") for path in SOLUTIONS}
    assert {*course, *trips} <= with_solutions <= {*stems}
    contents = (NOTEBOOKS / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in SERIES if f"({path.name})" not in contents] == []


def test_what_is_stored_is_one_clean_run():
    found = {path.name: problems(path) for path in SERIES + SOLUTIONS}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)
def test_solutions_satisfy_every_check(path, monkeypatch):
    """Not in kernels of their own, each of which would take seconds to import the same."""
    monkeypatch.setattr(kd.pack, "__defaults__", (BLOCK_SIZE,))
    monkeypatch.setattr(your_own, "TOKENS", TOKENS)
    cells = nbformat.read(path, as_version=4).cells
    sources = [cell.source for cell in cells if cell.cell_type == "code"]
    assert re.search(r"^assert (done_1( and done_\d)*|all\(checks\))$", sources[-1], re.MULTILINE)
    scope = {"display": lambda *shown: None}
    for source in sources:
        exec(TransformerManager().transform_cell(source), scope)


def test_each_paper_to_read_is_a_link():
    for path in SERIES:
        cells = [cell.source for cell in nbformat.read(path, as_version=4).cells]
        papers = "".join(cells).partition("## To read")[2].split("\n- ")[1:]
        assert papers, path.name
        assert [each for each in papers if not re.search(r"\]\(https?://", each)] == [], path.name


# -- as learners run them again: nbval has run each once as it stands --------------------


@pytest.mark.slow
@pytest.mark.skipif("COLAB_PYTHON" in os.environ, reason="test_colab.py does the same there")
@pytest.mark.parametrize("path", SERIES, ids=lambda path: path.stem)
def test_cells_run_twice_hot_and_mixed(path, run_notebook):
    assert stderr(run_notebook(twice(path))) == ""


@pytest.mark.slow
@pytest.mark.parametrize("path", DIALLED, ids=lambda path: path.stem)
def test_a_notebook_runs_with_the_dial_low(path, run_notebook):
    assert stderr(run_notebook(small(path, TEMPERATURE=0.5, ALPHA=1.0))) == ""
