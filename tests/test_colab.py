"""A stand-in for Colab: its stack, an empty folder, one notebook, and the built wheel.

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
from notebook_runs import NOTEBOOKS, SERIES, small, stderr, twice

ROOT = NOTEBOOKS.parent
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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The package as a wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    command = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    subprocess.run([sys.executable, *command, folder, ROOT], check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture
def colab(tmp_path, wheel):
    """An empty folder with a stub of google.colab, in an environment without willows_kd."""
    stub = tmp_path / "google" / "colab" / "__init__.py"
    stub.parent.mkdir(parents=True)
    stub.touch()
    yield tmp_path
    subprocess.run([PYTHON, "-m", "pip", "uninstall", "--quiet", "--yes", "willows-kd"], check=True)


def installed() -> set[str]:
    """What pip sees in the environment, with versions."""
    listing = subprocess.run(
        [PYTHON, "-m", "pip", "list", "--format=freeze"], check=True, capture_output=True, text=True
    )
    return set(listing.stdout.split())


def run(folder: Path, notebook) -> subprocess.CompletedProcess:
    """Run a notebook in the folder with Colab's stack; its outputs are written back."""
    nbformat.write(notebook, folder / "notebook.ipynb")
    return subprocess.run(
        [PYTHON, "-c", RUN, "notebook.ipynb"],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1"},
    )


@pytest.mark.parametrize("path", SERIES, ids=lambda path: path.stem)
def test_a_notebook_runs_from_an_uploaded_wheel_and_changes_nothing_else(path, colab, wheel):
    (colab / wheel.name).write_bytes(wheel.read_bytes())
    before = installed()
    result = run(colab, twice(path, CORPUS="sample"))
    assert result.returncode == 0, result.stderr[-3000:]
    assert stderr(nbformat.read(colab / "notebook.ipynb", as_version=4)) == ""
    assert {name.split("==")[0] for name in installed() ^ before} <= {"willows-kd", "willows_kd"}


def test_without_a_wheel_the_set_up_cell_says_what_to_do(colab):
    result = run(colab, small(SERIES[0]))
    assert result.returncode != 0
    assert "upload a wheel" in result.stderr
