"""Write the one set-up cell and the Colab line into every notebook.

    python notebooks/sync_setup.py

They hold the repository's address, which is that of `git remote get-url origin`, or else
`Repository` under `[project.urls]` in pyproject.toml; so a fork writes its own. Without an
address, the set-up cell installs a wheel that lies beside the notebook.
"""

import re
import subprocess
import tomllib
from pathlib import Path

import nbformat

ROOT = Path(__file__).parent.parent
GITHUB = "https://github.com/"
COLAB = "https://colab.research.google.com/github"
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
# https://host/owner/name, ssh://git@host/owner/name or git@host:owner/name
REMOTE = re.compile(
    r"(?:https?://|ssh://|(?=git@))(?:[^@/]+@)?"  # a name or a token is left out
    r"(?P<host>(?:[\w-]+\.)+[a-z]{2,})(?::\d+/|[:/])"
    r"(?P<path>(?:[\w.-]+/)+[\w.-]+?)(?:\.git)?/?"
)

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
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", source], check=True
    )
    importlib.invalidate_caches()

import torch
import transformers

import willows_kd as kd

print("willows_kd", kd.__version__, "| torch", torch.__version__, end=" | ")
print(
    "transformers",
    transformers.__version__,
    "|",
    torch.get_num_threads(),
    "threads",
)"""


def address() -> str:
    """The repository's address; empty if it has none that others can reach."""
    return public_address(origin()) or public_address(repository_in_pyproject())


def origin() -> str:
    """What git calls `origin`; empty without git or without a remote."""
    if not (ROOT / ".git").exists():
        return ""
    try:
        command = ["git", "-C", str(ROOT), "remote", "get-url", "origin"]
        return subprocess.check_output(
            command, text=True, stderr=subprocess.DEVNULL
        ).strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def repository_in_pyproject() -> str:
    """The address under `[project.urls]`; empty until a maintainer sets it."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)["project"].get("urls", {}).get("Repository", "")


def public_address(remote: str) -> str:
    """`https://host/owner/name` of a remote; empty for a path or a local server."""
    match = REMOTE.fullmatch(remote)
    return f"https://{match['host']}/{match['path']}" if match else ""


def stored_address(notebook) -> str:
    """The address that a notebook's set-up cell holds, empty if it holds none."""
    sources = "\n".join(cell.source for cell in notebook.cells)
    match = re.search(r'^REPOSITORY = "(.*)"$', sources, re.MULTILINE)
    return match[1] if match else ""


def set_up_cell(repository: str) -> str:
    """The source of the cell tagged `set-up`."""
    return SET_UP.format(address=repository)


def colab_line(path: Path, repository: str) -> str:
    """The source of the cell tagged `colab`: a badge, or what to do instead.

    Colab opens notebooks from GitHub alone.
    """
    if not repository.startswith(GITHUB):
        return (
            "*On Colab: upload this notebook together with a wheel of the package "
            "(`pip wheel --no-deps .`), and run the set-up cell.*"
        )
    owner_and_name = repository.removeprefix(GITHUB)
    place = path.relative_to(ROOT).as_posix()
    return f"[![Open in Colab]({BADGE})]({COLAB}/{owner_and_name}/blob/main/{place})"


def notebooks() -> list[Path]:
    """All notebooks of the series, appendices and solutions included."""
    folder = ROOT / "notebooks"
    return [
        *sorted(folder.glob("[0-9AS]*.ipynb")),
        *sorted(folder.glob("solutions/[0-9AS]*.ipynb")),
    ]


def sync(path: Path, repository: str | None = None) -> None:
    """Write the tagged cells of one notebook; its outputs stay.

    Args:
        repository: the address to write; the notebook's own if there is none.
    """
    notebook = nbformat.read(path, as_version=4)
    if repository is None:
        repository = stored_address(notebook)
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        if "set-up" in tags:
            cell.source = set_up_cell(repository)
            # folded, in Jupyter and in Colab: no part of the lesson
            cell.metadata.update(jupyter={"source_hidden": True}, cellView="form")
        elif "colab" in tags:
            cell.source = colab_line(path, repository)
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for notebook_path in notebooks():
        sync(notebook_path, address())
