"""What checkpoints cost and what trainings leave behind: 200 trainings in one process, every second
one with checkpoints. Prints CPU milliseconds an epoch, side by side, and the resident memory."""

import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from nasattn.config import Experiment
from nasattn.data import load
from nasattn.evaluate.candidate import Evaluator
from nasattn.space import SearchSpace

HERE = Path(__file__).parent
COUNT = int(sys.argv[2]) if len(sys.argv) > 2 else 200


def resident() -> float:
    """Of this process, in MB (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def main(steps: int) -> None:
    torch.set_num_threads(1)
    fields = Experiment.load(HERE / "curves.yaml").as_dict()
    fields["data"] |= {"train": 640, "val": 64}
    fields["training"] |= {"epochs": 4, "epoch_steps": steps, "warm_start": False, "ema": 0.9}
    fields["search"] |= {"rungs": [2, 4]}
    experiment = Experiment.from_dict(fields)
    space = SearchSpace.of(experiment.space)
    data = load(experiment.data, experiment.space.input, experiment.space.classes)
    architecture = max(space.enumerate(), key=lambda a: space.cost(a).values["params"])
    taken: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder:
        evaluator = Evaluator(experiment, data, space.baseline(), Path(folder))
        for number in range(COUNT):
            kept = Path(folder, str(number)) if number % 2 else None
            start = time.process_time()
            evaluator(architecture, lambda share, accuracy: None, checkpoints=kept)
            taken[kept is not None].append((time.process_time() - start) / 4)
            if number in (9, 49, 99, 149, COUNT - 1):
                print(f"after {number + 1} trainings: {resident():.0f} MB resident", flush=True)
        size = sum(f.stat().st_size for f in kept.rglob("*.safetensors")) if kept else 0
    without, with_them = (1e3 * median(taken[some]) for some in (False, True))
    print(f"CPU an epoch of {steps} steps: {without:.1f} ms without, {with_them:.1f} ms with")
    pairs = [b - a for a, b in zip(taken[False], taken[True], strict=True)]
    more = 1e3 * median(pairs)
    print(f"median difference of neighbours {more:.1f} ms; files {size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 2)
