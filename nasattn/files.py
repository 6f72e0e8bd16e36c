"""The files of a study, for whoever writes and reads them: on this disk, and perhaps elsewhere."""

import errno
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryFile
from typing import TypeVar
from uuid import uuid4

from nasattn.errors import UserError

T = TypeVar("T")


class Files:
    """Files that lie on this disk alone. `nasattn.search.artifacts` has them elsewhere too."""

    def fetch(self, path: Path, *, anew: bool = False) -> bool:
        """Have at its place on this disk what others have published last of a file, if they have;
        a file that came of it here stays, unless `anew`. Whether it was brought now."""
        return False

    def read(self, path: Path, reader: Callable[[Path], T]) -> T:
        """What `reader` makes of a file that is fetched; anew where that raises, as the copy on
        this disk may be damaged. What it raises then comes out."""
        self.fetch(path)
        try:
            return reader(path)
        except FileNotFoundError:
            raise
        except Exception:
            if not self.fetch(path, anew=True):
                raise
            return reader(path)

    def publish(self, path: Path, *, must: bool = False) -> None:
        """Let others find the file as it is now. must: raises Stopped where that cannot be done,
        after patience; else a failure is noted, and the next time may succeed."""

    def drop(self, path: Path, *, must: bool = False) -> None:
        """Remove a file, or a folder with all in it, here, if that may be, and elsewhere; `must` as
        for publish."""
        if path.is_dir():
            rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def forget(self) -> None:
        """Know of nothing elsewhere any more; what lies there stays there."""

    def elsewhere(self) -> Mapping[Path, int]:
        """What lies elsewhere, by its place on this disk, with its size in bytes: files, but the
        folder of a training as one."""
        return {}

    def marks(self, *paths: Path) -> list[list[str | int]]:
        """What is not the same any more when weights there, or in a folder there, were written."""
        inner = [file for path in paths for file in (path, *sorted(path.rglob("*.safetensors")))]
        return [[file.name, file.stat().st_mtime_ns] for file in inner if file.is_file()]


def make_folder(folder: Path, key: str = "") -> None:
    """key: of the experiment, that says where it lies."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        said = f"the folder {folder} cannot be made: {error.strerror}"
        raise UserError(f"{key}: {said}" if key else said) from None


def check_writable(folder: Path) -> None:
    """A UserError where files cannot be written in a folder; made where it is not there."""
    make_folder(folder)
    try:
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"nothing can be written in {folder}: {error.strerror}") from None


def check_file(path: Path) -> Path:
    """Where a file of that name comes to lie: a link is followed. A UserError where none can be
    written; its folder is made where it is not there."""
    found = Path(os.path.realpath(path))  # Path.resolve raises for a loop, or not, by the version
    if found.is_symlink():
        raise UserError(f"{path} is a link to itself; allowed: a file")
    if found.exists() and not found.is_file():
        raise UserError(f"{path} is {'a folder' if found.is_dir() else 'no file'}; allowed: a file")
    check_writable(found.parent)
    return found


@contextmanager
def whole(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """A draft to be written, which then takes the file's place: the file is whole or as it was.

    shared: others may write the same file at once, so that the draft has a name of its own, and one
    whose writer is killed stays. Else there is one writer, and its next draft overwrites the last.
    """
    own = f".{uuid4().hex}" if shared else ""
    draft = path.with_name(f".{path.name}{own}.draft")
    try:
        yield draft
        draft.replace(path)
    except BaseException:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        raise


def replace_file(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    make_folder(path.parent)
    try:
        with whole(path, shared=True) as draft:
            draft.write_text(text, encoding="utf-8")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"{path} cannot be written: {error.strerror}") from None
