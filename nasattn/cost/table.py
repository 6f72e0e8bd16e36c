"""The cost of every architecture of a space, from one entry a block and site.

An inserted block keeps its map's shape, so the backbone's and the blocks' costs add up exactly.
When a table is built, that is checked on one network, of another option at each site.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, reduce
from operator import add
from typing import Self

import torch

from nasattn.architecture import NONE, Architecture, Placement
from nasattn.cost.analytic import COUNTERS, count
from nasattn.model import Shape, block_inputs, build, make_block
from nasattn.skeleton import LEFT_OUT, SUFFIX, Skeleton, position_of

Values = dict[str, int | float]


@dataclass(frozen=True, slots=True, kw_only=True)
class CostTable:
    """plain: metric -> the backbone's own. entries: (site, spec) -> what a block adds, for each of
    plain's metrics."""

    plain: Values
    entries: Mapping[tuple[str, str], Values]
    _added: Mapping[str, Mapping[tuple[str, str], int | float]] = field(
        init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        # By metric: a search prices a thousand rows a proposal.
        added = {m: {item: v[m] for item, v in self.entries.items()} for m in self.plain}
        object.__setattr__(self, "_added", added)

    def __call__(self, specs: Mapping[str, str]) -> Values:
        """The cost of a row: site -> spec, `none` included or left out."""
        items = [item for item in specs.items() if item[1] != NONE]
        # Not sum: of floats it gives other last digits from Python 3.12 on.
        return {
            m: reduce(add, map(self._added[m].__getitem__, items), v) for m, v in self.plain.items()
        }

    def joined(self, other: "CostTable") -> "CostTable":
        """Both tables' metrics in one; the other has an entry for each of this one's."""
        entries = {item: {**values, **other.entries[item]} for item, values in self.entries.items()}
        return CostTable(plain={**self.plain, **other.plain}, entries=entries)

    @classmethod
    def build(
        cls,
        shapes: Mapping[str, Shape],
        choices: Mapping[str, tuple[str, ...]],
        decode: Callable[[Mapping[str, str]], Architecture],
        skeleton: Skeleton | None = None,
    ) -> Self:
        """Count each different (map, spec) once. shapes: site -> (1, C, H, W). decode: the
        architecture of a row, for the check that the entries add up."""

        @cache
        def counted(shape: Shape, spec: str) -> Values:
            with torch.device("meta"):
                block = make_block(Placement.parse("site", spec), shape[1])
            return count(block, shape)

        entries = {
            (site, spec): counted(shapes[site], spec)
            for site, specs in choices.items()
            for spec in specs
            if spec != NONE
        }
        plain = decode({})
        if skeleton:
            entries |= _variants(skeleton, plain)
        table = cls(plain=_whole(plain), entries=entries)
        table._check(choices, decode)
        return table

    def _check(
        self,
        choices: Mapping[str, tuple[str, ...]],
        decode: Callable[[Mapping[str, str]], Architecture],
    ) -> None:
        """In a whole network that is counted: each site has another label in its turn. (All labels
        of the shipped spaces are checked by test_cost.)"""
        labels: dict[str, list[str]] = {site: [] for site in choices}
        for name, label in self.entries:
            labels.setdefault(name, []).append(label)
        row = {name: of[turn % len(of)] for turn, (name, of) in enumerate(labels.items()) if of}
        row = {n: v for n, v in row.items() if row.get(f"{position_of(n)}{SUFFIX}") != LEFT_OUT}
        whole = _whole(decode(row))
        if whole != self(row):
            raise AssertionError(
                f"costs do not add up for {row}: the network has {whole}, the table {self(row)}"
            )


def _variants(skeleton: Skeleton, plain: Architecture) -> dict[tuple[str, str], Values]:
    """What each label of each position adds to the baseline's block there."""
    shapes = block_inputs(plain)
    labels = list(dict.fromkeys(label for p in skeleton.positions for label in p.labels))
    counts: dict[tuple[str, str], Values] = {}
    for label in labels:
        uniform = {p.name: label for p in skeleton.positions if label in p.labels}
        if label == LEFT_OUT:
            counts |= {(name, label): dict.fromkeys(COUNTERS, 0) for name in uniform}
            continue
        with torch.device("meta"):
            network = build(replace(plain, backbone=skeleton.backbone(uniform)))
        for name in uniform:
            counts[name, label] = count(network.get_submodule(name), shapes[name])
    first = {p.name: counts[p.name, p.labels[0]] for p in skeleton.positions}
    return {
        (f"{name}{SUFFIX}", label): {m: v - first[name][m] for m, v in values.items()}
        for (name, label), values in counts.items()
    }


def _whole(architecture: Architecture) -> Values:
    with torch.device("meta"):
        return count(build(architecture), (1, *architecture.input))


def excess(cost: Mapping[str, int | float], limits: Mapping[str, float]) -> dict[str, float]:
    """Metric -> by how much the cost is above its limit; empty when it fits."""
    return {m: cost[m] - limit for m, limit in limits.items() if cost[m] > limit}
