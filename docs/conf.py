"""How the site is made: `make site` reads the pages and the stored notebooks, and runs neither.

Sphinx is started in the root of the repository, so that a link from one file to another is
the same on GitHub and on the site. Nothing of a page is fetched by the reader's browser:
formulas are drawn by a copy of MathJax, search runs on an index that is part of the site.
"""

import sys
from importlib.metadata import distribution
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import pages  # noqa: E402

project = "willows_kd"
copyright = "the willows_kd maintainers"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]

# What belongs to the site, and where it starts.
root_doc = "docs/index"
include_patterns = [
    "docs/*.md",
    "notebooks/README.md",
    "notebooks/[0-9AS]*.ipynb",
    "notebooks/solutions/[0-9AS]*.ipynb",
    "benchmarks/results/*.md",
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
]
exclude_patterns = [
    "benchmarks/results/students.md",  # a table that docs/benchmarks.md includes
    "build",
    "**/.*",
]

# Notebooks and pages.
nb_execution_mode = "off"
nb_render_markdown_format = "myst"  # which has tables
myst_enable_extensions = ["dollarmath", "amsmath", "substitution"]
myst_heading_anchors = 3
commands = ("distill", "generate", "compare", "export")
myst_substitutions = {f"help_of_{name}": pages.help_of(name) for name in commands}
myst_substitutions["api"] = pages.api()
suppress_warnings = ["myst.header"]  # exercises are third-level headings wherever they stand

# Docstrings: `name` in them is code.
default_role = "code"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [(pages.RESULTS, "params_style")]

# Formulas: one file with MathJax and its fonts, copied out of a package of PyPI.
_mathjax = "sphinx-mathjax-offline/static/mathjax/tex-svg-full.js"
html_static_path = [str(distribution("sphinx-mathjax-offline").locate_file(_mathjax)), "site.css"]
mathjax_path = "tex-svg-full.js"

html_theme = "furo"
html_title = "willows_kd"
html_favicon = "icon.svg"
html_css_files = ["site.css"]
html_extra_path = ["_root"]
html_copy_source = False
html_search_scorer = str(Path(__file__).with_name("search_order.js"))
if pages.address():  # links to a page's source
    html_theme_options = {
        "source_repository": pages.address(),
        "source_branch": "main",
        "source_directory": "",
    }


def setup(app):
    """Prepare notebooks and docstrings as they are read."""
    app.connect("source-read", pages.prepare_notebook)
    app.connect("autodoc-process-docstring", pages.prepare_docstring, priority=100)
