"""Workers as jobs of Slurm, by submitit."""

import math
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nasattn.config import TrainerFile
from nasattn.errors import Stopped, UserError, lookup
from nasattn.files import whole
from nasattn.search.launchers import spawn

MINUTES = 240  # that a job may take, where `time` is not given
ASK, URGENT = 20.0, 2.0  # seconds between two calls of squeue, and where a job was told to end
PATIENCE = 30.0  # seconds in which it must answer

# The options of `--launcher slurm`, and what they mean where sbatch's manual does not say it.
SLURM: Mapping[str, str] = {
    "partition": "",
    "account": "",
    "qos": "",
    "constraint": "",
    "exclude": "nodes not to use",
    "gres": "instead of the one GPU that is asked for with `accelerator: gpu`",
    "mem": "of a worker, such as 16GB",
    "time": "minutes after which a worker is replaced by another",
    "setup": "a line of shell to run first, such as `module load cuda`; may be given again",
    "cluster": "slurm; or local: the same without Slurm, as processes of this machine",
}


def read_options(pairs: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` by key: `time` in minutes, `setup` a list."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not value:
            raise UserError(f"--launcher-option: got '{pair}'; allowed: KEY=VALUE")
        lookup(SLURM, key, "--launcher-option")
        if key == "setup":
            found.setdefault(key, []).append(value)
            continue
        if key in found:
            raise UserError(f"--launcher-option: {key} is given twice")
        if key == "time" and not (value.isdecimal() and int(value)):
            raise UserError(f"--launcher-option time: got '{value}'; allowed: whole minutes, 1 up")
        if key == "cluster" and value not in ("slurm", "local"):
            raise UserError(f"--launcher-option cluster: got '{value}'; allowed: slurm, local")
        found[key] = int(value) if key == "time" else value
    return found


class Slurm:
    """Submits each worker as a job (submitit). options: as read_options gives them.

    A job that ran out of time, was preempted or cancelled counts as killed, and is replaced by
    another one, so that Slurm itself requeues none. The search cancels its jobs when it is stopped;
    when it is killed they go on until the study is complete, as queued ones also may: `scancel`
    ends them. sbatch must pass the environment on, as it does by default. submitit keeps what a job
    calls (no password) as a pickle in the study's folder, in `workers/slurm`, which only its owner
    can read.
    """

    def __init__(
        self, trainer: TrainerFile, options: Mapping[str, Any], note: Callable[[str], None]
    ) -> None:
        try:
            import submitit
        except ImportError:
            raise UserError(
                "--launcher slurm: submitit is not installed; pip install 'nasattn[cluster]'"
            ) from None
        self.trainer, self.note, self.submitit = trainer, note, submitit
        self.queue = Queue()
        self.options = {"time": MINUTES, "cluster": "slurm", **options}
        lacking = [name for name in ("sbatch", "srun", "squeue") if not shutil.which(name)]
        if self.options["cluster"] == "slurm" and lacking:
            raise UserError(
                f"--launcher slurm: there is no {lacking[0]} here; start the search where jobs are "
                "submitted, or try it out with --launcher-option cluster=local"
            )

    def start(
        self, command: Sequence[str], index: int, log: Path, env: Mapping[str, str]
    ) -> "SlurmProcess":
        log = log.resolve()
        folder = log.parent / "slurm"
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        executor = self.submitit.AutoExecutor(folder, cluster=self.options["cluster"])
        executor.update_parameters(**self.parameters())
        ended, threads = folder / f"{uuid.uuid4().hex}.code", self.trainer.threads
        try:
            with _environment(env):
                job = executor.submit(run_job, list(command), list(env), threads, log, ended)
        except (RuntimeError, OSError) as error:
            raise Stopped(f"Slurm takes no job: {' '.join(str(error).split())}") from error
        self.note(f"worker {index} is job {job.job_id}")
        self.queue.forget()
        local = self.options["cluster"] == "local"
        return SlurmProcess(job, ended, None if local else self.queue, self.note)

    def parameters(self) -> dict[str, Any]:
        """What submitit is asked for."""
        trainer, options = self.trainer, self.options
        given = {key: options.get(key) for key in SLURM if key not in ("time", "cluster")}
        gpus = 1 if trainer.accelerator == "gpu" and not given["gres"] else None
        return {
            "name": "nasattn",
            "timeout_min": options["time"],
            "nodes": 1,
            "tasks_per_node": 1,
            "cpus_per_task": trainer.threads,
            "gpus_per_node": gpus,
            **{f"slurm_{key}": value for key, value in given.items()},
            # Slurm's own srun has not taken it over from sbatch since 22.05.
            "slurm_srun_args": [f"--cpus-per-task={trainer.threads}"],
            "slurm_additional_parameters": {"no-requeue": True},
        }


class Queue:
    """What Slurm says of this user's jobs that are not over. From squeue: sacct, which submitit
    asks, knows nothing where a cluster keeps no accounts."""

    def __init__(self) -> None:
        self.states: dict[str, str] = {}
        self.forget()

    def forget(self) -> None:
        """Of what was seen before nothing is concluded."""
        self.asked, self.answered = -math.inf, False

    def state(self, job: str, within: float) -> str | None:
        """A job's state and the reason for it, such as `PENDING Priority`, by an answer of at most
        so many seconds ago; None when it is over. The empty string where Slurm gives none: its
        controller is away for a while."""
        if time.monotonic() - self.asked >= within:
            said = _squeue(f"--user={os.getuid()}", "--format=%i %T %r")
            lines = (line.partition(" ") for line in (said or "").splitlines())
            self.states = {job: state for job, _, state in lines}
            self.asked, self.answered = time.monotonic(), said is not None
        return self.states.get(job) if self.answered else ""


def _squeue(*options: str) -> str | None:
    """What it answers of all partitions, hidden ones too; None for no answer."""
    # What a user wants to see of it may leave jobs out.
    env = {key: value for key, value in os.environ.items() if not key.startswith("SQUEUE_")}
    command = ["squeue", "--all", "--noheader", *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=PATIENCE)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if done.returncode else done.stdout


class SlurmProcess:
    """A job, seen from the search. It is over when it has left its exit code, or is in the queue no
    more. queue: None where submitit runs it on this machine."""

    def __init__(
        self, job: Any, ended: Path, queue: Queue | None, note: Callable[[str], None]
    ) -> None:
        self.job, self.ended, self.where = job, ended, f"job {job.job_id}"
        self.queue, self.note = queue, note
        self.begun, self.told, self.waits = time.monotonic(), False, False
        self.code: int | None = None

    def poll(self) -> int | None:
        if self.code is None:
            over = self._over()
            try:
                self.code = int(self.ended.read_text())
            except FileNotFoundError:
                self.code = -signal.SIGKILL if over else None
            if self.code == -signal.SIGUSR2:
                self.where += ", whose time was over"
        return self.code

    def terminate(self) -> None:
        self.told = True
        if self.queue is None and not self.job.done():
            # submitit would interrupt it, which what was begun in a background ignores, and kill it
            # a second later.
            os.kill(int(self.job.job_id), signal.SIGTERM)
        else:
            self.job.cancel(check=False)

    def kill(self) -> None:
        self.told = True
        self.job.cancel(check=False)  # Slurm kills what does not end

    def _over(self) -> bool:
        if self.queue is None:
            return bool(self.job.done())
        state = self.queue.state(self.job.job_id, URGENT if self.told else ASK)
        late = self.queue.asked - self.begun > ASK / 2  # most begin at once
        if state and state.startswith("PENDING ") and late and not self.waits:
            self.note(f"{self.where} waits in Slurm's queue: {state.removeprefix('PENDING ')}")
            self.waits = True
        return state is None


def run_job(command: list[str], needs: list[str], threads: int, log: Path, ended: Path) -> None:
    """What a job does: run the command, and leave its exit code in a file. needs: variables that
    the environment must have.

    Where the job is told to end, and the command is not through, that is the signal's number,
    negative: SIGUSR2 comes before the time is over, SIGTERM from a preemption or scancel.
    """
    told: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2):
        signal.signal(number, lambda number, _: told.append(number))
    with log.open("ab") as file:
        if missing := [name for name in needs if name not in os.environ]:
            file.write(
                f"nasattn: the job has no {missing[0]}: sbatch does not pass the environment on "
                "here (SBATCH_EXPORT=ALL)\n".encode()
            )
            code = 1
        else:
            child, passed = spawn(command, file, {}, threads), False
            while (found := child.poll()) is None:
                if told and not passed:
                    child.terminate()
                    passed = True
                time.sleep(0.1)
            code = -told[0] if told and found else found
    with whole(ended) as draft:
        draft.write_text(str(code))


@contextmanager
def _environment(env: Mapping[str, str]) -> Iterator[None]:
    """This process's own environment, with more for a while."""
    before = {key: os.environ.get(key) for key in env}
    os.environ.update(env)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value
