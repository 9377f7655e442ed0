"""The parts of the site that are made from the code: no page says by hand what the code knows."""

import contextlib
import importlib
import io
import json
import os
import re
import sys
from pathlib import Path

import willows_kd as kd
from willows_kd import cli

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))
from sync_setup import BADGE, address, nav_cell  # noqa: E402

HELP_WIDTH = "88"  # columns
RESULTS = "Returned"  # the heading of a list of results


def help_of(command: str) -> str:
    """What `willows-kd COMMAND --help` prints, as a block of code."""
    os.environ["COLUMNS"] = HELP_WIDTH
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        cli.main([command, "--help"])
    return f"```text\n{printed.getvalue()}```"


def api() -> str:
    """A section for each file of the package: its public names, in the notebooks' order."""
    return "\n\n".join(section(file, names.split()) for file, names in kd.PUBLIC_NAMES.items())


def section(file: str, names: list[str]) -> str:
    """One file's own sentence, and the docstrings of its public names."""
    module = importlib.import_module(f"willows_kd.{file}")
    lines = [f".. currentmodule:: {module.__name__}", ""]
    for name in names:
        if isinstance(getattr(module, name), type):
            lines += [f".. autoclass:: {name}", "   :members:", ""]
        else:
            lines += [f".. autofunction:: {name}", ""]
    about = module.__doc__.split("\n")[0]
    return "\n".join([f"## {file}", "", about, "", "```{eval-rst}", *lines, "```"])


def prepare_docstring(app, what, name, value, options, lines: list[str]) -> None:
    """Let docstrings be plain text: a bar is a bar, several results are a list."""
    text = "\n".join(lines).replace("|", r"\|")
    before, returns, after = text.partition("\nReturns:\n")
    if len(re.findall(r"^    \w+: ", after.split("\n\n")[0], re.MULTILINE)) > 1:
        returns = f"\n{RESULTS}:\n"
    lines[:] = f"{before}{returns}{after}".split("\n")


def to_take_home(path: Path) -> dict:
    """A cell that offers the notebook's file, and says how it is run."""
    told = f"{{download}}`Download <{path.name}>`, or run it: `jupyter lab {path.name}`"
    return {"cell_type": "markdown", "id": "download", "metadata": {}, "source": told}


def titles_of(cell: dict) -> str:
    """What the pictures below a cell show: the alternative texts that are stored with them."""
    shown = [output.get("metadata", {}).get("image/png", {}) for output in cell.get("outputs", [])]
    return "; ".join(picture["alt"] for picture in shown if "alt" in picture)


def prepare_notebook(app, docname: str, source: list[str]) -> None:
    """Offer the file, and write the line of links for the address of this copy."""
    path = Path(app.env.doc2path(docname))
    if path.suffix != ".ipynb":
        return
    notebook = json.loads(source[0])
    notebook["cells"].insert(1, to_take_home(path))
    for cell in notebook["cells"]:
        if alt := titles_of(cell):  # the site reads it here and nowhere else
            cell["metadata"]["mystnb"] = {"image": {"alt": alt}}
        if "nav" in cell["metadata"].get("tags", []):
            # site.css draws the badge: its picture is on another machine
            line = nav_cell(ROOT / path, address())
            cell["source"] = line.replace(f"![Open in Colab]({BADGE})", "Open in Colab")
    source[0] = json.dumps(notebook)
