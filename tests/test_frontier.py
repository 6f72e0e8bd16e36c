"""The frontier sampler on its own: what it promises any Optuna study."""

import copy
import itertools
import math
import pickle
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from nasattn.pareto import hypervolume
from nasattn.search import frontier
from nasattn.search.frontier import LEARNED, START
from nasattn.search.frontier_space import DRAWN, FEW, PROPOSAL, Space, Trials
from nasattn.search.samplers import Exhausted, FrontierSampler
from nasattn.search.surrogate import (
    Coding,
    GaussianProcess,
    Inputs,
    Undominated,
    log_normal,
    weights_of,
)

Params = dict[str, Any]
SITES, OPTIONS = 6, ("none", "small", "wide", "deep")
PRICE = {"none": 0.0, "small": 1.0, "wide": 2.2, "deep": 3.1}
SPACE = {f"site{i}": CategoricalDistribution(OPTIONS) for i in range(SITES)}


@pytest.fixture(autouse=True)
def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def cost(params: Params) -> float:
    return sum((i + 2) * PRICE[v] for i, v in enumerate(params.values()))


def weight(params: Params) -> float:
    return sum(
        (SITES - i) * (v != "none") + 0.1 * (v == "wide") for i, v in enumerate(params.values())
    )


def error(params: Params) -> float:
    """Additive with pairs: worse where neighbours are the same."""
    gains = {"none": 0.0, "small": 1.0, "wide": 1.6, "deep": 1.2}
    values = list(params.values())
    gain = sum(gains[v] * (1.5 if i in (1, 4) else 0.4) for i, v in enumerate(values))
    clash = sum(a == b != "none" for a, b in itertools.pairwise(values))
    return float(1.0 / (1.0 + max(0.0, gain - 0.5 * clash)))


def study_of(sampler: Any, axes: int = 2, **options: Any) -> optuna.Study:
    options = {"directions": ["minimize"] * axes} | options
    return optuna.create_study(sampler=sampler, **options)


def objective(trial: optuna.Trial) -> tuple[float, float]:
    params = {name: trial.suggest_categorical(name, OPTIONS) for name in SPACE}
    return error(params), cost(params)


def keys(study: optuna.Study) -> list[tuple[Any, ...]]:
    return [tuple(t.params[name] for name in SPACE) for t in study.trials]


def test_a_proposal_follows_from_the_seed_the_number_and_the_rows(tmp_path: Path) -> None:
    whole = study_of(FrontierSampler({1: cost}, seed=3))
    whole.optimize(objective, n_trials=24)
    storage = f"sqlite:///{tmp_path}/s.db"
    for _ in range(2):
        sampler = FrontierSampler({1: cost}, seed=3)
        parts = study_of(sampler, study_name="s", storage=storage, load_if_exists=True)
        parts.optimize(objective, n_trials=12)
    assert keys(parts) == keys(whole)
    other = study_of(FrontierSampler({1: cost}, seed=4))
    other.optimize(objective, n_trials=24)
    assert keys(other) != keys(whole)


@pytest.mark.parametrize("space", [None, SPACE])
def test_nothing_is_repeated_and_no_constraint_exceeded(space: Any) -> None:
    limits = [lambda p: cost(p) - 14.0, lambda p: weight(p) - 12.0]
    study = study_of(FrontierSampler({1: cost}, constraints=limits, space=space))
    study.optimize(objective, n_trials=60)
    assert len(set(keys(study))) == 60
    blind = 1 if space is None else 0
    for trial in study.trials[blind:]:
        assert cost(trial.params) <= 14.0
        assert weight(trial.params) <= 12.0
    feasible = [
        row
        for row in itertools.product(OPTIONS, repeat=SITES)
        if all(limit(dict(zip(SPACE, row, strict=True))) <= 0 for limit in limits)
    ]
    assert len(feasible) < 0.1 * len(OPTIONS) ** SITES, "random draws alone would hit it"


def test_a_blind_first_trial_keeps_what_can_be_told_from_its_parameters() -> None:
    """The limit adds up over the parameters so far, so that none has to be taken on trust."""
    for seed in range(10):
        study = study_of(FrontierSampler({1: cost}, seed, constraints=lambda p: cost(p) - 8.0))
        study.optimize(objective, n_trials=2)
        assert all(cost(t.params) <= 8.0 for t in study.trials)


def simulated(means: Any, stds: Any, front: Any, reference: Any, low: float = -0.4) -> float:
    """The share of random points of a box that a random value of the candidate would newly
    dominate, times the box."""
    rng = np.random.default_rng(0)
    points = rng.uniform(low, reference, (200_000, len(means)))
    values = means + stds * rng.standard_normal(points.shape)
    taken = np.zeros(len(points), dtype=bool)
    for member in front:
        taken |= np.all(points >= member, axis=1)
    new = ~taken & np.all(points >= values, axis=1)
    return float(new.mean() * np.prod(reference - low))


def gaussian(mean: float, std: float) -> Callable[[Any], Any]:
    """Expected shortfalls by numerical integration of P(Y < t)."""
    grid = np.linspace(-8, 8, 20001)
    density = np.exp(-0.5 * grid**2) / np.sqrt(2 * np.pi) * (grid[1] - grid[0])
    values = mean + std * grid
    return lambda t: np.array([[np.sum(np.maximum(x - values, 0) * density)] for x in t])


@pytest.mark.parametrize(("axes", "unknown"), [(2, 1), (3, 1), (3, 2), (4, 1)])
def test_expected_growth_is_what_simulation_finds(axes: int, unknown: int) -> None:
    rng = np.random.default_rng(axes * 10 + unknown)
    front = rng.uniform(0, 1, (12, axes)).round(1)  # members share values, as costs do
    reference = np.full(axes, 0.85)  # some members lie beyond it
    for _ in range(3):
        means = rng.uniform(0.1, 0.6, axes)
        stds = np.array([0.0] * (axes - unknown) + [0.15] * unknown)
        shortfalls = [gaussian(m, s) for m, s in zip(means, stds, strict=True)]
        exact = Undominated(front, reference).growth(shortfalls)
        assert exact[0] == pytest.approx(
            simulated(means, stds, front, reference), rel=0.1, abs=4e-3
        )
        certain = [gaussian(m, 0.0) for m in means]
        growth = hypervolume([*front, means], reference) - hypervolume(front, reference)
        assert Undominated(front, reference).growth(certain)[0] == pytest.approx(growth, abs=1e-9)


def test_log_normal_shortfall_is_its_integral() -> None:
    mean, std, floor = np.array([-1.2, 0.3]), np.array([0.4, 0.05]), 0.7
    thresholds = np.array([0.5, 0.9, 1.2, 2.5])
    grid = np.linspace(-8, 8, 40001)[:, None]
    density = np.exp(-0.5 * grid**2) / np.sqrt(2 * np.pi) * (grid[1] - grid[0])
    values = floor + np.exp(mean + std * grid)
    expected = [(np.maximum(t - values, 0) * density).sum(axis=0) for t in thresholds]
    found = log_normal(mean, std, floor)(thresholds)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def inputs_of(rows: Any, costs: Any, options: int = 4) -> Inputs:
    codes = np.array(rows)
    one_hot = np.eye(options)[codes]
    values = np.tile(np.eye(options), (codes.shape[1], 1))
    coding = Coding(np.arange(0, len(values), options), values)
    return Inputs(one_hot.reshape(len(codes), -1), np.array(costs)[:, None], coding)


@pytest.mark.parametrize("doubt", [-1e9, 1e9])
def test_predictions_are_those_of_a_naive_process(
    monkeypatch: pytest.MonkeyPatch, doubt: float
) -> None:
    """The kernel pair by pair from its definition, and the textbook's moments; with parameters that
    matter more than others, and with all alike."""
    monkeypatch.setattr(GaussianProcess, "DOUBT", doubt)
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 4, (40, 5)).tolist()
    costs, values = rng.random(40), rng.random(40) + 1.0
    process = GaussianProcess(inputs_of(rows[:30], costs[:30]), values[:30])

    weights = process.weights
    assert weights.mean() == pytest.approx(1.0)
    assert (np.ptp(weights) > 0.01) == (doubt < 0)

    def counts(row: list[int], value: int) -> float:
        return sum(w for w, v in zip(weights, row, strict=True) if v == value)

    def kernel(i: int, j: int) -> float:
        p, a, b = GaussianProcess, rows[i], rows[j]
        apart = math.sqrt(sum((counts(a, v) - counts(b, v)) ** 2 for v in range(4)) / 2) / 5
        shares = sum(counts(a, v) / 5 * counts(b, v) / 5 for v in range(4))
        parts = math.exp(-p.P * sum(x != y for x, y in zip(a, b, strict=True)) / 5)
        parts += math.exp(-p.P * apart)
        parts += process.a * math.exp(-0.5 * (costs[i] - costs[j]) ** 2 / p.WIDTH**2)
        parts += p.TREND * (shares + shares**2)
        return parts / (2 + process.a + p.TREND)

    full = np.array([[kernel(i, j) for j in range(40)] for i in range(40)])
    known, new = slice(0, 30), slice(30, 40)
    inverse = np.linalg.inv(full[known, known] + process.noise * np.eye(30))
    logs = np.log(values[:30] - process.floor)
    mean = logs.mean() + full[new, known] @ inverse @ (logs - logs.mean())
    covariance = full[new, new] - full[new, known] @ inverse @ full[known, new]
    found_mean, found_std = process._moments(inputs_of(rows[30:], costs[30:]))
    assert found_mean == pytest.approx(mean, abs=1e-6)  # the process counts in single precision
    assert found_std == pytest.approx(np.sqrt(np.diag(covariance) * process.scale), abs=1e-6)


def test_a_trend_goes_on_beyond_what_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The more often an option is taken the better, and no row seen has it more than twice: one
    that has it six times of six is expected far below the best; not so without the trend."""
    rng = np.random.default_rng(1)
    rows = [r for r in rng.integers(0, 4, (200, 6)).tolist() if r.count(1) <= 2][:40]
    values = np.array([1.0 - 0.1 * r.count(1) for r in rows])

    def above_floor() -> float:
        """Of the least value seen, so far above the floor."""
        process = GaussianProcess(inputs_of(rows, np.zeros(40)), values)
        mean, _ = process._moments(inputs_of([[1] * 6], [0.0]))
        return math.exp(mean[0]) / (values.min() - process.floor)

    beyond = above_floor()
    assert beyond < 0.1
    monkeypatch.setattr(GaussianProcess, "TREND", 0.0)
    assert above_floor() > 5 * beyond


def test_parameters_that_matter_more_are_found() -> None:
    """Two sites of eight make nearly all of the difference, whichever option stands there; where
    all do as much, none is told apart. The process finds out which it is."""
    rng = np.random.default_rng(2)
    rows = rng.integers(0, 4, (60, 8))
    worth = np.array([0.0, 0.6, 1.0, 1.4])[rows]
    for matter in ([1, 1, 1, 1, 1, 1, 1, 1], [4, 4, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2]):
        targets = worth @ np.array(matter) + rng.normal(0, 0.1, 60)
        inputs = inputs_of(rows.tolist(), np.zeros(60))
        found = weights_of(inputs, targets, 0.5)
        assert found.mean() == pytest.approx(1.0)
        process = GaussianProcess(inputs, np.exp(targets))
        if matter[0] == matter[-1]:
            np.testing.assert_allclose(found, 1.0, atol=0.15)
            assert (process.weights == 1.0).all()
        else:
            assert found[:2].min() > 8 * found[2:].max()
            assert process.weights[:2].min() > 3 * process.weights[2:].max()


def test_first_trials_are_spread_by_costs_of_which_equal_ones_are_alike() -> None:
    values = np.array([[3.0, 1.0], [1.0, 1.0], [1.0, 5.0], [2.0, 1.0]])
    expected = [
        [sum(w < v for w in column) + sum(w == v for w in column) / 2 for v in column]
        for column in values.T.tolist()
    ]
    np.testing.assert_array_equal(frontier._ranks(values), np.transpose(expected))


def test_directions_only_mirror() -> None:
    plain = study_of(FrontierSampler({1: cost}, seed=1))
    plain.optimize(objective, n_trials=30)
    mirrored = study_of(
        FrontierSampler({0: lambda p: -cost(p)}, seed=1), directions=["maximize", "maximize"]
    )
    mirrored.optimize(lambda t: tuple(-v for v in reversed(objective(t))), n_trials=30)
    assert keys(mirrored) == keys(plain)


def found(study: optuna.Study, worst: list[float]) -> float:
    points = [[error(t.params), cost(t.params), weight(t.params)] for t in study.trials]
    return hypervolume([p[: len(worst)] for p in points], worst)


@pytest.mark.parametrize("axes", [2, 3])
def test_it_beats_random_search(axes: int) -> None:
    """On every seed, with one and with two costs, by at least half of what random search leaves."""
    costs = {1: cost, 2: weight}
    worst = [1.01, 90.0, 25.0][:axes]
    rows = [dict(zip(SPACE, row, strict=True)) for row in itertools.product(OPTIONS, repeat=SITES)]
    points = np.array([[error(p), cost(p), weight(p)][:axes] for p in rows])
    best = hypervolume(points, worst)

    def both(trial: optuna.Trial) -> list[float]:
        objective(trial)
        return [error(trial.params), cost(trial.params), weight(trial.params)][:axes]

    for seed in range(4):
        known = {i: costs[i] for i in range(1, axes)}
        ours = study_of(FrontierSampler(known, seed), axes)
        ours.optimize(both, n_trials=40)
        blind = study_of(optuna.samplers.RandomSampler(seed=seed), axes)
        blind.optimize(both, n_trials=40)
        assert best - found(ours, worst) < 0.5 * (best - found(blind, worst))


def test_a_row_dearer_than_all_so_far_can_be_worth_a_trial() -> None:
    """What the dearest rows cost is known, so the frontier may go on beyond what was tried."""
    cheap = [dict.fromkeys(SPACE, "none") | {f"site{i}": v} for i in range(SITES) for v in OPTIONS]
    worst = max(map(cost, cheap))
    study = study_of(FrontierSampler({1: cost}))
    study.add_trials(
        [create_trial(params=p, distributions=SPACE, values=[error(p), cost(p)]) for p in cheap]
    )
    study.optimize(objective, n_trials=12)
    assert max(cost(t.params) for t in study.trials) > 1.2 * worst


def test_running_failed_pruned_and_queued_rows_are_not_repeated() -> None:
    study = study_of(FrontierSampler({1: cost}))
    queued = dict.fromkeys(SPACE, "wide")
    for number in range(40):
        trial = study.ask()
        values = objective(trial)
        if number == 20:
            study.enqueue_trial(queued)
        if number % 4 == 0:
            continue  # left running
        if number % 4 == 1:
            study.tell(trial, state=TrialState.FAIL)
        elif number % 8 == 2:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, values)
    assert len(set(keys(study))) == 40
    assert keys(study)[21] == tuple(queued.values())


def test_trials_asked_for_at_once_differ() -> None:
    study = study_of(FrontierSampler({1: cost}))
    study.optimize(objective, n_trials=START + 4)
    waiting = [study.ask() for _ in range(6)]
    for trial in reversed(waiting):
        # Each stops half-way, so that only its stored proposal tells what it will be.
        trial.suggest_categorical("site0", OPTIONS)
    for trial in waiting:
        objective(trial)
    assert len(set(keys(study))) == START + 10


def test_failures_teach_nothing_and_infinite_values_do_no_harm() -> None:
    study = study_of(FrontierSampler({1: cost}))

    def breaking(trial: optuna.Trial) -> tuple[float, float]:
        values = objective(trial)
        return (float("inf"), values[1]) if trial.number % 5 == 0 else values

    study.optimize(breaking, n_trials=30)
    assert len(set(keys(study))) == 30


@pytest.mark.parametrize("constant", [0.0, 3.5])
def test_a_constant_objective_is_survived(constant: float) -> None:
    study = study_of(FrontierSampler({1: lambda p: constant}, space=SPACE))
    study.optimize(lambda t: (constant, objective(t)[1] * 0 + constant), n_trials=START + 5)
    assert len(set(keys(study))) == START + 5


@pytest.mark.parametrize("costs", [None, cost, {True: cost}, {"1": cost}])
def test_costs_that_are_not_by_objective_are_refused(costs: Any) -> None:
    with pytest.raises(ValueError, match=r"^costs: got .* allowed: "):
        FrontierSampler(costs)


def test_values_that_differ_by_their_rounding_alone_are_survived() -> None:
    study, values = study_of(FrontierSampler({1: cost}, space=SPACE)), [0.3, 0.1 + 0.2]
    study.optimize(lambda t: (values[t.number % 2], objective(t)[1]), n_trials=START + 5)
    assert len(set(keys(study))) == START + 5


def test_two_unknown_objectives_are_learned_in_their_own_directions() -> None:
    """The weight is unknown too and wanted large: one more than the errors and the costs above."""
    both = lambda p: [error(p), weight(p), cost(p)]  # noqa: E731
    worst = [1.01, 0.0, 90.0]

    def volume(study: optuna.Study) -> float:
        points = [[e, -w, c] for e, w, c in (t.values for t in study.trials)]
        return hypervolume(points, worst)

    for seed in range(2):
        studies = [
            study_of(sampler, directions=["minimize", "maximize", "minimize"])
            for sampler in (
                FrontierSampler({2: cost}, seed),
                optuna.samplers.RandomSampler(seed=seed),
            )
        ]
        for study in studies:
            study.optimize(lambda t: both(objective(t) and t.params), n_trials=40)
        assert len(set(keys(studies[0]))) == 40
        assert volume(studies[0]) > volume(studies[1])


def test_a_long_study_is_learned_in_part_and_nothing_of_it_repeated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where every row is on the frontier."""
    wide = {f"s{i}": CategoricalDistribution(range(11)) for i in range(17)}
    price = lambda p: float(sum(v * 11**i for i, v in enumerate(p.values())))  # noqa: E731
    rng = random.Random(0)
    drawn = [{name: rng.randrange(11) for name in wide} for _ in range(3 * LEARNED)]
    study = study_of(FrontierSampler({1: price}))
    study.add_trials(
        [create_trial(params=p, distributions=wide, values=[-price(p), price(p)]) for p in drawn]
    )
    learned = []

    class Counted(GaussianProcess):
        def __init__(self, inputs: Any, values: Any) -> None:
            learned.append(len(values))
            super().__init__(inputs, values)

    monkeypatch.setattr(frontier, "GaussianProcess", Counted)
    proposed = study.ask(wide).params
    assert LEARNED <= learned[0] <= 2 * LEARNED
    assert proposed not in drawn


def test_what_is_running_is_taken_for_what_it_is_expected_to_be() -> None:
    """A candidate like it is then worth less; what it was worth itself is spent."""
    sampler = FrontierSampler({1: cost})
    study = study_of(sampler)
    study.optimize(objective, n_trials=30)
    space = sampler._space(dict.fromkeys(SPACE, OPTIONS), random.Random(0), {})
    complete = [(space.row(t.params), tuple(t.values)) for t in study.trials]
    rows = lambda running: Trials(complete, running, set())  # type: ignore[arg-type]  # noqa: E731
    alone = frontier._Model(sampler, space, rows([]), [1, 1])
    candidates = [r for r in space.changes(alone.members, 100) if r not in dict(complete)]  # type: ignore[arg-type]
    worth = alone.score(space.prices(candidates))
    best = candidates[int(np.argmax(worth))]
    beside = frontier._Model(sampler, space, rows([best]), [1, 1])
    assert beside.score(space.prices([best]))[0] < 0.5 * max(worth)


def space_of(options: dict[str, tuple[Any, ...]], fixed: Params | None = None) -> Space:
    return FrontierSampler({})._space(options, random.Random(0), fixed or {})


@pytest.mark.parametrize("fixed", [{}, {"b": "x"}])
def test_changes_are_another_option_or_two_exchanged(fixed: Params) -> None:
    """All, against every row of the space; what only one of two parameters has is not exchanged."""
    options = {"a": ("none", "x", "y"), "b": ("x", "none"), "c": ("none", "z", "y")}
    space, names = space_of(options, fixed), list(options)
    row = {"a": "y", "b": "x", "c": "none"}
    expected = set()
    for values in itertools.product(*options.values()):
        other = dict(zip(names, values, strict=True))
        differ = [n for n in names if other[n] != row[n]]
        exchanged = len(differ) == 2 and all(
            other[n] == row[m] for n, m in itertools.permutations(differ)
        )
        if (len(differ) == 1 or exchanged) and all(other[n] == v for n, v in fixed.items()):
            expected.add(values)
    code = space.row(row)
    assert code
    every = [tuple(space.params(r).values()) for r in space.changes([code], 1000)]
    assert sorted(every) == sorted(expected), "each once"
    assert ("none", "x", "y") in expected, "a and c exchanged"
    some = [tuple(space.params(r).values()) for r in space.changes([code], 4)]
    assert len(some) <= 4
    assert set(some) <= expected


@pytest.mark.parametrize("costs", [{1: cost}, {1: cost, 2: weight}])
def test_the_best_of_many_draws_is_among_the_promising(
    costs: dict[int, Callable[[Params], float]],
) -> None:
    """The stand-in's few, against the growth that the process expects of all of them."""
    found = []
    for seed in range(6):
        sampler = FrontierSampler(costs, seed)
        study = study_of(sampler, 1 + len(costs))
        study.optimize(lambda t: (objective(t)[0], *(f(t.params) for f in costs.values())), 25)
        space = sampler._space(dict.fromkeys(SPACE, OPTIONS), random.Random(seed), {})
        rows = Trials.of(study, study.ask(SPACE), space)
        model = frontier._Model(sampler, space, rows, [1] * (1 + len(costs)))
        left = {r: price for r, price in space.drawn.items() if r not in rows.seen}
        few = model.promising(rows.seen)
        assert len(few) == frontier.POOL < len(left) / 10
        assert few.items() <= left.items()
        found.append(max(model.score(few)) / max(model.score(left)))
    assert np.mean(found) > 0.95, found
    assert max(found) == pytest.approx(1.0, abs=1e-3), "the two scores are of different batches"


def test_a_small_space_is_exhausted_whole_and_then_refused() -> None:
    def small(trial: optuna.Trial) -> tuple[float, float]:
        a, b = (
            trial.suggest_categorical("a", [0, 1, 2, 3]),
            trial.suggest_categorical("b", [0, 1, 2]),
        )
        return (a - b) ** 2, a + b

    sampler = FrontierSampler(
        {1: lambda p: p["a"] + p["b"]}, constraints=lambda p: p["a"] * p["b"] - 3
    )
    study = study_of(sampler)
    with pytest.raises(Exhausted, match="of a space of 12"):
        study.optimize(small, n_trials=50)
    done = [(t.params["a"], t.params["b"]) for t in study.trials if t.state is TrialState.COMPLETE]
    feasible = {(a, b) for a in range(4) for b in range(3) if a * b <= 3}
    assert feasible <= set(done)
    assert len(done) == len(set(done)) <= len(feasible) + 1  # a blind first trial


@pytest.mark.parametrize("known", [None, SPACE])
def test_threads_do_not_repeat_each_others_proposals(known: Any) -> None:
    study = study_of(FrontierSampler({1: cost}, space=known))
    study.optimize(objective, n_trials=1)  # whose space nobody knows
    study.optimize(objective, n_trials=40, n_jobs=4)
    assert len(set(keys(study))) == 41


class AtOnce(FrontierSampler):
    """Its first proposal is there before the other's is stored, as in two processes."""

    def __init__(self, together: threading.Barrier, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.together, self.first = together, True

    def _propose(self, *arguments: Any) -> Any:
        row = super()._propose(*arguments)
        if self.first:
            self.first = False
            self.together.wait()
        return row


def test_processes_that_propose_at_once_do_not_repeat_each_other(tmp_path: Path) -> None:
    """Two samplers on one database, as in two processes: each reads before either has told."""
    storage = f"sqlite:///{tmp_path}/one.db"
    study_of(FrontierSampler({1: cost}), storage=storage, study_name="one").optimize(
        objective, n_trials=12
    )

    def work(together: threading.Barrier) -> None:
        sampler = AtOnce(together, {1: cost}, space=SPACE)
        study = optuna.load_study(study_name="one", storage=storage, sampler=sampler)
        for _ in range(6):
            sampler.first = True
            study.optimize(objective, n_trials=1)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, [threading.Barrier(2, timeout=60)] * 2))
    study = optuna.load_study(study_name="one", storage=storage)
    assert len(set(keys(study))) == len(study.trials) == 24


TWO = {"a": CategoricalDistribution((0, 1))}


def test_what_another_process_proposed_and_finished_meanwhile_is_left_alone() -> None:
    """It is complete before this one has told of its own proposal; only the other row is left."""
    sampler = FrontierSampler({1: lambda p: p["a"]}, space=TWO)
    study = study_of(sampler)
    propose, other = sampler._propose, list[Params]()

    def overtaken(space: Any, *arguments: Any) -> Any:
        row = propose(space, *arguments)
        if not other:
            other.append(space.params(row))
            attributes = {PROPOSAL: space.told(row)}
            ended = create_trial(
                params=other[0], distributions=TWO, values=(0.5, 0.0), system_attrs=attributes
            )
            study.add_trial(ended)
        return row

    sampler._propose = overtaken  # type: ignore[method-assign]
    assert study.ask(TWO).params == {"a": 1 - other[0]["a"]}
    with pytest.raises(Exhausted):
        study.ask(TWO)


def test_who_ended_before_it_had_its_parameters_keeps_no_row() -> None:
    space = TWO | {"b": CategoricalDistribution((0, 1))}
    study = study_of(FrontierSampler({1: lambda p: p["a"]}, space=space))
    for row in ([0, 0], [1, 1]):
        ended = create_trial(
            params={"a": row[0]},
            distributions=TWO,
            state=TrialState.FAIL,
            system_attrs={PROPOSAL: dict(zip("ab", row, strict=True))},
        )
        study.add_trial(ended)
    found = set()
    for _ in range(4):
        trial = study.ask(space)
        found.add(tuple(trial.params.values()))
        study.tell(trial, (0.5, 0.0))
    assert len(found) == 4
    with pytest.raises(Exhausted):
        study.ask(space)


@pytest.mark.parametrize("low", [0.1 + 0.2, 0.3, -1e18])
def test_a_cost_far_beyond_all_that_were_seen_does_no_harm(low: float) -> None:
    """The seen ones differ by a rounding error; one that runs costs 10,000."""
    costs = {v: low if v == "none" else 0.3 for v in OPTIONS} | {"deep": 1e4}
    study = study_of(FrontierSampler({1: lambda p: costs[p["site0"]]}, space=SPACE))
    for i, last in enumerate(itertools.product(OPTIONS, repeat=2)):
        params = dict.fromkeys(SPACE, OPTIONS[i % 3]) | {"site4": last[0], "site5": last[1]}
        values = (float(i), costs[params["site0"]])
        study.add_trial(create_trial(params=params, distributions=SPACE, values=values))
    study.enqueue_trial(dict.fromkeys(SPACE, "deep"))
    study.ask(SPACE)
    assert study.ask(SPACE).params != dict.fromkeys(SPACE, "deep")


def test_of_a_draw_without_an_end_as_many_rows_are_taken_as_are_asked_for() -> None:
    def draw(rng: random.Random, most: int) -> Any:
        while True:
            yield {name: rng.choice(OPTIONS) for name in SPACE}

    study = study_of(FrontierSampler({1: cost}, space=SPACE, draw=draw))
    study.optimize(objective, n_trials=START + 2)
    assert len(set(keys(study))) == START + 2


def test_many_rows_are_drawn_only_where_each_is_cheap() -> None:
    """Of one's own draw, or of a space whose costs are soon all known."""
    asked = list[int]()

    def draw(rng: random.Random, most: int) -> Any:
        asked.append(most)
        return ({f"p{i}": rng.choice(OPTIONS) for i in range(30)} for _ in range(most))

    small, vast = dict.fromkeys(SPACE, OPTIONS), {f"p{i}": OPTIONS for i in range(30)}
    assert len(space_of(small).drawn) > FEW
    assert len(space_of(vast).drawn) == FEW
    own = FrontierSampler({}, draw=draw)
    assert len(own._space(vast, random.Random(0), {}).drawn) == asked[0] == DRAWN
    fixed = own._space(vast, random.Random(0), {"p0": "wide"}).drawn
    assert len(fixed) == FEW
    assert {row[0] for row in fixed} == {OPTIONS.index("wide")}
    assert len(asked) == 1, "it knows nothing of what is fixed"


def test_of_equal_members_of_the_frontier_one_is_changed() -> None:
    """Else copies would crowd out the others, and be learned from in their place."""
    sampler = FrontierSampler({1: cost})
    study = study_of(sampler)
    rows = [
        dict.fromkeys(SPACE, "none"),
        *(dict.fromkeys(SPACE, "small") | {"site0": o} for o in OPTIONS),
    ]
    for params, values in zip(rows, [(2.0, 0.0), *[(1.0, 1.0)] * 3, (3.0, 1.0)], strict=True):
        study.add_trial(create_trial(params=params, distributions=SPACE, values=values))
    space = sampler._space(dict.fromkeys(SPACE, OPTIONS), random.Random(0), {})
    model = frontier._Model(sampler, space, Trials.of(study, study.ask(SPACE), space), [1, 1])
    assert [space.params(row) for row in model.members] == rows[:2]


def test_errors_beyond_all_measure_leave_scores_that_compare() -> None:
    sampler = FrontierSampler({1: cost})
    study = study_of(sampler)
    rng = random.Random(0)
    for value in [*range(11), 1e300]:
        params = {name: rng.choice(OPTIONS) for name in SPACE}
        values = (float(value), cost(params))
        study.add_trial(create_trial(params=params, distributions=SPACE, values=values))
    space = sampler._space(dict.fromkeys(SPACE, OPTIONS), random.Random(0), {})
    with np.errstate(all="ignore"):
        model = frontier._Model(sampler, space, Trials.of(study, study.ask(SPACE), space), [1, 1])
        scores = model.score(space.drawn)
    assert not np.isnan(scores).any()


def test_parameters_without_options_in_common_are_not_exchanged() -> None:
    """Of as many steps as are asked for, none is lost to a pair that cannot be."""
    options = {f"p{i}": tuple(f"{i}.{j}" for j in range(4)) for i in range(24)}
    space = space_of(options)
    assert len(list(space.changes([(0,) * 24], 1000))) == 24 * 3
    assert not space._pairs
    many = space_of({f"p{i}": ("none", "se") for i in range(300)})
    assert 0 < len(many._pairs) <= len(many._moves) == 600


def test_options_that_repeat_are_refused() -> None:
    study = study_of(FrontierSampler({1: lambda p: 0.0}))
    space = {"a": CategoricalDistribution(["x", "x", "y"]), "b": CategoricalDistribution([0, 1])}
    study.add_trial(create_trial(params={"a": "x", "b": 0}, distributions=space, values=(0.0, 0.0)))
    with pytest.raises(ValueError, match=r"options of a repeat: \('x', 'x', 'y'\); allowed: each"):
        study.ask(space)


@pytest.mark.parametrize("values", [(True, 1), (0, 0.0, "0"), (None, 0, False)])
def test_options_that_are_equal_are_refused(values: tuple[Any, ...]) -> None:
    """Optuna would store the first for each: the rows would not tell which were tried."""
    space = {"a": CategoricalDistribution(values)}
    study = study_of(FrontierSampler({1: lambda p: 0.0}, space=space))
    with pytest.raises(ValueError, match="allowed: each once, and of those that are equal"):
        study.ask(space)


@pytest.mark.parametrize("added", [True, False])
def test_the_order_of_a_trials_parameters_means_nothing(added: bool) -> None:
    """Of a trial that was added, or by turns; with one that told of its proposal and died."""
    sizes = {"a": 2, "b": 8, "c": 3}
    study = study_of(FrontierSampler({1: lambda p: float(sum(p.values()))}))
    if added:
        distributions = {n: CategoricalDistribution(range(sizes[n])) for n in reversed(sizes)}
        study.add_trial(
            create_trial(params=dict.fromkeys("cba", 0), distributions=distributions, values=(0, 0))
        )

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        names = list(sizes) if added or trial.number % 2 else list(reversed(sizes))
        p = {name: trial.suggest_categorical(name, range(sizes[name])) for name in names}
        return float(p["a"] * p["b"]), float(sum(p.values()))

    if added:
        study.ask().suggest_categorical("a", range(2))
    study.optimize(objective, n_trials=46)
    rows = [tuple(t.params[n] for n in sizes) for t in study.trials if len(t.params) == 3]
    assert len(rows) == len(set(rows)) == 46 + added


@pytest.mark.parametrize("most", [6, 2])
@pytest.mark.parametrize("added", [True, False])
def test_a_limit_that_only_says_yes_or_no_is_met_from_the_first_options(
    most: int, added: bool
) -> None:
    """No draw meets it, and none is nearer to it than another."""
    space = {f"s{i}": CategoricalDistribution(("none", *OPTIONS[1:], "x", "y")) for i in range(17)}
    limit = lambda p: float(sum(v != "none" for v in p.values()) > most)  # noqa: E731
    sampler = FrontierSampler(
        {1: lambda p: float(sum(map(len, p.values())))}, constraints=limit, space=space
    )
    study = study_of(sampler)
    if added:
        worst = create_trial(params=dict.fromkeys(space, "x"), distributions=space, values=(9, 17))
        study.add_trial(worst)
    for number in range(12):
        trial = study.ask(space)
        assert limit(trial.params) == 0.0
        study.tell(trial, (float(number), sampler.costs[1](trial.params)))
    assert len({tuple(t.params.values()) for t in study.trials}) == 12 + added


def test_the_last_row_is_not_lost_to_two_that_ask_for_it_at_once(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/one.db"
    space = {"a": CategoricalDistribution((0, 1)), "b": CategoricalDistribution((0, 1, 2))}
    price = lambda p: float(p["a"] + p["b"])  # noqa: E731
    study = study_of(FrontierSampler({1: price}), storage=storage, study_name="one")
    for row in list(itertools.product((0, 1), (0, 1, 2)))[:5]:
        params = dict(zip(space, row, strict=True))
        study.add_trial(
            create_trial(params=params, distributions=space, values=(0.5, price(params)))
        )
    found: list[Any] = []

    def work(together: threading.Barrier) -> None:
        sampler = AtOnce(together, {1: price}, space=space)
        study = optuna.load_study(study_name="one", storage=storage, sampler=sampler)
        try:
            found.append(tuple(study.ask(space).params.values()))
        except Exhausted:
            found.append(None)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, [threading.Barrier(2, timeout=60)] * 2))
    assert sorted(found, key=str) == [(1, 2), None]


@pytest.mark.parametrize("rival", ["took it", "leaves it", "died"])
def test_the_last_row_that_a_later_trial_is_to_have_as_well(
    rival: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has told of it first and stores its parameters a moment later; or it has seen this one."""
    monkeypatch.setattr("nasattn.search.frontier_space.LOOKS", 3)
    sampler = FrontierSampler({1: lambda p: p["a"]}, space=TWO)
    study = study_of(sampler)
    study.add_trial(create_trial(params={"a": 0}, distributions=TWO, values=(0.5, 0.0)))
    propose, storage = sampler._propose, study._storage

    def beside(space: Any, *arguments: Any) -> Any:
        row = propose(space, *arguments)
        if len(study.trials) == 2:
            attributes = {PROPOSAL: space.told(row)}
            study.add_trial(create_trial(state=TrialState.RUNNING, system_attrs=attributes))
        return row

    def later(_: float) -> None:
        number = study.trials[2]._trial_id
        if rival == "took it":
            storage.set_trial_param(number, "a", 1, TWO["a"])
        elif rival == "leaves it":
            storage.set_trial_system_attr(number, PROPOSAL, {})

    sampler._propose = beside  # type: ignore[method-assign]
    monkeypatch.setattr("nasattn.search.frontier_space.time.sleep", later)
    if rival == "took it":
        with pytest.raises(Exhausted):
            study.ask(TWO)
        assert study.trials[1].system_attrs[PROPOSAL] == {}
    else:
        assert study.ask(TWO).params == {"a": 1}


def test_a_cost_is_asked_of_feasible_rows_alone() -> None:
    """Such as a table that has no others."""
    table = {row: float(sum(row)) for row in itertools.product((0, 1, 2), repeat=3) if any(row)}
    asked = list[tuple[Any, ...]]()

    def price(p: Params) -> float:
        asked.append(tuple(p.values()))
        return table[tuple(p.values())]

    forbidden = lambda p: 1.0 if not any(p.values()) else -1.0  # noqa: E731
    space = {name: CategoricalDistribution((0, 1, 2)) for name in "abc"}
    sampler = FrontierSampler({1: price}, constraints=forbidden)
    study = study_of(sampler)
    first = create_trial(params=dict.fromkeys(space, 1), distributions=space, values=(0.5, 3.0))
    study.add_trial(first)
    for _ in range(20):
        trial = study.ask()
        row = tuple(trial.suggest_categorical(name, (0, 1, 2)) for name in space)
        study.tell(trial, (1 / sum(row), table[row]))
    assert len({tuple(t.params.values()) for t in study.trials}) == 21
    assert len(asked) == len(set(asked)), "each is priced once"


def test_a_sampler_can_be_copied_and_pickled() -> None:
    sampler = FrontierSampler({1: cost}, seed=3)
    study = study_of(sampler)
    study.optimize(objective, n_trials=12)
    proposals = []
    for each in (sampler, copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        again = study_of(each)
        again.add_trials(study.trials)
        proposals.append(again.ask(SPACE).params)
    assert proposals[0] == proposals[1] == proposals[2]


def test_who_asks_while_another_has_suggested_only_a_part_is_not_asked_for_its_costs() -> None:
    study = study_of(FrontierSampler({1: lambda p: float(p["b"])}))
    for name in ("a", "a", "b"):
        study.ask().suggest_categorical(name, (0, 1))
    assert all(len(t.params) == 1 for t in study.trials)


def test_trials_that_have_suggested_only_a_part_do_not_hide_the_space() -> None:
    study = study_of(FrontierSampler({1: cost}))
    open_one = study.ask()
    open_one.suggest_categorical("site0", OPTIONS)
    study.optimize(objective, n_trials=3)
    for some in ({}, {"site0": OPTIONS[0]}):
        study.add_trial(
            create_trial(
                params=some,
                distributions={name: SPACE[name] for name in some},
                values=[0.5, 0.5],
            )
        )
    sampler = study.sampler
    assert list(sampler.infer_relative_search_space(study, open_one._get_latest_trial())) == list(
        SPACE
    )


def test_what_is_enqueued_in_part_is_completed_to_a_new_row() -> None:
    wide = {f"s{i}": CategoricalDistribution((0, 1, 2)) for i in range(4)}
    price = lambda p: float(sum(p.values()))  # noqa: E731
    study = study_of(FrontierSampler({1: price}, space=wide, constraints=lambda p: price(p) - 5))
    for number in range(30):
        if number % 3 == 2:
            study.enqueue_trial({"s1": 1.0, "s3": number % 2})
        trial = study.ask(wide)
        study.tell(trial, (1.0 / (1 + trial.params["s2"]), price(trial.params)))
    rows = [tuple(t.params[name] for name in wide) for t in study.trials]
    assert len(set(rows)) == 30
    assert all(sum(row) <= 5 for row in rows)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_cost_or_constraint_that_is_no_number_is_not_feasible(bad: float) -> None:
    strange = OPTIONS[1]

    def price(p: Params) -> float:
        return bad if p["site0"] == strange else cost(p)

    def limit(p: Params) -> float:
        return bad if p["site1"] == strange else -1.0

    study = study_of(FrontierSampler({1: price}, space=SPACE, constraints=limit))
    for _ in range(20):
        trial = study.ask(SPACE)
        assert strange not in (trial.params["site0"], trial.params["site1"])
        study.tell(trial, objective(trial))


@pytest.mark.parametrize("seed", range(5))
def test_a_first_trial_whose_space_nobody_knows_takes_the_first_options(seed: int) -> None:
    def limit(p: Params) -> float:
        return float(sum(p[f"s{i}"] for i in range(6))) - 2

    sampler = FrontierSampler({1: lambda p: float(p["s0"])}, seed=seed, constraints=limit)
    study = study_of(sampler)
    for _ in range(8):
        trial = study.ask()
        row = {f"s{i}": trial.suggest_categorical(f"s{i}", (0, 1, 2)) for i in range(6)}
        assert limit(row) <= 0
        study.tell(trial, (float(sum(row.values())), float(row["s0"])))


def test_seventeen_sites_by_eleven_options() -> None:
    names = [f"s{i}" for i in range(17)]
    rng = random.Random(0)
    gains = [[0.0] + [rng.uniform(-0.2, 1) for _ in range(10)] for _ in names]

    def price(params: Params) -> float:
        return float(sum(params.values()))

    def run(sampler: Any) -> float:
        study = study_of(sampler)
        for number in range(50):
            trial = study.ask()
            row = {name: trial.suggest_categorical(name, range(11)) for name in names}
            gain = sum(g[v] for g, v in zip(gains, row.values(), strict=True))
            study.tell(trial, (1 - gain / 17, price(row)))
            assert len({tuple(t.params.values()) for t in study.trials}) == number + 1
        points = np.array([t.values for t in study.trials])
        return hypervolume(points, [1.3, 170.0])

    ours = run(FrontierSampler({1: price}, space=None))
    assert ours > 1.1 * run(optuna.samplers.RandomSampler(seed=0))


def test_a_tight_constraint_in_a_wide_space_is_met_without_listing_it() -> None:
    """Feasible is one row in about 10**13; the least infeasible draw is walked down."""
    wide = {f"s{i}": CategoricalDistribution(range(11)) for i in range(17)}
    spent = lambda p: float(sum(p.values()))  # noqa: E731
    study = study_of(FrontierSampler({1: spent}, space=wide, constraints=lambda p: spent(p) - 4))
    for _ in range(25):
        trial = study.ask(wide)
        study.tell(trial, (1.0 / (1 + trial.params["s3"]), spent(trial.params)))
    assert all(spent(t.params) <= 4 for t in study.trials)
    assert len({tuple(t.params.values()) for t in study.trials}) == 25


def test_draws_of_ones_own_replace_uniform_ones() -> None:
    """All from a budget's draws until the model takes over, the blind first trial excepted."""
    allowed = {"none", "small"}
    study = study_of(
        FrontierSampler(
            {1: cost},
            space=SPACE,
            draw=lambda rng, most: [{name: rng.choice(sorted(allowed)) for name in SPACE}] * most,
        )
    )
    study.optimize(objective, n_trials=START)
    assert all(set(t.params.values()) <= allowed for t in study.trials)


@pytest.mark.parametrize("costs", [{0: cost, 1: cost}, {2: cost}])
def test_costs_that_leave_nothing_to_learn_are_refused(costs: Any) -> None:
    study = study_of(FrontierSampler(costs, space=SPACE))
    with pytest.raises(ValueError, match="at least one left to learn"):
        study.ask(SPACE)


@pytest.mark.parametrize("earlier", ["added", "run"])
def test_a_parameter_that_is_suggested_no_more_does_not_hide_what_was_proposed(
    earlier: str,
) -> None:
    def asked(count: int) -> Callable[[optuna.Trial], tuple[float, float]]:
        def objective(trial: optuna.Trial) -> tuple[float, float]:
            params = {
                f"site{i}": trial.suggest_categorical(f"site{i}", OPTIONS) for i in range(count)
            }
            return error(params), cost(params)

        return objective

    study = optuna.create_study(
        directions=["minimize"] * 2, sampler=FrontierSampler(costs={1: cost}, seed=1)
    )
    if earlier == "run":
        study.optimize(asked(SITES), n_trials=3)
    else:
        rng = random.Random(0)
        for _ in range(3):
            params = {name: rng.choice(OPTIONS) for name in SPACE}
            found = create_trial(
                params=params, distributions=SPACE, values=[error(params), cost(params)]
            )
            study.add_trial(found)
    study.optimize(asked(4), n_trials=25)
    later = [tuple(t.params.values()) for t in study.trials[3:]]
    # The first of them may be of a space that nobody knows any more.
    assert len(set(later)) == len(later) == 25


def test_trials_that_end_before_they_have_asked_for_all_are_not_repeated() -> None:
    def objective(trial: optuna.Trial) -> tuple[float, float]:
        if trial.suggest_categorical("attention", ["on", "off"]) == "off":
            return 1.0, 0.0
        sizes = [trial.suggest_categorical(name, [0, 1, 2]) for name in ("width", "depth")]
        return 1 / (1 + sum(sizes)), float(sum(sizes))

    def known(params: Params) -> float:
        on = params["attention"] == "on"
        return float(params.get("width", 0) + params.get("depth", 0)) if on else 0.0

    sampler = FrontierSampler({1: known})
    study = optuna.create_study(directions=["minimize"] * 2, sampler=sampler)
    study.enqueue_trial({"attention": "on", "width": 0, "depth": 0})  # tells what there is
    with pytest.raises(Exhausted, match="no feasible parameters are left"):
        study.optimize(objective, n_trials=20)
    found = [tuple(t.params.values()) for t in study.trials if t.state is TrialState.COMPLETE]
    assert len(set(found)) == len(found) == 10, "nine that are on, and the one that is off"


def test_parameters_that_come_and_go_are_named_when_the_rest_is_used_up() -> None:
    def objective(trial: optuna.Trial) -> tuple[float, float]:
        site = trial.suggest_categorical("site", ["a", "b"])
        extra = trial.suggest_categorical(f"of {site}", ["x", "y"])
        return float(extra == "x"), float(site == "a")

    known = {1: lambda params: float(params["site"] == "a")}
    study = optuna.create_study(directions=["minimize"] * 2, sampler=FrontierSampler(known))
    with pytest.raises(Exhausted, match=r"\['of a', 'of b'\] are not: the space has to be flat"):
        study.optimize(objective, n_trials=9)


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_parameter_that_is_kept_from_the_sampler_is_named() -> None:
    def objective(trial: optuna.Trial) -> tuple[float, float]:
        params = {name: trial.suggest_categorical(name, OPTIONS) for name in SPACE}
        return error(params), cost(params)

    sampler = FrontierSampler(costs={1: lambda params: PRICE[params["site0"]]})
    fixing = optuna.samplers.PartialFixedSampler({"site0": "wide"}, sampler)
    study = optuna.create_study(directions=["minimize"] * 2, sampler=fixing)
    with pytest.raises(ValueError, match=r"\['site0'\] are kept from this sampler.*`space`"):
        study.optimize(objective, n_trials=3)


@pytest.mark.parametrize("bad", [{"costs": {1: 5}}, {"constraints": 5}, {"constraints": [5]}])
def test_what_is_no_function_is_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="costs and constraints have to be functions"):
        FrontierSampler(**{"costs": {1: cost}} | bad)


@pytest.mark.parametrize("axis", [IntDistribution(0, 3), list(OPTIONS)])
def test_a_space_that_is_not_categorical_is_refused(axis: Any) -> None:
    with pytest.raises(ValueError, match=r"\['site0'\] are not categorical"):
        FrontierSampler({1: cost}, space=SPACE | {"site0": axis})


def test_options_that_cannot_be_compared_are_refused() -> None:
    with pytest.warns(UserWarning, match="persistent storage"):
        space = {"a": CategoricalDistribution([[1, 2], [3, 4]])}  # type: ignore[list-item]
    study = study_of(FrontierSampler({1: lambda p: 0.0}, space=space))
    with pytest.raises(ValueError, match="unhashable type: 'list'; allowed as options: None, bool"):
        study.ask(space)


def test_costs_that_are_never_finite_are_named_when_nothing_is_left() -> None:
    study = study_of(FrontierSampler({1: lambda p: math.nan}, space=SPACE))
    with pytest.raises(Exhausted, match=r"known costs of the objectives \[1\] are not finite"):
        study.ask(SPACE)


def test_what_space_has_and_no_trial_asks_for_is_named() -> None:
    asked = {"site": CategoricalDistribution([1, 2, 3])}
    space = asked | {
        "more": CategoricalDistribution(["x", "y"]),
        "one": CategoricalDistribution([1]),
    }
    study = study_of(FrontierSampler({1: lambda p: p["site"]}, space=space))
    with pytest.raises(Exhausted, match=r"No trial has asked for \['more'\], which `space` has"):
        for _ in range(50):
            study.tell(trial := study.ask(asked), (0.0, trial.params["site"]))


def test_what_space_lacks_is_named() -> None:
    first, *_ = SPACE
    study = study_of(FrontierSampler({1: lambda p: {}[3]}, space=SPACE))
    with pytest.raises(KeyError, match="3"):  # of a table of the user's own
        study.ask(SPACE)
    study = study_of(FrontierSampler({1: lambda p: p["lacking"]}, space=SPACE))
    with pytest.raises(ValueError, match=rf"asks for 'lacking'; `space` has .*'{first}'"):
        study.ask(SPACE)


def test_constraints_that_leave_nothing_are_told() -> None:
    study = study_of(FrontierSampler({1: cost}, constraints=lambda p: 1.0, space=SPACE))
    with pytest.raises(Exhausted, match="the constraints leave none of the space's 4,096 rows"):
        study.ask(SPACE)


def test_a_known_cost_that_trials_do_not_have_is_told() -> None:
    study = study_of(FrontierSampler({1: lambda p: -cost(p)}, space=SPACE))
    with pytest.warns(UserWarning, match=r"costs\[1\] gives -\S+ for a trial whose objective 1 is"):
        study.optimize(objective, n_trials=12)


def test_costs_are_named_by_their_index() -> None:
    with pytest.raises(ValueError, match="got the key 'macs'; allowed: indices"):
        FrontierSampler(costs={"macs": cost, 1: cost})  # type: ignore[dict-item]
