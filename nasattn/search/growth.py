"""A study whose space has grown: its trials stay, and what is new can be proposed from now on.

Optuna holds a categorical parameter to the choices of its first trial. So the choices that are
stored with every trial are rewritten, and the index of each trial's choice with them: all of it in
one transaction, or nothing.
"""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from optuna.distributions import (
    CategoricalDistribution,
    distribution_to_json,
    json_to_distribution,
)
from optuna.storages._rdb import models
from sqlalchemy import Connection, Engine, and_, case, insert, literal, select, update

from nasattn.errors import UserError, first_few
from nasattn.record import counted
from nasattn.search.lease import BEAT, Heartbeats, workers

Facts = Mapping[str, Any]  # as a study stores them: `experiment`, `choices`, and more

# The keys of an experiment that may be edited within a study, if nothing is taken away by it.
GROWING = ("space.sites: ", "space.blocks", "space.max_blocks: ")


def losses(old: Facts, new: Facts) -> list[str]:
    """What the old space offers and the new one does not."""
    lost = []
    for site, specs in old["choices"].items():
        offered = new["choices"].get(site)
        if offered is None:
            lost.append(f"the site {site}")
        else:
            lost += [f"{spec} @ {site}" for spec in specs if spec not in offered]
    if _most(old) > (after := _most(new)):
        lost.append(f"architectures of more than {counted(after, 'block')}")
    return lost


def gains(old: Facts, new: Facts) -> str:
    """What is new, for people; empty for nothing."""
    sites = [site for site in new["choices"] if site not in old["choices"]]
    specs = {
        spec: None
        for site, offered in new["choices"].items()
        for spec in offered
        if site in old["choices"] and spec not in old["choices"][site]
    }
    parts = [f"the site {site}" for site in sites] + list(specs)
    if _most(new) > _most(old):
        parts.append(f"up to {_most(new)} blocks")
    return first_few(parts)


def at_work(engine: Engine, study: str) -> list[Mapping[str, Any]]:
    """What the workers say of themselves whose beats are seen to go on; a row that a dead machine
    has left behind is looked at until that is certain."""
    beats, first = Heartbeats(), dict[str, int]()
    while found := workers(engine, study, beats):
        first = first or {w.owner: w.beat for w in found}
        if moved := [w.facts for w in found if w.beat != first.get(w.owner)]:
            return moved
        time.sleep(BEAT / 3)
    return []


def grow(engine: Engine, study: int, attribute: str, old: Facts, new: Facts) -> None:
    """Rewrite a study, by its id, and its facts, which it holds in an attribute of that name.

    A UserError when its facts are not the old ones any more.
    """
    with engine.begin() as connection:
        # A write comes first: it keeps other writers out, on sqlite as on a server.
        row = models.StudyModel
        connection.execute(
            update(row).where(row.study_id == study).values(study_name=row.study_name)
        )
        facts = models.StudyUserAttributeModel
        here = and_(facts.study_id == study, facts.key == attribute)
        if json.loads(connection.scalars(select(facts.value_json).where(here)).one()) != old:
            raise UserError("the study was changed by another process just now: try again")
        for site, specs in new["choices"].items():
            _widen(connection, study, site, specs)
        connection.execute(update(facts).where(here).values(value_json=json.dumps(new)))


def _widen(connection: Connection, study: int, site: str, specs: Sequence[str]) -> None:
    """Give a parameter new choices in all trials; where it is new, each trial has none there."""
    row, trial = models.TrialParamModel, models.TrialModel
    text = distribution_to_json(CategoricalDistribution(specs))
    ours = select(trial.trial_id).where(trial.study_id == study)
    here = and_(row.param_name == site, row.trial_id.in_(ours))
    texts = connection.scalars(select(row.distribution_json).where(here).distinct()).all()
    for before in texts:
        held = json_to_distribution(before)
        assert isinstance(held, CategoricalDistribution)
        moved = {float(i): float(specs.index(str(spec))) for i, spec in enumerate(held.choices)}
        connection.execute(
            update(row)
            .where(here, row.distribution_json == before)
            .values(param_value=case(moved, value=row.param_value), distribution_json=text)
        )
    if not texts:
        columns = trial.trial_id, literal(site), literal(0.0), literal(text)
        names = ["trial_id", "param_name", "param_value", "distribution_json"]
        added = select(*columns).where(trial.study_id == study)
        connection.execute(insert(row).from_select(names, added))


def _most(facts: Facts) -> int:
    """How many blocks an architecture may hold."""
    sites = len(facts["choices"])
    return min(facts["experiment"]["space"]["max_blocks"] or sites, sites)
