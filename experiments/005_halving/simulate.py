"""Halving on the table of curves.csv, against training everything to the end: simulated searches.

    python simulate.py [RUNS] [ETA]      prints medians (ranges) over the runs

One worker, architectures in random order; a run sees the rows of one seed (of those that are whole,
in turn). Epochs: those spent, decays counted, over those of training everything without rungs.
Hypervolume: of the scored trials' frontier over that of the whole table's, by the accuracies of the
run's own seed, or by the mean of the seeds that the run did not see: there luck is no gain.
"""

import csv
import random
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median

from nasattn.architecture import Architecture
from nasattn.config import Experiment
from nasattn.evaluate.table import TableEvaluator
from nasattn.pareto import hypervolume, non_dominated
from nasattn.record import Score, Trial
from nasattn.search.stopping import ParetoHalving, reached
from nasattn.space import SearchSpace

HERE = Path(__file__).parent
SHARES = (0.95, 0.99)
# Epochs spent, and the hypervolume's share of the whole table's: by the run's seed, by the others.
Course = list[tuple[int, float, float]]


class Table:
    """The space, its costs, and one seed's trainings. others: the seeds that judge."""

    def __init__(self, repeat: int, others: Sequence[int]) -> None:
        self.experiment = Experiment.load(HERE / "curves.yaml")
        space = SearchSpace.of(self.experiment.space)
        self.evaluate = TableEvaluator(HERE / "curves.csv", repeat)
        self.judges = [TableEvaluator(HERE / "curves.csv", other) for other in others]
        self.plain = space.baseline()
        self.every = [a for a in space.enumerate() if a.key in self.evaluate.rows]
        self.costs = {a.key: space.cost(a) for a in self.every}
        self.dearest = max(cost.values["macs"] for cost in self.costs.values())
        self.baseline = self.score(self.plain, None).accuracy
        self.whole = [self.trial(i, a, self.score(a, None)) for i, a in enumerate(self.every)]
        self.full = self.volume(self.whole)
        self.full_judged = self.judged(self.whole) if self.judges else float("nan")

    def score(self, architecture: Architecture, rung: int | None) -> Score:
        return _looked_up(self.evaluate, architecture, rung)

    def trial(self, number: int, architecture: Architecture, score: Score | None) -> Trial:
        cost = self.costs[architecture.key]
        state = "scored" if score else "running"
        return Trial(number=number, architecture=architecture, cost=cost, score=score, state=state)

    def order(self, seed: int) -> list[Architecture]:
        others = [a for a in self.every if a != self.plain]
        random.Random(seed).shuffle(others)
        return [self.plain, *others]

    def volume(self, trials: Sequence[Trial]) -> float:
        return hypervolume(self._points(trials), [-self.baseline, self.dearest])

    def point(self, spent: int, trials: Sequence[Trial]) -> tuple[int, float, float]:
        others = self.judged(trials) / self.full_judged if self.judges else float("nan")
        return spent, self.volume(trials) / self.full, others

    def judged(self, trials: Sequence[Trial]) -> float:
        """The hypervolume of the trials' frontier by the other seeds."""
        scored = [t for t in trials if t.score]
        if not scored:
            return 0.0
        kept = non_dominated(self._points(scored))
        front = [t for t, on_it in zip(scored, kept, strict=True) if on_it]
        points = [[-self._judge(t.architecture), t.cost.values["macs"]] for t in front]
        return hypervolume(points, [-self._judge(self.plain), self.dearest])

    def _judge(self, architecture: Architecture) -> float:
        return fmean(_looked_up(judge, architecture, None).accuracy for judge in self.judges)

    def _points(self, trials: Sequence[Trial]) -> list[list[float]]:
        return [[-t.score.accuracy, t.cost.values["macs"]] for t in trials if t.score]


def _looked_up(table: TableEvaluator, architecture: Architecture, rung: int | None) -> Score:
    return table(architecture, lambda share, accuracy: None, rung=rung)[0]


def everything(table: Table, order: Sequence[Architecture]) -> Course:
    """Each architecture is trained to the end, without rungs."""
    trials: list[Trial] = []
    course, spent = [], 0
    for number, architecture in enumerate(order):
        score = table.score(architecture, None)
        trials.append(table.trial(number, architecture, score))
        spent += score.epochs
        course.append(table.point(spent, trials))
    return course


def halved(
    table: Table, order: Sequence[Architecture], halving: ParetoHalving
) -> tuple[Course, list[Trial]]:
    """As the loop does it: a stopped trial that may go on comes before a new one."""
    trials: list[Trial] = []
    course, spent, last = [], 0, len(halving.rungs) - 1
    while True:
        trial = halving.promotable(trials, all_begun=len(trials) == len(order))
        if trial is None:
            if len(trials) == len(order):
                return course, trials
            trial = table.trial(len(trials), order[len(trials)], None)
            trials.append(trial)
        while not trial.score:
            level = len(reached(trial))
            score = table.score(trial.architecture, level)
            spent += score.epochs - (trial.partial.epochs if trial.partial else 0)
            if level == last:
                trial = replace(trial, score=score, partial=None, state="scored")
            else:
                trial = replace(trial, partial=score, state="running")
            trials[trial.number] = trial
            all_begun = len(trials) == len(order)
            if not trial.score and not halving.goes_on(trial, trials, all_begun=all_begun):
                trials[trial.number] = replace(trial, state="stopped")
                break
        course.append(table.point(spent, trials))


def reach(course: Course, share: float, judge: int) -> float:
    """Epochs until a share is reached, by the run's seed (1) or by the others (2)."""
    return next((point[0] for point in course if point[judge] >= share), float("inf"))


def simulate(table: Table, seed: int, eta: float | None) -> dict[str, float]:
    order, experiment = table.order(seed), table.experiment
    halving = ParetoHalving(experiment.rungs, eta or experiment.search.eta, experiment.costs)
    whole, (course, trials) = everything(table, order), halved(table, order, halving)
    epochs = whole[-1][0]
    ended = sum(bool(t.score) for t in trials) / len(trials)
    row = {"epochs": course[-1][0] / epochs, "trained to the end": ended}
    for judge, name in ((1, "by its seed"), (2, "by others"))[: 1 + bool(table.judges)]:
        row[f"hypervolume {name}"] = course[-1][judge]
        for share in SHARES:
            spent, without = reach(course, share, judge), reach(whole, share, judge)
            row[f"epochs to {share} {name}"] = spent / epochs
            row["  without halving" + " " * len(row)] = without / epochs
            row["  ratio" + " " * len(row)] = spent / without
    return row


def main(runs: int, eta: float | None) -> None:
    with (HERE / "curves.csv").open(newline="") as file:
        counts = Counter(int(row["repeat"]) for row in csv.DictReader(file))
    repeats = [r for r, count in sorted(counts.items()) if count == max(counts.values())]
    tables = [Table(r, [o for o in repeats if o != r]) for r in repeats]
    shown = eta or tables[0].experiment.search.eta
    print(f"seeds {repeats} of {max(counts.values())} placements; {runs} runs, eta {shown:g}")
    rows = [simulate(tables[run % len(tables)], run, eta) for run in range(runs)]
    show(rows)


def show(rows: Sequence[Mapping[str, float]]) -> None:
    """Medians and ranges over the runs."""
    for name in rows[0]:
        found = [row[name] for row in rows]
        short = sum(value < SHARES[-1] for value in found)
        told = f", {short} below {SHARES[-1]}" if name.startswith("hypervolume") else ""
        never = found.count(float("inf"))
        told += f", {never} never" if never else ""
        extent = f"({min(found):.3f} to {max(found):.3f})"
        print(f"{name:38}  {median(found):.3f}  {extent}{told}", flush=True)


if __name__ == "__main__":
    given = sys.argv[1:]
    main(int(given[0]) if given else 20, float(given[1]) if len(given) > 1 else None)
