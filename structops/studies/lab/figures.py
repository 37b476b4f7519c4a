"""One style for all figures: colours that colour-blind people tell apart, a marker a structure, vector and PNG."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from structops._files import replacing

# Okabe and Ito's colours without yellow, which is too pale on white.
COLORS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "os^Dv<>Phd*X"

STYLE: Any = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "white",
    "font.size": 9,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "lines.markersize": 5,
    "savefig.dpi": 160,
    "svg.fonttype": "none",
    "svg.hashsalt": "structops",
}


@contextmanager
def canvas(
    panels: int = 1, width: float = 4.2, height: float = 3.4, **axes: Any
) -> Iterator[tuple[Any, Sequence[Any]]]:
    """A figure with panels side by side, in the style of all."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    panels = max(1, panels)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(width * panels, height), layout="constrained")
        yield figure, figure.subplots(1, panels, squeeze=False, **axes)[0]


def look(labels: Sequence[str], label: str) -> dict[str, Any]:
    """Colour, marker and line of one of the labels of a figure; no two of 84 are alike."""
    index = labels.index(label)
    return {
        "color": COLORS[index % len(COLORS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": "--" if index >= len(COLORS) else "-",
    }


def log_ticks(panel: Any) -> None:
    """Powers of ten and three times them on the cost, all digits on the error, none of them on top of each other."""
    from matplotlib.ticker import LogFormatterSciNotation, LogLocator, NullFormatter

    panel.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    panel.xaxis.set_major_formatter(LogFormatterSciNotation())
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter("{x:g}")


def write(figure: Any, path: Path) -> None:
    """Write ``path`` with .svg and with .png; the bytes depend on nothing but the figure."""
    import matplotlib as mpl

    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        for kind in ("svg", "png"):
            with replacing(path.with_suffix(f".{kind}")) as file:
                figure.savefig(file, format=kind, metadata={"Date": None} if kind == "svg" else None)
