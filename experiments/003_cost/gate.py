"""How many candidates a second are gated by the table, and how many when each is counted.

    .venv/bin/python experiments/003_cost/gate.py

Candidates are rows of a space, as a sampler proposes them; gated means priced and compared with a
budget of two metrics. One thread.
"""

import random
import statistics
import time
from pathlib import Path

import torch

from nasattn import SearchSpace, measure
from nasattn.document import Source, check
from nasattn.pricing import Candidates, Pricing
from nasattn.space_file import SpaceFile

ROOT = Path(__file__).parents[2]
MOBILENET = {
    "backbone": {"name": "mobilenet_v2"},
    "sites": ["stage*.*"],
    "blocks": {
        "lightnl": {"ratio": [0.125, 0.25], "stride": [1, 2]},
        "gcnet": {"ratio": [0.125, 0.25]},
        "ccnet": {},
        "se": {"ratio": [0.125, 0.25]},
        "eca": {},
    },
}


def rates(space: SearchSpace, rows: list[dict[str, str]]) -> list[float]:
    plain = space.table.plain
    limits = {"macs": 1.1 * plain["macs"], "params": 1.1 * plain["params"]}
    candidates = Candidates(Pricing(space, ("macs", "params")), limits)
    found = []
    for _ in range(5):
        start = time.thread_time()
        for row in rows:
            candidates.fits(row)
        found.append(len(rows) / (time.thread_time() - start))
    return found


def main() -> None:
    torch.set_num_threads(1)
    spaces = {
        "MobileNetV2, 17 sites, 10 specs": SearchSpace.of(
            check(SpaceFile, MOBILENET, Source("space"))
        ),
        "AutoNL, 42 parameters": SearchSpace.load(ROOT / "search_spaces/autonl.yaml"),
    }
    for name, space in spaces.items():
        start = time.thread_time()
        table = space.table
        built = time.thread_time() - start
        rng = random.Random(0)
        rows = [space.chain.sample(rng) for _ in range(5000)]
        by_table = rates(space, rows)
        start = time.thread_time()
        for row in rows[:10]:
            architecture = space.decode(row)
            assert measure(architecture).values == table(row)
        by_count = 10 / (time.thread_time() - start)
        print(
            f"{name}: {space.size():.3g} architectures; table built in {built:.1f} s; "
            f"gated a second: median {statistics.median(by_table):,.0f} "
            f"(min {min(by_table):,.0f}, max {max(by_table):,.0f}, n=5 x 5000); "
            f"each counted: {by_count:.1f}; "
            f"ratio {statistics.median(by_table) / by_count:,.0f}"
        )


if __name__ == "__main__":
    main()
