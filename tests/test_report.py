"""The pictures show what the records say: every number drawn is computed a second way."""

import copy
import random
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from statistics import stdev

import numpy as np
import pytest
from conftest import FakeStudy
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from PIL import Image
from typer.testing import CliRunner

from nasattn.architecture import NONE
from nasattn.cli import app
from nasattn.errors import UserError
from nasattn.report import (
    choices,
    frontier_figure,
    gains,
    short,
    sites_figure,
    staircase,
    write_report,
)
from nasattn.report.drawing import empty_figure, save
from nasattn.search.choice import Choice
from nasattn.search.study import SCORE, Study, accuracy
from nasattn.space import SearchSpace

FILES = ["frontier.png", "frontier.svg", "sites.png", "sites.svg"]


@pytest.fixture(scope="module")
def study(fake_study: FakeStudy) -> Study:
    return fake_study(24, seeds=3, failures=2)


@pytest.fixture(scope="module")
def two_costs(fake_study: FakeStudy) -> Study:
    return fake_study(
        20,
        seeds=1,
        failures=0,
        objectives=["accuracy", "macs", "params"],
        budget={"macs": "1.25x", "params": "60k"},
    )


def drawn(axes: Axes) -> dict[str, ErrorbarContainer]:
    """The points of a panel by the first word of their label."""
    found = [c for c in axes.containers if isinstance(c, ErrorbarContainer)]
    return {str(c.get_label()).split()[0]: c for c in found}


def points(container: ErrorbarContainer) -> set[tuple[float, float]]:
    return {(x, round(y, 6)) for x, y in container.lines[0].get_xydata().tolist()}


def test_a_panel_has_a_point_for_each_scored_trial_and_the_frontier_is_optunas(
    study: Study,
) -> None:
    panel = frontier_figure(study, study.trials).axes[0]
    by_optuna = {(r.values[1], round(100 * r.values[0], 6)) for r in study.optuna.best_trials}
    rows = [r for r in study.optuna.get_trials() if r.values]
    every = {(r.values[1], round(100 * r.values[0], 6)) for r in rows}
    groups = {name: points(container) for name, container in drawn(panel).items()}
    assert groups["plain"] == {(rows[0].values[1], round(100 * rows[0].values[0], 6))}
    assert groups["frontier"] | groups["plain"] == by_optuna
    assert groups["dominated"] == every - by_optuna
    assert len(rows) == 22


def test_error_bars_are_one_standard_deviation_of_the_seeds(study: Study) -> None:
    panel = frontier_figure(study, study.trials).axes[0]
    expected = {}
    for row in study.optuna.get_trials():
        if row.values:
            seeds = [repeat["accuracy"] for repeat in row.user_attrs[SCORE]["repeats"]]
            assert len(seeds) == 3
            expected[round(100 * row.values[0], 6)] = 200 * stdev(seeds)
    heights = {}
    for container in drawn(panel).values():
        for _, (low, high) in ((None, s[:, 1]) for s in container.lines[2][0].get_segments()):
            heights[round((low + high) / 2, 6)] = high - low
    assert heights == pytest.approx(expected)


def test_one_seed_has_no_error_bar_and_says_so(two_costs: Study) -> None:
    figure = frontier_figure(two_costs, two_costs.trials)
    assert not any(c.has_yerr for c in drawn(figure.axes[0]).values())
    assert "one seed a point" in figure.get_supxlabel()


def test_several_costs_have_a_panel_each(two_costs: Study) -> None:
    panels = frontier_figure(two_costs, two_costs.trials).axes
    assert [p.get_xlabel() for p in panels] == ["MACs (multiply-adds of one image)", "parameters"]
    for index, panel in enumerate(panels, start=1):
        groups = drawn(panel)
        by_optuna = {(r.values[index], r.values[0]) for r in two_costs.optuna.best_trials}
        shown = points(groups["frontier"]) | points(groups["plain"])
        assert shown == {(cost, round(100 * value, 6)) for cost, value in by_optuna}


def test_the_budget_is_a_line_or_an_arrow_when_far(two_costs: Study) -> None:
    macs, params = frontier_figure(two_costs, two_costs.trials).axes
    limits = two_costs.facts["limits"]
    lines = [float(line.get_xdata()[0]) for line in macs.lines if line.get_linestyle() == "--"]
    assert lines == [limits["macs"]]
    assert macs.get_xlim()[1] > limits["macs"]
    assert params.get_xlim()[1] < limits["params"]
    assert any(text.get_text() == "budget 60k (4.31x) →" for text in params.texts)


def test_the_line_is_of_what_fits_the_budget(study: Study) -> None:
    """The plain backbone may be over it, where the space varies that."""
    tight = copy.copy(study)
    costs = sorted(t.cost.values["macs"] for t in study.trials if t.score)
    limit = costs[len(costs) // 2]
    tight.facts = {**study.facts, "limits": {"macs": limit}}
    panel = frontier_figure(tight, study.trials).axes[0]
    (line,) = (line for line in panel.lines if line.get_drawstyle() == "steps-post")
    fitting = [t for t in study.trials if t.score and t.cost.values["macs"] <= limit]
    assert max(line.get_ydata()) == max(100 * accuracy(t) for t in fitting)
    assert max(line.get_xdata()) == limit < costs[-1]
    assert list(line.get_xdata()) == sorted(line.get_xdata())


def test_caption_says_what_the_picture_cannot(study: Study) -> None:
    figure = frontier_figure(study, study.trials)
    caption = " ".join(figure.get_supxlabel().split())
    knee, best = Choice(study).named("knee"), Choice(study).named("best")
    for name, trial in (("knee", knee), ("best", best)):
        assert f"{name}: trial {trial.number}, " in caption
        for site, spec in trial.architecture.specs.items():
            assert f"{spec} @ {site}" in caption
    for part in ("n = 22 scored trials", "mean of 3 seeds", "one trained backbone", "2 failed"):
        assert part in caption
    assert {"knee", "best"} <= {text.get_text() for text in figure.axes[0].texts}


def test_dollars_in_a_caption_are_no_formula(tmp_path: Path) -> None:
    figure = empty_figure(7, 3, "title", ["photos/$_$/1.jpg could be read before"])
    assert save(figure, tmp_path / "caption.svg").stat().st_size


def test_staircase_is_the_best_accuracy_within_a_cost() -> None:
    rng = random.Random(0)
    for _ in range(50):
        cloud = [(rng.randint(1, 9), rng.randint(1, 9) / 10) for _ in range(rng.randint(1, 12))]
        corners = staircase(cloud)
        assert set(corners) <= set(cloud)
        for cost in range(1, 10):
            best = max((value for c, value in cloud if c <= cost), default=None)
            shown = [value for c, value in corners if c <= cost]
            assert (shown[-1] if shown else None) == best


def test_gains_by_hand_from_the_rows(study: Study) -> None:
    rows = [r for r in study.optuna.get_trials() if r.values]
    plain = rows[0].values[0]
    expected = {}
    for site in rows[0].params:
        for spec in {r.params[site] for r in rows} - {NONE}:
            values = [100 * (r.values[0] - plain) for r in rows if r.params[site] == spec]
            expected[site, spec] = (np.mean(values), len(values))
    found = gains(study.trials)
    assert found.keys() == expected.keys()
    for cell, (gain, n) in found.items():
        assert (gain, n) == (pytest.approx(expected[cell][0]), expected[cell][1])


def test_choices_are_the_spaces(study: Study) -> None:
    space = SearchSpace.of(study.config.space)
    allowed = {site: specs[1:] for site, specs in space.choices.items()}
    assert choices(study) == allowed
    assert list(choices(study)) == [site.name for site in space.sites]


def test_heat_map_shows_the_gains_and_leaves_the_untried_empty(study: Study) -> None:
    figure = sites_figure(study, study.trials)
    axes = figure.axes[0]
    (mesh,) = axes.collections
    sites = [label.get_text() for label in axes.get_xticklabels()]
    specs = [label.get_text() for label in axes.get_yticklabels()]
    found, matrix = gains(study.trials), mesh.get_array().reshape(len(specs), len(sites))
    texts = {
        (t.get_position()[0] - 0.5, t.get_position()[1] - 0.5): t.get_text() for t in axes.texts
    }
    tried = 0
    for row, spec in enumerate(specs):
        for column, site in enumerate(sites):
            gain, n = found.get((site, spec), (None, 0))
            tried += n > 0
            assert bool(matrix.mask[row, column]) == (n == 0)
            if gain is None:
                assert texts[column, row] == ""
            else:
                assert matrix[row, column] == pytest.approx(gain)
                assert texts[column, row].replace("\u2212", "-") == f"{gain:+.1f}\nn={n}"
    assert 0 < tried < len(specs) * len(sites) == 24
    low, high = mesh.get_clim()
    assert high == -low == max(abs(gain) for gain, _ in found.values())
    caption = " ".join(figure.get_supxlabel().split())
    assert "not an effect of the block alone" in caption and "2 failed" in caption


def test_files_are_pictures_and_the_same_each_time(study: Study, tmp_path: Path) -> None:
    written = write_report(study, tmp_path / "new" / "report")
    assert [path.name for path in written] == FILES
    assert sorted(p.name for p in (tmp_path / "new" / "report").iterdir()) == FILES
    for path in written:
        if path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
                assert image.width >= 1200
                assert len(image.getcolors(maxcolors=1 << 24) or ()) > 20
        else:
            root = ElementTree.parse(path).getroot()
            assert root.tag.endswith("svg")
            assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) > 40
    again = write_report(study, tmp_path / "again")
    for first, second in zip(written, again, strict=True):
        assert first.read_bytes() == second.read_bytes()


def test_a_study_of_the_baseline_alone_is_drawn(fake_study: FakeStudy, tmp_path: Path) -> None:
    assert len(write_report(fake_study(1, failures=0), tmp_path)) == 4


def test_nothing_to_draw_and_nowhere_to_draw_it(
    study: Study, fake_study: FakeStudy, tmp_path: Path
) -> None:
    for empty in (fake_study(0), fake_study(1, failures=1)):
        with pytest.raises(UserError, match="no scored trial yet"):
            write_report(empty, tmp_path / "none")
    assert not (tmp_path / "none").exists()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made"):
        write_report(study, tmp_path / "file")
    (tmp_path / "report" / "frontier.png").mkdir(parents=True)
    with pytest.raises(UserError, match="cannot be written"):
        write_report(study, tmp_path / "report")


@pytest.mark.parametrize(
    ("value", "text"),
    [(913_664, "913.7k"), (300_774_272, "300.8M"), (0.0025, "2.5m"), (0, "0"), (7, "7")],
)
def test_short(value: float, text: str) -> None:
    assert short(value) == text


def test_the_command_prints_the_files(study: Study, tmp_path: Path) -> None:
    arguments = ["--storage", study.storage, "--study", study.name, "--out", str(tmp_path)]
    result = CliRunner().invoke(app, ["report", *arguments])
    assert result.exit_code == 0
    assert result.stdout.split() == [str(tmp_path / name) for name in FILES]


def test_drawing_needs_no_torch() -> None:
    code = "import sys, nasattn.report; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
