"""The look of every figure of the series, in one place, and the words that stand in for it.

A white ground, so that a figure reads the same in a light and a dark JupyterLab;
colours that differ in brightness, and a marker or line style of its own for each
line, so that it reads the same in grey; a description for whoever cannot see it.
"""

import base64
import contextlib
import io
import textwrap

import matplotlib.pyplot as plt
from cycler import cycler
from matplotlib.figure import Figure

COLOURS = ["#0b3c5d", "#d1495b", "#3d9a6a", "#e0a526", "#7a7a7a"]
MARKERS = ["o", "s", "^", "D", "v"]
LINES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1))]
QUIET = "#7a7a7a"
BARS = [  # of bars side by side or one after another
    {"color": COLOURS[0]},
    {"color": "#f3b3ba", "hatch": "//", "edgecolor": COLOURS[1]},
    {"color": "#bfe3cf", "hatch": "..", "edgecolor": COLOURS[2]},
    {"color": COLOURS[3]},
    {"color": "#dcdcdc", "hatch": "\\\\", "edgecolor": QUIET},
]
STYLE = {
    "figure.facecolor": "white",
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "savefig.facecolor": "white",
    "font.size": 10,
    "text.parse_math": False,  # a dollar sign in a text is a dollar sign
    "figure.titlesize": 11,
    "figure.titleweight": "bold",
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "legend.frameon": False,
    "lines.markersize": 6,
    "axes.prop_cycle": cycler(color=COLOURS) + cycler(marker=MARKERS) + cycler(linestyle=LINES),
}


class DescribedFigure(Figure):
    """A figure that a notebook shows with a description: alt text, and its plain-text form."""

    description = ""

    def _repr_mimebundle_(self, include=None, exclude=None):
        png = io.BytesIO()
        with plt.rc_context(STYLE):
            self.savefig(png, format="png")
        data = {"image/png": base64.b64encode(png.getvalue()).decode(), "text/plain": repr(self)}
        return data, {"image/png": {"alt": self.description}}

    def __str__(self):
        return f"Figure: {self.description}"

    __repr__ = __str__


@contextlib.contextmanager
def figure(title: str, columns: int = 1, width: float = 7.0, height: float = 3.6):
    """A new figure with a title, which also describes it, and its axes, to be filled."""
    with plt.rc_context(STYLE):
        fig = plt.figure(figsize=(width, height), FigureClass=DescribedFigure)
        fig.description = " ".join(title.split())
        axes = [fig.add_subplot(1, columns, i + 1) for i in range(columns)]
        fig.suptitle(textwrap.fill(title, round(11 * width)), x=0.01, ha="left")
        yield fig, axes[0] if columns == 1 else axes
        plt.close(fig)  # else a notebook would show it a second time
