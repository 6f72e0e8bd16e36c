"""How one thing is timed, so that the number can be trusted on a machine that is not idle.

One thread on one core, batch 1, eval mode, no gradients. On the CPU the clock is the thread's own
CPU time, which stands still while another process runs (a runtime's one thread is the caller's,
so it sees that work too); on a GPU it is CUDA events. What is timed together takes turns, once a
round in random order, each right after an untimed run of itself (so that caches hold what they hold
in steady use, whatever came before), and is paired within each round with a reference, the plain
backbone: a core that slows down for a while slows both, and their ratio stays.

The spread, and whether it repeats, is part of the result: the rounds are split into odd and even
ones, and where these differ by more than 5 % more rounds are run, up to a limit; what has not
settled then is refused. The minimum is never used: of all it repeats worst on a shared machine.
"""

import contextlib
import copy
import gc
import io
import logging
import os
import platform
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Generic, NamedTuple, Self, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field
from torch import nn

from nasattn.document import Strict
from nasattn.errors import UserError, lookup

INSTALL = "pip install 'nasattn[export]'"

Run = Callable[[], object]
Floats = npt.NDArray[np.float64]
Tick = Callable[[float, float], None]
K = TypeVar("K")


class LatencyRefused(Exception):
    """A latency that cannot be trusted; the message is the reason."""


class Latency(Strict):
    """Seconds of one pass of one image.

    seconds: the estimate: the 25th percentile of the runs, or, where they are paired with a
    reference, the median of their ratios to it times the reference's seconds. median, p25, iqr (the
    interquartile range): of the runs as they were. n: how many runs. halves: the share by which the
    estimates of the odd and the even rounds differ.
    """

    seconds: Annotated[float, Field(gt=0)]
    median: float
    p25: float
    iqr: float
    n: int
    halves: float

    def scaled(self, factor: float) -> Self:
        """As on a core that takes `factor` times as long."""
        figures = ("seconds", "median", "p25", "iqr")
        changes = {name: round(factor * getattr(self, name), 9) for name in figures}
        return self.model_copy(update=changes)

    def __str__(self) -> str:
        return f"{self.seconds * 1e3:.3f} ms (IQR {self.iqr * 1e3:.3f} ms, n = {self.n})"


@dataclass(frozen=True, slots=True, kw_only=True)
class TimingProtocol:
    """warmup: runs of each subject before it counts. rounds: at first, two at least; doubled for
    what has not settled, up to `most`. tolerance: the largest difference of the halves."""

    warmup: int = 5
    rounds: int = 200
    most: int = 3200
    tolerance: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.rounds <= self.most:
            raise UserError(
                f"rounds: got {self.rounds} with most {self.most}; allowed: from 2 to `most`"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What the others are paired with, and how long it takes by an earlier measurement."""

    run: Run
    seconds: float


class Timed(NamedTuple, Generic[K]):
    """The latencies of what has settled, why others are refused, and the 25th percentile of the
    reference's own runs beside them (0.0 without one)."""

    settled: dict[K, Latency]
    refused: dict[K, str]
    beside: float


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where a network runs. channels_last: the memory layout of torch's tensors (other runtimes
    have their own). A UserError says what cannot be had here."""

    runtime: str = "torch"
    device: str = "cpu"
    channels_last: bool = False

    def __post_init__(self) -> None:
        lookup(RUNTIMES, self.runtime, "runtime")
        lookup(CLOCKS, self.device, "device")
        if self.runtime != "torch":
            if missing := lacking(self.runtime):
                raise UserError(
                    f"runtime {self.runtime}: packages are not here ({', '.join(missing)}): "
                    f"{INSTALL}"
                )
            if self.device != "cpu" or self.channels_last:
                raise UserError(
                    f"runtime {self.runtime}: got it with "
                    f"{'device cuda' if self.device != 'cpu' else 'channels_last'}; "
                    "allowed: device cpu in its own memory layout"
                )
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("device cuda: torch finds no GPU here; allowed: cpu")

    def prepare(self, module: nn.Module, shape: Sequence[int]) -> Run:
        """What runs the module once on an image of that shape; the module stays as it was.

        Raises LatencyRefused where the runtime cannot express it.
        """
        image = torch.randn(1, *shape[-3:], generator=torch.Generator().manual_seed(0))
        return RUNTIMES[self.runtime](copy.deepcopy(module).eval(), image, self)

    def clock(self, run: Run) -> float:
        """Seconds of one run."""
        return CLOCKS[self.device](run)

    def context(self) -> dict[str, Any]:
        """Under what circumstances a latency of here and now is taken."""
        chip = torch.cuda.get_device_name() if self.device == "cuda" else _cpu_name()
        versions = {"torch": str(torch.__version__)}
        if self.runtime != "torch":
            versions[self.runtime] = version(self.runtime)
        return {
            "runtime": self.runtime,
            **versions,
            "device": self.device,
            "chip": chip,
            "threads": 1,
            "batch": 1,
            "channels_last": self.channels_last,
            "clock": "CUDA events" if self.device == "cuda" else "CPU time of the thread",
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "load": [load_average()],
        }


def lacking(runtime: str) -> list[str]:
    """The packages of a runtime that are not installed."""
    return [name for name in PACKAGES[runtime] if find_spec(name) is None]


def measure_latency(
    module: nn.Module,
    shape: Sequence[int],
    target: Target | None = None,
    protocol: TimingProtocol | None = None,
) -> Latency:
    """The latency of one module for an image (C, H, W) or (1, C, H, W), timed by itself.

    Raises LatencyRefused with the reason where it does not settle.
    """
    target = target or Target()
    runs = {"": target.prepare(module, shape)}
    timed = time_runs(runs, target.clock, protocol or TimingProtocol())
    if timed.refused:
        raise LatencyRefused(timed.refused[""])
    return timed.settled[""]


def time_runs(
    runs: Mapping[K, Run],
    clock: Callable[[Run], float],
    protocol: TimingProtocol,
    reference: Reference | None = None,
    tick: Tick | None = None,
) -> Timed[K]:
    """Time the runs together; what has not settled after the first rounds gets more of them, beside
    the reference.

    tick: is told the share done of the first rounds and the noise: the interquartile range of the
    reference (without one, of what is timed) over its median.
    """
    order = random.Random(protocol.seed)
    samples: dict[K, list[float]] = {name: [] for name in runs}
    beside: list[float] = []
    settled: dict[K, Latency] = {}
    refused: dict[K, str] = dict.fromkeys(runs, "")
    done, goal = 0, protocol.rounds
    with alone():
        for run in (*runs.values(), *([reference.run] if reference else ())):
            for _ in range(protocol.warmup):
                run()
        while refused and done < protocol.most:
            turns = [(runs[name], samples[name]) for name in refused]
            if reference:
                turns.append((reference.run, beside))
            watched = turns[-1][1]
            while done < goal:
                done += 1
                order.shuffle(turns)
                for run, times in turns:
                    run()
                    times.append(clock(run))
                if tick and done % 10 == 0:
                    tick(min(1.0, done / protocol.rounds), _spread(watched))
            for name in list(refused):
                judged = _judge(samples[name], beside, reference, protocol.tolerance)
                if isinstance(judged, Latency):
                    settled[name] = judged
                    del refused[name]
                else:
                    refused[name] = judged
            goal = min(2 * goal, protocol.most)
    return Timed(settled, refused, _p25(np.array(beside)) if beside else 0.0)


def _judge(
    times: Sequence[float],
    beside: Sequence[float],
    reference: Reference | None,
    tolerance: float,
) -> Latency | str:
    """The latency, or why it is none. beside: the reference's times in the same rounds."""
    runs = np.array(times)
    if not min([*times, *beside]) > 0:
        return "it is over within a tick of the clock"
    if reference:
        scale = reference.seconds / _p25(np.array(beside))
        relative = runs / np.array(beside) * reference.seconds
        whole, odd, even = (float(np.median(part)) for part in _halved(relative))
    else:
        scale = 1.0
        whole, odd, even = (_p25(part) for part in _halved(runs))
    halves = abs(odd - even) / min(odd, even)
    if halves > tolerance:
        return (
            f"after {len(times)} rounds the odd ones say {odd * 1e3:.3g} ms and the even ones "
            f"{even * 1e3:.3g} ms: {halves:.1%} apart, allowed {tolerance:.0%}"
        )
    low, middle, high = (scale * float(v) for v in np.percentile(runs, (25, 50, 75)))
    return Latency(
        seconds=round(whole, 9),
        median=round(middle, 9),
        p25=round(low, 9),
        iqr=round(high - low, 9),
        n=len(times),
        halves=round(halves, 4),
    )


def _halved(values: Floats) -> tuple[Floats, Floats, Floats]:
    return values, values[::2], values[1::2]


def _p25(values: Floats) -> float:
    return float(np.percentile(values, 25))


def _spread(times: Sequence[float]) -> float:
    low, middle, high = np.percentile(times, (25, 50, 75))
    return float((high - low) / middle) if middle else 0.0


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """One thread, on one core where the system can pin it, without garbage collection and with
    denormal numbers as zero (an untrained network's deep maps are so faint that they would cost);
    afterwards all is as it was, denormals as is torch's default."""
    threads, collecting = torch.get_num_threads(), gc.isenabled()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set[int]()
    try:
        if cores:
            os.sched_setaffinity(0, {max(cores)})
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        gc.disable()
        yield
    finally:
        if collecting:
            gc.enable()
        torch.set_flush_denormal(False)
        torch.set_num_threads(threads)
        if cores:
            os.sched_setaffinity(0, cores)


def load_average() -> float | None:
    """Of the last minute, where the system says so: how many processes want a core."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _cpu_clock(run: Run) -> float:
    start = time.thread_time()
    run()
    return time.thread_time() - start


def _cuda_clock(run: Run) -> float:
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _torch(module: nn.Module, image: torch.Tensor, target: Target) -> Run:
    layout = torch.channels_last if target.channels_last else torch.contiguous_format
    module = module.to(target.device, memory_format=layout)  # type: ignore[call-overload]
    image = image.to(target.device, memory_format=layout)

    def run() -> object:
        with torch.inference_mode():
            return module(image)

    return run


def _onnxruntime(module: nn.Module, image: torch.Tensor, target: Target) -> Run:
    import onnxruntime

    with _lowering("onnxruntime"):
        program = torch.onnx.export(module, (image,), dynamo=True, verbose=False)
        assert program is not None
        model = program.model_proto.SerializeToString()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return partial(session.run, None, {session.get_inputs()[0].name: image.numpy()})


def _executorch(module: nn.Module, image: torch.Tensor, target: Target) -> Run:
    """Lowered to XNNPACK, as on a phone's CPU; what XNNPACK lacks runs by ExecuTorch's kernels."""
    with _lowering("executorch"):
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower
        from executorch.extension.pybindings import portable_lib
        from executorch.runtime import Runtime, Verification

        # Its pool has a thread a core; with one, the caller's thread does all.
        portable_lib._unsafe_reset_threadpool(1)
        exported = torch.export.export(module, (image,))
        lowered = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()])
        file = lowered.to_executorch().buffer
        program = Runtime.get().load_program(file, verification=Verification.Minimal)
        method = program.load_method("forward")

    def run(held: object = (file, program)) -> object:  # the method runs in memory of theirs
        return method.execute([image])

    return run


@contextlib.contextmanager
def _lowering(runtime: str) -> Iterator[None]:
    """Without gradients, silent; whatever goes wrong is what the runtime cannot run."""
    try:
        with quiet_exporter(), torch.no_grad():
            yield
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LatencyRefused(f"{runtime} cannot run it: {first}") from error


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Torch's progress and advice kept off the terminal; what goes wrong is raised."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model"):
                return value.strip()
    return platform.processor() or platform.machine()


CLOCKS: Mapping[str, Callable[[Run], float]] = {"cpu": _cpu_clock, "cuda": _cuda_clock}
RUNTIMES: Mapping[str, Callable[[nn.Module, torch.Tensor, Target], Run]] = {
    "torch": _torch,
    "onnxruntime": _onnxruntime,
    "executorch": _executorch,
}
PACKAGES = {
    "onnxruntime": ("onnx", "onnxruntime", "onnxscript"),
    "executorch": ("executorch",),
}
