"""The fast reader gives the trials that Optuna's own reading gives."""

from pathlib import Path

import optuna
import pytest
from conftest import FakeStudy
from optuna.storages import RDBStorage

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


def test_stored_architectures_are_read_as_files_are(fake_study: FakeStudy) -> None:
    for trial in fake_study(12).trials:
        fields = trial.architecture.as_dict()
        assert Architecture.of(fields) == Architecture.from_dict(fields) == trial.architecture
        assert Architecture.of(fields).key == trial.architecture.key
