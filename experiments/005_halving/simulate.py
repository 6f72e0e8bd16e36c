"""Halving on the table of curves.csv, against training everything to the end: simulated searches.

    python simulate.py [RUNS] [ETA]

One worker, architectures in random order; a run sees the rows of one seed (those that are whole, in
turn). Epochs are those spent, decays counted. Hypervolume: of the scored trials, over that of the
whole table, by the same seed's accuracies; `others` judges the frontier that was found by the mean
accuracy of the seeds that the run did not see, over the same for training everything: luck of the
one seed is no gain there.
"""

import csv
import random
import sys
from collections import Counter
from collections.abc import Sequence
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
Course = list[tuple[int, float]]  # epochs spent, share of the whole table's hypervolume


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

    def judged(self, trials: Sequence[Trial]) -> float:
        """The hypervolume of the trials' frontier by the other seeds."""
        points = self._points(trials)
        scored = [t for t in trials if t.score]
        front = [t for t, kept in zip(scored, non_dominated(points), strict=True) if kept]
        seen = [(self._judge(t.architecture), t.cost.values["macs"]) for t in front]
        reference = [-self._judge(self.plain), self.dearest]
        return hypervolume([[-accuracy, macs] for accuracy, macs in seen], reference)

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
        course.append((spent, table.volume(trials) / table.full))
    return course


def halved(
    table: Table, order: Sequence[Architecture], halving: ParetoHalving
) -> tuple[Course, list[Trial]]:
    """As the loop does it: a stopped trial that may go on comes before a new one."""
    trials: list[Trial] = []
    course, spent, last = [], 0, len(halving.rungs) - 1
    while True:
        trial = halving.promotable(trials)
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
            if not trial.score and not halving.goes_on(trial, trials):
                trials[trial.number] = replace(trial, state="stopped")
                break
        course.append((spent, table.volume(trials) / table.full))


def reach(course: Course, share: float) -> float:
    return next((spent for spent, volume in course if volume >= share), float("inf"))


def simulate(table: Table, seed: int, eta: float | None) -> dict[str, float]:
    order, experiment = table.order(seed), table.experiment
    halving = ParetoHalving(experiment.rungs, eta or experiment.search.eta, experiment.costs)
    whole, (course, trials) = everything(table, order), halved(table, order, halving)
    epochs = whole[-1][0]
    row = {"all: epochs": course[-1][0] / epochs, "all: hypervolume": course[-1][1]}
    if table.judges:
        row["all: hypervolume, others"] = table.judged(trials) / table.judged(table.whole)
    row["all: trained to the end"] = sum(bool(t.score) for t in trials) / len(trials)
    for share in SHARES:
        row[f"to {share}: epochs"] = reach(course, share) / epochs
        row[f"to {share}: without halving"] = reach(whole, share) / epochs
        row[f"to {share}: ratio"] = reach(course, share) / reach(whole, share)
    return row


def main(runs: int, eta: float | None) -> None:
    with (HERE / "curves.csv").open(newline="") as file:
        counts = Counter(int(row["repeat"]) for row in csv.DictReader(file))
    repeats = [r for r, count in sorted(counts.items()) if count == max(counts.values())]
    tables = [Table(r, [o for o in repeats if o != r]) for r in repeats]
    print(f"seeds {repeats} of {max(counts.values())} placements; {runs} runs, eta {eta or 3:g}")
    rows = [simulate(tables[run % len(tables)], run, eta) for run in range(runs)]
    for name in rows[0]:
        found = [row[name] for row in rows]
        print(f"{name:>26}  median {median(found):.3f}  {min(found):.3f} to {max(found):.3f}")


if __name__ == "__main__":
    given = sys.argv[1:]
    main(int(given[0]) if given else 20, float(given[1]) if len(given) > 1 else None)
