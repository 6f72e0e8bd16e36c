"""A lease on a study: a second live process is refused, a dead one's is taken over at once."""

import os
import socket
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import optuna

from nasattn.errors import UserError

LEASE = "lease"
BEAT = 10.0  # seconds between heartbeats
STALE = 60.0  # seconds without one after which another host's process counts as dead


class Lease:
    """Held while the search runs; a thread renews its heartbeat in the study's attributes."""

    def __init__(self, study: optuna.Study) -> None:
        self.study = study
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def __enter__(self) -> "Lease":
        other = self.study.user_attrs.get(LEASE)
        if other and alive(other):
            age = max(0.0, time.time() - other["heartbeat"])
            raise UserError(
                f"the study '{self.study.study_name}' is being searched by process {other['pid']} "
                f"on {other['host']} (heartbeat {age:.0f} s ago); wait for it or stop it"
            )
        self._renew()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.study.set_user_attr(LEASE, None)

    def _renew(self) -> None:
        self.study.set_user_attr(LEASE, identity() | {"heartbeat": time.time()})

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            self._renew()


def identity() -> dict[str, Any]:
    """This process: host, pid and the pid's start, as pids are used again."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}


def alive(lease: dict[str, Any]) -> bool:
    """Whether the lease's process lives: looked up on this host, by its heartbeat on another."""
    if lease["host"] != socket.gethostname():
        return bool(time.time() - lease["heartbeat"] < STALE)
    try:
        os.kill(lease["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return bool(_started(lease["pid"]) == lease["started"])


def _started(pid: int) -> str:
    """When the kernel started the process, where it says so; else the empty string."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]
