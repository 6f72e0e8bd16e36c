"""What proposes the next architecture. Any Optuna sampler, behind one gate.

The gate corrects a proposal inside the sampler, before anything is stored (a suggested value cannot
be changed afterwards): blocks too many for the budget or `max_blocks` are taken out at random, and
what was proposed before is drawn again. One of Optuna's that knows nothing yet, or never learns, is
asked for nothing: the gate draws uniformly from what fits.
"""

import copy
import random
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import (
    BaseGASampler,
    BaseSampler,
    GPSampler,
    NSGAIISampler,
    RandomSampler,
    TPESampler,
)
from optuna.storages import InMemoryStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState, create_trial

from nasattn.config import Search
from nasattn.cost.table import Values, excess
from nasattn.pricing import Candidates, Key
from nasattn.search.frontier import FrontierSampler
from nasattn.search.frontier_space import FEW, Exhausted
from nasattn.seed import derive

STARTUP = 10  # slots that are drawn uniformly before TPE has something to learn from
TRIES = 10  # draws from the sampler before the gate takes the last one's nearest neighbours


def frontier(gate: "Gate", seed: int) -> FrontierSampler:
    """The known costs are the table's; feasible are the rows that fit, in canonical form."""
    candidates = gate.candidates
    pricing, space = candidates.pricing, candidates.space
    last: tuple[dict[str, str], Values] | None = None  # one row is asked of several times in turn

    def price(row: dict[str, str]) -> Values:
        nonlocal last
        if last is None or last[0] is not row:
            last = row, pricing(row)
        return last[1]

    def priced(metric: str) -> Callable[[dict[str, str]], float]:
        return lambda row: price(row)[metric]

    objectives = enumerate(gate.objectives)
    costs = {index: priced(metric) for index, metric in objectives if metric != "accuracy"}

    def excluded(row: dict[str, str]) -> float:
        canonical = not space.skeleton or space.canonical(row) == row
        feasible = canonical and space.sparse(row) and not excess(price(row), candidates.limits)
        return 0.0 if feasible else 1.0

    def draw(rng: random.Random, most: int) -> Iterable[dict[str, str]]:
        if (listed := candidates.listed) is not None:
            return rng.sample(listed, min(most, len(listed)))
        # Each of these is drawn and priced anew.
        source = candidates.budgets[0] if candidates.budgets else space.chain
        return (source.sample(rng) for _ in range(min(most, FEW)))

    options = {name: CategoricalDistribution(v) for name, v in space.parameters.items()}
    return FrontierSampler(costs, seed, excluded, space=options, draw=draw)


SAMPLERS: Mapping[str, Callable[["Gate", int], BaseSampler]] = {
    "frontier": frontier,
    "tpe": lambda gate, seed: TPESampler(seed=seed, constant_liar=True),
    "nsga2": lambda gate, seed: NSGAIISampler(
        population_size=gate.search.population or 20, seed=seed
    ),
    "gp": lambda gate, seed: GPSampler(seed=seed),
    "random": lambda gate, seed: RandomSampler(seed=seed),
}


class Gate(BaseSampler):
    """A sampler whose every proposal is new and feasible, and follows from (study seed, slot) and
    the study's rows alone. `slot` is set before each ask; slot 0 is the plain backbone."""

    def __init__(self, candidates: Candidates, search: Search, objectives: Sequence[str]) -> None:
        self.candidates = candidates
        self.search: Search = search
        self.objectives = objectives
        self.slot = 0
        # For the costs it remembers; its proposals follow from `seed`, which is set before each.
        self._kept: FrontierSampler | None = None

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        parameters = self.candidates.space.parameters
        return {name: CategoricalDistribution(labels) for name, labels in parameters.items()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        candidates = self.candidates
        if self.slot == 0:
            return candidates.space.canonical({})
        seen = seen_rows(study, search_space)
        seed = derive(self.search.seed, self.slot)
        rng = random.Random(seed)
        inner = self._kept or SAMPLERS[self.search.sampler](self, seed)
        if isinstance(inner, FrontierSampler):
            self._kept, inner.seed = inner, seed
        if isinstance(inner, BaseGASampler):
            # Asked here first, as its first answer for a generation lists the parents in another
            # order than its later ones.
            generation = inner.get_trial_generation(study, trial)
            informed = bool(inner.get_parent_population(study, generation))
        else:
            informed = not isinstance(inner, RandomSampler) and (
                self.slot > STARTUP or isinstance(inner, FrontierSampler)
            )
        row: dict[str, str] = {}
        tries = 1 if isinstance(inner, GPSampler) else TRIES  # its next would cost a second more
        for _ in range(tries if informed else 0):
            try:
                proposal = _propose(inner, study, trial, search_space)
            except Exhausted:
                break  # it has found none; the draw below is exact where the space is listed
            row = candidates.thinned(proposal, rng)
            if tuple(row.values()) not in seen and candidates.fits(row):
                return row
        near = [n for n in candidates.neighbours(row) if tuple(n.values()) not in seen]
        drawn = rng.choice(near) if near else candidates.draw(rng, seen)
        if drawn is None:
            raise Exhausted
        return drawn

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        raise RuntimeError(f"the parameter '{param_name}' is not of this space")


class Snapshot(InMemoryStorage):
    """A study's rows as they were read, and one more for which a sampler proposes: its number is
    `number`, or the next free one. Rows are not copied, nor read again however often a sampler asks
    (TPE does at each parameter of each draw). Only the study's attributes are the database's own:
    NSGA-II keeps its parents there."""

    def __init__(self, study: Study, rows: Sequence[FrozenTrial], number: int) -> None:
        super().__init__()
        self.origin = study
        self.create_new_study(study.directions, study.study_name)
        self.trial = create_trial(state=TrialState.RUNNING)
        self.trial.number = max([number, *(row.number + 1 for row in rows)])
        self.rows = [*sorted(rows, key=lambda row: row.number), self.trial]

    @property
    def kept(self) -> dict[str, Any]:
        """What the sampler wants to find in the row later: NSGA-II's generation."""
        attributes = self.trial.system_attrs.items()
        return {key: value for key, value in attributes if key.endswith(":generation")}

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        rows = [row for row in self.rows if states is None or row.state in states]
        return copy.deepcopy(rows) if deepcopy else rows

    def get_trial(self, trial_id: int) -> FrozenTrial:
        return next(row for row in self.rows if row._trial_id == trial_id)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        self.trial.system_attrs[key] = value

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        return self.origin._storage.get_study_system_attrs(self.origin._study_id)

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        self.origin._storage.set_study_system_attr(self.origin._study_id, key, value)


def _propose(
    inner: BaseSampler, study: Study, trial: FrozenTrial, space: dict[str, BaseDistribution]
) -> dict[str, str]:
    relative = inner.infer_relative_search_space(study, trial)
    drawn = inner.sample_relative(study, trial, relative) if relative else {}
    return {
        site: drawn[site]
        if site in drawn
        else inner.sample_independent(study, trial, site, distribution)
        for site, distribution in space.items()
    }


def seen_rows(study: Study, space: Mapping[str, Any]) -> set[Key]:
    """The proposals of all whole rows, running and failed ones included."""
    rows = (row.params for row in study.get_trials(deepcopy=False))
    return {tuple(map(params.__getitem__, space)) for params in rows if len(params) == len(space)}


__all__ = ["SAMPLERS", "Exhausted", "FrontierSampler", "Gate", "Snapshot"]
