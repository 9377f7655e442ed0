"""The notebooks as they are stored, and as learners re-run them."""

import nbformat
import pytest
from check_notebooks import problems
from notebook_runs import NOTEBOOKS, SERIES, SOLUTIONS, execute, small, stderr

by_name = pytest.mark.parametrize("path", SERIES, ids=lambda path: path.stem)
any_notebook = pytest.mark.parametrize("path", SERIES + SOLUTIONS, ids=lambda path: path.stem)


@pytest.fixture(autouse=True)
def kernel_environment(monkeypatch):
    """Kernels find the sample story and no network, as under nbval."""
    monkeypatch.setenv(
        "WILLOWS_KD_CORPUS", str(NOTEBOOKS.parent / "willows_kd/assets/sample_story.txt")
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_there_are_four_notebooks_each_with_solutions():
    assert [path.stem[:2] for path in SERIES] == ["01", "02", "03", "04"]
    assert [path.stem for path in SOLUTIONS] == [f"{path.stem}_solutions" for path in SERIES]


@any_notebook
def test_what_is_stored_is_one_clean_run(path):
    assert problems(path) == []


@by_name
@pytest.mark.parametrize(
    "dial",
    [{"TEMPERATURE": 0.5, "ALPHA": 1.0}, {"TEMPERATURE": 20.0, "ALPHA": 0.3, "SEED": 7}],
    ids=["cold and hard", "hot and mixed"],
)
def test_a_notebook_runs_at_other_settings(path, dial, tmp_path):
    assert stderr(execute(small(path, **dial), tmp_path)) == ""


@by_name
def test_cells_run_twice_and_back_again(path, tmp_path):
    """A learner goes down, then back to the dial, then down again, each cell twice."""
    notebook = small(path)
    down = range(len(notebook.cells))
    twice = [index for index in down for _ in range(2)]
    assert stderr(execute(notebook, tmp_path, order=twice)) == ""


@pytest.mark.parametrize("path", SOLUTIONS, ids=lambda path: path.stem)
def test_solutions_end_by_asserting_that_all_checks_are_content(path):
    """nbval runs them, so a check that is not fails there."""
    code = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    assert code[-1].endswith(("assert done_1 and done_2 and done_3", "assert all(checks)"))
