"""Optuna's database with a fast reader and writer of trials.

Optuna reads through SQLAlchemy's objects and parses each parameter's choices twice: about 1.5 ms a
trial of 17 parameters. Plain rows, and one parse of each different text, give the same trials. It
writes a new one by three statements a parameter; one for all of them leaves the same rows.
"""

import json
from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    check_distribution_compatibility,
    distribution_to_json,
    json_to_distribution,
)
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import Connection, Select, and_, delete, insert, or_, select, update
from sqlalchemy.orm import Session

Parts = dict[int, dict[Any, Any]]  # trial id -> its parameters, values or attributes


class Database(RDBStorage):
    """An RDBStorage. Should a later Optuna not read or write by the methods that are replaced here,
    its own way is taken: slower, and as right."""

    def _get_prepared_new_trial(
        self, study_id: int, template_trial: FrozenTrial | None, session: Session
    ) -> models.TrialModel:
        """A new row in an open transaction; of a template without results by few statements."""
        if template_trial is None or template_trial.state.is_finished():
            return super()._get_prepared_new_trial(study_id, template_trial, session)
        _check_choices(session, study_id, template_trial.distributions)
        trial = models.TrialModel(
            study_id=study_id,
            number=None,
            state=template_trial.state,
            datetime_start=template_trial.datetime_start,
        )
        session.add(trial)
        session.flush()
        trial.number = trial.count_past_trials(session)
        key = {"trial_id": trial.trial_id}
        params = [
            {
                "param_name": name,
                "param_value": distribution.to_internal_repr(template_trial.params[name]),
                "distribution_json": distribution_to_json(distribution),
            }
            for name, distribution in template_trial.distributions.items()
        ]
        user, system = (
            [{"key": name, "value_json": json.dumps(value)} for name, value in attributes.items()]
            for attributes in (template_trial.user_attrs, template_trial.system_attrs)
        )
        for model, rows in (
            (models.TrialParamModel, params),
            (models.TrialUserAttributeModel, user),
            (models.TrialSystemAttributeModel, system),
        ):
            if rows:
                session.execute(insert(model), [key | row for row in rows])
        return trial

    def tell(
        self,
        trial_id: int,
        state: TrialState,
        attributes: Mapping[str, Any],
        values: Sequence[float] = (),
    ) -> None:
        """End a trial (or, in the state RUNNING, leave it open) with its values and attributes of
        the user's, whole or not at all. One that has ended stays as it is."""
        trial, mark = models.TrialModel.__table__, models.TrialUserAttributeModel
        ended = {"datetime_complete": datetime.now(UTC).replace(tzinfo=None)}
        running = and_(trial.c.trial_id == trial_id, trial.c.state == TrialState.RUNNING)
        change = update(trial).where(running)
        with self.engine.begin() as connection:
            # This write comes first: it keeps other writers of the trial out.
            changed = change.values({"state": state} | (ended if state.is_finished() else {}))
            if connection.execute(changed).rowcount == 0:
                return
            old = and_(mark.trial_id == trial_id, mark.key.in_(attributes))
            connection.execute(delete(mark).where(old))
            found = [{"key": k, "value_json": json.dumps(v)} for k, v in attributes.items()]
            if found:
                connection.execute(insert(mark), [{"trial_id": trial_id} | row for row in found])
            row = models.TrialValueModel
            kept = [row.value_to_stored_repr(value) for value in values]
            told = [
                {"trial_id": trial_id, "objective": i, "value": value, "value_type": kind}
                for i, (value, kind) in enumerate(kept)
            ]
            if told:
                connection.execute(insert(row), told)

    def _get_trials(
        self,
        study_id: int,
        states: Container[TrialState] | None,
        included_trial_ids: set[int],
        trial_id_greater_than: int,
    ) -> list[FrozenTrial]:
        """The study's trials after an id, and those of the ids that are included, by id."""
        trial, asked = models.TrialModel, models.TrialModel.study_id == study_id
        if trial_id_greater_than > -1:
            later = trial.trial_id > trial_id_greater_than
            asked &= or_(later, trial.trial_id.in_(included_trial_ids))
        ids = select(trial.trial_id).where(asked)
        columns = trial.__table__.c
        times = columns.datetime_start, columns.datetime_complete
        heads = select(trial.trial_id, trial.number, trial.state, *times).where(asked)
        with self.engine.connect() as connection:
            # The trials first: one that is finished then has all its parts.
            found = connection.execute(heads.order_by(trial.trial_id)).all()
            if not found:
                return []
            params, distributions = _params(connection, ids)
            values = _values(connection, ids)
            user = _attributes(connection, models.TrialUserAttributeModel, ids)
            system = _attributes(connection, models.TrialSystemAttributeModel, ids)
            reports = _reports(connection, ids)
        return [
            FrozenTrial(
                trial_id=number_in_all,
                number=number,
                state=state,
                value=None,
                values=[v for _, v in sorted(values[number_in_all].items())] or None,
                datetime_start=_local(start),
                datetime_complete=_local(complete),
                params=params[number_in_all],
                distributions=distributions[number_in_all],
                user_attrs=user[number_in_all],
                system_attrs=system[number_in_all],
                intermediate_values=reports[number_in_all],
            )
            for number_in_all, number, state, start, complete in found
            if states is None or state in states
        ]


def _check_choices(
    session: Session, study_id: int, distributions: Mapping[str, BaseDistribution]
) -> None:
    """ValueError when an earlier trial has a parameter with other choices."""
    trial, row = models.TrialModel, models.TrialParamModel
    has_any = select(row.param_id).where(row.trial_id == trial.trial_id).exists()
    first = select(trial.trial_id).where(trial.study_id == study_id, has_any)
    first = first.order_by(trial.trial_id).limit(1)
    held = select(row.param_name, row.distribution_json).where(
        row.trial_id == first.scalar_subquery()
    )
    for name, text in session.execute(held):
        if name in distributions and distribution_to_json(distributions[name]) != text:
            check_distribution_compatibility(json_to_distribution(text), distributions[name])


def _params(connection: Connection, ids: Select[Any]) -> tuple[Parts, Parts]:
    """Each trial's parameters and their distributions, in the order they were suggested."""
    row, known = models.TrialParamModel, cache(json_to_distribution)
    rows = connection.execute(
        select(row.trial_id, row.param_name, row.param_value, row.distribution_json)
        .where(row.trial_id.in_(ids))
        .order_by(row.param_id)
    )
    params: Parts = defaultdict(dict)
    distributions: Parts = defaultdict(dict)
    for trial, name, value, text in rows:
        distributions[trial][name] = distribution = known(text)
        params[trial][name] = distribution.to_external_repr(value)
    return params, distributions


def _values(connection: Connection, ids: Select[Any]) -> Parts:
    row = models.TrialValueModel
    rows = connection.execute(
        select(row.trial_id, row.objective, row.value, row.value_type).where(row.trial_id.in_(ids))
    )
    found: Parts = defaultdict(dict)
    for trial, objective, value, kind in rows:
        found[trial][objective] = row.stored_repr_to_value(value, kind)
    return found


def _attributes(connection: Connection, row: Any, ids: Select[Any]) -> Parts:
    rows = connection.execute(
        select(row.trial_id, row.key, row.value_json).where(row.trial_id.in_(ids))
    )
    found: Parts = defaultdict(dict)
    for trial, key, text in rows:
        found[trial][key] = json.loads(text)
    return found


def _reports(connection: Connection, ids: Select[Any]) -> Parts:
    row = models.TrialIntermediateValueModel
    columns = row.trial_id, row.step, row.intermediate_value, row.intermediate_value_type
    found: Parts = defaultdict(dict)
    for trial, step, value, kind in connection.execute(
        select(*columns).where(row.trial_id.in_(ids))
    ):
        found[trial][step] = row.stored_repr_to_intermediate_value(value, kind)
    return found


def _local(time: datetime | None) -> datetime | None:
    return time and time.replace(tzinfo=UTC).astimezone().replace(tzinfo=None)
