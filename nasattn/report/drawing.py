"""What the pictures have in common: colours, a figure with a caption, axes in units, files."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

from nasattn.errors import UserError
from nasattn.files import whole

# Okabe and Ito's colours, which people with any common colour vision tell apart; shapes differ too.
BLUE, VERMILION, GREEN = "#0072B2", "#D55E00", "#009E73"
INK, GREY, PALE = "#333333", "#8C8C8C", "#EDEDED"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "text.color": INK,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "svg.hashsalt": "nasattn",  # else the ids in an SVG are random
}
LABELS = {"macs": "MACs (multiply-adds of one image)", "params": "parameters"}
UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ"))


def empty_figure(width: float, height: float, title: str, lines: Sequence[str]) -> Figure:
    """An empty figure with a title above and a caption below, which the layout makes room for."""
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08)
    figure = Figure(figsize=(width, height + 0.16 * len(lines)), layout=layout)
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.015, ha="left", fontsize=12, fontweight="bold")
    caption = figure.supxlabel("\n".join(lines), x=0.015, ha="left", fontsize=8, linespacing=1.35)
    caption.set_parse_math(False)  # the reason of a failure may have dollars
    return figure


def scale_axis(axes: Axes, metric: str, high: float, plain: float) -> None:
    """Ticks in one unit below, as multiples of the plain backbone above."""
    scale, prefix = _unit(high)
    axes.set_xlabel(LABELS.get(metric, metric))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v / scale:g}{prefix}"))
    axes.margins(y=0.12)
    axes.grid(color=PALE, lw=0.8)
    axes.set_axisbelow(True)
    ratio = (lambda v: np.divide(v, plain), lambda v: np.multiply(v, plain))
    top = axes.secondary_xaxis("top", functions=ratio)
    top.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}x"))
    top.set_xlabel("of the plain backbone", fontsize=8)


def short(value: float) -> str:
    """Four digits and a unit prefix: `913.7k`."""
    scale, prefix = _unit(value)
    return f"{value / scale:.4g}{prefix}"


def wrapped(paragraphs: Sequence[str], width: float) -> list[str]:
    """Lines that fit a figure of that many inches."""
    return [
        line
        for paragraph in paragraphs
        for line in textwrap.wrap(paragraph, int(16.5 * width), subsequent_indent="   ")
    ]


def legend_above(axes: Axes) -> None:
    """Above the upper axis, where nothing is drawn."""
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1.16),
        borderaxespad=0,
        ncols=3,
        handletextpad=0.3,
        columnspacing=1.5,
        frameon=False,
    )


def save(figure: Figure, path: Path) -> Path:
    """Write a picture whole or not at all, without the time of day."""
    metadata: Mapping[str, str | None] = {"Date": None} if path.suffix == ".svg" else {}
    try:
        with whole(path) as draft:
            figure.savefig(draft, format=path.suffix[1:], dpi=200, metadata=dict(metadata))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
    return path


def _unit(value: float) -> tuple[float, str]:
    return next((u for u in UNITS if abs(value) >= u[0]), (1.0, ""))
