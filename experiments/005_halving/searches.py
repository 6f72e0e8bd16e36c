"""Whole searches on the table of curves.csv: each sampler, with halving and without.

    python searches.py [RUNS]      prints medians (ranges) over the runs, about 1.5 minutes a run

It is the search as users run it, through the database; a training is looked up. Epochs and
hypervolume as in simulate.py: over training everything, by the run's own seed or the two others.
"""

import sys
import tempfile
from typing import Any

from rich.console import Console
from simulate import HERE, SHARES, Course, Table, reach, show

from nasattn.architecture import Architecture
from nasattn.config import Experiment
from nasattn.document import load_yaml
from nasattn.evaluate import Tick
from nasattn.evaluate.table import TableEvaluator
from nasattn.record import Score
from nasattn.search.display import Display
from nasattn.search.loop import Search

SAMPLERS, STOPPINGS = ("random", "frontier"), ("none", "pareto_halving")
SPENT = (0.05, 0.1, 0.35)  # shares of all epochs after which the hypervolume is told


class Logged(TableEvaluator):
    """calls: what was trained, in order; rung None: to the end without rungs."""

    def __init__(self, repeat: int) -> None:
        super().__init__(HERE / "curves.csv", repeat)
        self.calls: list[tuple[Architecture, int | None, Score]] = []

    def __call__(
        self, architecture: Architecture, tick: Tick, *, rung: int | None = None, **unused: Any
    ) -> tuple[Score, dict[str, Any]]:
        score, weights = super().__call__(architecture, tick, rung=rung)
        self.calls.append((architecture, rung, score))
        return score, weights


def searched(table: Table, repeat: int, seed: int, sampler: str, stopping: str) -> Course:
    """Until every placement has been tried."""
    fields, _ = load_yaml(HERE / "curves.yaml")
    fields["space"] = load_yaml(HERE / fields["space"])[0]
    fields["data"] |= {"train": 64, "val": 64, "test": 64}  # which nobody looks at
    halving = fields["search"] if stopping != "none" else {}
    fields["search"] = {**halving, "sampler": sampler, "seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        fields["storage"] = f"sqlite:///{folder}/search.db"
        search = Search(Experiment.from_dict(fields), Display(Console(quiet=True)))
        search.evaluator = evaluator = Logged(repeat)  # type: ignore[assignment]
        search.run(len(table.every))
    spent, course, trials = dict[str, int](), [], []
    for architecture, rung, score in evaluator.calls:
        spent[architecture.key] = score.epochs
        if rung in (None, len(evaluator.rungs) - 1):
            trials.append(table.trial(len(trials), architecture, score))
        course.append(table.point(sum(spent.values()), trials))
    return course


def main(runs: int) -> None:
    repeats = (0, 1, 2)
    tables = [Table(r, [o for o in repeats if o != r]) for r in repeats]
    for sampler in SAMPLERS:
        for stopping in STOPPINGS:
            rows: list[dict[str, float]] = []
            for run in range(runs):
                table, repeat = tables[run % len(repeats)], run % len(repeats)
                course = searched(table, repeat, run, sampler, stopping)
                every = len(table.every) * table.experiment.training.epochs
                row = {"epochs": course[-1][0] / every}
                for judge, name in ((1, "by its seed"), (2, "by others")):
                    for share in SHARES:
                        row[f"epochs to {share} {name}"] = reach(course, share, judge) / every
                    for share in SPENT:
                        best = [p[judge] for p in course if p[0] <= share * every][-1]
                        row[f"after {share:.0%} of the epochs {name}"] = best
                    row[f"at the end {name}"] = course[-1][judge]
                rows.append(row)
            print(f"sampler {sampler}, stopping {stopping}, {runs} runs", flush=True)
            show(rows)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
