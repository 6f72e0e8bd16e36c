"""Several workers on one study: processes that are started, followed and, when killed, replaced."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch

from nasattn.config import Experiment, TrainerFile
from nasattn.errors import Stopped
from nasattn.search.display import Display
from nasattn.search.lease import PARENT
from nasattn.search.loop import Search
from nasattn.search.outage import gone
from nasattn.search.study import Study, finished
from nasattn.search.watch import Follower

LOOK = 0.5  # seconds between two looks at the processes and the database
FAREWELL = 60.0  # seconds for a clean end before a process is killed
MOST_DEATHS = 10  # workers killed in a row with no trial finished meanwhile
STORAGE = "NASATTN_STORAGE"  # the variable with the database's URL, whose password `ps` would show


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
    the environment."""

    def start(
        self, command: Sequence[str], index: int, log: Path, env: Mapping[str, str]
    ) -> Process: ...


class Local:
    """Starts processes on this machine, on the CPU or each on its own GPU."""

    def __init__(self, trainer: TrainerFile) -> None:
        self.trainer, self.devices = trainer, visible_devices(trainer)

    def start(
        self, command: Sequence[str], index: int, log: Path, env: Mapping[str, str]
    ) -> "LocalProcess":
        own = {PARENT: str(os.getpid()), "OMP_NUM_THREADS": str(self.trainer.threads)}
        if self.devices:
            own["CUDA_VISIBLE_DEVICES"] = self.devices[index % len(self.devices)]
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            # In a session of its own: Ctrl-C comes from here, once, and not from the terminal too.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **env, **own},
                start_new_session=True,
            )
        return LocalProcess(process)


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
    if trainer.accelerator not in ("auto", "gpu") or not torch.cuda.is_available():
        return []
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]
    each = trainer.devices
    return [",".join(names[i : i + each]) for i in range(0, len(names) - each + 1, each)]


class Crew:
    """The workers of one search. A killed one is replaced; one that ended by itself is not."""

    def __init__(
        self,
        launcher: Launcher,
        study: Study,
        total: int,
        count: int,
        note: Callable[[str], None],
    ) -> None:
        self.launcher, self.study, self.note = launcher, study, note
        self.command = [sys.executable, "-m", "nasattn.cli", "resume", "--study", study.name]
        self.command += ["--trials", str(total), "--workers", "1"]
        self.processes = {index: self._start(index) for index in range(count)}
        self.last_words = ""
        self._deaths, self._finished = 0, 0

    def tend(self, done: int) -> bool:
        """Replace who was killed; False when nobody works any more. done: trials finished."""
        for index, process in list(self.processes.items()):
            code = process.poll()
            if code is None:
                continue
            del self.processes[index]
            if code < 0:
                self._deaths = 1 + (self._deaths if done == self._finished else 0)
                self._finished = done
                self.last_words = f"worker {index} ({process.where}) was killed by signal {-code}"
                if self._deaths < MOST_DEATHS:
                    self.processes[index] = self._start(index)
                    self.last_words += "; another takes its place"
                self.note(self.last_words)
            elif code > 0:
                self.last_words = self._tail(index)
                self.note(f"worker {index} ({process.where}) stopped: {self.last_words}")
        return bool(self.processes)

    def dismiss(self) -> None:
        """End all: cleanly, and after a while at once."""
        for process in self.processes.values():
            process.terminate()
        deadline = time.monotonic() + FAREWELL
        try:
            while time.monotonic() < deadline and self._any():
                time.sleep(0.05)
        finally:
            for process in self.processes.values():
                if process.poll() is None:
                    process.kill()

    def _any(self) -> bool:
        return any(process.poll() is None for process in self.processes.values())

    def _start(self, index: int) -> Process:
        return self.launcher.start(
            self.command, index, self._log(index), {STORAGE: self.study.storage}
        )

    def _log(self, index: int) -> Path:
        return self.study.folder / "workers" / f"{index}.log"

    def _tail(self, index: int) -> str:
        """What a worker said last."""
        try:
            lines = self._log(index).read_text(errors="replace").strip().splitlines()
        except OSError:
            lines = []
        return lines[-1].removeprefix("nasattn: ") if lines else "it left no message"


def search_with(
    experiment: Experiment,
    total: int,
    count: int,
    display: Display,
    launcher: Launcher | None = None,
) -> Study:
    """Go on until the study has `total` finished trials, by `count` workers.

    Raises Stopped with the last worker's words when all have ended before.
    """
    search = Search(experiment, display)
    study = search.study
    total = search.plan(total)
    if finished(study.trials) >= total:
        return search.run(total)
    search.announce(total, count)
    del search
    crew = Crew(launcher or Local(experiment.trainer), study, total, count, display.note)
    follower, away = Follower(study, display), False
    try:
        with display:
            while True:
                working = crew.tend(finished(display.trials))
                try:
                    follower.look()
                    away = False
                except Exception as error:
                    if not gone(error):
                        raise
                    if not away:
                        display.note("the database does not answer; the workers try again")
                    away = True
                if not working:
                    break
                time.sleep(LOOK)
    finally:
        crew.dismiss()
    if away or (finished(study.trials) < total and crew.last_words):
        raise Stopped(crew.last_words or "the database does not answer")
    return study
