"""A study of thousands of finished trials, and what the commands cost on it.

    python long.py make runs/long.db [--trials 5000]    writes it, in seconds
    python long.py measure runs/long.db                 processor seconds of each command
    python long.py loop runs/long.db [--trials 20]      of `nasattn resume` to its first proposal,
                                                        and of each trial
    python long.py grow runs/long.db                    of a new block taken up by the study

search_spaces/mobilenet_v2.yaml (17 sites by 11 options, 5e17 architectures), budget 1.25x. The rows
are those that a search writes, but for their accuracy, which a formula gives.
"""

import argparse
import contextlib
import itertools
import json
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from optuna.distributions import CategoricalDistribution, distribution_to_json
from sqlalchemy import insert

from nasattn.architecture import Architecture
from nasattn.config import Experiment
from nasattn.document import load_yaml
from nasattn.pricing import Candidates
from nasattn.record import Score
from nasattn.space import SearchSpace

SPACE = load_yaml(Path(__file__).resolve().parents[2] / "search_spaces" / "mobilenet_v2.yaml")[0]


def experiment(database: Path, study: str, space: Mapping[str, Any] = SPACE) -> Experiment:
    return Experiment.from_dict(
        {
            "study": study,
            "storage": f"sqlite:///{database.resolve()}",
            "space": dict(space),
            "data": {"name": "cued_digits", "train": 640, "val": 64, "test": 64},
            "training": {"warm_start": True},
            "budget": {"macs": "1.25x"},
            "search": {"sampler": "frontier", "trials": 5000},
        }
    )


def score(architecture: Architecture) -> Score:
    """A few sites and blocks help, with some noise: the frontier grows slowly."""
    rng = random.Random(architecture.key)
    worth = {"lightnl": 0.9, "ccnet": 1.0, "gcnet": 0.5, "se": 0.3, "eca": 0.1}
    gain = sum(
        worth[p.block] * random.Random(p.site).random() ** 2 for p in architecture.placements
    )
    accuracy = 0.70 + 0.25 * (1 - 2 ** (-gain / 2)) + rng.gauss(0.0, 0.01)
    curve = tuple(accuracy - 0.1 / (epoch + 1) for epoch in range(10))
    return Score(accuracy=accuracy, curve=curve, epochs=10, seconds=60.0, seed=0, evaluator="train")


def opened(settings: Experiment) -> tuple[Any, Candidates]:
    from nasattn.search.loop import space_facts
    from nasattn.search.opening import open_study

    candidates = Candidates.of(settings, SearchSpace.of(settings.space))
    return open_study(settings, space_facts(candidates)), candidates


def grow(database: Path, name: str) -> None:
    """A block more at each site: seconds of all that it takes before the search goes on."""
    opened(experiment(database, name))  # imports, tables of costs
    wider = SPACE | {"blocks": SPACE["blocks"] | {"simam": {}}}
    began = time.process_time()
    study, _ = opened(experiment(database, name, wider))
    spent = time.process_time() - began
    print(f"{spent:.2f} s: {study.notes[0]}; {len(study.trials)} trials")


def make(database: Path, name: str, trials: int) -> None:
    """In one transaction: through Optuna's own calls it would take minutes."""
    from optuna.storages._rdb import models

    study, candidates = opened(experiment(database, name))
    space, pricing = candidates.space, candidates.pricing
    storage = study.optuna._storage._backend
    study_id = study.optuna._study_id
    distributions = {
        site: CategoricalDistribution(labels) for site, labels in space.parameters.items()
    }
    texts = {site: distribution_to_json(d) for site, d in distributions.items()}
    now = datetime.now()
    tables: dict[Any, list[dict[str, Any]]] = {}

    def add(model: Any, **fields: Any) -> None:
        tables.setdefault(model, []).append(fields)

    with storage.engine.begin() as connection:
        first = connection.exec_driver_sql("select coalesce(max(trial_id), 0) from trials")
        start = first.scalar_one() + 1
        for slot, (row, failed) in enumerate(rows(space, candidates, trials)):
            trial = start + slot
            architecture, cost = space.decode(row), pricing.cost(row)
            state = "FAIL" if failed else "COMPLETE"
            add(
                models.TrialModel,
                trial_id=trial,
                number=slot,
                study_id=study_id,
                state=state,
                datetime_start=now,
                datetime_complete=now,
            )
            for site, label in row.items():
                add(
                    models.TrialParamModel,
                    trial_id=trial,
                    param_name=site,
                    param_value=distributions[site].to_internal_repr(label),
                    distribution_json=texts[site],
                )
            claimed = {
                "slot": slot,
                "architecture": architecture.as_dict(),
                "cost": {"values": dict(cost.values), "context": dict(cost.context)},
            }
            attrs: dict[str, Any] = {"nasattn": claimed}
            excesses = {m: cost.values[m] - limit for m, limit in candidates.asked.items()}
            system = {f"constraints:{m}": excess for m, excess in excesses.items()}
            system["constraints"] = list(excesses.values())
            system["nasattn:proposal"] = [
                labels.index(row[site]) for site, labels in space.parameters.items()
            ]
            if failed:
                attrs["reason"] = "out of memory"
            else:
                got = score(architecture)
                attrs["score"] = got.as_dict()
                for index, value in enumerate((got.accuracy, cost.values["macs"])):
                    add(
                        models.TrialValueModel,
                        trial_id=trial,
                        objective=index,
                        value=value,
                        value_type="FINITE",
                    )
            for key, value in attrs.items():
                add(
                    models.TrialUserAttributeModel,
                    trial_id=trial,
                    key=key,
                    value_json=json.dumps(value),
                )
            for key, value in system.items():
                add(
                    models.TrialSystemAttributeModel,
                    trial_id=trial,
                    key=key,
                    value_json=json.dumps(value),
                )
        for model, fields in tables.items():
            connection.execute(insert(model), fields)


def rows(
    space: SearchSpace, candidates: Candidates, trials: int
) -> Iterator[tuple[dict[str, str], bool]]:
    """The plain backbone, then sparse architectures that fit, each once; one of fifty fails."""
    rng, seen = random.Random(0), set()
    row = space.canonical({})
    while len(seen) < trials:
        if tuple(row.values()) not in seen and candidates.fits(row):
            seen.add(tuple(row.values()))
            yield row, bool(len(seen) > 1 and rng.random() < 0.02)
        drawn = space.chain.sample(rng)
        kept = set(rng.sample(list(drawn), rng.randint(1, 6)))
        row = {site: label if site in kept else "none" for site, label in drawn.items()}


def measure(database: Path, name: str) -> None:
    """Each command in a process of its own: processor seconds, the imports included."""
    arguments = ["--storage", f"sqlite:///{database.resolve()}", "--study", name]
    for command in ("status", "pareto", "report"):
        extra = ["--out", str(database.parent / "report")] if command == "report" else []
        code = (
            "import sys, time; from nasattn.cli import app\n"
            f"sys.argv = ['nasattn', '{command}', *{arguments + extra!r}]\n"
            "try: app()\n"
            "except SystemExit: print('CPU', time.process_time(), file=sys.stderr)"
        )
        began = time.monotonic()
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        wall = time.monotonic() - began
        print(f"{command:>8}  {run.stderr.split()[-1][:5]} s processor, {wall:.2f} s wall")


class Formula:
    """Stands for the training."""

    name, stored, rungs = "train", True, (10,)

    def __init__(self) -> None:
        self.began: list[float] = []
        self.memory: list[float] = []

    def __call__(self, architecture: Architecture, tick: Any, **_: Any) -> tuple[Score, Any]:
        import torch

        self.began.append(time.process_time())
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.memory.append(pages * resource.getpagesize() / 2**20)
        return score(architecture), {"w": torch.zeros(1)}

    def prepare(self, tick: Any) -> bool:
        return False

    def estimate(self, trainings: int, *, prepare: bool) -> float:
        return 0.0


def loop(database: Path, name: str, trials: int) -> None:
    """`nasattn resume` in a process of its own, with a formula for the training."""
    from nasattn.search.opening import load_study
    from nasattn.search.study import finished

    storage = f"sqlite:///{database.resolve()}"
    done = finished(load_study(storage, name).trials)
    arguments = ["resume", "--storage", storage, "--study", name, "--trials", str(done + trials)]
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from nasattn import cli\n"
        "with cli._loading(): import long\n"
        f"sys.argv[1:] = {arguments!r}\n"
        "long.resume()"
    )
    print(f"{done} trials: ", end="", flush=True)
    quiet = subprocess.DEVNULL
    subprocess.run([sys.executable, "-c", code], check=True, stdout=quiet)


def resume() -> None:
    """The command line of this process; seconds to the first proposal, the imports included, and of
    each trial, on standard error."""
    from nasattn import cli
    from nasattn.search import loop

    evaluator = Formula()
    loop.Evaluator = lambda *_, **__: evaluator  # type: ignore[assignment, misc]
    with contextlib.suppress(SystemExit):
        cli.main()
    each = [b - a for a, b in itertools.pairwise(evaluator.began)]
    first, median, trials = evaluator.began[0], statistics.median(each), len(evaluator.began)
    parts = [statistics.median(evaluator.memory[i : i + 10]) for i in (0, trials // 2, trials - 10)]
    print(
        f"{first:.2f} s to the first proposal, {median:.3f} s each; memory at start, middle, "
        f"end {', '.join(f'{part:.0f}' for part in parts)} MiB",
        file=sys.stderr,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("make", "measure", "loop", "grow"))
    parser.add_argument("database", type=Path)
    parser.add_argument("--study", default="long")
    parser.add_argument("--trials", type=int)
    args = parser.parse_args()
    if args.what == "make":
        make(args.database, args.study, args.trials or 5000)
    elif args.what == "measure":
        measure(args.database, args.study)
    elif args.what == "grow":
        grow(args.database, args.study)
    else:
        loop(args.database, args.study, args.trials or 20)


if __name__ == "__main__":
    main()
