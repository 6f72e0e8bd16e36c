"""Evaluation by a table of real trainings that were done before: samplers, stopping and resume are
tested in seconds. The table is made by experiments/005_halving."""

import csv
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from nasattn.architecture import Architecture
from nasattn.errors import TrialFailed, UserError
from nasattn.evaluate import Tick
from nasattn.evaluate.candidate import Weights
from nasattn.record import Score


class TableEvaluator:
    """Takes the place of an Evaluator: the same calls, the same scores, but for the weights.

    path: a CSV file of a row a training; repeat: which of each architecture's (None: the mean of
    all). A UserError when the file is none such.
    """

    name = "table"
    stored = True  # nothing to prepare

    def __init__(self, path: Path, repeat: int | None = 0) -> None:
        try:
            with path.open(newline="") as file:
                rows = list(csv.DictReader(file))
            self.rungs = tuple(
                int(name.removeprefix("rung_")) for name in rows[0] if name.startswith("rung_")
            )
            self.rows: dict[str, dict[int, Mapping[str, str]]] = {}
            for row in rows:
                if repeat is None or int(row["repeat"]) == repeat:
                    self.rows.setdefault(row["key"], {})[int(row["repeat"])] = row
        except (OSError, LookupError, ValueError) as error:
            raise UserError(f"{path}: no table of learning curves: {error}") from None

    def __call__(
        self, architecture: Architecture, tick: Tick, *, rung: int | None = None, **unused: Any
    ) -> tuple[Score, Weights]:
        """As Evaluator's. Raises TrialFailed where the table has no such architecture."""
        if architecture.key not in self.rows:
            raise TrialFailed(f"the table has no training of {architecture.key}")
        rows = self.rows[architecture.key]
        score = Score.mean([self._score(rows[repeat], rung) for repeat in sorted(rows)])
        tick(1.0, score.accuracy)
        return score, {}

    def prepare(self, tick: Tick) -> None:
        pass

    def estimate(self, trainings: float, *, prepare: bool) -> float:
        """Seconds, as they were when the table was made."""
        each = [float(row["seconds"]) for rows in self.rows.values() for row in rows.values()]
        return trainings * sum(each) / max(1, len(each))

    def _score(self, row: Mapping[str, str], rung: int | None) -> Score:
        """rung None: of a training that stops at no rung on its way."""
        reached = self.rungs if rung is None else self.rungs[: rung + 1]
        accuracies = tuple(float(row[f"rung_{r}"]) for r in reached)
        spent = {r: int(row[f"spent_{r}"]) for r in self.rungs}
        end = reached[-1]
        curve = [float(a) for a in row["curve"].split()]
        if end != self.rungs[-1]:  # the trunk alone: the rung's own decay is another path
            decays = {a: (spent[b] - b) - (spent[a] - a) for a, b in pairwise(self.rungs)}
            curve = curve[: end - decays[end]]
        epochs = self.rungs[-1] if rung is None else spent[end]
        return Score(
            accuracy=accuracies[-1],
            curve=tuple(curve),
            epochs=epochs,
            seconds=float(row["seconds"]) * epochs / spent[self.rungs[-1]],
            seed=int(row["seed"]),
            evaluator=self.name,
            rungs=() if rung is None else accuracies,
        )
