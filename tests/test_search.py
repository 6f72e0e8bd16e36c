"""The search end to end: what a study proposes, survives and records.

Where proposals and records are the matter, a formula stands for the training (`formula`); real
Lightning trainings run where the training itself is: kills, failures, weights, repeats.
"""

import csv
import gc
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
import yaml
from optuna.distributions import CategoricalDistribution
from optuna.trial import create_trial
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

from nasattn import cli, load_study
from nasattn.architecture import NONE, Architecture
from nasattn.config import Experiment, TrainerFile
from nasattn.data import load
from nasattn.errors import DeviceLost, Stopped, TrialFailed, UserError
from nasattn.evaluate import candidate
from nasattn.evaluate.candidate import facts_of, store
from nasattn.evaluate.checkpoint import State, copies, held
from nasattn.evaluate.train import Tick
from nasattn.model import build
from nasattn.pareto import non_dominated
from nasattn.pricing import Candidates
from nasattn.record import Score
from nasattn.search import frontier_space, loop, opening, outage
from nasattn.search.artifacts import open_store, share
from nasattn.search.choice import Choice
from nasattn.search.database import sqlite_path
from nasattn.search.display import Display
from nasattn.search.launchers import STORAGE
from nasattn.search.loop import Search, weights_of_trial
from nasattn.search.opening import claim_folder, find_study
from nasattn.search.samplers import SAMPLERS, Gate, Snapshot
from nasattn.search.slots import weights_file
from nasattn.search.study import FACTS, Study
from nasattn.skeleton import changes, in_words
from nasattn.space import SearchSpace

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
        "gcnet": {"ratio": [0.25, 0.5]},
        "se": {"ratio": [0.25]},
        "ccnet": {"recurrence": [1, 2]},
    },
    "max_blocks": 3,
}


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
            "data": {"name": "cued_digits", "train": 192, "val": 64, "test": 64},
            "training": {"epochs": 1, "batch_size": 32, "lr": 0.01, "warm_start": True},
            "pretrain": {"epochs": 2},
            "objectives": ["accuracy", "macs"],
            "budget": {"macs": "1.3x"},
            "search": {"sampler": "random", "trials": 6, "seed": 1},
        }
        path = home / "experiment.yaml"
        path.write_text(yaml.safe_dump(fields | changes))
        return path

    return written


def searching(path: Path) -> Search:
    return Search(Experiment.load(path), Display(Console(quiet=True)))


class Formula:
    """Stands for the training: an accuracy that follows from the architecture alone."""

    name = "train"
    stored = True

    def __init__(self, stop_at: frozenset[int] = frozenset()) -> None:
        self.calls, self.stop_at = 0, stop_at

    def __call__(self, architecture: Architecture, tick: Tick, **options: Any) -> tuple[Score, Any]:
        self.calls += 1
        if self.calls in self.stop_at:
            raise KeyboardInterrupt
        accuracy = random.Random(architecture.key).random()
        score = Score(
            accuracy=accuracy, curve=(accuracy,), epochs=1, seconds=0.0, seed=0, evaluator="train"
        )
        return score, {"w": torch.zeros(1)}

    def prepare(self, tick: Tick) -> bool:
        return False

    def estimate(self, trainings: int, *, prepare: bool) -> float:
        return 0.0


def by_formula(path: Path, trials: int, formula: Formula | None = None) -> Study:
    search = searching(path)
    search.evaluator = formula or Formula()  # type: ignore[assignment]
    return search.run(trials)


def rows(study: Study) -> list[tuple[int, str, float | None]]:
    return [
        (t.number, t.architecture.key, t.score.accuracy if t.score else None) for t in study.trials
    ]


QUICK = [name for name in SAMPLERS if name != "gp"]  # Optuna's GP takes half a second a proposal
EVERY = [*QUICK, pytest.param("gp", marks=pytest.mark.slow)]


def search_options(sampler: str) -> dict[str, Any]:
    return {"sampler": sampler, "seed": 3} | ({"population": 8} if sampler == "nsga2" else {})


@pytest.mark.parametrize("sampler", QUICK)
def test_twelve_and_twelve_are_twenty_four(write: Write, sampler: str) -> None:
    options = search_options(sampler)
    whole = by_formula(write("whole", search=options), 24)
    by_formula(write("parts", search=options), 12)
    parts = by_formula(write("parts", search=options), 24)
    assert rows(parts) == rows(whole)
    assert [t.number for t in parts.trials] == list(range(24))


@pytest.mark.parametrize("sampler", QUICK)
def test_interruptions_change_nothing(write: Write, sampler: str) -> None:
    options = search_options(sampler)
    whole = by_formula(write("whole", search=options), 20)
    path = write("torn", search=options)
    for call in (1, 4, 2, 9):
        with pytest.raises(KeyboardInterrupt):
            by_formula(path, 20, Formula(frozenset({call})))
    torn = by_formula(path, 20)
    assert rows(torn) == rows(whole)


@pytest.mark.parametrize("sampler", EVERY)
def test_a_death_within_a_proposal_changes_nothing(
    write: Write, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proposal that was not yet written, or written and not yet evaluated, is made again."""
    options = search_options(sampler)
    whole = by_formula(write("whole", search=options), 20)
    path = write("torn", search=options)
    for place in ("sample_relative", "draw"):
        where: Any = Gate if place == "sample_relative" else SearchSpace
        propose, countdown = getattr(where, place), [5]

        def dying(*arguments: Any, propose: Any = propose, countdown: Any = countdown) -> Any:
            countdown[0] -= 1
            if countdown[0] == 0:
                raise KeyboardInterrupt
            return propose(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(where, place, dying)
            with pytest.raises(KeyboardInterrupt):
                by_formula(path, 20)
    torn = by_formula(path, 20)
    assert len(torn.optuna.trials) == 20, "a row is whole or not at all"
    assert rows(torn) == rows(whole)


@pytest.mark.parametrize("sampler", EVERY)
def test_proposals_are_new_feasible_and_sparse(write: Write, sampler: str) -> None:
    space = SPACE | {"max_blocks": 2}
    study = by_formula(
        write(search=search_options(sampler), space=space, budget={"macs": "1.1x", "params": 3000}),
        30,
    )
    keys = [t.architecture.key for t in study.trials]
    assert len(set(keys)) == len(keys) == 30
    assert study.trials[0].architecture.placements == ()
    plain = study.facts["plain"]
    for trial in study.trials:
        assert len(trial.architecture.placements) <= 2
        assert trial.cost.values["macs"] <= 1.1 * plain["macs"]
        assert trial.cost.values["params"] <= 3000


@pytest.mark.parametrize("sampler", QUICK)
def test_an_exhausted_space_is_complete(write: Write, sampler: str) -> None:
    space = SPACE | {"blocks": {"se": {"ratio": [0.25, 0.5]}}, "max_blocks": 1}
    path = write(space=space, budget={"macs": "1.0005x"}, search=search_options(sampler))
    study = by_formula(path, 500)
    search = searching(path)
    every = {a.key for a in search.space.enumerate() if search.candidates.fits(a.specs)}
    assert len(study.trials) == len(every) == search.candidates.count()
    assert 1 < len(every) < search.space.size(), "the budget refuses some and not all"
    again = Formula()
    assert rows(by_formula(path, 500, again)) == rows(study)
    assert again.calls == 0


@pytest.mark.parametrize("sampler", QUICK)
def test_the_last_architecture_of_a_space_is_found(
    write: Write, monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    """Also in a space that the sampler itself cannot list, and where its draws find nothing new."""
    for limit, value in {"LISTED": 0, "DRAWS": 1, "DRAWN": 1, "WALKED": 1}.items():
        monkeypatch.setattr(frontier_space, limit, value)
    search = searching(write(search=search_options(sampler)))
    options = {name: CategoricalDistribution(v) for name, v in search.space.parameters.items()}
    listed = search.candidates.listed or []
    for last in random.Random(0).sample(range(1, len(listed)), 4):
        trials = []
        for number, row in enumerate(row for i, row in enumerate(listed) if i != last):
            values = [number / len(listed), search.candidates.pricing(row)["macs"]]
            trial = create_trial(params=row, distributions=options, values=values)
            trial.number = trial._trial_id = number
            trials.append(trial)
        search.gate.slot = len(trials)
        snapshot = Snapshot(search.study.optuna, trials, len(trials))
        view = optuna.Study("tiny", snapshot)
        space = search.gate.infer_relative_search_space(view, snapshot.trial)
        assert search.gate.sample_relative(view, snapshot.trial, space) == listed[last]


def test_candidates_draw_all_that_fits_and_nothing_else(write: Write) -> None:
    candidates = searching(write()).candidates
    listed = {tuple(s.values()) for s in candidates.listed or []}
    brute = {tuple(row.values()) for row in candidates.space.chain.rows() if candidates.fits(row)}
    assert listed == brute
    seen = set(random.Random(0).sample(sorted(listed), len(listed) - 3))
    drawn = {tuple((candidates.draw(random.Random(i), seen) or {}).values()) for i in range(60)}
    assert drawn == listed - seen
    assert candidates.draw(random.Random(0), listed) is None


@pytest.mark.parametrize("budget", [{"macs": 1000}, {"macs": "1.00001x"}, {"params": "0.5x"}])
def test_a_budget_that_nothing_fits_is_refused(write: Write, budget: dict[str, Any]) -> None:
    path = write(budget=budget)
    told = r"nothing fits; the .* exceeds \w+ by [\d,.]+ \([\d,.]+ allowed, the plain backbone has"
    with pytest.raises(UserError, match=told):
        searching(path)
    assert not (path.parent / "runs").exists(), "nothing was created"
    for limit, hint in ((1.1, "did you mean 1.1x?"), (1000, ")")):
        with pytest.raises(UserError) as refused:
            searching(write(budget={"macs": limit}))
        assert str(refused.value).endswith(hint)


def test_what_is_no_latency_table_is_told_as_that(write: Write) -> None:
    path = write(latency={"study": "tiny"}, objectives=["accuracy", "latency_s"], budget={})
    with pytest.raises(UserError, match="latency: what stands there is no table of `nasattn prof"):
        searching(path)


def test_a_latency_table_that_nothing_asks_for_may_come_and_go(write: Write) -> None:
    table = {"context": {"date": "2026-11-28"}, "plain": {}, "blocks": {}}
    study = by_formula(write(latency=table), 2)
    assert by_formula(write(), 3).asked == 3
    asked = study.config.model_copy(update={"objectives": ("accuracy", "latency_s")})
    assert "latency: another table: of 2026-11-28 -> nothing" in study.edits(
        asked.model_copy(update={"latency": None}), ()
    )


def test_the_cheapest_excess_is_named_exactly(write: Write) -> None:
    search = searching(write())
    table = search.space.table
    least = min(
        table({site: spec})["macs"]
        for site, specs in search.space.choices.items()
        for spec in specs
        if spec != NONE
    )
    limit = table.plain["macs"] + 1
    with pytest.raises(UserError, match=f"macs by {least - limit:,} "):
        Candidates(search.candidates.pricing, {"macs": limit}).refuse_empty()


def test_an_edited_experiment_is_refused_with_the_difference(write: Write) -> None:
    by_formula(write(), 3)
    training = {"epochs": 1, "batch_size": 32, "lr": 0.02, "warm_start": True}
    with pytest.raises(UserError) as refusal:
        searching(write(training=training))
    assert "training.lr: 0.01 -> 0.02" in str(refusal.value)
    assert "search.trials" not in str(refusal.value)
    more = write(search={"sampler": "random", "trials": 5, "seed": 1})
    assert len(by_formula(more, 5).trials) == 5


def test_the_database_alone_is_enough(write: Write) -> None:
    path = write()
    first = by_formula(path, 3)
    path.unlink()
    config = load_study(first.storage, "tiny").config
    search = Search(config, Display(Console(quiet=True)))
    search.evaluator = Formula()  # type: ignore[assignment]
    resumed = search.run(8)
    assert rows(resumed) == rows(by_formula(write("whole"), 8))


def test_the_frontier_follows_from_the_records(write: Write) -> None:
    path = write(objectives=["accuracy", "macs", "params"])
    study = by_formula(path, 25)
    scored = [t for t in study.trials if t.score]
    points = [
        [-t.score.accuracy, t.cost.values["macs"], t.cost.values["params"]]
        for t in scored
        if t.score
    ]
    expected = {t.number for t, keep in zip(scored, non_dominated(points), strict=True) if keep}
    assert {t.number for t in study.frontier()} == expected
    accuracies = [t.score.accuracy for t in study.frontier() if t.score]
    assert accuracies == sorted(accuracies)
    database = path.parent / "runs"
    for file in (database / "frontier.json", database / "tiny" / "frontier.json"):
        told = [t.as_dict() | {"backbone": {}} for t in study.frontier()]
        assert json.loads(file.read_text()) == told
    assert len((database / "frontier.csv").read_text().splitlines()) == len(expected) + 1


def test_selection(write: Write) -> None:
    study = by_formula(write(), 25)
    front = study.frontier()
    assert Choice(study).named("best") == front[-1]
    assert Choice(study).named("knee") in front[1:] and front[0].baseline
    plain, cheap, best = front[0], front[1], front[-1]
    for some, knee in (([plain, cheap, best], best), ([plain, best], best), ([plain], plain)):
        few = [plain, *(t for t in some if t != plain)]  # between two none stands out
        assert Choice(study, few).knee == knee
    same = replace(cheap, score=plain.score, cost=plain.cost)
    assert Choice(study, [plain, same]).knee == plain, "nobody has to search for its equal"
    assert Choice(study, [plain, same, best]).knee == best
    assert Choice(study).named("trial=3").number == 3
    plain = study.facts["plain"]["macs"]
    chosen = Choice(study).named("macs<=1.1x")
    fitting = [t for t in front if t.cost.values["macs"] <= 1.1 * plain]
    assert chosen == max(fitting, key=lambda t: t.score.accuracy if t.score else 0.0)
    with pytest.raises(UserError, match=r"did you mean 1\.05x\?"):
        Choice(study).named("macs<=1.05")
    with pytest.raises(UserError, match=r"did you mean 'knee'\?"):
        Choice(study).named("kne")
    for wrong in ("kneee", "trial=99", "latency<=3", "macs<=abc", "macs<=1"):
        with pytest.raises(UserError):
            Choice(study).named(wrong)


def test_a_failure_is_recorded_and_the_search_goes_on(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real trainings: one that diverges, one that runs out of memory, one that breaks."""
    fit, calls = candidate.fit, []

    def sabotaged(network: Any, data: Any, schedule: Any, **options: Any) -> Score:
        calls.append(schedule)
        if len(calls) == 3:  # backbone, baseline, then the first candidate
            schedule = schedule.model_copy(update={"lr": 1e30, "optimizer": "sgd"})
        if len(calls) == 4:
            raise TrialFailed("out of memory")
        if len(calls) == 5:
            raise ZeroDivisionError("oops")
        return fit(network, data, schedule, **options)

    monkeypatch.setattr(candidate, "fit", sabotaged)
    search = searching(write())
    monkeypatch.setattr(search.evaluator, "estimate", lambda *a, **k: 0.0)
    study = search.run(5)
    states = [t.state for t in study.trials]
    assert states == ["scored", "failed", "failed", "failed", "scored"]
    reasons = [t.reason for t in study.trials]
    assert "not finite" in reasons[1] or "the loss is" in reasons[1]
    assert reasons[2] == "out of memory"
    assert reasons[3] == "ZeroDivisionError: oops"
    assert all(t.score is None for t in study.trials if t.state == "failed")
    assert {t.number for t in study.frontier()} <= {0, 4}
    assert study.summary()["failed"] == 3
    search, stale = searching(write()), study.trials
    search.retry()
    assert [t.state for t in search.study.trials] == ["scored", *["running"] * 3, "scored"]
    assert rows(search.run(2)) == rows(searching(write("whole")).run(5)), "as if nothing had failed"
    assert search.study.asked == 5
    goes_on = search.study.folder / "checkpoints" / "1"
    goes_on.mkdir(parents=True)
    searching(write())._sweep(stale)  # by one who has not seen yet that it is open again
    assert goes_on.exists()


def test_on_a_terminal_the_backbones_training_is_seen(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    search, seen = searching(write()), list[tuple[Any, str]]()

    class Unprepared(Formula):
        stored = False
        training = search.study.folder / "backbone.checkpoints"

        def prepare(self, tick: Tick) -> bool:
            if not self.stored:
                seen.append((search.display.study, search.display.task))
            self.stored = True
            return True

        def estimate(self, trainings: float, *, prepare: bool) -> float:
            return 1.0

    search.evaluator = Unprepared()  # type: ignore[assignment]
    study = search.run(2)
    search = searching(write())
    search.evaluator = Unprepared()  # type: ignore[assignment]
    search.train_again(study.trials[1], "token")
    assert [who and who.name for who, _ in seen] == ["tiny", "tiny"]
    assert all("the plain backbone" in task for _, task in seen)


def test_a_bare_resume_asks_for_what_was_asked_for_last(write: Write) -> None:
    """Whoever reads the study, and begins seconds later."""
    early, late = searching(write()), searching(write(final={"seeds": 1}))
    late.plan(80)
    assert early.plan(None) == 80 and late.study.asked == 80
    assert early.study.config.final, "nothing is taken back"
    assert early.plan(40) == 40 == early.study.asked


def test_a_crew_that_loses_its_gpu_goes_on_as_a_new_process(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*_: Any) -> Any:
        raise DeviceLost("trial 3 failed and left this process a GPU of no use")

    began: list[Any] = []

    def renew(experiment: Experiment) -> Any:
        began.append(experiment.study)
        raise SystemExit(7)

    monkeypatch.setattr("nasattn.search.workers.search_with", lost)
    monkeypatch.setattr(cli, "_renew", renew)
    found = CliRunner().invoke(cli.app, ["search", str(write()), "--workers", "2"])
    assert (found.exit_code, began) == (7, ["tiny"]), found.exception


def test_a_home_is_one_for_every_command(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write()
    by_formula(path, 2)
    monkeypatch.setenv("HOME", str(path.parent))
    of = ["--storage", "sqlite:///~/runs/tiny.db", "--study", "tiny"]
    for command in (["status"], ["resume", "--trials", "2"]):
        found = CliRunner().invoke(cli.app, [*command, *of])
        assert found.exit_code == 0, found.output


def test_what_has_failed_is_tried_again_when_asked_for(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("oops")

    path = write(training={"epochs": 1, "batch_size": 32})
    by_formula(path, 1)
    search = [str(path), "--trials", "3", "--workers"]
    with monkeypatch.context() as patch:
        patch.setattr(candidate, "fit", broken)
        said = CliRunner().invoke(cli.app, ["search", *search, "1"]).output
    assert "complete: 3 trials, 2 of them failed (--retry trains them again)" in said
    said = CliRunner().invoke(cli.app, ["search", *search, "2", "--retry"]).output
    assert "to be tried again: 2 trials that failed" in said
    assert said.count("is complete: 3 trials\n") == 1, said
    said = CliRunner().invoke(cli.app, ["search", *search, "1", "--retry"]).output
    assert "to be tried again: 0 trials that failed" in said and "is complete: 3 trials\n" in said


def test_a_baseline_that_fails_ends_the_search_and_is_tried_again(write: Write) -> None:
    class Failing(Formula):
        def __call__(
            self, architecture: Architecture, tick: Tick, **options: Any
        ) -> tuple[Score, Any]:
            raise TrialFailed("out of memory")

    path = write()
    why = "the plain backbone could not be trained as candidates are, by `training`: out of memory"
    with pytest.raises(TrialFailed, match=why):
        by_formula(path, 4, Failing())
    shown = CliRunner().invoke(cli.app, ["status", str(path)])
    assert shown.exit_code == 0 and f"\n  {why}\n" in shown.output
    study = by_formula(path, 4)
    assert study.troubles() == [], "it has been tried again"
    assert rows(by_formula(path, 4)) == rows(by_formula(write("whole"), 4))


def test_weights_reproduce_their_score_and_seeds_are_kept(write: Write) -> None:
    training = {"epochs": 1, "batch_size": 32, "lr": 0.01, "warm_start": True, "seeds": 2}
    search = searching(write(training=training))
    study = search.run(3)
    for trial in study.trials:
        assert trial.score is not None
        assert len(trial.score.accuracies) == 2
        assert trial.score.accuracy == pytest.approx(sum(trial.score.accuracies) / 2)
        assert len({r.seed for r in trial.score.repeats}) == 2
    best = study.frontier()[-1]
    assert best.score is not None
    network = build(best.architecture).eval()
    network.load_state_dict(load_file(study.folder / "weights" / f"{best.number}.safetensors"))
    data = load(study.config.data, best.architecture.input, best.architecture.classes)
    hits = total = 0
    with torch.no_grad():
        for x, y in data.loader("val", 64, 0):
            hits += int((network(x).argmax(1) == y).sum())
            total += len(y)
    assert hits / total == pytest.approx(best.score.accuracies[0])
    kept = {int(p.stem) for p in (study.folder / "weights").glob("*.safetensors")}
    assert kept == {t.number for t in study.frontier()} | {0}


def test_lost_weights_are_trained_again_to_the_same_bits(write: Write) -> None:
    path = write()
    study = searching(path).run(3)
    best = study.frontier()[-1]
    file = study.folder / "weights" / f"{best.number}.safetensors"
    before = load_file(file)
    file.unlink()
    (study.folder / "backbone.safetensors").unlink()
    trial, after = weights_of_trial(study, best, Display(Console(quiet=True)))
    assert trial == best
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    display, said = Display(Console(quiet=True)), list[str]()
    display.note = said.append  # type: ignore[method-assign]
    _, again = weights_of_trial(study, best, display)
    assert all(torch.equal(before[k], again[k]) for k in before)
    assert said == [], "they are kept again"


def test_without_a_warm_start_every_candidate_starts_from_scratch(write: Write) -> None:
    training = {"epochs": 1, "batch_size": 32, "lr": 0.01, "ema": 0.9, "clip": 1.0}
    study = searching(write(training=training)).run(2)
    assert [t.state for t in study.trials] == ["scored", "scored"]
    assert not (study.folder / "backbone.safetensors").exists()


def nasattn(*arguments: object, before: str = "") -> subprocess.CompletedProcess[str]:
    code = "from nasattn.cli import main; main()"
    if before:
        code = f"from nasattn.search import database; {before}; {code}"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("command", ["search", "resume"])
def test_a_complete_study_is_printed_and_no_torch_loaded(write: Write, command: str) -> None:
    path = write()
    by_formula(path, 3)
    shutil.rmtree(path.parent / "runs" / "tiny")
    code = (
        "import sys; from nasattn.cli import app; app(standalone_mode=False)\n"
        "assert 'torch' not in sys.modules"
    )
    storage = f"sqlite:///{path.parent}/runs/tiny.db"
    arguments = ["resume", "--storage", storage, "--study", "tiny"]
    if command == "search":
        arguments = ["search", str(path), "--trials", "3"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the study 'tiny' is complete: 3 trials" in done.stdout
    assert "frontier of tiny" in done.stdout
    assert (path.parent / "runs" / "tiny" / "frontier.json").exists()


def test_how_far_a_study_is_is_told_before_torch_is_loaded(write: Write) -> None:
    path = write()
    by_formula(path, 3)
    code = (
        "import sys; sys.modules['torch'] = None\n"  # an import of it fails
        "from nasattn.cli import app; app(standalone_mode=False)"
    )
    arguments = [sys.executable, "-c", code, "search", str(path), "--trials", "5"]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.stdout == "the study 'tiny': 3 of 5 trials are done\n"
    assert "import of torch halted" in done.stderr


def test_more_trials_than_are_asked_for_are_no_share_of_them(write: Write) -> None:
    path = write()
    by_formula(path, 3)
    done = CliRunner().invoke(cli.app, ["search", str(path), "--trials", "2"])
    assert "the study 'tiny': 3 trials are done, 2 were asked for" in done.stdout


def test_a_default_that_was_another_once_is_no_edit_where_it_says_nothing(write: Write) -> None:
    path = write()
    study, now = by_formula(path, 2), Experiment.load(path)
    stored = now.search.model_copy(update={"eta": 3.0})
    study.config = now.model_copy(update={"search": stored})
    assert study.edits(now, ["search.trials"]) == []
    halves = {"search": stored.model_copy(update={"stopping": "pareto_halving"})}
    lines = study.edits(now.model_copy(update=halves), ["search.trials"])
    assert lines == ["search.stopping: 'none' -> 'pareto_halving'"]
    study.config = study.config.model_copy(update=halves)
    assert "search.eta: 3.0 -> 8.0" in study.edits(now, [])


def test_what_trains_is_loaded_before_a_trial_is_taken(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes seconds: who is killed meanwhile must not count against a trial."""
    path = write()
    by_formula(path, 2)

    def killed(where: TrainerFile) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(candidate, "load_training", killed)
    search = searching(path)
    with pytest.raises(KeyboardInterrupt):
        search.run(4)
    assert [t.state for t in search.study.trials] == ["scored"] * 2


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of 80 images of each of two classes."""
    rng = np.random.default_rng(0)
    for number in range(160):
        path = tmp_path / f"photos/{number % 2}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 200, (32, 64)) + 50 * (number % 2)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return tmp_path / "photos"


def test_a_name_that_the_output_cannot_encode_is_escaped(
    write: Write, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    (photos / "0").rename(photos / ":smile: ü")
    data = {"name": "image_folder", "root": str(photos)}
    done = nasattn("search", write(data=data, space=SPACE | {"classes": 2}), "--trials", "1")
    assert done.returncode == 0, done.stderr
    assert "classes: 1, :smile: \\xfc" in done.stdout


def test_images_that_change_in_the_middle_are_refused(write: Write, photos: Path) -> None:
    """Another list would be split otherwise: what was trained on would be judged by."""
    data = {"name": "image_folder", "root": str(photos)}
    path = write(data=data, space=SPACE | {"classes": 2})
    searching(path)
    more = photos / "0" / "more.png"
    shutil.copy(photos / "0" / "0.png", more)
    assert searching(path).study.facts["images"]["files"] == 161, "no trial has begun"
    by_formula(path, 2)
    more.unlink()
    with pytest.raises(UserError, match=r"images have changed .* \(161 then, 160 now\)"):
        searching(path)
    for edit in ({"seed": 5}, {"root": str(photos.parent)}, {"name": "cued_digits"}):
        fields = {"name": "cued_digits"} if "name" in edit else data | edit
        with pytest.raises(UserError):
            searching(write(data=fields, space=SPACE | {"classes": 2}))
    path = write(data=data, space=SPACE | {"classes": 2})
    shutil.copy(photos / "0" / "0.png", more)
    study = by_formula(path, 3)
    assert len(study.trials) == 3
    assert study.facts["images"]["names"] == ["0", "1"]

    old = {k: v for k, v in study.facts.items() if k != "images"}
    study.optuna.set_user_attr(FACTS, old)
    assert searching(path).study.facts["images"] == study.facts["images"], "of an earlier version"
    more.unlink()
    with pytest.raises(UserError, match="images have changed"):
        searching(path)


def test_one_class_is_refused(write: Write, photos: Path) -> None:
    shutil.rmtree(photos / "1")
    data = {"name": "image_folder", "root": str(photos)}
    for classes, said in ((1, "^classes: got 1; allowed: from 2"), (2, "has one class folder")):
        with pytest.raises(UserError, match=said):
            searching(write(data=data, space=SPACE | {"classes": classes}))


def test_batches_of_one_are_refused_where_a_norm_sees_one_value(write: Write) -> None:
    schedule = {"batch_size": 1, "warm_start": True}
    assert searching(write(training=schedule))
    rows = [[1, 16, 1, 4], [1, 16, 1, 4], [1, 16, 1, 4]]
    deep = SPACE | {"backbone": {"name": "mobilenet_v2", "width": 0.25, "rows": rows}}
    with pytest.raises(UserError, match=r"training\.batch_size: got 1; allowed: from 2: Expected"):
        searching(write("two", training=schedule, space=deep))
    never = {"pretrain": {"batch_size": 1}, "training": {"warm_start": False}}
    assert searching(write("three", space=deep, **never)), "it is not used"
    with pytest.raises(UserError, match=r"pretrain\.batch_size: got 1; allowed"):
        searching(write("four", space=deep, final={"seeds": 1}, **never))
    for warm, final in ((True, None), (False, {"seeds": 1})):
        fields = {"training": {"warm_start": warm}, "pretrain": {"batch_size": 1000}}
        fields |= {"final": final} if final else {}
        with pytest.raises(
            UserError, match=r"^pretrain\.batch_size: got 1000, but the train split"
        ):
            searching(write("five", **fields))


def test_a_changed_backbone_is_not_the_plain_one(write: Write) -> None:
    """Which may be over the budget here: then it is no member of the frontier."""
    rows = [[3, 8, 2, 3, 0.0], [6, 16, 2, 3, 0.0], [6, 16, 1, 3, 0.0]]
    space = {
        "backbone": {"name": "autonl", "rows": rows},
        "vary": {"expansion": [6, 3], "kernel": [3], "optional": True},
        "input": [1, 32, 64],
        "classes": 10,
        "sites": ["stage*.*"],
        "blocks": {"gcnet": {"ratio": [0.25]}},
        "max_blocks": 1,
    }
    fields = {"space": space, "budget": {"macs": "0.9x"}, "training": {"warm_start": False}}
    path = write(**fields)
    study = by_formula(path, 1)
    assert study.trials[0].score and study.frontier() == []
    assert study.summary()["best"] is None
    display = Display(Console(quiet=True))
    display.begin(study, 12)
    assert display.summary().startswith("best -, ")
    for command in ("pareto", "status", "report"):
        said = CliRunner().invoke(cli.app, [command, str(path)])
        assert said.exit_code == 0, said.exception
    study = by_formula(path, 12)
    lines = [in_words(study.config.space, t.architecture) for t in study.trials]
    assert lines[0] == "plain backbone" and len(set(lines)) == 12
    assert any("expansion=3,kernel=3,se=0 @ stage" in line for line in lines)
    assert any("left_out @ stage2.1" in line for line in lines)
    front, told = study.frontier(), study.frontier_rows()
    for trial, row in zip(front, told, strict=True):
        assert row["backbone"] == changes(study.config.space, trial.architecture.backbone)
    assert len({json.dumps([row["backbone"], row["placements"]]) for row in told}) == len(front)
    table = list(csv.DictReader((study.folder / "frontier.csv").read_text().splitlines()))
    assert ["; ".join(f"{k}: {v}" for k, v in r["backbone"].items()) for r in told] == [
        row["backbone"] for row in table
    ]
    assert all(t.cost.values["macs"] <= study.facts["limits"]["macs"] for t in study.frontier())
    said = CliRunner().invoke(cli.app, ["pareto", str(path)])
    assert said.stdout.count("plain backbone") == 1
    study = by_formula(path, 100)
    limit, tried = study.facts["limits"]["macs"], {t.architecture for t in study.trials}
    every = SearchSpace.of(study.config.space)
    fit = {a for a in every.enumerate() if every.cost(a).values["macs"] <= limit}
    assert tried == fit | {every.baseline()}, "it takes no other's place"


def test_a_backbone_that_varies_without_leaving_out(write: Write) -> None:
    rows = [[3, 8, 2, 3, 0.0], [6, 16, 2, 3, 0.0], [6, 16, 1, 3, 0.0]]
    space = SPACE | {
        "backbone": {"name": "autonl", "rows": rows},
        "vary": {"expansion": [6, 3], "kernel": [3]},
        "blocks": {"gcnet": {"ratio": [0.25]}},
        "max_blocks": 1,
    }
    for budget in ({}, {"macs": "0.9x"}):
        training = {"warm_start": False}
        path = write(f"of{len(budget)}", space=space, budget=budget, training=training)
        study = by_formula(path, 8)
        found = {t.architecture for t in study.trials}
        every = set(SearchSpace.of(study.config.space).enumerate())
        assert len(found) == 8 and found <= every


def test_fewer_trials_than_there_are_is_as_many(write: Write) -> None:
    path = write()
    by_formula(path, 4)
    study = by_formula(path, 2)
    assert study.asked == 4 and len(study.trials) == 4


def test_images_that_can_be_read_no_more_are_refused(write: Write, photos: Path) -> None:
    """Left out, a split would be smaller: trials would be judged by other images."""
    data = {"name": "image_folder", "root": str(photos), "bad": 0.1}
    path = write(data=data, space=SPACE | {"classes": 2})
    photo = photos / "0" / "0.png"
    Image.new("L", (8, 8)).save(photo, "bmp")
    study = by_formula(path, 2)
    whole = photo.read_bytes()
    photo.write_bytes(whole[:60])
    with pytest.raises(UserError, match=r"other images can be read .* \(160 then, 159 now\)"):
        searching(path)
    photo.write_bytes(whole[:-1] + b"x")
    with pytest.raises(UserError, match=r"images have other contents .* \(160 then, 160 now\)"):
        searching(path)
    photo.write_bytes(whole)
    images = study.facts["images"]
    for new in ({"contents"}, {"contents", "read", "readable"}):
        earlier = {k: v for k, v in images.items() if k not in new}
        study.optuna.set_user_attr(FACTS, study.facts | {"images": earlier})
        assert searching(path).study.facts["images"] == images, "of an earlier version"


def test_images_may_move(write: Write, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same splits of the same images: neither the study nor the backbone's weights mind."""

    def at(root: Path) -> Path:
        data = {"name": "image_folder", "root": str(root)}
        return write(data=data, space=SPACE | {"classes": 2})

    first = searching(at(photos))
    marks = first.evaluator._data()
    by_formula(at(photos), 2)
    moved = photos.with_name("elsewhere")
    photos.rename(moved)
    later = searching(at(moved))
    assert later.study.notes == [f"the images lie in {moved} now"]
    assert later.study.facts["experiment"]["data"]["root"] == str(moved)
    assert later.evaluator._data() == marks
    told: list[str] = []
    monkeypatch.setattr(later.display, "note", told.append)
    later.display.again = "`nasattn resume`"
    later.announce(3)
    assert told[-1].endswith("Ctrl-C stops, `nasattn resume` goes on")
    assert "images: 112 train, 24 val, 24 test; classes: 0, 1" in told
    assert len(by_formula(at(moved), 3).trials) == 3
    shutil.copytree(moved, photos)
    Image.fromarray(np.zeros((32, 64), np.uint8)).save(photos / "0" / "0.png")
    with pytest.raises(UserError, match=r"data\.root: images have other contents since the study"):
        searching(at(photos))  # the same names, but not the same images


def test_images_that_change_while_the_backbone_is_trained_are_refused(
    write: Write, photos: Path
) -> None:
    """No trial has begun, but somebody works; and who read the study before comes too late."""
    path = write(data={"name": "image_folder", "root": str(photos)}, space=SPACE | {"classes": 2})
    first = searching(path)
    with first._leases():
        (photos / "0" / "0.png").unlink()
        with pytest.raises(UserError, match="images have changed"):
            searching(path)
    later = searching(path)
    with pytest.raises(UserError, match="was edited just now: run this again"):
        first.run(2)
    assert not later.study.trials
    edited = searching(
        write(
            data=later.experiment.as_dict()["data"],
            space=SPACE | {"classes": 2},
            pretrain={"epochs": 1},
        )
    )
    with pytest.raises(UserError, match="was edited just now: run this again"):
        later.run(2)
    assert edited.run(1).config.pretrain.epochs == 1


def test_a_backbone_of_other_images_is_not_used(write: Write, photos: Path) -> None:
    path = write(data={"name": "image_folder", "root": str(photos)}, space=SPACE | {"classes": 2})
    search = searching(path)
    search.evaluator.prepare(lambda share, accuracy: None)
    assert searching(path).evaluator.stored
    photo = photos / "0" / "0.png"
    Image.new("L", (8, 8)).save(photo, "bmp")
    assert not searching(path).evaluator.stored
    searching(path).evaluator.prepare(lambda share, accuracy: None)
    size = photo.stat().st_size
    Image.new("L", (8, 8), 255).save(photo, "bmp")
    assert photo.stat().st_size == size
    assert not searching(path).evaluator.stored, "of one size, as all BMPs of one shape are"
    photo.unlink()
    assert not searching(path).evaluator.stored


def test_a_backbone_of_another_trainer_is_not_used(write: Write) -> None:
    """Before the first trial is told the trainer may be edited; the backbone's training is another
    one then. Weights of an earlier version say nothing of theirs, and are used."""
    search = searching(write())
    search.evaluator.prepare(lambda share, accuracy: None)
    kept = search.evaluator._file
    by_float = kept.read_bytes()
    by_half = searching(write(trainer={"precision": "bf16-mixed"}))
    assert not by_half.evaluator.stored
    by_half.evaluator.prepare(lambda share, accuracy: None)
    assert kept.read_bytes() != by_float and by_half.evaluator.stored
    facts = {k: v for k, v in facts_of(kept).items() if k not in ("trainer", "contents")}
    store(kept, load_file(kept), facts)
    assert searching(write()).evaluator.stored
    store(kept, load_file(kept), {})
    assert not searching(write()).evaluator.stored, "it says nothing of itself"


def test_a_checkpoint_of_other_contents_is_not_gone_on_with(write: Write, photos: Path) -> None:
    path = write(data={"name": "image_folder", "root": str(photos)}, space=SPACE | {"classes": 2})
    photo = photos / "0" / "0.png"
    Image.new("L", (8, 8)).save(photo, "bmp")
    evaluator = searching(path).evaluator
    network = build(evaluator.plain)

    def checkpoints() -> candidate.Checkpoints:
        evaluator = searching(path).evaluator
        made = evaluator._checkpoints(
            evaluator.training, evaluator.plain, evaluator.experiment.pretrain, 0
        )
        assert made is not None
        return made

    kept = checkpoints()
    state = State(tensors=copies("network", held(network)))
    kept.write("trunk", state)
    assert checkpoints().read("trunk", network) is not None
    Image.new("L", (8, 8), 255).save(photo, "bmp")
    assert checkpoints().read("trunk", network) is None
    earlier = {k: v for k, v in kept.belongs.items() if k != "contents"}
    replace(kept, belongs=earlier).write("trunk", state)
    assert checkpoints().read("trunk", network) is not None, "of an earlier version"


def test_limits_that_an_earlier_version_rounded_otherwise_are_taken_anew(write: Write) -> None:
    """Else what is exactly at the limit would be trained, and be on no frontier."""
    path = write()
    study = by_formula(path, 2)
    facts, limits = study.facts, dict(study.facts["limits"])
    off = {metric: limit * (1 - 1e-15) for metric, limit in limits.items()}
    study.optuna.set_user_attr(FACTS, {**facts, "limits": off})
    assert off != limits and searching(path).study.facts["limits"] == limits


def test_after_new_study_it_is_resume_that_goes_on(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    def interrupted(search: Search, total: int) -> None:
        said.append(search.display.again)
        raise KeyboardInterrupt

    monkeypatch.setattr(Search, "run", interrupted)
    for options, again in (([], "the same command"), (["--new-study"], "nasattn resume --study")):
        run = CliRunner().invoke(cli.app, ["search", str(write()), *options])
        assert run.exit_code == 1 and said[-1].startswith(again)
        assert f"stopped; what is finished is kept, {said[-1]} goes on" in run.output


DETACHED = """
import os, signal, sys
from nasattn.cli import main
from nasattn.search.display import Display
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as after `disown`
end, terminal = Display.end, int(sys.argv.pop())
def gone(self, trial, trials, refused):
    if trial.number == 1:
        os.close(terminal)
    end(self, trial, trials, refused)
Display.end = gone
main()
"""


def test_a_terminal_that_goes_away_ends_nothing(write: Write) -> None:
    path = write(training={"warm_start": False}, search={"sampler": "random"})
    ours, theirs = os.openpty()
    environment = {**os.environ, "TERM": "xterm"}
    command = [sys.executable, "-c", DETACHED, "search", str(path), "--trials", "4", str(ours)]
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, pass_fds=[ours], env=environment
    ) as process:
        os.close(ours)  # its last copy is the search's own, which closes it
        os.close(theirs)
        process.wait(timeout=300)
    trials = load_study(f"sqlite:///{path.parent}/runs/tiny.db", "tiny").trials
    assert [t.state for t in trials] == ["scored"] * 4


def test_before_the_first_trial_the_panel_asks_the_database_for_nothing(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is drawn all the time while the plain backbone is trained, from within Lightning."""
    study = by_formula(write(), 1)
    display = Display(Console(force_terminal=True, file=io.StringIO()))
    display.begin(study, 3)
    display.trials = []
    monkeypatch.setattr(Study, "trials", property(lambda self: pytest.fail("read")))
    assert study.frontier([]) == [] and study.hypervolume([]) is None
    assert display.panel()


def test_what_cannot_be_estimated_is_searched_all_the_same(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> float:
        raise ZeroDivisionError("a network of its own kind")

    monkeypatch.setattr(candidate.Evaluator, "estimate", broken)
    assert len(searching(write()).run(2).trials) == 2


def test_a_long_name_has_room_for_its_number(write: Write) -> None:
    path = write(study="s" * 100)
    for number, name in enumerate(("s" * 100, "s" * 90 + "-2", "s" * 90 + "-3"), start=1):
        command = ["search", str(path), "--new-study", "--trials", "1"]
        done = CliRunner().invoke(cli.app, command)
        assert done.exit_code == 0, (number, done.output)
        assert load_study(Experiment.load(path).storage, name).trials


def test_what_is_remarked_is_said_once_and_kept_in_each_row(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    search, said = searching(write()), list[str]()
    monkeypatch.setattr(search.display, "note", said.append)
    before = candidate.Evaluator.__call__

    def remarking(self: Any, *rest: Any, **options: Any) -> Any:
        self.note("not the same bits")
        return before(self, *rest, **options)

    monkeypatch.setattr(candidate.Evaluator, "__call__", remarking)
    study = search.run(3)
    assert said.count("not the same bits") == 1
    rows = study.optuna.get_trials(deepcopy=False)
    assert [row.user_attrs["remarks"] for row in rows] == [["not the same bits"]] * 3
    backbone, remark = study.remarks()[::-1]
    assert backbone.startswith("the plain backbone is trained: accuracy")
    assert remark == "not the same bits"


def test_before_the_first_trial_all_may_be_edited(write: Write) -> None:
    """What stops a search at once can be mended."""
    searching(write(pretrain={"epochs": 1}))
    wider = SPACE | {"max_blocks": 1}
    changes: dict[str, Any] = {"pretrain": {"epochs": 3}, "trainer": {"threads": 2}, "space": wider}
    search = searching(write(**changes))
    assert search.study.config.pretrain.epochs == 3 and search.study.config.trainer.threads == 2
    assert search.study.config.space.max_blocks == 1
    with search._leases(), pytest.raises(UserError, match=r"pretrain\.epochs: 3 -> 4"):
        searching(write(**changes | {"pretrain": {"epochs": 4}}))
    with pytest.raises(UserError, match="objectives"):
        searching(write(**changes | {"objectives": ["accuracy", "params"]}))
    by_formula(write(**changes), 1)
    with pytest.raises(UserError, match=r"pretrain\.epochs: 3 -> 4"):
        searching(write(**changes | {"pretrain": {"epochs": 4}}))


def test_what_made_the_baseline_fail_can_be_mended(write: Write) -> None:
    class Diverging(Formula):
        def __call__(self, *arguments: Any, **options: Any) -> Any:
            raise TrialFailed("the loss is nan at step 7")

    path = write(training={"epochs": 2, "lr": 1e15, "warm_start": False})
    with pytest.raises(TrialFailed, match="plain backbone could not be trained: the loss is nan"):
        by_formula(path, 3, Diverging())
    training = {"warm_start": False}
    for fixed in ({"space": SPACE | {"max_blocks": 1}}, {"budget": {"params": "1.3x"}}):
        with pytest.raises(UserError, match=rf"{next(iter(fixed))}\."):
            searching(write(training=training, **fixed))
    mended = write(training={"epochs": 2, "lr": 1e-3, "warm_start": False})
    failed = load_study(f"sqlite:///{path.parent}/runs/tiny.db", "tiny")
    site, specs = next(iter(failed.facts["choices"].items()))
    more = failed.facts["choices"] | {site: [*specs, "gcnet(ratio=0.125)"]}
    failed.optuna.set_user_attr(FACTS, failed.facts | {"choices": more})
    with pytest.raises(UserError, match=r"what this one has not: gcnet\(ratio=0\.125\) @ "):
        searching(mended)
    failed.optuna.set_user_attr(FACTS, failed.facts)
    study = by_formula(mended, 3)
    assert study.config.training.lr == 1e-3 and [t.state for t in study.trials] == ["scored"] * 3
    assert not study.trials[0].reason
    with pytest.raises(UserError, match=r"training\.lr: 0\.001 -> 0\.01"):
        searching(write(training={"epochs": 2, "lr": 1e-2, "warm_start": False}))


def test_a_mended_baseline_has_nothing_of_what_was_before(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its training had ended when the database went away, before its score was told."""

    def away(*_: Any) -> None:
        raise Stopped("the database has not answered")

    search, formula = searching(write(training={"lr": 1.0})), Formula()
    search.evaluator = formula  # type: ignore[assignment]
    search._remark("no more than chance")
    with monkeypatch.context() as patch:
        patch.setattr("nasattn.search.slots.Slots.finish", away)
        with pytest.raises(Stopped):
            search.run(1)
    again = Formula()
    study = by_formula(write(training={"lr": 0.5}), 1, again)
    assert formula.calls == again.calls == 1 and study.trials[0].score
    assert study.remarks() == []
    study.remark("no more than chance")
    assert study.remarks() == ["no more than chance"]


def test_who_reads_the_images_may_change_and_changes_nothing(
    write: Write, tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a study: its plain backbone and its trials stay, a bare resume takes it."""
    monkeypatch.setattr(loop, "on_cuda", lambda where: True)

    def fields(loaders: int) -> dict[str, Any]:
        data = {"name": "image_folder", "root": str(photos), "loaders": loaders}
        return {"data": data, "space": SPACE | {"classes": 2}}

    said: dict[str, list[str]] = {}

    def run(folder: str, loaders: int, trials: int) -> Study:
        search = searching(write(folder, **fields(loaders)))
        told = said[f"{folder}, {loaders}"] = []
        monkeypatch.setattr(search.display, "note", told.append)
        return search.run(trials)

    whole = run("whole", 0, 4)
    run("changed", 0, 2)
    backbone = (tmp_path / "changed/runs/tiny/backbone.safetensors").stat().st_mtime_ns
    changed = run("changed", 1, 4)
    assert rows(changed) == rows(whole)
    assert (tmp_path / "changed/runs/tiny/backbone.safetensors").stat().st_mtime_ns == backbone
    assert load_study(changed.storage, "tiny").config.data.loaders == 1  # type: ignore[union-attr]
    advised = {name for name, texts in said.items() if any("data.loaders: 4" in t for t in texts)}
    assert advised == {"whole, 0", "changed, 0"}


@pytest.mark.parametrize("warm_start", [True, False])
@pytest.mark.parametrize(
    ("trainer", "says"),
    [
        ({"accelerator": "gpu"}, r"trainer.accelerator: got gpu, .*; allowed: auto, cpu"),
        ({"accelerator": "mps"}, r"trainer.accelerator: got mps, .*; allowed: auto, cpu"),
        ({"precision": "16-mixed"}, r"trainer.precision: got 16-mixed.*: 32-true, bf16-mixed"),
    ],
)
def test_a_device_that_is_not_there_is_refused_before_a_trial_is_taken(
    write: Write,
    monkeypatch: pytest.MonkeyPatch,
    trainer: dict[str, str],
    says: str,
    warm_start: bool,
) -> None:
    for device in (torch.cuda, torch.backends.mps):
        monkeypatch.setattr(device, "is_available", lambda: False)
    training = {"epochs": 1, "batch_size": 32, "warm_start": warm_start}
    path = write(trainer=trainer, training=training)
    search = searching(path)
    search.announce(3)  # also where only other machines train
    with pytest.raises(UserError, match=says):
        search.run(3)
    assert not search.study.trials
    fresh = ["search", str(write("fresh", trainer=trainer)), "--workers"]
    for count in "12":
        refused = CliRunner().invoke(cli.app, [*fresh, count]).exception
        assert isinstance(refused, UserError) and re.search(says, str(refused))
    assert not (path.parents[1] / "fresh/runs").exists(), "nor is a study made"
    figures = path.parent / "weights.safetensors"
    with pytest.raises(UserError, match=says):
        candidate.train_architecture(
            search.space.baseline(),
            search.experiment,
            figures,
            epochs=1,
            on_test=False,
            tick=lambda share, accuracy: None,
        )


def refused(done: subprocess.CompletedProcess[str], code: int, text: str) -> None:
    assert done.returncode == code and text in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_a_database_that_is_locked_or_damaged_is_told_in_a_line(write: Write) -> None:
    path = write()
    by_formula(path, 3)
    file = path.parent / "runs" / "tiny.db"
    damaged = file.with_name("damaged.db")
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (page,) = connection.execute(
            "SELECT rootpage FROM sqlite_master WHERE name = 'trial_user_attributes'"
        ).fetchone()
        (size,) = connection.execute("PRAGMA page_size").fetchone()
        connection.execute("BEGIN EXCLUSIVE")
        impatient = "database.BUSY = 1; from nasattn.search import outage; outage.PATIENCE = 1"
        locked = nasattn("search", path, "--trials", "4", before=impatient)
    assert "the database does not answer (database is locked)" in locked.stdout
    refused(locked, 1, "(database is locked); when it does, the same command goes on")
    content = bytearray(file.read_bytes())
    content[(page - 1) * size : page * size] = random.Random(0).randbytes(size)
    damaged.write_bytes(content)
    for command in ("status", "pareto", "resume"):
        done = nasattn(command, "--storage", f"sqlite:///{damaged}", "--study", "tiny")
        refused(done, 1, "the database cannot be used: database disk image is malformed")


def test_what_others_write_is_seen_whatever_was_looked_up(write: Write) -> None:
    """A process that opens and closes the file by itself loses sqlite's locks on it: the next one
    to leave the database deletes the log that this one still reads, and writes to."""
    path = write()
    study = by_formula(path, 2)
    (study.folder / "0.safetensors").touch()
    claim_folder(study.storage, study.name)
    code = f"from nasattn import load_study; s = load_study('{study.storage}', '{study.name}')"
    code += "; s.optuna.set_user_attr('told', 1)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert study.optuna.user_attrs["told"] == 1
    study.optuna.set_user_attr("mine", 2)
    assert load_study(study.storage, study.name).optuna.user_attrs["mine"] == 2


def test_what_stands_beside_a_database_is_left_as_it_is(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sqlite does not know its own files for what they are, and would take its locks away too."""
    study = by_formula(write(), 2)
    file = Path(study.storage.removeprefix("sqlite:///"))
    log = file.with_name("empty.db-wal")
    log.write_text("mine")
    file.with_name("empty.db").touch()
    assert file.with_name("tiny.db-shm").exists()
    connect, opened = sqlite3.connect, set[str]()

    def connected(name: str, **options: Any) -> sqlite3.Connection:
        opened.add(Path(name.split("?")[0]).name)
        return connect(name, **options)

    monkeypatch.setattr(sqlite3, "connect", connected)
    assert list(opening._renamed(file.with_name("new.db"), "tiny")) == ["tiny.db"]
    assert opened == {"tiny.db", "frontier.csv", "frontier.json"}
    assert log.read_text() == "mine"


def test_no_command_opens_the_database_but_by_sqlite(write: Write) -> None:
    path = write(training={"epochs": 1, "batch_size": 32})
    file, opened = f"{path.parent}/runs/tiny.db", list[str]()

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(arguments[0]) == file:
            opened.append(file)

    sys.addaudithook(look)
    path.parent.joinpath("runs").mkdir()
    Path(file).touch()
    Path(file).read_bytes()
    assert opened, "the hook sees"
    opened.clear()
    for command in (
        ["search", path, "--trials", 1],
        ["search", path, "--trials", 1],
        ["resume", "--trials", 2, "--storage", f"sqlite:///{file}", "--study", "tiny"],
        ["search", path, "--trials", 1, "--new-study"],
        *([name, path] for name in ("status", "pareto", "report", "gc")),
        ["export", path, "--out", path.parent / "out"],
    ):
        said = CliRunner().invoke(cli.app, list(map(str, command)))
        assert said.exit_code == 0 and not opened, (command, said.output)


@pytest.mark.parametrize("way", ["file", "folder"])
def test_a_folder_that_cannot_be_written_is_told_before_any_training(
    write: Write, way: str
) -> None:
    path = write()
    runs = path.parent / "runs"
    runs.mkdir()
    if way == "file":
        (runs / "tiny").write_text("in the way")
        refused(nasattn("search", path), 2, "the folder")
    else:
        (runs / "frontier.json").mkdir()
        refused(nasattn("search", path, "--trials", "1"), 2, "frontier.json cannot be written")


def test_a_schedule_that_breaks_an_untrained_network_leaves_the_estimate_out(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    search, said = searching(write()), list[str]()
    monkeypatch.setattr(search.display, "note", said.append)
    monkeypatch.setattr(search.study.__class__, "trials", property(lambda self: []))

    def nan(*_: Any, **__: Any) -> float:
        raise TrialFailed("the loss is nan at step 3")

    monkeypatch.setattr(search.evaluator, "estimate", nan)
    search.announce(6)
    assert said[-1].startswith("7 trainings to go; Ctrl-C") and search.display.ends is None
    monkeypatch.setattr(search.evaluator, "estimate", lambda *_, **__: 3600.0)
    search.announce(6, workers=2)
    assert "7 trainings to go, in about 30 min 00 s; Ctrl-C" in said[-1]
    assert search.display.ends is not None
    assert 1700 < search.display.ends - time.monotonic() <= 1800


def test_weights_that_are_damaged_are_trained_again(write: Write) -> None:
    study = by_formula(write(), 2)
    weights_file(study, 0).write_bytes(b"damaged")
    display, said = Display(Console(quiet=True)), list[str]()
    display.note = said.append  # type: ignore[method-assign]
    again, weights = weights_of_trial(study, study.trials[0], display)
    assert again.score != study.trials[0].score, "the formula's is no training's"
    assert weights and "cannot be read" in said[0]


def test_weights_of_another_databases_study_are_not_taken(write: Write) -> None:
    study = by_formula(write(), 2)
    other = by_formula(write("other"), 2)
    shutil.copy(weights_file(other, 0), weights_file(study, 0))
    display, said = Display(Console(quiet=True)), list[str]()
    display.note = said.append  # type: ignore[method-assign]
    assert len(weights_of_trial(study, study.trials[0], display)[1]) > 1, "the formula gives one"
    assert "is of another study" in said[0]


def test_a_study_does_not_share_its_folder_with_one_of_another_database(write: Write) -> None:
    first = by_formula(write(), 2)
    file = sqlite_path(first.storage)
    assert file
    path = write(storage=f"sqlite:///{file.with_name('other.db')}")
    for _ in range(2):
        with pytest.raises(UserError, match=r"the study 'tiny' of .*tiny\.db.*another `study:`"):
            searching(path)
    assert not file.with_name("other.db").exists(), "nothing was made of it"
    assert by_formula(write(), 3).name == "tiny", "the first goes on"
    assert by_formula(write(study="another", storage=first.storage), 1)
    for left in file.parent.glob("tiny.db*"):
        left.rename(left.with_name(left.name.replace("tiny", "renamed")))
    renamed = Experiment.load(write(storage=f"sqlite:///{file.with_name('renamed.db')}"))
    found = find_study(renamed.storage, "tiny")
    assert found and len(found.trials) == 3
    search = Search(renamed, Display(Console(quiet=True)), found)  # as the command does
    search.evaluator = Formula()  # type: ignore[assignment]
    assert len(search.run(4).trials) == 4
    with pytest.raises(UserError, match=r"the study 'tiny' of .*renamed\.db"):
        searching(write())


def test_a_database_that_is_renamed_takes_its_files_along(write: Write) -> None:
    """Also of a complete study, and one that comes in its place does not overwrite them."""
    first = by_formula(write(), 2)
    file = sqlite_path(first.storage)
    assert file and any((first.folder / "weights").glob("*.safetensors"))
    first.engine.dispose()

    def rename(name: str) -> Path:
        now = sqlite_path(Experiment.load(path).storage)
        assert now
        for left in now.parent.glob(f"{now.name}*"):
            left.rename(left.with_name(left.name.replace(now.stem, name)))
        return write(storage=f"sqlite:///{now.with_name(name)}.db")

    path = write()
    path = rename("second")
    done = CliRunner().invoke(cli.app, ["search", str(path), "--trials", "2"])
    assert done.exit_code == 0 and "complete" in done.output
    with pytest.raises(UserError, match=r"the study 'tiny' of .*second\.db"):
        searching(write())
    path = write(storage=f"sqlite:///{file.with_name('second.db')}")
    rename("third")
    with pytest.raises(
        UserError, match=r"weights of a study 'tiny' whose database .*second\.db is"
    ):
        searching(write())
    assert not file.exists(), "nothing was made of it"
    by_formula(write(study="another"), 1)
    with pytest.raises(
        UserError, match=r"weights of a study 'tiny' whose database .*second\.db is"
    ):
        searching(write())
    said = CliRunner().invoke(cli.app, ["search", str(write()), "--trials", "1", "--new-study"])
    assert "new study: tiny-2;" in said.output and said.exit_code == 0, said.output


def test_a_database_that_was_put_away_beside_keeps_its_files(write: Write) -> None:
    """The same command makes a new one in its place."""
    first = by_formula(write(), 2)
    file = sqlite_path(first.storage)
    assert file
    first.engine.dispose()
    (file.parent / "notes").write_text("no database")
    for left in file.parent.glob("tiny.db*"):
        left.rename(left.with_name(left.name.replace("tiny", "kept")))
    with pytest.raises(UserError, match=r"the files of the study 'tiny' of .*kept\.db"):
        searching(write())
    for left in file.parent.glob("kept.db*"):
        left.unlink()
    assert by_formula(write(), 2).name == "tiny", "one that was deleted is begun anew"


def test_loading_leaves_the_garbage_collector_as_it_was() -> None:
    with pytest.raises(KeyError), cli._loading():
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled() and not gc.get_freeze_count()


def test_an_interrupt_within_a_destructor_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted:
        def __init__(self, number: signal.Signals) -> None:
            self.number = number

        def __del__(self) -> None:
            signal.raise_signal(self.number)

    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
    said = list[Any]()
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    try:
        for number in before:
            cli._take_interrupts()
            with pytest.raises(KeyboardInterrupt):
                Interrupted(number)
                time.sleep(10)
            for again in before:
                signal.raise_signal(again)  # so soon after, it is the same one
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert not said


def test_with_a_store_for_artifacts_nothing_is_taken_for_complete(write: Write) -> None:
    """The store was named after the end, and that search was killed before it had uploaded."""
    by_formula(write(), 3)
    path = write(artifacts="store")
    searching(path).plan(3)
    arguments = ["search", str(path), "--trials", "3"]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    study = load_study(f"sqlite:///{path.parent}/runs/tiny.db", "tiny")
    share(study, open_store(study.config.artifacts), print)
    assert {p.name for p in study.files.elsewhere()} >= {
        weights_file(study, t.number).name for t in study.frontier()
    }


def test_a_study_is_complete_for_what_it_was_asked_alone(write: Write, tmp_path: Path) -> None:
    study = by_formula(write(), 3)
    search = {"sampler": "random", "trials": 6, "seed": 1}

    def complete(total: int = 3, **changes: Any) -> bool:
        return study.complete(Experiment.load(write(**changes)), total)

    assert complete() and complete(search=search | {"workers": 2, "trials": 9})
    assert not complete(total=4) and not complete(total=2)
    for edit in (
        ("final", {"seeds": 2}),
        ("artifacts", str(tmp_path)),
        ("search", search | {"seed": 2}),
    ):
        assert not complete(**dict([edit])), edit


@pytest.mark.slow
def test_the_command_line_end_to_end(write: Write) -> None:
    path = write()
    first = nasattn("search", path, "--trials", 3)
    assert first.returncode == 0, first.stderr
    assert "frontier of tiny" in first.stdout
    complete = nasattn("search", path, "--trials", 3)
    assert complete.returncode == 0 and "complete" in complete.stdout
    storage = f"sqlite:///{path.parent}/runs/tiny.db"
    more = nasattn("resume", "--storage", storage, "--study", "tiny", "--trials", 4)
    assert more.returncode == 0, more.stderr
    listed = nasattn("pareto", "--storage", storage, "--study", "tiny", "--json")
    front = json.loads(listed.stdout)
    assert [row["accuracy"] for row in front] == sorted(row["accuracy"] for row in front)
    assert {"number", "key", "accuracy", "cost", "placements", "baseline"} <= front[0].keys()
    state = json.loads(nasattn("status", path, "--json").stdout)
    assert (state["finished"], state["running"]) == (4, 0)
    for wrong in (
        ("search", path.parent / "experimant.yaml"),
        ("pareto", "--storage", storage, "--study", "tinny"),
        ("pareto", "--storage", "sqlite:////nowhere/at/all.db", "--study", "tiny"),
        ("pareto", "--storage", "oracle", "--study", "tiny"),
        ("pareto",),
        ("search", path, "--storage", "postgresql://nobody@127.0.0.1:1/none"),
        ("search", path, "--trials", 4, "--launcher", "lokal"),
        ("search", path, "--trials", 4, "--launcher-option", "time=5"),
    ):
        refused = nasattn(*wrong)
        assert refused.returncode == 2, (wrong, refused.stderr)
        assert "Traceback" not in refused.stderr and refused.stderr.strip()


# Kills itself in the middle of the training of one trial. A test that looks for the moment from
# outside misses it where the machine is busy.
DIES = """
import os, signal
from nasattn.cli import main
from nasattn.search.loop import Search
tick = Search._tick
def deadly(self, share, accuracy):
    tick(self, share, accuracy)
    if self.leases.doing["slot"] == {number} and share > 0.5:
        os.kill(os.getpid(), signal.SIGKILL)
Search._tick = deadly
main()
"""


# After trial 2 nothing can be trained by that process, as after an illegal address on a GPU.
LOST = """
import torch
from nasattn.cli import main
from nasattn.evaluate.candidate import Evaluator
from nasattn.search.loop import Search
tick, lost = Search._tick, {lost}
def failing(self, share, accuracy):
    global lost
    lost = lost or self.leases.doing.get("slot") == 2
    if lost and self.leases.doing.get("slot"):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    tick(self, share, accuracy)
Search._tick = failing
main()
"""


@pytest.mark.slow
def test_a_gpu_that_is_lost_to_the_process_fails_one_trial(write: Write) -> None:
    """The command goes on as a new process, alone as it was, with the same study. Where that does
    not help it ends."""
    search = {"sampler": "random", "seed": 1, "workers": 2}
    path = write(training={"epochs": 1, "batch_size": 32}, search=search)
    storage = f"sqlite:///{path.parent}/runs/tiny.db"
    by_formula(path, 1)
    command = [sys.executable, "-c", LOST.format(lost=False), "search", str(path), "--trials", "5"]
    command += ["--new-study", "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    with pytest.raises(UserError, match="no study 'tiny-3'"):
        load_study(storage, "tiny-3")
    trials = load_study(storage, "tiny-2").trials
    assert [t.state for t in trials] == ["scored", "scored", "failed", "scored", "scored"]
    why = "AcceleratorError: CUDA error: an illegal memory access was encountered"
    assert trials[2].reason == why
    assert done.stderr.count("trial 2 failed and left this process a GPU of no use") == 1
    assert "worker" not in done.stdout

    command = [sys.executable, "-c", LOST.format(lost=True), "resume", "--storage", storage]
    command += ["--study", "tiny-2", "--trials", "20", "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "5 trainings in a row broke here" in done.stderr
    assert "Traceback" not in done.stderr
    states = [t.state for t in load_study(storage, "tiny-2").trials]
    assert states == ["scored", "scored", "failed", "scored", "scored", *["failed"] * 4, "running"]


@pytest.mark.parametrize("fails", ["the backbone", "the baseline"])
def test_a_gpu_that_is_lost_by_the_plain_backbone_is_tried_again(
    write: Write, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    path = write()
    monkeypatch.setenv(outage.Machine.BROKEN, "0")  # taken back at the end

    def lost(*_: Any, **__: Any) -> Any:
        raise torch.AcceleratorError("CUDA error: an illegal memory access\nand advice")

    with monkeypatch.context() as patch:
        patch.setattr(candidate.Evaluator, "prepare" if "bone" in fails else "__call__", lost)
        for _ in range(4):
            with pytest.raises(DeviceLost, match=r"failed and left .* \(CUDA error: [a-z ]*\);"):
                searching(path).run(2)
        search = searching(path)
        assert search.study.troubles() == [], "a new process goes on at once"
        with pytest.raises(Stopped, match="5 trainings in a row broke here"):
            search.run(2)
        assert "5 trainings in a row broke here" in search.study.troubles()[0]
    study = searching(path).run(2)
    assert [t.state for t in study.trials] == ["scored"] * 2
    assert study.troubles() == []


def test_the_command_has_cublas_repeat_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # taken back at the end
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(sys, "argv", ["nasattn", "blocks", "--json"])
    with pytest.raises(SystemExit):
        cli.main()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_ctrl_c_while_a_command_loads_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the exit code of all that is neither done nor wrong input, and no traceback."""

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_experiment", interrupted)
    monkeypatch.setattr(sys, "argv", ["nasattn", "search", "some.yaml"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1 and capsys.readouterr().err == "\nnasattn: stopped\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("arguments", [("blocks", "--json"), ("cost", "--help")])
def test_a_full_disk_under_the_output_is_told_in_a_line(arguments: tuple[str, ...]) -> None:
    """Of a short output at the end, when what was held back is written."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "nasattn", *arguments]
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment
        )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("nasattn: the disk is full ([Errno 28] No space left on device)")


def test_a_closed_output_is_no_error() -> None:
    command = ["/bin/sh", "-c", f'"{sys.executable}" -m nasattn blocks >&-']
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0 and not done.stderr


def test_a_process_that_is_renewed_leaves_no_others(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = by_formula(write(), 1)
    loader = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    loader.start()
    began: list[Any] = []
    monkeypatch.setattr(os, "execv", lambda *arguments: began.extend(arguments))
    monkeypatch.setenv(STORAGE, "")  # taken back at the end
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "nasattn", "search", "e.yaml", "--new"])
    monkeypatch.setattr(sys, "argv", ["nasattn/__main__.py", "search", "e.yaml", "--new"])
    cli._renew(study.config)
    assert loader.exitcode == -signal.SIGKILL
    again = ["-m", "nasattn", "resume", "--study", "tiny", "--workers", "1"]
    assert began == [sys.executable, [sys.executable, *again]]
    assert os.environ[STORAGE] == study.storage


@pytest.mark.slow
def test_kill_minus_nine_within_a_training_loses_nothing(write: Write) -> None:
    """The command in a process of its own, killed in the middle of a real Lightning training,
    three times over."""
    whole = searching(write("whole")).run(5)
    path = write("torn")
    storage = f"sqlite:///{path.parent}/runs/tiny.db"
    for number in (0, 2, 3):
        command = [sys.executable, "-c", DIES.format(number=number), "search", str(path)]
        worker = subprocess.run([*command, "--trials", "5"], capture_output=True, timeout=300)
        assert worker.returncode == -signal.SIGKILL, worker.stderr.decode()
        states = {t.number: t.state for t in load_study(storage, "tiny").trials}
        assert states == dict.fromkeys(range(number), "scored") | {number: "running"}
    torn = searching(path).run(5)
    assert rows(torn) == rows(whole)
