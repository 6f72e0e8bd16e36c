"""What of a study's files is still asked for, and the removal of the rest.

Kept are the weights of the frontier and of the baseline, the plain backbone's, and whatever a trial
that is not finished, or that was stopped and may be promoted, goes on from, as does a `final` that
is not through. All else can be trained again to the same bits.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from nasattn.record import Trial
from nasattn.search.artifacts import UPLOADS, open_store, share
from nasattn.search.final import FINAL
from nasattn.search.lease import Leases
from nasattn.search.slots import named_by_number
from nasattn.search.study import Study

GB = 1e9
DRAFT = r"\..+\.safetensors(\.[0-9a-f]+)?\.draft"  # of weights, as nasattn.files.whole names it
BACKBONE_FILE = "backbone.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A file or a folder, its size here and in the artifact store together, and why it is kept or
    not. shared: of its size, what lies in the store. value: what is kept may go when room is short,
    the least value first; None: never."""

    path: Path
    bytes: int
    shared: int = 0
    why: str
    value: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Collection:
    """What was dropped (or would be), and what is kept. stuck: of what is kept, that which should
    have been dropped and could not be removed from this disk."""

    dropped: Sequence[Item]
    kept: Sequence[Item]
    stuck: Sequence[Item] = ()

    @property
    def freed(self) -> int:
        return sum(item.bytes for item in self.dropped)

    def shared(self, *, dropped: bool) -> int:
        """Of that, what lies (or lay) in the artifact store."""
        return sum(item.shared for item in (self.dropped if dropped else self.kept))

    @property
    def left(self) -> int:
        return sum(item.bytes for item in self.kept)


def collect(
    study: Study,
    *,
    limit: float | None = None,
    dry_run: bool = False,
    note: Callable[[str], None] = print,
) -> Collection:
    """Remove what is not asked for any more; with a limit (bytes), also the checkpoints of stopped
    trials until the rest is within it, those of the lowest accuracy first. What may not go can
    leave more than the limit. dry_run: only say what would be removed. note: told of an artifact
    store that does not answer.
    """
    share(study, open_store(study.config.artifacts, study), note)
    busy = bool(study.workers())
    if dry_run:
        return _chosen(study, limit, busy)
    # Nobody promotes a stopped trial, and nobody takes one over, while this holds the turn.
    with Leases(study.engine, study.name) as leases, leases.turn():
        found = _chosen(study, limit, busy)
        for item in found.dropped:
            study.files.drop(item.path, must=True)
        left = {item.path: _size(item.path) for item in found.dropped if item.path.exists()}
    gone = [replace(i, bytes=i.bytes - left.get(i.path, 0)) for i in found.dropped]
    stuck = [replace(i, bytes=left[i.path], shared=0) for i in found.dropped if i.path in left]
    return Collection(
        dropped=[i for i in gone if i.bytes or i.path not in left],
        kept=[*found.kept, *stuck],
        stuck=stuck,
    )


def _chosen(study: Study, limit: float | None, busy: bool) -> Collection:
    """busy: others work on the study."""
    # The files before the trials: one that began meanwhile is then no file without a trial.
    folder = study.folder
    paths = [
        *_numbered(folder / "weights", "*.safetensors"),
        *_numbered(folder / "checkpoints", "*"),
        *_named(folder, r"backbone\.(safetensors|checkpoints)"),
        *_named(folder / FINAL, r"seed\d+"),
        *_named(folder, DRAFT),
        *_named(folder / "weights", DRAFT),
    ]
    shared = study.files.elsewhere()
    sizes = {path: (_size(path), shared.get(path, 0)) for path in dict.fromkeys([*paths, *shared])}
    items = list(_judged(study, sizes, busy))
    dropped = [item for kept, item in items if not kept]
    kept = [item for kept, item in items if kept]
    for item in sorted((i for i in kept if i.value is not None), key=lambda i: i.value or 0.0):
        if limit is None or sum(i.bytes for i in kept) <= limit:
            break
        kept.remove(item)
        dropped.append(item)
    return Collection(dropped=dropped, kept=kept)


def _judged(
    study: Study, sizes: Mapping[Path, tuple[int, int]], busy: bool
) -> Iterable[tuple[bool, Item]]:
    """Each path with whether it is kept."""
    trials = {t.number: t for t in study.trials}
    front = {t.number for t in study.frontier(list(trials.values()))}
    final = study.final(list(trials.values()))
    for path, (here, shared) in sizes.items():
        value, place = None, path.parent.relative_to(study.folder).as_posix()
        if place == UPLOADS or path.suffix == ".draft":
            kept = busy
            why = "a worker may be at it" if busy else "a file that was broken off"
        elif place == "weights":
            kept, why = _weights(trials.get(int(path.stem)), front)
        elif place == "checkpoints":
            trial = trials.get(int(path.name))
            kept, why = _checkpoints(trial)
            if trial and trial.state == "stopped":
                value = trial.partial.accuracy if trial.partial else 0.0
        elif place == FINAL:
            kept = final is not None and final["done"] < final["evaluations"]
            why = "the final goes on from it" if kept else "the final is done"
        else:
            kept = path.suffix == ".safetensors" or study.folder / BACKBONE_FILE not in sizes
            why = "the plain backbone" if kept else "the plain backbone is trained"
        yield kept, Item(path=path, bytes=here + shared, shared=shared, why=why, value=value)


def _weights(trial: Trial | None, front: set[int]) -> tuple[bool, str]:
    if trial is None:
        return False, "no trial of this study"
    if trial.baseline or trial.number in front:
        return True, "the baseline" if trial.baseline else "on the frontier"
    if trial.state == "running":
        return True, "its trial is not finished"
    return False, f"its trial is {trial.state} and not on the frontier"


def _checkpoints(trial: Trial | None) -> tuple[bool, str]:
    if trial is None:
        return False, "no trial of this study"
    if trial.state == "running":
        return True, "its trial is not finished"
    if trial.state == "stopped":
        so_far = f" with accuracy {trial.partial.accuracy:.4f}" if trial.partial else ""
        return True, f"its trial was stopped{so_far} and may go on"
    return False, f"its trial is {trial.state}"


def _named(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for path in folder.glob("*") if re.fullmatch(pattern, path.name))


def _numbered(folder: Path, pattern: str) -> list[Path]:
    """What is named by a trial's number; nothing else there is nasattn's to judge."""
    found = [path for path in folder.glob(pattern) if named_by_number(path)]
    return sorted(found, key=lambda path: int(path.stem))


def _size(path: Path) -> int:
    total = 0
    for file in path.rglob("*") if path.is_dir() else [path]:
        with suppress(OSError):  # a worker may remove it meanwhile
            total += file.stat().st_size if file.is_file() else 0
    return total


def size_text(count: float) -> str:
    """`1.25 GB`, `310 kB`."""
    for unit, scale in (("GB", GB), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count:g} bytes"
