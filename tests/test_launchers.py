"""The launchers: real processes, a real Ray and a real Slurm of this machine, and submitit's own
local executor, which `cluster=local` names.

Whatever could hang runs as a process of its own, with a time limit.
"""

import json
import os
import re
import secrets
import selectors
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import run_script
from test_search import Write, write

from nasattn import load_study
from nasattn.config import Experiment, TrainerFile
from nasattn.errors import Stopped, UserError
from nasattn.files import replace_file
from nasattn.search import launchers
from nasattn.search.launchers import visible_devices
from nasattn.search.ray_launcher import RayProcess
from nasattn.search.slurm_launcher import SLURM, Queue, Slurm, SlurmProcess, read_options
from nasattn.search.study import Study
from nasattn.search.workers import Crew, launcher

__all__ = ["write"]
HERE = Path(__file__).parent
SECRET = "s3cret-w0rd"  # of the URL in launcher_contract.py
OPTIONS = {
    "local": [],
    "ray": ["--launcher", "ray"],
    "slurm": ["--launcher", "slurm"],
    "submitit": ["--launcher", "slurm", "--launcher-option", "cluster=local"],
}
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[dict[str, str]]:
    """The environment in which a Ray cluster of this machine is found. RAY_TMPDIR: its files."""
    pytest.importorskip("ray")
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # its sockets' paths have 107 characters
    token = Path(folder, "token")
    token.write_text(secrets.token_hex(32))
    env = {
        "RAY_TMPDIR": folder,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray's own is 15: beside other work on a busy machine a worker would then hardly begin.
        "RAY_worker_niceness": "0",
    }
    command = [sys.executable, str(HERE / "ray_cluster.py"), folder]
    with (
        Path(folder, "errors").open("wb") as errors,
        subprocess.Popen(
            command,
            env=os.environ | env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        ) as process,
    ):
        assert process.stdin and process.stdout
        try:
            with selectors.DefaultSelector() as ready:
                ready.register(process.stdout, selectors.EVENT_READ)
                assert ready.select(timeout=300), "Ray does not start"
            address = process.stdout.readline().decode().strip()
            assert address, Path(folder, "errors").read_text()
            yield env | {"RAY_ADDRESS": address}
            process.stdin.close()
            process.wait(timeout=60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def slurm_cluster() -> Iterator[dict[str, str]]:
    """The environment in which a Slurm of this machine is found: the one CI started, else one of
    this module."""
    if conf := os.environ.get("NASATTN_TEST_SLURM"):
        yield {"SLURM_CONF": conf}
        return
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield {"SLURM_CONF": run_script("slurm.sh", "start", f"{folder}/slurm")}
        run_script("slurm.sh", "stop", f"{folder}/slurm")


Env = dict[str, str]


@pytest.fixture(params=["local", *(pytest.param(name, marks=slow) for name in list(OPTIONS)[1:])])
def where(request: pytest.FixtureRequest) -> tuple[str, Env]:
    """A launcher's name, and the environment that it needs."""
    cluster = request.param in ("ray", "slurm")
    more: Env = request.getfixturevalue(f"{request.param}_cluster") if cluster else {}
    # What a user wants to see of the queue is not what there is in it.
    return request.param, os.environ | {"SQUEUE_STATES": "PENDING"} | more


def test_contract(where: tuple[str, Env], tmp_path: Path) -> None:
    name, env = where
    command = [sys.executable, str(HERE / "launcher_contract.py"), name, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["fails"] == [3, "much\nnasattn: the last words\n"]
    code, told = found["tells"]
    assert code == 0
    assert json.loads(told) == {
        "storage": f"postgresql://user:{SECRET}@host/x",
        "watched": True,
        "threads": "1",
        "slurm": False,
        "folder": str(tmp_path),
    }
    assert found["where"].startswith({"local": "pid ", "ray": ""}.get(name, "job "))
    jobs = name in ("slurm", "submitit")
    assert jobs or found["where"].endswith(str(found["pid"]))
    assert found["killed"] == -signal.SIGKILL
    assert found["ended"] == ["a clean end"]
    assert found.get("host killed", -signal.SIGKILL) == -signal.SIGKILL
    # The password stands in no command line and in no file but what the command itself printed.
    assert found["in ps"] == 0
    folders = [tmp_path, *([Path(env["RAY_TMPDIR"])] if name == "ray" else [])]
    files = [p for folder in folders for p in folder.rglob("*") if p.is_file()]
    assert [p.name for p in files if SECRET.encode() in p.read_bytes()] == ["2.log"]
    if jobs:
        kept = tmp_path / "workers" / "slurm"
        assert stat.S_IMODE(kept.stat().st_mode) == 0o700
        assert list(kept.glob("*_submitted.pkl"))


class Running:
    """`nasattn search` with two workers, as a process."""

    def __init__(self, path: Path, name: str, env: Env, trials: int) -> None:
        self.path, self.out = path, path.parent / "out"
        command = [sys.executable, "-m", "nasattn", "search", path.name]
        command += ["--trials", str(trials), "--workers", "2", *OPTIONS[name]]
        background = ["sh", "-c", 'trap "" INT; exec "$@"', "sh"]  # what a script's `&` has ignored
        with self.out.open("wb") as file:
            self.process = subprocess.Popen(
                [*background, *command],
                cwd=path.parent,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    @property
    def study(self) -> Study:
        return load_study(f"sqlite:///{self.path.parent}/runs/tiny.db", "tiny")

    def until(self, what: Callable[[Study], Any]) -> Any:
        """The first value of the study that is true."""
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.out.read_text()
            try:
                if found := what(self.study):
                    return found
            except UserError:
                pass  # no database yet
            time.sleep(0.2)
        raise AssertionError(f"it takes too long: {self.out.read_text()}")


def busy(count: int) -> Callable[[Study], list[int]]:
    """The processes that work on a study, once so many of them have something to do."""

    def pids(study: Study) -> list[int]:
        found = [w["pid"] for w in study.workers() if w.get("task")]
        return found if len(found) >= count else []

    return pids


# So long that each is seen at work: a quick machine ends a dozen short ones between two looks.
LONG = {"epochs": 60, "batch_size": 32, "lr": 0.01, "warm_start": True}


@slow
def test_a_killed_worker_is_replaced_and_the_search_completes(
    where: tuple[str, Env], write: Write
) -> None:
    name, env = where
    with Running(write(training=LONG), name, env, trials=4) as search:
        os.kill(search.until(busy(1))[0], signal.SIGKILL)
        assert search.process.wait(timeout=300) == 0, search.out.read_text()
        said, study = search.out.read_text(), search.study
    assert len(re.findall(r"was killed by signal 9; another takes its place", said)) == 1
    assert ("the database is a sqlite file: right only while" in said) == (name != "local")
    trials = study.trials
    assert [t.number for t in trials] == list(range(4))
    assert all(t.state == "scored" for t in trials)
    assert len({t.architecture.key for t in trials}) == 4
    assert study.workers() == []


@slow
def test_who_stops_the_search_stops_all_workers_cleanly(
    where: tuple[str, Env], write: Write
) -> None:
    name, env = where
    with Running(write(training=LONG), name, env, trials=500) as search:
        pids = search.until(busy(2))
        search.process.send_signal(signal.SIGTERM)
        assert search.process.wait(timeout=120) == 1
        assert "stopped; what is finished is kept" in search.out.read_text()
        study = search.study
        deadline = time.monotonic() + 60  # submitit's local executor leaves them a second alone
        while any(Path(f"/proc/{pid}").exists() for pid in pids):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    logs = [p.read_text() for p in (study.folder / "workers").glob("*.log")]
    assert len(logs) == 2
    assert all("stopped; what is finished is kept" in log for log in logs), logs
    assert study.workers() == [], "each has signed off"


def test_an_actor_that_may_have_begun_is_replaced(tmp_path: Path) -> None:
    """Its answer was lost, and stays so however often it is asked for. No Ray, as none can be made
    to lose that one."""
    exceptions = pytest.importorskip("ray.exceptions")
    killed: list[Any] = []

    def get(ref: str) -> Any:
        raise exceptions.ActorUnavailableError("the network", b"0" * 16)

    stub = SimpleNamespace(wait=lambda refs, timeout: (refs, []), get=get, kill=killed.append)
    process = RayProcess(stub, "the actor", "begun", tmp_path / "log")
    assert process.poll() == -signal.SIGKILL == process.poll()
    assert killed == ["the actor"]


# --- what is said of wrong input


@pytest.fixture
def experiment(write: Write) -> Experiment:
    return Experiment.load(write())


def test_unknown_launchers_and_options_are_refused(experiment: Experiment) -> None:
    def refused(name: str, *options: str) -> str:
        with pytest.raises(UserError) as caught:
            launcher(name, options, experiment, print)
        return str(caught.value)

    assert refused("slrum") == (
        "unknown launcher 'slrum'; allowed: local, ray, slurm; did you mean 'slurm'?"
    )
    assert "got time=3; the launcher local takes none" in refused("local", "time=3")
    assert "got time=3; the launcher ray takes none" in refused("ray", "time=3")
    assert "did you mean 'partition'?" in refused("slurm", "partitoin=gpu")
    assert "got 'time'; allowed: KEY=VALUE" in refused("slurm", "time")
    for value in ("0", "-1", "1h", "1.5"):
        assert "allowed: whole minutes" in refused("slurm", f"time={value}")
    assert "qos is given twice" in refused("slurm", "qos=a", "qos=b")
    assert "got 'debug'; allowed: slurm, local" in refused("slurm", "cluster=debug")


def test_without_a_cluster_the_search_says_so_at_once(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="there is no sbatch here"):
        launcher("slurm", [], experiment, print)
    pytest.importorskip("ray")
    for address, said in {
        "127.0.0.1:1": r"no Ray cluster answers at 127\.0\.0\.1:1: .*refused",
        "ray://head:10001/x": "allowed: HOST:PORT, or auto",
    }.items():
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(UserError, match=said):
            launcher("ray", [], experiment, print)


@pytest.mark.parametrize("name", ["ray", "slurm"])
def test_without_its_package_a_launcher_says_what_to_install(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, {"ray": "ray", "slurm": "submitit"}[name], None)
    with pytest.raises(UserError, match=r"not installed; pip install 'nasattn\[cluster\]'"):
        launcher(name, [], experiment, print)


# --- what Slurm is asked for


def sbatch(trainer: TrainerFile, *options: str) -> str:
    """The script that submitit would submit, without a Slurm to submit it to."""
    from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string

    slurm = Slurm(trainer, read_options([*options, "cluster=local"]), print)
    generic = SlurmExecutor._equivalence_dict()
    assert generic is not None
    given = {k: v for k, v in slurm.parameters().items() if v is not None}
    given = {generic.get(k, k.removeprefix("slurm_")): v for k, v in given.items()}  # type: ignore
    return _make_sbatch_string(command="run", folder="/jobs", **given)


def test_sbatch_gets_the_options() -> None:
    options = ["partition=gpu", "account=me", "qos=low", "constraint=a100", "exclude=n1", "mem=8GB"]
    setup = ["setup=module load cuda", "setup=ulimit -n 4096"]
    script = sbatch(TrainerFile(accelerator="gpu", threads=3), *options, *setup)
    lines = script.splitlines()
    for pair in options:
        assert f"#SBATCH --{pair}" in lines
    assert "#SBATCH --time=240" in lines
    assert "#SBATCH --cpus-per-task=3" in lines
    assert "#SBATCH --gpus-per-node=1" in lines
    assert "#SBATCH --no-requeue" in lines
    assert lines.index("module load cuda") + 1 == lines.index("ulimit -n 4096")
    assert "--cpus-per-task=3" in lines[-1], "srun takes it from its own arguments only"
    given = {pair.partition("=")[0] for pair in options + setup}
    assert given | {"time", "gres", "cluster"} == set(SLURM)


def test_gres_replaces_the_number_of_gpus() -> None:
    script = sbatch(TrainerFile(accelerator="gpu"), "gres=gpu:a100:1", "time=15")
    assert "#SBATCH --gres=gpu:a100:1" in script
    assert "#SBATCH --time=15" in script
    assert "gpus-per-node" not in script
    assert "gpus" not in sbatch(TrainerFile(accelerator="cpu"))


def job(tmp_path: Path, code: str, needs: list[str]) -> subprocess.Popen[bytes]:
    """run_job as a process, as a job has it."""
    call = [[sys.executable, "-c", code], needs, 1]
    paths = f"Path({str(tmp_path / 'log')!r}), Path({str(tmp_path / 'code')!r})"
    run = "from nasattn.search.slurm_launcher import run_job; from pathlib import Path\n"
    return subprocess.Popen([sys.executable, "-c", f"{run}run_job(*{call!r}, {paths})"])


def test_a_job_whose_time_was_over_says_so(tmp_path: Path) -> None:
    ended = tmp_path / "code"
    ended.write_text(str(-signal.SIGUSR2))
    job = SimpleNamespace(job_id="7", done=lambda: False)
    process = SlurmProcess(job, ended, None, print)
    assert process.poll() == process.poll() == -signal.SIGUSR2
    assert process.where == "job 7, whose time was over"


def test_of_what_slurm_does_not_tell_nothing_is_concluded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    squeue, asked = tmp_path / "squeue", tmp_path / "asked"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def answers(text: str) -> None:
        squeue.write_text(f"#!/bin/sh\necho once >>{asked}\n{text}\n")
        squeue.chmod(0o755)

    queue = Queue()
    answers("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    assert queue.state("7", 0.0) == ""
    answers("echo '7 RUNNING None'; echo '9 PENDING Resources'")
    assert queue.state("7", 0.0) == "RUNNING None"
    assert (queue.state("9", 60.0), queue.state("8", 60.0)) == ("PENDING Resources", None)
    answers("echo '9 RUNNING None'")
    assert queue.state("7", 60.0), "not asked again so soon"
    queue.forget()
    assert queue.state("7", 60.0) is None
    squeue.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert queue.state("7", 0.0) == ""
    assert len(asked.read_text().split()) == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_job_that_slurm_ends_counts_as_killed(tmp_path: Path, number: signal.Signals) -> None:
    """Out of time, or preempted: the worker itself ends cleanly, with exit code 1."""
    worker = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit('a clean end'))\n"
        "print('begins', flush=True)\ntime.sleep(60)"
    )
    process, log = job(tmp_path, worker, []), tmp_path / "log"
    deadline = time.monotonic() + 60
    while not log.exists() or "begins" not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    process.wait(timeout=30)
    assert (tmp_path / "code").read_text() == str(-number)
    assert "a clean end" in log.read_text()


def test_a_job_without_its_environment_says_why(tmp_path: Path) -> None:
    job(tmp_path, "print('never')", ["NASATTN_NEVER_SET"]).wait(timeout=60)
    assert (tmp_path / "code").read_text() == "1"
    assert "the job has no NASATTN_NEVER_SET: sbatch does not" in (tmp_path / "log").read_text()


# --- the crew


class Refusing(launchers.Local):
    """Takes so many commands, then no more, as a scheduler does that is down."""

    def __init__(self, most: int) -> None:
        super().__init__(TrainerFile(accelerator="cpu"))
        self.most, self.started = most, list[launchers.LocalProcess]()

    def start(self, command: Any, *arguments: Any) -> launchers.LocalProcess:
        if len(self.started) == self.most:
            raise Stopped("no more")
        self.started.append(super().start(["sleep", "60"], *arguments))
        return self.started[-1]


def crew(study: Study, refusing: Refusing, said: list[str]) -> Crew:
    return Crew(refusing, study, 2, said.append)


def test_a_crew_that_cannot_be_whole_leaves_nobody_behind(fake_study: Callable[..., Study]) -> None:
    refusing = Refusing(1)
    with pytest.raises(Stopped, match="no more"):
        crew(fake_study(), refusing, [])
    assert [p.poll() for p in refusing.started] == [-signal.SIGTERM]


def test_a_worker_that_cannot_be_replaced_leaves_the_others_at_work(
    fake_study: Callable[..., Study],
) -> None:
    refusing, said = Refusing(2), list[str]()
    team = crew(fake_study(), refusing, said)
    try:
        refusing.started[0].kill()
        assert team.tend(0)
        assert len(team.processes) == 1
        assert said[0].endswith("was killed by signal 9; none takes its place: no more")
    finally:
        team.dismiss()


def test_a_worker_on_a_full_disk_leaves_no_message_but_the_disk_tells(
    fake_study: Callable[..., Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(launchers.Local):
        def start(self, command: Any, *arguments: Any) -> launchers.LocalProcess:
            return super().start(["false"], *arguments)

    for free in (10**9, 0):
        monkeypatch.setattr("shutil.disk_usage", lambda _, f=free: SimpleNamespace(free=f))
        study = fake_study()
        replace_file(study.folder / "workers/0.log", "what the last search said\n")
        team = Crew(Failing(TrainerFile(accelerator="cpu")), study, 1, lambda text: None)
        while team.tend(0):
            time.sleep(0.01)
        assert team.last_words.startswith("it left no message")
        assert ("is full: make room" in team.last_words) == (free == 0)


def test_gpus_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert visible_devices(TrainerFile(accelerator="gpu")) == ["4", "5", "6", "7"]
    assert visible_devices(TrainerFile(accelerator="cpu")) == []
