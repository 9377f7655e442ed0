"""Write the one set-up cell and the Colab line into every notebook.

    python notebooks/sync_setup.py

The repository's address stands in exactly one place, `[project.urls]` in
pyproject.toml (key `Repository`); set it there and run this. A test holds both together.
"""

import tomllib
from pathlib import Path

import nbformat

ROOT = Path(__file__).parent.parent
COLAB = "https://colab.research.google.com/github"
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"

SET_UP = """# Set-up, the same in every notebook. Where the package is installed it only imports it.
import importlib.util
import subprocess
import sys
from pathlib import Path

REPOSITORY = "{address}"
if importlib.util.find_spec("willows_kd") is None:
    wheels = sorted(Path.cwd().glob("willows_kd-*.whl"))
    source = str(wheels[-1]) if wheels else f"git+{{REPOSITORY}}" if REPOSITORY else None
    if source is None:
        sys.exit(
            "willows_kd is not installed and there is no wheel of it beside this notebook. "
            "Build one with `pip wheel --no-deps .` in the project, upload it here, run again."
        )
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", source], check=True)
    importlib.invalidate_caches()

import torch
import transformers

import willows_kd as kd

print("willows_kd", kd.__version__, "| torch", torch.__version__, end=" | ")
print("transformers", transformers.__version__, "|", torch.get_num_threads(), "threads")"""


def address() -> str:
    """The repository's address; empty until the owner has set it."""
    project = tomllib.loads(
        (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    )["project"]
    return (
        project.get("urls", {})
        .get("Repository", "")
        .removesuffix(".git")
        .rstrip("/")
    )


def set_up_cell() -> str:
    """The source of the cell tagged `set-up`."""
    return SET_UP.format(address=address())


def colab_line(path: Path) -> str:
    """The source of the cell tagged `colab`: a badge, or how to do without an address."""
    if not address():
        return (
            "*On Colab: upload this notebook together with a wheel of the package "
            "(`pip wheel --no-deps .`), and run the set-up cell.*"
        )
    owner_and_name = address().removeprefix("https://github.com/")
    place = path.relative_to(ROOT).as_posix()
    return f"[![Open in Colab]({BADGE})]({COLAB}/{owner_and_name}/blob/main/{place})"


def notebooks() -> list[Path]:
    """All notebooks of the series, solutions included."""
    return sorted((ROOT / "notebooks").glob("**/[0-9]*.ipynb"))


def sync(path: Path) -> None:
    """Write the tagged cells of one notebook; its outputs stay."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        if "set-up" in tags:
            cell.source = set_up_cell()
        elif "colab" in tags:
            cell.source = colab_line(path)
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for notebook_path in notebooks():
        sync(notebook_path)
