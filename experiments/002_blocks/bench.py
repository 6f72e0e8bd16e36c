"""Every block against its naive form: time and peak memory of a training step, and their growth.

    python bench.py speed [--device cuda] [--only se,ccnet] [--shape 32x96x14x14]
    python bench.py growth [--device cuda] [--only se,ccnet]

The first writes speed_<device>.csv, the second growth_<device>.csv; rows of other cases stay.

Both forms have the same weights and are compared, output and gradients, before anything is timed.
On the CPU every case is a process of its own, with one thread; on a GPU all share one.
"""

import argparse
import csv
import gc
import multiprocessing
import random
import resource
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import naive
import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from nasattn.blocks import BLOCKS

HERE = Path(__file__).parent
GIB, MIB = 2**30, 2**20
MOST_BYTES, MOST_SECONDS = 6 * GIB, 60
SHAPES = [(32, 24, 56, 56), (32, 40, 28, 28), (32, 96, 14, 14), (32, 160, 7, 7), (1, 512, 97, 97)]
SIDES, GROWTH_CHANNELS = (32, 64, 97, 128), 64
PAIRS, CASE_SECONDS = (3, 31), 2.5  # least and most repeats; seconds a case may take beyond
TOLERANCE = 1e-2  # of root mean squares in float32; in float64 the two forms agree to 1e-12

Shape = tuple[int, int, int, int]
Row = dict[str, Any]
Times = tuple[float, float, float]  # forward, backward, wall of both; seconds

# Label -> block, options, port. The paper's form everywhere; no dropout, which is random.
CASES: dict[str, tuple[str, Row, naive.Port]] = {
    "self_attention": ("self_attention", {}, naive.self_attention),
    "non_local": ("non_local", {}, naive.non_local),
    "non_local gaussian": ("non_local", {"mode": "gaussian"}, naive.non_local),
    "non_local dot_product": ("non_local", {"mode": "dot_product"}, naive.non_local),
    "non_local concatenation": ("non_local", {"mode": "concatenation"}, naive.non_local),
    "danet": ("danet", {}, naive.danet),
    "a2net": ("a2net", {}, naive.a2net),
    "ccnet": ("ccnet", {}, naive.ccnet),
    "gcnet": ("gcnet", {}, naive.gcnet),
    "emanet": ("emanet", {}, naive.emanet),
    "isanet": ("isanet", {"dropout": 0.0}, naive.isanet),
    "annnet": ("annnet", {"dropout": 0.0}, naive.annnet),
    "lightnl (equation)": ("lightnl", {}, naive.lightnl_map),
    "lightnl (authors)": ("lightnl", {}, naive.lightnl_port),
    "dmsanet": ("dmsanet", {}, naive.dmsanet),
    "se": ("se", {}, naive.se),
    "eca": ("eca", {}, naive.eca),
    "cbam": ("cbam", {}, naive.cbam),
    "coordatt": ("coordatt", {}, naive.coordatt),
    "simam": ("simam", {}, naive.simam),
    "a naive form twice": ("annnet", {"dropout": 0.0}, naive.annnet),  # how far noise goes
}
CONTROL = "a naive form twice"
GROWING = list(CASES)[: list(CASES).index("se")]


class Skipped(Exception):
    """Why the naive form is not run."""


def make(label: str, channels: int, device: str) -> tuple[nn.Module, nn.Module]:
    """(ours, naive) with equal weights, none of them the zeros that many blocks begin with."""
    block, options, port = CASES[label]
    options = dict(options)
    if block == "gcnet" and channels < 32:
        options["ratio"] = 0.125  # a bottleneck of 1 is refused
    if block == "dmsanet" and channels < 32:
        options["mode"] = "gate"
    torch.manual_seed(0)
    ours = BLOCKS[block](channels, **options)
    for module in ours.modules():
        if block == "non_local" and isinstance(module, nn.Conv2d):
            module.reset_parameters()  # its own start is so small that gradients are all rounding
    for p in ours.parameters():
        if not p.detach().any():
            nn.init.normal_(p, 0.5 if p.numel() == 1 else 0.0, 0.1)
    theirs = naive.Naive(ours, port)
    if label == CONTROL:
        ours = naive.Naive(ours, port)
    return ours.to(device).train(), theirs.to(device).train()


class Training:
    """One form's training step on a given input."""

    def __init__(self, module: nn.Module, shape: Shape, device: str) -> None:
        torch.manual_seed(1)
        x, self.grad = torch.randn(2, *shape).to(device)
        self.module, self.x, self.device = module, x.requires_grad_(), device
        self.out: Tensor | None = None

    def forget(self) -> None:
        self.out = self.x.grad = None
        self.module.zero_grad()

    def step(self) -> Times:
        self.forget()
        started = clock(self.device)
        self.out = self.module(self.x)
        middle = clock(self.device)
        self.out.backward(self.grad)
        ended = clock(self.device)
        return middle[0] - started[0], ended[0] - middle[0], ended[1] - started[1]

    def results(self) -> list[Tensor]:
        """The last step's output and gradients, in an order that both forms share."""
        grads = [p.grad for p in (self.x, *self.module.parameters())]
        return [t.detach().clone() for t in (self.out, *grads) if t is not None]


def clock(device: str) -> tuple[float, float]:
    """(seconds that count, wall seconds): of this thread on the CPU, whose cores others use too."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter(), time.perf_counter()
    return time.thread_time(), time.perf_counter()


def peak_mib(device: str, run: Callable[[], Any]) -> tuple[float, Any]:
    """MiB that tensors, and the buffers of kernels that torch allocates, add at the most.

    What was there before must not be released meanwhile: it would be subtracted.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        return (torch.cuda.max_memory_allocated() - before) / MIB, result
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = run()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return max(np.cumsum([e.nbytes() for e in events]).tolist()) / MIB, result


def first_step(training: Training) -> tuple[float, Times, list[Tensor]]:
    """Peak memory in MiB, times and results; Skipped when it takes more memory than allowed."""
    training.forget()
    try:
        # A GPU's convolutions round float32 to 10 bits, which hides an error of ours.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            peak, times = peak_mib(training.device, training.step)
    except RuntimeError as error:
        if "memory" in str(error):
            limit = f"> {MOST_BYTES // GIB} GiB" if training.device == "cpu" else "out of memory"
            raise Skipped(limit) from None
        raise
    return peak, times, training.results()


def limit_memory() -> None:
    """Allocations of this process fail beyond MOST_BYTES more than now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MOST_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def refuse_slow(label: str, shape: Shape, device: str) -> None:
    """Skipped when one sample says that a batch takes more than MOST_SECONDS."""
    one = Training(make(label, shape[1], device)[1], (1, *shape[1:]), device)
    expected = shape[0] * sum(first_step(one)[1][:2])
    if expected > MOST_SECONDS:
        raise Skipped(f"~ {expected:.0f} s")


def speed_case(label: str, shape: Shape, device: str) -> Row:
    """Check, peak memory, then pairs of timed steps, each pair in random order."""
    row: Row = {"block": label, "shape": "x".join(map(str, shape))}
    if device == "cpu":
        limit_memory()
    ours, theirs = (Training(module, shape, device) for module in make(label, shape[1], device))
    row["ours_mib"], times, results = first_step(ours)
    try:
        if shape[0] > 1:
            refuse_slow(label, shape, device)
        row["naive_mib"], naive_times, naive_results = first_step(theirs)
    except Skipped as reason:
        row["skipped"] = str(reason)
        return row | summary(("ours",), np.array([[ours.step()] for _ in range(PAIRS[0])]))
    row["error"] = largest_error(results, naive_results)
    if row["error"] > TOLERANCE:
        raise AssertionError(f"{label} {shape}: the two forms differ by {row['error']:.1e}")
    del results, naive_results
    # What takes seconds needs no warm-up, and there is no time for one.
    samples = [[times, naive_times]] if sum(naive_times[:2]) > 1 else []
    rng, started = random.Random(0), time.perf_counter()
    while len(samples) < PAIRS[0] or (
        len(samples) < PAIRS[1] and time.perf_counter() - started < CASE_SECONDS
    ):
        pair = {form: form.step() for form in rng.sample((ours, theirs), 2)}
        samples.append([pair[ours], pair[theirs]])
    return row | summary(("ours", "naive"), np.array(samples))


def largest_error(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> float:
    """By tensor, root mean squares: of the difference over that of the value.

    A gradient that is 0 but for rounding does not count; and where a ReLU's input is 0 but for
    rounding, single elements differ.
    """

    def rms(t: Tensor) -> float:
        return float(t.square().mean().sqrt())

    pairs = list(zip(ours, theirs, strict=True))
    floor = 1e-2 * max(rms(b) for _, b in pairs)
    return max(rms(a - b) / max(rms(b), floor) for a, b in pairs)


def summary(names: Sequence[str], samples: np.ndarray) -> Row:
    """Medians and quartiles; samples: (repeats, forms, (forward, backward, wall)) in seconds."""
    row: Row = {"repeats": len(samples)}
    step_seconds = samples[:, :, :2].sum(2)
    for i, name in enumerate(names):
        times = {"forward": samples[:, i, 0], "backward": samples[:, i, 1]}
        for part, values in {**times, "step": step_seconds[:, i], "wall": samples[:, i, 2]}.items():
            row |= quartiles(f"{name}_{part}_ms", 1e3 * values)
    if len(names) == 2:
        # Of each pair, so that what else the machine does at the time cancels.
        row |= quartiles("ratio_forward", samples[:, 1, 0] / samples[:, 0, 0])
        row |= quartiles("ratio_backward", samples[:, 1, 1] / samples[:, 0, 1])
        row |= quartiles("ratio", step_seconds[:, 1] / step_seconds[:, 0])
        row |= quartiles("ratio_wall", samples[:, 1, 2] / samples[:, 0, 2])
        row["ratio_fastest"] = step_seconds[:, 1].min() / step_seconds[:, 0].min()
    return row


def quartiles(name: str, values: np.ndarray) -> Row:
    low, middle, high = np.percentile(values, (25, 50, 75))
    return {name: middle, f"{name}_q1": low, f"{name}_q3": high}


def growth_case(label: str, side: int, form: int, device: str) -> Row:
    """Peak memory of one training step of one form (0 ours, 1 naive) at batch 1."""
    row: Row = {"block": label, "side": side, "form": ("ours", "naive")[form]}
    if device == "cpu":
        limit_memory()
    module = make(label, GROWTH_CHANNELS, device)[form]
    training = Training(module, (1, GROWTH_CHANNELS, side, side), device)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        row["mib"], _, _ = first_step(training)
    except Skipped as reason:
        return row | {"skipped": str(reason)}
    if device == "cpu":
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        row["resident_mib"] = (after - before) * 1024 / MIB
    return row


def isolated(device: str, case: Callable[..., Row], *arguments: Any) -> Row:
    """The case in a fork of this process, which has torch loaded; on a GPU, here."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        return case(*arguments)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        return pool.submit(case, *arguments).result()


def write(path: Path, rows: Iterable[Row]) -> None:
    """Each row as soon as it is there, in the place of an older one of the same case."""
    found = {key(row): row for row in (read(path) if path.exists() else [])}
    for row in rows:
        shown = {k: f"{v:.5g}" if isinstance(v, float) else str(v) for k, v in row.items()}
        print(*(f"{k}={v}" for k, v in shown.items() if "_q" not in k), flush=True)
        found[key(shown)] = shown
        names = dict.fromkeys(name for of in found.values() for name in of)
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(names))
            table.writeheader()
            table.writerows(found.values())


def key(row: Row) -> tuple[str, ...]:
    return tuple(row[name] for name in ("block", "shape", "side", "form") if name in row)


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["speed", "growth"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--only", default="", help="labels, with commas between")
    parser.add_argument("--shape", default="", help="one of SHAPES, such as 32x96x14x14")
    given = parser.parse_args()
    torch.set_num_threads(1)
    device, file = given.device, HERE / f"{given.what}_{given.device}.csv"
    chosen = [label for label in CASES if not given.only or label in given.only.split(",")]
    if device == "cpu":  # the profiler's start takes seconds, and forks inherit it
        peak_mib(device, lambda: torch.ones(1) + 1)
    if given.what == "speed":
        shapes = [s for s in SHAPES if given.shape in ("", "x".join(map(str, s)))]
        cases = [(label, shape, device) for shape in shapes for label in chosen]
        write(file, (isolated(device, speed_case, *case) for case in cases))
    else:
        growing = [label for label in GROWING if label in chosen]
        points = [(c, side, form, device) for c in growing for form in (1, 0) for side in SIDES]
        write(file, (isolated(device, growth_case, *point) for point in points))


if __name__ == "__main__":
    main()
