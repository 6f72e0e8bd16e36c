"""A sampler for studies whose costs are known before a trial: only the rest has to be learned.

Any Optuna study of flat categorical parameters. A Gaussian process over the parameters and their
known costs predicts the unknown objectives; a candidate is scored by the expected growth of the
hypervolume at its exact cost; candidates are one-step changes of the frontier, feasible random
draws, and one-step changes of the best of both. Nothing enumerates the space.
"""

import heapq
import itertools
import math
import random
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from nasattn.search.surrogate import (
    Floats,
    Inputs,
    Process,
    Shortfall,
    Undominated,
    exactly,
    non_dominated,
)
from nasattn.seed import derive

Params = Mapping[str, Any]
Function = Callable[[dict[str, Any]], float]
Known = tuple[tuple[float, ...], float]  # a row's costs, and how far it is from feasible
Row = tuple[int, ...]  # the index of each parameter's option, in the order of the names
Prices = dict[Row, tuple[float, ...]]  # what feasible rows cost

SPREAD = 16  # draws of which an early trial takes the one that costs most unlike the others
START = 8  # complete trials before the model is asked
# Candidates of a proposal: random draws (few where each has yet to be priced: a vast space is not
# covered by many either), so many of them and of the changes of the frontier's members looked at
# closely, and so many rounds of changes of the best few that had no round yet.
DRAWN, FEW, POOL = 3000, 300, 200
CLIMBS, CLIMBERS, CLIMBED = 5, 4, 100
DRAWS = 50  # random rows tried for a feasible one before the least infeasible is repaired
LISTED = 100_000  # a space of at most so many rows is searched whole once draws find nothing new
LEARNED = 300  # rows the model learns from: so many of the frontier's and of all, the latest
CACHED = 50_000  # costs and constraints remembered
# The reference point of the hypervolume, in ranges beyond the worst known cost and the worst value
# seen: an error worse than all so far must count for the cheapest rows to be worth a trial.
NEAR, FAR = 0.05, 1.0
PROPOSAL = "nasattn:proposal"  # what a running trial whose parameters are not yet stored will be


class Exhausted(Exception):
    """Every feasible row of the space is already a trial, or no further one was found."""


class FrontierSampler(BaseSampler):
    """Proposes by the expected growth of the hypervolume, given what candidates cost.

    costs: objective index -> its value as a function of the parameters, in the objective's own
    unit and direction; at least one objective must be left to learn. constraints: functions of the
    parameters, feasible at or below zero. space: the parameters, where they are known before the
    first trial; else they are read from the study's trials, and the first trial, whose space nobody
    knows, is held to the constraints as far as they can be told from the parameters so far. draw:
    random feasible parameters, by an rng and at most so many, instead of uniform draws that are
    tested.

    No trial's parameters are proposed again, whatever its state; Exhausted when nothing is left, or
    nothing was found in a space too large to be listed. Before a first trial is complete the space
    may not be known: trials that are asked for together then may have the same parameters. A
    proposal follows from (seed, the trial's number) and the study's rows.
    """

    def __init__(
        self,
        costs: Mapping[int, Function],
        seed: int = 0,
        constraints: Function | Sequence[Function] | None = None,
        *,
        space: Mapping[str, CategoricalDistribution] | None = None,
        draw: Callable[[random.Random, int], Iterable[Params]] | None = None,
    ) -> None:
        self.costs, self.seed, self.space, self.draw = (
            dict(sorted(costs.items())),
            seed,
            space,
            draw,
        )
        given = [constraints] if callable(constraints) else constraints or []
        self.constraints: tuple[Function, ...] = tuple(given)
        self._known: dict[tuple[Any, ...], dict[Row, Known]] = {}
        self._lock = threading.Lock()  # of the threads of `optimize(n_jobs=...)`

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": {}, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        if self.space is not None:
            return dict(self.space)
        rows = [t for t in study.get_trials(deepcopy=False) if t.number != trial.number]
        complete = [t for t in rows if t.state is TrialState.COMPLETE]
        found = complete or sorted(rows, key=lambda t: -len(t.params))[:1]
        # One that has only a part of another's parameters was not made by the same function.
        sets = {frozenset(t.params) for t in found}
        whole = [names for names in sets if not any(names < other for other in sets)]
        # Within a study, Optuna holds a categorical parameter to the same options for good.
        names = frozenset.intersection(*whole) if whole else frozenset()
        first = next((t for t in found if names <= t.params.keys()), None)
        shared = {k: v for k, v in first.distributions.items() if k in names} if first else {}
        if other := [k for k, v in shared.items() if not isinstance(v, CategoricalDistribution)]:
            raise ValueError(f"the parameters {other} are not categorical; allowed: categorical")
        return shared if complete or not first or self._priced(first.params) else {}

    def _priced(self, params: dict[str, Any]) -> bool:
        """Whether these are enough to tell the costs. Not those of a trial that has suggested only
        a part so far."""
        try:
            if not self._violation(params):
                for cost in self.costs.values():
                    cost(params)
        except (LookupError, TypeError):
            return False
        return True

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if not search_space:
            return {}
        self._check(study)
        options = {
            name: tuple(distribution.choices)
            for name, distribution in search_space.items()
            if isinstance(distribution, CategoricalDistribution)
        }
        rng = random.Random(derive(self.seed, trial.number))
        fixed = trial.system_attrs.get("fixed_params", {})
        space = _Space(self, options, rng, fixed)
        signs = [_sign(d) for d in study.directions]
        with self._lock:
            rows = _Rows.of(study, trial, space)
            row = self._propose(space, rows, signs)
            while True:
                study._storage.set_trial_system_attr(trial._trial_id, PROPOSAL, list(row))
                if not (rivals := _rivals(study, trial, row)):
                    return space.params(row)
                # Other processes have proposed it at the same time. The later trial leaves them the
                # next best as well, or they would go on to meet.
                first = all(
                    t.state is TrialState.RUNNING and t.number > trial.number for t in rivals
                )
                rows.seen.add(row)
                try:
                    row = self._propose(space, rows, signs)
                    if not first:
                        rows.seen.add(row)
                        row = self._propose(space, rows, signs)
                except Exhausted:
                    if not first:
                        raise
                    return space.params(row)  # the last one is the first trial's

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """An option at random; one that breaks a constraint, as far as can be told, last. Before
        it can be told, in a study without a complete trial, the first option."""
        if not isinstance(param_distribution, CategoricalDistribution):
            raise ValueError(f"the parameter {param_name} is not categorical; allowed: categorical")
        rng = random.Random(derive(self.seed, trial.number, param_name))
        choices = list(param_distribution.choices)
        rng.shuffle(choices)

        if not self.constraints:
            return choices[0]
        try:
            return min(choices, key=lambda c: self._violation({**trial.params, param_name: c}))
        except (LookupError, TypeError):  # a parameter that it needs comes later
            known = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            return choices[0] if known else param_distribution.choices[0]

    def _check(self, study: Study) -> None:
        count = len(study.directions)
        if any(not 0 <= index < count for index in self.costs) or len(self.costs) >= count:
            raise ValueError(
                f"costs has the objectives {list(self.costs)} of {count}; "
                "allowed: some of them, and at least one left to learn"
            )

    def _violation(self, params: dict[str, Any]) -> float:
        """Zero for feasible parameters, else how far they are off, summed."""
        values = [float(constraint(params)) for constraint in self.constraints]
        return sum(math.inf if math.isnan(value) else max(0.0, value) for value in values)

    def known(self, space: "_Space", row: Row) -> Known:
        """Computed once a row; only feasible rows have costs."""
        memory = space.memory
        if (found := memory.get(row)) is None:
            if len(memory) >= CACHED:
                memory.clear()
            params = space.params(row)
            violation = self._violation(params)
            costs = () if violation else tuple(float(f(params)) for f in self.costs.values())
            if not all(map(math.isfinite, costs)):
                costs, violation = (), math.inf  # what it costs is not known
            found = memory[row] = costs, violation
        return found

    def _propose(self, space: "_Space", rows: "_Rows", signs: Sequence[int]) -> Row:
        seen = rows.seen
        if len(rows.complete) < START:
            return self._spread(space, seen)
        model = _Model(self, space, rows, signs)
        pool: dict[Row, float] = {}
        climbed: set[Row] = set()

        def add(prices: Prices) -> None:
            new = {r: price for r, price in prices.items() if r not in pool and r not in seen}
            pool.update(zip(new, model.score(new), strict=True) if new else ())

        add(space.prices(space.changes(model.members, POOL)))
        add(model.promising(seen))
        for _ in range(CLIMBS):
            fresh = (r for r in pool if r not in climbed)
            best = heapq.nlargest(CLIMBERS, fresh, key=pool.__getitem__)
            climbed.update(best)
            add(space.prices(space.changes(best, CLIMBED)))
        return max(pool, key=lambda r: pool[r]) if pool else space.fresh(seen)

    def _spread(self, space: "_Space", seen: set[Row]) -> Row:
        """Of some random rows that are new, the one whose costs are farthest from all that are
        seen, by ranks: the first trials then tell of cheap and of dear architectures."""
        drawn = [space.fresh(seen) for _ in range(SPREAD)]
        costs = [price for r in (*drawn, *sorted(seen)) for price in space.prices([r]).values()]
        ranks = np.argsort(np.argsort(np.array(costs), axis=0), axis=0)
        apart = np.abs(ranks[:SPREAD, None] - ranks[None, SPREAD:]).sum(axis=2)
        return drawn[int(apart.min(axis=1).argmax())] if len(costs) > SPREAD else drawn[0]


class _Space:
    """The rows, and ways to come by feasible ones."""

    def __init__(
        self,
        sampler: FrontierSampler,
        options: Mapping[str, tuple[Any, ...]],
        rng: random.Random,
        fixed: Params,
    ) -> None:
        self.sampler, self.options, self.rng = sampler, options, rng
        self.memory = sampler._known.setdefault(tuple(options.items()), {})
        # Values are found by (type, value), as True == 1 == 1.0; by themselves where all are of one
        # type: a study of thousands of rows is looked up anew for each proposal.
        self._alike = len({type(v) for o in options.values() for v in o}) == 1
        self._index = {n: {self._key(v): i for i, v in enumerate(o)} for n, o in options.items()}
        found = {i: self._position(n, fixed[n]) for i, n in enumerate(options) if n in fixed}
        self.fixed = {i: position for i, position in found.items() if position is not None}
        values = [key for index in self._index.values() for key in index]
        distinct = {key: i for i, key in enumerate(dict.fromkeys(values))}
        self._offsets = np.cumsum([0, *(len(o) for o in options.values())])[:-1]
        # one-hot options -> how often each value is taken
        self._takes = np.zeros((len(values), len(distinct)), dtype=np.float32)
        self._takes[np.arange(len(values)), [distinct[key] for key in values]] = 1.0
        free = [i for i in range(len(options)) if i not in self.fixed]
        self._at = list(self._index.values())
        self._keys = [list(index) for index in self._at]
        self._moves = [(i, j) for i in free for j in range(len(self._keys[i]))]
        self._pairs = list(itertools.combinations(free, 2))

    @property
    def size(self) -> int:
        return math.prod(len(o) for i, o in enumerate(self.options.values()) if i not in self.fixed)

    def params(self, row: Row) -> dict[str, Any]:
        return {name: o[i] for (name, o), i in zip(self.options.items(), row, strict=True)}

    def row(self, params: Params) -> Row | None:
        """None when a parameter is missing or has another value than the options."""
        try:
            if self._alike:
                return tuple([index[params[name]] for name, index in self._index.items()])
        except KeyError:
            return None
        found = [self._position(name, params[name]) for name in self._index if name in params]
        row = tuple(position for position in found if position is not None)
        return row if len(row) == len(self._index) else None

    def _position(self, name: str, value: Any) -> int | None:
        """Of a value among the parameter's options; 2.0 is 2 where there is no 2.0."""
        index, options = self._index[name], self.options[name]
        if (key := self._key(value)) in index:
            return index[key]
        return next((i for i, option in enumerate(options) if option == value), None)

    def _key(self, value: Any) -> Any:
        return value if self._alike else (type(value), value)

    def encoded(self, rows: Collection[Row]) -> tuple[Floats, Floats]:
        """One-hot options (n, .), and the counts of the distinct values over them (n, .)."""
        taken = _array(rows, np.intp, len(self.options)) + self._offsets
        options = np.zeros((len(taken), len(self._takes)), dtype=np.float32)
        options[np.arange(len(taken))[:, None], taken] = 1.0
        return options, options @ self._takes

    def violation(self, row: Row) -> float:
        return self.sampler.known(self, row)[1]

    def prices(self, rows: Iterable[Row]) -> Prices:
        """Of the feasible ones."""
        known = self.sampler.known
        return {r: costs for r in rows for costs, violation in [known(self, r)] if not violation}

    @cached_property
    def drawn(self) -> Prices:
        """Of random feasible rows, few where these are rare."""
        many = self.sampler.draw or self.size <= CACHED
        return self.prices(self.sample(DRAWN if many else FEW))

    def changes(self, rows: Sequence[Row], most: int) -> Iterator[Row]:
        """One-step changes of the rows, all or `most` at random: another option for a parameter,
        or the options of two exchanged."""
        steps = len(self._moves) + len(self._pairs)
        count = len(rows) * steps
        for n in range(count) if count <= most else self.rng.sample(range(count), most):
            row, step = rows[n // steps], n % steps
            if self.fixed:
                row = tuple(self.fixed.get(k, option) for k, option in enumerate(row))
            if step < len(self._moves):
                i, j = self._moves[step]
                changed = (*row[:i], j, *row[i + 1 :])
            else:
                changed = self._exchanged(row, *self._pairs[step - len(self._moves)])
            if changed != row:
                yield changed

    def _exchanged(self, row: Row, i: int, j: int) -> Row:
        """The same row where one of the two has not the other's option."""
        of_i = self._at[i].get(self._keys[j][row[j]])
        of_j = self._at[j].get(self._keys[i][row[i]])
        if of_i is None or of_j is None:
            return row
        return (*row[:i], of_i, *row[i + 1 : j], of_j, *row[j + 1 :])

    def sample(self, most: int) -> Iterable[Row]:
        """Random rows, perhaps alike or not feasible; fewer where `draw` gives fewer."""
        if self.sampler.draw and not self.fixed:
            drawn = map(self.row, self.sampler.draw(self.rng, most))
            return (row for row in drawn if row is not None)
        sizes = [len(o) for o in self.options.values()]
        rng = np.random.default_rng(self.rng.getrandbits(64))
        indices = rng.integers(sizes, size=(most, len(sizes)))
        for i, option in self.fixed.items():
            indices[:, i] = option
        return map(tuple, indices.tolist())

    def feasible(self) -> Row | None:
        """A random feasible row: drawn, else the least infeasible of the draws repaired."""
        least: tuple[float, Row] | None = None
        for row in self.sample(DRAWS):
            off = self.violation(row)
            if not off:
                return row
            if least is None or off < least[0]:
                least = off, row
        while least is not None:
            near = self.changes([least[1]], len(self._moves) + len(self._pairs))
            better = min(((self.violation(r), r) for r in near), default=least)
            if not better[0]:
                return better[1]
            least = better if better[0] < least[0] else None
        return None

    def fresh(self, seen: set[Row]) -> Row:
        """A random feasible row that is not seen; where draws find none, by walks from seen ones,
        and in a small space by looking at all that is left."""
        for _ in range(DRAWS):
            if (row := self.feasible()) is not None and row not in seen:
                return row
        for row in self.changes(sorted(seen), 10 * POOL):
            if row not in seen and not self.violation(row):
                return row
        if self.size <= LISTED:
            axes = [
                [self.fixed[i]] if i in self.fixed else list(range(len(o)))
                for i, o in enumerate(self.options.values())
            ]
            left = [r for r in itertools.product(*axes) if r not in seen and not self.violation(r)]
            if left:
                return self.rng.choice(left)
        if self.size <= LISTED:
            raise Exhausted(
                f"no feasible parameters are left that are not among the study's trials: "
                f"{len(seen)} rows of a space of {self.size:,}"
            )
        raise Exhausted(
            f"no feasible parameters were found beside the study's {len(seen)} trials, by draws "
            f"and one-step changes of them, in a space of {self.size:,}"
        )


@dataclass(frozen=True, slots=True)
class _Rows:
    """The study's trials. complete: (row, objective values); running: rows under evaluation;
    seen: all rows that must not come again."""

    complete: list[tuple[Row, tuple[float, ...]]]
    running: list[Row]
    seen: set[Row]

    @classmethod
    def of(cls, study: Study, trial: FrozenTrial, space: _Space) -> "_Rows":
        found = cls([], [], set())
        for other in study.get_trials(deepcopy=False):
            if other.number == trial.number:
                continue
            fixed = other.system_attrs.get("fixed_params")
            row = space.row(fixed | other.params if fixed else other.params)
            if row is None and other.state is TrialState.RUNNING:
                proposal = other.system_attrs.get(PROPOSAL, ())
                row = tuple(proposal) if len(proposal) == len(space.options) else None
            if row is None:
                continue
            found.seen.add(row)
            if other.state is TrialState.RUNNING:
                found.running.append(row)
            elif other.state is TrialState.COMPLETE and all(map(math.isfinite, other.values)):
                found.complete.append((row, tuple(other.values)))
        return found


def _rivals(study: Study, trial: FrozenTrial, row: Row) -> list[FrozenTrial]:
    """The other trials that are to have the row; or have had it, since the rows were read."""
    same = (t for t in study.get_trials(deepcopy=False) if t.system_attrs.get(PROPOSAL) == [*row])
    return [t for t in same if t.number != trial.number]


class _Model:
    """What the trials teach: candidates' expected growth of the hypervolume. All is minimised."""

    def __init__(
        self, sampler: FrontierSampler, space: _Space, rows: _Rows, signs: Sequence[int]
    ) -> None:
        self.space = space
        self.known = list(sampler.costs)
        self.unknown = [i for i in range(len(signs)) if i not in sampler.costs]
        self.signs = np.array(signs, dtype=np.float64)
        points = self.signs * np.array([values for _, values in rows.complete])
        codes = [row for row, _ in rows.complete]
        best = non_dominated(points)
        kept = sorted({*best[-LEARNED:], *range(len(codes))[-LEARNED:]})
        self.members = [codes[i] for i in best]
        self._low = points[:, self.known].min(0)
        self._range = np.ptp(points[:, self.known], axis=0)
        self._range[self._range == 0] = 1.0
        inputs = self._inputs([codes[i] for i in kept], points[kept][:, self.known])
        self.processes = [Process(inputs, points[kept, i]) for i in self.unknown]
        front = points[best]
        if pending := space.prices(rows.running):
            costs = self._costs(pending)
            inputs = self._inputs(pending, costs)
            believed = np.empty((len(pending), len(signs)))
            believed[:, self.known] = costs
            for i, process in zip(self.unknown, self.processes, strict=True):
                believed[:, i] = process.believe(inputs)
            front = np.vstack([front, believed])
            front = front[non_dominated(front)]
        self.front = front[:, [*self.known, *self.unknown]]
        self._drawn = self._costs(space.drawn)
        costs = np.vstack([points[:, self.known], self._drawn])
        self.reference = np.array(
            [_reference(column, NEAR) for column in costs.T]
            + [_reference(points[:, i], FAR) for i in self.unknown]
        )
        self.undominated = Undominated(self.front, self.reference)

    def _costs(self, prices: Prices) -> Floats:
        costs = _array(prices.values(), np.float64, len(self.known))
        return np.asarray(costs * self.signs[self.known])

    def _inputs(self, rows: Collection[Row], costs: Floats) -> Inputs:
        options, counts = self.space.encoded(rows)
        scaled = ((costs - self._low) / self._range).astype(np.float32)
        return Inputs(options, counts, scaled, len(self.space.options))

    def score(self, prices: Prices) -> list[float]:
        costs = self._costs(prices)
        inputs = self._inputs(prices, costs)
        shortfalls: list[Shortfall] = [exactly(column) for column in costs.T]
        shortfalls += [process.predict(inputs) for process in self.processes]
        scores: list[float] = self.undominated.growth(shortfalls).tolist()
        return scores

    def promising(self, seen: set[Row]) -> Prices:
        """Of the random rows those that may be the best: the POOL of them that are likeliest to be
        better than all on the frontier that cost no more, by a linear stand-in of the processes."""
        drawn, costs = self.space.drawn, self._drawn
        if len(drawn) <= 2 * POOL:
            return drawn
        inputs = self._inputs(drawn, costs)
        open_to = np.all(self.front[:, : costs.shape[1]] <= costs[:, None], axis=2)
        odds = np.full(len(drawn), -np.inf)
        for i, process in enumerate(self.processes, start=costs.shape[1]):
            best = np.where(open_to, self.front[:, i], self.reference[i]).min(axis=1)
            odds = np.maximum(odds, process.odds(inputs, best))
        rows = list(drawn)
        order = (rows[i] for i in np.argsort(-odds, kind="stable").tolist())
        return {r: drawn[r] for r in itertools.islice((r for r in order if r not in seen), POOL)}


def _array(rows: Collection[tuple[float, ...]], dtype: Any, width: int) -> NDArray[Any]:
    """Of tuples (n, width): quicker than numpy's own way."""
    return np.fromiter(itertools.chain.from_iterable(rows), dtype).reshape(len(rows), width)


def _reference(values: Floats, beyond: float) -> float:
    """The worst value and `beyond` ranges more; outliers far beyond the middle of the values count
    as less, or nothing but being better than them would matter."""
    low, middle, worst = values.min(), np.median(values), values.max()
    worst = min(worst, middle + 20 * (middle - low)) if middle > low else worst
    return float(worst + beyond * ((worst - low) or 1.0))


def _sign(direction: StudyDirection) -> int:
    return -1 if direction is StudyDirection.MAXIMIZE else 1
