"""What is timed to make the latency table of a space on this machine.

The plain backbone, each different block once, by itself on a map of its true shape (where the
backbone varies, each of its own blocks too), and some whole networks: on half of them the
prediction is calibrated, on the other half its error is found. What is measured is kept group by
group, so an interrupted profile goes on.
"""

import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from torch import nn

from nasattn.architecture import NONE, Architecture, Placement
from nasattn.config import rebased
from nasattn.cost.calibration import Network
from nasattn.cost.latency import (
    Latency,
    LatencyRefused,
    Reference,
    Run,
    Target,
    TimingProtocol,
    load_average,
    time_runs,
)
from nasattn.cost.latency_table import Entry, LatencyTable, Space, check_context
from nasattn.document import Source, check, load_yaml
from nasattn.errors import UserError
from nasattn.model import Shape, block_inputs, build, make_block, site_shapes
from nasattn.skeleton import LEFT_OUT, SUFFIX, Skeleton
from nasattn.space_file import SpaceFile

# Is told how many are done (and the share of those that run), of how many, and the noise.
Progress = Callable[[float, int, float], None]

NETWORKS = 24  # whole ones for the calibration
FEWEST = 4
GROUP = 12  # subjects that are timed together, and then kept


@dataclass(frozen=True)
class Subject:
    """Something to be timed. name: equal for what takes equally long."""

    name: str
    shape: Shape = field(compare=False)
    make: Callable[[], nn.Module] = field(compare=False)


def subjects(space: Space) -> dict[Entry, Subject]:
    """What stands for each label of each parameter; equal blocks on equal maps are one."""
    plain, found = space.baseline(), dict[Entry, Subject]()
    shapes = site_shapes(plain.backbone, plain.input)
    inputs = block_inputs(plain) if space.skeleton else {}
    positions = {p.name + SUFFIX: p for p in space.skeleton.positions} if space.skeleton else {}
    for name, labels in space.parameters.items():
        for label in labels:
            if label in (NONE, LEFT_OUT):
                continue
            if space.skeleton and (position := positions.get(name)):
                text, shape = f"block {list(position.block(label))}", inputs[position.name]
                make = partial(_own_block, plain, space.skeleton, position.name, label)
            else:
                text, shape = label, shapes[name]
                make = partial(make_block, Placement.parse(name, label), shape[1])
            size = "x".join(map(str, shape[1:]))
            found[name, label] = Subject(f"{text} on {size}", shape, make)
    return found


def _own_block(plain: Architecture, skeleton: Skeleton, position: str, label: str) -> nn.Module:
    """The backbone's block at a position, of that label."""
    backbone = skeleton.backbone({position: label})
    return build(replace(plain, backbone=backbone)).get_submodule(position)


def read_space(path: Path) -> tuple[SpaceFile, Path | None]:
    """The space of an experiment, or of a space's own file, and the table an experiment names.

    Nothing else of an experiment is read: it cannot be whole while its table is not there.
    """
    fields, source = load_yaml(path)
    if not (isinstance(fields, dict) and "space" in fields):
        return check(SpaceFile, fields, source), None
    space, table = fields["space"], fields.get("latency")
    if isinstance(space, str):
        found = SpaceFile.load(_there(path, "space", space))
    else:
        found = check(SpaceFile, space, Source(f"{source.name}: space"))
    return found, _there(path, "latency", table) if isinstance(table, str) else None


def _there(file: Path, key: str, path: str) -> Path:
    """Where a path lies that a file names."""
    try:
        return rebased(path, file.parent)
    except ValueError as error:
        raise UserError(f"{file}: {key}: {error}") from None


def profile(
    space: Space,
    path: Path,
    target: Target,
    *,
    protocol: TimingProtocol | None = None,
    networks: int = NETWORKS,
    seed: int = 0,
    progress: Progress | None = None,
) -> LatencyTable:
    """Measure what the table at `path` still lacks, calibrate; what is measured is kept there.

    Raises LatencyRefused with what did not settle; all else is kept, and a second call goes on with
    it. A UserError when the file is of another backbone or of other circumstances.
    """
    protocol = protocol or TimingProtocol()
    plain, needed, drawn = space.baseline(), subjects(space), _draw(space, networks, seed)
    table = _begun(path, plain, target)
    run = target.prepare(build(plain), plain.input)
    if table is None:
        table = _started(plain, run, target, protocol)
        table.save(path)
    known = {needed[item]: found for item, found in table.measured.items() if item in needed}
    blocks = [s for s in dict.fromkeys(needed.values()) if s not in known]
    filled = table.adding({item: known[s] for item, s in needed.items() if s in known})
    if list(filled.measured) != list(table.measured):
        if filled.zeros != table.zeros:  # of an earlier version, by which networks were predicted
            filled = filled.replaced(networks={}, calibration=None)
        table = filled
        table.save(path)
    whole = [s for s in drawn if s.name not in table.networks]
    fitted = list(drawn)[::2]
    reference = Reference(run=run, seconds=table.plain.seconds)
    bench = _Bench(target, protocol, reference, len(blocks) + len(whole), progress)
    for found in bench.time(blocks):
        known |= found
        table = table.adding({item: known[s] for item, s in needed.items() if s in known})
        table = table.replaced(plain_by_group=[*table.plain_by_group, bench.beside])
        table.save(path)
    for found in bench.time(whole):
        added = {
            s.name: Network.of(latency, table.uncalibrated(drawn[s]), fit=s in fitted)
            for s, latency in found.items()
        }
        table = table.replaced(
            networks=table.networks | added,
            plain_by_group=[*table.plain_by_group, bench.beside],
        )
        table.save(path)
    if blocks or whole or not table.calibration:
        load = [*table.context["load"], load_average()]
        table = table.settled().replaced(context={**table.context, "load": load})
        table.save(path)
    return table


def _begun(path: Path, plain: Architecture, target: Target) -> LatencyTable | None:
    """The table at the path, if it can be gone on with; None where there is none yet."""
    if path.exists():
        table = check(LatencyTable, *load_yaml(path))
        table.check_baseline(plain)
        if changes := check_context(table, target.context()):
            raise UserError(
                f"{path}: the table there is of other circumstances: {'; '.join(changes)}; "
                "allowed: the same ones, or another --out"
            )
        return table
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    return None


def _started(
    plain: Architecture, run: Run, target: Target, protocol: TimingProtocol
) -> LatencyTable:
    """A table with the plain backbone alone."""
    context = target.context()
    timed = time_runs({"the plain backbone": run}, target.clock, protocol)
    _refuse(timed.refused)
    (latency,) = timed.settled.values()
    return LatencyTable(
        context=context,
        baseline=plain.as_dict(),
        plain=latency,
        plain_by_group=[latency.p25],
        blocks={},
        networks={},
    )


class _Bench:
    """Times subjects group by group, each group beside the plain backbone."""

    def __init__(
        self,
        target: Target,
        protocol: TimingProtocol,
        reference: Reference,
        total: int,
        progress: Progress | None,
    ) -> None:
        self.target, self.protocol, self.reference = target, protocol, reference
        self.total, self.progress = total, progress
        self.done, self.noise, self.beside = 0, 0.0, 0.0

    def time(self, subjects: Sequence[Subject]) -> Iterator[dict[Subject, Latency]]:
        """What settled of each group. Raises LatencyRefused at the end when anything did not."""
        refused: dict[str, str] = {}
        for first in range(0, len(subjects), GROUP):
            group = subjects[first : first + GROUP]
            runs = {}
            for number, subject in enumerate(group, 1):
                try:
                    runs[subject] = self.target.prepare(subject.make(), subject.shape)
                except LatencyRefused as error:
                    refused[subject.name] = str(error)
                self._tell(number / 2)  # half of the work, where a runtime compiles
            self.done += len(group)
            if not runs:
                continue
            timed = time_runs(
                runs, self.target.clock, self.protocol, self.reference, partial(self._tick, group)
            )
            refused |= {subject.name: why for subject, why in timed.refused.items()}
            self.beside = round(timed.beside, 9)
            yield timed.settled
        _refuse(refused)

    def _tick(self, group: Sequence[Subject], share: float, noise: float) -> None:
        self.noise = noise
        self._tell(len(group) * (share - 1) / 2)

    def _tell(self, running: float) -> None:
        if self.progress:
            self.progress(self.done + running, self.total, self.noise)


def _refuse(refused: Mapping[str, str]) -> None:
    if refused:
        lines = [f"{name}: {why}" for name, why in refused.items()]
        raise LatencyRefused(
            f"{len(lines)} could not be measured (load {load_average()}); what was measured is "
            "kept, and the same command tries these again:\n  " + "\n  ".join(lines)
        )


def _draw(space: Space, count: int, seed: int) -> dict[Subject, dict[str, str]]:
    """Different whole networks, with their rows; not the plain one.

    They keep a random number of the blocks of a uniform draw: nearly all of a space's networks hold
    `max_blocks`, and a line through them alone would be a line through one point.
    """
    wanted = min(count, space.size() - 1)
    if wanted < FEWEST:
        raise UserError(
            f"the space has {wanted} architectures besides the plain one; "
            f"allowed for a calibration: at least {FEWEST}"
        )
    plain, rng = space.baseline(), random.Random(seed)
    drawn: dict[Subject, dict[str, str]] = {}
    while len(drawn) < wanted:
        architecture = space.sample(rng)
        kept = rng.randint(min(1, len(architecture.placements)), len(architecture.placements))
        placed = set(rng.sample(architecture.placements, kept))
        architecture = replace(
            architecture, placements=tuple(p for p in architecture.placements if p in placed)
        )
        row = space.row_of(architecture)
        if architecture != plain and row is not None:
            make = partial(build, architecture)
            drawn[Subject(architecture.key, architecture.input, make)] = row
    return drawn
