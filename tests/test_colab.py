"""A stand-in for Colab: its stack, an empty folder, notebooks, and the built wheel.

Needs the interpreter of a virtual environment that has tests/colab_requirements.txt and
no willows_kd, named by COLAB_PYTHON; .ci/run makes one. Skipped where there is none.
"""

import os
import subprocess
import sys

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


def pip(*arguments, python=PYTHON) -> str:
    """What pip says in the environment."""
    command = [python, "-m", "pip", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The package as a wheel; taken out of the environment in the end."""
    folder = tmp_path_factory.mktemp("wheel")
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    pip(*build, folder, NOTEBOOKS.parent, python=sys.executable)
    yield next(folder.glob("*.whl"))
    pip("uninstall", "--yes", "willows-kd")


@pytest.fixture
def run(tmp_path):
    """A function that runs a notebook with Colab's stack, in a folder with what says that it is.

    The outputs are written back.
    """
    stub = tmp_path / "google" / "colab" / "__init__.py"
    stub.parent.mkdir(parents=True)
    stub.touch()
    settings = {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1"}
    settings["WILLOWS_KD_CORPUS"] = str(short_book(tmp_path))

    def run(notebook) -> subprocess.CompletedProcess:
        nbformat.write(notebook, tmp_path / "notebook.ipynb")
        command, environment = [PYTHON, "-c", RUN, "notebook.ipynb"], os.environ | settings
        kept = {"capture_output": True, "text": True}
        return subprocess.run(command, cwd=tmp_path, env=environment, **kept)

    return run


def test_the_set_up_cell_wants_a_wheel_installs_it_and_changes_nothing_else(run, wheel, tmp_path):
    """It is the same in all notebooks, as test_setup_cell.py sees."""
    notebook = small(SERIES[0])
    notebook.cells = notebook.cells[:3]
    assert notebook.cells[-1].metadata.tags == ["set-up"]
    assert "upload a wheel" in run(notebook).stderr
    (tmp_path / wheel.name).write_bytes(wheel.read_bytes())
    before = pip("list", "--format=freeze").split()
    result = run(notebook)
    assert result.returncode == 0, result.stderr[-3000:]
    changed = set(before) ^ set(pip("list", "--format=freeze").split())
    assert {name.split("==")[0].replace("-", "_") for name in changed} == {"willows_kd"}


@pytest.fixture(scope="module")
def installed(wheel):
    """The environment with the package, as the set-up cell leaves it."""
    pip("install", "--no-index", wheel)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("path", SERIES, ids=lambda path: path.stem)
def test_a_notebook_runs_there_without_a_warning(path, run, tmp_path):
    result = run(twice(path))
    assert result.returncode == 0, result.stderr[-3000:]
    assert stderr(nbformat.read(tmp_path / "notebook.ipynb", as_version=4)) == ""
