"""The project as a whole: what it needs, what it promises, and who may import whom."""

import ast
import functools
import re
import sys
import tomllib
from pathlib import Path

import nbformat
import yaml
from notebook_runs import NOTEBOOKS, SERIES, SOLUTIONS

import willows_kd as kd

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "willows_kd"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
FILES = {
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts): file
    for file in sorted(PACKAGE.rglob("*.py"))
}
WINGS = {"sources", "scale", "compress", "figures", "exercises", "cli"}
FREE = {"cli", "__init__", "__main__"}  # may import all
TEST_COMMAND = 'pip install -e ".[test]" && pytest'


@functools.cache
def imports(name: str) -> set[str]:
    """The dotted names that a file of the package imports, inside its functions too."""
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def outside(name: str) -> set[str]:
    """What a file imports from other distributions: `torch` for `torch.nn`."""
    found = {found.split(".")[0] for found in imports(name)}
    return found - sys.stdlib_module_names - {"willows_kd"}


def inside(name: str) -> set[str]:
    """The files of this package that a file imports, by their dotted names."""
    found = {f.removeprefix("willows_kd.") for f in imports(name) if f.startswith("willows_kd.")}
    return {f if f in FILES else f.rpartition(".")[0] for f in found} & set(FILES) - {name}


def room(name: str) -> str:
    """The wing of a file, or "" for the core."""
    return name.split(".")[0] if name.split(".")[0] in WINGS else ""


# -- what is needed --------------------------------------------------------------------


def test_the_conda_environment_installs_the_project_and_nothing_else():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    python = f"python{PROJECT['requires-python']}"
    assert environment["dependencies"] == [python, "pip", {"pip": ["-e .[lab,test]"]}]


def test_what_the_package_imports_is_required():
    groups = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["export"]
    required = {requirement.split(">=")[0] for requirement in groups}
    # these come with transformers, matplotlib and ipywidgets, which could not do without them
    required |= {"huggingface_hub", "safetensors", "numpy", "cycler", "IPython"}
    required |= {"peft"}  # optional: imported only if an adapter is loaded
    assert {name: outside(name) - required for name in FILES if outside(name) - required} == {}


def test_all_that_ships_is_packaged():
    patterns = PYPROJECT["tool"]["setuptools"]["package-data"]["willows_kd"]
    packaged = {file for pattern in patterns for file in PACKAGE.glob(pattern) if file.is_file()}
    shipped = {file for file in (PACKAGE / "assets").rglob("*") if file.is_file()}
    assert shipped
    assert packaged == shipped | {PACKAGE / "py.typed"}


def test_each_public_name_is_listed_once_and_is_what_its_file_defines():
    names = [name for names in kd.PUBLIC_NAMES.values() for name in names.split()]
    assert len(names) == len(set(names))
    assert kd.__all__ == names
    assert set(names) <= set(dir(kd))
    for name, home in kd.HOME.items():
        assert getattr(kd, name).__module__ == f"willows_kd.{home}", name


# -- who may import whom ---------------------------------------------------------------


def test_the_architecture_names_every_file():
    architecture = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    assert {room(name) for name in FILES} == WINGS | {""}
    names = {name.rpartition(".")[2] for name in FILES if not name.startswith("exercises.")}
    files = {f"`{name}.py`" for name in names - WINGS if not name.startswith("__")}
    assert {it for it in files | {f"`{w}/`" for w in WINGS} if it not in architecture} == set()


def test_the_core_imports_no_wing_and_a_wing_no_other():
    bound = {name for name in FILES if not {name, room(name)} & FREE}
    across = {(a, b) for a in bound for b in inside(a) if room(b) not in ("", room(a))}
    assert across == set()


def test_arrows_point_one_way():
    arrows = {name: inside(name) for name in FILES if name not in WINGS}
    assert "losses" in arrows["distillation"]
    while leaves := {name for name, found in arrows.items() if not found & set(arrows)}:
        arrows = {name: found for name, found in arrows.items() if name not in leaves}
    assert arrows == {}, "these import one another in a circle"


def test_the_mathematics_knows_tensors_only_and_the_figures_alone_know_how_to_draw():
    for name in ("losses", "scale.chunked_loss"):
        assert outside(name) <= {"torch"}
        assert inside(name) <= {"config", "errors", "losses"}
    drawing = {name for name in FILES if outside(name) & {"matplotlib", "ipywidgets", "IPython"}}
    assert {room(name) for name in drawing} == {"figures"}


# -- what a reader is told first -------------------------------------------------------


def test_the_readme_begins_with_the_two_commands_that_work():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    first_block = re.search(r"^```\w*\n(.*?)^```", readme, re.DOTALL | re.MULTILINE)[1]
    commands = [line for line in first_block.splitlines() if line and not line.startswith("#")]
    assert commands == ['pip install -e ".[lab]" && python model_distillation.py', TEST_COMMAND]
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert TEST_COMMAND in script.replace(" --quiet", "")


def test_links_from_page_to_page_lead_somewhere():
    markdown = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *NOTEBOOKS.glob("*.md")]
    pages = {path: path.read_text(encoding="utf-8") for path in markdown}
    for path in SERIES + SOLUTIONS:
        cells = nbformat.read(path, as_version=4).cells
        pages[path] = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    dead = [
        (path.name, link)
        for path, text in pages.items()
        for link in re.findall(r"\]\(([^)#\s]+)", text)
        if "://" not in link and not (path.parent / link).exists()
    ]
    assert dead == []
