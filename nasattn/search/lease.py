"""Who works on a study, and on what: leases in the study's own database, taken by compare and swap.

A worker is a row `worker:ID` whose beat it counts up every few seconds; whatever else it holds (the
turn to decide, the backbone's training, a trial) lives and dies with that row. No clock of another
machine is read: a worker is dead when its count has stood still for STALE seconds of the observer's
own monotonic clock, or, on the observer's host, when its process is gone.
"""

import json
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    and_,
    bindparam,
    delete,
    exists,
    insert,
    inspect,
    literal,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from sqlalchemy.schema import CreateTable

from nasattn.search.outage import patiently
from nasattn.search.rows import READS

BEAT = 3.0  # seconds between beats
STALE = 60.0  # seconds without one after which a worker counts as dead
BLIND = 15.0  # seconds without a look after which an observer begins anew: it was cut off itself
PAUSES = 0.002, 0.05  # seconds between two tries for the turn, the first and the longest

PARENT = "NASATTN_PARENT"  # the variable with the pid of the process that started this one

WORKER, TRIAL, TURN, BACKBONE = "worker:", "trial:", "turn", "backbone"

TABLE = Table(
    "nasattn_lease",
    MetaData(),
    Column("study", String(120), primary_key=True),
    Column("name", String(80), primary_key=True),
    Column("owner", String(40), nullable=False),
    Column("beat", Integer, nullable=False),
    Column("facts", Text, nullable=False),
)

# Made once: SQLAlchemy takes longer to make a statement than to run it, and a trial runs a dozen.
# here: the study; at: a lease's name; by: its owner.
_ROW = TABLE.c
_KEY = [bindparam(name, type_=String) for name in ("here", "at", "by")]
_HERE, _BY = _ROW.study == _KEY[0], _ROW.owner == _KEY[2]
_LEASE = and_(_HERE, _ROW.name == _KEY[1])
_NAMES = _ROW.name.in_(bindparam("names", expanding=True))
LEASES = select(_ROW.name, _ROW.owner, _ROW.beat, _ROW.facts).where(_HERE)
OWNER = select(_ROW.owner).where(_LEASE)
KEPT = OWNER.with_for_update()
TAKE = insert(TABLE).from_select(
    ["study", "name", "owner", "beat", "facts"],
    select(*_KEY, literal(0), literal("{}")).where(~exists().where(_LEASE)),
)
SWAP = update(TABLE).where(_LEASE, _BY).values(owner=bindparam("to"))
BEATS = update(TABLE).where(_LEASE).values(beat=_ROW.beat + 1, facts=bindparam("told"))
GIVE = delete(TABLE).where(_HERE, _BY, _NAMES)
LEAVE = delete(TABLE).where(_HERE, _BY)
REAP = delete(TABLE).where(_HERE, _NAMES, _ROW.owner.in_(bindparam("owners", expanding=True)))


@dataclass(frozen=True, slots=True)
class Lease:
    """A row of the table. owner: the ID of the worker that holds it."""

    name: str
    owner: str
    beat: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)


def trial_lease(number: int) -> str:
    """The name of the right to evaluate a trial."""
    return f"{TRIAL}{number}"


class Heartbeats:
    """Tells dead workers from live ones by what one observer, who looks again after `every` seconds
    or earlier, has seen of their beats."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, every: float = 0.0) -> None:
        self.clock, self.blind = clock, BLIND + every
        self._seen: dict[str, tuple[int, float]] = {}  # owner -> its beat, and since when
        self._looked = float("-inf")

    def look(self, leases: Iterable[Lease]) -> None:
        """Take note of all workers' beats."""
        now = self.clock()
        known = self._seen if now - self._looked <= self.blind else {}
        fresh = {}
        for lease in leases:
            if lease.name.startswith(WORKER):
                beat, since = known.get(lease.owner, (lease.beat, now))
                fresh[lease.owner] = (lease.beat, since if beat == lease.beat else now)
        self._seen, self._looked = fresh, now

    def dead(self, worker: Lease | None) -> bool:
        """Of a worker's own row; None: it has none (any more)."""
        if worker is None:
            return True
        beat, since = self._seen.get(worker.owner, (worker.beat, float("inf")))
        stale = beat == worker.beat and self._looked - since > STALE
        return stale or _gone(worker.facts)


class Leases:
    """A worker's presence on a study, and what it holds there. Entered, a thread keeps it alive.

    `doing` is what others are shown of this worker; it is written with every beat. `ended` are
    leases that are not needed any more; they are given back with the next turn.
    """

    def __init__(
        self,
        engine: Engine,
        study: str,
        beats: Heartbeats | None = None,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.engine, self.study, self.beats = engine, study, beats or Heartbeats()
        self.note = note
        self.me, self._here = uuid.uuid4().hex, {"here": study}
        self.doing: dict[str, Any] = {}
        self.ended: set[str] = set()
        self._who = identity()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._rng = random.Random(self.me)

    def __enter__(self) -> "Leases":
        patiently(lambda: create_table(self.engine), self.note)
        patiently(self.renew, self.note)
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
        try:
            with self.engine.begin() as connection:
                connection.execute(LEAVE, self._here | {"by": self.me})
        except SQLAlchemyError:
            pass  # the database is gone; the others will see that this process is, too

    def renew(self) -> None:
        """One beat, and a look at those of the others."""
        with self.engine.begin() as connection:
            self._show(connection)
            leases = _read(connection, self.study)
        # Only a look that a beat of one's own came with counts: who cannot write would else take
        # all for dead that cannot write either.
        self.beats.look(leases)

    def table(self) -> dict[str, Lease]:
        """All leases of the study, by name."""
        return {lease.name: lease for lease in _table(self.engine, self.study)}

    def dead(self, owner: str, table: Mapping[str, Lease]) -> bool:
        return owner != self.me and self.beats.dead(table.get(WORKER + owner))

    def holds(self, name: str) -> bool:
        """Whether a lease is still this worker's: who stood still for long may have lost it."""
        with self.engine.connect().execution_options(**READS) as connection:
            return connection.scalar(OWNER, self._here | {"at": name}) == self.me

    def keeps(self, name: str, connection: Connection) -> bool:
        """As `holds`, and nobody takes it until the connection's transaction ends."""
        return connection.scalar(KEPT, self._here | {"at": name}) == self.me

    def acquire(self, name: str) -> bool:
        """Take a lease that is free, or whose owner is dead; one's own stays one's own."""
        self.ended.discard(name)
        lease = self._here | {"at": name}
        try:
            with self.engine.begin() as connection:
                if connection.execute(TAKE, lease | {"by": self.me}).rowcount == 1:
                    return True
        except IntegrityError:
            return False  # another's came first
        table = self.table()
        if name not in table:
            return False
        owner = table[name].owner
        if owner == self.me or not self.dead(owner, table):
            return owner == self.me
        with self.engine.begin() as connection:
            return connection.execute(SWAP, lease | {"by": owner, "to": self.me}).rowcount == 1

    def release(self, *names: str) -> None:
        """Give leases back, and show what this worker does now."""
        with self.engine.begin() as connection:
            connection.execute(GIVE, self._here | {"by": self.me, "names": names})
            self._show(connection)

    def reap(self, table: Mapping[str, Lease], kept: Iterable[str]) -> None:
        """Delete what dead workers have left behind, but for the leases named in `kept`."""
        gone = {x.owner for x in table.values() if self.dead(x.owner, table)}
        names = [x.name for x in table.values() if x.owner in gone and x.name not in set(kept)]
        if names:
            with self.engine.begin() as connection:
                connection.execute(REAP, self._here | {"names": names, "owners": list(gone)})

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The right to decide, which one worker has at a time."""
        pause, longest = PAUSES
        while not self.acquire(TURN):
            time.sleep(pause * self._rng.uniform(0.5, 1.5))
            pause = min(1.5 * pause, longest)
        try:
            yield
        except BaseException:
            with suppress(SQLAlchemyError):  # or Ctrl-C would be taken for a database that is gone
                self._end_turn()
            raise
        self._end_turn()

    def _end_turn(self) -> None:
        self.release(TURN, *self.ended)
        self.ended.clear()

    def _show(self, connection: Connection) -> None:
        facts, name = json.dumps(self._who | self.doing), WORKER + self.me
        beat = self._here | {"at": name, "told": facts}
        if connection.execute(BEATS, beat).rowcount == 0:  # the first one, or it was taken for dead
            row = {"study": self.study, "name": name, "owner": self.me, "beat": 0, "facts": facts}
            connection.execute(insert(TABLE).values(row))

    def _beat(self) -> None:
        while not self._stop.wait(BEAT):
            if _orphaned():
                os.kill(os.getpid(), 15)  # the search that started this worker is gone
            try:
                self.renew()
            except SQLAlchemyError:
                pass  # the next beat may succeed; the work itself tells of a database that is gone


def create_table(engine: Engine, table: Table = TABLE) -> None:
    """A table, that of the leases, unless it is there; many processes may do so at once."""
    try:
        with engine.begin() as connection:
            connection.execute(CreateTable(table, if_not_exists=True))
    except SQLAlchemyError:  # PostgreSQL lets one of two creators fail in spite of the condition
        if not inspect(engine).has_table(table.name):
            raise


def _table(engine: Engine, study: str) -> list[Lease]:
    with engine.connect().execution_options(**READS) as connection:
        return _read(connection, study)


def _read(connection: Connection, study: str) -> list[Lease]:
    rows = connection.execute(LEASES, {"here": study})
    return [Lease(name, owner, beat, json.loads(facts)) for name, owner, beat, facts in rows]


def workers(engine: Engine, study: str, beats: Heartbeats | None = None) -> list[Lease]:
    """The live workers of a study, as far as one look tells, or what was seen of them before."""
    if not inspect(engine).has_table(TABLE.name):
        return []
    beats = beats or Heartbeats()
    found = [lease for lease in _table(engine, study) if lease.name.startswith(WORKER)]
    beats.look(found)
    return [lease for lease in found if not beats.dead(lease)]


def identity() -> dict[str, Any]:
    """This process. place: where its pid is looked up (the running system, and the container);
    started: when, as pids are used again."""
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "place": _place(),
        "started": _stat(pid)[1],
    }


def _gone(facts: Mapping[str, Any]) -> bool:
    """Whether a process of this place has ended; what cannot be looked up has not."""
    if facts.get("place") != _place():
        return False
    try:
        os.kill(facts["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    state, started = _stat(facts["pid"])
    return state in ("Z", "X") or bool(started and started != facts["started"])


def _place() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    try:
        return f"{boot.read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _stat(pid: int) -> tuple[str, str]:
    """A process's state and when the kernel started it, where it says so; else empty strings."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]


def _orphaned() -> bool:
    """Whether this process was started by a search that has ended since."""
    parent = os.environ.get(PARENT)
    return parent is not None and os.getppid() != int(parent)
