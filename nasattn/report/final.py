"""The picture of the final: what the frontier is worth when it is trained anew."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nasattn.report.drawing import (
    BLUE,
    GREEN,
    GREY,
    VERMILION,
    empty_figure,
    legend_above,
    scale_axis,
    wrapped,
)
from nasattn.search.final_text import clipped, judged_on, notes
from nasattn.search.study import Study

Row = Mapping[str, Any]


def final_figure(study: Study, final: Mapping[str, Any]) -> Figure:
    """Means with 95 % intervals against each cost objective, one panel a cost: the frontier on test
    and on validation, the plain backbone, SE at the same sites, and the search's own figures.

    final: what `study.final` returned.
    """
    costs = study.config.costs
    width = 7.2 if len(costs) == 1 else 5.4 * len(costs)
    legend = (
        "Means with 95 % intervals. In brackets: the probability to be non-dominated. "
        "A line leads from a member to SE at its sites."
    )
    lines = wrapped([legend, *notes(final)], width)
    figure = empty_figure(width, 4.6, f"{study.name}: the frontier trained anew", lines)
    panels = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, costs, strict=True):
        _draw_panel(axes, final, metric, study.facts["plain"][metric])
    panels[0].set_ylabel("accuracy (%)")
    if first := next((axes for axes in panels if axes.has_data()), None):
        legend_above(first)
    return figure


def _draw_panel(axes: Axes, final: Mapping[str, Any], metric: str, plain: float) -> None:
    split = judged_on(final)
    rows = [r for r in final["rows"] if r["cost"].get(metric) is not None and r[split]]
    base = [r for r in rows if "baseline" in r["roles"]]
    members = [r for r in rows if "frontier" in r["roles"] and r not in base]
    beside = {r["control"] for r in members}
    controls = [r for r in rows if r["roles"] == ["control"] and r["key"] in beside]
    if not rows:  # a control whose cost is not known may come first
        return
    values = [r["cost"][metric] for r in rows]
    extent = max(values) - min(values) or max(values)
    step = 0.008 * extent  # intervals at one cost stand side by side
    for row in base:
        axes.axhline(100 * row[split]["mean"], color=VERMILION, lw=0.8, alpha=0.5, zorder=1)
    for row in members:
        _join(axes, row, controls, metric, split)
    if split != "val":
        _intervals(axes, members, metric, "val", "frontier, val", BLUE, -step, mfc="white")
        _intervals(axes, base, metric, "val", "plain backbone, val", VERMILION, -step, mfc="white")
    shown = [r for r in members + base if r["search"] is not None]
    axes.plot(
        [r["cost"][metric] for r in shown],
        [100 * r["search"] for r in shown],
        "x",
        color=GREY,
        ms=6,
        label="val in the search",
    )
    _intervals(axes, members, metric, split, f"frontier, {split}", BLUE, step)
    _intervals(axes, base, metric, split, f"plain backbone, {split}", VERMILION, step, marker="D")
    label = f"SE at the same sites, {split}"
    _intervals(axes, controls, metric, split, label, GREEN, 0.0, marker="s")
    for row in members:
        _annotate(axes, row, metric, split, step)
    axes.set_xlim(min(values) - 0.1 * extent, max(values) + 0.1 * extent)
    scale_axis(axes, metric, max(values), plain)


def _intervals(
    axes: Axes,
    rows: Sequence[Row],
    metric: str,
    split: str,
    label: str,
    color: str,
    shift: float,
    **style: Any,
) -> None:
    """Means with their intervals; without bars where there is one seed."""
    rows = [r for r in rows if r[split]]
    if not rows:
        return
    sure = all(r[split]["n"] > 1 for r in rows)
    below, above = (
        [100 * abs(clipped(r[split])[i] - r[split]["mean"]) for r in rows] for i in (0, 1)
    )
    axes.errorbar(
        [r["cost"][metric] + shift for r in rows],
        [100 * r[split]["mean"] for r in rows],
        yerr=[below, above] if sure else None,
        label=label,
        color=color,
        ls="none",
        elinewidth=1,
        capsize=2,
        **{"marker": "o", "ms": 6, **style},
    )


def _join(axes: Axes, row: Row, controls: Sequence[Row], metric: str, split: str) -> None:
    """A line from a member to what stands beside it."""
    for control in controls:
        if control["key"] == row["control"]:
            ends = (row, control)
            axes.plot(
                [r["cost"][metric] for r in ends],
                [100 * r[split]["mean"] for r in ends],
                color=GREEN,
                lw=0.8,
                alpha=0.6,
                zorder=1,
            )


def _annotate(axes: Axes, row: Row, metric: str, split: str, step: float) -> None:
    """The trial's number and how likely it belongs to the frontier."""
    share = row[split]["membership"]
    axes.annotate(
        f"{row['number']}" + ("" if share is None else f" ({share:.0%})"),
        (row["cost"][metric] + step, 100 * row[split]["mean"]),
        xytext=(5, 3),
        textcoords="offset points",
        color=BLUE,
        fontsize=8,
    )
