"""A stand-in for Colab: its stack, an empty folder, notebooks, and the built wheel.

Each cell runs twice, with the dial turned far up.

Needs the interpreter of a virtual environment that has tests/colab_requirements.txt and
no willows_kd, named by COLAB_PYTHON; .ci/run makes one. Skipped where there is none.
"""

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from notebook_runs import NOTEBOOKS, SERIES, short_book, small, stderr, twice

PYTHON = os.environ.get("COLAB_PYTHON")
RUN = """
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], as_version=4)
try:
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3").execute()
finally:
    nbformat.write(notebook, sys.argv[1])
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PYTHON is None, reason="COLAB_PYTHON names no interpreter: see .ci/run"),
]


def pip(*arguments) -> str:
    """What pip says in the environment."""
    command = [PYTHON, "-m", "pip", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The package as a wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    command = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([sys.executable, *command, folder, NOTEBOOKS.parent], check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture
def colab(tmp_path) -> Path:
    """An empty folder with a stub of google.colab."""
    stub = tmp_path / "google" / "colab" / "__init__.py"
    stub.parent.mkdir(parents=True)
    stub.touch()
    return tmp_path


def run(folder: Path, notebook) -> subprocess.CompletedProcess:
    """Run a notebook in the folder with Colab's stack; its outputs are written back."""
    nbformat.write(notebook, folder / "notebook.ipynb")
    settings = {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1"}
    settings["WILLOWS_KD_CORPUS"] = str(short_book(folder))
    return subprocess.run(
        [PYTHON, "-c", RUN, "notebook.ipynb"],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | settings,
    )


def test_the_set_up_cell_wants_a_wheel_installs_it_and_changes_nothing_else(colab, wheel):
    """It is the same in all notebooks, as test_setup_cell.py sees."""
    notebook = small(SERIES[0])
    notebook.cells = notebook.cells[:3]
    assert notebook.cells[-1].metadata.tags == ["set-up"]
    result = run(colab, notebook)
    assert result.returncode != 0
    assert "upload a wheel" in result.stderr
    (colab / wheel.name).write_bytes(wheel.read_bytes())
    before = pip("list", "--format=freeze").split()
    try:
        result = run(colab, notebook)
        assert result.returncode == 0, result.stderr[-3000:]
        changed = set(before) ^ set(pip("list", "--format=freeze").split())
        assert {name.split("==")[0].replace("-", "_") for name in changed} == {"willows_kd"}
    finally:
        pip("uninstall", "--quiet", "--yes", "willows-kd")


@pytest.fixture(scope="module")
def installed(wheel):
    """The environment with the package, as the set-up cell leaves it."""
    pip("install", "--quiet", "--no-index", wheel)
    yield
    pip("uninstall", "--quiet", "--yes", "willows-kd")


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("path", SERIES, ids=lambda path: path.stem)
def test_a_notebook_runs_there_without_a_warning(path, colab):
    result = run(colab, twice(path))
    assert result.returncode == 0, result.stderr[-3000:]
    assert stderr(nbformat.read(colab / "notebook.ipynb", as_version=4)) == ""
