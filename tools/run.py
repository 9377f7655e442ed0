"""Run notebooks from top to bottom and store what they show.

    python tools/run.py [NOTEBOOK ...]

Left out of what is stored: progress bars, and the live state of widgets, without which
a viewer would show an error in their place. A line says where a widget will be.
"""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from sync_setup import notebooks, sync

WIDGET = "application/vnd.jupyter.widget-view+json"
CELL_TIMEOUT = 900  # seconds


def run(path: Path) -> None:
    """Run one notebook in its own folder and write it back, with its outputs."""
    sync(path)
    notebook = nbformat.read(path, as_version=4)
    where = {"metadata": {"path": str(path.parent)}}
    client = NotebookClient(notebook, timeout=CELL_TIMEOUT, resources=where, kernel_name="python3")
    client.execute()
    # as JupyterLab writes it, so that a notebook opened and saved is the same
    spec = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    language = notebook.metadata.language_info  # which the kernel tells
    notebook.metadata = nbformat.from_dict({"kernelspec": spec, "language_info": language})
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [kept for output in cell.outputs if (kept := still(output))]
    nbformat.write(notebook, path)


def still(output):
    """An output as a page that runs nothing can show it; None for a progress bar."""
    data = output.get("data", {})
    if WIDGET in data:
        if "|" in data.get("text/plain", ""):  # a bar of tqdm
            return None
        data.pop(WIDGET)
        data["text/plain"] = "(run this cell to use it)"
    is_bar = output.get("name") == "stderr" and "it/s" in output.text or "step/s" in str(output)
    return None if is_bar else output


if __name__ == "__main__":
    for notebook_path in [Path(name).resolve() for name in sys.argv[1:]] or notebooks():
        print(notebook_path.name, flush=True)
        run(notebook_path)
