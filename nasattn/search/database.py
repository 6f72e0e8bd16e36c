"""A study's database: its URL, how it is reached, and what several processes create at once."""

import os
import shutil
import sqlite3
import time
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy import Engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import (
    ArgumentError,
    DisconnectionError,
    IntegrityError,
    NoSuchModuleError,
    OperationalError,
    SQLAlchemyError,
)
from sqlalchemy.pool import NullPool

from nasattn.config import storage_url
from nasattn.errors import UserError, suggest
from nasattn.search.rows import Database

CREATING = (0.1, 0.2, 0.4, 0.8, 1.6)  # seconds between tries while others create the tables
SCHEMES = ("sqlite", "postgresql")  # that are tested; Optuna knows others
BUSY = 20  # seconds for which sqlite waits for another process's transaction
ROOM = 2**16  # bytes; sqlite makes files beside a database to open it, and calls it an I/O error
ANSWERS = 10  # seconds in which a server must answer at the start
IDLE = 10.0  # seconds after which a connection is tried before it is used


def connect(storage: str) -> RDBStorage:
    """The database, with sqlite in write-ahead mode; a UserError when it cannot be reached."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if make_url(storage).get_backend_name() == "sqlite" and sqlite_path(storage) is None:
        raise UserError(
            f"storage: got '{storage}': a study in memory is seen by no other command and would be "
            "lost; allowed: a file, such as sqlite:///runs/nasattn.db"
        )
    for pause in (*CREATING, None):
        began = time.monotonic()
        try:
            return _opened(storage)
        except (SQLAlchemyError, StorageInternalError, RuntimeError, OSError) as error:
            # Of creators who wait for one another sqlite refuses one at once.
            at_once = "is locked" in _words(error) and time.monotonic() - began < BUSY
            if pause and (at_once or _half_created(error)):
                time.sleep(pause)
                continue
            reason = _words(error)
            path = sqlite_path(storage)
            if isinstance(error, NoSuchModuleError):
                scheme = storage.partition("://")[0]
                reason = (
                    f"got '{scheme}'; allowed: {' or '.join(SCHEMES)}{suggest(scheme, SCHEMES)}"
                )
            elif path and path.is_dir():
                reason = f"{path} is a folder; allowed: a file in one"
            elif path and path.exists() and not os.access(path.parent, os.W_OK):
                reason += (
                    "; nothing can be written beside it: copy it, with the -wal file that belongs "
                    "to it, to where that is possible"
                )
            elif path and path.exists() and shutil.disk_usage(path).free < ROOM:
                reason += "; its disk is full"
            raise UserError(f"the database {shown(storage)} cannot be used: {reason}") from error
        except ImportError as error:
            raise UserError(
                f"the database {shown(storage)} needs a driver: {error}; allowed without one: "
                "sqlite; with pip install 'nasattn[cluster]': postgresql"
            ) from None
    raise AssertionError("the last try returns or raises")


def _words(error: Exception) -> str:
    """The driver's own, on one line."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    return str(getattr(cause, "orig", None) or cause).strip().split("\n")[0]


def _opened(storage: str) -> RDBStorage:
    kind = make_url(storage).get_backend_name()
    if kind == "sqlite":
        path = Path(str(make_url(storage).database))
        options: dict[str, Any] = {"connect_args": {"timeout": BUSY}}
        to_read = path.exists() and not os.access(path.parent, os.W_OK)
        if to_read:
            options = {"creator": partial(_to_read, path), "poolclass": NullPool}
        database = Database(storage, engine_kwargs=options)
        if not to_read:
            event.listen(database.engine, "connect", _write_ahead)
            database.engine.dispose()
        database.get_all_studies()
        _miss_file(database.engine, path)
        return database
    options = {}
    if kind == "postgresql":
        # A network that swallows packets is noticed after about as long, not after a quarter of
        # an hour.
        alive = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3}
        options["connect_args"] = alive | {
            "connect_timeout": ANSWERS,
            "tcp_user_timeout": 1000 * ANSWERS,  # milliseconds
        }
    database = Database(storage, engine_kwargs=options)
    _try_idle(database.engine)
    return database


def _to_read(path: Path) -> sqlite3.Connection:
    """A connection to a file in whose folder nothing can be written: a snapshot's, a colleague's.

    sqlite needs files beside a database, which it can read where a writer has made them. Where
    there is no log, nobody writes now, and sqlite may be told so: for one look, as one may begin.
    """
    for more in ("", "&immutable=1"):
        uri = f"file:{quote(str(path))}?mode=ro{more}"
        connection = sqlite3.connect(uri, uri=True, timeout=BUSY, check_same_thread=False)
        try:
            connection.execute("PRAGMA schema_version")
            return connection
        except sqlite3.OperationalError:
            connection.close()
            if more or path.with_name(f"{path.name}-wal").exists():
                raise
    raise AssertionError("the last try returns or raises")


def _half_created(error: BaseException) -> bool:
    """Whether another process is creating the same tables: Optuna looks, then creates."""
    return isinstance(error, IntegrityError) or "already exists" in str(error)


def _write_ahead(connection: Any, record: Any) -> None:
    for pragma in ("journal_mode=WAL", "synchronous=NORMAL", f"busy_timeout={BUSY * 1000}"):
        connection.execute(f"PRAGMA {pragma}")


def _miss_file(engine: Engine, path: Path) -> None:
    """Notice when the file of a sqlite database was removed or replaced: the system would let its
    connections write on, into what nobody can open any more. Nor is a new one opened then: sqlite
    would make an empty file, and throw away the log that belongs to the other."""

    def known() -> tuple[int, int] | None:
        try:
            found = path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino

    opened = known()

    def missed(*_: Any) -> None:
        if known() != opened:
            error = FileNotFoundError(f"{path} was removed or replaced")
            raise OperationalError("", {}, error)

    event.listen(engine, "do_connect", missed)
    event.listen(engine, "checkout", missed)


def _try_idle(engine: Engine) -> None:
    """Try a connection that has lain idle before it is used: a server or what stands between may
    have closed it. (Pool's own way tries each before each use: a dozen and a half a trial.)"""

    def back(connection: Any, record: Any) -> None:
        record.info["idle since"] = time.monotonic()

    def taken(connection: Any, record: Any, proxy: Any) -> None:
        since = record.info.get("idle since")
        if since is None or time.monotonic() - since < IDLE:
            return
        try:
            engine.dialect.do_ping(connection)
        except engine.dialect.loaded_dbapi.Error:
            raise DisconnectionError from None  # the pool takes another one, or makes it

    event.listen(engine, "checkin", back)
    event.listen(engine, "checkout", taken)


def checked_url(storage: str) -> str:
    """The URL as SQLAlchemy wants it; a UserError when it is none."""
    try:
        url = storage_url(storage)
    except ValueError as error:
        raise UserError(f"storage: {error}") from None
    try:
        make_url(url)
    except ArgumentError as error:
        raise UserError(f"storage: {error}") from None
    except ValueError:  # of int()
        raise UserError(
            "storage: the URL's port is no whole number; allowed: postgresql://user@host:5432/name"
        ) from None
    return url


def sqlite_path(storage: str) -> Path | None:
    """The file of a sqlite URL; None for other databases and for sqlite in memory."""
    url = make_url(storage)
    in_file = url.get_backend_name() == "sqlite" and url.database and url.database != ":memory:"
    return Path(str(url.database)) if in_file else None


def shown(storage: str) -> str:
    """The URL without its password."""
    return make_url(storage).render_as_string(hide_password=True)
