"""What is known of a candidate: its cost, its score, its trial. Plain data with a JSON form."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, stdev
from typing import Any, Literal

from nasattn.architecture import Architecture

State = Literal["running", "scored", "stopped", "failed"]
FINISHED: tuple[State, ...] = ("scored", "stopped", "failed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Metric -> number in base units (`macs`: multiply-adds of one image; `params`), and under what
    circumstances it was taken (input shape, counter; where measured: device, threads, versions)."""

    values: Mapping[str, int | float]
    context: Mapping[str, Any] = field(default_factory=dict)

    def within(self, limits: Mapping[str, float]) -> bool:
        """Whether it fits a budget: limits in base units, inclusive."""
        return all(self.values[metric] <= limit for metric, limit in limits.items())


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """How well a candidate does. `accuracy` is top-1 on validation data, the mean over repeats.

    `curve` is the accuracy after each epoch, `rungs` the annealed one at each rung reached so far,
    `epochs` all that were trained (a rung's decay too), `seconds` the wall time of the training,
    `seed` that of the first repeat. `repeats` holds each repeat's own score where there is more
    than one.
    """

    accuracy: float
    curve: tuple[float, ...]
    epochs: int
    seconds: float
    seed: int
    evaluator: str
    top5: float | None = None
    rungs: tuple[float, ...] = ()
    repeats: tuple["Score", ...] = ()

    @classmethod
    def mean(cls, scores: Sequence["Score"]) -> "Score":
        """One score of several repeats: means of the accuracies, sums of epochs and seconds."""
        if len(scores) == 1:
            return scores[0]
        top5 = [s.top5 for s in scores if s.top5 is not None]
        return cls(
            accuracy=fmean(s.accuracy for s in scores),
            curve=tuple(fmean(point) for point in zip(*(s.curve for s in scores), strict=True)),
            epochs=sum(s.epochs for s in scores),
            seconds=sum(s.seconds for s in scores),
            seed=scores[0].seed,
            evaluator=scores[0].evaluator,
            top5=fmean(top5) if top5 else None,
            rungs=tuple(fmean(rung) for rung in zip(*(s.rungs for s in scores), strict=True)),
            repeats=tuple(scores),
        )

    @property
    def accuracies(self) -> tuple[float, ...]:
        return tuple(s.accuracy for s in self.repeats) or (self.accuracy,)

    @property
    def spread(self) -> float | None:
        """Sample standard deviation over the repeats; None for a single one: it is unknown."""
        return stdev(self.accuracies) if len(self.accuracies) > 1 else None

    @property
    def text(self) -> str:
        """`0.9512 ± 0.0031 (n=3)`, or `0.9512 (one seed)`."""
        if self.spread is None:
            return f"{self.accuracy:.4f} (one seed)"
        return f"{self.accuracy:.4f} ± {self.spread:.4f} (n={len(self.accuracies)})"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Score":
        repeats = tuple(cls.from_dict(f) for f in fields.get("repeats", ()))
        lists = {name: tuple(fields.get(name, ())) for name in ("curve", "rungs")}
        return cls(**{**fields, **lists, "repeats": repeats})


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One slot of a study: an architecture, its cost and, once finished, how it did or why not.

    partial: the score so far of a trial that is running or stopped between rungs."""

    number: int
    architecture: Architecture
    cost: Cost
    score: Score | None
    state: State
    reason: str = ""
    partial: Score | None = None

    @property
    def known(self) -> Score | None:
        """The score, or as much of it as there is."""
        return self.score or self.partial

    @property
    def baseline(self) -> bool:
        """Trial 0 is the plain backbone."""
        return self.number == 0

    def as_dict(self) -> dict[str, Any]:
        """A row of `nasattn pareto --json`."""
        return {
            "number": self.number,
            "key": self.architecture.key,
            "accuracy": self.score.accuracy if self.score else None,
            "spread": self.score.spread if self.score else None,
            "seeds": len(self.score.accuracies) if self.score else 0,
            "cost": dict(self.cost.values),
            "placements": self.architecture.specs,
            "baseline": self.baseline,
            "state": self.state,
        }


def amount(cost: int | float) -> str:
    """As people read it: what is counted in full, a time to four digits."""
    return f"{cost:,}" if isinstance(cost, int) else f"{cost:.4g}"


def counted(count: int, what: str) -> str:
    """`1 trial`, `2 trials`."""
    return f"{count} {what}{'' if count == 1 else 's'}"
