"""Where the workers of a search run: on this machine, on a Ray cluster, as jobs of Slurm.

A launcher starts one and the same command anywhere. What runs it there is its parent: when that is
gone the worker ends by itself (`lease.PARENT`), except a Slurm job, which needs no search and goes
on until the study is complete. Python and nasattn stand at the same path on all machines, and the
folder in which the search was started is there too. The database's URL is passed in the
environment, since `ps` shows a command and a password may be in it.
"""

import logging
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

from nasattn.config import Experiment, TrainerFile
from nasattn.errors import Stopped, UserError, lookup
from nasattn.search.lease import PARENT

STORAGE = "NASATTN_STORAGE"  # the variable with the database's URL
ADDRESS = "RAY_ADDRESS"  # Ray's own, HOST:PORT
ANSWERS = 5.0  # seconds in which a Ray cluster must answer at the start
CHUNK = 1 << 20  # bytes of a worker's output that are fetched at once
MINUTES = 240  # that a Slurm job may take, where `time` is not given


class Process(Protocol):
    """A command that was started somewhere. where: for people."""

    @property
    def where(self) -> str: ...

    def poll(self) -> int | None:
        """Its exit code, negative where a signal ended it; None while it runs."""

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


class Launcher(Protocol):
    """Starts commands. index: which of the workers; log: the file for what it prints; env: added to
    the environment. Raises Stopped where it cannot."""

    def start(
        self, command: Sequence[str], index: int, log: Path, env: Mapping[str, str]
    ) -> Process: ...


def launcher(
    name: str, options: Sequence[str], experiment: Experiment, note: Callable[[str], None]
) -> Launcher:
    """A launcher by its name. options: `KEY=VALUE`, of slurm only (SLURM). A UserError where the
    cluster cannot be used."""
    lookup(dict.fromkeys(("local", "ray", "slurm")), name, "launcher")
    if options and name != "slurm":
        raise UserError(f"--launcher-option: got {options[0]}; the launcher {name} takes none")
    trainer = experiment.trainer
    if name == "local":
        return Local(trainer)
    found = Ray(trainer, note) if name == "ray" else Slurm(trainer, read_options(options), note)
    if experiment.storage.startswith("sqlite"):
        note(
            "the database is a sqlite file: right only while all workers run on this one machine; "
            "for several machines: a PostgreSQL URL (--storage)"
        )
    return found


def spawn(
    command: Sequence[str],
    output: IO[bytes],
    env: Mapping[str, str],
    threads: int,
    folder: str | None = None,
) -> "subprocess.Popen[bytes]":
    """The command as a child that watches this process."""
    # Of Slurm's variables Lightning would conclude that it is one process of several.
    outer = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    own = {PARENT: str(os.getpid()), "OMP_NUM_THREADS": str(threads)}
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env={**outer, **env, **own},
        cwd=folder,
        # In a session of its own: Ctrl-C comes from here, once, and not from the terminal too.
        start_new_session=True,
    )


# --- this machine


class Local:
    """Starts processes on this machine, on the CPU or each on its own GPU."""

    def __init__(self, trainer: TrainerFile) -> None:
        self.trainer, self.devices = trainer, visible_devices(trainer)

    def start(
        self, command: Sequence[str], index: int, log: Path, env: Mapping[str, str]
    ) -> "LocalProcess":
        if self.devices:
            env = {**env, "CUDA_VISIBLE_DEVICES": self.devices[index % len(self.devices)]}
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            return LocalProcess(spawn(command, file, env, self.trainer.threads))


class LocalProcess:
    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self.process, self.where = process, f"pid {process.pid}"

    def poll(self) -> int | None:
        return self.process.poll()

    def terminate(self) -> None:
        self.process.terminate()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def visible_devices(trainer: TrainerFile) -> list[str]:
    """The GPUs of each worker, as CUDA_VISIBLE_DEVICES has them; none on a machine without."""
    if trainer.accelerator not in ("auto", "gpu"):
        return []
    import torch  # not at the top: what runs a worker elsewhere needs none

    if not torch.cuda.is_available():
        return []
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]
    each = trainer.devices
    return [",".join(names[i : i + each]) for i in range(0, len(names) - each + 1, each)]


# --- Ray


class Ray:
    """Starts each worker in an actor that holds the trainer's threads and GPUs.

    The cluster is that of RAY_ADDRESS (HOST:PORT), else the one that this machine is a node of. Ray
    itself starts nothing twice. When the search dies its actors go, and the workers with them.
    """

    def __init__(self, trainer: TrainerFile, note: Callable[[str], None]) -> None:
        self.trainer, self.ray = trainer, _connect_ray()
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        has_gpus = any(node.get("GPU") for node in nodes)
        wanted = trainer.accelerator == "gpu" or (trainer.accelerator == "auto" and has_gpus)
        self.needs = {"CPU": trainer.threads, "GPU": trainer.devices if wanted else 0}
        if not any(all(node.get(k, 0) >= n for k, n in self.needs.items()) for node in nodes):
            needs = " and ".join(f"{n} {k}" for k, n in self.needs.items() if n)
            note(f"no node of the Ray cluster has {needs} now: the workers wait until one has")

    def start(
        self, command: Sequence[str], index: int, log: Path, env: Mapping[str, str]
    ) -> "RayProcess":
        try:
            _reach(self.ray.get_runtime_context().gcs_address)  # else Ray waits for a minute
        except OSError as error:
            raise Stopped(f"the Ray cluster does not answer: {error}") from error
        kind = self.ray.remote(
            num_cpus=self.needs["CPU"],
            num_gpus=self.needs["GPU"],
            max_restarts=0,
            max_task_retries=0,
        )(Host)
        actor = kind.remote()
        # Not an argument of the actor's creation, which Ray keeps: the password is in `env`.
        begun = actor.begin.remote(list(command), dict(env), self.trainer.threads, os.getcwd())
        return RayProcess(self.ray, actor, begun, log)


def _connect_ray() -> Any:
    """The module, connected to a cluster."""
    try:
        import ray
    except ImportError:
        raise UserError(
            "--launcher ray: Ray is not installed; pip install 'nasattn[cluster]'"
        ) from None
    address, handler = os.environ.get(ADDRESS) or "auto", signal.getsignal(signal.SIGTERM)
    if address != "auto":  # Ray itself would try for minutes, and then end the process
        host, _, port = address.rpartition(":")
        if not host or not port.isdecimal():
            raise UserError(f"{ADDRESS}: got '{address}'; allowed: HOST:PORT, or auto")
        try:
            _reach(address)
        except (OSError, OverflowError) as error:
            raise UserError(f"{ADDRESS}: no Ray cluster answers at {address}: {error}") from None
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(
            f"--launcher ray: no Ray cluster can be used: {' '.join(str(error).split())} "
            f"(`ray start` begins one, {ADDRESS}=HOST:PORT names one, and one with a token needs "
            "RAY_AUTH_MODE=token)"
        ) from None
    finally:
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)  # Ray has put its own there
    return ray


def _reach(address: str) -> None:
    """Raises OSError where nothing listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), ANSWERS).close()


class Host:
    """The actor: runs one command on a node. No call of it waits."""

    def begin(self, command: list[str], env: dict[str, str], threads: int, folder: str) -> str:
        """Start it; where that is."""
        self.output, self.read = tempfile.TemporaryFile(), 0
        self.process = spawn(command, self.output, env, threads, folder)
        return f"{socket.gethostname()}:{self.process.pid}"

    def look(self) -> tuple[int | None, bytes]:
        """Its exit code, once there is one and all has been read, and what it has printed since the
        last look."""
        code = self.process.poll()
        text = os.pread(self.output.fileno(), CHUNK, self.read)
        self.read += len(text)
        return (None if len(text) == CHUNK else code), text

    def send(self, number: int) -> None:
        self.process.send_signal(number)


class RayProcess:
    """An actor's command, seen from the search. An actor that died, or its node, was killed."""

    def __init__(self, ray: Any, actor: Any, begun: Any, log: Path) -> None:
        self.ray, self.actor, self.log = ray, actor, log
        self.where, self.code = "Ray, not begun", None  # type: tuple[str, int | None]
        self._begun, self._look = begun, None  # type: tuple[Any, Any]

    def poll(self) -> int | None:
        if self.code is not None:
            return self.code
        waited = self._begun or self._look
        if not self.ray.wait([waited], timeout=0)[0]:
            return None
        from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError

        try:
            found = self.ray.get(waited)
        except ActorUnavailableError:
            found = (None, b"")  # the network, for a moment
        except RayActorError:
            return self._end(-signal.SIGKILL)
        except RayTaskError as error:
            self._write(f"{error.cause}\n".encode())
            return self._end(1)
        if self._begun:
            self.where, self._begun = found, None
        else:
            code, text = found
            self._write(text)
            if code is not None:
                return self._end(code)
        self._look = self.actor.look.remote()
        return None

    def terminate(self) -> None:
        if self._begun and self.poll() is None and self._begun:
            self._end(-signal.SIGTERM)  # it still waits for a place
        elif self.code is None:
            self.actor.send.remote(int(signal.SIGTERM))

    def kill(self) -> None:
        self._end(-signal.SIGKILL)

    def _end(self, code: int) -> int:
        """Give the place free; Ray ends what still runs there."""
        self.ray.kill(self.actor)
        self.code = code
        return code

    def _write(self, text: bytes) -> None:
        if text:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("ab") as file:
                file.write(text)


# --- Slurm

# The options of `--launcher slurm`, and what they mean where sbatch's manual does not say it.
SLURM: Mapping[str, str] = {
    "partition": "",
    "account": "",
    "qos": "",
    "constraint": "",
    "exclude": "nodes not to use",
    "gres": "instead of the trainer's devices, which are asked for with `accelerator: gpu`",
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
        self.options = {"time": MINUTES, "cluster": "slurm", **options}
        if self.options["cluster"] == "slurm" and not (
            shutil.which("sbatch") and shutil.which("srun")
        ):
            raise UserError(
                "--launcher slurm: there is no sbatch here; start the search where jobs are "
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
        return SlurmProcess(job, ended)

    def parameters(self) -> dict[str, Any]:
        """What submitit is asked for."""
        trainer, options = self.trainer, self.options
        given = {key: options.get(key) for key in SLURM if key not in ("time", "cluster")}
        gpus = trainer.devices if trainer.accelerator == "gpu" and not given["gres"] else None
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


class SlurmProcess:
    """A job, seen from the search. It is over when it has left its exit code, or by what Slurm says
    (sacct), which submitit asks more and more rarely."""

    def __init__(self, job: Any, ended: Path) -> None:
        self.job, self.ended, self.where = job, ended, f"job {job.job_id}"
        self.code: int | None = None

    def poll(self) -> int | None:
        if self.code is None:
            over = self.job.done() or self.job.state.startswith("PREEMPTED")
            try:
                self.code = int(self.ended.read_text())
            except FileNotFoundError:
                self.code = -signal.SIGKILL if over else None
        return self.code

    def terminate(self) -> None:
        self.job.cancel(check=False)
        self.job.watcher.clear()  # so that it is asked often again

    def kill(self) -> None:
        self.terminate()  # Slurm kills what does not end


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
    draft = ended.with_suffix(".draft")
    draft.write_text(str(code))
    draft.replace(ended)


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
