"""Several workers on one study: processes that are started, followed and, when killed, replaced."""

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from nasattn.config import Experiment
from nasattn.errors import Stopped, UserError, lookup
from nasattn.record import counted
from nasattn.search.display import Display
from nasattn.search.final import evaluations
from nasattn.search.launchers import STORAGE, Launcher, Local, Process
from nasattn.search.loop import Search
from nasattn.search.outage import gone, patiently
from nasattn.search.ray_launcher import Ray
from nasattn.search.slurm_launcher import Slurm, read_options
from nasattn.search.study import Study, finished
from nasattn.search.watch import Follower

LOOK = 0.5  # seconds between two looks at the processes and the database
FAREWELL = 60.0  # seconds for a clean end before a process is killed
MOST_IN_A_ROW = 10  # of each worker's deaths in a row with nothing finished meanwhile
FULL = 2**20  # bytes free on a disk, below which it is
REST = 5.0  # seconds in which the workers of a complete study end by themselves


class Crew:
    """The workers of one search. A killed one is replaced; one that ended by itself is not."""

    def __init__(
        self,
        launcher: Launcher,
        study: Study,
        count: int,
        note: Callable[[str], None],
    ) -> None:
        self.launcher, self.study, self.note = launcher, study, note
        # How many trials there are to be is stored; the number here may be older than that.
        self.command = [sys.executable, "-m", "nasattn", "resume", "--study", study.name]
        self.command += ["--workers", "1"]
        self.processes: dict[int, Process] = {}
        self._begins: dict[int, int] = {}  # where each one's words begin in its log
        self.last_words = ""
        self._deaths, self._finished = 0, 0
        self._most = MOST_IN_A_ROW * count  # each may have met a trial that kills, in its turn
        try:
            for index in range(count):
                self.processes[index] = self._start(index)
        except BaseException:
            self.dismiss()
            raise

    def tend(self, done: int) -> bool:
        """Replace who was killed; False when nobody works any more. done: what is finished."""
        for index, process in list(self.processes.items()):
            code = process.poll()
            if code is None:
                continue
            del self.processes[index]
            if code < 0:
                self._deaths = 1 + (self._deaths if done == self._finished else 0)
                self._finished = done
                self.last_words = f"worker {index} ({process.where}) was killed by signal {-code}"
                if self._deaths < self._most:
                    self.last_words += self._replace(index)
                self.note(self.last_words)
                if index in self.processes:
                    self.last_words = ""
            elif code > 0:
                self.last_words = self._tail(index)
                self.note(f"worker {index} ({process.where}) stopped: {self.last_words}")
        return bool(self.processes)

    def dismiss(self) -> None:
        """End all: cleanly, and after a while at once."""
        for process in self.processes.values():
            with suppress(Exception):  # one that cannot be told must not keep the others
                process.terminate()
        deadline = time.monotonic() + FAREWELL
        try:
            while time.monotonic() < deadline and any(
                process.poll() is None for process in self.processes.values()
            ):
                time.sleep(0.05)
        finally:
            for process in self.processes.values():
                if process.poll() is None:
                    process.kill()

    def _replace(self, index: int) -> str:
        try:
            self.processes[index] = self._start(index)
        except Stopped as error:
            return f"; none takes its place: {error}"
        return "; another takes its place"

    def _start(self, index: int) -> Process:
        log = self._log(index)
        self._begins[index] = log.stat().st_size if log.exists() else 0
        return self.launcher.start(self.command, index, log, {STORAGE: self.study.storage})

    def _log(self, index: int) -> Path:
        return self.study.folder / "workers" / f"{index}.log"

    def _tail(self, index: int) -> str:
        """What a worker said last."""
        try:
            said = self._log(index).read_bytes()[self._begins[index] :]
            lines = said.decode(errors="replace").strip().splitlines()
        except OSError:
            lines = []
        if lines:
            return lines[-1].removeprefix("nasattn: ")
        full = ""
        with suppress(OSError):
            if shutil.disk_usage(self.study.folder).free < FULL:
                full = f"; the disk of {self.study.folder} is full: make room, "
                full += "the same command goes on"
        return f"it left no message{full}"


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


def ended(study: Study) -> int:
    """Trainings that have come to an end or to a rung: a stopped trial that goes on is one more."""
    return sum(row.state.is_finished() for row in study.optuna.get_trials(deepcopy=False))


def search_with(
    experiment: Experiment,
    trials: int | None,
    count: int,
    display: Display,
    launcher: Launcher,
    found: Study | None = None,
    retry: bool = False,
) -> Study:
    """`Search.run` of so many trials, by `count` workers. found: see Search; retry: what has
    failed is trained again.

    Raises Stopped with the last worker's words when all have ended before.
    """
    search = Search(experiment, display, found)
    study = search.study
    total = search.plan(trials)
    if retry:
        search.retry()
    if patiently(lambda: study.over(total), display.note):
        return search.run(trials)
    if search.to_train(total):
        most = total - finished(study.trials)
        if count > most and not search.stopping and not experiment.final:
            display.note(f"{counted(most, 'worker')} of {count}: no more trainings are to come")
            count = most
        search.announce(total, count)
    elif counts := study.final_progress(study.trials):
        left = counts["evaluations"] - counts["done"]
        display.note(f"final: {counted(left, 'evaluation')} to go")
    del search
    crew = Crew(launcher, study, count, display.note)
    follower, away, rest, progress = Follower(study, display), False, REST, 0
    try:
        with display:
            while True:
                working = crew.tend(progress)
                try:
                    idle = not follower.look()
                    progress = ended(study) + len(evaluations(study.optuna.user_attrs))
                    rest = rest - LOOK if idle else REST
                    away = False
                except Exception as error:
                    if not gone(error):
                        raise
                    if not away:
                        display.note("the database does not answer; the workers try again")
                    away = True
                if not working or rest <= 0:  # who still waits for a place is not needed
                    break
                time.sleep(LOOK)
    finally:
        crew.dismiss()
    if away:
        raise Stopped(crew.last_words or "the database does not answer")
    over = patiently(lambda: study.over(total), display.note)
    if crew.last_words and not over:
        raise Stopped(crew.last_words)
    if over:
        patiently(study.write_final, display.note)
        display.note(patiently(study.completion, display.note))
    return study
