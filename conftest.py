"""What tests and notebooks share: cores, and what a notebook finds when pytest runs it."""

import os
import sys
import tempfile
from pathlib import Path

WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))

# Read by torch when it is imported, here and in the kernels and processes that tests start:
# the workers of pytest-xdist divide the cores among them.
if WORKERS > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))

DEAD_END = "http://127.0.0.1:9"  # nothing listens on the discard port
FOLDER = tempfile.TemporaryDirectory()  # removed when the process ends

sys.path.append(str(Path(__file__).parent / "tests"))
from notebook_runs import FEW, dial, quick, short_book  # noqa: E402

collect_ignore = ["notebooks/solutions"]  # tests/test_notebooks.py runs them, all in one process


def pytest_collection_modifyitems(items):
    """Notebooks find a short book, few blocks and no network; all cells run, but quickly."""
    cells = [item for item in items if getattr(item, "cell", None) is not None]
    if not cells:
        return
    os.environ.setdefault("WILLOWS_KD_CORPUS", str(short_book(Path(FOLDER.name))))
    os.environ.update(HF_HUB_OFFLINE="1", HTTPS_PROXY=DEAD_END, HTTP_PROXY=DEAD_END)
    os.environ["NO_PROXY"] = "localhost,127.0.0.1"  # this machine is no network
    for item in cells:
        cell, tags = item.cell, item.cell.metadata.get("tags", [])
        if "set-up" in tags:
            cell.source += quick(item.path)
        if "parameters" in tags:
            cell.source += f"\n{dial(cell.source, **FEW)}"
