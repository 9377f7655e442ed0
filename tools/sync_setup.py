"""Write into every notebook what is not its own: links, and the set-up cell.

    python tools/sync_setup.py

The cell tagged `nav` leads to the previous notebook, the contents and the next, and the one
tagged `set-up` imports the package or installs it. A mention such as "notebook 03" becomes a
link. The repository's address is that of `git remote get-url origin`, or else `Repository` under
`[project.urls]` in pyproject.toml; so a fork writes its own. Without one there is no Colab badge,
and the set-up cell installs a wheel that lies beside the notebook.
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

MENTION = re.compile(r"(?<!\[)\b((?:notebook|appendix|side trip)\s+([0AS]\d))\b", re.IGNORECASE)
INSTALLED = re.compile(r"^    %pip install -q git\+(\S+)$", re.MULTILINE)

SET_UP = """from importlib.util import find_spec

if not find_spec("willows_kd"):  # on Colab; a wheel is made by: pip wheel --no-deps .
    %pip install -q {source}
    assert find_spec("willows_kd"), "{hint}"
import torch, willows_kd as kd

print(f"willows_kd {{kd.__version__}}, torch {{torch.__version__}}")"""
FROM_A_WHEEL = {
    "source": "willows_kd-*.whl",
    "hint": "pip install -e . first; on Colab: upload a wheel",
}


def address() -> str:
    """The repository's address; empty if it has none that others can reach."""
    return public_address(origin()) or public_address(repository_in_pyproject())


def origin() -> str:
    """What git calls `origin`; empty without git or without a remote."""
    if not (ROOT / ".git").exists():
        return ""
    try:
        command = ["git", "-C", str(ROOT), "remote", "get-url", "origin"]
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()
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
    match = INSTALLED.search("\n".join(cell.source for cell in notebook.cells))
    return match[1] if match else ""


def set_up_cell(repository: str) -> str:
    """The source of the cell tagged `set-up`."""
    from_git = {"source": f"git+{repository}", "hint": "pip says above what is wrong"}
    return SET_UP.format(**(from_git if repository else FROM_A_WHEEL))


def course() -> list[Path]:
    """The notebooks in the order of the map: the course, side trips, appendices."""
    return [
        path for first in "0SA" for path in sorted((ROOT / "notebooks").glob(f"{first}*.ipynb"))
    ]


def notebooks() -> list[Path]:
    """All notebooks, solutions included."""
    return course() + sorted((ROOT / "notebooks" / "solutions").glob("[0SA]*.ipynb"))


def nav_cell(path: Path, repository: str) -> str:
    """The source of the cell tagged `nav`: previous, contents, next; and a badge, if it can be.

    Colab opens notebooks from GitHub alone.
    """
    if path.parent.name == "solutions":
        lesson = path.stem.removesuffix("_solutions")
        links = [f"[← {lesson[:2]}](../{lesson}.ipynb)", "[contents](../README.md)"]
        links.append("[glossary](../../docs/glossary.md)")
    else:
        order = [each.name for each in course()]
        place = order.index(path.name)
        links = [f"[← {name[:2]}]({name})" for name in order[:place][-1:]]
        links.append("[contents](README.md)")
        links += [f"[{name[:2]} →]({name})" for name in order[place + 1 :][:1]]
        solutions = f"solutions/{path.stem}_solutions.ipynb"
        if (path.parent / solutions).exists():
            links.append(f"[solutions]({solutions})")
        links.append("[glossary](../docs/glossary.md)")
    if repository.startswith(GITHUB):
        owner_and_name = repository.removeprefix(GITHUB)
        place = path.relative_to(ROOT).as_posix()
        links.append(f"[![Open in Colab]({BADGE})]({COLAB}/{owner_and_name}/blob/main/{place})")
    return " · ".join(links)


def linked(text: str, path: Path) -> str:
    """A text in which each notebook that it mentions is a link, but for itself."""
    names = {each.name[:2]: each.name for each in course()}
    up = "../" if path.parent.name == "solutions" else ""

    def link(match: re.Match) -> str:
        name = names.get(match[2])
        return f"[{match[1]}]({up}{name})" if name not in (None, path.name) else match[1]

    return MENTION.sub(link, text)


def sync(path: Path, repository: str | None = None) -> None:
    """Write the tagged cells and the links of one notebook; its outputs stay.

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
        elif "nav" in tags:
            cell.source = nav_cell(path, repository)
        elif cell.cell_type == "markdown":
            cell.source = linked(cell.source, path)
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for notebook_path in notebooks():
        sync(notebook_path, address())
