"""What the engine takes beside the trainings: alone, and with several workers on one database.

    python bench.py engine FOLDER [--trials 300]      its time a trial on sqlite, by part
    python bench.py scale URL [--workers 1 2 4 8]     trials a second when a training takes a second

All is the search as users run it (`search_with`, its processes, sampler `frontier`) but for the
evaluator, for which a formula stands that sleeps. Spaces: `quickstart` is that of
search_spaces/cued_digits.yaml with up to four blocks (2,401 architectures; the file's own 241 are
fewer than 300 trials), `long` search_spaces/mobilenet_v2.yaml (17 sites by 11 options, 5e17).
"""

import argparse
import itertools
import json
import os
import random
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
SPACES = HERE.parents[2] / "search_spaces"
LOG, CREW = "BENCH_LOG", "BENCH_CREW"  # variables: a worker's log, and how many workers there are


def experiment(storage: str, space: str) -> Any:
    from nasattn.config import Experiment
    from nasattn.document import load_yaml

    file = "cued_digits" if space == "quickstart" else "mobilenet_v2"
    fields: Mapping[str, Any] = load_yaml(SPACES / f"{file}.yaml")[0]
    budget = {"macs": "1.25x"}
    if space == "quickstart":
        fields, budget = {**fields, "max_blocks": 4}, {**budget, "params": "60k"}
    return Experiment.from_dict(
        {
            "study": f"bench-{space}",
            "storage": storage,
            "space": dict(fields),
            "data": {"name": "cued_digits", "train": 640, "val": 64, "test": 64},
            "training": {"warm_start": False},
            "budget": budget,
            "search": {"sampler": "frontier", "trials": 300},
        },
        "bench",
    )


class Formula:
    """Stands for the training: takes `seconds`, and writes down when it began and ended, by the
    wall and by the processor. pause: waits before the first one."""

    name, stored, rungs = "train", True, (1,)

    def __init__(self, log: Path, seconds: float, pause: Callable[[], None]) -> None:
        import torch

        self.log, self.seconds, self.pause = log, seconds, pause
        self.weights = {"w": torch.zeros(50_000)}  # as many as the quickstart's networks have
        self.marks: list[dict[str, float]] = []

    def __call__(self, architecture: Any, tick: Any, **_: Any) -> tuple[Any, Any]:
        from nasattn.record import Score

        mark = {"began": time.monotonic(), "cpu_began": time.process_time()}
        self.pause()
        time.sleep(self.seconds)
        rng = random.Random(architecture.key)
        gain = sum(random.Random(p.site + p.spec).random() ** 2 for p in architecture.placements)
        accuracy = 0.70 + 0.25 * (1 - 2 ** (-gain / 2)) + rng.gauss(0.0, 0.01)
        mark |= {"ended": time.monotonic(), "cpu_ended": time.process_time()}
        self.marks.append(mark)
        with self.log.open("a") as file:
            file.write(json.dumps(mark | {"pid": os.getpid()}) + "\n")
        curve = (accuracy,)
        score = Score(
            accuracy=accuracy, curve=curve, epochs=1, seconds=1.0, seed=0, evaluator="train"
        )
        return score, self.weights

    def prepare(self, tick: Any) -> bool:
        return False

    def estimate(self, trainings: int, *, prepare: bool) -> float:
        return trainings * self.seconds


# --- the engine alone


class Parts:
    """Processor seconds of a thread by part, each without those of the parts that it calls."""

    def __init__(self) -> None:
        self.spent: Counter[str] = Counter()
        self._stack: list[list[float]] = []

    def wrap(self, owner: Any, name: str, part: str) -> None:
        inner = getattr(owner, name)

        def timed(*args: Any, **options: Any) -> Any:
            frame = [time.thread_time(), 0.0]
            self._stack.append(frame)
            try:
                return inner(*args, **options)
            finally:
                self._stack.pop()
                whole = time.thread_time() - frame[0]
                self.spent[part] += whole - frame[1]
                if self._stack:
                    self._stack[-1][1] += whole

        setattr(owner, name, timed)


def engine(folder: Path, trials: int, repeats: int, spaces: Sequence[str]) -> None:
    """One process, evaluations that take no time: what is between them, at the last 20 trials."""
    from rich.console import Console

    from nasattn.search import loop
    from nasattn.search.display import Display
    from nasattn.search.lease import Leases
    from nasattn.search.loop import Search
    from nasattn.search.samplers import Gate
    from nasattn.search.slots import Slots
    from nasattn.search.study import Study

    parts = Parts()
    for owner, names, part in (
        (Gate, ("sample_relative",), "proposal"),
        (Study, ("rows", "read"), "rows read"),
        (Leases, ("acquire", "release", "holds", "table", "reap"), "leases"),
        (Slots, ("_written", "finish"), "trial written"),
        (loop, ("store",), "weights"),
        (Search, ("_publish", "_sweep"), "files"),
        (Display, ("start", "tick", "end"), "display"),
    ):
        for name in names:
            if hasattr(owner, name):
                parts.wrap(owner, name, part)
    parts.wrap(Search, "_work", "other")

    for space, repeat in itertools.product(spaces, range(repeats)):
        home = folder / f"{space}-{repeat}"
        home.mkdir(parents=True)
        rows: list[Counter[str]] = []

        def part(rows: list[Counter[str]] = rows) -> None:
            rows.append(parts.spent.copy())

        with open(os.devnull, "w") as nowhere:
            display = Display(Console(file=nowhere, force_terminal=True, width=100, height=40))
            search = Search(experiment(f"sqlite:///{home.resolve()}/bench.db", space), display)
            search.evaluator = formula = Formula(home / "log", 0.0, part)
            done = search.run(trials).trials
        assert len({t.architecture.key for t in done}) == len(done) == trials
        marks = list(itertools.pairwise(formula.marks))[-20:]
        wall = [1e3 * (b["began"] - a["ended"]) for a, b in marks]
        cpu = [1e3 * (b["cpu_began"] - a["cpu_ended"]) for a, b in marks]
        print(
            f"{space:>10}  wall {statistics.median(wall):5.1f} ms ({min(wall):.1f} to "
            f"{max(wall):.1f}), processor {statistics.median(cpu):5.1f} ms; load {load()}"
        )
        each = [{k: b[k] - a[k] for k in b} for a, b in itertools.pairwise(rows)][-20:]
        middle = {name: 1e3 * statistics.median(row[name] for row in each) for name in each[-1]}
        told = sorted(middle.items(), key=lambda item: -item[1])
        print(" " * 10, ", ".join(f"{name} {ms:.1f}" for name, ms in told), "(ms of processor)")


# --- several workers


def scale(
    url: str, space: str, workers: Sequence[int], seconds: float, each: int, before: int
) -> None:
    """One study, in which each number of workers goes on, so that the most of them have the most
    rows to read; its first trials are made by one worker without pauses."""
    import shutil
    import tempfile

    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    os.chdir(folder)
    total, alone = before, None
    try:
        run_crew(url, space, 1, 0.0, total, folder)
        for count in workers:
            total += each * count
            log, cpu = run_crew(url, space, count, seconds, total, folder)
            rates, found = [], [by for by in log.values() if len(by) > 1]
            for by in found:
                rates.append((len(by) - 1) / (by[-1]["ended"] - by[0]["ended"]))
            gaps = [b["began"] - a["ended"] for by in found for a, b in itertools.pairwise(by)]
            alone = alone or sum(rates) / count
            print(
                f"{count} workers: {sum(rates):.3f} trials/s, {sum(rates) / count / alone:.1%} of "
                f"linear ({len(gaps)} trials); between two evaluations median "
                f"{1e3 * statistics.median(gaps):.0f} ms, 95 % {1e3 * quantile(gaps, 0.95):.0f}, "
                f"processor {1e3 * cpu:.0f} ms; load {load()}",
                flush=True,
            )
    finally:
        shutil.rmtree(folder)


def run_crew(
    url: str, space: str, count: int, seconds: float, total: int, folder: Path
) -> tuple[dict[int, list[dict[str, float]]], float]:
    """Each worker's evaluations in order, and a worker's median processor seconds between two."""
    from rich.console import Console

    from nasattn.search.display import Display
    from nasattn.search.opening import load_study
    from nasattn.search.workers import Local, search_with

    class Benched(Local):
        def start(self, command: Sequence[str], *rest: Any) -> Any:
            return super().start([sys.executable, str(HERE), "work", *command[4:]], *rest)

    log = folder / f"{count}-{total}"
    os.environ |= {LOG: str(log), CREW: str(count), "BENCH_SECONDS": str(seconds)}
    settings = experiment(url, space)
    with open(os.devnull, "w") as nowhere:
        display = Display(Console(file=nowhere))
        if count == 1:  # as a search with one worker is: in this process
            os.environ["NASATTN_STORAGE"] = url
            work(settings, total, display)
        else:
            search_with(settings, total, count, display, Benched(settings.trainer))
    done = load_study(url, settings.study).trials
    assert len({t.architecture.key for t in done}) == len(done) == total, "exact, no duplicates"
    found: dict[int, list[dict[str, float]]] = defaultdict(list)
    for line in log.read_text().splitlines():
        mark = json.loads(line)
        found[mark["pid"]].append(mark)
    spent = [
        b["cpu_began"] - a["cpu_ended"] for by in found.values() for a, b in itertools.pairwise(by)
    ]
    return found, statistics.median(spent)


def work(settings: Any, total: int, display: Any) -> None:
    """A worker's search; its first evaluation begins when all workers have begun theirs."""
    from nasattn.cli import _loading

    log, count = Path(os.environ[LOG]), int(os.environ[CREW])
    ready = log.with_name(f"{log.name}-ready")
    ready.mkdir(exist_ok=True)

    def pause() -> None:
        (ready / str(os.getpid())).touch()
        while len(list(ready.iterdir())) < count:
            time.sleep(0.01)

    with _loading():  # as the command does
        from nasattn.search.loop import Search

        search = Search(settings, display)
    search.evaluator = Formula(log, float(os.environ["BENCH_SECONDS"]), pause)
    search.run(total)


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))]


def load() -> str:
    return f"{os.getloadavg()[0]:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser()
    what = parser.add_subparsers(dest="what", required=True)
    part = what.add_parser("engine")
    part.add_argument("folder", type=Path)
    part.add_argument("--trials", type=int, default=300)
    part.add_argument("--repeats", type=int, default=1)
    part.add_argument("--spaces", nargs="+", default=["quickstart", "long"])
    part = what.add_parser("scale")
    part.add_argument("url")
    part.add_argument("--space", choices=("quickstart", "long"), default="quickstart")
    part.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    part.add_argument("--seconds", type=float, default=1.0, help="of an evaluation")
    part.add_argument("--each", type=int, default=20, help="trials a worker")
    part.add_argument("--before", type=int, default=100, help="trials in the study already")
    part = what.add_parser("work", help="what `scale` starts")
    part.add_argument("--study")
    part.add_argument("--workers")
    args = parser.parse_args()
    if args.what == "engine":
        engine(args.folder, args.trials, args.repeats, args.spaces)
    elif args.what == "scale":
        scale(args.url, args.space, args.workers, args.seconds, args.each, args.before)
    else:
        from rich.console import Console

        from nasattn.search.display import Display
        from nasattn.search.opening import load_study

        study = load_study(os.environ["NASATTN_STORAGE"], args.study)
        work(study.config, study.config.search.trials, Display(Console()))


if __name__ == "__main__":
    main()
