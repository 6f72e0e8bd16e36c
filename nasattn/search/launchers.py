"""Where the workers of a search run: on this machine, on a Ray cluster, as jobs of Slurm.

A launcher starts one and the same command anywhere. What runs it there is its parent: when that is
gone the worker ends by itself (`lease.PARENT`), except a Slurm job, which needs no search and goes
on until the study is complete. Python and nasattn stand at the same path on all machines, and the
folder in which the search was started is there too. The database's URL is passed in the
environment, since `ps` shows a command and a password may be in it.
"""

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol

from nasattn.config import TrainerFile
from nasattn.errors import Stopped
from nasattn.evaluate import on_cuda
from nasattn.search.lease import PARENT
from nasattn.search.outage import full, full_disk

STORAGE = "NASATTN_STORAGE"  # the variable with the database's URL


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


class Local:
    """Starts processes on this machine, on the CPU or each on its own GPU."""

    def __init__(self, trainer: TrainerFile) -> None:
        self.trainer, self.devices = trainer, visible_devices(trainer)

    def start(
        self, command: Sequence[str], index: int, log: Path, env: Mapping[str, str]
    ) -> "LocalProcess":
        if self.devices:
            env = {**env, "CUDA_VISIBLE_DEVICES": self.devices[index % len(self.devices)]}
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("ab") as file:
                return LocalProcess(spawn(command, file, env, self.trainer.threads))
        except OSError as error:  # no memory left, or no process
            if full(error):
                raise full_disk(error) from error
            raise Stopped(f"worker {index} cannot be started: {error}") from error


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
    """The GPUs, one a worker, as CUDA_VISIBLE_DEVICES has them; none on a machine without."""
    if not on_cuda(trainer):
        return []
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]
