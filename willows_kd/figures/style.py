"""The look of every figure of the series, in one place, and the words that stand in for it.

A white ground, so that a figure reads the same in a light and a dark JupyterLab;
colours that differ in brightness, and a marker or line style of its own for each
line, so that it reads the same in grey; a description for whoever cannot see it.
"""

import base64
import contextlib
import io

import matplotlib.pyplot as plt
from cycler import cycler
from matplotlib.figure import Figure
from matplotlib.text import Text

COLOURS = ["#0b3c5d", "#d1495b", "#3d9a6a", "#e0a526", "#7a7a7a"]
MARKERS = ["o", "s", "^", "D", "v"]
LINES = ["-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1))]
QUIET = "#7a7a7a"
FILLED = {"color": COLOURS[0]}  # of two bars side by side, the first and the second
HATCHED = {"color": "#f3b3ba", "hatch": "//", "edgecolor": COLOURS[1]}
STYLE = {
    "figure.facecolor": "white",
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "savefig.facecolor": "white",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
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
def figure(columns: int = 1, width: float = 7.0, height: float = 3.6):
    """A new figure and its axes, to be filled, described and returned."""
    with plt.rc_context(STYLE):
        fig = plt.figure(figsize=(width, height), FigureClass=DescribedFigure)
        axes = [fig.add_subplot(1, columns, i + 1) for i in range(columns)]
        yield fig, axes[0] if columns == 1 else axes
        titles = [ax.get_title(loc="left") for ax in axes]
        for text in fig.findobj(Text):
            text.set_wrap(text.get_text() in titles)  # a long title takes a second line
        fig.description = fig.description or "; ".join(t for t in titles if t)
        plt.close(fig)  # else a notebook would show it a second time
