"""The fast reader gives the trials that Optuna's own reading gives, the writer leaves its rows."""

import itertools
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import optuna
import pytest
from conftest import FakeStudy
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import RDBStorage
from optuna.trial import TrialState, create_trial

from nasattn.architecture import Architecture
from nasattn.search.rows import Database


@pytest.fixture
def url(tmp_path: Path) -> str:
    """Two studies with all that a trial can have, in all states."""
    url = f"sqlite:///{tmp_path}/rows.db"
    for name in ("other", "one"):
        study = optuna.create_study(
            study_name=name, storage=url, directions=["minimize", "maximize"]
        )
        for number in range(4):
            trial = study.ask()
            trial.suggest_categorical("z", ["none", "b(c=1)", name])
            trial.suggest_float("a", 0.0, 1.0)
            trial.set_user_attr("facts", {"n": [number, None, 0.1]})
            trial.set_constraint("c", -1.0)
            if number < 2:
                study.tell(trial, [float(number), float("inf")])
        study.tell(2, state=optuna.trial.TrialState.PRUNED)
        study.enqueue_trial({"a": 0.5})
    single = optuna.create_study(study_name="single", storage=url)
    trial = single.ask()
    for step, value in enumerate([0.5, float("nan"), float("-inf")]):
        trial.report(value, step)
    single.tell(trial, 1.0)
    return url


@pytest.mark.parametrize("name", ["one", "single"])
def test_as_optuna_reads(url: str, name: str) -> None:
    ours, theirs = Database(url), RDBStorage(url)
    study = theirs.get_study_id_from_name(name)
    expected = theirs.get_all_trials(study)
    for after in (-1, expected[0]._trial_id, expected[-1]._trial_id):
        for included in (set[int](), {expected[0]._trial_id}):
            for states in (None, (optuna.trial.TrialState.COMPLETE,)):
                found = ours._get_trials(study, states, included, after)
                wanted = theirs._get_trials(study, states, included, after)
                assert repr(found) == repr(wanted)  # nan is not itself
                assert [list(t.params) for t in found] == [list(t.params) for t in wanted]
    assert expected, "there was something to read"


def test_optuna_reads_by_it(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would still be right, and slow again."""
    calls: list[int] = []
    read = Database._get_trials

    def counted(self: Database, *args: object) -> object:
        calls.append(1)
        return read(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(
        Database, "_get_trials", lambda self, *a, **k: counted(self, *a, *k.values())
    )
    study = optuna.load_study(study_name="one", storage=Database(url))
    assert len(study.get_trials(deepcopy=False)) == 5
    assert calls


def written(database: RDBStorage, add: Callable[..., int]) -> list[str]:
    """Running trials made from templates, in two studies, whose parameters are not the same; the
    first trial of each has none."""
    up, down = optuna.study.StudyDirection.MAXIMIZE, optuna.study.StudyDirection.MINIMIZE
    studies = [database.create_new_study([up, down]) for _ in range(2)]
    for number, study in itertools.product(range(3), studies):
        distributions = {
            "z": CategoricalDistribution(["b(c=1)", "none", str(study)]),
            "a": IntDistribution(0, 3),
            "b": FloatDistribution(0.1, 1.0, log=True),
        }
        template = create_trial(
            state=TrialState.RUNNING,
            params={"z": "none", "a": number, "b": 0.5} if number else {},
            distributions=distributions if number else {},
            user_attrs={"facts": {"n": [number, None]}, "empty": {}} if number else {},
            system_attrs={"constraints": [-1.0]},
        )
        template.datetime_start = datetime(2026, 1, 2, 3, 4, 5)
        trial = add(study, template)
        if number == 1:
            database.set_trial_state_values(trial, TrialState.COMPLETE, [0.25, float("inf")])
    trials = [trial for study in studies for trial in database.get_all_trials(study)]
    assert [trial.number for trial in trials] == [0, 1, 2, 0, 1, 2]
    for trial in trials:
        trial.datetime_complete = None
    return [repr(trial) for trial in trials]


def test_as_optuna_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    ours, theirs = Database(f"sqlite:///{tmp_path}/a.db"), RDBStorage(f"sqlite:///{tmp_path}/b.db")
    try:
        assert written(ours, ours.add) == written(theirs, theirs.create_new_trial)
    finally:
        monkeypatch.undo()
        time.tzset()
    with pytest.raises(ValueError, match="does not support dynamic value space"):
        template = create_trial(
            state=TrialState.RUNNING,
            params={"z": "new"},
            distributions={"z": CategoricalDistribution(["none", "new"])},
        )
        ours.add(1, template)
    assert ours.add(1, create_trial(state=TrialState.RUNNING), lambda connection: False) is None
    assert len(ours.get_all_trials(1)) == 3, "nothing was left of them"
    ours.delete_study(1)
    with pytest.raises(KeyError):
        ours.add(1, create_trial(state=TrialState.RUNNING))


def test_a_trial_is_told_whole_and_once(url: str) -> None:
    database = Database(url)
    study = database.get_study_id_from_name("one")
    trial = database.create_new_trial(study)
    read = RDBStorage(url).get_trial

    database.tell(trial, TrialState.RUNNING, {"reason": "memory"})
    assert read(trial).state is TrialState.RUNNING and read(trial).datetime_complete is None
    assert read(trial).user_attrs == {"reason": "memory"}

    with pytest.raises(TypeError):
        database.tell(trial, TrialState.COMPLETE, {"reason": object()}, [1.0, 2.0])
    assert read(trial).state is TrialState.RUNNING, "all or nothing"

    database.tell(trial, TrialState.COMPLETE, {"reason": "none", "n": [1]}, [1.0, float("inf")])
    told = read(trial)
    assert (told.values, told.user_attrs) == ([1.0, float("inf")], {"reason": "none", "n": [1]})
    assert told.datetime_start <= told.datetime_complete <= datetime.now()

    database.tell(trial, TrialState.FAIL, {"reason": "late"})
    assert repr(read(trial)) == repr(told)


def test_stored_architectures_are_read_as_files_are(fake_study: FakeStudy) -> None:
    for trial in fake_study(12).trials:
        fields = trial.architecture.as_dict()
        assert Architecture.of(fields) == Architecture.from_dict(fields) == trial.architecture
        assert Architecture.of(fields).key == trial.architecture.key
