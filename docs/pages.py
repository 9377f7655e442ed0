"""The parts of the site that are made from the code: no page says by hand what the code knows."""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

import willows_kd as kd
from willows_kd import cli

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "notebooks"))
from sync_setup import address, colab_line  # noqa: E402

HELP_WIDTH = "88"  # columns


def help_of_distill() -> str:
    """What `willows-kd distill --help` prints, as a block of code."""
    os.environ["COLUMNS"] = HELP_WIDTH
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        cli.main(["distill", "--help"])
    return f"```text\n{printed.getvalue()}```"


def api() -> str:
    """A section for each file of the package: its public names, in the notebooks' order."""
    return "\n\n".join(section(file, names) for file, names in kd.PUBLIC_NAMES.items())


def section(file: str, names: list[str]) -> str:
    """The docstrings of one file's public names, under the file's name."""
    lines = [f".. currentmodule:: willows_kd.{file}", ""]
    for name in names:
        lines.append(
            f".. auto{'class' if isinstance(getattr(kd, name), type) else 'function'}:: {name}"
        )
    return "\n".join([f"## {file}", "", "```{eval-rst}", *lines, "```"])


def prepare_notebook(app, docname: str, source: list[str]) -> None:
    """Fold the set-up cell, and write the line on Colab for the address of this copy."""
    path = app.env.doc2path(docname)
    if path.suffix != ".ipynb":
        return
    notebook = json.loads(source[0])
    for cell in notebook["cells"]:
        tags = cell["metadata"].setdefault("tags", [])
        if "set-up" in tags:
            tags.append("hide-input")
        elif "colab" in tags:
            cell["source"] = colab_line(ROOT / path, address())
    source[0] = json.dumps(notebook)
