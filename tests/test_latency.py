"""The protocol on an invented clock, whose true latencies are known; and once, for sanity, on a
real one."""

import copy
import gc
import itertools
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from typer.testing import CliRunner

from nasattn import load_study
from nasattn.blocks import BLOCKS
from nasattn.cli import app
from nasattn.config import Experiment
from nasattn.cost import count
from nasattn.cost.calibration import Calibration, Network, calibrate
from nasattn.cost.latency import (
    PACKAGES,
    RUNTIMES,
    Latency,
    LatencyRefused,
    Reference,
    Run,
    Target,
    TimingProtocol,
    measure_latency,
    time_runs,
)
from nasattn.cost.latency_table import LatencyTable, check_context
from nasattn.cost.memory import inference_peak
from nasattn.cost.profile import profile, read_space, subjects
from nasattn.document import check, load_yaml
from nasattn.errors import UserError
from nasattn.export import _latency
from nasattn.model import build
from nasattn.skeleton import LEFT_OUT
from nasattn.space import SearchSpace
from nasattn.space_file import SpaceFile

QUICK = TimingProtocol(warmup=1, rounds=40, most=80)
LOOSE = TimingProtocol(rounds=2, most=2, tolerance=1e9)


class Machine:
    """A clock and what runs on it: every run takes its true seconds times the machine's mood, which
    changes every few runs, times a noise of its own."""

    def __init__(self, mood: float = 3.0, noise: float = 0.1) -> None:
        self.rng, self.log = random.Random(0), list[str]()
        self.mood, self.noise = mood, noise
        self.now = 0.0

    def runs(self, name: str, seconds: Callable[[], float]) -> Run:
        def run() -> None:
            self.log.append(name)
            slow = self.mood if len(self.log) // 400 % 2 else 1.0
            self.now += seconds() * slow * (1 + self.noise * self.rng.expovariate(1))

        return run

    def clock(self, run: Run) -> float:
        start = self.now
        run()
        return self.now - start


def constant(machine: Machine, **seconds: float) -> dict[str, Run]:
    return {name: machine.runs(name, lambda s=s: s) for name, s in seconds.items()}  # type: ignore[misc]


def test_finds_known_latencies_on_a_machine_that_slows_down_for_a_while() -> None:
    machine = Machine()
    true = {"small": 1e-5, "middle": 3e-4, "large": 2e-2}
    reference = Reference(run=machine.runs("plain", lambda: 5e-3), seconds=5e-3)
    settled, refused, _ = time_runs(
        constant(machine, **true), machine.clock, TimingProtocol(), reference
    )
    assert not refused
    for name, seconds in true.items():
        assert settled[name].seconds == pytest.approx(seconds, rel=0.03)
        assert settled[name].halves <= 0.05


def test_a_reference_of_other_seconds_scales_all_figures() -> None:
    """On a core that is half as fast as when the reference was measured: the same answer."""
    found = []
    for slower in (1.0, 2.0):
        machine = Machine(mood=1.0)
        reference = Reference(run=machine.runs("plain", lambda s=slower: 5e-3 * s), seconds=5e-3)  # type: ignore[misc]
        runs = constant(machine, block=3e-4 * slower)
        found.append(time_runs(runs, machine.clock, QUICK, reference).settled["block"])
    assert found[0].seconds == pytest.approx(found[1].seconds, rel=1e-4)
    assert found[0].median == pytest.approx(found[1].median, rel=1e-4)
    assert found[0].iqr == pytest.approx(found[1].iqr, rel=1e-2)


def test_the_figures_are_those_of_the_runs() -> None:
    machine = Machine(mood=1.0, noise=0.0)
    ramp = itertools.count(1)  # 4 warm ones, then an untimed and a timed one in turn: 6, 8, ...
    runs = {"ramp": machine.runs("ramp", lambda: 1e-3 * next(ramp))}
    protocol = TimingProtocol(warmup=4, rounds=101, most=101)
    latency = time_runs(runs, machine.clock, protocol).settled["ramp"]
    assert latency == Latency(
        seconds=0.056, median=0.106, p25=0.056, iqr=0.1, n=101, halves=0.0179
    )  # the even rounds' 25th percentile is 0.057


def test_takes_turns_in_random_order_each_after_a_run_of_itself() -> None:
    machine = Machine()
    runs = constant(machine, a=1e-3, b=2e-3, c=3e-3)
    reference = Reference(run=machine.runs("plain", lambda: 5e-3), seconds=5e-3)
    time_runs(runs, machine.clock, QUICK, reference)
    assert sorted(machine.log[:4]) == ["a", "b", "c", "plain"]  # warm-up
    rounds = [tuple(machine.log[i : i + 8]) for i in range(4, len(machine.log), 8)]
    assert len(rounds) >= 40
    for turn in rounds:
        assert turn[::2] == turn[1::2] and set(turn) == {"a", "b", "c", "plain"}
    assert len(set(rounds)) > 12  # of 24 orders
    firsts = Counter(turn[0] for turn in rounds)
    assert min(firsts[name] for name in "abc") >= 3


def test_what_does_not_settle_is_measured_longer_and_then_refused_with_the_reason() -> None:
    machine = Machine(mood=1.0, noise=0.0)
    calls = itertools.count()
    # Timed in every second run: fast in odd rounds, slow in even ones.
    unstable = machine.runs("unstable", lambda: 2e-3 if next(calls) // 2 % 2 else 1e-3)
    runs = {**constant(machine, steady=1e-3), "unstable": unstable}
    reference = Reference(run=machine.runs("plain", lambda: 5e-3), seconds=5e-3)
    protocol = TimingProtocol(warmup=2, rounds=20, most=70)
    settled, refused, _ = time_runs(runs, machine.clock, protocol, reference)
    assert settled.keys() == {"steady"} and settled["steady"].n == 20
    assert refused.keys() == {"unstable"}
    assert "after 70 rounds" in refused["unstable"]
    assert "1 ms" in refused["unstable"] and "2 ms" in refused["unstable"]
    assert "100.0% apart, allowed 5%" in refused["unstable"]
    counts = Counter(machine.log)
    assert (counts["steady"], counts["unstable"], counts["plain"]) == (42, 142, 142)


def test_what_settles_late_is_kept() -> None:
    machine = Machine(mood=1.0, noise=0.0)
    calls = itertools.count()
    late = machine.runs("late", lambda: 2e-3 if (n := next(calls)) < 40 and n // 2 % 2 else 1e-3)
    protocol = TimingProtocol(warmup=0, rounds=20, most=1000)
    settled, refused, _ = time_runs({"late": late}, machine.clock, protocol)
    assert not refused
    assert settled["late"].seconds == 1e-3
    assert settled["late"].n == 40


def test_one_round_has_no_halves() -> None:
    for rounds, most in ((1, 1), (4, 3)):
        with pytest.raises(UserError, match=rf"^rounds: got {rounds} with most {most}; allowed"):
            TimingProtocol(rounds=rounds, most=most)
    assert measure_latency(nn.Conv2d(3, 4, 3), (3, 64, 64), protocol=LOOSE).n == 2


def test_a_clock_that_ticks_too_slowly_is_refused() -> None:
    _, refused, _ = time_runs({"fast": lambda: None}, lambda run: 0.0, QUICK)
    assert refused == {"fast": "it is over within a tick of the clock"}


def test_tells_how_far_it_is_and_how_noisy() -> None:
    told: list[tuple[float, float]] = []
    machine = Machine(mood=1.0, noise=0.0)
    runs = constant(machine, a=1e-3)
    time_runs(runs, machine.clock, QUICK, tick=lambda share, noise: told.append((share, noise)))
    assert [share for share, _ in told] == [0.25, 0.5, 0.75, 1.0]
    assert all(noise == pytest.approx(0, abs=1e-9) for _, noise in told)


# What is measured on this machine: only that it works and leaves no trace.


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system cannot pin a thread")
def test_measures_a_module_and_leaves_all_as_it_was() -> None:
    threads, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    seen: list[tuple[Any, ...]] = []

    class Probe(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            state = (self.training, torch.is_grad_enabled(), torch.get_num_threads())
            seen.append((*state, len(os.sched_getaffinity(0)), gc.isenabled(), *x.shape))
            return x * torch.tensor(1e-30) * torch.tensor(1e-10)

    probe = Probe().train()
    loose = TimingProtocol(warmup=1, rounds=10, most=10, tolerance=9.0)
    latency = measure_latency(probe, (3, 8, 8), protocol=loose)
    assert latency.n == 10 and latency.seconds > 0
    assert set(seen) == {(False, False, 1, 1, False, 1, 3, 8, 8)}
    assert len(seen) == 21
    assert probe.training and gc.isenabled()
    assert (torch.get_num_threads(), os.sched_getaffinity(0)) == (threads, cores)
    assert float(torch.tensor(1e-30) * torch.tensor(1e-10)) > 0  # a denormal again


def test_measure_latency_raises_what_is_refused() -> None:
    strict = TimingProtocol(warmup=0, rounds=3, most=3, tolerance=-1.0)
    with pytest.raises(LatencyRefused, match="after 3 rounds"):
        measure_latency(nn.ReLU(), (1, 2, 2), protocol=strict)


def test_channels_last_is_the_layout_that_runs() -> None:
    seen = []

    class Probe(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.is_contiguous(memory_format=torch.channels_last))
            return x

    for target in (Target(channels_last=True), Target()):
        target.prepare(Probe(), (3, 4, 5))()
        assert target.context()["channels_last"] is target.channels_last
    assert seen == [True, False]


OTHERS = [name for name in RUNTIMES if name != "torch"]


@pytest.mark.parametrize("runtime", OTHERS)
def test_a_runtime_runs_in_the_calling_thread_and_computes_the_same(runtime: str) -> None:
    """The CPU time of the thread would otherwise miss its work."""
    _skip_without(runtime)
    network = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3))
    eager, session = (
        Target(runtime=name).prepare(network, (3, 32, 32)) for name in ("torch", runtime)
    )
    (output,) = session()  # type: ignore[misc]
    assert torch.allclose(torch.as_tensor(output), eager(), atol=1e-5)
    thread, process = time.thread_time(), time.process_time()
    for _ in range(200):
        session()
    thread, process = time.thread_time() - thread, time.process_time() - process
    assert thread > 0.5 * process


@pytest.mark.parametrize("runtime", OTHERS)
def test_a_runtime_says_what_it_cannot_run(runtime: str) -> None:
    _skip_without(runtime)

    class Tongue(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum().item() > 0 else -x

    with pytest.raises(LatencyRefused, match=f"{runtime} cannot run it"):
        Target(runtime=runtime).prepare(Tongue(), (1, 2, 2))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"runtime": "onnxrumtime"}, "unknown runtime 'onnxrumtime'.*did you mean 'onnxruntime'"),
        ({"runtime": "tvm"}, "allowed: torch, onnxruntime, executorch"),
        ({"device": "gpu"}, "unknown device 'gpu'; allowed: cpu, cuda"),
        ({"runtime": "onnxruntime", "channels_last": True}, "got it with channels_last"),
        ({"runtime": "onnxruntime", "device": "cuda"}, "got it with device cuda"),
    ],
)
def test_targets_that_cannot_be_had(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Target(**fields)


@pytest.mark.parametrize("runtime", OTHERS)
def test_a_missing_runtime_says_what_to_install(
    runtime: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nasattn.cost.latency.find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"{runtime}.*pip install 'nasattn\[export\]'"):
        Target(runtime=runtime)


def _skip_without(runtime: str) -> None:
    missing = [name for name in PACKAGES[runtime] if find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")


# The table of a space, on the invented clock.


@dataclass(frozen=True, kw_only=True)
class Invented(Target):
    """A block takes 10 us a module and 100 ns a parameter in it; a whole network 1 ms and `stretch`
    times what its parts take."""

    machine: Machine = field(default_factory=Machine, compare=False)
    stretch: float = 1.3
    prepared: list[str] = field(default_factory=list, compare=False)

    def seconds(self, module: nn.Module) -> float:
        parts = 1e-5 * len(list(module.modules())) + 1e-7 * sum(
            p.numel() for p in module.parameters()
        )
        return 1e-3 + self.stretch * parts if hasattr(module, "classifier") else parts

    def prepare(self, module: nn.Module, shape: Sequence[int]) -> Run:
        self.prepared.append(type(module).__name__)
        seconds = self.seconds(module)
        return self.machine.runs(type(module).__name__, lambda: seconds)

    def clock(self, run: Run) -> float:
        return self.machine.clock(run)


def exact(**fields: Any) -> Invented:
    return Invented(machine=Machine(mood=1.0, noise=0.0), **fields)


SKELETON = """\
backbone:
  name: autonl
  stem: 8
  head: 16
  dropout: 0.0
  rows: [[1, 8, 1, 3, 0.0], [3, 16, 2, 3, 0.0], [3, 16, 1, 3, 0.0], [3, 16, 1, 3, 0.0]]
input: [3, 32, 32]
classes: 4
sites: ["stage*.*.project", "stage1.0"]
blocks:
  lightnl: {ratio: [0.25, 0.5], stride: 2}
vary: {expansion: [3, 6], kernel: [3, 5], se: [0.0, 0.25], optional: true}
"""


@pytest.fixture(scope="session")
def skeleton_space(tmp_path_factory: pytest.TempPathFactory) -> SearchSpace:
    path = tmp_path_factory.mktemp("skeleton") / "skeleton.yaml"
    path.write_text(SKELETON)
    return SearchSpace.load(path)


@pytest.fixture(params=["tiny_space", "skeleton_space"])
def space(request: pytest.FixtureRequest) -> SearchSpace:
    found: SearchSpace = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="session")
def tiny_table(
    tiny_space: SearchSpace, tmp_path_factory: pytest.TempPathFactory
) -> tuple[LatencyTable, Path]:
    path = tmp_path_factory.mktemp("table") / "table.yaml"
    return profile(tiny_space, path, exact(), protocol=QUICK, networks=8), path


def test_subjects_are_the_blocks_themselves(space: SearchSpace) -> None:
    """Each costs by itself what the cost table says that it adds; equal ones are one subject."""
    found = subjects(space)
    entries = {item: v for item, v in space.table.entries.items() if item[1] != LEFT_OUT}
    assert found.keys() == entries.keys()
    costs = {}
    for (name, label), subject in found.items():
        cost = count(copy.deepcopy(subject.make()).to("meta"), subject.shape)
        first = found[name, space.parameters[name][0]] if name.endswith(":block") else None
        costs[subject] = cost
        base = costs[first] if first else dict.fromkeys(cost, 0)
        assert {m: cost[m] - base[m] for m in cost} == entries[name, label]
    assert len(set(found.values())) < len(found)
    for one, other in itertools.combinations(found.values(), 2):
        if one == other:
            assert one.shape == other.shape and costs[one] == costs[other]


def test_the_table_predicts_whole_networks(space: SearchSpace, tmp_path: Path) -> None:
    target = Invented(machine=Machine(noise=0.02))
    table = profile(space, tmp_path / "table.yaml", target, networks=12)
    line = table.calibration
    assert line is not None
    assert (line.n_fit, line.n_held_out) == (6, 6)
    plain = target.seconds(build(space.baseline()))
    assert table.plain.seconds == pytest.approx(plain, rel=0.05)
    assert line.b == pytest.approx(1.3, rel=0.05)
    assert line.within_5 == 1.0 and line.mape < 0.01 and line.kendall_tau > 0.5
    added, entries = table.calibrated()
    rng = random.Random(7)
    for _ in range(20):
        architecture = space.sample(rng)
        row = space.row_of(architecture)
        assert row is not None
        predicted = table(row)["latency_s"]
        truth = target.seconds(build(architecture)) * table.plain.seconds / plain
        assert predicted == pytest.approx(truth, rel=0.03)
        placed = [item for item in row.items() if item[1] != "none"]
        assert added + sum(entries[item] for item in placed) == pytest.approx(predicted, rel=1e-12)


def test_without_noise_the_line_is_exact(
    tiny_space: SearchSpace, tiny_table: tuple[LatencyTable, Path]
) -> None:
    table, _ = tiny_table
    line = table.calibration
    assert line is not None
    assert line.b == pytest.approx(1.3, rel=1e-4)
    assert line.a == pytest.approx(-0.3 * table.plain.seconds, rel=1e-3)
    assert line.mape < 1e-5 and table.noise < 1e-7
    assert table({}) == {"latency_s": pytest.approx(table.plain.seconds, rel=1e-5)}


def test_a_slow_start_does_not_set_the_scale(tiny_space: SearchSpace, tmp_path: Path) -> None:
    """Alone, the plain backbone is read three times as slow; its groups say otherwise."""
    target = exact()
    truth = target.seconds(build(tiny_space.baseline()))

    class Late(Machine):
        def clock(self, run: Run) -> float:
            return super().clock(run) * (3.0 if len(self.log) < 82 else 1.0)

    slow = Invented(machine=Late(1.0, 0.0))
    table = profile(tiny_space, tmp_path / "slow.yaml", slow, protocol=QUICK, networks=4)
    assert table.plain_by_group[0] == pytest.approx(3 * truth)
    assert table.plain_by_group[1:] == pytest.approx([truth] * 2)
    usual = profile(tiny_space, tmp_path / "usual.yaml", target, protocol=QUICK, networks=4)
    assert table.plain.seconds == pytest.approx(truth)
    assert table.entries == pytest.approx(usual.entries)
    rows = [{}, {"stage1.0": "se(ratio=0.25)"}]
    for row in rows:
        assert table(row) == pytest.approx(usual(row))
    assert table.calibration and usual.calibration
    assert table.calibration.b == pytest.approx(usual.calibration.b, rel=1e-4)


def test_the_file_is_the_table(tiny_table: tuple[LatencyTable, Path], tmp_path: Path) -> None:
    table, path = tiny_table
    assert LatencyTable.load(path) == table
    LatencyTable.load(path).save(tmp_path / "again.yaml")
    assert (tmp_path / "again.yaml").read_text() == path.read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["again.yaml"]
    fields = yaml.safe_load(path.read_text())
    assert fields.keys() == set(LatencyTable.model_fields)
    spec = "lightnl(ratio=0.25,stride=1)"
    assert fields["blocks"]["stage1.0"][spec].keys() == set(Latency.model_fields)
    assert fields["context"]["threads"] == 1
    assert max(map(len, path.read_text().splitlines())) < 200


def test_an_interrupted_profile_goes_on(
    tiny_space: SearchSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nasattn.cost.profile.GROUP", 5)
    path, interrupted = tmp_path / "table.yaml", exact()
    limit, totals = 0, []

    def stop(done: float, total: int, noise: float) -> None:
        totals.append(total)
        if done > limit:
            raise KeyboardInterrupt

    # 12 blocks in groups of 5, 5 and 2, then 8 networks in groups of 5 and 3.
    for limit in (6, 13):  # noqa: B007
        with pytest.raises(KeyboardInterrupt):
            profile(tiny_space, path, interrupted, protocol=QUICK, networks=8, progress=stop)
        with pytest.raises(UserError, match="it is unfinished"):
            LatencyTable.load(path)
    begun = check(LatencyTable, *load_yaml(path))
    assert len(begun.networks) == 5 and not begun.calibration
    target = exact()
    table = profile(tiny_space, path, target, protocol=QUICK, networks=8)
    assert set(totals) == {20, 15}
    assert len(target.prepared) == 1 + 3  # the plain backbone, and what was left
    whole = profile(tiny_space, tmp_path / "whole.yaml", exact(), protocol=QUICK, networks=8)
    assert whole.replaced(context=table.context) == table


def test_a_finished_profile_measures_nothing_more(
    tiny_space: SearchSpace, tiny_table: tuple[LatencyTable, Path]
) -> None:
    table, path = tiny_table
    target, before = exact(), path.stat().st_mtime_ns
    assert profile(tiny_space, path, target, protocol=QUICK, networks=8) == table
    assert target.machine.log == []
    assert path.stat().st_mtime_ns == before


def test_what_is_refused_is_named_and_alone_tried_again(
    tiny_space: SearchSpace, tmp_path: Path
) -> None:
    path = tmp_path / "table.yaml"

    class Shaky(Invented):
        def prepare(self, module: nn.Module, shape: Sequence[int]) -> Run:
            run, calls = super().prepare(module, shape), itertools.count(1)
            if type(module) is not BLOCKS["ccnet"] or shape[1] != 12:
                return run
            return self.machine.runs("shaky", lambda: 1e-3 * (1 + next(calls) // 2 % 2))

    with pytest.raises(LatencyRefused) as refusal:
        profile(tiny_space, path, Shaky(machine=Machine(1.0, 0.0)), protocol=QUICK, networks=4)
    assert "1 could not be measured" in str(refusal.value)
    assert "ccnet(ratio=0.125,recurrence=2) on 12x8x8: after 80 rounds" in str(refusal.value)
    target = exact()
    table = profile(tiny_space, path, target, protocol=QUICK, networks=4)
    assert target.prepared[1:2] == [BLOCKS["ccnet"].__name__]
    assert len(target.prepared) == 1 + 1 + 4
    table.check_space(tiny_space)


def test_what_a_runtime_refuses_whole_is_no_reading_of_the_backbone(
    tiny_space: SearchSpace, tmp_path: Path
) -> None:
    path = tmp_path / "table.yaml"

    class Refusing(Invented):
        def prepare(self, module: nn.Module, shape: Sequence[int]) -> Run:
            if not hasattr(module, "classifier"):
                raise LatencyRefused("it cannot run it")
            return super().prepare(module, shape)

    with pytest.raises(LatencyRefused, match=r"it cannot run it"):
        profile(tiny_space, path, Refusing(machine=Machine(1.0, 0.0)), protocol=QUICK, networks=4)
    profile(tiny_space, path, exact(), protocol=QUICK, networks=4)
    assert min(LatencyTable.load(path).plain_by_group) > 0


def test_the_plain_backbones_block_adds_nothing_though_it_settled_last(
    skeleton_space: SearchSpace, tmp_path: Path
) -> None:
    path, plain = tmp_path / "table.yaml", skeleton_space.baseline()
    own = exact().seconds(build(plain).get_submodule("stage2.1"))

    class Shaky(Invented):
        def prepare(self, module: nn.Module, shape: Sequence[int]) -> Run:
            if self.seconds(module) == own:
                raise LatencyRefused("not at first")
            return super().prepare(module, shape)

    with pytest.raises(LatencyRefused, match="not at first"):
        profile(skeleton_space, path, Shaky(machine=Machine(1.0, 0.0)), protocol=QUICK, networks=4)
    table = profile(skeleton_space, path, exact(), protocol=QUICK, networks=4)
    for position in skeleton_space.skeleton.positions if skeleton_space.skeleton else ():
        assert table.entries[f"{position.name}:block", position.labels[0]] == 0
    row = skeleton_space.row_of(plain)
    assert row and table(row) == table({})

    # An earlier version had them in the order in which they settled, and predicted networks by it.
    old = table.replaced(blocks={n: dict(reversed(of.items())) for n, of in table.blocks.items()})
    old.replaced(calibration=None).settled().save(path)
    again = profile(skeleton_space, path, exact(), protocol=QUICK, networks=4)
    rows = [skeleton_space.row_of(skeleton_space.sample(random.Random(i))) or {} for i in range(9)]
    assert [again(r)["latency_s"] for r in rows] == pytest.approx(
        [table(r)["latency_s"] for r in rows], rel=1e-3
    )


def test_a_site_with_a_map_that_is_known_needs_no_block_timed(tmp_path: Path) -> None:
    text = """\
backbone: {name: mobilenet_v2, head: 16, rows: [[1, 8, 1, 1], [3, 12, 3, 2]]}
input: [3, 32, 32]
classes: 4
sites: SITES
blocks: {se: {}, eca: {}, simam: {}, lightnl: {ratio: [0.25, 0.5]}}
"""
    spaces = []
    for sites in ("[stage2.1]", "[stage2.1, stage2.2]"):
        file = tmp_path / "space.yaml"
        file.write_text(text.replace("SITES", sites))
        spaces.append(SearchSpace.load(file))
    path, target = tmp_path / "table.yaml", exact()
    profile(spaces[0], path, exact(), protocol=QUICK, networks=5)
    profile(spaces[1], path, target, protocol=QUICK, networks=5)
    LatencyTable.load(path).check_space(spaces[1])
    assert set(target.prepared) == {type(build(spaces[0].baseline())).__name__}


def test_a_table_of_another_backbone_or_circumstance_is_not_gone_on_with(
    tiny_space: SearchSpace, tiny_table: tuple[LatencyTable, Path]
) -> None:
    _, path = tiny_table
    with pytest.raises(UserError, match=r"table.yaml: .*channels_last: the table has False, here"):
        profile(tiny_space, path, exact(channels_last=True), protocol=QUICK)
    wider = replace(tiny_space, classes=5)
    with pytest.raises(UserError, match=r"another plain backbone .*classes: 4 -> 5"):
        profile(wider, path, exact(), protocol=QUICK)


def test_contexts_differ_by_what_lasts(tiny_table: tuple[LatencyTable, Path]) -> None:
    table, _ = tiny_table
    here = {**exact().context(), "date": "2001-01-01", "load": [99.0]}
    assert check_context(table, here) == []
    there = {**here, "chip": "Cortex-A76", "onnxruntime": "1.31"}
    assert check_context(table, there) == [
        f"chip: the table has {table.context['chip']}, here it is Cortex-A76",
        "onnxruntime: the table has none, here it is 1.31",
    ]


def test_a_table_of_another_space_says_what_is_missing(
    tiny_space: SearchSpace, skeleton_space: SearchSpace, tiny_table: tuple[LatencyTable, Path]
) -> None:
    table, _ = tiny_table
    table.check_space(tiny_space)
    more = {**tiny_space.choices, "stage1.0": (*tiny_space.choices["stage1.0"], "eca", "simam")}
    with pytest.raises(UserError, match=r"2 entries are missing: eca @ stage1\.0, simam"):
        table.check_space(replace(tiny_space, choices=more))
    with pytest.raises(UserError, match=r"another plain backbone.*backbone\.name"):
        table.check_space(skeleton_space)
    with pytest.raises(UserError, match=r"1 entries are missing: eca @ stage1\.0"):
        table({"stage1.0": "eca", "stage2.0": "none"})


def test_a_new_block_is_added_to_a_table(tiny_space: SearchSpace, tmp_path: Path) -> None:
    path, first, then = tmp_path / "table.yaml", exact(), exact()
    old = profile(tiny_space, path, first, protocol=QUICK, networks=4)
    site = tiny_space.sites[0].name
    more = {**tiny_space.choices, site: (*tiny_space.choices[site], "eca")}
    wider = replace(tiny_space, choices=more)
    table = profile(wider, path, then, protocol=QUICK, networks=4)
    table.check_space(wider)
    assert BLOCKS["eca"].__name__ in then.prepared
    assert {item: found for item, found in table.measured.items() if item[1] != "eca"} == (
        old.measured
    )


def test_a_space_too_small_to_calibrate_is_refused_at_once(
    tiny_space: SearchSpace, tmp_path: Path
) -> None:
    site = tiny_space.sites[0].name
    target = exact()
    few = replace(tiny_space, choices={site: ("none", "eca", "simam", "se(ratio=0.25)")})
    with pytest.raises(UserError, match=r"3 architectures besides the plain one; .* at least 4"):
        profile(few, tmp_path / "table.yaml", target, protocol=QUICK)
    assert not target.prepared


def test_a_path_that_cannot_be_written_is_refused_at_once(
    tiny_space: SearchSpace, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    target = exact()
    with pytest.raises(UserError, match="cannot be written"):
        profile(tiny_space, tmp_path / "file" / "table.yaml", target, protocol=QUICK)
    assert not target.prepared


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("calibration: {a: 1.0}", "calibration.b: this key is missing"),
        ("plain: 3", "plain: got 3"),
        ("blocks: {stage1.0: {eca: {seconds: fast}}}", "blocks.stage1.0.eca.seconds: got 'fast'"),
        ("more: 1", "more: unknown key; allowed: context, calibration"),
    ],
)
def test_a_broken_file_is_named(
    tiny_table: tuple[LatencyTable, Path], tmp_path: Path, change: str, message: str
) -> None:
    fields = yaml.safe_load(tiny_table[1].read_text()) | yaml.safe_load(change)
    path = tmp_path / "broken.yaml"
    path.write_text(yaml.safe_dump(fields))
    with pytest.raises(UserError, match=message):
        LatencyTable.load(path)


# Calibration, by hand.


def network(sum: float, seconds: float, *, fit: bool) -> Network:
    alone = Latency(seconds=seconds, median=seconds, p25=seconds, iqr=0.0, n=1, halves=0.0)
    return Network.of(alone, sum, fit=fit)


def test_calibration_recovers_a_line_in_spite_of_an_outlier() -> None:
    def true(x: float) -> float:
        return 0.002 + 1.5 * x

    jitter = itertools.cycle((1e-6, -2e-6, 1e-6))
    fitted = [network(x / 1e3, true(x / 1e3) + next(jitter), fit=True) for x in range(11, 23)]
    fitted[7] = network(0.018, 2 * true(0.018), fit=True)
    held_out = [
        network(0.02, true(0.02) * 1.08, fit=False),
        network(0.03, true(0.03) * 0.80, fit=False),
        network(0.025, true(0.025), fit=False),
        network(0.01, true(0.01) / 0.8, fit=False),
    ]
    line = calibrate(true(0.0), [*fitted, *held_out])
    # The plain backbone is a point of the fit: here it lies off the line too.
    assert line.b == pytest.approx(1.5, rel=0.01)
    assert line.a == pytest.approx(0.002, rel=0.1)
    assert (line.n_fit, line.n_held_out) == (12, 4)
    errors = [0.08 / 1.08, 0.2 / 0.8, 0.0, 0.2]
    assert line.mape == pytest.approx(sum(errors) / 4, abs=0.003)
    assert (line.within_5, line.within_10) == (0.25, 0.5)
    off = [0.08 * true(0.02), 0.2 * true(0.03), 0.0, 0.25 * true(0.01)]
    assert line.noise == pytest.approx(1.645 * (sum(e * e for e in off) / 4) ** 0.5, rel=0.03)
    assert line.kendall_tau == pytest.approx(2 / 3, abs=1e-4)  # one of six pairs


def test_a_line_that_falls_is_refused() -> None:
    falling = [network(x, 0.1 - x, fit=x < 0.05) for x in (0.02, 0.03, 0.04, 0.05, 0.06)]
    with pytest.raises(LatencyRefused, match=r"b = -1"):
        calibrate(0.05, falling)


# The command.

EXPERIMENT = """study: timed
space: {space}
data: {{name: cued_digits}}
latency: tables/here.yaml
objectives: [accuracy, latency_s]
"""


@pytest.fixture
def experiment(tiny_space_file: Path, tmp_path: Path) -> Path:
    path = tmp_path / "experiment.yaml"
    path.write_text(EXPERIMENT.format(space=tiny_space_file))
    return path


def test_an_experiment_whose_table_is_yet_to_be_made_can_be_read(
    experiment: Path, tiny_space_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = SpaceFile.load(tiny_space_file)
    assert read_space(experiment) == (same, tmp_path / "tables/here.yaml")
    assert read_space(tiny_space_file) == (same, None)
    inline = tmp_path / "inline.yaml"
    inline.write_text(yaml.safe_dump({"space": yaml.safe_load(tiny_space_file.read_text())}))
    assert read_space(inline) == (same, None)
    monkeypatch.setenv("HOME", str(tiny_space_file.parent))
    monkeypatch.setenv("TABLES", "/tables")
    inline.write_text(f"space: ~/{tiny_space_file.name}\nlatency: $TABLES/here.yaml")
    assert read_space(inline) == (same, Path("/tables/here.yaml"))
    inline.write_text(f"space: $NOWHERE/{tiny_space_file.name}")
    with pytest.raises(UserError, match=r"inline.yaml: space: .*the environment has no \$NOWHERE"):
        read_space(inline)
    inline.write_text("space: {classes: 10}")
    with pytest.raises(UserError, match=r"inline.yaml: space: backbone: this key is missing"):
        read_space(inline)


def test_the_command_measures_prints_and_goes_on(
    experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Invented] = []

    def target(**fields: Any) -> Invented:
        made.append(exact(**fields))
        return made[-1]

    monkeypatch.setattr("nasattn.cost.latency.Target", target)
    result = CliRunner().invoke(app, ["profile", str(experiment)])
    assert result.exit_code == 0, result.output
    path = tmp_path / "tables/here.yaml"
    table = LatencyTable.load(path)
    assert f"table: {path}" in result.stdout
    assert table.summary() in result.stdout
    assert "on 12 other networks: error 0.0% in the mean, within 5 %: 100%" in result.stdout
    assert "profile  36/36" in result.stderr
    again = CliRunner().invoke(app, ["profile", str(experiment), "--runtime", "torch"])
    assert again.stdout == result.stdout
    assert made[-1].machine.log == []


def test_the_command_fails_in_words(experiment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **options: Any) -> None:
        raise errors.pop()

    monkeypatch.setattr("nasattn.cost.profile.profile", refuse)
    errors: list[BaseException] = [LatencyRefused("too noisy"), KeyboardInterrupt()]
    for message in ("stopped; what is measured is kept", "nasattn: too noisy"):
        result = CliRunner().invoke(app, ["profile", str(experiment)])
        assert result.exit_code == 1
        assert message in result.stderr
    with pytest.raises(UserError, match="unknown runtime 'tflite'"):
        CliRunner().invoke(
            app, ["profile", str(experiment), "--runtime", "tflite"], catch_exceptions=False
        )


def test_a_real_profile_of_a_small_space(tiny_space: SearchSpace, tmp_path: Path) -> None:
    """On this machine's clock: no figure is judged."""
    blocks = {name: ("none", "ccnet(ratio=0.125,recurrence=2)") for name in tiny_space.choices}
    space = replace(tiny_space, choices=blocks, max_blocks=3)
    loose = TimingProtocol(warmup=1, rounds=20, most=20, tolerance=9.0)
    path = tmp_path / "table.yaml"
    table = profile(space, path, Target(), protocol=loose, networks=6)
    assert LatencyTable.load(path) == table
    table.check_space(space)
    assert all(found.seconds > 0 for found in (table.plain, *table.measured.values()))
    assert isinstance(table.calibration, Calibration) and table.noise > 0
    assert table.context["runtime"] == "torch" and len(table.context["load"]) == 2


def test_a_search_keeps_a_budget_of_latency_and_memory(tmp_path: Path) -> None:
    """With real trainings; the table is of an invented machine with a noise, kept as a margin."""
    space_file = Path(__file__).parents[1] / "search_spaces/cued_digits.yaml"
    space = SearchSpace.load(space_file)
    target = Invented(machine=Machine(mood=1.0, noise=0.02))
    table = profile(space, tmp_path / "here.yaml", target, protocol=QUICK, networks=8)
    assert table.noise > 0
    path = tmp_path / "experiment.yaml"
    fields = {
        "study": "timed",
        "space": str(space_file),
        "data": {"name": "cued_digits", "train": 64, "val": 32, "test": 32},
        "training": {"batch_size": 32},
        "latency": "here.yaml",
        "objectives": ["accuracy", "latency_s", "peak_memory_bytes"],
        "budget": {"latency_s": "1.05x", "peak_memory_bytes": "1.1x"},
        "search": {"trials": 4, "sampler": "random"},
    }
    path.write_text(yaml.safe_dump(fields))
    result = CliRunner().invoke(app, ["search", str(path)])
    assert result.exit_code == 0, result.output
    assert "latency_s is that of another time and perhaps another place: " in result.stdout
    study = load_study(f"sqlite:///{tmp_path}/runs/nasattn.db", "timed")
    plain = study.facts["plain"]
    limits = {"latency_s": 1.05 * plain["latency_s"] - table.noise}
    limits |= {"peak_memory_bytes": 1.1 * plain["peak_memory_bytes"]}
    rows = study.optuna.get_trials()
    assert len(rows) == len(study.trials) == 4
    for trial, row in zip(study.trials, rows, strict=True):
        assert trial.score, trial.reason
        cost = trial.cost.values
        with torch.device("meta"):
            peak = inference_peak(build(trial.architecture), (1, *space.input))
        assert cost["latency_s"] == pytest.approx(table(row.params)["latency_s"])
        assert cost["peak_memory_bytes"] == peak
        assert trial.cost.context["latency"]["runtime"] == "torch"
        assert row.values == [trial.score.accuracy, cost["latency_s"], peak]
        excesses = {metric: cost[metric] - limit for metric, limit in limits.items()}
        # Those of the key before Optuna 5, which the dashboard reads, stand beside them.
        assert {m: row.constraints[m] for m in limits} == pytest.approx(excesses)
        assert row.system_attrs["constraints"] == pytest.approx(list(excesses.values()))
        assert all(excess <= 0 for excess in excesses.values())
    assert "in seconds, for one image, by a table of measurements (runtime torch, " in _latency(
        study, study.trials[0]
    )

    again = yaml.safe_load((tmp_path / "here.yaml").read_text())
    again["context"]["date"] = "2031-01-01"
    (tmp_path / "here.yaml").write_text(yaml.safe_dump(again))
    (line,) = study.edits(Experiment.load(path), ())
    assert line == f"latency: another table: of {table.context['date']} -> of 2031-01-01"
    again["plain"]["seconds"] = -1
    (tmp_path / "here.yaml").write_text(yaml.safe_dump(again))
    with pytest.raises(UserError, match=r"plain\.seconds: got -1; should be greater than 0"):
        LatencyTable.load(tmp_path / "here.yaml")
