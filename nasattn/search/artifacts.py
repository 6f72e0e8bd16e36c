"""A study's files in a store that all of its machines reach: a folder, S3 or Google Cloud Storage.

Each machine's own folder of the study is a copy. Which object of the store is which file stands in
the study's database, so a file is seen whole or not at all: an object has a row from before its
first byte until it is gone, and the row has the file's path only while the object is that file.
"""

import hashlib
import io
import random
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optuna.exceptions import ExperimentalWarning
from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Engine,
    MetaData,
    Row,
    String,
    Table,
    Update,
    and_,
    delete,
    insert,
    literal,
    or_,
    select,
    update,
)
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from nasattn.errors import UserError
from nasattn.files import Files, make_folder, whole
from nasattn.search.lease import create_table
from nasattn.search.outage import StoreAway, cause, full, patiently
from nasattn.search.study import Study

# optuna.artifacts loads every cloud's client that is installed: only where a store is used.
if TYPE_CHECKING:
    from optuna.artifacts._protocol import ArtifactStore

ANSWERS = 10  # seconds in which S3 must accept a connection
# Where the rows of objects stand that are no file: not yet whole, or replaced, or dropped.
UPLOADS = "uploads"

TABLE = Table(
    "nasattn_artifact",
    MetaData(),
    Column("study", String(120), primary_key=True),
    Column("path", String(300), primary_key=True),
    Column("id", String(280), nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("digest", String(64), nullable=False),
)


class Store:
    """Objects by id. Raises StoreAway for all that goes wrong there, but a full disk.

    Without Optuna's Backoff: it waits 50 s in the middle of a training, prints a traceback a try,
    and its `remove` (5.0) goes on after it has succeeded. The clients have retries of their own,
    and beyond these `patiently` asks again.
    """

    def __init__(self, url: str, backend: "ArtifactStore", prefix: str = "") -> None:
        from optuna.artifacts.exceptions import ArtifactNotFound

        self.url, self.backend, self.prefix = url, backend, prefix
        self._missing = ArtifactNotFound

    def read(self, id: str) -> bytes | None:
        """None: there is no such object."""
        with self._answering(), suppress(self._missing):
            with self.backend.open_reader(self.prefix + id) as source:
                return source.read()
        return None

    def write(self, id: str, content: bytes) -> None:
        with self._answering():
            self.backend.write(self.prefix + id, io.BytesIO(content))

    def remove(self, id: str) -> None:
        """An object that is not there is well removed."""
        with self._answering(), suppress(self._missing):
            try:
                self.backend.remove(self.prefix + id)
            except Exception as error:
                if getattr(error, "code", None) != 404:  # Google's, which Optuna does not translate
                    raise

    def probe(self) -> None:
        """Raise a UserError unless an object can be written, read and removed."""
        name, content = f"nasattn-probe-{uuid.uuid4().hex}", b"nasattn"
        try:
            self.write(name, content)
            found = self.read(name)
            self.remove(name)
        except Exception as error:
            raise UserError(f"artifacts: {self.url} cannot be used: {cause(error)}") from None
        if found != content:
            raise UserError(f"artifacts: {self.url} does not give back what was written there")

    @contextmanager
    def _answering(self) -> Iterator[None]:
        # The clients draw their pauses from Python's generator, which a training draws from too.
        state = random.getstate()
        try:
            yield
        except Exception as error:
            if full(error):
                raise
            raise StoreAway(f"{self.url}: {cause(error)}") from error
        finally:
            random.setstate(state)


def open_store(url: str | None, study: Study | None = None) -> Store | None:
    """The store of an experiment's `artifacts`; a UserError when it cannot be used now. study:
    whose files are in it, where it has trials."""
    if url is None:
        return None
    if study and study.config.artifacts == url and study.trials:
        _refuse_missing(url)
    scheme, separator, rest = url.partition("://")
    bucket, _, prefix = rest.partition("/")
    try:
        from optuna.artifacts import FileSystemArtifactStore, GCSArtifactStore

        if not separator:
            make_folder(Path(url), "artifacts")
            backend: ArtifactStore = FileSystemArtifactStore(url)
        elif scheme == "s3":
            backend = _s3(bucket)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ExperimentalWarning)
                backend = GCSArtifactStore(bucket)
    except ImportError as error:
        raise UserError(
            f"artifacts: {url} needs a package: {cause(error)}; pip install 'nasattn[cluster]'"
        ) from None
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"artifacts: {url} cannot be used: {cause(error)}") from None
    store = Store(url, backend, prefix and f"{prefix}/")
    store.probe()
    return store


def _refuse_missing(url: str) -> None:
    """A folder that is not mounted now, or was moved, must not be made anew."""
    if "://" not in url and not Path(url).exists():
        raise UserError(
            f"artifacts: {url}, which has the study's files, is not there; mount it, put it back, "
            "or name the place where it is now in the experiment's file"
        )


def _s3(bucket: str) -> "ArtifactStore":
    """Endpoint, region and credentials as boto3 finds them: in the environment, its files, ..."""
    import boto3
    from botocore.config import Config
    from optuna.artifacts import Boto3ArtifactStore

    return Boto3ArtifactStore(bucket, boto3.client("s3", config=Config(connect_timeout=ANSWERS)))


def share(study: Study, store: Store | None, note: Callable[[str], None]) -> None:
    """Have the study's files in the store too, where there is one."""
    if store is not None:
        study.files = Shelf(store, study.engine, study.name, study.folder, note)


class Shelf(Files):
    """The files of a study in its store. note: told what goes wrong.

    Beside a file on this disk stands the id of the object that it is, or that it came of
    (`.NAME.id`): while the study's database names that one, the file here is as new, or newer.
    """

    def __init__(
        self,
        store: Store,
        engine: Engine,
        study: str,
        folder: Path,
        note: Callable[[str], None],
    ) -> None:
        self.store, self.engine, self.study, self.folder = store, engine, study, folder
        self.note = note
        # Path -> the id that it had when this process last asked. Who stood still while another
        # took over its trial does not write over what that one has published.
        self._seen: dict[str, str] = {}
        self._renewed = set[str]()  # brought anew once: read in vain again, they are as they are
        self._ids = set[str]()  # this process's own: of an upload it may not know that it succeeded
        create_table(engine, TABLE)

    def fetch(self, path: Path, *, anew: bool = False) -> bool:
        return patiently(lambda: self._fetch(path, anew), self.note)

    def publish(self, path: Path, *, must: bool = False) -> None:
        name = self._name(path)
        id = f"{self.study}.{name.replace('/', '.')}.{uuid.uuid4().hex}"
        self._ids.add(id)
        self._do(lambda: self._publish(path, name, id), must, f"{path} cannot be uploaded")

    def drop(self, path: Path, *, must: bool = False) -> None:
        super().drop(path)
        super().drop(_origin(path))
        self._do(lambda: self._drop(self._name(path)), must, f"{path} cannot be dropped")

    def forget(self) -> None:
        with self.engine.begin() as connection:
            connection.execute(delete(TABLE).where(TABLE.c.study == self.study))

    def elsewhere(self) -> Mapping[Path, int]:
        sizes: dict[Path, int] = {}
        for row in patiently(self._rows, self.note):
            first, *rest = row.path.split("/")
            item = self.folder / (first if first.startswith("backbone") else f"{first}/{rest[0]}")
            sizes[item] = sizes.get(item, 0) + row.size
        return sizes

    def marks(self, *paths: Path) -> list[list[str | int]]:
        """What others can go on from, as all of them see it."""
        names = [self._name(path) for path in paths]
        return [[row.path, row.id] for name in names for row in self._rows(name)]

    def _do(self, step: Callable[[], None], must: bool, failed: str) -> None:
        if must:
            return patiently(step, self.note)
        try:
            step()
        except Exception as error:  # whatever it is, the training goes on
            self.note(f"{failed}: {cause(error)}")

    def _fetch(self, path: Path, anew: bool) -> bool:
        name, lost, here = self._name(path), "", "" if anew else _came_of(path)
        while row := self._row(name):
            self._seen[name] = row.id
            if anew and row.id in self._renewed:
                break
            if row.id in (here, lost):
                break
            content = self._content(row)
            if content is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                _write(path, content)
                _write(_origin(path), row.id.encode())
                if anew:
                    self._renewed.add(row.id)
                return True
            lost = row.id  # unless it was replaced after its row was read
        else:
            self._seen[name] = ""
            return False
        if lost == row.id:
            self.note(f"{name}: what {self.store.url} has of it is damaged or gone: passed over")
        return False

    def _publish(self, path: Path, name: str, id: str) -> None:
        """May have come to any point before: it is tried again with the same id."""
        content, row = path.read_bytes(), self._row(name)
        digest, old = hashlib.sha256(content).hexdigest(), row.id if row else ""
        if row and row.digest == digest:
            if _came_of(path) == row.id or self._content(row) is not None:
                return self._published(path, row.id)
        if self._seen.get(name, old) != old and old not in self._ids:
            return  # another worker has taken over what this one was at
        values = {"study": self.study, "path": f"{UPLOADS}/{id}", "id": id, "digest": digest}
        with suppress(IntegrityError), self.engine.begin() as connection:
            connection.execute(insert(TABLE).values(size=len(content), **values))
        self.store.write(id, content)
        try:
            with self.engine.begin() as connection:
                connection.execute(_retired(self._is(name, old)))
                moved = update(TABLE).where(self._is(f"{UPLOADS}/{id}")).values(path=name)
                swapped = connection.execute(moved).rowcount == 1
        except IntegrityError:
            swapped = False
        if not swapped:
            raise StoreAway(f"{name}: another worker stored or removed it at the same time")
        self._published(path, id)
        if old:
            with suppress(StoreAway, SQLAlchemyError):  # else `nasattn gc` removes it
                self._remove(old)

    def _content(self, row: Row[Any]) -> bytes | None:
        """Of a row's object; None when it is damaged or gone."""
        content = self.store.read(row.id)
        same = content is not None and hashlib.sha256(content).hexdigest() == row.digest
        return content if same else None

    def _published(self, path: Path, id: str) -> None:
        self._seen[self._name(path)] = id
        _write(_origin(path), id.encode())

    def _drop(self, name: str) -> None:
        for row in self._rows(name):
            with self.engine.begin() as connection:
                connection.execute(_retired(self._is(row.path, row.id)))
            self._remove(row.id)
            self._seen.pop(row.path, None)

    def _remove(self, id: str) -> None:
        """An object that is no file any more, and then its row."""
        self.store.remove(id)
        with self.engine.begin() as connection:
            connection.execute(delete(TABLE).where(self._is(f"{UPLOADS}/{id}")))

    def _row(self, name: str) -> Row[Any] | None:
        return next((row for row in self._rows(name) if row.path == name), None)

    def _rows(self, name: str | None = None) -> list[Row[Any]]:
        """Those of a path and of what is in it, by path; of all paths."""
        columns = TABLE.c.path, TABLE.c.id, TABLE.c.size, TABLE.c.digest
        asked = select(*columns).where(TABLE.c.study == self.study).order_by(TABLE.c.path)
        if name is not None:
            inner = TABLE.c.path.startswith(f"{name}/", autoescape=True)
            asked = asked.where(or_(TABLE.c.path == name, inner))
        with self.engine.connect() as connection:
            return list(connection.execute(asked))

    def _is(self, path: str, id: str | None = None) -> ColumnElement[bool]:
        here = and_(TABLE.c.study == self.study, TABLE.c.path == path)
        return here if id is None else and_(here, TABLE.c.id == id)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()


def _retired(where: ColumnElement[bool]) -> Update:
    """What is a file becomes what is none, with the same object."""
    return update(TABLE).where(where).values(path=literal(f"{UPLOADS}/") + TABLE.c.id)


def _origin(path: Path) -> Path:
    return path.with_name(f".{path.name}.id")


def _came_of(path: Path) -> str:
    try:
        return _origin(path).read_text() if path.exists() else ""
    except OSError:
        return ""


def _write(path: Path, content: bytes) -> None:
    with whole(path, shared=True) as draft:  # other processes of this machine may write it too
        draft.write_bytes(content)
