"""The errors a user can act on. The command line prints them without a traceback."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


class UserError(Exception):
    """The input is wrong: the message says where, what was seen, what is allowed. Exit code 2."""


class TrialFailed(Exception):
    """One evaluation cannot give a score; the message is the reason that is recorded."""


class DataFailed(TrialFailed):
    """That was not the architecture's fault: the next evaluation reads the same data."""


class Stopped(Exception):
    """The work cannot go on for now, and nothing is lost: the message says why. Exit code 1."""


class DeviceLost(Stopped):
    """An error after which the GPU is of no use to this process, but to a new one. The command
    line goes on as one."""


def reason(error: Exception) -> str:
    """What is recorded of an evaluation that failed: a known reason, or the error with its type."""
    return str(error) if isinstance(error, TrialFailed) else f"{type(error).__name__}: {error}"


def suggest(word: object, allowed: Iterable[str]) -> str:
    """`; did you mean 'x'?` when something allowed is close to the word, else the empty string."""
    near = difflib.get_close_matches(str(word), list(allowed), n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else ""


def first_few(names: Sequence[str], most: int = 6) -> str:
    """`a, b, c and 7 more`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def lookup(table: Mapping[str, T], name: str, what: str) -> T:
    """`table[name]`, or a UserError that lists what there is."""
    if name in table:
        return table[name]
    raise UserError(f"unknown {what} '{name}'; allowed: {', '.join(table)}{suggest(name, table)}")
