"""The honest end: what is trained anew, what the figures say, and that the test split is kept.

The search runs by a formula. The final's trainings are real where the training is the matter, else
their loop is replaced and everything around it is real.
"""

import itertools
import json
import math
import os
import random
import signal
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import FakeStudy
from rich.console import Console
from safetensors.torch import load_file
from sqlalchemy.exc import OperationalError
from test_workers import forked
from typer.testing import CliRunner

from nasattn import load_study
from nasattn.architecture import Architecture, Placement
from nasattn.cli import app
from nasattn.config import Experiment
from nasattn.cost import measure
from nasattn.data import Data, load
from nasattn.errors import DeviceLost, Stopped, TrialFailed, UserError
from nasattn.evaluate import candidate, train
from nasattn.model import build, load_backbone
from nasattn.pareto import knee, non_dominated
from nasattn.record import Cost, Score
from nasattn.report import write_report
from nasattn.search import final_text, outage
from nasattn.search.choice import Choice
from nasattn.search.display import Display
from nasattn.search.final import (
    Evaluation,
    contenders,
    control_of,
    evaluations,
    means,
    summarise,
)
from nasattn.search.loop import Search
from nasattn.search.retrain import Retraining
from nasattn.search.study import FACTS, Study
from nasattn.seed import derive
from nasattn.uncertainty import Estimate, membership

Write = Callable[..., Path]

SPACE = {
    "backbone": {
        "name": "mobilenet_v2",
        "width": 0.25,
        "stem_stride": 4,
        "head": 16,
        "divisor": 4,
        "dropout": 0.1,
        "rows": [[1, 32, 1, 1], [2, 32, 2, 2], [2, 64, 1, 1]],
    },
    "input": [1, 32, 64],
    "classes": 10,
    "sites": ["stage*.*"],
    "blocks": {
        "lightnl": {"ratio": [0.25, 0.5]},
        "gcnet": {"ratio": [0.5]},
        "se": {"ratio": [0.0625, 0.25]},
    },
    "max_blocks": 2,
}


# The statistics, against what was worked out by hand or by another way.


@pytest.mark.parametrize(
    ("values", "half"),
    [  # t tables: t(1) = 12.7062, t(2) = 4.3027, t(4) = 2.7764
        ((0.90, 0.94), 12.7062 * 0.0282843 / math.sqrt(2)),
        ((0.90, 0.92, 0.94), 4.3027 * 0.02 / math.sqrt(3)),
        ((0.1, 0.2, 0.3, 0.4, 0.5), 2.7764 * 0.158114 / math.sqrt(5)),
    ],
)
def test_an_interval_is_that_of_the_t_table(values: tuple[float, ...], half: float) -> None:
    found = Estimate.of(values)
    assert found.low is not None and found.high is not None
    assert (found.mean, found.n) == (pytest.approx(fmean(values)), len(values))
    assert found.mean - found.low == pytest.approx(half, rel=1e-4)
    assert found.high - found.mean == pytest.approx(half, rel=1e-4)


def test_no_accuracy_is_shown_that_cannot_be() -> None:
    wide = {"mean": 0.6111, "low": -0.3771, "high": 1.5994, "n": 2}
    assert final_text.interval(wide, 2) == "0.6111 [0.0000, 1.0000]"
    assert final_text.interval(wide, 3, "+") == "+0.6111 [-0.3771, +1.5994] (n=2)", (
        "of a difference"
    )
    none = {"mean": -1e-9, "low": -2e-5, "high": 2e-5, "n": 2}
    assert final_text.interval(none, 2, "+") == "+0.0000 [+0.0000, +0.0000]", "no -0.0000"
    one = {"mean": 0.9, "low": None, "high": None, "n": 1}
    assert final_text.interval(one, 1) == "0.9000" and final_text.clipped(one) == (0.9, 0.9)


def test_one_seed_has_no_interval() -> None:
    assert Estimate.of([0.9]).as_dict() == {"mean": 0.9, "low": None, "high": None, "n": 1}


def test_two_points_differ_by_a_t_with_a_closed_form() -> None:
    """The dearer of two is on the frontier when it is better: P(t < T) at 1 and 2 degrees."""
    for table in ([[0.80, 0.84], [0.83, 0.86]], [[0.80, 0.84, 0.79], [0.83, 0.83, 0.80]]):
        gains = [b - a for a, b in zip(*table, strict=True)]
        t = fmean(gains) / (stdev(gains) / math.sqrt(len(gains)))
        by_hand = {2: 0.5 + math.atan(t) / math.pi, 3: 0.5 + t / (2 * math.sqrt(2 + t * t))}
        cheap, dear = membership([[1], [2]], table, seed=0) or (0, 0)
        assert cheap == 1
        assert dear == pytest.approx(by_hand[len(gains)], abs=0.015)


def test_membership_against_brute_force() -> None:
    rng = random.Random(3)
    costs = [[1, 5], [2, 2], [2, 2], [3, 4], [4, 1]]
    table = [[0.8 + 0.01 * i + rng.gauss(0, 0.02) for _ in range(4)] for i in range(5)]
    found = membership(costs, table, seed=1)
    means, columns = [fmean(row) for row in table], [fmean(c) for c in zip(*table, strict=True)]
    grand = fmean(means)
    errors = sum(
        (table[i][j] - means[i] - columns[j] + grand) ** 2 for i in range(5) for j in range(4)
    )
    hits, draws = [0] * 5, 4000
    for _ in range(draws):
        chi = sum(rng.gauss(0, 1) ** 2 for _ in range((5 - 1) * (4 - 1)))
        drawn = [m + math.sqrt(errors / chi / 4) * rng.gauss(0, 1) for m in means]
        for i in range(5):
            hits[i] += not any(
                costs[j][0] <= costs[i][0]
                and costs[j][1] <= costs[i][1]
                and drawn[j] >= drawn[i]
                and (costs[j] != costs[i] or drawn[j] > drawn[i])
                for j in range(5)
                if j != i
            )
    assert found is not None
    assert 0.1 < sorted(found)[1] < 0.9, "the case decides something"
    assert found == pytest.approx([h / draws for h in hits], abs=0.03)


def test_membership_without_noise_is_the_frontier() -> None:
    costs, means = [[1], [2], [2], [3]], [0.5, 0.75, 0.75, 0.75]  # exact, so are their means
    found = membership(costs, [[m, m, m] for m in means], seed=0)
    mask = non_dominated([[c[0], -m] for c, m in zip(costs, means, strict=True)])
    assert found == mask.astype(float).tolist()


def test_membership_ignores_what_a_seed_adds_to_all_and_repeats_itself() -> None:
    table = np.random.default_rng(0).normal(0.8, 0.02, (4, 3))
    costs = [[1], [2], [3], [4]]
    once = membership(costs, table, seed=5)
    assert once == membership(costs, table, seed=5)
    shifted = membership(costs, table + np.array([0.0, 0.3, -0.2]), seed=5)
    assert shifted == pytest.approx(once, abs=1e-3)
    assert membership(costs, table[:, :1], seed=5) is None, "one seed: the noise is unknown"
    assert membership([[1]], [[0.8]], seed=5) == [1.0]


# What is evaluated, and what the stored evaluations say.


def placed(architecture: Architecture, **specs: str) -> Architecture:
    """stage2_0="se" -> SE at stage2.0."""
    placements = (Placement.parse(site.replace("_", "."), spec) for site, spec in specs.items())
    return Architecture(
        backbone=architecture.backbone,
        classes=architecture.classes,
        input=architecture.input,
        placements=tuple(placements),
    )


def test_the_control_is_se_at_the_same_sites(fake_study: FakeStudy) -> None:
    plain = fake_study(1, failures=0).trials[0].architecture
    mixed = placed(plain, stage2_0="lightnl(ratio=0.25)", stage3_0="se(ratio=0.25)")
    default = placed(plain, stage2_0="se", stage3_0="se")
    assert control_of(mixed) == default
    assert control_of(default) is None
    assert control_of(plain) is None


@pytest.fixture
def study(fake_study: FakeStudy) -> Study:
    return fake_study(24, final={"seeds": 3, "test": True})


priced = cache(measure)


def evaluate(study: Study, architecture: Architecture, seed: int, **figures: Any) -> None:
    cost = priced(architecture)
    made = Evaluation(seed=seed, architecture=architecture, cost=cost, **figures)
    study.optuna.set_user_attr(made.name, made.as_dict())


def test_contenders_follow_from_the_trials(study: Study) -> None:
    front = study.frontier()
    found = contenders(study.trials, front)
    keys = [c.architecture.key for c in found]
    assert len(set(keys)) == len(keys)
    controls = {c.key for t in front if (c := control_of(t.architecture))}
    assert set(keys) == {t.architecture.key for t in front} | controls | {
        study.trials[0].architecture.key
    }
    assert len(front) > 2 and controls
    by_key = {c.architecture.key: c for c in found}
    for trial in front:
        control = control_of(trial.architecture)
        contender = by_key[trial.architecture.key]
        assert contender.trial == trial and "frontier" in contender.roles
        assert contender.control == (control.key if control else None)
        if control:
            assert "control" in by_key[control.key].roles
            assert keys.index(control.key) != 0


def fill(study: Study, skip: frozenset[int] = frozenset()) -> dict[tuple[str, int], Evaluation]:
    """Store invented figures for all that is asked for but the how manyeth in `skip`."""
    rng, count = random.Random(7), 0
    for seed in range(3):
        for contender in contenders(study.trials, study.frontier()):
            val, test = 0.7 + 0.2 * rng.random(), 0.7 + 0.2 * rng.random()
            if count not in skip:
                evaluate(study, contender.architecture, seed, val=val, test=test)
            count += 1
    return evaluations(study.optuna.user_attrs)


def test_figures_by_hand(study: Study) -> None:
    stored = fill(study)
    final = study.final()
    assert final is not None
    assert final["done"] == final["evaluations"] == len(stored)
    base = study.trials[0].architecture.key
    rows = {row["key"]: row for row in final["rows"]}
    gaps: dict[str, list[list[float]]] = {"val": [], "test": []}
    for key, row in rows.items():
        for split in ("val", "test"):
            values, plain, control = (
                np.array([getattr(stored[k, s], split) for s in range(3)])
                for k in (key, base, row["control"] or key)
            )
            figures = row[split]
            assert figures["values"] == values.tolist()
            assert {k: figures[k] for k in ("mean", "low", "high", "n")} == pytest.approx(
                by_table(values)
            )
            if key == base:
                assert figures["gain"] is None
            else:
                assert figures["gain"] == pytest.approx(by_table(values - plain))
            if row["control"]:
                assert figures["over_control"] == pytest.approx(by_table(values - control))
            else:
                assert figures["over_control"] is None
            if row["search"] is None:
                assert figures["gap"] is None and row["number"] is None
            else:
                assert figures["gap"] == pytest.approx(by_table(row["search"] - values))
            if "frontier" in row["roles"] and key != base:
                gaps[split].append([row["search"] - v for v in values])
            assert (figures["membership"] is None) == (row["roles"] == ["control"])
    for split, members in gaps.items():
        assert len(members) == final["gap"][split]["members"] > 1
        by_seed = np.array(members).mean(axis=0)
        assert final["gap"][split]["frontier"] == pytest.approx(by_table(by_seed))
        assert final["gap"][split]["baseline"] == rows[base][split]["gap"]
    judged = [r for r in final["rows"] if r["roles"] != ["control"]]
    expected = membership(
        [[r["cost"]["macs"]] for r in judged],
        [r["test"]["values"] for r in judged],
        seed=derive(study.config.search.seed, "final"),
    )
    assert [r["test"]["membership"] for r in judged] == expected
    assert json.loads(json.dumps(final)) == final, "plain data"


def test_what_is_chosen_by_name_goes_by_the_finals_means_on_val(study: Study) -> None:
    trials, front = study.trials, study.frontier()
    assert front[0].baseline and len(front) > 4
    assert Choice(study).named("best") == front[-1], "no final yet"
    planned = contenders(trials, front)
    val = {t.architecture.key: 0.7 for t in front}  # nothing beats the plain backbone but three
    beat = {t.number: v for t, v in zip([*front[1:3], front[-2]], (0.72, 0.79, 0.8), strict=True)}
    val |= {t.architecture.key: beat[t.number] for t in front if t.number in beat}
    for seed, (contender, last) in itertools.product(
        range(3), zip(planned, [*planned[1:], None], strict=True)
    ):
        if seed == 2 and last is None:
            assert Choice(study, trials).front == front, "not all of the final is done"
        key = contender.architecture.key
        figure = val.get(key, 0.9) + (seed - 1) * 0.01
        test = 0.9 if key == front[-1].architecture.key else 0.5
        evaluate(study, contender.architecture, seed, val=figure, test=test)
    assert Choice(study, trials).means == pytest.approx(val), "no control's, which nobody chose"
    assert Choice(study, trials).front == [*front[:3], front[-2]]
    assert Choice(study).named("best") == front[-2], "by val: test only judges"
    named = [front[-2], front[2], front[1]]
    points = [[-beat[t.number], t.cost.values["macs"]] for t in named]
    assert Choice(study).named("knee") == named[knee(points)]
    assert study.frontier() == front, "is the search's"
    between = (front[2].cost.values["macs"] + front[-2].cost.values["macs"]) // 2
    assert Choice(study).named(f"macs<={between}") == front[2]
    for seed in range(3):
        evaluate(study, front[-2].architecture, seed, reason="oops")
    assert Choice(study).named("best") == front[2], "what fails by every seed is not chosen"
    limits = {"macs": front[0].cost.values["macs"] - 1}
    stored, planned = evaluations(study.optuna.user_attrs), contenders(trials, front[1:])
    found = means(study.config, limits, planned, stored)
    assert found.keys() == {t.architecture.key for t in [*front[1:-2], front[-1]]}, (
        "what is over it is not"
    )


def by_table(values: Any) -> dict[str, Any]:
    mean, half = fmean(values), 4.30265273 * stdev(values) / math.sqrt(3)
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": 3}


def test_unfinished_is_not_judged_and_a_failure_leaves_what_is_paired(study: Study) -> None:
    fill(study, skip=frozenset({1}))
    final = study.final()
    assert final is not None and final["done"] == final["evaluations"] - 1
    assert all(r["test"]["membership"] is None for r in final["rows"])
    missing = final["rows"][1]
    assert missing["test"]["n"] == 2 and missing["test"]["values"][0] is None
    assert "(n=2)" in final_text.table(final)[2][1]
    evaluate(study, contenders(study.trials, study.frontier())[1].architecture, 0, reason="oops")
    again = study.final()
    assert again is not None and again["done"] == again["evaluations"] and again["failed"] == 1
    row, base = again["rows"][1], again["rows"][0]
    assert row["failures"] == [{"seed": 0, "reason": "oops"}]
    pairs = zip(row["test"]["values"][1:], base["test"]["values"][1:], strict=True)
    assert row["test"]["gain"]["mean"] == pytest.approx(fmean(a - b for a, b in pairs))
    assert row["test"]["membership"] is not None, "from the two seeds that all have"
    assert any("oops" in line for line in final_text.notes(again))


def test_one_that_fails_again_and_again_takes_nothing_from_the_others(study: Study) -> None:
    """Neither their memberships nor the selection bias, and it is told of how many these are."""
    fill(study)
    whole = study.final()
    assert whole is not None
    points = [r["key"] for r in whole["rows"] if r["test"]["membership"] is not None]
    assert whole["judged"]["test"] == {"rivals": points, "points": points, "seeds": 3}
    members = [t for t in study.frontier() if not t.baseline]
    for seed in (0, 1):
        evaluate(study, members[0].architecture, seed, reason="oops")
    final = study.final()
    assert final is not None and final["done"] == final["evaluations"]
    judged = [r for r in final["rows"] if r["test"] and r["test"]["membership"] is not None]
    assert members[0].architecture.key not in {r["key"] for r in judged}
    assert [r["test"]["membership"] for r in judged] == membership(
        [[r["cost"]["macs"]] for r in judged],
        [r["test"]["values"] for r in judged],
        seed=derive(study.config.search.seed, "final"),
    )
    key, number = members[0].architecture.key, members[0].number
    others = [k for k in points if k != key]
    assert final["judged"]["test"] == {"rivals": points, "points": others, "seeds": 3}
    assert final["gap"]["test"]["members"] == len(members) - 1
    assert final["gap"]["test"]["frontier"]["n"] == final["gap"]["test"]["bias"]["n"] == 3
    text = "\n".join(final_text.notes(final))
    assert f"by 3 seeds, which all that is compared has; left out, as it failed: {number}\n" in text
    evaluate(study, members[1].architecture, 2, reason="oops")
    final = study.final()
    assert final is not None
    assert final["judged"]["test"] == {"rivals": points, "points": others, "seeds": 2}


def test_the_baseline_is_the_last_to_be_left_out(study: Study) -> None:
    """One seed of it failed, and another of a member: without it, the others would look better."""
    fill(study)
    plain, *_, last = study.frontier()
    assert plain.baseline
    evaluate(study, plain.architecture, 0, reason="oops")
    evaluate(study, last.architecture, 1, reason="oops")
    final = study.final()
    assert final is not None
    judged = final["judged"]["test"]
    assert judged["seeds"] == 2 and plain.architecture.key in judged["points"]
    assert set(judged["rivals"]) - set(judged["points"]) == {last.architecture.key}


def test_a_seed_that_nothing_survived_leaves_the_others(study: Study) -> None:
    """Its backbone could not be trained: to leave out what failed would leave nothing."""
    fill(study)
    for lost in (1, 2):
        for contender in contenders(study.trials, study.frontier()):
            evaluate(study, contender.architecture, lost, reason="no backbone")
        final = study.final()
        assert final is not None
        gap = final["gap"]["test"]
        assert gap["frontier"]["n"] == gap["bias"]["n"] == 3 - lost
        assert gap["members"] == len(study.frontier()) - 1
        told = [r["test"]["membership"] is None for r in final["rows"] if _rival(r)]
        assert set(told) == {lost == 2}, "one seed does not tell its noise"
    assert any("selection bias" in line for line in final_text.notes(final))


def _rival(row: dict[str, Any]) -> bool:
    return bool({"baseline", "frontier"} & set(row["roles"]))


def test_a_backbone_that_nothing_beat_is_judged_without_test(fake_study: FakeStudy) -> None:
    study = fake_study(1, failures=0, final={"seeds": 2, "test": False})
    for seed in range(2):
        evaluate(study, study.trials[0].architecture, seed, val=0.5)
    final = study.final()
    assert final is not None and final["done"] == final["evaluations"] == 2
    assert final["rows"][0]["val"]["membership"] == 1.0 and final["rows"][0]["test"] is None


def test_a_backbone_over_the_budget_is_no_rival(study: Study) -> None:
    stored = fill(study)
    trials, front = study.trials, study.frontier()
    assert trials[0] in front
    limits = {"macs": trials[0].cost.values["macs"] - 1}
    final = summarise(study.config, limits, trials, front[1:], stored)
    assert final is not None
    base, *others = final["rows"]
    assert base["roles"] == ["baseline"] and base["test"]["membership"] is None
    members = [r for r in others if "frontier" in r["roles"]]
    assert [r["test"]["membership"] for r in members] == membership(
        [[r["cost"]["macs"]] for r in members],
        [r["test"]["values"] for r in members],
        seed=derive(study.config.search.seed, "final"),
    )


def test_what_another_schedule_does_is_no_selection_bias(
    study: Study, fake_study: FakeStudy
) -> None:
    """Without a warm start the final trains by `pretrain`: the difference is in the backbone's
    fall as well, and it is said."""
    note = "the search trained by `training` and the final by `pretrain`"
    fill(study)
    alone = {"warm_start": False, "seeds": 3}
    other = fake_study(24, final={"seeds": 3}, training=alone, pretrain={"epochs": 9})
    fill(other)
    for made, same in ((study, True), (other, False)):
        final = made.final()
        assert final is not None and final["same_schedule"] is same
        assert any(note in line for line in final_text.notes(final)) is not same
        gap, base = final["gap"]["test"], made.trials[0].score
        members = [r for r in final["rows"] if "frontier" in r["roles"] and r["number"]]
        assert base is not None
        plain = final["rows"][0]["test"]["values"]
        fell = [
            fmean(r["search"] - r["test"]["values"][s] for r in members) - base.accuracy + plain[s]
            for s in range(3)
        ]
        assert gap["bias"] == pytest.approx(by_table(fell))


def test_a_controls_cost_is_known_from_the_seed_that_did_not_fail(study: Study) -> None:
    wanted = contenders(study.trials, study.frontier())
    control = next(c.architecture for c in wanted if c.trial is None)
    failed = Evaluation(seed=0, architecture=control, cost=Cost(values={}), reason="oops")
    study.optuna.set_user_attr(failed.name, failed.as_dict())

    def cost() -> Any:
        final = study.final()
        assert final is not None
        return next(row["cost"] for row in final["rows"] if row["key"] == control.key)

    assert cost() == {}
    evaluate(study, control, 1, val=0.5, test=0.5)
    assert cost() == priced(control).values


def test_what_left_the_frontier_is_still_shown(study: Study) -> None:
    fill(study)
    outsider = next(t for t in study.trials if t.score and t not in study.frontier())
    evaluate(study, outsider.architecture, 0, val=0.5, test=0.4)
    final = study.final()
    assert final is not None
    row = final["rows"][-1]
    assert (row["number"], row["roles"]) == (outsider.number, ["former"])
    assert row["test"]["mean"] == 0.4 and row["test"]["membership"] is None


def test_a_former_member_has_its_control_still(study: Study) -> None:
    fill(study)
    keys = {c.architecture.key for c in contenders(study.trials, study.frontier())}
    outsider, control = next(
        (t, c)
        for t in study.trials
        if t.score and t.architecture.key not in keys
        if (c := control_of(t.architecture)) and c.key not in keys
    )
    evaluate(study, outsider.architecture, 0, val=0.5, test=0.4)
    evaluate(study, control, 0, val=0.5, test=0.3)
    final = study.final()
    assert final is not None
    member, beside = final["rows"][-2:]
    assert (member["key"], beside["key"]) == (outsider.architecture.key, control.key)
    assert (member["roles"], beside["roles"]) == (["former"], ["control"])
    assert member["test"]["over_control"]["mean"] == pytest.approx(0.1)
    names = [line[0] for line in final_text.table(final)][-2:]
    assert names == [f"{outsider.number} (left the frontier)", "(SE)"]


def test_a_database_that_is_away_while_an_evaluation_is_told_is_waited_for(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At whichever of the reads, of the study's attributes and of its trials."""
    Trainings(monkeypatch)
    monkeypatch.setattr(outage, "pause", lambda seconds: None)
    study, left = run(write()), 0
    search = Search(study.config, Display(Console(quiet=True)))
    kind = type(search.study.optuna)
    attributes, trials = kind.user_attrs.fget, kind.get_trials  # type: ignore[attr-defined]

    def failing(real: Any) -> Any:
        def read(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                raise OperationalError("", None, Exception("away"))
            return real(*arguments, **options)

        return read

    with search._leases() as leases:
        search.display.begin(search.study, 4)
        evaluation = next(iter(evaluations(study.optuna.user_attrs).values()))
        monkeypatch.setattr(kind, "user_attrs", property(failing(attributes)))
        monkeypatch.setattr(kind, "get_trials", failing(trials))
        for read in range(1, 12):
            left = read
            final = Retraining(
                search.study, search.data, search.display, leases, search._machine, search._remark
            )
        for read in range(1, 12):
            left = read
            final._store(evaluation)


def test_without_test_only_val_is_asked_for(fake_study: FakeStudy) -> None:
    study = fake_study(8, final={"seeds": 1, "test": False})
    for contender in contenders(study.trials, study.frontier()):
        evaluate(study, contender.architecture, 0, val=0.8)
    final = study.final()
    assert final is not None and final["done"] == final["evaluations"]
    assert all(r["test"] is None and r["val"]["low"] is None for r in final["rows"])
    assert final_text.table(final)[0][1:3] == ["val", "gain"]
    assert any("anecdote" in line for line in final_text.notes(final))


def test_a_study_without_final_has_none(fake_study: FakeStudy) -> None:
    study = fake_study(4)
    assert study.final() is None and study.summary()["final"] is None
    assert all(row["final"] is None for row in study.frontier_rows())


@pytest.mark.parametrize("final", [{"seeds": 0}, {"seed": 3}, {"test": "yes"}, 3])
def test_config_refuses(fake_study: FakeStudy, final: Any) -> None:
    with pytest.raises(UserError, match="final"):
        fake_study(1, failures=0, final=final)


def test_a_picture_before_any_point_has_a_place(fake_study: FakeStudy, tmp_path: Path) -> None:
    """A control, of which latency and memory are not known, may be done first."""
    study = fake_study(24, final={"seeds": 2}, failures=0)
    control = next(c for c in contenders(study.trials, study.frontier()) if not c.trial)
    made = Evaluation(
        seed=0,
        architecture=control.architecture,
        cost=Cost(values={"params": 1}),
        val=0.8,
        test=0.8,
    )
    study.optuna.set_user_attr(made.name, made.as_dict())
    assert any("final" in p.name for p in write_report(study, tmp_path / "first"))


def test_the_picture_shows_the_rows(study: Study, tmp_path: Path) -> None:
    from matplotlib.container import ErrorbarContainer

    from nasattn.report.final import final_figure

    assert not any("final" in p.name for p in write_report(study, tmp_path / "before"))
    evaluate(study, study.trials[0].architecture, 0, reason="out of memory")
    assert not any("final" in p.name for p in write_report(study, tmp_path / "before"))
    fill(study)
    final = study.final()
    assert final is not None
    figure = final_figure(study, final)
    axes = figure.axes[0]
    shown = {c.get_label(): c for c in axes.containers if isinstance(c, ErrorbarContainer)}
    groups = {
        "frontier, test": ("test", lambda r: r["roles"][0] == "frontier"),
        "frontier, val": ("val", lambda r: r["roles"][0] == "frontier"),
        "plain backbone, test": ("test", lambda r: r["roles"][0] == "baseline"),
        "plain backbone, val": ("val", lambda r: r["roles"][0] == "baseline"),
        "SE at the same sites, test": ("test", lambda r: r["roles"] == ["control"]),
    }
    assert shown.keys() == groups.keys()
    for label, (split, mine) in groups.items():
        rows = [r for r in final["rows"] if mine(r)]
        heights = shown[label].lines[0].get_ydata()
        assert heights == pytest.approx([100 * r[split]["mean"] for r in rows])
        bars = [segment[:, 1] for segment in shown[label].lines[2][0].get_segments()]
        limits = [100 * r[split][end] for r in rows for end in ("low", "high")]
        assert np.concatenate(bars) == pytest.approx(np.clip(limits, 0, 100))
    assert "selection bias" in figure.get_supxlabel()
    names = [p.name for p in write_report(study, tmp_path / "after")]
    assert names[-2:] == ["final.png", "final.svg"]


# The run.


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes an experiment file; keyword arguments replace its keys."""

    def written(folder: str = "one", **changes: Any) -> Path:
        home = tmp_path / folder
        home.mkdir(exist_ok=True)
        fields = {
            "study": "tiny",
            "storage": "sqlite:///runs/tiny.db",
            "space": SPACE,
            "data": {"name": "cued_digits", "train": 96, "val": 64, "test": 64},
            "training": {"epochs": 1, "batch_size": 32, "lr": 0.01, "warm_start": True},
            "pretrain": {"epochs": 2},
            "budget": {"macs": "1.3x"},
            "search": {"sampler": "random", "trials": 4, "seed": 1},
            "final": {"seeds": 2},
        } | changes
        path = home / "experiment.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in fields.items() if v is not None}))
        return path

    return written


class Formula:
    """Stands for the search's training: an accuracy that follows from the architecture alone."""

    name = "train"
    stored = True

    def __call__(self, architecture: Architecture, tick: Any, **_: Any) -> tuple[Score, Any]:
        worth = random.Random(architecture.key).random()
        accuracy = 0.2 + 0.3 * worth * len(architecture.placements)
        score = Score(
            accuracy=accuracy, curve=(accuracy,), epochs=1, seconds=0.5, seed=0, evaluator="train"
        )
        return score, {"w": torch.zeros(1)}

    def prepare(self, tick: Any) -> bool:
        return False

    def estimate(self, trainings: int, *, prepare: bool) -> float:
        return 0.0


def searching(path: Path) -> Search:
    search = Search(Experiment.load(path), Display(Console(quiet=True)))
    search.evaluator = Formula()  # type: ignore[assignment]
    return search


def run(path: Path, trials: int = 4) -> Study:
    return searching(path).run(trials)


def figures(study: Study) -> dict[tuple[str, int], tuple[float | None, float | None, str]]:
    stored = evaluations(study.optuna.user_attrs)
    return {name: (e.val, e.test, e.reason) for name, e in stored.items()}


class Trainings:
    """Replaces the training loop and the test: figures that follow from the seed; counts them, and
    does at the how manyeth what `events` says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **events: BaseException) -> None:
        self.fits: list[Any] = []
        self.tests = 0
        self.events = {int(name[1:]): error for name, error in events.items()}
        monkeypatch.setattr(candidate, "fit", self.fit)
        monkeypatch.setattr(candidate, "test", self.test)

    def fit(self, network: Any, data: Any, schedule: Any, *, seed: int, **rest: Any) -> Score:
        self.fits.append((schedule.epochs, seed))
        if error := self.events.get(len(self.fits)):
            raise error
        value = random.Random(seed).random()
        return Score(
            accuracy=value,
            curve=(value,) * schedule.epochs,
            epochs=schedule.epochs,
            seconds=1.0,
            seed=seed,
            evaluator="train",
        )

    def test(self, network: Any, data: Any, **rest: Any) -> float:
        self.tests += 1
        return float(sum(p.detach().double().abs().sum() for p in network.parameters()) % 1)


def test_all_that_is_asked_for_is_evaluated_once(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = Trainings(monkeypatch)
    path = write()
    study = run(path)
    final = study.final()
    assert final is not None and final["done"] == final["evaluations"] == trained.tests
    assert len(trained.fits) == final["evaluations"] + 2, "and a backbone a seed"
    assert Counter(epochs for epochs, _ in trained.fits) == {1: final["evaluations"], 2: 2}
    assert len({seed for _, seed in trained.fits}) == len(trained.fits), "no seed twice"
    assert json.loads((study.folder / "final.json").read_text()) == final
    (study.folder / "final.json").unlink()  # as if it had died just before
    run(path)
    assert len(trained.fits) == final["evaluations"] + 2, "nothing is left to do"
    assert json.loads((study.folder / "final.json").read_text()) == final


def test_kills_change_nothing(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run dies in its second training, until there is none left to die in."""
    whole_trained = Trainings(monkeypatch)
    whole = run(write("whole"))
    path, fits, kills = write("torn"), 0, 0
    while True:
        trained = Trainings(monkeypatch, _2=KeyboardInterrupt())
        try:
            torn = run(path)
            break
        except KeyboardInterrupt:
            kills += 1
            fits += len(trained.fits) - 1
    assert kills >= len(whole_trained.fits) - 1 > 6
    assert fits + len(trained.fits) == len(whole_trained.fits), "nothing was trained twice"
    assert figures(torn) == figures(whole)


def test_who_dies_at_the_same_training_three_times_gives_it_up(write: Write) -> None:
    """Of one seed the backbone kills, of the other the first of the evaluations."""
    path = write()
    run(write(final=None))
    write()

    def work() -> None:
        patch = pytest.MonkeyPatch()
        trained = Trainings(patch)

        def deadly(network: Any, data: Any, schedule: Any, **rest: Any) -> Score:
            again = stored(path)
            seeds = {e.seed for e in again}
            if (schedule.epochs == 2 and 0 in seeds) or (schedule.epochs == 1 and not again):
                os.kill(os.getpid(), signal.SIGKILL)
            return trained.fit(network, data, schedule, **rest)

        patch.setattr(candidate, "fit", deadly)
        run(path)

    codes = []
    while not codes or codes[-1] == -signal.SIGKILL:
        child = forked(work)
        child.join()
        codes.append(child.exitcode)
    assert codes == [-signal.SIGKILL] * 6 + [0]
    failed = [e for e in stored(path) if e.reason]
    first = [e for e in failed if e.seed == 0]
    assert [e.reason.rpartition("killed ")[2] for e in first] == [
        "3 times while it was evaluated"
    ], first
    whole = [e for e in stored(path) if e.seed == 1]
    assert all("plain backbone" in e.reason for e in whole)
    assert len(failed) == 1 + len(whole)


def test_a_broken_machine_does_not_use_up_the_evaluations(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write()
    errors = {f"_{n}": RuntimeError("CUDA error: an illegal memory access") for n in range(2, 7)}
    Trainings(monkeypatch, **errors)
    with pytest.raises(Stopped, match="5 trainings in a row broke here"):
        run(path)
    assert len(stored(path)) == 4, "the fifth is left open"


def test_a_gpu_that_is_lost_again_and_again_does_not_use_them_up_either(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time a new process goes on, and knows of those before it."""
    path = write()
    monkeypatch.setenv(outage.Machine.BROKEN, "0")  # taken back at the end
    error = torch.AcceleratorError("CUDA error: an illegal memory access")
    Trainings(monkeypatch, **{f"_{n}": error for n in range(2, 7)})
    for count in range(1, 5):
        with pytest.raises(DeviceLost, match=r"final, seed 0: .* failed and left"):
            run(path)
        assert os.environ[outage.Machine.BROKEN] == str(count)
        assert len(stored(path)) == count
    with pytest.raises(Stopped, match="5 trainings in a row broke here"):
        run(path)
    assert len(stored(path)) == 4, "the fifth is left open"


def test_a_gpu_that_is_lost_by_a_backbone_of_the_final_is_told(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write()
    monkeypatch.setenv(outage.Machine.BROKEN, "0")  # taken back at the end
    Trainings(monkeypatch)
    run(write(final=None))

    def lost(*_: Any, **__: Any) -> Any:
        raise torch.AcceleratorError("CUDA error: an illegal memory access")

    monkeypatch.setattr(candidate.Evaluator, "prepare", lost)
    with pytest.raises(DeviceLost, match="final, seed 0: the plain backbone failed and left"):
        run(write())
    assert stored(path) == []


def stored(path: Path) -> list[Evaluation]:
    study = load_study(f"sqlite:///{path.parent}/runs/tiny.db", "tiny")
    return list(evaluations(study.optuna.user_attrs).values())


def test_two_workers_share_the_work(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write()
    run(write(final=None))
    trained = Trainings(monkeypatch)
    write()
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(run, (path, path))
    final = one.final()
    assert final is not None and final == other.final()
    assert final["done"] == final["evaluations"] == trained.tests, "each once"
    assert len(trained.fits) == final["evaluations"] + 2, "and a backbone a seed"


def test_an_extended_search_keeps_what_was_evaluated(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = Trainings(monkeypatch)
    path = write()
    first = figures(run(path, 4))
    before = len(trained.fits)
    study = run(path, 16)
    later = figures(study)
    assert first.items() < later.items()
    assert len(trained.fits) - before == len(later) - len(first), "the backbones were kept"
    final = study.final()
    assert final is not None and final["done"] == final["evaluations"]
    front = {t.architecture.key for t in study.frontier()}
    assert front == {r["key"] for r in final["rows"] if "frontier" in r["roles"]}
    assert {key for key, _ in later} == {r["key"] for r in final["rows"]}


def test_a_failure_is_recorded_and_the_rest_goes_on(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = {"_2": TrialFailed("out of memory"), "_4": ZeroDivisionError("oops")}
    trained = Trainings(monkeypatch, **events)
    path = write()
    study = run(path)
    final = study.final()
    assert final is not None and final["failed"] == 2 and final["done"] == final["evaluations"]
    of = f"2 of {final['evaluations']} evaluations of the final failed (--retry makes them again)"
    assert study.completion().endswith(f" trials; {of}")
    reasons = {f["reason"] for r in final["rows"] for f in r["failures"]}
    assert reasons == {"out of memory", "ZeroDivisionError: oops"}
    count = len(trained.fits)
    run(path)
    assert len(trained.fits) == count, "a failure is an answer"
    search = searching(path)
    search.retry()
    assert figures(search.run(4)) == figures(run(write("whole"))), "as if nothing had failed"


def test_what_nobody_asks_for_any_more_keeps_its_failure(
    fake_study: FakeStudy, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A member that has left the frontier, and a `final` that is not asked for."""
    study = fake_study(8, final={"seeds": 1, "test": True})
    member = study.frontier()[-1]
    former = next(t for t in study.trials if t not in study.frontier() and not t.baseline)
    for trial in (member, former):
        evaluate(study, trial.architecture, 0, reason="oops")
    evaluate(study, member.architecture, 1, reason="of a seed that there was once")
    opened = set[str]()
    study.reopen(opened)
    assert len(opened) == 1
    assert {
        (e.architecture.key, e.seed) for e in evaluations(study.optuna.user_attrs).values()
    } == {
        (former.architecture.key, 0),
        (member.architecture.key, 1),
    }


def test_who_is_at_the_final_takes_up_what_is_opened_again(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, again, calls = Trainings(monkeypatch), list[str](), itertools.count()

    class Failing(Formula):
        def __call__(self, *arguments: Any, **options: Any) -> Any:
            if next(calls) == 2:
                raise TrialFailed("out of memory")
            return super().__call__(*arguments, **options)

    real = Retraining.run

    def retraining(self: Retraining) -> None:
        real(self)
        if not again:
            again.append("by another process")
            searching(path).retry()

    path = write()
    search = searching(path)
    search.evaluator = Failing()  # type: ignore[assignment]
    monkeypatch.setattr(Retraining, "run", retraining)
    study = search.run(4)
    assert again and {t.state for t in study.trials} == {"scored"}
    final = study.final()
    assert final is not None and final["done"] == final["evaluations"] == trained.tests


def test_a_backbone_that_fails_costs_its_seed_alone(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    Trainings(monkeypatch, _1=TrialFailed("the loss is nan at step 3"))
    final = run(write()).final()
    assert final is not None
    for row in final["rows"]:
        (failure,) = row["failures"]
        assert failure["seed"] == 0 and "plain backbone" in failure["reason"]
        assert row["test"]["n"] == 1


def test_final_may_be_asked_for_and_changed_later(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = Trainings(monkeypatch)
    study = run(write(final=None))
    assert trained.fits == [] and study.final() is None
    study = run(write(final={"seeds": 1, "test": False}))
    assert trained.tests == 0 and study.config.final is not None
    assert load_study(study.storage, "tiny").config.final == study.config.final
    one, once = len(trained.fits), figures(study)
    more = run(write(final={"seeds": 2, "test": False}))
    assert len(trained.fits) == 2 * one
    assert once.items() < figures(more).items()
    tested = run(write(final={"seeds": 2, "test": True}))
    assert trained.tests == len(figures(tested)), "with a test, all have to be trained again"
    with pytest.raises(UserError, match=r"training\.lr"):
        run(write(training={"epochs": 1, "batch_size": 32, "lr": 0.02, "warm_start": True}))
    facts = tested.optuna.user_attrs[FACTS]["experiment"]
    assert facts["final"] == {"seeds": 2, "test": True} and facts["search"]["trials"] == 4
    for seeds in (1, 2):  # nothing has to be trained
        final = run(write(final={"seeds": seeds, "test": True})).final()
        assert final and final["seeds"] == seeds
        assert json.loads((study.folder / "final.json").read_text()) == final
    run(write(final=None))
    assert not (study.folder / "final.json").exists()


def test_without_a_warm_start_all_are_trained_by_the_full_schedule(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = Trainings(monkeypatch)
    training = {"epochs": 1, "batch_size": 32, "lr": 0.01, "seeds": 3}
    final = run(write(training=training, pretrain={"epochs": 5})).final()
    assert final is not None
    assert [epochs for epochs, _ in trained.fits] == [5] * final["evaluations"]


def test_an_evaluation_survives_json(study: Study) -> None:
    fill(study)
    loaded = evaluations(study.optuna.user_attrs)
    some = next(iter(loaded.values()))
    assert Evaluation.from_dict(json.loads(json.dumps(some.as_dict()))) == some
    assert isinstance(some.cost, Cost)


def test_real_trainings_touch_the_test_split_once_each(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also: a figure is what the same training gives by hand, from that seed's own backbone."""
    loader, asked = Data.loader, []

    def spied(data: Data, split: Any, *rest: Any, **options: Any) -> Any:
        asked.append(split)
        return loader(data, split, *rest, **options)

    monkeypatch.setattr(Data, "loader", spied)
    space = SPACE | {"blocks": {"gcnet": {"ratio": [0.5]}}, "max_blocks": 1}
    path = write(space=space, search={"sampler": "random", "trials": 2, "seed": 1}, final=None)
    search = Search(Experiment.load(path), Display(Console(quiet=True)))
    search.run(2)
    assert set(asked) == {"train", "val"}, "the search has no use of it"
    asked.clear()
    path = write(space=space, search={"sampler": "random", "trials": 2, "seed": 1})
    study = Search(Experiment.load(path), Display(Console(quiet=True))).run(2)
    final = study.final()
    assert final is not None and final["failed"] == 0
    kept = [remark.split(": ")[:2] for remark in study.remarks() if remark.startswith("final")]
    assert kept == [[f"final, seed {seed}", "the plain backbone is trained"] for seed in range(2)]
    assert asked.count("test") == final["evaluations"] == 2 * len(final["rows"])
    backbones = [load_file(p) for p in sorted(study.folder.glob("final/*/backbone.safetensors"))]
    assert len(backbones) == 2
    assert any(not torch.equal(a, backbones[1][k]) for k, a in backbones[0].items())

    row, seed = final["rows"][-1], 1
    config, architecture = study.config, study.trials[1].architecture
    if row["key"] != architecture.key:
        architecture = study.trials[0].architecture
        row = final["rows"][0]
    data = load(config.data, architecture.input, architecture.classes)
    own = derive(derive(config.search.seed, "final", seed), architecture.key, 0)
    torch.manual_seed(own)
    network = build(architecture)
    load_backbone(network, backbones[seed])
    score = train.fit(network, data, config.training, seed=own, where=config.trainer)
    assert row["val"]["values"][seed] == score.accuracy
    by_hand = train.test(network, data, batch_size=32, where=config.trainer)
    assert row["test"]["values"][seed] == by_hand


def test_the_commands_show_it(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    Trainings(monkeypatch)
    monkeypatch.setattr("nasattn.search.loop.Evaluator", lambda *_: Formula())
    path = str(write())
    invoke = CliRunner().invoke
    searched = invoke(app, ["search", path])
    assert searched.exit_code == 0, searched.output
    for part in ("evaluations to go, about", "left]", "final of tiny: 2 seeds", "selection bias"):
        assert part in searched.output
    status = json.loads(invoke(app, ["status", path, "--json"]).output)
    study = load_study(f"sqlite:///{Path(path).parent}/runs/tiny.db", "tiny")
    assert status["final"] == study.final()
    done = status["final"]["done"]
    assert f"{done} of {done} evaluations" in invoke(app, ["status", path]).output
    front = json.loads(invoke(app, ["pareto", path, "--json"]).output)
    for row, trial in zip(front, study.frontier(), strict=True):
        assert trial.as_dict().items() <= row.items()
        again = row["final"]
        assert again["key"] == trial.architecture.key and again["test"]["n"] == 2
        control = control_of(trial.architecture)
        assert (again["se"] or {"key": None})["key"] == (control.key if control else None)
    assert "final of tiny" in invoke(app, ["pareto", path]).output
    assert "knee: by the final's means on val" in invoke(app, ["pareto", path]).output
    pictures = invoke(app, ["report", path]).output
    assert "final.png" in pictures
