"""Counting, drawing and listing the rows of a space: one label a step, under budgets. No torch.

A space is a chain of steps. A row takes one label a step; at most `most` labels of a row are
blocks, and a label that ends a stage forces the rest of that stage (what is left out stays left
out). Costs add up over the steps, so the number of ways to finish within what is left of a budget
is a table, and a uniform draw walks along it: a tight budget costs no rejected draws.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil, floor, gcd, isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

Row = dict[str, str]

BUCKETS = 1 << 14  # of a budget, where its exact units are more


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One choice. blocks: labels that count as a block. stage: steps of the same stage belong
    together; choosing `ends` ends it, and its later steps then take `rest`. costs: metric -> label
    -> what it adds; steps without costs add nothing."""

    name: str
    labels: tuple[str, ...]
    blocks: frozenset[str] = frozenset()
    stage: str = ""
    ends: str | None = None
    rest: str = ""
    costs: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _State:
    left: int
    ended: bool = False


@dataclass(frozen=True, slots=True)
class _Node:
    """A step in a state. ways: units left -> how many rows go on from here; options: the labels
    that may stand, each with its units and the node behind it."""

    ways: Callable[[int], float]
    options: list[tuple[str, int, "_Node"]]


class Chain:
    """The rows of the steps with at most `most` blocks."""

    def __init__(self, steps: Sequence[Step], most: int) -> None:
        self.steps, self.most = tuple(steps), most

    @property
    def start(self) -> _State:
        return _State(self.most)

    def options(self, depth: int, state: _State) -> Iterator[tuple[str, _State]]:
        """The labels that may stand at a step, and the state behind each."""
        step = self.steps[depth]
        same_stage = depth > 0 and step.stage and self.steps[depth - 1].stage == step.stage
        if state.ended and same_stage:
            yield step.rest, state
            return
        for label in step.labels:
            left = state.left - (label in step.blocks)
            if left >= 0:
                yield label, _State(left, label == step.ends)

    def size(self) -> int:
        """How many rows there are, exactly."""
        ways = {state: 1 for state in self._states}
        for depth in reversed(range(len(self.steps))):
            ways = {
                state: sum(ways[after] for _, after in self.options(depth, state))
                for state in self._states
            }
        return ways[self.start]

    @property
    def _states(self) -> list[_State]:
        return [_State(left, ended) for left in range(self.most + 1) for ended in (False, True)]

    def within(self, metric: str, slack: float, *, lenient: bool = False) -> "Budget":
        """The rows that add at most `slack` of a metric to the sum of its cheapest labels. lenient:
        where costs have to be rounded, down: rows that do not quite fit are let in."""
        return Budget(self, metric, slack, lenient)

    def cheapest(self, metric: str) -> float:
        """The sum of a metric's lowest costs."""
        return sum(min(step.costs[metric].values()) for step in self.steps)

    def dearest(self, metric: str) -> float:
        """The sum of a metric's costs in its dearest row."""
        best = dict.fromkeys(self._states, 0.0)
        for depth in reversed(range(len(self.steps))):
            costs = self.steps[depth].costs[metric]
            best = {
                state: max(
                    costs[label] + best[after] for label, after in self.options(depth, state)
                )
                for state in self._states
            }
        return best[self.start]

    def sample(self, rng: random.Random) -> Row:
        """One row, uniformly."""
        return self._free.sample(rng)

    @cached_property
    def _free(self) -> "Budget":
        return self.within("", 0)

    def rows(self, budgets: Sequence["Budget"] = ()) -> Iterator[Row]:
        """Every row once that is within the budgets, in the labels' order. A partial row that
        cannot be finished within one of them is left with all that builds on it."""

        def below(depth: int, state: _State, spent: tuple[int, ...], row: Row) -> Iterator[Row]:
            if depth == len(self.steps):
                yield dict(row)
                return
            name = self.steps[depth].name
            for label, after in self.options(depth, state):
                now = tuple(s + b.units(depth, label) for s, b in zip(spent, budgets, strict=True))
                if all(b.ways(depth + 1, after, s) for s, b in zip(now, budgets, strict=True)):
                    yield from below(depth + 1, after, now, {**row, name: label})

        return below(0, self.start, (0,) * len(budgets), {})


class Budget:
    """One metric's budget over a chain, in whole units.

    The unit is the costs' greatest common divisor where the budget has at most BUCKETS of them, and
    the table is exact. Otherwise costs are rounded up to coarser units: some rows that just fit are
    refused, none is let in that does not, and `refused` bounds their share. Lenient, it is the
    other way round.
    """

    def __init__(self, chain: Chain, metric: str, slack: float, lenient: bool) -> None:
        self.chain, self.metric, self.slack = chain, metric, slack
        added = [self._added(step) for step in chain.steps]
        whole = all(float(v).is_integer() for costs in added for v in costs.values())
        unit: float = gcd(*(int(v) for c in added for v in c.values())) if whole else 0
        largest = sum(max(costs.values()) for costs in added)
        span = min(slack, largest)  # above the dearest row nothing binds
        if not unit or span / unit > BUCKETS:
            unit = max(span, 0) / BUCKETS or 1
            self.exact = span <= 0
        else:
            self.exact = True
        self.unit = unit
        self.total = int(span // unit) if span >= 0 else -1
        # The tiny shift keeps a cost of whole units from being rounded by its own float error.
        rounded = floor if lenient else ceil
        shift = 1e-9 if lenient else -1e-9
        self._units = [{k: rounded(v / unit + shift) for k, v in c.items()} for c in added]

    def _added(self, step: Step) -> dict[str, float]:
        costs = step.costs.get(self.metric) or dict.fromkeys(step.labels, 0)
        low = min(costs.values())
        return {label: costs[label] - low for label in costs}

    def units(self, depth: int, label: str) -> int:
        return self._units[depth][label]

    def ways(self, depth: int, state: _State, spent: int) -> float:
        """How many rows go on from here within the budget."""
        return float(self._table[depth][state][self.total - spent]) if spent <= self.total else 0.0

    @property
    def count(self) -> float:
        """How many rows fit: exact up to 2**53, to 16 digits above."""
        return self.ways(0, self.chain.start, 0)

    @cached_property
    def refused(self) -> float:
        """Largest share of the fitting rows that the rounding can have refused."""
        if self.exact:
            return 0.0
        most = self.chain.within(self.metric, self.slack, lenient=True).count
        return 1.0 - self.count / most if most else 0.0

    def sample(self, rng: random.Random) -> Row:
        """One fitting row, uniformly. ValueError when there is none."""
        node, left, row = self._root, self.total, Row()
        count = self.count
        if not count:
            raise ValueError("no row fits the budget")
        if not isfinite(count):
            raise ValueError("too many rows to be drawn uniformly")
        for step in self.chain.steps:
            drawn, passed = rng.random() * node.ways(left), 0.0
            for label, units, after in node.options:
                if units <= left and (ways := after.ways(left - units)):
                    chosen = label, units, after
                    passed += ways
                    if drawn < passed:
                        break
            row[step.name], units, node = chosen
            left -= units
        return row

    @cached_property
    def _root(self) -> _Node:
        """What a draw walks along, to look no state up."""
        chain, last = self.chain, len(self.chain.steps)
        nodes = {s: _Node(self._table[last][s].item, []) for s in chain._states}
        for depth in reversed(range(last)):
            nodes = {
                state: _Node(
                    self._table[depth][state].item,
                    [
                        (label, self.units(depth, label), nodes[after])
                        for label, after in chain.options(depth, state)
                    ],
                )
                for state in chain._states
            }
        return nodes[chain.start]

    @cached_property
    def _table(self) -> list[dict[_State, NDArray[Any]]]:
        """[depth][state][u]: rows from that step on that cost at most u units."""
        chain, width = self.chain, max(self.total, 0) + 1
        table = [{state: np.ones(width) for state in chain._states}]
        for depth in reversed(range(len(chain.steps))):
            ways: dict[_State, NDArray[Any]] = {}
            for state in chain._states:
                sums = np.zeros(width)
                for label, after in chain.options(depth, state):
                    cost = self._units[depth][label]
                    if cost < width:
                        sums[cost:] += table[0][after][: width - cost]
                ways[state] = sums
            table.insert(0, ways)
        return table
