"""Optuna's database with a fast reader and writer of trials.

Optuna reads through SQLAlchemy's objects and parses each parameter's choices twice: about 1.5 ms a
trial of 17 parameters. Plain rows, and one parse of each different text, give the same trials. It
writes a new one by three statements a parameter; one for all of them leaves the same rows.
"""

import json
import weakref
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
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
from sqlalchemy import (
    Connection,
    bindparam,
    delete,
    exists,
    func,
    insert,
    or_,
    select,
    update,
)

Parts = dict[int, dict[Any, Any]]  # trial id -> its parameters, values or attributes, by name

# Statements are made once: SQLAlchemy takes longer to make one than to run it.
# here: the study; after: an id, and more: ids, of trials that are asked for; new, of: a trial's id.
TRIAL, PARAM, VALUE, REPORT = (
    model.__table__.c
    for model in (
        models.TrialModel,
        models.TrialParamModel,
        models.TrialValueModel,
        models.TrialIntermediateValueModel,
    )
)
STUDY = models.StudyModel.__table__.c
_HERE = TRIAL.study_id == bindparam("here")
_ASKED = _HERE & or_(
    TRIAL.trial_id > bindparam("after"), TRIAL.trial_id.in_(bindparam("more", expanding=True))
)
_IDS = select(TRIAL.trial_id).where(_ASKED)
HEADS = select(
    TRIAL.trial_id, TRIAL.number, TRIAL.state, TRIAL.datetime_start, TRIAL.datetime_complete
).where(_ASKED)
HEADS = HEADS.order_by(TRIAL.trial_id)
PARAMS = select(PARAM.trial_id, PARAM.param_name, PARAM.param_value, PARAM.distribution_json)
PARAMS = PARAMS.where(PARAM.trial_id.in_(_IDS)).order_by(PARAM.param_id)
VALUES = select(VALUE.trial_id, VALUE.objective, VALUE.value, VALUE.value_type)
VALUES = VALUES.where(VALUE.trial_id.in_(_IDS))
REPORTS = select(
    REPORT.trial_id, REPORT.step, REPORT.intermediate_value, REPORT.intermediate_value_type
).where(REPORT.trial_id.in_(_IDS))
USER, SYSTEM = (
    select(of.trial_id, of.key, of.value_json).where(of.trial_id.in_(_IDS))
    for of in (
        models.TrialUserAttributeModel.__table__.c,
        models.TrialSystemAttributeModel.__table__.c,
    )
)

LOCKED = select(STUDY.study_id).where(STUDY.study_id == bindparam("here")).with_for_update()
_FIRST = select(TRIAL.trial_id).where(_HERE, exists().where(PARAM.trial_id == TRIAL.trial_id))
_FIRST = _FIRST.order_by(TRIAL.trial_id).limit(1)
HELD = select(PARAM.param_name, PARAM.distribution_json).where(
    PARAM.trial_id == _FIRST.scalar_subquery()
)
EARLIER = select(func.count()).where(_HERE, TRIAL.trial_id < bindparam("new"))
NUMBERED = update(models.TrialModel).where(TRIAL.trial_id == bindparam("new"))

ENDED = update(models.TrialModel).where(
    TRIAL.trial_id == bindparam("of"), TRIAL.state == TrialState.RUNNING
)
FORGOTTEN = delete(models.TrialUserAttributeModel).where(
    models.TrialUserAttributeModel.trial_id == bindparam("of"),
    models.TrialUserAttributeModel.key.in_(bindparam("names", expanding=True)),
)

# For a connection that only reads: a server need not begin and end a transaction.
READS = {"isolation_level": "AUTOCOMMIT"}


class Database(RDBStorage):
    """An RDBStorage, and two transactions of our own in its tables. Should a later Optuna not read
    by the method that is replaced here, its own way is taken: slower, and as right. Its connections
    are closed with it: Python 3.13 warns of those that are forgotten."""

    def __init__(self, url: str, engine_kwargs: dict[str, Any] | None = None) -> None:
        super().__init__(url, engine_kwargs=engine_kwargs)
        weakref.finalize(self, self.engine.dispose)

    def add(
        self,
        study_id: int,
        template: FrozenTrial,
        allowed: Callable[[Connection], bool] = lambda connection: True,
    ) -> int | None:
        """A new running trial, whole or not at all; its id. None where it is not `allowed`, as
        asked within the transaction. Optuna's own way takes three statements a parameter.

        Raises KeyError when the study is gone, ValueError when an earlier trial has a parameter
        with other choices.
        """
        assert template.state is TrialState.RUNNING
        here = {"here": study_id}
        with self.engine.begin() as connection:
            if connection.scalar(LOCKED, here) is None:  # trials are numbered one after another
                raise KeyError(f"there is no study {study_id}")
            _check_choices(connection, here, template.distributions)
            start = template.datetime_start and _utc(template.datetime_start)
            row = {"study_id": study_id, "state": template.state, "datetime_start": start}
            key = connection.execute(insert(models.TrialModel), row).inserted_primary_key
            assert key is not None
            if not allowed(connection):
                connection.rollback()
                return None
            new = {"new": key[0]}
            number = connection.scalar(EARLIER, here | new)
            connection.execute(NUMBERED, new | {"number": number})
            params = [
                {
                    "param_name": name,
                    "param_value": distribution.to_internal_repr(template.params[name]),
                    "distribution_json": distribution_to_json(distribution),
                }
                for name, distribution in template.distributions.items()
            ]
            user, system = (
                [{"key": name, "value_json": json.dumps(value)} for name, value in of.items()]
                for of in (template.user_attrs, template.system_attrs)
            )
            for model, rows in (
                (models.TrialParamModel, params),
                (models.TrialUserAttributeModel, user),
                (models.TrialSystemAttributeModel, system),
            ):
                if rows:
                    connection.execute(insert(model), [{"trial_id": key[0]} | row for row in rows])
        return int(key[0])

    def tell(
        self,
        trial_id: int,
        state: TrialState,
        attributes: Mapping[str, Any],
        values: Sequence[float] = (),
    ) -> None:
        """End a trial (or, in the state RUNNING, leave it open) with its values and attributes of
        the user's, whole or not at all. One that has ended stays as it is."""
        this: dict[str, Any] = {"of": trial_id}
        end = {"datetime_complete": _utc(datetime.now())} if state.is_finished() else {}
        with self.engine.begin() as connection:
            # This write comes first: it keeps other writers of the trial out.
            if connection.execute(ENDED, this | end | {"state": state}).rowcount == 0:
                return
            mark = models.TrialUserAttributeModel
            connection.execute(FORGOTTEN, this | {"names": list(attributes)})
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
        more = list(included_trial_ids)
        asked = {"here": study_id, "after": trial_id_greater_than, "more": more}
        with self.engine.connect().execution_options(**READS) as connection:
            # The trials first: one that is finished then has all its parts.
            found = connection.execute(HEADS, asked).all()
            if not found:
                return []
            known = cache(json_to_distribution)
            params = _parts(connection.execute(PARAMS, asked), lambda v, text: (v, known(text)))
            user, system = (
                _parts(connection.execute(of, asked), json.loads) for of in (USER, SYSTEM)
            )
            value = models.TrialValueModel.stored_repr_to_value
            values = _parts(connection.execute(VALUES, asked), value)
            report = models.TrialIntermediateValueModel.stored_repr_to_intermediate_value
            reports = _parts(connection.execute(REPORTS, asked), report)
        return [
            FrozenTrial(
                trial_id=number_in_all,
                number=number,
                state=state,
                value=None,
                values=[v for _, v in sorted(values[number_in_all].items())] or None,
                datetime_start=_local(start),
                datetime_complete=_local(complete),
                params={k: d.to_external_repr(v) for k, (v, d) in params[number_in_all].items()},
                distributions={k: d for k, (_, d) in params[number_in_all].items()},
                user_attrs=user[number_in_all],
                system_attrs=system[number_in_all],
                intermediate_values=reports[number_in_all],
            )
            for number_in_all, number, state, start, complete in found
            if states is None or state in states
        ]


def _check_choices(
    connection: Connection, here: Mapping[str, int], distributions: Mapping[str, BaseDistribution]
) -> None:
    """Against the study's first trial that has parameters."""
    for name, text in connection.execute(HELD, here):
        if name in distributions and distribution_to_json(distributions[name]) != text:
            check_distribution_compatibility(json_to_distribution(text), distributions[name])


def _parts(rows: Iterable[Any], read: Callable[..., Any]) -> Parts:
    """By trial, in the rows' order: the second column -> what is read of the others."""
    found: Parts = defaultdict(dict)
    for trial, key, *stored in rows:
        found[trial][key] = read(*stored)
    return found


def _utc(time: datetime) -> datetime:
    """As it is stored."""
    return time.astimezone(UTC).replace(tzinfo=None)


def _local(time: datetime | None) -> datetime | None:
    return time and time.replace(tzinfo=UTC).astimezone().replace(tzinfo=None)
