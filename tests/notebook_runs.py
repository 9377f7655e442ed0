"""Running notebooks in tests: with another dial, in another order, without storing anything."""

import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
SERIES = sorted(NOTEBOOKS.glob("[0-9A]*.ipynb"))  # numbered notebooks, then appendices
SOLUTIONS = sorted((NOTEBOOKS / "solutions").glob("[0-9A]*.ipynb"))


# so that tests of how a notebook behaves do all that it does, on few blocks
FEW = {"EPOCHS": 1, "TRAIN_BLOCKS": 16, "SWEEP_BLOCKS": 8, "TEST_BLOCKS": 4, "TEXTS": 8}
FEW |= {"OPENINGS": 2, "BATCH": 1, "DEPTH": 2}


def dial(known: str, **values) -> str:
    """The lines that set a dial anew, as far as the cell tagged parameters knows the names."""
    lines = [f"{name} = {value!r}" for name, value in values.items() if f"{name} =" in known]
    return "\n".join(lines) or "pass"


def turn_dial(path: Path, **values):
    """A notebook whose dial is set anew by a cell after it; returns the notebook node."""
    notebook = nbformat.read(path, as_version=4)
    places = [i for i, c in enumerate(notebook.cells) if "parameters" in c.metadata.get("tags", [])]
    assert len(places) == 1, f"{path.name} has {len(places)} cells tagged parameters"
    lines = dial(notebook.cells[places[0]].source, **values)
    notebook.cells.insert(places[0] + 1, nbformat.v4.new_code_cell(lines))
    return notebook


def small(path: Path, **values):
    """A notebook that does all it does on few blocks."""
    return turn_dial(path, **(FEW | values))


def execute(notebook, folder: Path, order=None, kernel: str = "python3"):
    """Run the code cells of a notebook in a folder, in the order given or as they stand."""
    client = NotebookClient(
        notebook, timeout=600, kernel_name=kernel, resources={"metadata": {"path": str(folder)}}
    )
    with client.setup_kernel():
        for index in order or range(len(notebook.cells)):
            client.execute_cell(notebook.cells[index], index)
    return notebook


def stderr(notebook) -> str:
    """What the cells wrote to stderr, progress bars left out."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.text for output in outputs if output.get("name") == "stderr")
    return "\n".join(line for line in text.splitlines() if not re.search(r"\d+%\|", line))
