"""Trains every placement of curves.yaml and writes a row of curves.csv for each training.

    python curves.py [SEEDS] [back]           goes on where it stopped; a kill loses one training;
                                              with `back` from the other end: for a second process
    python curves.py tau                      how well a rung ranks what the last one says

Columns: key and placements of the architecture; repeat, seed; macs, params; rung_E: the annealed
validation accuracy at the rung of E epochs; spent_E: all epochs trained up to it, decays counted;
full: those of a training without the earlier rungs; curve: the accuracy after every epoch; seconds.
The seeds are the outer loop: whatever is there when it is stopped, is whole for some of them.
"""

import csv
import sys
import time
from collections import Counter
from itertools import combinations, permutations
from pathlib import Path
from statistics import fmean

from scipy.stats import kendalltau

from nasattn.config import Experiment
from nasattn.data import load
from nasattn.evaluate.candidate import Evaluator
from nasattn.evaluate.train import fit
from nasattn.search.display import duration
from nasattn.seed import derive
from nasattn.space import SearchSpace

HERE = Path(__file__).parent
TABLE = HERE / "curves.csv"


def train(seeds: int, step: int) -> None:
    experiment = Experiment.load(HERE / "curves.yaml")
    space = SearchSpace.of(experiment.space)
    data = load(experiment.data, experiment.space.input, experiment.space.classes)
    plain = space.baseline()
    evaluator = Evaluator(experiment, data, plain, HERE / "runs")
    evaluator.prepare(lambda share, accuracy: None)
    rungs, schedule = experiment.rungs, experiment.training
    decays = [schedule.decay_epochs(rung) for rung in rungs]
    spent = [rung + sum(decays[:k]) for k, rung in enumerate(rungs)]
    names = ["key", "repeat", "seed", "macs", "params"]
    names += [f"{kind}_{rung}" for rung in rungs for kind in ("rung", "spent")]
    names += ["full", "seconds", "curve", "placements"]
    if not TABLE.exists():
        TABLE.write_text(",".join(names) + "\n")
    every = [(repeat, a) for repeat in range(seeds) for a in list(space.enumerate())[::step]]
    start, count = time.monotonic(), 0
    for repeat, architecture in every:
        if (architecture.key, repeat) in (done := trained()):
            continue
        seed = derive(experiment.search.seed, architecture.key, repeat)
        score = fit(
            evaluator.start(architecture, seed),
            data,
            schedule,
            seed=seed,
            where=experiment.trainer,
            rungs=rungs,
        )
        assert score.epochs == spent[-1]
        cost = space.cost(architecture).values
        row = [architecture.key, repeat, seed, cost["macs"], cost["params"]]
        for accuracy, epochs in zip(score.rungs, spent, strict=True):
            row += [f"{accuracy:.4f}", epochs]
        row += [rungs[-1], f"{score.seconds:.2f}", " ".join(f"{a:.4f}" for a in score.curve)]
        row += ["; ".join(f"{site}: {spec}" for site, spec in architecture.specs.items())]
        if (architecture.key, repeat) not in trained():  # else the other process was here
            with TABLE.open("a", newline="") as file:
                csv.writer(file, lineterminator="\n").writerow(row)
        count += 1
        left = (time.monotonic() - start) / count * (len(every) - len(done) - 1)
        print(
            f"{len(done) + 1}/{len(every)}  seed {repeat}  {score.rungs}  {duration(left)} left",
            flush=True,
        )


def trained() -> set[tuple[str, int]]:
    return {(row["key"], int(row["repeat"])) for row in rows()}


def rows() -> list[dict[str, str]]:
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


def tau() -> None:
    """Kendall's tau-b between each rung and the end, of the same training and of another seed's."""
    table = rows()
    rungs = [int(n.removeprefix("rung_")) for n in table[0] if n.startswith("rung_")]
    count = Counter(row["repeat"] for row in table)
    repeats = [r for r, n in count.items() if n == max(count.values())]
    print(", ".join(f"seed {r}: {n} trainings" for r, n in count.items()))
    for label, some in (
        ("all", table),
        ("without ccnet", [r for r in table if "ccnet" not in r["placements"]]),
    ):
        by = {r: {row["key"]: row for row in some if row["repeat"] == r} for r in repeats}
        for rung in rungs[:-1]:
            same = [_tau(by[r], rung, by[r], rungs[-1]) for r in repeats]
            pairs = permutations(repeats, 2)
            other = [_tau(by[a], rung, by[b], rungs[-1]) for a, b in pairs]
            line = f"rung {rung} to {rungs[-1]}, {label}: {fmean(same):.3f} within a seed"
            print(line + (f", {fmean(other):.3f} to another seed's end" if other else ""))
        pairs = combinations(repeats, 2)
        ends = [_tau(by[a], rungs[-1], by[b], rungs[-1]) for a, b in pairs]
        if ends:
            print(f"end to another seed's end, {label}: {fmean(ends):.3f} (the noise's ceiling)")


def _tau(first: dict[str, dict[str, str]], one: int, second: dict, other: int) -> float:
    keys = sorted(first.keys() & second.keys())
    a = [float(first[k][f"rung_{one}"]) for k in keys]
    b = [float(second[k][f"rung_{other}"]) for k in keys]
    return float(kendalltau(a, b)[0])


if __name__ == "__main__":
    if sys.argv[1:] == ["tau"]:
        tau()
    else:
        seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
        train(seeds, -1 if sys.argv[2:] == ["back"] else 1)
