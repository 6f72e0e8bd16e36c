"""A sampler for studies whose costs are known before a trial: only the rest has to be learned.

Any Optuna study of flat categorical parameters. A Gaussian process over the parameters and their
known costs predicts the unknown objectives; a candidate is scored by the expected growth of the
hypervolume at its exact cost; candidates are feasible random draws, changes of the frontier's rows
by a parameter or by two exchanged, and such changes of the best of both. Nothing enumerates the
space.
"""

import heapq
import itertools
import math
import random
import threading
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from nasattn.pareto import non_dominated
from nasattn.search.frontier_space import (
    PROPOSAL,
    Draw,
    Exhausted,
    Known,
    Params,
    Prices,
    Row,
    Space,
    Trials,
    array,
    rivals_of,
    taken,
)
from nasattn.search.surrogate import (
    Floats,
    GaussianProcess,
    Inputs,
    Shortfall,
    Undominated,
    exactly,
)
from nasattn.seed import derive

Function = Callable[[dict[str, Any]], float]

SPREAD = 16  # draws of which an early trial takes the one that costs most unlike the others
START = 8  # complete trials before the model is asked
POOL = 200  # changes of the frontier's members that are scored, and draws, if not all of them are
CLIMBS, CLIMBERS, CLIMBED = 5, 4, 100  # rounds of changes of the best few that had none yet
LEARNED = 300  # rows the model learns from: so many of the frontier's and of all, the latest
# The reference point of the hypervolume, in ranges beyond the worst known cost and the worst value
# seen: an error worse than all so far must count for the cheapest rows to be worth a trial.
NEAR, FAR = 0.05, 1.0
BEYOND = 100.0  # ranges beyond the costs seen after which all is equally far, in single precision


class FrontierSampler(BaseSampler):
    """Proposes by the expected growth of the hypervolume, given what candidates cost.

    costs: objective index -> its value as a function of the parameters, in the objective's own
    unit and direction; at least one objective must be left to learn. constraints: functions of the
    parameters, feasible at or below zero. space: the parameters, where they are known before the
    first trial; else they are read from the study's trials, and the first trial, whose space nobody
    knows, is held to the constraints as far as they can be told from the parameters so far. draw:
    random feasible parameters, by an rng and at most so many (fewer, where each takes long), in
    place of uniform draws that are tested. Parameters with one option Optuna answers by itself.

    No trial's parameters are proposed again, whatever its state; Exhausted when nothing is left, or
    nothing was found in a space too large to be listed: it comes out of `optimize`, and of `ask`,
    which leaves its trial, the study's last, to be told as failed. Before a first trial is complete
    the space may not be known: trials that are asked for together then may have the same
    parameters. A proposal follows from (seed, the trial's number) and the study's rows.
    """

    def __init__(
        self,
        costs: Mapping[int, Function],
        seed: int = 0,
        constraints: Function | Sequence[Function] | None = None,
        *,
        space: Mapping[str, CategoricalDistribution] | None = None,
        draw: Draw | None = None,
    ) -> None:
        if not isinstance(costs, Mapping):
            raise ValueError(f"costs: got {costs!r}; allowed: a dict of functions by objective")
        numbers = (int, np.integer)
        if odd := [i for i in costs if isinstance(i, bool) or not isinstance(i, numbers)]:
            raise ValueError(f"costs: got the key {odd[0]!r}; allowed: indices of objectives")
        given = [constraints] if callable(constraints) else constraints or []
        if not isinstance(given, Sequence) or not all(map(callable, [*given, *costs.values()])):
            raise ValueError("costs and constraints have to be functions of the parameters")
        _check_categorical(space or {})
        self.costs, self.seed, self.space, self.draw = (
            dict(sorted(costs.items())),
            seed,
            space,
            draw,
        )
        self.constraints: tuple[Function, ...] = tuple(given)
        self._odd: set[int] = set()  # objectives whose known cost was not finite, for some row
        self._warned: set[int] = set()  # and those whose trials had another
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
        # What the function asks for now, some that were proposed here tell best: trials that were
        # added, or that another sampler began, may be of an earlier one.
        own = [t for t in complete if PROPOSAL in t.system_attrs]
        enough = len(own) >= START
        found = own if enough else complete or sorted(rows, key=lambda t: -len(t.params))[:1]
        # One that has only a part of another's parameters is of an earlier function, or came to its
        # end before it had asked for all.
        sets = {frozenset(t.params) for t in found}
        others = {frozenset(t.params) for t in own[-START:]} if enough else sets
        whole = [names for names in sets if not any(names < other for other in others)]
        # Within a study, Optuna holds a categorical parameter to the same options for good.
        names = frozenset.intersection(*whole) if whole else frozenset()
        first = next((t for t in found if names <= t.params.keys()), None)
        shared = {k: v for k, v in first.distributions.items() if k in names} if first else {}
        _check_categorical(shared)
        return shared if complete or not first or self._priced(first.params) else {}

    def _priced(self, params: dict[str, Any]) -> bool:
        """Whether these are enough to tell the costs. Not those of a trial that has suggested only
        a part so far."""
        try:
            self._price(params)
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
        space = self._space(options, rng, trial.system_attrs.get("fixed_params", {}))
        signs = [_sign(d) for d in study.directions]
        with self._lock:
            rows = Trials.of(study, trial, space)
            try:
                return space.params(self._agreed(study, trial, space, rows, signs))
            except Exhausted as error:
                if unasked := self._unasked(study):
                    raise Exhausted(
                        f"{error}. No trial has asked for {unasked}, which `space` has"
                    ) from None
                if beside := self._beside(study, options):
                    raise Exhausted(
                        f"{error}. Only parameters that all trials have are searched, {beside} are "
                        "not: the space has to be flat"
                    ) from None
                if self._odd:
                    raise Exhausted(
                        f"{error}. The known costs of the objectives {sorted(self._odd)} are not "
                        "finite for some, which counts as not feasible"
                    ) from None
                raise
            except LookupError as error:
                every = self.infer_relative_search_space(study, trial)
                if hidden := sorted(every.keys() - options.keys()):
                    raise ValueError(
                        f"the parameters {hidden} are kept from this sampler, which has to know "
                        "all that costs are functions of; allowed: to fix them by "
                        "study.enqueue_trial, or by one option each in `space`"
                    ) from None
                lacking = error.args[0] if isinstance(error, KeyError) and error.args else None
                if self.space is not None and isinstance(lacking, str) and lacking not in options:
                    raise ValueError(
                        f"a cost or constraint asks for '{lacking}'; `space` has the parameters "
                        f"{sorted(options)}"
                    ) from error
                raise

    def _beside(self, study: Study, options: Collection[str]) -> list[str]:
        """What trials have beside the parameters that are searched, where the latest has, too."""
        complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if self.space is not None or not complete or complete[-1].params.keys() <= set(options):
            return []
        return sorted({name for t in complete for name in t.params}.difference(options))

    def _unasked(self, study: Study) -> list[str]:
        """What `space` has to choose and no trial."""
        complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        asked = {name for trial in complete for name in trial.params}
        several = {name for name, options in (self.space or {}).items() if len(options.choices) > 1}
        return sorted(several - asked) if complete else []

    def _agreed(
        self, study: Study, trial: FrozenTrial, space: Space, rows: Trials, signs: Sequence[int]
    ) -> Row:
        """A proposal that no other process makes at the same time, told to them by the trial."""
        row = self._propose(space, rows, signs)
        while True:
            study._storage.set_trial_system_attr(trial._trial_id, PROPOSAL, space.told(row))
            if not (rivals := rivals_of(study, trial, row, space)):
                return row
            # Of trials that run, the later leaves the others the next best as well, or they would
            # go on to meet.
            running = [t.number for t in rivals if t.state is TrialState.RUNNING]
            later = bool(running) and min(running) < trial.number
            rows.seen.add(row)
            try:
                row = self._propose(space, rows, signs)
                if later:
                    rows.seen.add(row)
                    row = self._propose(space, rows, signs)
            except Exhausted:
                if later or taken(study, trial, row, space):
                    study._storage.set_trial_system_attr(trial._trial_id, PROPOSAL, {})
                    raise
                return row  # the last one is the first trial's

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

    def _space(
        self, options: Mapping[str, tuple[Any, ...]], rng: random.Random, fixed: Params
    ) -> Space:
        try:
            memory = self._known.setdefault(tuple(options.items()), {})
        except TypeError as error:
            raise ValueError(f"{error}; allowed as options: None, bool, int, float, str") from None
        return Space(options, self._price, memory, rng, fixed, self.draw)

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

    def _price(self, params: dict[str, Any]) -> Known:
        """Only feasible parameters have costs."""
        violation = self._violation(params)
        costs = () if violation else tuple(float(f(params)) for f in self.costs.values())
        odd = {i for i, cost in zip(self.costs, costs, strict=False) if not math.isfinite(cost)}
        self._odd |= odd
        return ((), math.inf) if odd else (costs, violation)

    def _propose(self, space: Space, rows: Trials, signs: Sequence[int]) -> Row:
        seen = rows.seen
        if len(rows.complete) < START:
            return self._spread(space, seen)
        self._compare(space, *rows.complete[-1])
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

    def _compare(self, space: Space, row: Row, values: Sequence[float]) -> None:
        """Warns where a trial was told another cost than the one that is known, which is taken for
        exact: it may be of the wrong sign or unit."""
        costs, _ = space.known(row)  # none where it is not feasible
        for i, cost in zip(self.costs, costs, strict=False):
            same = math.isclose(cost, values[i], rel_tol=1e-3, abs_tol=1e-12)
            if not same and i not in self._warned:
                self._warned.add(i)
                warnings.warn(
                    f"costs[{i}] gives {cost:g} for a trial whose objective {i} is {values[i]:g}; "
                    "they have to be the same, in the objective's own unit and direction",
                    stacklevel=2,
                )

    def _spread(self, space: Space, seen: set[Row]) -> Row:
        """Of some random rows that are new, the one whose costs are farthest from all that are
        seen, by ranks: the first trials then tell of cheap and of dear architectures."""
        drawn = [space.fresh(seen) for _ in range(SPREAD)]
        costs = [price for r in (*drawn, *sorted(seen)) for price in space.prices([r]).values()]
        ranks = _ranks(np.array(costs))
        apart = np.abs(ranks[:SPREAD, None] - ranks[None, SPREAD:]).sum(axis=2)
        return drawn[int(apart.min(axis=1).argmax())] if len(costs) > SPREAD else drawn[0]


class _Model:
    """What the trials teach: candidates' expected growth of the hypervolume. All is minimised."""

    def __init__(
        self, sampler: FrontierSampler, space: Space, rows: Trials, signs: Sequence[int]
    ) -> None:
        self.space = space
        self.known = list(sampler.costs)
        self.unknown = [i for i in range(len(signs)) if i not in sampler.costs]
        self.signs = np.array(signs, dtype=np.float64)
        points = self.signs * np.array([values for _, values in rows.complete])
        codes = [row for row, _ in rows.complete]
        best = np.flatnonzero(non_dominated(points))
        _, first = np.unique(points[best], axis=0, return_index=True)  # one of equal ones
        best = best[np.sort(first)]
        kept = sorted({*best[-LEARNED:], *range(len(codes))[-LEARNED:]})
        self.members = [codes[i] for i in best]
        self._low = points[:, self.known].min(0)
        self._range = np.ptp(points[:, self.known], axis=0)
        self._range[self._range == 0] = 1.0
        inputs = self._inputs([codes[i] for i in kept], points[kept][:, self.known])
        self.processes = [GaussianProcess(inputs, points[kept, i]) for i in self.unknown]
        front = points[best]
        if pending := space.prices(rows.running):
            costs = self._costs(pending)
            inputs = self._inputs(pending, costs)
            believed = np.empty((len(pending), len(signs)))
            believed[:, self.known] = costs
            for i, process in zip(self.unknown, self.processes, strict=True):
                believed[:, i] = process.believe(inputs)
            front = np.vstack([front, believed])
        self.front = front[:, [*self.known, *self.unknown]]
        self._drawn_costs = self._costs(space.drawn)
        costs = np.vstack([points[:, self.known], self._drawn_costs])
        self.reference = np.array(
            [_reference(column, NEAR) for column in costs.T]
            + [_reference(points[:, i], FAR) for i in self.unknown]
        )
        self.undominated = Undominated(self.front, self.reference)

    def _costs(self, prices: Prices) -> Floats:
        costs = array(prices.values(), np.float64, len(self.known))
        return np.asarray(costs * self.signs[self.known])

    def _inputs(self, rows: Collection[Row], costs: Floats) -> Inputs:
        scaled = np.clip((costs - self._low) / self._range, -BEYOND, BEYOND)
        return Inputs(self.space.encoded(rows), scaled.astype(np.float32), self.space.coding)

    def score(self, prices: Prices) -> list[float]:
        costs = self._costs(prices)
        inputs = self._inputs(prices, costs)
        shortfalls: list[Shortfall] = [exactly(column) for column in costs.T]
        shortfalls += [process.predict(inputs) for process in self.processes]
        growth = self.undominated.growth(shortfalls)
        scores: list[float] = np.nan_to_num(growth, nan=-np.inf).tolist()
        return scores

    def promising(self, seen: set[Row]) -> Prices:
        """Of the random rows those that may be the best: the POOL of them that are likeliest to be
        better than all on the frontier that cost no more, by a linear stand-in of the processes."""
        drawn, costs = self.space.drawn, self._drawn_costs
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


def _reference(values: Floats, beyond: float) -> float:
    """The worst value and `beyond` ranges more; outliers far beyond the middle of the values count
    as less, or nothing but being better than them would matter."""
    low, middle, worst = values.min(), np.median(values), values.max()
    worst = min(worst, middle + 20 * (middle - low)) if middle > low else worst
    return float(worst + beyond * ((worst - low) or 1.0))


def _ranks(values: Floats) -> Floats:
    """In each column, equal ones alike."""
    ranks = np.empty(values.shape)
    for column, rank in zip(values.T, ranks.T, strict=True):
        ordered = np.sort(column)
        rank[:] = np.searchsorted(ordered, column) + np.searchsorted(ordered, column, "right")
    return ranks / 2


def _check_categorical(space: Mapping[str, BaseDistribution]) -> None:
    if other := [k for k, v in space.items() if not isinstance(v, CategoricalDistribution)]:
        raise ValueError(f"the parameters {other} are not categorical; allowed: categorical")


def _sign(direction: StudyDirection) -> int:
    return -1 if direction is StudyDirection.MAXIMIZE else 1
