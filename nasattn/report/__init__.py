"""Pictures of a study, drawn from its records: the frontier, and which block did well where."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from nasattn.architecture import NONE
from nasattn.errors import UserError
from nasattn.files import make_folder
from nasattn.pareto import non_dominated
from nasattn.record import Trial, counted
from nasattn.report.drawing import (
    BLUE,
    GREY,
    INK,
    STYLE,
    VERMILION,
    empty_figure,
    legend_above,
    save,
    scale_axis,
    short,
    wrapped,
)
from nasattn.report.final import final_figure
from nasattn.search.choice import Choice
from nasattn.search.study import Study, accuracy
from nasattn.skeleton import in_words


def write_report(study: Study, folder: Path) -> list[Path]:
    """Write frontier, sites and, where there is one, final, each as PNG and SVG; the files, equal
    for equal records.

    A UserError when the study has no scored baseline yet or the folder cannot be written.
    """
    trials = study.trials
    if not any(t.baseline and t.score for t in trials):
        raise UserError(f"the study '{study.name}' has no scored trial yet: nothing to draw")
    make_folder(folder)
    with matplotlib.rc_context(STYLE):
        figures = {
            "frontier": frontier_figure(study, trials),
            "sites": sites_figure(study, trials),
        }
        final = study.final(trials)
        if final and final["done"] > final["failed"]:
            figures["final"] = final_figure(study, final)
        return [
            save(figure, folder / f"{name}.{kind}")
            for name, figure in figures.items()
            for kind in ("png", "svg")
        ]


def staircase(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The corners of "the best accuracy at no more than this cost", cheapest first.

    points: (cost, accuracy) of every scored trial within the budget.
    """
    mask = non_dominated([(cost, -height) for cost, height in points])
    return sorted({p for p, keep in zip(points, mask, strict=True) if keep})


def gains(trials: Iterable[Trial]) -> dict[tuple[str, str], tuple[float, int]]:
    """(site, block spec) -> mean gain over the baseline in accuracy points, of how many trials."""
    scored = [t for t in trials if t.score]
    plain = next(accuracy(t) for t in scored if t.baseline)
    found: dict[tuple[str, str], list[float]] = {}
    for trial in scored:
        for cell in trial.architecture.specs.items():
            found.setdefault(cell, []).append(100 * (accuracy(trial) - plain))
    return {cell: (fmean(values), len(values)) for cell, values in found.items()}


def choices(study: Study) -> dict[str, tuple[str, ...]]:
    """Site -> the block specs that can be proposed there."""
    offered = study.facts["choices"].items()
    return {site: tuple(spec for spec in specs if spec != NONE) for site, specs in offered}


def frontier_figure(study: Study, trials: Sequence[Trial]) -> Figure:
    """Accuracy against each cost objective, one panel a cost."""
    costs = study.config.costs
    width = 7.2 if len(costs) == 1 else 5.4 * len(costs)
    choice = Choice(study, trials)
    lines = wrapped(_frontier_caption(choice), width)
    figure = empty_figure(width, 4.4, f"{study.name}: accuracy against cost", lines)
    panels = figure.subplots(1, len(costs), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, costs, strict=True):
        _draw_panel(axes, choice, metric)
    panels[0].set_ylabel("validation accuracy (%)")
    legend_above(panels[0])
    return figure


def sites_figure(study: Study, trials: Sequence[Trial]) -> Figure:
    """A heat map: block specs down, sites across, the mean gain over the baseline in each cell."""
    offered, found = choices(study), gains(trials)
    fullest_first = sorted(offered.values(), key=len, reverse=True)  # keeps the space's own order
    specs = list(dict.fromkeys(spec for allowed in fullest_first for spec in allowed))
    matrix = np.full((len(specs), len(offered)), np.nan)
    for (site, spec), (gain, _) in found.items():
        matrix[specs.index(spec), list(offered).index(site)] = gain
    cell = min(0.46, 100 / len(specs))  # a picture has a largest height
    width = max(7.2, 3.6 + 0.72 * len(offered))
    lines = wrapped(_sites_caption(study, trials), width)
    title = f"{study.name}: which block did well at which site"
    figure = empty_figure(width, 1.3 + cell * len(specs), title, lines)
    axes = figure.subplots()
    limit = max((abs(gain) for gain, _ in found.values()), default=0.0) or 1.0
    mesh = axes.pcolormesh(
        np.ma.masked_invalid(matrix),
        cmap="RdBu",
        norm=Normalize(-limit, limit),
        edgecolors="white",
        linewidth=1.5,
    )
    axes.patch.set(hatch="////", edgecolor="#DCDCDC", linewidth=0)  # seen where a cell is masked
    for column, (site, allowed) in enumerate(offered.items()):
        for row, spec in enumerate(specs):
            gain, n = found.get((site, spec), (0.0, 0))
            text = f"{gain:+.1f}\nn={n}".replace("-", "\u2212") if n else ""
            ink = "white" if abs(gain) > 0.62 * limit else INK
            if spec not in allowed:
                text, ink = "x", GREY
            place = (column + 0.5, row + 0.5)
            axes.text(*place, text, ha="center", va="center", color=ink, fontsize=min(8, 17 * cell))
    _frame_cells(axes, specs, list(offered))
    bar = figure.colorbar(mesh, ax=axes, aspect=30, pad=0.02, label="mean gain (accuracy points)")
    bar.outline.set_visible(False)
    return figure


def _draw_panel(axes: Axes, choice: Choice, metric: str) -> None:
    study, scored = choice.study, [t for t in choice.trials if t.score]
    front = study.frontier(scored)
    baseline = next(t for t in scored if t.baseline)
    dominated = [t for t in scored if t not in front and t is not baseline]
    chosen = [t for t in front if t is not baseline]
    plain, limit = study.facts["plain"][metric], study.facts["limits"].get(metric)
    values = [t.cost.values[metric] for t in scored]
    near = limit is not None and limit <= max(values) + 1.5 * (max(values) - min(values) or limit)
    low, high = min(values), max([*values, *([limit] if near else [])])
    pad = 0.07 * (high - low or high)
    axes.set_xlim(low - 1.5 * pad, high + pad)

    axes.axhline(100 * accuracy(baseline), color=VERMILION, lw=0.8, alpha=0.5, zorder=1)
    within = [t for t in scored if t.cost.within(study.facts["limits"])]
    if within:
        steps = staircase([(t.cost.values[metric], 100 * accuracy(t)) for t in within])
        steps.append((limit if near and limit else high + pad, steps[-1][1]))
        axes.step(*zip(*steps, strict=True), where="post", color=BLUE, lw=1.4, alpha=0.8, zorder=2)
    _points(axes, dominated, metric, "dominated", GREY, marker="o", ms=5, mfc="white", zorder=3)
    _points(axes, chosen, metric, "frontier", BLUE, marker="o", ms=7, zorder=4)
    _points(
        axes,
        [baseline],
        metric,
        "plain backbone",
        VERMILION,
        marker="D",
        ms=7,
        zorder=5,
    )
    for text, trial in _named(choice):
        _annotate(axes, text, trial, metric, pad)
    if limit is not None:
        _draw_budget(axes, limit, plain, near)
    scale_axis(axes, metric, high, plain)


def _points(
    axes: Axes, trials: Sequence[Trial], metric: str, label: str, color: str, **style: Any
) -> None:
    if not trials:
        return
    spreads = [t.score.spread for t in trials if t.score]
    axes.errorbar(
        [t.cost.values[metric] for t in trials],
        [100 * accuracy(t) for t in trials],
        yerr=None if None in spreads else [100 * s for s in spreads if s is not None],
        label=f"{label} ({len(trials)})" if label != "plain backbone" else label,
        color=color,
        ls="none",
        elinewidth=1,
        capsize=2,
        **style,
    )


def _annotate(axes: Axes, text: str, trial: Trial, metric: str, pad: float) -> None:
    """A name where no trial can be: above the best one's line, up and left of another."""
    x, y = trial.cost.values[metric], 100 * accuracy(trial)
    left, right = axes.get_xlim()
    shift, align = (-5.0, 5.0), "right"
    if "best" in text and x < right - 2 * pad:
        shift, align = (5.0, 5.0), "left"
    elif x < left + 2.5 * pad:
        y += 100 * ((trial.score and trial.score.spread) or 0.0)
        shift, align = (0.0, 7.0), "center"
    axes.annotate(
        text,
        (x, y),
        xytext=shift,
        textcoords="offset points",
        ha=align,
        va="bottom",
        color=BLUE,
        fontweight="bold",
    )


def _draw_budget(axes: Axes, limit: float, plain: float, near: bool) -> None:
    """A line, or, where it would squeeze the points into a corner, an arrow towards it."""
    text = f"budget {short(limit)} ({limit / plain:.3g}x)"
    place: dict[str, Any] = {
        "xycoords": axes.get_xaxis_transform(),
        "textcoords": "offset points",
        "va": "bottom",
    }
    if near:
        axes.axvline(limit, color=INK, lw=1, ls=(0, (4, 3)), zorder=1)
        place |= {"xytext": (4, 4), "ha": "left", "rotation": 90}
        axes.annotate(text, (limit, 0.0), **place, fontsize=8)
    else:
        place |= {"xytext": (-4, 4), "ha": "right"}
        axes.annotate(f"{text} →", (axes.get_xlim()[1], 0.0), **place, fontsize=8)


def _frame_cells(axes: Axes, specs: Sequence[str], sites: Sequence[str]) -> None:
    axes.set_yticks(np.arange(len(specs)) + 0.5, specs)
    turned = max(len(site) for site in sites) > 9
    turn: dict[str, Any] = (
        {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if turned else {}
    )
    axes.set_xticks(np.arange(len(sites)) + 0.5, sites, **turn)
    axes.set_xlabel("site, in forward order")
    axes.invert_yaxis()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _named(choice: Choice) -> list[tuple[str, Trial]]:
    """What `nasattn export` chooses by name."""
    if not choice.front:
        return []
    knee, best = choice.knee, choice.front[-1]
    return [("knee, best", knee)] if knee == best else [("knee", knee), ("best", best)]


def _frontier_caption(choice: Choice) -> list[str]:
    study, trials = choice.study, choice.trials
    scored = [t for t in trials if t.score]
    lines = []
    for name, trial in _named(choice):
        mean = choice.means.get(trial.architecture.key)
        of_final = "" if mean is None else f" (the final's mean on val {100 * mean:.2f} %)"
        costs = ", ".join(
            f"{short(value)} {metric} ({value / study.facts['plain'][metric]:.3f}x)"
            for metric, value in trial.cost.values.items()
        )
        blocks = in_words(study.config.space, trial.architecture).replace(" @ ", "\u00a0@\u00a0")
        lines.append(
            f"{name}: trial {trial.number}, {100 * accuracy(trial):.2f} %{of_final}, {costs}: "
            f"{blocks}"
        )
    seeds = sorted({len(t.score.accuracies) for t in scored if t.score})
    if seeds == [1]:
        of = "one seed a point: an anecdote, not yet a finding"
    else:
        shared = "fine-tunes of one trained backbone, " if study.config.training.warm_start else ""
        repeats = "/".join(map(str, seeds))
        of = f"a point is the mean of {repeats} seeds ({shared}± one standard deviation)"
    evaluators = ", ".join(sorted({t.score.evaluator for t in scored if t.score}))
    below = "A frontier point below the line is cheaper in another cost. "
    lines.append(
        f"n = {counted(len(scored), 'scored trial')} (evaluator: {evaluators}), {of}. "
        f"{_unscored(trials)}{below if len(study.config.costs) > 1 else ''}"
        "The validation split that chose the frontier also scores it, which flatters it a little."
    )
    return lines


def _sites_caption(study: Study, trials: Sequence[Trial]) -> list[str]:
    baseline = next(t for t in trials if t.baseline)
    barred = any(set(a) != set(b) for a in choices(study).values() for b in choices(study).values())
    return [
        "A cell is the mean gain over the plain backbone "
        f"({100 * accuracy(baseline):.2f} %) of the n scored trials with that block at that site: "
        "a mean over whatever stood beside it, not an effect of the block alone. "
        f"Hatched: never scored. {'x: cannot stand there. ' if barred else ''}{_unscored(trials)}"
    ]


def _unscored(trials: Sequence[Trial]) -> str:
    """How many trials have no accuracy, and so no point: `Not drawn: 2 failed trials. `"""
    counts = {state: sum(t.state == state for t in trials) for state in ("failed", "stopped")}
    parts = [counted(count, f"{state} trial") for state, count in counts.items() if count]
    return f"Not drawn: {', '.join(parts)}. " if parts else ""
