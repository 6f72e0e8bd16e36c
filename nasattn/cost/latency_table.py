"""The latency of every architecture of a space on one machine, from a table of its blocks.

A network takes a + b * (plain + its blocks). The table is a file that also says where and how it
was measured, and how well it predicted networks that a and b were not fitted on.
"""

import random
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from nasattn.architecture import NONE, Architecture
from nasattn.config import differences
from nasattn.cost.calibration import Calibration, Network, calibrate
from nasattn.cost.latency import Latency
from nasattn.document import Strict, check, dump_yaml, load_yaml
from nasattn.errors import UserError
from nasattn.files import whole
from nasattn.skeleton import LEFT_OUT, SUFFIX, Skeleton

Entry = tuple[str, str]  # a parameter of the space and one of its labels

MOMENTARY = ("date", "load")  # of a context: what differs at any two moments of one machine
HEADER = """\
# A latency table of `nasattn profile`: seconds for one image. A network takes
# a + b * (plain + its blocks); `blocks` is by parameter and label of the search space.
"""
UNFINISHED = "it is unfinished; the nasattn profile that began it goes on when it is run again"


class Space(Protocol):
    """What is asked of a search space."""

    @property
    def parameters(self) -> Mapping[str, tuple[str, ...]]: ...
    @property
    def skeleton(self) -> Skeleton | None: ...
    def baseline(self) -> Architecture: ...
    def size(self) -> int: ...
    def sample(self, rng: random.Random) -> Architecture: ...
    def row_of(self, architecture: Architecture) -> dict[str, str] | None: ...


class LatencyTable(Strict):
    """What is known of the latencies of a space.

    plain_by_group: the 25th percentiles of the plain backbone's runs, group by group as they were
    read; their own fast quartile is the scale of the whole table. blocks: parameter -> label -> its
    latency. networks: by key.
    """

    context: dict[str, Any]
    calibration: Calibration | None = None
    baseline: dict[str, Any]
    plain: Latency
    plain_by_group: list[float]
    blocks: dict[str, dict[str, Latency]]
    networks: dict[str, Network]

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """A finished table from its file; a UserError says what is wrong with it."""
        table = check(cls, *load_yaml(Path(path)))
        if table.calibration is None:
            raise UserError(f"{path}: {UNFINISHED}")
        return table

    def save(self, path: str | Path) -> None:
        path = Path(path)
        text = dump_yaml(self.model_dump(), width=1000)
        try:
            with whole(path) as draft:
                draft.write_text(HEADER + text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from None

    def __call__(self, row: Mapping[str, str]) -> dict[str, float]:
        """`latency_s` of a row: parameter -> label, `none` included or left out."""
        return {"latency_s": self._line.a + self._line.b * self.uncalibrated(row)}

    def uncalibrated(self, row: Mapping[str, str]) -> float:
        """The plain backbone's seconds and what the row adds, before calibration."""
        placed = [item for item in row.items() if item[1] != NONE]
        if missing := [item for item in placed if item not in self.entries]:
            raise _missing(missing)
        return self.plain.seconds + sum(self.entries[item] for item in placed)

    @property
    def measured(self) -> dict[Entry, Latency]:
        """(parameter, label) -> its own latency."""
        return {(n, label): found for n, of in self.blocks.items() for label, found in of.items()}

    @property
    def zeros(self) -> dict[str, str]:
        """Position -> the label that its others are differences to: the plain backbone's."""
        return {n: next(iter(labels)) for n, labels in self.blocks.items() if n.endswith(SUFFIX)}

    @cached_property
    def entries(self) -> Mapping[Entry, float]:
        """(parameter, label) -> seconds that it adds to the plain backbone, before calibration: a
        block at a site all of its own, a backbone's block the difference to the first label's."""
        added, zeros = dict[Entry, float](), self.zeros
        for name, labels in self.blocks.items():
            seconds = {label: found.seconds for label, found in labels.items()}
            first = 0.0
            if name in zeros:
                first = seconds[zeros[name]]
                seconds[LEFT_OUT] = 0.0
            added |= {(name, label): value - first for label, value in seconds.items()}
        return added

    def summary(self) -> str:
        """What a person should know of it."""
        line, load = self._line, " to ".join(map(str, self.context["load"]))
        return (
            f"plain backbone {self.plain}; from {min(self.plain_by_group) * 1e3:.3f} to "
            f"{max(self.plain_by_group) * 1e3:.3f} ms in its groups, load {load}\n"
            f"latency = {line.a * 1e3:.3f} ms + {line.b:.3f} * sum, by {line.n_fit} networks\n"
            f"on {line.n_held_out} other networks: error {line.mape:.1%} in the mean, "
            f"within 5 %: {line.within_5:.0%}, within 10 %: {line.within_10:.0%}, "
            f"Kendall tau {line.kendall_tau:.2f}\n"
            f"margin of a budget: {line.noise * 1e3:.3f} ms"
        )

    def calibrated(self) -> tuple[float, dict[Entry, float]]:
        """The plain backbone's seconds and the entries such that a prediction is their mere sum."""
        a, b = self._line.a, self._line.b
        return a + b * self.plain.seconds, {item: b * s for item, s in self.entries.items()}

    @property
    def noise(self) -> float:
        """Seconds that a prediction is too low by in one case of twenty: the margin of a budget."""
        return self._line.noise

    @property
    def _line(self) -> Calibration:
        if self.calibration is None:
            raise UserError(f"the latency table: {UNFINISHED}")
        return self.calibration

    def check_space(self, space: Space) -> None:
        """UserError when it is of another plain backbone or lacks an entry that the space needs."""
        self.check_baseline(space.baseline())
        wanted = ((name, label) for name, labels in space.parameters.items() for label in labels)
        missing = [item for item in wanted if item[1] != NONE and item not in self.entries]
        if missing:
            raise _missing(missing)

    def check_baseline(self, plain: Architecture) -> None:
        """UserError when it is of another plain backbone, input or number of classes."""
        if changes := differences(self.baseline, plain.as_dict()):
            raise UserError(
                "the latency table is of another plain backbone (table -> space): "
                + ", ".join(changes)
            )

    def adding(self, found: Mapping[Entry, Latency]) -> Self:
        """The table with these blocks measured, which come before what it had for their parameter:
        of a backbone's own blocks the first is the plain one's."""
        blocks: dict[str, dict[str, Latency]] = {}
        for (name, label), latency in [*found.items(), *self.measured.items()]:
            blocks.setdefault(name, {}).setdefault(label, latency)
        return self.replaced(blocks=blocks)

    def settled(self) -> Self:
        """The finished table: on the scale of the plain backbone's fast groups (all else was read
        beside it, at whatever speed the machine then had), and calibrated.

        Raises LatencyRefused where blocks say nothing of networks.
        """
        factor = float(np.percentile(self.plain_by_group, 25)) / self.plain.seconds
        plain = self.plain.scaled(factor)
        networks = {key: network.scaled(factor) for key, network in self.networks.items()}
        return self.replaced(
            calibration=calibrate(plain.seconds, list(networks.values())),
            plain=plain,
            blocks={
                name: {label: found.scaled(factor) for label, found in labels.items()}
                for name, labels in self.blocks.items()
            },
            networks=networks,
        )

    def replaced(self, **changes: Any) -> Self:
        """The table with other values of some fields."""
        # Not by model_copy, which would take the cached entries along.
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self)(**(fields | changes))


def _missing(items: Sequence[Entry]) -> UserError:
    shown = ", ".join(f"{label} @ {name}" for name, label in items[:5])
    return UserError(
        f"the latency table is of another space: {len(items)} entries are missing: {shown}"
        f"{', ...' * (len(items) > 5)}; nasattn profile with this file as --out adds them"
    )


def check_context(table: LatencyTable, here: Mapping[str, Any]) -> list[str]:
    """What of the circumstances that last differs from the table's. here: `Target.context`."""
    then, now = (
        {key: value for key, value in context.items() if key not in MOMENTARY}
        for context in (table.context, here)
    )
    return [
        f"{key}: the table has {then.get(key, 'none')}, here it is {now.get(key, 'none')}"
        for key in {**then, **now}
        if then.get(key) != now.get(key)
    ]
