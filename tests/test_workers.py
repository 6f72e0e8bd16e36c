"""Several workers on one study, and what befalls them: deaths, outages, full disks, jumping clocks.

Where the training is not the matter a formula stands for it, and workers are forks of this process.
"""

import errno
import multiprocessing
import os
import random
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from optuna.trial import TrialState
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file
from sqlalchemy import create_engine, event, text
from sqlalchemy.exc import OperationalError
from test_search import Formula, Write, by_formula, rows, searching, write

from nasattn import cli, load_study
from nasattn.architecture import Architecture
from nasattn.config import Experiment
from nasattn.errors import DataFailed, Stopped, TrialFailed, UserError
from nasattn.evaluate.checkpoint import STEP
from nasattn.evaluate.train import Tick
from nasattn.pricing import Pricing
from nasattn.record import Score
from nasattn.search import database, launchers, lease, loop, outage, workers
from nasattn.search.database import connect
from nasattn.search.display import Display
from nasattn.search.launchers import Local
from nasattn.search.lease import LEAVE, Heartbeats, Lease, Leases
from nasattn.search.loop import Search
from nasattn.search.opening import find_study
from nasattn.search.slots import Slots
from nasattn.search.stopping import ParetoHalving
from nasattn.space import SearchSpace

__all__ = ["write"]
FORK = multiprocessing.get_context("fork")
# A process whose first backward pass comes after an export of ONNX starts threads for autograd, and
# its forks cannot train any more.
torch.zeros(1, requires_grad=True).sum().backward()


def url(path: Path) -> str:
    return f"sqlite:///{path.parent}/runs/tiny.db"


def forked(work: Callable[[], Any]) -> Any:
    """A process that does the work and ends, without this one's exit handlers."""

    def run() -> None:
        try:
            work()
        except BaseException as error:
            print(type(error).__name__, error, flush=True)
            os._exit(1)
        os._exit(0)

    process = FORK.Process(target=run)
    process.start()
    return process


class Slow(Formula):
    """Takes a moment, and writes down what it evaluates."""

    def __init__(self, log: Path, seconds: float = 0.0) -> None:
        super().__init__()
        self.log, self.seconds = log, seconds

    def __call__(self, architecture: Architecture, tick: Tick, **options: Any) -> tuple[Score, Any]:
        time.sleep(self.seconds)
        found = super().__call__(architecture, tick, **options)
        with self.log.open("a") as file:
            file.write(architecture.key + "\n")
        return found


def with_calls(function: Callable[..., Any]) -> Any:
    """An evaluator that does what the function does."""

    class Called(Formula):
        def __call__(self, *arguments: Any, **options: Any) -> tuple[Score, Any]:
            found: tuple[Score, Any] = function(*arguments, **options)
            return found

    return Called()


@pytest.fixture(autouse=True)
def prices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A space's costs are counted once for all of a test's searches: half a second each."""
    of, known = Pricing.of, list[Pricing]()

    def once(experiment: Experiment, space: SearchSpace) -> Pricing:
        if not known:
            known.append(of(experiment, space))
        return known[0]

    monkeypatch.setattr(Pricing, "of", staticmethod(once))


# --- leases


def test_a_watch_believes_beats_and_no_clock_but_its_own() -> None:
    now = [0.0]
    watch = Heartbeats(lambda: now[0])

    def worker(beat: int) -> Lease:
        return Lease("worker:a", "a", beat, {"host": "elsewhere", "place": "elsewhere", "pid": 1})

    def look(beat: int, seconds: float) -> bool:
        now[0] += seconds
        watch.look([worker(beat)])
        return watch.dead(worker(beat))

    assert not look(0, 0)
    assert not any(look(beat, 10) for beat in range(1, 20)), "it beats"
    assert [look(19, 10) for _ in range(7)] == [False] * 6 + [True], "it has stood still for 60 s"
    assert not look(20, 10), "it beats again"
    assert not look(20, 1e6), "the observer itself was away: it begins anew"
    assert [look(20, 10) for _ in range(7)] == [False] * 6 + [True]
    assert watch.dead(None), "it has signed off"
    watch = Heartbeats(lambda: now[0], every=30)
    assert [look(20, 30) for _ in range(4)] == [False] * 3 + [True], "of who looks seldom, too"
    assert not Heartbeats().dead(worker(3)), "not seen before: no judgement"


def test_a_process_of_this_host_is_known_to_be_gone_at_once() -> None:
    child = forked(lambda: time.sleep(60))
    me = lease.identity()
    facts = me | {"pid": child.pid, "started": lease._stat(child.pid)[1]}
    assert not Heartbeats().dead(Lease("worker:a", "a", 0, facts))
    assert Heartbeats().dead(Lease("worker:a", "a", 0, facts | {"started": "another"})), (
        "pid reused"
    )
    os.kill(child.pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while not Heartbeats().dead(
        Lease("worker:a", "a", 0, facts)
    ):  # a zombie until it is waited for
        assert time.monotonic() < deadline
    child.join()
    assert not Heartbeats().dead(Lease("worker:a", "a", 0, facts | {"place": "elsewhere"}))


def test_one_of_two_gets_a_lease_and_a_dead_ones_is_taken_over(tmp_path: Path) -> None:
    engine = connect(f"sqlite:///{tmp_path}/x.db").engine
    now = [0.0]
    with Leases(engine, "s", Heartbeats(lambda: now[0])) as a, Leases(engine, "s") as b:
        other = Leases(engine, "t")
        with other:
            assert a.acquire("turn") and a.acquire("turn")
            assert not b.acquire("turn")
            assert other.acquire("turn"), "another study's turn is another one"
        a.release("turn")
        assert b.acquire("turn") and b.holds("turn") and not a.holds("turn")
        assert {w.owner for w in lease.workers(engine, "s")} == {a.me, b.me}
        b._stop.set()
        b._thread.join()
        strange = {"host": "elsewhere", "place": "elsewhere", "pid": 1, "started": ""}
        b._who = strange
        b.renew()
        for _ in range(8):
            assert not a.acquire("turn")
            now[0] += 10
            a.renew()
        assert a.acquire("turn"), "its beat has stood still"
        assert a.holds("turn") and not b.holds("turn")
        a.reap(a.table(), [])
        assert lease.WORKER + b.me not in a.table()
        b.renew()
        assert not b.acquire("turn"), "it comes back, and what it held is another's"
    assert Leases(engine, "s").table() == {}, "who leaves takes all with him"


def test_many_create_the_table_at_once(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/x.db"
    connect(storage).engine.dispose()
    children = [forked(lambda: Leases(connect(storage).engine, "s").__enter__()) for _ in range(6)]
    for child in children:
        child.join()
        assert child.exitcode == 0


# --- workers


@pytest.mark.parametrize("count", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_several_workers_do_each_trial_once(
    write: Write, storage: str, tmp_path: Path, count: int
) -> None:
    path = write(storage=storage, search={"sampler": "frontier", "seed": 2})
    log = tmp_path / "log"
    by_formula(path, 1, Slow(log))
    work = [forked(lambda: by_formula(path, 25, Slow(log, 0.02))) for _ in range(count)]
    for process in work:
        process.join()
        assert process.exitcode == 0
    study = load_study(storage, "tiny")
    assert [t.number for t in study.trials] == list(range(25))
    assert all(t.state == "scored" for t in study.trials)
    keys = [t.architecture.key for t in study.trials]
    assert len(set(keys)) == 25
    assert sorted(log.read_text().split()) == sorted(keys), "none was evaluated twice"
    assert len(study.optuna.get_trials()) == 25
    assert study.workers() == []
    kept = {int(p.stem) for p in (study.folder / "weights").glob("*.safetensors")}
    assert kept == {t.number for t in study.frontier()} | {0}


class Deadly(Formula):
    """Kills its process at some of its calls."""

    def __init__(self, at: set[str]) -> None:
        super().__init__()
        self.at = at

    def __call__(self, architecture: Architecture, tick: Tick, **options: Any) -> tuple[Score, Any]:
        if architecture.key in self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(architecture, tick, **options)


def killed(path: Path, trials: int, at: set[str]) -> None:
    child = forked(lambda: by_formula(path, trials, Deadly(at)))
    child.join()
    assert child.exitcode == -signal.SIGKILL


def test_a_trial_that_kills_its_worker_three_times_fails(write: Write) -> None:
    whole = by_formula(write("whole"), 6)
    path, third = write("torn"), whole.trials[3].architecture.key
    for _ in range(3):
        killed(path, 6, {third})
    study = by_formula(path, 6)
    assert [t.state for t in study.trials] == ["scored"] * 3 + ["failed"] + ["scored"] * 2
    assert "killed 3 times" in study.trials[3].reason
    assert rows(study)[:3] == rows(whole)[:3]


def test_a_trial_that_gets_further_each_time_does_not_fail(write: Write) -> None:
    whole = by_formula(write("whole"), 6)
    path, third = write("torn"), whole.trials[3].architecture.key
    folder = path.parent / "runs" / "tiny" / "checkpoints" / "3"
    for epoch in range(5):
        killed(path, 6, {third})
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{epoch}.safetensors").write_text("as a training would leave it")
    assert rows(by_formula(path, 6)) == rows(whole)
    assert not folder.exists(), "a finished trial needs none"


@pytest.mark.parametrize(
    "steps", [range(7), [5, 5, 6, 5, 5], [5, None, 5, None], range(8), [5, 5, 5]]
)
def test_kills_from_outside_are_told_from_a_trial_that_kills(
    write: Write, steps: Sequence[int | None]
) -> None:
    """The former fall at other steps each time, or (None) before the first."""
    whole = by_formula(write("whole"), 6)
    path, third = write("torn"), whole.trials[3].architecture.key
    folder = path.parent / "runs" / "tiny" / "checkpoints" / "3" / "0"
    for step in steps:
        killed(path, 6, {third})
        folder.mkdir(parents=True, exist_ok=True)
        if step is not None:
            (folder / STEP).write_text(str(step))
    study = by_formula(path, 6)
    if steps not in (range(8), [5, 5, 5]):
        assert rows(study) == rows(whole)
    else:
        why = "8 times .* within one epoch" if len(steps) == 8 else "3 times .* at the same step"
        assert study.trials[3].state == "failed" and re.search(why, study.trials[3].reason)


def test_a_baseline_that_kills_its_worker_ends_the_search(write: Write) -> None:
    whole = by_formula(write("whole"), 4)
    path, plain = write("torn"), whole.trials[0].architecture.key
    for _ in range(3):
        killed(path, 4, {plain})
    with pytest.raises(TrialFailed, match=r"plain backbone .* killed 3 times"):
        by_formula(path, 4)
    assert rows(by_formula(path, 4)) == rows(whole), "the next command tries it again"


def test_a_last_trial_that_kills_is_told_and_counted(write: Write) -> None:
    whole = by_formula(write("whole"), 6)
    path, last = write("torn"), whole.trials[5].architecture.key
    for _ in range(3):
        killed(path, 6, {last})
    search, said = searching(path), list[str]()
    search.display.note = said.append  # type: ignore[method-assign]
    search.evaluator = Formula()  # type: ignore[assignment]
    search.run(6)
    assert (
        "the study 'tiny' is complete: 6 trials, 1 of them failed (--retry trains them again)"
        in said
    )
    assert [t.state for t in search.study.trials] == ["scored"] * 5 + ["failed"]


def test_a_backbone_that_kills_its_worker_ends_the_search(write: Write) -> None:
    path = write()

    class Unprepared(Formula):
        stored = False
        training = path.parent / "runs" / "tiny" / "backbone.checkpoints"

        def prepare(self, tick: Tick) -> bool:
            os.kill(os.getpid(), signal.SIGKILL)
            return True

    for _ in range(3):
        child = forked(lambda: by_formula(path, 4, Unprepared()))
        child.join()
        assert child.exitcode == -signal.SIGKILL
    with pytest.raises(TrialFailed, match=r"plain backbone .* killed 3 times"):
        by_formula(path, 4, Unprepared())
    assert len(by_formula(path, 4).trials) == 4, "the next command tries it again"


def test_what_is_remarked_of_a_training_stands_with_its_trial(write: Write) -> None:
    search = searching(write())
    text = "trunk.safetensors: this checkpoint cannot be used"

    def evaluate(*arguments: Any, **options: Any) -> Any:
        for _ in range(2):
            search._remark(text)
        return Formula()(*arguments, **options)

    search.evaluator = with_calls(evaluate)
    study = search.run(2)
    assert [t.user_attrs["remarks"] for t in study.optuna.trials] == [[text]] * 2


@pytest.mark.parametrize(
    "error",
    [OSError(5, "Input/output error"), DataFailed("7.png cannot be read: Input/output error")],
)
def test_a_broken_machine_does_not_use_up_the_slots(write: Write, error: Exception) -> None:
    path = write()
    by_formula(path, 2)

    def broken(*_: Any, **__: Any) -> Any:
        raise error

    search = searching(path)
    search.evaluator = with_calls(broken)
    with pytest.raises(Stopped, match=r"5 trainings in a row broke here.*Input/output error"):
        search.run(30)
    states = [t.state for t in by_formula(path, 9).trials]
    assert states == ["scored"] * 2 + ["failed"] * 4 + ["scored"] * 3


def test_an_unforeseen_error_now_and_then_is_the_trials_own(write: Write) -> None:
    calls, formula = list[int](), Formula()

    def broken(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) % 5:
            return formula(*arguments, **options)
        raise ValueError("a module of the user's")

    search = searching(write())
    search.evaluator = with_calls(broken)
    states = [t.state for t in search.run(30).trials]
    assert states.count("failed") == 6 and states.count("scored") == 24


def test_how_many_trials_are_asked_for_is_the_last_ones_word(write: Write) -> None:
    """A worker that replaces one of an earlier, shorter command does not shorten the study."""
    commands: list[list[str]] = []

    class Noting:
        def start(self, command: list[str], index: int, log: Path, env: Any) -> ForkProcess:
            commands.append(command)
            return ForkProcess(forked(lambda: None))

    workers.search_with(searching(write()).experiment, 4, 1, Display(Console(quiet=True)), Noting())
    assert commands[0][1:4] == ["-m", "nasattn", "resume"] and "--trials" not in commands[0]


@pytest.mark.parametrize("way", ["moved", "deleted"])
def test_a_database_whose_file_is_gone_ends_the_search(
    write: Write, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Else it would go on in a file that nobody can open any more. Nothing is put in its place, and
    what was moved away is whole."""
    path = write()
    file = path.parent / "runs" / "tiny.db"
    by_formula(path, 2)
    monkeypatch.setattr(outage, "PATIENCE", 0.5)
    away, formula = file.with_name("away.db"), Formula()

    def evaluate(*a: Any, **k: Any) -> Any:
        if formula.calls == 2:
            file.rename(away) if way == "moved" else file.unlink()
        return formula(*a, **k)

    def failing() -> None:
        search = searching(path)
        search.evaluator = with_calls(evaluate)
        with pytest.raises(Stopped, match=r"tiny\.db was removed or replaced"):
            search.run(7)

    child = forked(failing)
    child.join()
    assert child.exitcode == 0 and not file.exists()
    if way == "moved":
        away.rename(file)
        again = Formula()
        assert [t.state for t in by_formula(path, 7, again).trials] == ["scored"] * 7
        assert again.calls == 2, "of five trials the database had four, the weights' folder one"


def test_a_worker_keeps_no_lease_of_a_trial_that_has_ended(write: Write) -> None:
    """Else the table would grow with the study, and no other worker could promote the trial."""
    search, held = searching(write()), list[set[str]]()

    def evaluate(*a: Any, **k: Any) -> Any:
        held.append({name for name in search.leases.table() if name.startswith("trial:")})
        return Formula()(*a, **k)

    search.evaluator = with_calls(evaluate)
    search.run(4)
    assert held == [{f"trial:{slot}"} for slot in range(4)]


def kill_at(engine: Any, statement: int) -> None:
    """Have this process die at its n-th SQL statement."""
    left = [statement]

    def count(*_: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    event.listen(engine, "before_cursor_execute", count)


def torn(path: Path, log: Path, kills: int, trials: int, most: int) -> int:
    """Run a search whose process is killed at random statements; how often it was."""
    rng, died = random.Random(kills), 0
    for _ in range(kills):
        statement = rng.randrange(1, most)

        def work(statement: int = statement) -> None:
            search = searching(path)
            search.evaluator = Slow(log)  # type: ignore[assignment]
            kill_at(search.study.engine, statement)
            search.run(trials)

        child = forked(work)
        child.join()
        died += child.exitcode == -signal.SIGKILL
    return died


@pytest.mark.parametrize(
    ("kills", "trials", "most"),
    [(8, 30, 160), pytest.param(125, 200, 100, marks=pytest.mark.slow)],
)
def test_kills_at_any_statement_lose_nothing(
    write: Write, storage: str, tmp_path: Path, kills: int, trials: int, most: int
) -> None:
    options = {"sampler": "tpe", "seed": 5}
    whole = by_formula(write("whole", search=options), trials)
    path = write("torn", storage=storage, search=options)
    log = tmp_path / "log"
    assert torn(path, log, kills, trials, most) > 0.8 * kills
    study = by_formula(path, trials, Slow(log))
    assert rows(study) == rows(whole)
    assert [t.number for t in study.frontier()] == [t.number for t in whole.frontier()]
    evaluated = log.read_text().split()
    assert len(evaluated) == len(set(evaluated)) == trials, "none was evaluated twice"


@pytest.mark.slow
def test_nothing_is_lost_beside_who_comes_and_goes(write: Write, tmp_path: Path) -> None:
    """Workers are killed, while others open the database, look at the study and leave."""
    path, log, rng, kills = write(), tmp_path / "log", random.Random(0), 0
    by_formula(path, 2, Slow(log))
    (path.parent / "runs/tiny/0.safetensors").touch()

    def work() -> None:
        experiment = Experiment.load(path)
        found = find_study(experiment.storage, experiment.study)  # as the command does
        search = Search(experiment, Display(Console(quiet=True)), found)
        search.evaluator = Slow(log, 0.05)  # type: ignore[assignment]
        search.run(300)

    def look() -> None:
        found = load_study(url(path), "tiny")
        assert found.trials
        found.engine.dispose()

    crew = [forked(work) for _ in range(3)]
    while any(worker.is_alive() for worker in crew):
        visitor = forked(look)
        visitor.join()
        assert visitor.exitcode == 0
        time.sleep(rng.uniform(0.0, 0.4))
        number = rng.randrange(3)
        if kills < 20 and crew[number].is_alive():
            os.kill(crew[number].pid, signal.SIGKILL)
            crew[number].join()
            crew[number], kills = forked(work), kills + 1
    for worker in crew:
        worker.join()
    assert kills >= 5 and {worker.exitcode for worker in crew} == {0}
    keys = [t.architecture.key for t in load_study(url(path), "tiny").trials if t.score]
    assert len(keys) == len(set(keys)) == 300
    evaluated = log.read_text().split()  # and to be killed before that is kept costs it
    assert set(evaluated) == set(keys) and len(evaluated) <= 300 + kills


def test_a_score_that_could_not_be_told_is_found_with_the_weights(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database goes after the training; the next command tells the score without training."""
    whole, path = by_formula(write("whole"), 4), write("torn")
    monkeypatch.setattr(outage, "PATIENCE", 0.2)
    by_formula(path, 2)

    def failing() -> None:
        search, said = searching(path), list[str]()
        monkeypatch.setattr(search.display, "note", said.append)

        def fail(*_: Any) -> None:
            raise OperationalError("select", {}, Exception("server closed the connection"))

        def evaluate(*a: Any, **k: Any) -> Any:
            event.listen(search.study.engine, "before_cursor_execute", fail)
            return Formula()(*a, **k)

        search.evaluator = with_calls(evaluate)
        with pytest.raises(Stopped, match=r"not answered .*server closed the connection.* goes on"):
            search.run(4)
        assert any("does not answer" in text for text in said)

    child = forked(failing)
    child.join()
    assert child.exitcode == 0
    again = Formula()
    assert rows(by_formula(path, 4, again)) == rows(whole)
    assert again.calls == 1, "trial 2 was trained before"


def test_a_database_that_comes_back_is_waited_for(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Locked by another connection for longer than sqlite itself waits."""
    whole, path = by_formula(write("whole"), 5), write("torn")
    by_formula(path, 2)
    search, said = searching(path), list[str]()
    monkeypatch.setattr(search.display, "note", said.append)
    locker = create_engine(url(path)).connect()

    def impatient(connection: Any, *_: Any) -> None:
        connection.execute("PRAGMA busy_timeout=20")

    def evaluate(*a: Any, **k: Any) -> Any:
        if formula.calls == 0:
            locker.execute(text("UPDATE studies SET study_name = study_name"))
        return formula(*a, **k)

    def paused(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 4:
            locker.rollback()

    formula, pauses = Formula(), list[float]()
    event.listen(search.study.engine, "checkout", impatient)
    search.evaluator = with_calls(evaluate)
    monkeypatch.setattr(outage, "pause", paused)
    study = search.run(5)
    locker.close()
    assert rows(study) == rows(whole)
    assert len(pauses) == 4 and formula.calls == 3
    assert [text for text in said if "database is locked" in text]
    assert [text for text in said if "answers again" in text]


@pytest.mark.parametrize("step", [9, pytest.param(1, marks=pytest.mark.slow)])
def test_a_moments_outage_at_any_statement_is_waited_for(
    write: Write, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    whole, waited = by_formula(write("whole"), 4), list[float]()
    monkeypatch.setattr(outage, "pause", waited.append)

    def run(path: Path, first: int) -> int:
        """Statements in all; two from `first` on fail, but for what the heart-beats say."""
        search, done, own = searching(path), 0, threading.get_ident()
        search.evaluator = Formula()

        def fail(*_: Any) -> None:
            nonlocal done
            done += threading.get_ident() == own
            if done in (first, first + 1) and threading.get_ident() == own:
                raise OperationalError("", {}, Exception("the server went away"))

        event.listen(search.study.engine, "before_cursor_execute", fail)
        study, count = search.run(4), done
        event.remove(search.study.engine, "before_cursor_execute", fail)
        assert rows(study) == rows(whole)
        return count

    last = run(write("counted"), -1) - 1  # with it a worker signs off
    for first in range(1, last, step):
        waited.clear()
        run(write(f"torn{first}"), first)
        assert waited
    assert last > 60


def test_ctrl_c_is_not_taken_for_an_outage(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes within a turn, while the database is away."""
    search, release, looks = searching(write()), Leases.release, list[int]()

    def away(*_: Any) -> None:
        monkeypatch.setattr(Leases, "release", release)
        raise OperationalError("", {}, Exception("the server went away"))

    def publish(trials: Any) -> None:
        looks.append(len(trials))
        if len(trials) == 2:
            monkeypatch.setattr(Leases, "release", away)
            raise KeyboardInterrupt

    search.evaluator = Formula()
    monkeypatch.setattr(search, "_publish", publish)
    monkeypatch.setattr(outage, "PATIENCE", 1)
    with pytest.raises(KeyboardInterrupt):
        search.run(4)
    assert looks == [0, 1, 2]
    assert Leases.release is release, "the database was away"


def test_who_takes_a_killed_ones_place_waits_for_the_database(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write()
    by_formula(path, 2)
    connect, tries = database._opened, list[str]()

    def away(storage: str) -> Any:
        tries.append(storage)
        if len(tries) < 3:
            raise OperationalError("", {}, Exception("connection refused"))
        return connect(storage)

    monkeypatch.setattr(database, "_opened", away)
    monkeypatch.setattr(outage, "pause", lambda seconds: None)
    with pytest.raises(UserError, match="connection refused"):
        cli._study(None, url(path), "tiny")
    monkeypatch.setenv(lease.PARENT, str(os.getppid()))
    tries.clear()
    assert len(cli._study(None, url(path), "tiny").trials) == 2
    assert len(tries) == 3


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_stops_the_search_and_loses_nothing(
    write: Write, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    whole, path = by_formula(write("whole"), 4), write("torn")
    by_formula(path, 2)

    def full(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(loop, "store", full)
        with pytest.raises(Stopped, match=r"the disk is full.*No space left"):
            by_formula(path, 4)
    assert [t.state for t in load_study(url(path), "tiny").trials] == ["scored"] * 2 + ["running"]
    assert rows(by_formula(path, 4)) == rows(whole)


def test_a_worker_that_lost_its_trial_keeps_silent(write: Write) -> None:
    """It stood still for so long that another took the trial over: its result is not told."""
    path = write()
    by_formula(path, 2)
    search, formula = searching(path), Formula(frozenset({2}))

    def robbed(*a: Any, **k: Any) -> Any:
        other = Leases(search.study.engine, "tiny")
        other._who |= {"host": "elsewhere", "place": "elsewhere"}
        other.renew()
        with search.study.engine.begin() as connection:
            taken = f"UPDATE nasattn_lease SET owner = '{other.me}' WHERE name = 'trial:2'"
            connection.execute(text(taken))
        return formula(*a, **k)

    search.evaluator = with_calls(robbed)
    with pytest.raises(KeyboardInterrupt):
        search.run(4)
    assert formula.calls == 2, "it went on with the next trial"
    trials = load_study(url(path), "tiny").trials
    assert [t.state for t in trials] == ["scored", "scored", "running", "running"]


def test_who_is_killed_as_it_has_told_the_end_has_told_it(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two looks of another worker: at the rows, and at who lives."""
    path = write()
    by_formula(path, 2)
    search, gone = searching(path), subprocess.Popen(["true"])
    gone.wait()
    study, read = search.study, search.study.rows
    with search._leases() as mine, search._leases() as other:
        slots = [Slots(study, 3, x, search.gate, None, search.display.note) for x in (other, mine)]
        job = slots[0].next(lambda trials: None).job
        assert job and job.trial.number == 2
        other._who |= {"pid": gone.pid}
        other.renew()

        def rows() -> Any:
            found = read()
            if not found[2].state.is_finished():
                study.database.tell(job.row, TrialState.FAIL, {"reason": "told"}, ())
            return found

        monkeypatch.setattr(study, "rows", rows)
        turn = slots[1].next(lambda trials: None)
        assert turn.over and [t.reason for t in study.trials] == ["", "", "told"]
        slots[1].next(lambda trials: None)
        assert "trial:2" not in mine.table()


def test_a_slot_that_another_holds_is_waited_for(write: Write) -> None:
    """It has lost its turn before it wrote the slot, and will begin it in its next."""
    path = write()
    by_formula(path, 2)
    search = searching(path)
    with search._leases() as mine, search._leases() as other:
        slots = Slots(search.study, 3, mine, search.gate, None, search.display.note)
        assert other.acquire("trial:2")
        turn = slots.next(lambda trials: None)
        assert (turn.job, turn.others, turn.over) == (None, 1, False)
        other.release("trial:2")
        job = slots.next(lambda trials: None).job
        assert job and job.trial.number == 2


def test_a_worker_that_lost_its_turn_writes_nothing(write: Write, storage: str) -> None:
    """It stands still as it is about to write a slot; another takes turn and slot, and ends them.
    Then it goes on, until it can look whose turn it is (and not, as it might be killed there)."""
    path = write(storage=storage)
    by_formula(path, 2)
    written, calls = Slots._written, list[int]()

    def still() -> None:
        Slots._written = late  # type: ignore[method-assign]
        by_formula(path, 6, Deadly({"nothing"}))

    def late(self: Slots, *arguments: Any) -> Any:
        def others() -> None:
            Slots._written = written  # type: ignore[method-assign]
            with create_engine(self.study.storage).begin() as connection:
                connection.execute(LEAVE, {"here": "tiny", "by": self.leases.me})
            by_formula(path, 6)

        if not calls:
            child = forked(others)
            child.join()
            assert child.exitcode == 0
        calls.append(1)
        return written(self, *arguments)

    child = forked(still)
    child.join()
    assert child.exitcode == 0
    study = load_study(storage, "tiny")
    assert [(t.number, t.state) for t in study.trials] == [(n, "scored") for n in range(6)]
    assert len(study.optuna.get_trials()) == 6


def test_a_study_in_memory_is_refused(write: Write) -> None:
    for storage in ("sqlite://", "sqlite:///:memory:"):
        with pytest.raises(UserError, match=r"in memory .* would be lost"):
            searching(write(storage=storage))


@pytest.mark.slow
@pytest.mark.parametrize("stopping", ["none", "pareto_halving"])
def test_kills_within_real_trainings_lose_nothing(
    write: Write, monkeypatch: pytest.MonkeyPatch, stopping: str
) -> None:
    """At least twenty kills at steps of Lightning trainings, of the backbone's and of trials', some
    of which are stopped at a rung and promoted."""
    data = {"name": "cued_digits", "train": 192, "val": 64, "test": 64}
    training: dict[str, Any] = {"epochs": 2, "batch_size": 32, "lr": 0.01, "warm_start": True}
    training |= {"ema": 0.9}
    options: dict[str, Any] = {"data": data, "training": training}
    if stopping != "none":
        # 64 images order nothing: the rung is trusted all the same.
        monkeypatch.setattr(ParetoHalving, "trusts", lambda *_: True)
        training |= {"epochs": 3, "schedule": "wsd"}
        options["search"] = {"stopping": stopping, "rungs": [1, 3]}
    whole, path, trials = searching(write("whole", **options)).run(18), write("torn", **options), 18
    states = {t.state for t in whole.trials}
    assert states == ({"scored"} if stopping == "none" else {"scored", "stopped"})
    rng, kills, step = random.Random(0), 0, 0
    while True:
        # Also many times before the end of an epoch, but not at the same step each time.
        step = rng.choice([s for s in (1, 2, 3, 4, 5, 9, 11, 13, 16) if s != step])

        def work(step: int = step) -> None:
            search, left = searching(path), [step]
            tick = search._tick

            def deadly(share: float, accuracy: float | None) -> None:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                tick(share, accuracy)

            search._tick = deadly  # type: ignore[method-assign]
            search.run(trials)

        child = forked(work)
        child.join()
        if child.exitcode == 0:
            break
        assert child.exitcode == -signal.SIGKILL
        kills += 1
    assert kills >= 20
    study = load_study(url(path), "tiny")
    assert rows(study) == rows(whole)
    for trial in study.frontier():
        a, b = (load_file(loop.weights_file(s, trial.number)) for s in (study, whole))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Forks:
    """A launcher whose workers are forks, the first of which kill themselves."""

    def __init__(self, path: Path, total: int, log: Path, deaths: int) -> None:
        self.path, self.total, self.log, self.deaths = path, total, log, deaths
        self.started = 0

    def start(self, command: Any, index: int, log: Path, env: Any) -> "ForkProcess":
        self.started += 1
        seed = self.started if self.started <= self.deaths else 0

        def work() -> None:
            search = searching(self.path)
            search.evaluator = Slow(self.log, 0.01)  # type: ignore[assignment]
            if seed:
                kill_at(search.study.engine, 40 + 30 * seed)
            search.run(self.total)

        return ForkProcess(forked(work))


class ForkProcess:
    def __init__(self, process: Any) -> None:
        self.process, self.where = process, f"pid {process.pid}"

    def poll(self) -> int | None:
        code: int | None = self.process.exitcode
        return code

    def terminate(self) -> None:
        self.process.terminate()

    def kill(self) -> None:
        self.process.kill()


def test_a_killed_worker_is_replaced(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "Evaluator", lambda *a: Formula())
    path, log, said = write(), tmp_path / "log", list[str]()
    display = Display(Console(quiet=True))
    monkeypatch.setattr(display, "note", said.append)
    launcher = Forks(path, 20, log, deaths=4)
    study = workers.search_with(searching(path).experiment, 20, 3, display, launcher)
    assert [t.state for t in study.trials] == ["scored"] * 20
    assert said[-1] == "the study 'tiny' is complete: 20 trials"
    # One that dies when nothing is left to do needs no other in its place.
    assert 3 < launcher.started <= 7
    replaced = sum("another takes its place" in text for text in said)
    assert replaced == launcher.started - 3
    evaluated = log.read_text().split()
    assert len(evaluated) == len(set(evaluated)) == 20


def test_two_trials_that_kill_end_no_crew(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of two workers in turn, at another step each time."""
    monkeypatch.setattr(loop, "Evaluator", lambda *a: Formula())
    bad = {t.architecture.key for t in by_formula(write("whole"), 8).trials[3:5]}
    path, started = write("torn"), [0]
    monkeypatch.setattr(workers, "LOOK", 0.02)

    class Deadly(Formula):
        def __call__(self, architecture: Architecture, *rest: Any, **options: Any) -> Any:
            if architecture.key in bad:
                folder = options["checkpoints"] / "0"
                folder.mkdir(parents=True, exist_ok=True)
                (folder / STEP).write_text(str(started[0]))
                time.sleep(0.4)  # so that the other worker takes the other one meanwhile
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(architecture, *rest, **options)

    class Launcher:
        def start(self, command: Any, index: int, log: Path, env: Any) -> ForkProcess:
            started[0] += 1

            def work() -> None:
                search = searching(path)
                search.evaluator = Deadly()  # type: ignore[assignment]
                search.run(8)

            return ForkProcess(forked(work))

    display = Display(Console(quiet=True))
    study = workers.search_with(searching(path).experiment, 8, 2, display, Launcher())
    states = [t.state for t in study.trials]
    assert states == ["scored"] * 3 + ["failed"] * 2 + ["scored"] * 3
    assert all("8 times" in t.reason for t in study.trials[3:5])


HALVED = {
    "search": {"stopping": "pareto_halving"},
    "training": {"epochs": 3, "schedule": "wsd", "batch_size": 32},
}


@pytest.mark.parametrize(
    ("count", "most", "changes"),
    [(5, 2, {}), (1, 1, {}), (3, 3, {"final": {"seeds": 1}}), (3, 3, HALVED)],
)
def test_no_more_workers_start_than_trainings_are_to_come(
    write: Write,
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    most: int,
    changes: dict[str, Any],
) -> None:
    """Of halving and of a final it is not known how many there will be."""
    said, display = list[str](), Display(Console(quiet=True))
    monkeypatch.setattr(loop, "Evaluator", lambda *a: Formula())
    monkeypatch.setattr(display, "note", said.append)

    class Failing:
        started = 0

        def start(self, *_: Any) -> ForkProcess:
            self.started += 1
            return ForkProcess(forked(lambda: os._exit(1)))

    launcher = Failing()
    with pytest.raises(Stopped, match="it left no message"):
        workers.search_with(Experiment.load(write(**changes)), 2, count, display, launcher)
    assert launcher.started == most
    assert ("2 workers of 5: no more trainings are to come" in said) == (count > most)


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.ENOMEM, "worker 1 cannot be started: .*Cannot allocate memory"),
        (errno.ENOSPC, "the disk is full"),
    ],
)
def test_a_worker_that_cannot_be_started_takes_nobody_with_it(
    write: Write, monkeypatch: pytest.MonkeyPatch, number: int, told: str
) -> None:
    """None is left to start in the place of a killed one, such as after the OOM killer's."""
    path, started, said = write(), list[int](), list[str]()

    def spawn(command: Any, *_: Any) -> Any:
        started.append(1)
        if len(started) == 3:
            raise OSError(number, os.strerror(number))
        return subprocess.Popen(["sleep", "60"])

    monkeypatch.setattr(launchers, "spawn", spawn)
    experiment = Experiment.load(path)
    crew = workers.Crew(Local(experiment.trainer), searching(path).study, 2, said.append)
    crew.processes[1].process.send_signal(signal.SIGKILL)  # type: ignore[attr-defined]
    crew.processes[1].process.wait()  # type: ignore[attr-defined]
    assert crew.tend(0) and list(crew.processes) == [0]
    assert re.search(told, said[-1])
    crew.dismiss()


def test_workers_that_stop_by_themselves_are_not_replaced(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "Evaluator", lambda *a: Formula())

    class Failing:
        started = 0

        def start(self, command: Any, index: int, log: Path, env: Any) -> ForkProcess:
            self.started += 1
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("a") as file:
                file.write("much\nnasattn: the disk is full\n")
            return ForkProcess(forked(lambda: os._exit(1)))

    launcher = Failing()
    with pytest.raises(Stopped, match=r"^the disk is full$"):
        experiment = searching(write()).experiment
        workers.search_with(experiment, 20, 3, Display(Console(quiet=True)), launcher)
    assert launcher.started == 3

    path = write(final={"seeds": 1})
    with monkeypatch.context() as patch:
        patch.setattr(loop.Retraining, "run", lambda self: None)
        by_formula(path, 20)
    with pytest.raises(Stopped, match=r"^the disk is full$"):  # within the final
        experiment = searching(path).experiment
        workers.search_with(experiment, 20, 3, Display(Console(quiet=True)), launcher)


def test_a_crew_whose_space_is_exhausted_has_not_failed(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one of it was killed before, and replaced."""
    monkeypatch.setattr(loop, "Evaluator", lambda *a: Formula())
    path = write()
    by_formula(path, 4)

    class Dying:
        started = 0

        def start(self, command: Any, index: int, log: Path, env: Any) -> ForkProcess:
            self.started += 1
            signals = {1: signal.SIGKILL}  # the others find nothing to do
            return ForkProcess(forked(lambda: os.kill(os.getpid(), signals.get(self.started, 0))))

    launcher = Dying()
    experiment = searching(path).experiment
    study = workers.search_with(experiment, 6, 2, Display(Console(quiet=True)), launcher)
    assert launcher.started == 3 and len(study.trials) == 4
