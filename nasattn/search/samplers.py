"""What proposes the next architecture. Any Optuna sampler, behind one gate.

The gate corrects a proposal inside the sampler, before anything is stored (a suggested value cannot
be changed afterwards): blocks too many for the budget or `max_blocks` are taken out at random, and
what was proposed before is drawn again. A sampler that knows nothing yet, or never learns, is asked
for nothing: the gate draws uniformly from what fits.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import (
    BaseGASampler,
    BaseSampler,
    GPSampler,
    NSGAIISampler,
    RandomSampler,
    TPESampler,
)
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from nasattn.config import Search
from nasattn.pricing import Candidates, Key
from nasattn.search.frontier import Exhausted, FrontierSampler
from nasattn.seed import derive

STARTUP = 10  # slots that are drawn uniformly before TPE has something to learn from
TRIES = 10  # draws from the sampler before the gate takes the last one's nearest neighbours


SAMPLERS: Mapping[str, Callable[["Gate", int], BaseSampler]] = {
    "frontier": lambda gate, seed: frontier(gate, seed),
    "tpe": lambda gate, seed: TPESampler(seed=seed, constant_liar=True),
    "nsga2": lambda gate, seed: NSGAIISampler(
        population_size=gate.search.population or 20, seed=seed
    ),
    "gp": lambda gate, seed: GPSampler(seed=seed),
    "random": lambda gate, seed: RandomSampler(seed=seed),
}


def frontier(gate: "Gate", seed: int) -> FrontierSampler:
    """The known costs are the table's; feasible are the rows that fit, in canonical form."""
    candidates = gate.candidates
    pricing, space = candidates.pricing, candidates.space

    def priced(metric: str) -> Callable[[dict[str, str]], float]:
        return lambda row: pricing(row)[metric]

    objectives = enumerate(gate.objectives)
    costs = {index: priced(metric) for index, metric in objectives if metric != "accuracy"}

    def excluded(row: dict[str, str]) -> float:
        canonical = space.canonical(row) == row
        return 0.0 if canonical and space.sparse(row) and candidates.fits(row) else 1.0

    def draw(rng: random.Random) -> dict[str, str]:
        if candidates.listed is not None:
            return rng.choice(candidates.listed)
        budgets = candidates.budgets
        return budgets[0].sample(rng) if budgets else space.chain.sample(rng)

    options = {name: CategoricalDistribution(v) for name, v in space.parameters.items()}
    return FrontierSampler(costs, seed, excluded, space=options, draw=draw)


class Gate(BaseSampler):
    """A sampler whose every proposal is new and feasible, and follows from (study seed, slot) and
    the study's rows alone. `slot` is set before each ask; slot 0 is the plain backbone."""

    def __init__(self, candidates: Candidates, search: Search, objectives: Sequence[str]) -> None:
        self.candidates = candidates
        self.search: Search = search
        self.objectives = objectives
        self.slot = 0

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
        inner = SAMPLERS[self.search.sampler](self, seed)
        if isinstance(inner, BaseGASampler):
            # Asked here first, as its first answer for a generation lists the parents in another
            # order than its later ones.
            generation = inner.get_trial_generation(study, trial)
            informed = bool(inner.get_parent_population(study, generation))
        else:
            study, trial = in_memory(study)
            informed = not isinstance(inner, RandomSampler) and (
                self.slot > STARTUP or isinstance(inner, FrontierSampler)
            )
        row: dict[str, str] = {}
        tries = 1 if isinstance(inner, GPSampler) else TRIES  # its next would cost a second more
        for _ in range(tries if informed else 0):
            row = candidates.thinned(_propose(inner, study, trial, search_space), rng)
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


def in_memory(study: Study) -> tuple[Study, FrozenTrial]:
    """The finished rows and the whole proposals under evaluation, in memory, and a trial to propose
    for. TPE asks its storage for all rows at each parameter of each draw: many times the price of
    the proposal on a database."""
    copy = optuna.create_study(directions=study.directions)
    rows = study.get_trials(deepcopy=False)
    copy.add_trials(row for row in rows if row.params and not dropped(row))
    number = copy.ask().number
    return copy, copy.get_trials(deepcopy=False)[number]


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
    return {
        tuple(row.params[site] for site in space)
        for row in study.get_trials(deepcopy=False)
        if len(row.params) == len(space) and not dropped(row)
    }


def dropped(row: optuna.trial.FrozenTrial) -> bool:
    """A row whose process died before the proposal was whole: it never became a trial."""
    return row.state is TrialState.FAIL and "nasattn" not in row.user_attrs


__all__ = ["SAMPLERS", "Exhausted", "FrontierSampler", "Gate", "dropped", "in_memory", "seen_rows"]
