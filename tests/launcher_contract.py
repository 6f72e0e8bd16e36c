"""What every launcher must do, tried on commands that need no nasattn; prints as JSON what befell.

A program of its own, so that test_launchers.py can give it a time limit.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nasattn.config import TrainerFile
from nasattn.search.launchers import STORAGE, Launcher, Local, Process
from nasattn.search.ray_launcher import Ray
from nasattn.search.slurm_launcher import Slurm

SECRET = "postgresql://user:s3cret-w0rd@host/x"
LAST_WORDS = "print('much'); print('nasattn: the last words'); raise SystemExit(3)"
TELLS = f"""
import json, os
print(json.dumps(dict(
    storage=os.environ.get({STORAGE!r}), watched=os.environ["NASATTN_PARENT"] == str(os.getppid()),
    threads=os.environ["OMP_NUM_THREADS"], slurm="SLURM_NTASKS" in os.environ, folder=os.getcwd()
)))
"""
RUNS = """
import os, signal, sys, time
def end(*_):
    print("a clean end", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
parent = os.getppid()
print(os.getpid(), parent, flush=True)
while os.getppid() == parent:
    time.sleep(0.05)
"""


def waited(what: Callable[[], Any], seconds: float = 120.0) -> Any:
    """Its first value that is something."""
    deadline = time.monotonic() + seconds
    while (found := what()) in (None, "", []):
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.05)
    return found


class Contract:
    def __init__(self, launcher: Launcher, folder: Path) -> None:
        self.launcher, self.folder, self.logs = launcher, folder, 0

    def begin(self, code: str) -> tuple[Process, Path]:
        self.logs += 1
        log = self.folder / "workers" / f"{self.logs}.log"
        command = [sys.executable, "-c", code]
        return self.launcher.start(command, 0, log, {STORAGE: SECRET}), log

    def end(self, code: str) -> tuple[int, str]:
        process, log = self.begin(code)
        return waited(process.poll), log.read_text()

    def running(self) -> tuple[Process, Path, int, int]:
        """A command that runs, its process and that of what runs it."""
        process, log = self.begin(RUNS)

        def told() -> str:
            assert process.poll() is None
            return log.read_text().strip() if log.exists() else ""

        pid, parent = map(int, waited(told).split())
        return process, log, pid, parent

    def all(self) -> dict[str, Any]:
        found: dict[str, Any] = {"fails": self.end(LAST_WORDS), "tells": self.end(TELLS)}
        process, _, pid, _ = self.running()
        found["where"], found["pid"] = process.where, pid
        os.kill(pid, signal.SIGKILL)
        found["killed"] = waited(process.poll)
        process, log, pid, _ = self.running()
        commands = [p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline") if p.exists()]
        found["in ps"] = sum(b"s3cret" in c for c in commands)
        process.terminate()
        waited(process.poll)
        found["ended"] = log.read_text().splitlines()[1:]
        if not isinstance(self.launcher, Local):
            process, _, pid, parent = self.running()
            os.kill(parent, signal.SIGKILL)
            found["host killed"] = waited(process.poll)
        return found


if __name__ == "__main__":
    trainer, home = TrainerFile(accelerator="cpu"), Path(sys.argv[2])
    if sys.argv[1] != "slurm":  # there Slurm itself sets it
        os.environ["SLURM_NTASKS"] = "4"
    made = {
        "local": lambda: Local(trainer),
        "ray": lambda: Ray(trainer, print),
        "slurm": lambda: Slurm(trainer, {"time": 5}, lambda text: None),
        "submitit": lambda: Slurm(trainer, {"time": 5, "cluster": "local"}, lambda text: None),
    }[sys.argv[1]]()
    os.chdir(home)
    print(json.dumps(Contract(made, home).all()))
