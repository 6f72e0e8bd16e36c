"""A study's parameters and trials as rows of option indices, as the frontier sampler sees them."""

import itertools
import math
import random
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from nasattn.search.surrogate import Coding, Floats

Params = Mapping[str, Any]
Known = tuple[tuple[float, ...], float]  # a row's costs, and how far it is from feasible
Row = tuple[int, ...]  # the index of each parameter's option, in the order of the names
Draw = Callable[[random.Random, int], Iterable[Params]]
Prices = dict[Row, tuple[float, ...]]  # what feasible rows cost

# Random draws of a proposal; few where each has yet to be priced: a vast space is not covered by
# many either.
DRAWN, FEW = 3000, 300
WALKED = 2000  # changes of the study's rows that are tried for a new one
DRAWS = 50  # random rows tried for a feasible one before the least infeasible is repaired
LISTED = 100_000  # a space of at most so many rows is searched whole once draws find nothing new
COMPLETED = 10_000  # rows of a trial that ended before it had asked for all parameters
LOOKS = 20  # at who may have taken the last row, in 2 s
CACHED = 50_000  # costs and constraints remembered
PROPOSAL = "nasattn:proposal"  # the row of a trial, before its parameters are stored


class Exhausted(Exception):
    """Every feasible row of the space is already a trial, or no further one was found."""


class Space:
    """A study's parameters, and ways to come by feasible rows.

    price: parameters -> what is known of them, remembered in `memory`; fixed: parameters that have
    their value already; draw: as of FrontierSampler.
    """

    def __init__(
        self,
        options: Mapping[str, tuple[Any, ...]],
        price: Callable[[dict[str, Any]], Known],
        memory: dict[Row, Known],
        rng: random.Random,
        fixed: Params,
        draw: Draw | None = None,
    ) -> None:
        self.options, self.rng, self._draw = options, rng, draw
        self._price, self._memory = price, memory
        # Values are found by (type, value), as True == 1 == 1.0; by themselves where all are of one
        # type: a study of thousands of rows is looked up anew for each proposal.
        self._alike = len({type(v) for o in options.values() for v in o}) == 1
        self._index = {n: {self._key(v): i for i, v in enumerate(o)} for n, o in options.items()}
        for name, index in self._index.items():
            if len(index) < len(options[name]) or len(set(options[name])) < len(index):
                # Optuna stores the first of those that are equal.
                raise ValueError(
                    f"options of {name} repeat: {options[name]}; allowed: each once, and of those "
                    "that are equal, such as True, 1 and 1.0, one"
                )
        found = {i: self._position(n, fixed[n]) for i, n in enumerate(options) if n in fixed}
        self.fixed = {i: position for i, position in found.items() if position is not None}
        self._at = list(self._index.values())
        self._keys = [list(index) for index in self._at]
        values = list(itertools.chain.from_iterable(self._keys))
        distinct = {key: i for i, key in enumerate(dict.fromkeys(values))}
        starts = np.cumsum([0, *(len(o) for o in options.values())])[:-1]
        self.coding = Coding(
            starts,
            np.eye(len(distinct), dtype=np.float32)[[distinct[key] for key in values]],
        )
        free = [i for i in range(len(options)) if i not in self.fixed]
        self._moves = [(i, j) for i in free for j in range(len(self._keys[i]))]
        # Pairs with options in common; of many some at random, as their number grows as the square.
        pairs: Iterable[tuple[int, ...]] = itertools.combinations(free, 2)
        if math.comb(len(free), 2) > len(self._moves):
            pairs = (tuple(sorted(rng.sample(free, 2))) for _ in self._moves)
        self._pairs = [(i, j) for i, j in pairs if len(self._at[i].keys() & self._at[j].keys()) > 1]

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

    def told(self, row: Row) -> dict[str, int]:
        """The row as other processes read it, who may have the parameters in another order."""
        return dict(zip(self.options, row, strict=True))

    def heard(self, told: Any) -> Row | None:
        """The row that was told so; None where it is none of these parameters'."""
        if not isinstance(told, dict) or told.keys() != self.options.keys():
            return None
        row = tuple(told[name] for name in self.options)
        return row if all(i < len(o) for i, o in zip(row, self._at, strict=True)) else None

    def completions(self, params: Params) -> Iterable[Row]:
        """The rows that have these parameters, if they are not too many to be listed."""
        axes = []
        for name, options in self.options.items():
            known = self._position(name, params[name]) if name in params else None
            if name in params and known is None:
                return ()
            axes.append(range(len(options)) if known is None else [known])
        few = math.prod(map(len, axes)) <= COMPLETED
        return itertools.product(*axes) if few else ()

    def _position(self, name: str, value: Any) -> int | None:
        """Of a value among the parameter's options; 2.0 is 2 where there is no 2.0."""
        index, options = self._index[name], self.options[name]
        if (key := self._key(value)) in index:
            return index[key]
        return next((i for i, option in enumerate(options) if option == value), None)

    def _key(self, value: Any) -> Any:
        return value if self._alike else (type(value), value)

    def encoded(self, rows: Collection[Row]) -> Floats:
        """One-hot (n, o), as `coding` says."""
        taken = array(rows, np.intp, len(self.options)) + self.coding.starts
        options = np.zeros((len(taken), len(self.coding.values)), dtype=np.float32)
        options[np.arange(len(taken))[:, None], taken] = 1.0
        return options

    def known(self, row: Row) -> Known:
        """Asked for once a row, while it is remembered."""
        if (found := self._memory.get(row)) is None:
            if len(self._memory) >= CACHED:
                self._memory.clear()
            found = self._memory[row] = self._price(self.params(row))
        return found

    def violation(self, row: Row) -> float:
        return self.known(row)[1]

    def prices(self, rows: Iterable[Row]) -> Prices:
        """Of the feasible ones."""
        known = self.known
        return {r: costs for r in rows for costs, violation in [known(r)] if not violation}

    @cached_property
    def drawn(self) -> Prices:
        """Of random feasible rows, few where these are rare."""
        many = self.size <= CACHED or (self._draw and not self.fixed)
        return self.prices(self.sample(DRAWN if many else FEW))

    def changes(self, rows: Sequence[Row], most: int) -> Iterator[Row]:
        """One-step changes of the rows, all or `most` at random: another option for a parameter,
        or the options of two exchanged."""
        steps = len(self._moves) + len(self._pairs)
        count = len(rows) * steps
        for n in range(count) if count <= most else self.rng.sample(range(count), most):
            row = rows[n // steps]
            if self.fixed:
                row = tuple(self.fixed.get(k, option) for k, option in enumerate(row))
            if (changed := self._changed(row, n % steps)) != row:
                yield changed

    def _changed(self, row: Row, step: int) -> Row:
        if step >= len(self._moves):
            return self._exchanged(row, *self._pairs[step - len(self._moves)])
        i, j = self._moves[step]
        return (*row[:i], j, *row[i + 1 :])

    def _exchanged(self, row: Row, i: int, j: int) -> Row:
        """The same row where one of the two has not the other's option."""
        of_i = self._at[i].get(self._keys[j][row[j]])
        of_j = self._at[j].get(self._keys[i][row[i]])
        if of_i is None or of_j is None:
            return row
        return (*row[:i], of_i, *row[i + 1 : j], of_j, *row[j + 1 :])

    def sample(self, most: int) -> Iterable[Row]:
        """Random rows, perhaps alike or not feasible; fewer where `draw` gives fewer."""
        if self._draw and not self.fixed:
            drawn = map(self.row, itertools.islice(self._draw(self.rng, most), most))
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
            near = (self._changed(least[1], step) for step in range(len(self._moves)))
            better = min(((self.violation(r), r) for r in near), default=least)
            if not better[0]:
                return better[1]
            least = better if better[0] < least[0] else None
        return None

    def fresh(self, seen: set[Row]) -> Row:
        """A random feasible row that is not seen; where draws find none, by walks from seen ones
        and from all first options, and in a small space by looking at all that is left."""
        for _ in range(DRAWS):
            if (row := self.feasible()) is not None and row not in seen:
                return row
        first = tuple(self.fixed.get(i, 0) for i in range(len(self.options)))
        starts = sorted({*seen, first})
        for row in itertools.chain(starts, self.changes(starts, WALKED)):
            if row not in seen and not self.violation(row):
                return row
        if self.size <= LISTED:
            axes = [
                [self.fixed[i]] if i in self.fixed else list(range(len(o)))
                for i, o in enumerate(self.options.values())
            ]
            fitting = [row for row in itertools.product(*axes) if not self.violation(row)]
            if left := [row for row in fitting if row not in seen]:
                return self.rng.choice(left)
            if not fitting:
                raise Exhausted(f"the constraints leave none of the space's {self.size:,} rows")
            raise Exhausted(
                f"no feasible parameters are left that are not among the study's trials: "
                f"{len(seen)} rows of a space of {self.size:,}"
            )
        raise Exhausted(
            f"no feasible parameters were found beside the study's {len(seen)} trials, by draws "
            f"and one-step changes of them, in a space of {self.size:,}"
        )


@dataclass(frozen=True, slots=True)
class Trials:
    """The study's trials. complete: (row, objective values); running: rows under evaluation;
    seen: all rows that must not come again."""

    complete: list[tuple[Row, tuple[float, ...]]]
    running: list[Row]
    seen: set[Row]

    @classmethod
    def of(cls, study: Study, trial: FrozenTrial, space: Space) -> "Trials":
        found = cls([], [], set())
        for other in study.get_trials(deepcopy=False):
            if other.number == trial.number:
                continue
            fixed = other.system_attrs.get("fixed_params")
            row = space.row(fixed | other.params if fixed else other.params)
            if row is None and other.state is TrialState.RUNNING:
                row = space.heard(other.system_attrs.get(PROPOSAL))
            if row is None:
                # Whatever else it would have asked for, it would end so again.
                if other.state is TrialState.COMPLETE and PROPOSAL in other.system_attrs:
                    found.seen.update(space.completions(other.params))
                continue
            found.seen.add(row)
            if other.state is TrialState.RUNNING:
                found.running.append(row)
            elif other.state is TrialState.COMPLETE and all(map(math.isfinite, other.values)):
                found.complete.append((row, tuple(other.values)))
        return found


def rivals_of(study: Study, trial: FrozenTrial, row: Row, space: Space) -> list[FrozenTrial]:
    """The other trials that are to have the row; or have had it, since the rows were read. One that
    ended before it had all its parameters has had none."""
    told = space.told(row)
    return [
        t
        for t in study.get_trials(deepcopy=False)
        if t.system_attrs.get(PROPOSAL) == told
        and t.number != trial.number
        and (t.state is TrialState.RUNNING or space.options.keys() <= t.params.keys())
    ]


def taken(study: Study, trial: FrozenTrial, row: Row, space: Space) -> bool:
    """Whether one of the others that are to have the row has it. All but the first trial, this one,
    leave it and say so; one that told of it before this one did stores its parameters in a moment;
    one that has died does neither."""
    for _ in range(LOOKS):
        rivals = rivals_of(study, trial, row, space)
        if not rivals or any(t.params for t in rivals):
            return bool(rivals)
        time.sleep(0.1)
    return False


def array(rows: Collection[tuple[float, ...]], dtype: Any, width: int) -> NDArray[Any]:
    """Of tuples (n, width): quicker than numpy's own way."""
    return np.fromiter(itertools.chain.from_iterable(rows), dtype).reshape(len(rows), width)
