"""A space that grows goes on with its study, one that shrinks is refused, and nothing between."""

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.distributions import CategoricalDistribution
from optuna.storages import RDBStorage
from rich.console import Console
from test_search import SPACE, Formula, by_formula, rows, search_options, searching
from typer.testing import CliRunner

from nasattn import cli
from nasattn.architecture import NONE
from nasattn.config import Experiment
from nasattn.errors import UserError
from nasattn.search import growth, lease
from nasattn.search.display import Display
from nasattn.search.growth import grow
from nasattn.search.loop import Search
from nasattn.search.opening import find_study, free_name, load_study
from nasattn.search.samplers import SAMPLERS
from nasattn.search.study import FACTS, Study
from nasattn.space import SearchSpace

SMALL = SPACE | {
    "sites": ["stage[2-3].*"],
    "blocks": {"gcnet": {"ratio": [0.5]}, "se": {"ratio": [0.25]}},
    "max_blocks": 2,
}
# New blocks before the old ones, a new value before the old one, a new site before the old ones.
GROWN = SPACE
WIDER = SPACE["backbone"] | {"width": 0.5}
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def written(space: dict[str, Any], storage: str = "", **changes: Any) -> Path:
        fields = {
            "study": "tiny",
            "storage": storage or f"sqlite:///{tmp_path}/tiny.db",
            "space": space,
            "data": {"name": "cued_digits", "train": 192, "val": 64, "test": 64},
            "training": {"epochs": 1, "batch_size": 32, "lr": 0.01},
            "budget": {"macs": "1.3x"},
            "search": {"sampler": "random", "seed": 1},
        }
        path = tmp_path / "experiment.yaml"
        path.write_text(yaml.safe_dump(fields | changes))
        return path

    return written


def dump(study: Study) -> list[str]:
    """All that a sqlite database holds."""
    with closing(sqlite3.connect(study.storage.removeprefix("sqlite:///"))) as connection:
        return list(connection.iterdump())


def test_a_space_that_has_grown_meanwhile_is_not_put_back(write: Write) -> None:
    """By a process that had read the study before, and has not begun to work on it."""
    path = write(SMALL)
    by_formula(path, 2)
    old = searching(path)
    grown = by_formula(write(GROWN), 3).facts
    with pytest.raises(UserError, match="has just grown"):
        old.plan(9)
    assert load_study(old.study.storage, "tiny").facts == grown


def grown_is_right(before: Study, old: list[Any], after: Study) -> None:
    """Everything that was there is there still, read by Optuna's own reader."""
    trials = before.trials
    assert rows(after)[: len(trials)] == rows(before)
    assert after.trials[: len(trials)] == trials
    space = SearchSpace.of(after.config.space)
    assert after.facts["choices"] == {s: list(specs) for s, specs in space.choices.items()}
    assert after.facts["size"] == str(space.size())
    reader = RDBStorage(after.storage)
    read = reader.get_all_trials(reader.get_study_id_from_name(after.name))
    reader.engine.dispose()
    for row, trial in zip(read, after.trials, strict=True):
        assert space.decode(row.params) == trial.architecture
        assert row.distributions == {
            site: CategoricalDistribution(specs) for site, specs in space.choices.items()
        }
    for was, row in zip(old, read, strict=False):
        assert {k: v for k, v in row.params.items() if k in was.params} == was.params
        assert all(v == NONE for k, v in row.params.items() if k not in was.params)
        assert (row.values, row.user_attrs) == (was.values, was.user_attrs)
        assert row.system_attrs == was.system_attrs


@pytest.mark.parametrize(
    ("sampler", "database"),
    [
        *((name, "sqlite") for name in SAMPLERS),
        pytest.param("frontier", "postgres", marks=pytest.mark.slow),
        pytest.param("nsga2", "postgres", marks=pytest.mark.slow),
    ],
)
def test_a_grown_space_goes_on(
    write: Write, sampler: str, database: str, request: pytest.FixtureRequest
) -> None:
    storage = "" if database == "sqlite" else request.getfixturevalue("postgres")
    options = {"search": search_options(sampler), "storage": storage}
    before = by_formula(write(SMALL, **options), 12)
    old = before.optuna.get_trials()
    front = before.frontier()
    path = write(GROWN, **options)
    display, said = Display(Console(quiet=True)), list[str]()
    display.note = said.append  # type: ignore[method-assign]
    grown = Search(Experiment.load(path), display).study
    assert said == grown.notes and "the space has grown" in said[0]
    assert grown.frontier() == front
    grown_is_right(before, old, grown)
    after = by_formula(path, 30)
    grown_is_right(before, old, after)
    assert [t.number for t in after.trials] == list(range(30))
    assert len({t.architecture.key for t in after.trials}) == 30
    new = {spec for t in after.trials[12:] for spec in t.architecture.specs.values()}
    assert new - {s for specs in before.facts["choices"].values() for s in specs}
    assert any(len(t.architecture.placements) == 3 for t in after.trials)
    again = searching(path).study
    assert not again.notes, "it has grown once"
    for study in (before, grown, after, again):
        study.engine.dispose()


@pytest.mark.parametrize("sampler", ["frontier", "gp"])
def test_who_takes_the_growth_up_goes_on_as_who_comes_later(
    write: Write, tmp_path: Path, sampler: str
) -> None:
    """Optuna had read the trials with the choices of before when the space grew."""

    def gone_on(later: bool) -> Study:
        options = {
            "search": search_options(sampler),
            "storage": f"sqlite:///{tmp_path}/{later}/tiny.db",
        }
        by_formula(write(SMALL, **options), 12)
        settings = Experiment.load(write(GROWN, **options))
        for _ in range(1 + later):
            found = find_study(settings.storage, "tiny")
            assert found and len(found.trials) == 12
            search = Search(settings, Display(Console(quiet=True)), found)
        search.evaluator = Formula()  # type: ignore[assignment]
        return search.run(16)

    assert rows(gone_on(later=False)) == rows(gone_on(later=True))


def test_what_was_interrupted_goes_on_in_the_grown_space(write: Write) -> None:
    with pytest.raises(KeyboardInterrupt):
        by_formula(write(SMALL), 8, Formula(frozenset({5})))
    before = load_study(searching(write(SMALL)).study.storage, "tiny")
    running = before.trials[4]
    assert running.state == "running"
    after = by_formula(write(GROWN), 8)
    assert after.trials[4].architecture == running.architecture
    assert [t.state for t in after.trials] == ["scored"] * 8


def test_the_search_says_what_is_new(write: Write) -> None:
    by_formula(write(SMALL), 3)
    wider = SMALL | {"blocks": SMALL["blocks"] | {"eca": {}}, "max_blocks": 3}
    assert searching(write(wider)).study.notes == [
        "the space has grown (eca(kernel=0), up to 3 blocks): all trials stay"
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"space": SMALL | {"blocks": {"gcnet": {"ratio": [0.5]}, "eca": {}}}}, "se(ratio=0.25) @"),
        ({"space": SMALL | {"blocks": {"gcnet": {"ratio": [0.25]}, "se": {"ratio": 0.25}}}}, "0.5"),
        ({"space": SMALL | {"sites": ["stage[1-2].*"]}}, "the site stage3.0"),
        ({"space": SMALL | {"max_blocks": 1}}, "architectures of more than 1 block"),
        ({"space": GROWN, "budget": {"macs": "1.4x"}}, "budget.macs: '1.3x' -> '1.4x'"),
        ({"space": GROWN | {"backbone": WIDER}}, "space.backbone.width: 0.25 -> 0.5"),
        ({"space": GROWN, "training": {"epochs": 2}}, "training.epochs: 1 -> 2"),
    ],
    ids=["block", "value", "site", "max_blocks", "budget", "backbone", "training"],
)
def test_any_other_edit_is_refused(write: Write, change: dict[str, Any], said: str) -> None:
    study = by_formula(write(SMALL), 4)
    before = dump(study)
    space = change.pop("space")
    training = {"batch_size": 32, "lr": 0.01, "epochs": 1} | change.pop("training", {})
    with pytest.raises(UserError) as refusal:
        Experiment.load(path := write(space, training=training, **change))
        searching(path)
    message = str(refusal.value)
    assert said in message
    assert "To go on with it write what it has" in message and "--new-study" in message
    assert dump(study) == before


@pytest.fixture
def worker(write: Write, monkeypatch: pytest.MonkeyPatch) -> lease.Leases:
    """One that works on a small study."""
    for module in (lease, growth):
        monkeypatch.setattr(module, "BEAT", 0.05)
    study = by_formula(write(SMALL), 4)
    return lease.Leases(study.engine, study.name)


def test_it_waits_until_nobody_works(write: Write, worker: lease.Leases) -> None:
    with worker:
        before = load_study(searching(write(SMALL)).study.storage, "tiny").facts
        with pytest.raises(UserError, match=f"searched by .*:{os.getpid()}: stop that"):
            searching(write(GROWN))
        assert load_study(searching(write(SMALL)).study.storage, "tiny").facts == before
    assert searching(write(GROWN)).study.notes


def test_a_dead_machine_is_not_waited_for(
    write: Write, worker: lease.Leases, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its row stands still, and no process of this machine is asked."""
    monkeypatch.setattr(lease, "STALE", 0.2)
    worker._who["place"] = "another machine"
    lease.create_table(worker.engine)
    worker.renew()
    assert growth.at_work(worker.engine, "tiny") == []
    assert searching(write(GROWN)).study.notes


def test_other_studies_stay_as_they_are(write: Write) -> None:
    storage = by_formula(write(SMALL, study="other"), 4).storage
    other = load_study(storage, "other")
    rows_before, trials = repr(other.optuna.get_trials()), rows(other)
    by_formula(write(SMALL), 4)
    by_formula(write(GROWN), 5)
    again = load_study(storage, "other")
    assert repr(again.optuna.get_trials()) == rows_before
    assert again.facts == other.facts
    assert rows(by_formula(write(SMALL, study="other"), 5))[:4] == trials


@pytest.mark.parametrize("statement", [3, 9])
def test_a_kill_in_the_middle_leaves_the_old_state(write: Write, statement: int) -> None:
    study = by_formula(write(SMALL), 6)
    before = dump(study)
    path = write(GROWN)
    code = (
        "import os, sys\nfrom sqlalchemy import Engine, event\n"
        "from nasattn.search import growth\nfrom test_search import searching\n"
        "left, real = int(sys.argv[2]), growth.grow\n"
        "def die(*a):\n"
        "    global left\n"
        "    left -= 1\n"
        "    if not left: os.kill(os.getpid(), 9)\n"
        "def grow(engine, *a):\n"
        "    event.listen(engine, 'after_cursor_execute', die)\n"
        "    real(engine, *a)\n"
        "from nasattn.search import opening\n"
        "opening.grow = grow\n"
        "searching(__import__('pathlib').Path(sys.argv[1]))\n"
    )
    killed = subprocess.run(
        [sys.executable, "-c", code, path, str(statement)],
        cwd=Path(__file__).parent,
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert dump(study) == before
    assert len(by_formula(path, 8).trials) == 8


def test_a_study_that_changed_meanwhile_is_left_alone(write: Write) -> None:
    study = by_formula(write(SMALL), 3)
    before = dump(study)
    stale = {**study.facts, "size": "1"}
    with pytest.raises(UserError, match="changed by another process"):
        grow(study.engine, study.optuna._study_id, FACTS, stale, study.facts)
    assert dump(study) == before


def test_a_new_study_takes_the_next_free_name(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    said: list[str] = []

    def noted(experiment: Experiment, *arguments: Any) -> None:
        asked.append(experiment.study)
        said.append(arguments[-1])

    monkeypatch.setattr(cli, "_search", noted)
    path = write(SMALL)
    storage = Experiment.load(path).storage
    for taken in ("tiny", "tiny-2", "tiny-4"):
        run = CliRunner().invoke(cli.app, ["search", str(path), "--new-study"])
        assert run.exit_code == 0, run.output
        again = f"nasattn resume --study {taken.replace('4', '3')} --storage '{storage}'"
        assert said[-1] == again, "not the same command goes on"
        optuna.create_study(study_name=taken, storage=storage)
    assert asked == ["tiny", "tiny-2", "tiny-3"]
    assert free_name(storage, "other") == "other"
