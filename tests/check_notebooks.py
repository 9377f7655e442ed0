"""What is true of every stored notebook; `python tests/check_notebooks.py NOTEBOOK ...`."""

import re
import sys
from pathlib import Path

import nbformat

SIZE_LIMIT = 1_500_000  # bytes
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
PATHS = re.compile(r"(?<![\w.])/(?:home|root|tmp|work|Users|var|private)/\S+|[A-Z]:\\\\Users")


def problems(path: Path) -> list[str]:
    """What is wrong with one stored notebook, one line each."""
    notebook = nbformat.read(path, as_version=4)
    found = []
    try:
        nbformat.validate(notebook)
    except nbformat.ValidationError as error:
        found.append(f"is not valid: {error}")
    if path.stat().st_size > SIZE_LIMIT:
        found.append(f"has {path.stat().st_size:,} bytes, more than {SIZE_LIMIT:,}")
    kernel, others = notebook.metadata.get("kernelspec"), set(notebook.metadata)
    if kernel != KERNEL or others != {"kernelspec", "language_info"}:
        found.append("has other metadata than JupyterLab writes, which tools/run.py stores")
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)):
        found.append("was not run once from top to bottom")
    for cell in code:
        wide = max(map(len, cell.source.split("\n")))
        if wide > 88 and "set-up" not in cell.metadata.get("tags", []):
            found.append(f"has a line of {wide} characters: {cell.source[:40]!r}")
        for output in cell.outputs:
            found += problems_of_output(output)
    return found


def problems_of_output(output) -> list[str]:
    """What a stored output shows that it should not."""
    found, data = [], output.get("data", {})
    text = output.get("text", "") + str(data.get("text/plain", ""))
    if output.output_type == "error":
        found.append(f"stores a traceback: {output.ename}")
    if output.get("name") == "stderr":
        found.append(f"stores stderr: {text[:60]!r}")
    if PATHS.search(text):
        found.append(f"shows a path of a machine: {PATHS.search(text)[0]!r}")
    if "image/png" in data and not output.metadata.get("image/png", {}).get("alt"):
        found.append("stores a picture without alt text")
    return found


if __name__ == "__main__":
    lines = [f"{name} {line}" for name in sys.argv[1:] for line in problems(Path(name))]
    print("\n".join(lines))
    sys.exit(bool(lines))
