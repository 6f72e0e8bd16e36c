"""The honest end of a study as its records hold it: what is trained anew, and what came of it.

The search chose its frontier by one validation split and few seeds, which flatters it. So the
frontier, the plain backbone and a control are trained again, each with several seeds.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any, Literal

from nasattn.architecture import Architecture, Placement
from nasattn.config import Experiment, Final
from nasattn.record import Cost, Trial
from nasattn.seed import derive
from nasattn.skeleton import in_words
from nasattn.uncertainty import Estimate, membership

# The attributes of a study that hold one evaluation each: `final:KEY:SEED`.
FINAL = "final"
CONTROL = "se"

Split = Literal["val", "test"]
SPLITS: tuple[Split, ...] = ("val", "test")


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One architecture trained once more from a backbone that was trained anew (`seed`: the how
    manyeth, from 0): its accuracy on the two splits, or the reason why it has none."""

    seed: int
    architecture: Architecture
    cost: Cost
    val: float | None = None
    test: float | None = None
    seconds: float = 0.0
    reason: str = ""

    @property
    def name(self) -> str:
        """The study's attribute that holds it."""
        return f"{FINAL}:{self.architecture.key}:{self.seed}"

    def done(self, test: bool) -> bool:
        """test: whether the test split is asked for."""
        return bool(self.reason) or (self.test if test else self.val) is not None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"architecture": self.architecture.as_dict()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Evaluation":
        architecture = Architecture.from_dict(fields["architecture"])
        return cls(**{**fields, "architecture": architecture, "cost": Cost(**fields["cost"])})


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """An architecture to be evaluated. `trial` is the search's own, where it had one; `control` the
    key of what stands beside a member of the frontier: SE at the same sites."""

    architecture: Architecture
    trial: Trial | None
    roles: tuple[str, ...]
    control: str | None = None


def contenders(trials: Sequence[Trial], front: Sequence[Trial]) -> list[Contender]:
    """The baseline, then the frontier's members, each with its control behind it; an architecture,
    such as a control of several members, stands there once, in all of its roles. A function of the
    search's trials alone."""
    by_key = {t.architecture.key: t for t in trials if t.score}
    found: dict[str, Contender] = {}

    def add(architecture: Architecture, role: str, control: Architecture | None = None) -> None:
        known = found.get(architecture.key)
        found[architecture.key] = Contender(
            architecture=architecture,
            trial=by_key.get(architecture.key),
            roles=tuple(dict.fromkeys((*(known.roles if known else ()), role))),
            control=control.key if control else known.control if known else None,
        )

    for trial in trials:
        if trial.baseline and trial.score:
            add(trial.architecture, "baseline")
    for trial in front:
        control = control_of(trial.architecture)
        add(trial.architecture, "frontier", control)
        if control:
            add(control, "control")
    return list(found.values())


def control_of(architecture: Architecture) -> Architecture | None:
    """The same with SE, its options at their defaults, at each site that holds a block; None where
    that is the same or there is no block."""
    placements = tuple(Placement(site=p.site, block=CONTROL) for p in architecture.placements)
    control = replace(architecture, placements=placements)
    return None if control == architecture else control


def evaluations(attributes: Mapping[str, Any]) -> dict[tuple[str, int], Evaluation]:
    """(architecture key, seed) -> what a study's attributes hold. An empty one is to come again."""
    read = (
        Evaluation.from_dict(value)
        for name, value in attributes.items()
        if name.startswith(f"{FINAL}:") and value
    )
    return {(e.architecture.key, e.seed): e for e in read}


def progress(
    final: Final, planned: Sequence[Contender], stored: Mapping[tuple[str, int], Evaluation]
) -> dict[str, int]:
    """How many evaluations it asks for, and how many of them are done and have failed."""
    asked = [stored.get((c.architecture.key, s)) for c in planned for s in range(final.seeds)]
    done = [e for e in asked if e and e.done(final.test)]
    failed = sum(bool(e.reason) for e in done)
    return {"evaluations": len(asked), "done": len(done), "failed": failed}


def all_done(counts: Mapping[str, int]) -> bool:
    """Whether all of such evaluations are done."""
    return counts["done"] == counts["evaluations"]


def means(
    experiment: Experiment,
    limits: Mapping[str, float],
    planned: Sequence[Contender],
    stored: Mapping[tuple[str, int], Evaluation],
) -> dict[str, float]:
    """The mean accuracy on val of the baseline and of each member of the frontier, by key, once all
    evaluations are done; what has failed by every seed has none, nor what is over the budget."""
    final = experiment.final
    if final is None or not all_done(progress(final, planned, stored)):
        return {}
    found = {
        c.architecture.key: [
            e.val
            for seed in range(final.seeds)
            if (e := stored[c.architecture.key, seed]).val is not None
        ]
        for c in planned
        if c.trial and _competes(c.roles, c.trial.cost, limits)
    }
    return {key: fmean(values) for key, values in found.items() if values}


def in_full(experiment: Experiment) -> Experiment:
    """The experiment with one training an evaluation, by the full schedule: the candidates' own
    from the plain backbone, without a warm start `pretrain`'s."""
    training = experiment.training
    whole = {} if training.warm_start else experiment.pretrain.model_dump()
    update = {"training": training.model_copy(update={**whole, "seeds": 1})}
    return experiment.model_copy(update=update)


def summarise(
    experiment: Experiment,
    limits: Mapping[str, float],
    trials: Sequence[Trial],
    front: Sequence[Trial],
    stored: Mapping[tuple[str, int], Evaluation],
) -> dict[str, Any] | None:
    """What `Study.final` returns; None where the experiment has no `final`."""
    if (final := experiment.final) is None:
        return None
    planned = contenders(trials, front)
    keys = {c.architecture.key for c in planned}
    left = {e.architecture.key: e.architecture for e in stored.values()}
    by_key = {t.architecture.key: t for t in trials if t.score}
    # Tested before the search was extended, and dominated since: shown, as all that was tested is.
    pairs = {key: control.key for key, a in left.items() if (control := control_of(a))}
    former = [
        Contender(
            architecture=a,
            trial=by_key.get(key),
            roles=(
                *(["former"] if key in by_key else []),
                *(["control"] if key in pairs.values() or key not in by_key else []),
            ),
            control=pairs.get(key),
        )
        for key, a in sorted(left.items(), key=lambda item: (item[0] in pairs.values(), item[0]))
        if key not in keys
    ]
    table = {
        c.architecture.key: [stored.get((c.architecture.key, s)) for s in range(final.seeds)]
        for c in [*planned, *former]
    }
    counts, judged = progress(final, planned, stored), {}
    rows = [_row(experiment, c, table) for c in [*planned, *former]]
    for row in rows:
        row.update({split: _figures(row, split, rows) for split in SPLITS})
    if all_done(counts):
        seed = derive(experiment.search.seed, FINAL)
        rivals = [r for r in rows if _competes(r["roles"], Cost(values=r["cost"]), limits)]
        judged = {s: _judge(rivals, s, experiment.costs, seed) for s in SPLITS}
    searched = experiment.training.model_copy(update={"seeds": 1})
    return {
        "seeds": final.seeds,
        "test": final.test,
        "warm_start": experiment.training.warm_start,
        "same_schedule": in_full(experiment).training == searched,
        **counts,
        "judged": judged,
        "gap": {split: _gaps(rows, split) for split in SPLITS},
        "rows": [{k: v for k, v in row.items() if k != "raw"} for row in rows],
    }


def _row(
    experiment: Experiment, contender: Contender, table: Mapping[str, Sequence[Evaluation | None]]
) -> dict[str, Any]:
    """What is known of a contender; `raw` holds its accuracies by split and seed."""
    found = table[contender.architecture.key]
    trial, present = contender.trial, [e for e in found if e]
    costs = [trial.cost] if trial else [e.cost for e in present if e.cost.values]
    cost = costs[0] if costs else Cost(values={})  # a control's that has failed is not known
    return {
        "number": trial.number if trial else None,
        "key": contender.architecture.key,
        "roles": list(contender.roles),
        "control": contender.control,
        "placements": contender.architecture.specs,
        "blocks": in_words(experiment.space, contender.architecture),
        "cost": dict(cost.values),
        "search": trial.score.accuracy if trial and trial.score else None,
        "failures": [{"seed": e.seed, "reason": e.reason} for e in present if e.reason],
        "raw": {s: [getattr(e, s) if e else None for e in found] for s in SPLITS},
    }


def _figures(
    row: Mapping[str, Any], split: Split, rows: Iterable[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """A row's accuracy on a split: its mean, and paired by seed its gain over the baseline, its
    gain over its control and what the search's own figure is above it; None without a value."""
    values = row["raw"][split]
    estimate = _estimate(values)
    if estimate is None:
        return None
    none: list[float | None] = []
    base = next((r["raw"][split] for r in rows if "baseline" in r["roles"]), none)
    control = next((r["raw"][split] for r in rows if r["key"] == row["control"]), none)
    searched = [row["search"]] * len(values)
    return {
        **estimate,
        "values": list(values),
        "gain": None if "baseline" in row["roles"] else _estimate(_minus(values, base)),
        "over_control": _estimate(_minus(values, control)),
        "gap": _estimate(_minus(searched, values)),
        "membership": None,
    }


def _judge(
    rivals: Sequence[dict[str, Any]], split: Split, costs: Sequence[str], seed: int
) -> dict[str, Any]:
    """Fill in the membership probabilities; of which points, and from how many seeds."""
    rows, seeds = _comparable(rivals, split)
    accuracies = [[row["raw"][split][s] for s in seeds] for row in rows]
    prices = [[float(row["cost"][m]) for m in costs] for row in rows]
    if seeds and (shares := membership(prices, accuracies, seed=seed)):
        for row, share in zip(rows, shares, strict=True):
            row[split]["membership"] = share
    keys = {name: [r["key"] for r in of] for name, of in (("rivals", rivals), ("points", rows))}
    return {**keys, "seeds": len(seeds)}


def _comparable(
    rows: Sequence[dict[str, Any]], split: Split
) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows that can be compared, and the seeds that all of them have. What has failed by all
    seeds is left out; and where the rest has less than two in common, and that helps, what has
    failed by most of them, one row after the other, but no baseline that has two."""

    def shared(rows: Sequence[dict[str, Any]]) -> list[int]:
        columns = enumerate(zip(*(row["raw"][split] for row in rows), strict=True))
        return [s for s, column in columns if None not in column]

    def missed(row: dict[str, Any]) -> int:
        found = [row["raw"][split][f["seed"]] for f in row["failures"]]
        keeps = "baseline" in row["roles"] and len(shared([row])) > 1
        return 0 if keeps else found.count(None)

    all_of_them = [row for row in rows if missed(row) < len(row["raw"][split])]
    kept = list(all_of_them)
    while len(seeds := shared(kept)) < 2:
        worst = max(reversed(kept), key=missed, default=None)
        if worst is None or not missed(worst):
            return all_of_them, shared(all_of_them)
        kept.remove(worst)
    return kept, seeds


def _gaps(rows: Sequence[dict[str, Any]], split: Split) -> dict[str, Any]:
    """How far the search's own accuracies lie above those of a split. frontier: the mean of its
    members, the baseline aside, which nothing selected and which stands beside it; bias: how much
    more that is, paired by seed."""
    frontier = [r for r in rows if "frontier" in r["roles"] and "baseline" not in r["roles"]]
    members, seeds = _comparable(frontier, split)
    raw = [row["raw"][split] for row in members]
    gaps = [fmean(r["search"] - v[s] for r, v in zip(members, raw, strict=True)) for s in seeds]
    base = next((r for r in rows if "baseline" in r["roles"] and r[split]), None)
    plain = _minus([base["search"]] * len(base["raw"][split]), base["raw"][split]) if base else []
    bias = _minus(gaps, [plain[s] for s in seeds] if base else [])
    return {
        "members": len(members),
        "frontier": _estimate(gaps),
        "baseline": base[split]["gap"] if base else None,
        "bias": _estimate(bias),
    }


def _competes(roles: Collection[str], cost: Cost, limits: Mapping[str, float]) -> bool:
    """Whether it is one of those to choose from: of the frontier, or the plain backbone, which may
    be over the budget where the space varies it."""
    return "frontier" in roles or ("baseline" in roles and cost.within(limits))


def _minus(left: Sequence[float | None], right: Sequence[float | None]) -> list[float | None]:
    """Seed by seed; None where one of the two is missing."""
    pairs = zip(left, right, strict=bool(right))
    return [None if a is None or b is None else a - b for a, b in pairs]


def _estimate(values: Sequence[float | None]) -> dict[str, Any] | None:
    present = [v for v in values if v is not None]
    return Estimate.of(present).as_dict() if present else None
