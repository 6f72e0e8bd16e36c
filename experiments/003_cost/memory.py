"""Is `peak_memory_bytes` what torch's own allocator sees, and the table what a whole count gives?

`python memory.py`: ten architectures, run on the CPU under torch.profiler.
`python memory.py table N`: N random architectures a backbone, by the table and counted whole.
"""

import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from nasattn.architecture import NONE, Architecture, Backbone, Placement
from nasattn.blocks import BLOCKS
from nasattn.cost.memory import MemoryTable, inference_peak, training_peak
from nasattn.errors import UserError
from nasattn.model import build, make_block, plain_sites, site_shapes

IMAGE = (3, 224, 224)
BATCH = 4
BACKBONES: list[dict[str, object]] = [
    {"name": "mobilenet_v2"},
    {"name": "mobilenet_v2", "width": 0.35},
    {"name": "mobilenet_v2", "width": 1.4},
    {"name": "mobilenet_v3"},
    {"name": "mobilenet_v3", "width": 0.5},
    {"name": "autonl"},
]


def allocated_peaks(module: nn.Module, shape: Sequence[int], *, training: bool) -> tuple[int, int]:
    """(bytes at the peak, the same with the kernels' workspaces), as the CPU's allocator reports.

    The parameters' gradients are left out, by their addresses. A workspace is what is allocated and
    freed within one operator that is no mere composition of others.
    """
    module.train(training)
    activities = [ProfilerActivity.CPU]
    with (
        profile(activities=activities, profile_memory=True, acc_events=True) as run,
        torch.set_grad_enabled(training),
    ):
        x = torch.empty(*shape)
        if training:
            module(x).sum().backward()
        else:
            module(x)
    # The gradients come last to their addresses.
    grads = {p.grad.data_ptr() for p in module.parameters() if p.grad is not None}
    events = sorted(_allocations(run), key=lambda event: event[0])
    freed: dict[int, tuple[int, object]] = {}
    live, whole = [0] * (len(events) + 1), [0] * (len(events) + 1)
    for moment in reversed(range(len(events))):
        _, address, size, operator = events[moment]
        if size < 0:
            freed[address] = moment, operator
            continue
        end, by = freed.pop(address, (len(events), None))
        if end == len(events) and address in grads:
            grads.discard(address)
            continue
        for steps in [whole] if operator is not None and by == operator else [whole, live]:
            steps[moment] += size
            steps[end] -= size
    return _highest(live), _highest(whole)


def _allocations(run: profile) -> Iterator[tuple[int, int, int, object]]:
    """(time, address, bytes or minus bytes, which operator) of each event."""
    assert run.profiler is not None
    open_ = [(event, None) for event in run.profiler.kineto_results.experimental_event_tree()]
    while open_:
        event, operator = open_.pop()
        if event.tag == _EventType.Allocation:
            fields = event.extra_fields
            yield event.start_time_ns, fields.ptr, fields.alloc_size, operator
        elif operator is None and event.name.startswith("aten::") and not _composite(event.name):
            operator = event.id
        open_ += [(child, operator) for child in event.children]


def _composite(name: str) -> bool:
    key = "CompositeImplicitAutograd"
    try:
        return torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
    except RuntimeError:  # no operator without an overload's name
        return False


def _highest(steps: Sequence[int]) -> int:
    level = highest = 0
    for step in steps:
        level += step
        highest = max(highest, level)
    return highest


def choices(plain: Architecture) -> dict[str, tuple[str, ...]]:
    """Site -> every block that can stand there, with its default options."""
    found = {}
    for site in plain_sites(plain.backbone, plain.input):
        specs = [_spec(block, site.channels) for block in BLOCKS]
        found[site.name] = (NONE, *(spec for spec in specs if spec))
    return found


def _spec(block: str, channels: int) -> str:
    placement = Placement(site="site", block=block)
    try:
        with torch.device("meta"):
            make_block(placement, channels)
    except UserError:
        return ""
    return placement.spec


def decode(plain: Architecture, specs: Mapping[str, str]) -> Architecture:
    placed = [Placement.parse(site, spec) for site, spec in specs.items() if spec != NONE]
    return replace(plain, placements=tuple(placed))


def ten() -> Iterator[tuple[str, Architecture]]:
    """Four random blocks each, every other time early, where they make the peak of inference."""
    rng, blocks = random.Random(0), list(BLOCKS)
    for number in range(10):
        fields = BACKBONES[number % len(BACKBONES)]
        plain = Architecture(backbone=Backbone.of(fields), classes=1000, input=IMAGE)
        allowed, specs = choices(plain), dict[str, str]()
        sites = list(allowed)[: 5 if number % 2 else None]
        while len(specs) < 4:
            site = rng.choice([site for site in sites if site not in specs])
            block = next((b for b in blocks for s in allowed[site] if s.split("(")[0] == b), NONE)
            blocks.append(blocks.pop(blocks.index(block)))
            specs[site] = next(s for s in allowed[site] if s.split("(")[0] == block)
        yield " ".join(map(str, fields.values())), decode(plain, specs)


def against_the_allocator() -> None:
    for name, architecture in ten():
        print(f"{name}: {', '.join(f'{s} {b}' for s, b in architecture.specs.items())}")
        network = build(architecture)
        for images, peak in ((1, inference_peak), (BATCH, training_peak)):
            shape = (images, *architecture.input)
            found = peak(network, shape)
            live, whole = allocated_peaks(network, shape, training=images > 1)
            print(
                f"    {peak.__name__:14} {found:>11,}",
                f"  allocator {live:>11,} {found / live - 1:+.4%}",
                f"  with workspaces {whole:>11,} {found / whole - 1:+.1%}",
                flush=True,
            )


def against_the_count(number: int) -> None:
    for name, fields in {str(f["name"]): f for f in reversed(BACKBONES)}.items():
        plain = Architecture(backbone=Backbone.of(fields), classes=1000, input=(3, 64, 64))
        allowed, shapes = choices(plain), site_shapes(plain.backbone, plain.input)
        for images, peak in ((1, inference_peak), (BATCH, training_peak)):
            start = time.process_time()
            batch = images if images > 1 else None
            table = MemoryTable.build(plain, shapes, allowed, batch=batch)
            seconds = time.process_time() - start
            wrong, above = compare(table, plain, allowed, (images, *plain.input), peak, number)
            print(
                f"{name} {peak.__name__}: {len(table.rows)} entries in {seconds:.1f} s, "
                f"{len(table.plain)} moments, {rate(table):,.0f} a second; "
                f"{wrong} of {number} wrong, {above} above the plain backbone's",
                flush=True,
            )


def compare(
    table: MemoryTable,
    plain: Architecture,
    allowed: Mapping[str, tuple[str, ...]],
    shape: Sequence[int],
    peak: Callable[[nn.Module, Sequence[int]], int],
    number: int,
) -> tuple[int, int]:
    """Random architectures: how many the table has wrong, and how many have more than the plain."""
    rng, wrong, above = random.Random(0), 0, 0
    for _ in range(number):
        specs = {s: rng.choice(o) for s, o in allowed.items() if rng.random() < 0.3}
        with torch.device("meta"):
            network = build(decode(plain, specs))
        whole = peak(network, shape)
        wrong += table(specs)["peak_memory_bytes"] != whole
        above += whole > table({})["peak_memory_bytes"]
    return wrong, above


def rate(table: MemoryTable, calls: int = 10_000) -> float:
    """Architectures of three blocks a second."""
    specs = dict(list(table.rows)[:: len(table.rows) // 3][:3])
    start = time.process_time()
    for _ in range(calls):
        table(specs)
    return calls / (time.process_time() - start)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["table"]:
        against_the_count(int(sys.argv[2]))
    else:
        against_the_allocator()
