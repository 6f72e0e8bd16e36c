"""A study's database, above all with several processes on it: real PostgreSQL and real sqlite."""

import gc
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from conftest import FakeStudy
from optuna.trial import TrialState, create_trial
from sqlalchemy import create_engine, event, text
from sqlalchemy.exc import OperationalError

from nasattn import load_study
from nasattn.cli import main
from nasattn.config import Experiment
from nasattn.errors import UserError
from nasattn.search import database, outage
from nasattn.search.database import connect
from nasattn.search.opening import open_study
from nasattn.search.rows import Database
from nasattn.search.study import FACTS, Study

FIELDS: dict[str, Any] = {
    "study": "shared",
    "space": {
        "backbone": {"name": "mobilenet_v2", "width": 0.25, "rows": [[1, 32, 1, 1]]},
        "sites": ["stage*.*"],
        "blocks": {"se": {}},
    },
    "data": {"name": "cued_digits"},
}
KNOWN: dict[str, Any] = {
    "plain": {"macs": 1},
    "limits": {},
    "cheapest": {"macs": 1},
    "reference": {"macs": 2},
    "size": "2",
    "choices": {"stage1.0": ["none", "se(ratio=0.0625)"]},
}


def opened(storage: str, **changes: Any) -> Study:
    experiment = Experiment.from_dict(FIELDS | {"storage": storage} | changes)
    return open_study(experiment, KNOWN)


def test_trials_added_at_once_are_numbered_one_by_one(storage: str) -> None:
    """Without turns, that is by the database alone."""
    study, together = opened(storage), threading.Barrier(6)

    def add() -> None:
        database = connect(storage)
        assert isinstance(database, Database)
        together.wait()
        for _ in range(5):
            database.add(study.optuna._study_id, create_trial(state=TrialState.RUNNING))

    threads = [threading.Thread(target=add) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [row.number for row in study.optuna.get_trials()] == list(range(30))


def test_many_create_one_study_at_once(storage: str) -> None:
    """Each with connections of its own, as processes have; Optuna alone fails here."""
    found: list[Study] = []
    errors: list[BaseException] = []
    together = threading.Barrier(6)

    def create() -> None:
        together.wait()
        try:
            found.append(opened(storage))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=create) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(found) == 6
    assert len({study.optuna._study_id for study in found}) == 1
    assert [s.study_name for s in connect(storage).get_all_studies()] == ["shared"]
    assert all(study.facts == found[0].facts for study in found)


def test_a_creator_whom_sqlite_refuses_at_once_tries_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = database._opened, [True]

    def refused_once(storage: str) -> Any:
        if left:
            left.pop()
            raise OperationalError("", None, sqlite3.OperationalError("database is locked"))
        return real(storage)

    monkeypatch.setattr(database, "_opened", refused_once)
    assert opened(f"sqlite:///{tmp_path}/one.db").name == "shared"


def test_a_creation_that_was_killed_half_way_is_completed(storage: str) -> None:
    directions = [optuna.study.StudyDirection.MAXIMIZE, optuna.study.StudyDirection.MINIMIZE]
    connect(storage).create_new_study(directions, "shared")
    with pytest.raises(UserError, match="was not made by nasattn"):
        load_study(storage, "shared")
    assert opened(storage).facts == load_study(storage, "shared").facts


def test_its_connections_are_closed_with_it(storage: str) -> None:
    opened, closed = connect(storage), list[object]()
    opened.get_all_studies()
    event.listen(opened.engine, "close", lambda connection, record: closed.append(connection))
    pool: Any = opened.engine.pool
    kept = pool.checkedin()
    assert kept and not closed
    del opened
    gc.collect()
    assert len(closed) == kept


def test_a_database_on_a_full_disk_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sqlite speaks of an I/O error."""
    file = tmp_path / "one.db"
    connect(f"sqlite:///{file}")
    os.truncate(file, 1000)
    for free, told in ((0, "; its disk is full"), (2**30, "")):
        monkeypatch.setattr(
            shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free)
        )
        with pytest.raises(UserError, match=rf"cannot be used: [^;]*{told}$"):
            connect(f"sqlite:///{file}")


def test_a_file_that_may_not_be_written_is_not_waited_for(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/x.db"
    connect(url)
    engine = create_engine(f"sqlite:///file:{tmp_path}/x.db?mode=ro&uri=true")
    with pytest.raises(OperationalError) as raised, engine.begin() as connection:
        connection.execute(text("DELETE FROM studies"))
    assert not outage.gone(raised.value)
    assert outage.broken_database(raised.value) == "attempt to write a readonly database"
    engine.dispose()


def test_a_study_of_others_is_left_alone(storage: str) -> None:
    other = optuna.create_study(storage=connect(storage), study_name="shared")
    with pytest.raises(UserError, match="was not made by nasattn"):
        opened(storage)
    assert other.user_attrs == {}


def test_the_password_is_not_stored(postgres: str) -> None:
    password = postgres.partition("@")[0].rpartition(":")[2]
    stored = str(opened(postgres).optuna.user_attrs[FACTS])
    assert len(password) > 20
    assert password not in stored
    assert password in load_study(postgres, "shared").config.storage, "children need it"


@pytest.mark.parametrize("idle", [True, False])
def test_a_connection_that_the_server_closed_is_replaced(
    postgres: str, idle: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unseen where it lay idle; else the next use fails, and the one after it is right."""
    monkeypatch.setattr(database, "IDLE", 0.0 if idle else 1e9)
    engine, other = connect(postgres).engine, connect(postgres).engine
    engine.dispose()  # so that there is one connection below, and no other
    mine = text("SELECT pg_backend_pid()")
    with engine.connect() as connection:
        before = connection.scalar(mine)
    with other.begin() as connection:
        connection.execute(text(f"SELECT pg_terminate_backend({before})"))
    if not idle:
        with pytest.raises(OperationalError), engine.connect() as connection:
            connection.scalar(mine)
    with engine.connect() as connection:
        assert connection.scalar(mine) not in (None, before)
    for each in (engine, other):
        each.dispose()


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg"])
def test_every_spelling_of_a_url_is_one_database(postgres: str, scheme: str) -> None:
    opened(postgres)
    spelled = f"{scheme}://{postgres.partition('://')[2]}"
    assert load_study(spelled, "shared").facts == opened(spelled).facts


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("sqlit:///x.db", "got 'sqlit'; allowed: sqlite or postgresql; did you mean 'sqlite'?"),
        ("mysql://x/y", "needs a driver: .*; allowed without one: sqlite; with pip install"),
        ("sqlite:///{folder}", "{folder} is a folder; allowed: a file in one"),
    ],
)
def test_what_is_no_database_is_told_with_what_may_be(tmp_path: Path, url: str, said: str) -> None:
    with pytest.raises(UserError, match=said.format(folder=tmp_path).replace("?", r"\?")):
        connect(url.format(folder=tmp_path))


def test_a_port_that_is_no_number_is_refused() -> None:
    with pytest.raises(UserError, match=r"the URL's port is no whole number; allowed: postgresql:"):
        load_study("postgresql://me:secret@host:abc/x", "shared")


def unreachable(postgres: str) -> dict[str, str]:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
    password = postgres.partition("@")[0].rpartition(":")[2]
    server = postgres.rpartition("/")[0]
    return {
        "refused": f"{server.rpartition(':')[0]}:{port}/x",
        "no database": f"{server}/no_such_database",
        "password": postgres.replace(password, "s3cret"),
    }


@pytest.mark.parametrize(
    ("why", "said"),
    [
        ("refused", "Connection refused"),
        ("no database", 'database "no_such_database" does not exist'),
        ("password", "password authentication failed"),
    ],
)
def test_a_server_that_cannot_be_used_is_said_at_once(postgres: str, why: str, said: str) -> None:
    storage = unreachable(postgres)[why]
    with pytest.raises(UserError) as caught:
        load_study(storage, "shared")
    text = str(caught.value)
    assert text.startswith("the database postgresql+psycopg://nasattn:***@127.0.0.1:")
    assert said in text
    assert "\n" not in text
    assert storage.partition("@")[0].rpartition(":")[2] not in text


def test_the_command_line_says_it_in_one_line(
    postgres: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = unreachable(postgres)["refused"]
    monkeypatch.setattr(
        sys, "argv", ["nasattn", "status", "--storage", storage, "--study", "shared"]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("nasattn: the database postgresql+psycopg://nasattn:***@")
    assert printed.err.count("\n") == 1


def test_where_nothing_can_be_written_a_study_is_read(
    fake_study: FakeStudy, tmp_path: Path
) -> None:
    """A snapshot, or a colleague's folder. Root may write anywhere, unless that is given up."""
    study = fake_study(6)
    home = tmp_path / "snap %shot#1"
    study.database.engine.dispose()
    shutil.copytree(study.folder.parent, home)
    given_up: list[str] = []
    if os.geteuid() == 0:
        given_up = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-all"]
        if not shutil.which("setpriv") or subprocess.run([*given_up, "true"]).returncode:
            pytest.skip("root, who cannot give up its rights here")

    def said(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
        call = [*given_up, sys.executable, "-m", "nasattn", *command, "--study", "fake"]
        call += ["--storage", f"sqlite:///{folder}/fake.db"]
        return subprocess.run(call, capture_output=True, text=True)

    folders = [home, *(path for path in home.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        for command in (["pareto", "--json"], ["status"]):
            found, expected = said(home, *command), said(study.folder.parent, *command)
            assert found.returncode == expected.returncode == 0, found.stderr
            assert found.stdout == expected.stdout
        refused = said(home, "resume", "--trials", "9")
        assert refused.returncode == 2 and "Traceback" not in refused.stderr
        watching = subprocess.Popen(
            [*given_up, sys.executable, "-c", WATCHING, f"sqlite:///{home}/fake.db"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with watching:
            assert watching.stdin and watching.stdout
            assert watching.stdout.readline() == "6\n"
            home.chmod(0o755)
            mine = load_study(f"sqlite:///{home}/fake.db", "fake")
            mine.optuna.add_trial(mine.optuna.get_trials()[-1])
            mine.database.engine.dispose()
            home.chmod(0o555)
            watching.stdin.write("\n")
            watching.stdin.flush()
            assert watching.stdout.readline() == "7\n", "its owner goes on"
        (home / "fake.db-wal").touch()
        assert "copy it, with the -wal file" in said(home, "status").stderr
    finally:
        for folder in folders:
            folder.chmod(0o755)


WATCHING = """
import sys
from nasattn import load_study
study = load_study(sys.argv[1], "fake")
print(len(study.optuna.get_trials()), flush=True)
input()
print(len(study.optuna.get_trials()), flush=True)
"""
