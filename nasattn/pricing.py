"""Every cost of a space's rows that an experiment names, by table: nothing is built or trained.

`macs`, `params` and `latency_s` add up over a row; `peak_memory_bytes` has its own rule.
"""

import itertools
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Self

import torch

from nasattn.architecture import NONE
from nasattn.chain import Budget, Chain
from nasattn.config import Experiment, mistaken
from nasattn.cost.latency_table import LatencyTable
from nasattn.cost.memory import MemoryTable, peaks_by_part
from nasattn.cost.table import CostTable, Values, excess
from nasattn.document import Source, check
from nasattn.errors import UserError
from nasattn.model import build, site_shapes
from nasattn.record import Cost
from nasattn.skeleton import LEFT_OUT, SUFFIX, position_of
from nasattn.space import SearchSpace

Row = Mapping[str, str]
Key = tuple[str, ...]  # a row's labels, in the space's order

DRAWS = 10_000  # after which a draw gives up
LISTED = 20_000  # spaces with at most so many feasible architectures are listed, to end exactly
BEHIND = ("head",)  # the part of a network behind its last block


class Pricing:
    """The costs of a space's rows: metric -> number, for the metrics that are asked for.

    margins: metric -> the error of its prediction, by which a limit on it is drawn tighter.
    """

    def __init__(
        self, space: SearchSpace, metrics: Sequence[str], latency: LatencyTable | None = None
    ) -> None:
        self.space, self.margins, self.context = space, dict[str, float](), dict[str, object]()
        self.table = space.table
        if "latency_s" in metrics:
            assert latency is not None, "the experiment names its table"
            latency.check_space(space)
            plain, added = latency.calibrated()
            entries = {item: {"latency_s": seconds} for item, seconds in added.items()}
            self.table = self.table.joined(CostTable(plain={"latency_s": plain}, entries=entries))
            self.margins["latency_s"] = latency.noise
            self.context["latency"] = dict(latency.context)
        self._peak = self._memory() if "peak_memory_bytes" in metrics else None

    @classmethod
    def of(cls, experiment: Experiment, space: SearchSpace) -> "Pricing":
        latency = None
        if "latency_s" in experiment.metrics:
            source = Source("latency: the table that `nasattn profile` makes")
            latency = check(LatencyTable, experiment.latency, source)
        return cls(space, experiment.metrics, latency)

    def __call__(self, row: Row) -> Values:
        values = self.table(row)
        return values if self._peak is None else {**values, **self._peak(row)}

    def cost(self, row: Row) -> Cost:
        """As a record, with what the figures stand for."""
        return Cost(values=self(row), context={**self.space.context, **self.context})

    @property
    def plain(self) -> Values:
        """The baseline's own."""
        return self({})

    @property
    def dearest(self) -> Values:
        """Of each metric what the dearest row costs: exactly, but for the memory of a space that
        varies its backbone, where it is the largest of the rows that differ from the baseline's in
        one parameter. (An inference peak is the largest of those of the single insertions.)"""
        most = self.table.plain | {
            m: self.table.plain[m] + self.chain.dearest(m) for m in self.table.plain
        }
        if self._peak is not None:
            most["peak_memory_bytes"] = max(
                self._peak({name: label})["peak_memory_bytes"]
                for name, labels in self.space.parameters.items()
                for label in labels
            )
        return most

    @cached_property
    def chain(self) -> Chain:
        """The space's canonical rows with the costs that add up, for budgets."""
        return self.space.priced(self.table)

    def budgets(self, limits: Mapping[str, float], *, lenient: bool = False) -> list[Budget]:
        """One a limit on a cost that adds up, the tightest first. lenient: see Chain.within."""
        found = []
        for metric, limit in limits.items():
            if metric in self.table.plain:
                slack = limit - self.table.plain[metric] - self.chain.cheapest(metric)
                found.append(self.chain.within(metric, slack, lenient=lenient))
        return sorted(found, key=lambda budget: budget.count)

    def _memory(self) -> Callable[[Row], Mapping[str, int]]:
        space = self.space
        if not space.skeleton:
            shapes = site_shapes(space.backbone, space.input)
            return MemoryTable.build(space.baseline(), shapes, space.choices)

        # Between two blocks of the backbone there is one map, whatever the blocks are. So what is
        # alive while one runs is its own, and a network is built only for those not seen before.
        parts: dict[tuple[str, ...], int] = {}
        sites = {
            p.name: [site for site in space.choices if position_of(site) == p.name]
            for p in space.skeleton.positions
        }

        def counted(row: Row) -> dict[str, int]:
            row = space.canonical(row)
            kept = [name for name in sites if row[name + SUFFIX] != LEFT_OUT]
            keys = [(n, row[n + SUFFIX], *(row[s] for s in sites[n])) for n in kept]
            if not parts.keys() >= set(keys):
                with torch.device("meta"):
                    network = build(space.decode(row))
                peaks = peaks_by_part(network, (1, *space.input), kept)
                parts.update(zip([*keys, BEHIND], peaks, strict=True))
            return {"peak_memory_bytes": max(parts[key] for key in (*keys, BEHIND))}

        return counted


class Candidates:
    """The architectures of a space that fit a budget, as rows: parameter -> label.

    asked: the budget's limits; limits: the same, less what a prediction may be wrong by.
    """

    def __init__(self, pricing: Pricing, limits: Mapping[str, float]) -> None:
        self.pricing, self.space, self.asked = pricing, pricing.space, limits
        self.limits = {m: limit - pricing.margins.get(m, 0.0) for m, limit in limits.items()}
        self.refused = 0

    @classmethod
    def of(cls, experiment: Experiment, space: SearchSpace) -> Self:
        """Those of an experiment, whose limits may be relative to the plain backbone."""
        pricing = Pricing.of(experiment, space)
        budget = experiment.budget.items()
        return cls(pricing, {str(m): limit.resolve(pricing.plain[m]) for m, limit in budget})

    def fits(self, row: Row) -> bool:
        return not excess(self.pricing(row), self.limits)

    def admits(self, row: Row) -> bool:
        """Within `max_blocks` and the budget; what is not is counted in `refused`."""
        admitted = self.space.sparse(row) and self.fits(row)
        self.refused += not admitted
        return admitted

    @cached_property
    def budgets(self) -> list[Budget]:
        """Draws walk along the tightest one's table, the others refuse."""
        return self.pricing.budgets(self.limits)

    @cached_property
    def listed(self) -> list[dict[str, str]] | None:
        """All of them when they are few, in the space's order; else None."""
        if not self.limits and self.space.size() > LISTED:
            return None
        if len(self.limits) == len(self.budgets) == 1 and self.budgets[0].count > LISTED:
            return None
        few = list(itertools.islice(self._all(), LISTED + 1))
        return few if len(few) <= LISTED else None

    def count(self) -> int | None:
        return None if self.listed is None else len(self.listed)

    def draw(self, rng: random.Random, seen: Collection[Key]) -> dict[str, str] | None:
        """One that was not seen, uniformly; None when all were, or when 10,000 draws found none."""
        if self.listed is not None:
            fresh = [row for row in self.listed if tuple(row.values()) not in seen]
            return rng.choice(fresh) if fresh else None
        for _ in range(DRAWS):
            row = self.budgets[0].sample(rng) if self.budgets else self.space.chain.sample(rng)
            if tuple(row.values()) not in seen and self.admits(row):
                return row
        return None

    def thinned(self, row: Row, rng: random.Random) -> dict[str, str]:
        """The row without as many of its blocks, at random, as are too many to be admitted."""
        thin = self.space.canonical(row)
        placed = [site for site in self.space.choices if thin[site] != NONE]
        rng.shuffle(placed)
        admitted = self.admits(thin)
        while placed and not admitted:
            thin[placed.pop()] = NONE
            admitted = self.space.sparse(thin) and self.fits(thin)
        return thin

    def neighbours(self, row: Row) -> list[dict[str, str]]:
        """Those that differ from `row` (feasible or not) in one parameter."""
        changed = (
            self.space.canonical({**row, name: label})
            for name in row
            for label in self.space.parameters[name]
            if label != row[name]
        )
        return [near for near in changed if near != row and self.admits(near)]

    def refuse_empty(self) -> None:
        """UserError when the budget leaves nothing to search, with the cheapest's excess."""
        if not self.limits or len(list(itertools.islice(self._all(), 2))) > 1:
            return
        baseline: dict[str, str] = {}
        what, over = "the plain backbone", excess(self.pricing(baseline), self.limits)
        if not over or self.space.skeleton:
            what = "the cheapest change of the plain backbone"
            over = min(
                (
                    excess(self.pricing({name: label}), self.limits)
                    for name, label in self.pricing.table.entries
                    if label != self.space.parameters[name][0]
                ),
                key=lambda e: sum(value / self.limits[m] for m, value in e.items()),
            )
        parts = [
            f"{metric} by {round(value, 4):,.15g} ({round(self.limits[metric], 4):,.15g} allowed, "
            f"the plain backbone has {self.pricing.plain[metric]:,.15g})"
            for metric, value in over.items()
        ]
        hints = [mistaken(self.limits[m], self.pricing.plain[m]) for m in over]
        raise UserError(
            f"budget: nothing fits; {what} exceeds {' and '.join(parts)}{''.join(hints)}"
        )

    def _all(self) -> Iterator[dict[str, str]]:
        rows = self.pricing.chain.rows(self.pricing.budgets(self.limits, lenient=True))
        return (row for row in rows if self.fits(row))

    def fitting(self, draws: int = 2000) -> tuple[float, float, float]:
        """How many architectures fit: (count, least, most). The three are equal where it is exact:
        for few architectures, or one budget whose units need no rounding. Else the most and the
        least hold what the rounding and the sampling (two standard errors) leave open."""
        if self.listed is not None:
            return (len(self.listed),) * 3
        if not self.limits:
            return (self.space.size(),) * 3
        most: float = self.space.size()  # what only the peak memory limits is drawn from all
        of, sample = most, self.space.chain.sample
        if self.budgets:
            strict = self.budgets[0]
            if strict.exact and len(self.limits) == 1:
                return (strict.count,) * 3
            most = self.pricing.budgets(self.limits, lenient=True)[0].count
            of, sample = strict.count, strict.sample
        rng = random.Random(0)
        share = sum(self.fits(sample(rng)) for _ in range(draws)) / draws
        error = 2 * (share * (1 - share) / draws + 1 / draws**2) ** 0.5
        return (of * share, of * max(0.0, share - error), most * min(1.0, share + error))
