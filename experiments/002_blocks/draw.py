"""cost.svg and cost.png: what every block costs against the side of its map, from real counts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from nasattn.architecture import Architecture, Backbone
from nasattn.cost import measure
from nasattn.cost.blocks import block_rows

HERE = Path(__file__).parent
CHANNELS, SIDES = 96, (7, 14, 28, 56, 112)
TITLE = f"Cost against resolution: one block on a map of {CHANNELS} channels, default options"

# Okabe and Ito's colours, which people with any common colour vision tell apart; a family has one
# colour, and each of its blocks a marker.
INK, GREY, PALE = "#333333", "#777777", "#E6E6E6"
FAMILIES: dict[str, tuple[str, Any, Sequence[str]]] = {
    "all pairs of positions": ("#D55E00", "-", ("dmsanet", "danet", "non_local", "self_attention")),
    "some pairs": ("#AA4499", "-", ("isanet", "ccnet")),
    "few keys, maps or bases": ("#0072B2", "-", ("emanet", "annnet", "a2net", "lightnl")),
    "one context": ("#009E73", "-", ("gcnet",)),
    "gates: the competitors": (GREY, (0, (4, 2)), ("cbam", "coordatt", "se", "eca", "simam")),
}
MARKERS = "osD^v"
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "text.color": INK,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "svg.hashsalt": "nasattn",  # else the ids in an SVG are random
}


def counts() -> dict[str, dict[str, list[int]]]:
    """Metric -> block -> one number a side."""
    of_side = [{r["block"]: r for r in block_rows((CHANNELS, side, side))} for side in SIDES]
    return {
        metric: {name: [rows[name][metric] for rows in of_side] for name in of_side[0]}
        for metric in ("macs", "map_elements")
    }


def backbone_macs() -> int | float:
    plain = Architecture(
        backbone=Backbone.of({"name": "mobilenet_v2"}), classes=1000, input=(3, 224, 224)
    )
    return measure(plain).values["macs"]


def spread(heights: Sequence[float], least: float) -> list[float]:
    """The heights moved apart, in their order, as little as keeps `least` between neighbours."""
    order = np.argsort(heights, kind="stable")
    # Isotonic regression of what is left after the spacing itself, by pooling neighbours.
    blocks: list[list[float]] = []
    for place, index in enumerate(order):
        blocks.append([heights[index] - place * least, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            mean, size = blocks.pop()
            blocks[-1] = [
                (blocks[-1][0] * blocks[-1][1] + mean * size) / (blocks[-1][1] + size),
                blocks[-1][1] + size,
            ]
    level = [mean for mean, size in blocks for _ in range(int(size))]
    moved = [0.0] * len(order)
    for place, index in enumerate(order):
        moved[index] = level[place] + place * least
    return moved


def panel(axes: Axes, curves: dict[str, list[int]], title: str) -> None:
    """All curves of one metric, each with its name at its right end; one that is 0 is left out."""
    ends: list[tuple[str, str, float]] = []
    for colour, line, names in FAMILIES.values():
        for name, marker in zip(names, MARKERS, strict=False):
            if min(curves[name]) > 0:
                axes.plot(
                    *(SIDES, curves[name]),
                    color=colour,
                    linestyle=line,
                    linewidth=1.3,
                    marker=marker,
                    markersize=3.6,
                    markeredgecolor="white",
                    markeredgewidth=0.5,
                )
                ends.append((name, colour, np.log10(curves[name][-1])))
    axes.set(xscale="log", yscale="log", xlim=(6.4, 118))
    axes.set_title(title, loc="left")
    axes.set_xlabel("side of the map (pixels)")
    axes.xaxis.set_major_locator(FixedLocator(SIDES))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(FixedLocator([10.0**n for n in range(1, 13)]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(unit))
    axes.set_ylim(low, high * 1.5)
    axes.grid(color=PALE, linewidth=0.6)
    axes.set_axisbelow(True)
    decade = np.log10(high / low)
    for (name, colour, end), place in zip(
        ends, spread([end for *_, end in ends], 0.037 * decade), strict=True
    ):
        axes.annotate(
            name,
            xy=(SIDES[-1] * 1.03, 10**end),
            xytext=(SIDES[-1] * 1.22, 10**place),
            color=colour,
            va="center",
            fontsize=8.5,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "relpos": (0, 0.5)},
        )


def unit(value: float, _: object = None) -> str:
    for scale, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:g}{prefix}"
    return f"{value:g}"


def draw() -> Figure:
    found = counts()
    figure = Figure(figsize=(11.2, 6.2))
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    figure.subplots_adjust(left=0.055, right=0.885, top=0.85, bottom=0.085, wspace=0.42)
    panel(left, found["macs"], "multiply-adds of one sample")
    panel(right, found["map_elements"], "attention weights of one sample")
    whole = backbone_macs()
    left.axhline(whole, color=INK, linestyle=":", linewidth=1)
    note = {"textcoords": "offset points", "fontsize": 8}
    left.annotate(f"the whole of MobileNetV2: {whole / 1e6:.0f}M", (7, whole), (0, 4), **note)
    left.annotate("simam has no multiply-adds", (7, 576), (0, -3), color=GREY, **note)
    figure.text(0.055, 0.955, TITLE, fontsize=11)
    families = [
        Line2D([], [], color=colour, linestyle=line, label=family)
        for family, (colour, line, _) in FAMILIES.items()
    ]
    figure.legend(
        handles=families,
        loc="upper left",
        bbox_to_anchor=(0.055, 0.945),
        borderaxespad=0,
        ncols=len(families),
        frameon=False,
        handlelength=2.4,
        borderpad=0,
    )
    return figure


def main() -> None:
    with matplotlib.rc_context(STYLE):
        figure = draw()
        figure.savefig(HERE / "cost.png", dpi=160)
        figure.savefig(HERE / "cost.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
