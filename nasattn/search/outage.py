"""What to do when the ground goes: a database or an artifact store that does not answer is asked
again for a while, a full disk ends the work at once. Either way the search stops with one message,
and nothing is lost.
"""

import errno
import os
import random
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from sqlalchemy.exc import DatabaseError, DBAPIError, InterfaceError, OperationalError

from nasattn.errors import DataFailed, DeviceLost, Stopped, TrialFailed, reason

T = TypeVar("T")


class StoreAway(Exception):
    """The artifact store has not done what it was asked."""


PATIENCE = 120.0  # seconds from the first failure until the search stops
MOST_BROKEN = 5  # trainings in a row that no one foresaw: then it is this machine that is broken
PAUSES = 0.1, 10.0  # seconds between two tries, the first and the longest
pause = time.sleep


def patiently(step: Callable[[], T], note: Callable[[str], None]) -> T:
    """What `step` returns, tried again while the database or the artifact store is gone: it may
    have come to any point.

    Raises Stopped when one of them stays away or the disk is full.
    """
    began, (seconds, longest) = None, PAUSES  # type: tuple[float | None, tuple[float, float]]
    who = ""
    while True:
        try:
            found = step()
        except Exception as error:
            if full(error):
                raise full_disk(error) from error
            if not gone(error):
                raise
            now, reason = time.monotonic(), cause(error)
            if began is None:
                began = now
                who = "artifact store" if isinstance(error, StoreAway) else "database"
                note(f"the {who} does not answer ({reason}); it is tried again")
            if now - began > PATIENCE:
                raise Stopped(
                    f"the {who} has not answered for {now - began:.0f} s ({reason}); "
                    "when it does, the same command goes on"
                ) from error
            pause(seconds * random.SystemRandom().uniform(0.5, 1.0))
            seconds = min(2 * seconds, longest)
        else:
            if began is not None:
                note(f"the {who} answers again, after {time.monotonic() - began:.0f} s")
            return found


def full_disk(error: BaseException) -> Stopped:
    return Stopped(
        f"the disk is full ({cause(error)}); nothing is lost: make room, the same command goes on"
    )


class Machine:
    """Tells a training that has failed from a machine on which every one would."""

    BROKEN = "NASATTN_BROKEN"  # the variable with the count of the process that this one replaces

    def __init__(self) -> None:
        # Trainings in a row that ended in an error that nobody foresaw.
        self._broken = int(os.environ.pop(self.BROKEN, 0))

    def works(self) -> None:
        """A training has ended well."""
        self._broken = 0

    def blamed(self, error: Exception) -> str:
        """Why a training has failed. Raises Stopped where that is not its own fault: the disk is
        full, or one after the other broke."""
        if full(error):
            raise full_disk(error) from error
        why = reason(error)
        own = isinstance(error, TrialFailed) and not isinstance(error, DataFailed)
        self._broken = 0 if own else self._broken + 1
        if self._broken == MOST_BROKEN:
            raise Stopped(
                f"{MOST_BROKEN} trainings in a row broke here, the last one by: {why}. It is left "
                "open: the same command goes on with it, and --retry with the others too"
            ) from error
        return why

    def renew(self, error: Exception, what: str) -> None:
        """Raises DeviceLost where the error, which has been blamed, is one of CUDA's: they stay
        with the process, and each training after it would end in the same one."""
        if _stays(error):
            os.environ[self.BROKEN], why = str(self._broken), str(error).splitlines()[0]
            raise DeviceLost(
                f"{what} failed and left this process a GPU of no use ({why}); a new one can go on"
            ) from error

    def guarded(self, work: Callable[[], T], what: str) -> T:
        """What `work` gives; raises DeviceLost as `renew` does."""
        try:
            return work()
        except Exception as error:
            if _stays(error):
                self.blamed(error)
                self.renew(error, what)
            raise


def _stays(error: Exception) -> bool:
    """Whether the process has this error of CUDA's from now on."""
    return type(error).__name__ == "AcceleratorError"


def gone(error: BaseException) -> bool:
    """Whether the error means that the database could not be reached or was locked, or that the
    artifact store could not be reached."""
    return any(
        (isinstance(e, (OperationalError, InterfaceError, StoreAway)) and not _read_only(e))
        or (isinstance(e, DBAPIError) and e.connection_invalidated)
        for e in _causes(error)
    )


def _read_only(error: BaseException) -> bool:
    """Whether nothing may be written into a sqlite file, which waiting does not change."""
    return getattr(getattr(error, "orig", None), "sqlite_errorname", "") == "SQLITE_READONLY"


def broken_database(error: BaseException) -> str:
    """What is wrong with a database that is gone, locked, damaged or not to be written, in the
    driver's words; the empty string for other errors: wrong SQL is our own."""
    damaged = any(type(e) is DatabaseError or _read_only(e) for e in _causes(error))
    return cause(error) if damaged or gone(error) else ""


def full(error: BaseException) -> bool:
    """Whether the error means that a disk is full: the system's, sqlite's or safetensors' own."""
    texts = ("No space left on device", "disk is full", "Disk quota exceeded")
    return any(
        (isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT))
        or any(text in str(e) for text in texts)
        for e in _causes(error)
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def cause(error: BaseException) -> str:
    """The driver's own words, on one line."""
    last = list(_causes(error))[-1]
    return str(getattr(last, "orig", None) or last).strip().split("\n")[0]
