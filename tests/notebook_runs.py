"""Notebooks as tests run them: on few blocks, with another dial, each cell once or twice."""

import copy
import re
from pathlib import Path

import nbformat

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
SERIES = sorted(NOTEBOOKS.glob("[0-9AS]*.ipynb"))  # the course, appendices, side trips
SOLUTIONS = sorted((NOTEBOOKS / "solutions").glob("[0-9AS]*.ipynb"))


# so that tests of how a notebook behaves do all that it does, on few blocks
FEW = {"EPOCHS": 1, "TRAIN_BLOCKS": 16, "SWEEP_BLOCKS": 8, "TEST_BLOCKS": 4, "TEXTS": 8}
FEW |= {"OPENINGS": 2, "BATCH": 1, "DEPTH": 2, "GUIDE_STEPS": 5, "TOWN_STEPS": 2}


def dial(known: str, **values) -> str:
    """The lines that set a dial anew, as far as the cell tagged parameters knows the names."""
    lines = [f"{name} = {value!r}" for name, value in values.items() if f"{name} =" in known]
    return "\n".join(lines) or "pass"


def small(path: Path, **values):
    """A notebook that does all it does on few blocks; its dial is set anew by a cell after it."""
    notebook = nbformat.read(path, as_version=4)
    places = [i for i, c in enumerate(notebook.cells) if "parameters" in c.metadata.get("tags", [])]
    assert len(places) == 1, f"{path.name} has {len(places)} cells tagged parameters"
    lines = dial(notebook.cells[places[0]].source, **(FEW | values))
    notebook.cells.insert(places[0] + 1, nbformat.v4.new_code_cell(lines))
    return notebook


def twice(path: Path, **values):
    """A notebook whose dial is turned far up and whose cells each run again before the next."""
    notebook = small(path, TEMPERATURE=20.0, ALPHA=0.3, SEED=7, **values)
    cells = [copy.deepcopy(cell) for cell in notebook.cells for _ in range(2)]
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    notebook.cells = cells
    return notebook


def stderr(notebook) -> str:
    """What the cells wrote to stderr, progress bars left out."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.text for output in outputs if output.get("name") == "stderr")
    return "\n".join(line for line in text.splitlines() if not re.search(r"\d+%\|", line))
