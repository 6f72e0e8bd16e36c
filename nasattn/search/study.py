"""A study as its database holds it. Reading needs no torch; all is derived from the rows."""

import csv
import hashlib
import io
import itertools
import json
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from numpy.typing import ArrayLike
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Engine

from nasattn.architecture import Architecture
from nasattn.config import Experiment, differences
from nasattn.errors import UserError
from nasattn.files import Files, replace_file
from nasattn.pareto import hypervolume, non_dominated
from nasattn.record import FINISHED, Cost, Score, State, Trial, counted
from nasattn.search.database import shown, sqlite_path
from nasattn.search.final import (
    Evaluation,
    all_done,
    contenders,
    evaluations,
    progress,
    summarise,
)
from nasattn.search.lease import Heartbeats, workers
from nasattn.search.rows import Database
from nasattn.search.stopping import ParetoHalving
from nasattn.skeleton import changes

# The attribute of a study that holds the experiment and the space's costs, and of a row that holds
# its slot, architecture and cost: one attribute, so that a row is ours whole or not at all.
FACTS = "nasattn"
SCORE, PARTIAL, REASON, REMARKS = "score", "partial", "reason", "remarks"
TOKEN = "token"  # of a row: what its weights say that they are of
REMARK = "remark:"  # attributes of a study, each a text under a name of its own
TROUBLE = "trouble"  # the attribute of why a worker ended before the study was complete

STATES: Mapping[TrialState, State] = {
    TrialState.COMPLETE: "scored",
    TrialState.PRUNED: "stopped",
    TrialState.FAIL: "failed",
    TrialState.RUNNING: "running",
    TrialState.WAITING: "running",
}
# How a search is run: it neither decides what is proposed nor how it is judged, and leaves nothing
# to do for a study that is complete.
RUN = ("search.trials", "search.workers", "storage", "data.loaders")


class Study:
    """The records of one search, and what follows from them.

    `trials` has one row a slot, in order; `config` is the experiment; `facts` what was known before
    the first training: `plain` (the backbone's cost), `limits` (the budget in base units),
    `cheapest` and `reference` (the objectives' costs at the ends of the space, for the
    hypervolume).
    """

    def __init__(self, study: optuna.Study, storage: str) -> None:
        self.optuna = study
        self.name = study.study_name
        self.storage = storage
        self.notes: list[str] = []  # what a search should say of how it was opened
        self.files = Files()  # who works on them shares them first: nasattn.search.artifacts
        self._finished: dict[int, Trial] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read anew what the study was asked to do."""
        facts = self.optuna.user_attrs.get(FACTS)
        if facts is None:
            raise UserError(
                f"the study '{self.name}' in {shown(self.storage)} was not made by nasattn"
            )
        self.facts: Mapping[str, Any] = facts
        stored = facts["experiment"] | {"storage": self.storage}
        self.config = Experiment.from_dict(stored, f"study '{self.name}'")

    @property
    def asked(self) -> int:
        """How many trials there are to be, as it is stored now."""
        return int(self.optuna.user_attrs[FACTS]["experiment"]["search"]["trials"])

    @property
    def trials(self) -> list[Trial]:
        return self.read(self.rows())

    def rows(self) -> list[FrozenTrial]:
        """Optuna's row of each slot, in order; the latest of a trial that was promoted."""
        latest = {
            row.user_attrs[FACTS]["slot"]: row
            for row in self.optuna.get_trials(deepcopy=False)
            if FACTS in row.user_attrs
        }
        return [latest[slot] for slot in sorted(latest)]

    def read(self, rows: Sequence[FrozenTrial]) -> list[Trial]:
        """The records of rows; a finished one is read once."""
        for row in rows:
            if row.state.is_finished() and row.number not in self._finished:
                self._finished[row.number] = read_trial(row)
        return [self._finished.get(row.number) or read_trial(row) for row in rows]

    @property
    def folder(self) -> Path:
        """Where the study's files stand: beside a sqlite database, else in ./runs."""
        database = sqlite_path(self.storage)
        return (database.parent if database else Path("runs")) / self.name

    def frontier(self, trials: Sequence[Trial] | None = None) -> list[Trial]:
        """The scored trials that no other dominates, best accuracy last. Where the space varies the
        backbone, the plain one may be over the budget: it is no candidate then."""
        limits = self.facts["limits"]
        trials = self.trials if trials is None else trials
        scored = [t for t in trials if t.score and t.cost.within(limits)]
        if not scored:
            return []
        if len({t.score.evaluator for t in scored if t.score}) > 1:
            raise AssertionError("scores of different evaluators cannot share a frontier")
        return self.front_of(scored)

    def front_of(
        self, trials: Sequence[Trial], found: Mapping[str, float] | None = None
    ) -> list[Trial]:
        """Those that no other dominates, best accuracy last; found: as in `points`."""
        points = self.points(trials, found)
        rows = zip(trials, points, non_dominated(points), strict=True)
        front = [(-point[0], -trial.number, trial) for trial, point, keep in rows if keep]
        return [trial for *_, trial in sorted(front, key=lambda member: member[:2])]

    def frontier_rows(self) -> list[dict[str, Any]]:
        """The frontier as `nasattn pareto --json` prints it. `final`: the row of `final`, with that
        of its control under `se`; None where there is none."""
        trials = self.trials
        final = self.final(trials)
        rows = {row["key"]: row for row in final["rows"]} if final else {}
        again = {key: row | {"se": rows.get(row["control"])} for key, row in rows.items()}
        front = self.frontier(trials)
        return [self._told(t) | {"final": again.get(t.architecture.key)} for t in front]

    def _told(self, trial: Trial) -> dict[str, Any]:
        """A trial as plain data. `backbone`: where its own blocks are not the plain one's, position
        -> label."""
        changed = changes(self.config.space, trial.architecture.backbone)
        return trial.as_dict() | {"backbone": changed}

    def hypervolume(self, trials: Sequence[Trial] | None = None) -> float | None:
        """Share of the box between the baseline's accuracy and 1, and between the cheapest
        architecture's cost and the reference, that the frontier dominates; None before there is a
        baseline."""
        trials = self.trials if trials is None else trials
        baseline = next((t for t in trials if t.baseline and t.score), None)
        if baseline is None:
            return None
        return self._share(self.points([t for t in trials if t.score]), baseline)

    def growth(self, trials: Sequence[Trial], parts: int = 24) -> list[float]:
        """The hypervolume after each of so many equal parts of the scored trials."""
        scored = [t for t in trials if t.score]
        if not scored or not scored[0].baseline:
            return []
        points = np.array(self.points(scored))
        parts = min(parts, len(scored))
        ends = [len(scored) * (part + 1) // parts for part in range(parts)]
        front, volumes = points[:0], list[float]()
        for start, end in itertools.pairwise([0, *ends]):
            before, front = front, np.vstack([front, points[start:end]])
            front = front[non_dominated(front)]
            same = volumes and np.array_equal(front, before)
            volumes.append(volumes[-1] if same else self._share(front, scored[0]))
        return volumes

    def _share(self, points: ArrayLike, baseline: Trial) -> float:
        costs = [
            (self.facts["cheapest"][m], max(self.facts["reference"][m], self.facts["cheapest"][m]))
            for m in self.config.costs
        ]
        box = 1.0 - accuracy(baseline)
        for low, high in costs:
            box *= high - low
        reference = [-accuracy(baseline), *(high for _, high in costs)]
        return hypervolume(points, reference) / box if box > 0 else 0.0

    def over(self, total: int, trials: Sequence[Trial] | None = None) -> bool:
        """Whether nothing is left to do, of so many trials and of the `final`."""
        trials = self.trials if trials is None else trials
        if finished(trials) < total or self.promotable(trials):
            return False
        final = self.final_progress(trials)
        return final is None or all_done(final)

    def complete(self, experiment: Experiment, total: int) -> bool:
        """Whether a search for `experiment` of so many trials has nothing left to do: it is over,
        no trial waits, and it was asked for the same already. Where artifacts have a store, there
        may always be one to upload."""
        asked = self.config.search.trials == total and not self.edits(experiment, RUN)
        if not asked or experiment.artifacts:
            return False
        trials = self.trials
        return finished(trials) == len(trials) and self.over(total, trials)

    def edits(self, experiment: Experiment, free: Sequence[str]) -> list[str]:
        """What the experiment has otherwise than the study, but for the keys in `free`."""
        if experiment.search.stopping == self.config.search.stopping == "none":
            free = (*free, "search.eta")  # it says nothing there, and its default was another once
        old, new = self.config.as_dict(), experiment.as_dict()
        tables = [d.pop("latency", None) for d in (old, new)]
        lines = differences(old, new)
        used = "latency_s" in (*self.config.metrics, *experiment.metrics)
        if used and tables[0] != tables[1]:
            dates = [((t or {}).get("context") or {}).get("date") for t in tables]
            were = (
                f"of {date}" if date else "one without a date" if table else "nothing"
                for table, date in zip(tables, dates, strict=True)
            )
            lines.append("latency: another table: " + " -> ".join(were))
        return [line for line in lines if not line.startswith(tuple(f"{key}: " for key in free))]

    def promotable(self, trials: Sequence[Trial] | None = None) -> Trial | None:
        """The stopped trial that should go on next, when all have begun."""
        halving = ParetoHalving.of(self.config)
        trials = self.trials if trials is None else trials
        return halving.promotable(trials, all_begun=True) if halving else None

    def final(self, trials: Sequence[Trial] | None = None) -> dict[str, Any] | None:
        """What the re-evaluation of the final frontier gave so far, as plain data; None where the
        experiment does not ask for one.

        `rows`: the baseline, the frontier, its controls (SE at the same sites) and what was
        evaluated before it left the frontier. A row has for `val` and `test` the mean with its 95 %
        interval and n; paired by seed the `gain` over the baseline and `over_control`; the `gap`
        from the search's own accuracy down to it; and `membership`, the probability to be
        non-dominated, once all is done by two seeds or more: of the members and of a baseline that
        the budget allows. `judged`: by how many seeds, and who is left out of these `rivals`;
        `gap`: how far the frontier fell, and the baseline, and how much farther the one (`bias`).
        """
        trials = self.trials if trials is None else trials
        stored = evaluations(self.optuna.user_attrs)
        limits = self.facts["limits"]
        return summarise(self.config, limits, trials, self.frontier(trials), stored)

    def final_progress(
        self, trials: Sequence[Trial], stored: Mapping[tuple[str, int], Evaluation] | None = None
    ) -> dict[str, int] | None:
        """How many of its evaluations are asked for, done, and have failed. stored: those that
        there are, where they have been read already."""
        if self.config.final is None:
            return None
        planned = contenders(trials, self.frontier(trials))
        stored = evaluations(self.optuna.user_attrs) if stored is None else stored
        return progress(self.config.final, planned, stored)

    def completion(self) -> str:
        """That it is over, in words."""
        trials = self.trials
        count, final = sum(t.state == "failed" for t in trials), self.final_progress(trials)
        failed = f", {count} of them failed (--retry trains them again)" if count else ""
        if final and final["failed"]:
            of = f"{final['failed']} of {counted(final['evaluations'], 'evaluation')} of the final"
            failed += f"; {of} failed (--retry makes them again)"
        return f"the study '{self.name}' is complete: {counted(finished(trials), 'trial')}{failed}"

    def summary(self) -> dict[str, Any]:
        """How far the study is, as plain data."""
        trials, halving = self.trials, ParetoHalving.of(self.config)
        states = [t.state for t in trials]
        frontier = self.frontier(trials)
        return {
            "study": self.name,
            "finished": finished(trials),
            "trials": self.config.search.trials,
            **{state: states.count(state) for state in STATES.values()},
            "epochs": sum(t.known.epochs for t in trials if t.known),
            "architectures": int(self.facts["size"]),
            "best": accuracy(frontier[-1]) if frontier else None,
            "hypervolume": self.hypervolume(trials),
            "frontier": [t.number for t in frontier],
            "final": self.final(trials),
            "halving": halving.notes(trials, self.asked) if halving else [],
            "remarks": self.remarks() + self.troubles(),
            "workers": self.workers(),
            "failures": [
                {"number": t.number, "key": t.architecture.key, "reason": t.reason}
                for t in trials
                if t.state == "failed"
            ],
        }

    def workers(self, beats: Heartbeats | None = None) -> list[dict[str, Any]]:
        """What each live worker says of itself: host, pid, task, slot, share, accuracy, refused."""
        found = workers(self.engine, self.name, beats)
        return [{k: v for k, v in w.facts.items() if k not in ("place", "started")} for w in found]

    def remark(self, text: str, row: int | None = None) -> None:
        """Keep what there is to say of a training: with the study and, of a running trial's, by its
        row's id, with that too."""
        name = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        self.optuna.set_user_attr(REMARK + name, text)
        if row is None:
            return
        storage = self.optuna._storage
        told = storage.get_trial(row).user_attrs.get(REMARKS, [])
        if text not in told:
            storage.set_trial_user_attr(row, REMARKS, [*told, text])

    def reopen(self, opened: set[str]) -> None:
        """Have the evaluations of the `final` that failed made again, where it still asks for them.
        Their names come into `opened`, also where the database goes away half-way."""
        trials, final = self.trials, self.config.final
        asked = {c.architecture.key for c in contenders(trials, self.frontier(trials))}
        for (key, seed), evaluation in evaluations(self.optuna.user_attrs).items():
            if evaluation.reason and final and seed < final.seeds and key in asked:
                self.optuna.set_user_attr(evaluation.name, None)
                opened.add(evaluation.name)

    def trouble(self, text: str) -> None:
        """Keep why a worker ended before the study was complete, until another begins ("")."""
        if text or self.troubles():
            self.optuna.set_user_attr(TROUBLE, text)

    def troubles(self) -> list[str]:
        """What is kept so, if anything is."""
        return [text] if (text := self.optuna.user_attrs.get(TROUBLE)) else []

    def remarks(self) -> list[str]:
        """All that is kept so, each text once."""
        attributes = self.optuna.user_attrs
        return sorted(text for name, text in attributes.items() if name.startswith(REMARK) and text)

    def forget(self) -> None:
        """What was said of trainings, and the weights of the baseline, are not of the experiment as
        it is to be: it was edited before the baseline was told."""
        for name in self.optuna.user_attrs:
            if name.startswith((REMARK, TROUBLE)):
                self.optuna.set_user_attr(name, "")
        for row in self.rows():
            self.optuna._storage.set_trial_user_attr(row._trial_id, TOKEN, secrets.token_hex(8))

    @property
    def database(self) -> Database:
        storage = self.optuna._storage
        backend = getattr(storage, "_backend", storage)  # Optuna wraps it in a cache
        assert isinstance(backend, Database)
        return backend

    @property
    def engine(self) -> Engine:
        """Of the database."""
        return self.database.engine

    def points(
        self, trials: Sequence[Trial], found: Mapping[str, float] | None = None
    ) -> list[list[float]]:
        """What is minimised: -accuracy and the costs. found: architecture key -> accuracy, for the
        search's own."""
        accuracies = [found[t.architecture.key] if found else accuracy(t) for t in trials]
        costs = [[t.cost.values[m] for m in self.config.costs] for t in trials]
        return [[-a, *values] for a, values in zip(accuracies, costs, strict=True)]

    def write_frontier(self, frontier: Sequence[Trial] | None = None) -> None:
        """frontier.json and frontier.csv in the study's folder and, as the latest study's, beside
        the database; each replaced in one step, so that a reader never sees half a file."""
        frontier = self.frontier() if frontier is None else frontier
        rows = [self._told(t) for t in frontier]
        text = io.StringIO()
        metrics = list(self.facts["plain"])
        writer = csv.writer(text, lineterminator="\n")
        head, tail = ("number", "key", "accuracy", "spread", "seeds"), ("placements", "backbone")
        writer.writerow([*head, *metrics, *tail])
        for row in rows:
            costs = [row["cost"][m] for m in metrics]
            lists = ["; ".join(f"{at}: {what}" for at, what in row[k].items()) for k in tail]
            writer.writerow([*(row[k] for k in head), *costs, *lists])
        for folder in (self.folder, self.folder.parent):
            replace_file(folder / "frontier.json", json.dumps(rows, indent=2) + "\n")
            replace_file(folder / "frontier.csv", text.getvalue())

    def write_final(self) -> None:
        """final.json in the study's folder: what `final` returns; none where there is no final."""
        if (final := self.final()) is None:
            (self.folder / "final.json").unlink(missing_ok=True)
        else:
            replace_file(self.folder / "final.json", json.dumps(final, indent=2) + "\n")


def claim(slot: int, architecture: Architecture, cost: Cost) -> dict[str, Any]:
    """What makes an Optuna row the trial of a slot."""
    return {
        "slot": slot,
        "architecture": architecture.as_dict(),
        "cost": {"values": dict(cost.values), "context": dict(cost.context)},
    }


def accuracy(trial: Trial) -> float:
    if trial.score is None:
        raise ValueError(f"trial {trial.number} has no score")
    return trial.score.accuracy


def read_trial(row: FrozenTrial) -> Trial:
    """Our record of an Optuna row."""
    attrs = row.user_attrs
    state = STATES[row.state]
    score = Score.from_dict(attrs[SCORE]) if SCORE in attrs and state == "scored" else None
    partial = Score.from_dict(attrs[PARTIAL]) if PARTIAL in attrs and score is None else None
    return Trial(
        number=attrs[FACTS]["slot"],
        architecture=Architecture.of(attrs[FACTS]["architecture"]),
        cost=Cost(**attrs[FACTS]["cost"]),
        score=score,
        state=state,
        reason="" if score else attrs.get(REASON, ""),  # the baseline's may be of an earlier try
        partial=partial,
    )


def finished(trials: Sequence[Trial]) -> int:
    return sum(t.state in FINISHED for t in trials)
