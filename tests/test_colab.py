"""A stand-in for Colab: its stack, an empty folder, notebooks, and the built wheel.

Needs the interpreter of a virtual environment that has tests/colab_requirements.txt and
no willows_kd, named by COLAB_PYTHON; .ci/run makes one. Skipped where there is none.
"""

import json
import os
import subprocess
import sys

import pytest
from nbclient.exceptions import CellExecutionError
from notebook_runs import NOTEBOOKS, SERIES, small, stderr, twice

PYTHON = os.environ.get("COLAB_PYTHON")
KERNEL = {"argv": [PYTHON, "-m", "ipykernel_launcher", "-f", "{connection_file}"]}

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
    """The package as a wheel; it is taken out of the environment in the end."""
    folder = tmp_path_factory.mktemp("wheel")
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    pip(*build, folder, NOTEBOOKS.parent, python=sys.executable)
    yield next(folder.glob("*.whl"))
    pip("uninstall", "--yes", "willows-kd")


@pytest.fixture
def run(run_notebook, tmp_path, monkeypatch):
    """A function that runs a notebook with Colab's stack, in a folder with what says that it is."""
    stub, kernel = tmp_path / "google/colab/__init__.py", tmp_path / "kernels/colab/kernel.json"
    for file in (stub, kernel):
        file.parent.mkdir(parents=True)
    stub.touch()
    kernel.write_text(json.dumps(KERNEL | {"display_name": "Colab", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    return lambda notebook: run_notebook(notebook, kernel_name="colab")


def test_the_set_up_cell_wants_a_wheel_installs_it_and_changes_nothing_else(run, wheel, tmp_path):
    """It is the same in all notebooks, as test_setup_cell.py sees."""
    notebook = small(SERIES[0])
    notebook.cells = notebook.cells[:3]
    assert notebook.cells[-1].metadata.tags == ["set-up"]
    with pytest.raises(CellExecutionError, match="upload a wheel"):
        run(notebook)
    (tmp_path / wheel.name).write_bytes(wheel.read_bytes())
    before = pip("list", "--format=freeze").split()
    run(notebook)
    changed = set(before) ^ set(pip("list", "--format=freeze").split())
    assert {name.split("==")[0].replace("-", "_") for name in changed} == {"willows_kd"}


@pytest.fixture(scope="module")
def installed(wheel):
    """The environment with the package, as the set-up cell leaves it."""
    pip("install", "--no-index", wheel)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("path", SERIES, ids=lambda path: path.stem)
def test_a_notebook_runs_there_without_a_warning(path, run):
    assert stderr(run(twice(path))) == ""
