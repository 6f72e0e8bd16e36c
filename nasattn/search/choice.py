"""What `nasattn export --select` takes: `knee`, `best`, `trial=N` or a limit (`macs<=1.1x`)."""

import re
from collections.abc import Sequence
from functools import cached_property

from nasattn.config import Limit, mistaken
from nasattn.errors import UserError, suggest
from nasattn.pareto import knee
from nasattn.record import Trial
from nasattn.search.final import contenders, evaluations, means
from nasattn.search.study import Study


class Choice:
    """What a study's trials leave to choose from.

    means: architecture key -> mean accuracy on val in the `final`, once all of that is done, else
    empty; not on test, which is there to judge what these choose. front: what `knee`, `best` and a
    limit choose from, the most accurate last: the frontier or, where there are means, what of it
    and of the baseline is non-dominated by them.
    """

    def __init__(self, study: Study, trials: Sequence[Trial] | None = None) -> None:
        self.study, self.trials = study, study.trials if trials is None else trials
        front = study.frontier(self.trials)
        self.means: dict[str, float] = {}
        if study.config.final:
            planned, stored = contenders(self.trials, front), evaluations(study.optuna.user_attrs)
            self.means = means(study.config, study.facts["limits"], planned, stored)
        if self.means:
            judged = [t for t in self.trials if t.architecture.key in self.means]
            front = study.front_of(judged, self.means)
        self.front: list[Trial] = front

    @cached_property
    def knee(self) -> Trial:
        """The front's member that stands out most, of equal ones the most accurate. The plain
        backbone, for which nobody has to search, only where no other does anything else."""
        if not self.front:
            name = self.study.name
            raise UserError(f"the study '{name}' has no scored trial within its budget yet")
        plain = next((self._point(t) for t in self.front if t.baseline), None)
        others = [t for t in reversed(self.front) if self._point(t) != plain]
        members = others or [t for t in self.front if t.baseline]
        return members[knee([self._point(t) for t in members])]

    def named(self, name: str) -> Trial:
        """A UserError where there is none, or no such name."""
        if match := re.fullmatch(r"trial=(\d+)", name):
            scored = {t.number: t for t in self.trials if t.score}
            if int(match[1]) not in scored:
                raise UserError(f"trial {match[1]} has no score; scored: {_spans(list(scored))}")
            return scored[int(match[1])]
        named = {"knee": self.knee, "best": self.front[-1]}
        if name in named:
            return named[name]
        if match := re.fullmatch(r"(\w+)\s*<=\s*(\S+)", name):
            return self._within(match[1], match[2])
        raise UserError(
            f"--select: got '{name}'; allowed: knee, best, trial=N, or a limit such as macs<=1.1x"
            f"{suggest(name, named)}"
        )

    def _point(self, trial: Trial) -> list[float]:
        return self.study.points([trial], self.means)[0]

    def _within(self, metric: str, text: str) -> Trial:
        plain = self.study.facts["plain"]
        if metric not in plain:
            raise UserError(f"--select: unknown cost '{metric}'; allowed: {', '.join(plain)}")
        try:
            limit = Limit.parse(text).resolve(plain[metric])
        except ValueError as error:
            raise UserError(f"--select: {error}") from None
        fitting = [t for t in self.front if t.cost.values[metric] <= limit]
        if not fitting:
            least = min(t.cost.values[metric] for t in self.front)
            raise UserError(
                f"--select: nothing on the frontier has {metric} <= {limit:,.15g}; "
                f"the least is {least:,}{mistaken(limit, plain[metric])}"
            )
        return fitting[-1]


def _spans(numbers: Sequence[int]) -> str:
    """`0-3, 5`: sorted whole numbers for people."""
    spans: list[list[int]] = []
    for n in sorted(numbers):
        if spans and n == spans[-1][1] + 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in spans) or "none"
