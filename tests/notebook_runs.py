"""Notebooks as tests run them: a short book, few blocks, another dial, each cell once or twice."""

import copy
import itertools
import re
from pathlib import Path

import nbformat

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
STORY = NOTEBOOKS.parent / "willows_kd" / "assets" / "sample_story.txt"
SERIES = sorted(NOTEBOOKS.glob("[0-9AS]*.ipynb"))  # the course, appendices, side trips
SOLUTIONS = sorted((NOTEBOOKS / "solutions").glob("[0-9AS]*.ipynb"))

# so that tests of how a notebook behaves do all that it does, on few blocks
FEW = {"EPOCHS": 1, "TRAIN_BLOCKS": 8, "SWEEP_BLOCKS": 8, "TEST_BLOCKS": 4, "TEXTS": 8}
FEW |= {"OPENINGS": 2, "BATCH": 1, "DEPTH": 2, "GUIDE_STEPS": 5, "TOWN_STEPS": 2}
# and what no dial turns down: tokens and rounds at the clock, tokens in 05's last exercise, blocks
TOKENS, BLOCK_SIZE = 1_024, 64
QUICK = f"""
kd.latency.__defaults__ = (2, 1)
from willows_kd.exercises import your_own
your_own.TOKENS = {TOKENS}
"""


def quick(path: Path) -> str:
    """Lines that shorten what a notebook does, to run after its set-up cell."""
    if path.name.startswith("04"):  # which holds what it measures against stored results
        return QUICK
    return QUICK + f"kd.pack.__defaults__ = ({BLOCK_SIZE},)\n"


def short_book(folder: Path) -> Path:
    """A file with the book's headings and the sample story's words: 12, 4 and 3 blocks."""
    story = re.sub(r"^[IVX]+\. .*$", "", STORY.read_text(encoding="utf-8"), flags=re.MULTILINE)
    titles = ["THE RIVER BANK", *10 * ["ANOTHER CHAPTER"], "THE RETURN OF ULYSSES"]
    lengths = 10 * [1_150] + [3_900, 3_000]  # characters, some 880 of which are a block
    ends = itertools.accumulate(lengths)
    chapters = (story[end - length : end] for end, length in zip(ends, lengths, strict=True))
    pairs = zip(titles, chapters, strict=True)
    text = (f"{n}. {title}\n\n{words}" for n, (title, words) in enumerate(pairs, start=1))
    path = folder / "short_book.txt"
    path.write_text("\n\n".join(text), encoding="utf-8")
    return path


def dial(known: str, **values) -> str:
    """The lines that set a dial anew, as far as the cell tagged parameters knows the names."""
    if "TEST_BLOCKS =" in known:  # S3, which reads more held-out blocks than the short book has
        values["CORPUS"] = "sample"
    lines = [f"{name} = {value!r}" for name, value in values.items() if f"{name} =" in known]
    return "\n".join(lines) or "pass"


def small(path: Path, **values):
    """A notebook that does all it does on few blocks; its dial is set anew by a cell after it."""
    notebook = nbformat.read(path, as_version=4)
    places = [i for i, c in enumerate(notebook.cells) if "parameters" in c.metadata.get("tags", [])]
    assert len(places) == 1, f"{path.name} has {len(places)} cells tagged parameters"
    lines = quick(path) + dial(notebook.cells[places[0]].source, **(FEW | values))
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
