"""How a study is come by: found in its database, made there, or its space grown."""

import itertools
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import RDBStorage
from optuna.study import StudyDirection

from nasattn import __version__
from nasattn.config import Experiment
from nasattn.errors import UserError, first_few, suggest
from nasattn.files import make_folder, replace_file
from nasattn.search.database import checked_url, connect, shown, sqlite_path
from nasattn.search.growth import GROWING, at_work, gains, grow, losses
from nasattn.search.study import FACTS, RUN, Study

MARKER = "database.txt"  # in a study's folder: the name of its database's file
ANOTHER = "give the experiment another `study:` name, or use --new-study"
MIXED = "they would fall into other splits, so that some were trained on that are to judge, and "
# What may change between two runs of one study.
FREE = (*RUN, "artifacts", "final", "final.seeds", "final.test")


def _known(storage: str) -> tuple[RDBStorage | None, list[str]]:
    """The database where it exists, and its studies' names."""
    path = sqlite_path(storage)
    if path and not path.exists():
        return None, []
    database = connect(storage)
    return database, [s.study_name for s in database.get_all_studies()]


def load_study(storage: str, name: str) -> Study:
    """A study from its database; a UserError when either is not there."""
    storage = checked_url(storage)
    database, names = _known(storage)
    if database is None:
        raise UserError(f"there is no database {shown(storage)}")
    if name not in names:
        raise UserError(
            f"{shown(storage)} has no study '{name}'; it has: {', '.join(names) or 'none'}"
            f"{suggest(name, names)}"
        )
    return Study(optuna.load_study(study_name=name, storage=database), storage)


def find_study(storage: str, name: str) -> Study | None:
    """A study from its database; None when it is not there, or has just been created."""
    storage = checked_url(storage)
    database, names = _known(storage)
    if database is None or name not in names:
        return None
    study = optuna.load_study(study_name=name, storage=database)
    return Study(study, storage) if FACTS in study.user_attrs else None


def open_study(
    experiment: Experiment,
    facts: Mapping[str, Any],
    found: Study | None = None,
) -> Study:
    """The experiment's study, made now or found in its database; found: what `find_study` gave.

    A UserError when it is there with another experiment: the differences are shown.
    """
    claim_folder(experiment.storage, experiment.study)
    if found is None or found.optuna.user_attrs.get(FACTS) != found.facts:
        found = _opened(experiment, facts)
    if grown := _grow(found, experiment, facts):
        # Loaded anew, without Optuna's cache of the trials and the choices that it has read.
        study = optuna.load_study(study_name=found.name, storage=found.database)
        found = Study(study, found.storage)
        found.notes.append(grown)
    return found


def _opened(experiment: Experiment, facts: Mapping[str, Any]) -> Study:
    storage = checked_url(experiment.storage)
    up, down = StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE
    directions = [up if o == "accuracy" else down for o in experiment.objectives]
    database = connect(storage)
    study = optuna.create_study(
        study_name=experiment.study,
        storage=database,
        directions=directions,
        load_if_exists=True,
    )
    # Another process may have created it a moment ago, or died before its facts were stored.
    adopted = study.directions == directions and not study.get_trials(deepcopy=False)
    if FACTS not in study.user_attrs and adopted:
        kept = experiment.as_dict() | {"storage": shown(storage)}  # without the password
        study.set_user_attr(FACTS, {"version": __version__, "experiment": kept, **facts})
    return Study(study, storage)


def claim_folder(storage: str, name: str) -> None:
    """Have the study's folder to itself, which stands beside its database's file. A file that was
    renamed takes its folder along. Raises UserError where the folder is that of a study of the same
    name in another file, or, for a new study, was that of one whose file has gone elsewhere."""
    path = sqlite_path(checked_url(storage))
    if path is None:
        return
    marker = path.parent / name / MARKER
    make_folder(marker.parent, "storage")
    owner = _owner(marker)
    filled = any(marker.parent.rglob("*.safetensors")) and not _holds(path, name)
    if owner == path.name:
        owner = next(_renamed(path, name), owner) if filled else owner
    if owner == path.name:
        return
    other = path.with_name(owner) if owner else path
    if other.exists() and not (path.exists() and other.samefile(path)) and _holds(other, name):
        raise UserError(
            f"{marker.parent} has the files of the study '{name}' of {other}: the two would "
            "overwrite each other's; allowed: another `study:` name, or another folder for this "
            "database"
        )
    if filled and owner and not other.exists():
        raise UserError(
            f"{marker.parent} has the weights of a study '{name}' whose database {other} is not "
            "there any more: they would be overwritten; allowed: that database, put back or named "
            f"by `storage:`, another `study:` name, or the folder without {marker}"
        )
    replace_file(marker, f"{path.name}\n")


def _owner(marker: Path) -> str:
    """The name of the database's file whose study a folder is; empty where nothing says so."""
    with suppress(OSError, ValueError):
        return Path(marker.read_text().strip()).name
    return ""


def _renamed(path: Path, name: str) -> Iterator[str]:
    """The files beside a database that have a study of that name."""
    others = (other for other in sorted(path.parent.iterdir()) if other.is_file())
    return (other.name for other in others if other != path and _holds(other, name))


def _holds(file: Path, name: str) -> bool:
    """Whether a file is a sqlite database with a study of that name. It is only read, and by sqlite
    alone: to close a file takes a process's locks on it away, which sqlite holds for as long as it
    has the database open; another process, which believes itself the last, then deletes the log
    that is written to. Nor are sqlite's own files beside a database opened, of which it would not
    know; and of an empty file it would delete the log."""
    query = "SELECT 1 FROM studies WHERE study_name = ?"
    if file.name.endswith(("-wal", "-shm", "-journal")) or not _size(file):
        return False
    with (
        suppress(sqlite3.Error),
        closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as base,
    ):
        return base.execute(query, (name,)).fetchone() is not None
    return False


def _size(file: Path) -> int:
    with suppress(OSError):
        return file.stat().st_size
    return 0


def _grow(study: Study, experiment: Experiment, facts: Mapping[str, Any]) -> str:
    """Take up a space that has grown; what is new, or the empty string.

    A UserError for any other edit: what differs, and the ways out. Before the first trial all is
    taken up.
    """
    old, edits = study.facts, study.edits(experiment, FREE)
    then, now = old.get("images") or {}, facts.get("images") or {}  # of old versions none
    changed = not same_images(then, now)
    known = "read" in then  # an earlier version kept their names alone
    moved = [line for line in edits if line.startswith("data.root: ")] if known else []

    def take(new: Mapping[str, Any]) -> None:
        grow(study.engine, study.optuna._study_id, FACTS, old, new)
        study.refresh()

    given = experiment.as_dict()
    more = {"space": given["space"]} | ({"data": given["data"]} if moved else {})
    new = {**old, **facts, "experiment": old["experiment"] | more}
    lost = losses(old, new)
    if (edits or lost or changed) and _begins(study, edits, lost):
        study.forget()
        kept = given | {"storage": old["experiment"]["storage"]}
        take({**new, "experiment": kept})
        return ""
    if lost or not all(line.startswith(GROWING) or line in moved for line in edits):
        raise UserError(
            f"the study '{study.name}' has another experiment (study -> this one):\n"
            + "".join(f"  {line}\n" for line in edits)
            + (f"The study's space has what this one has not: {first_few(lost)}.\n" if lost else "")
            + f"To go on with it write what it has, else start another study: {ANOTHER}."
        )
    if changed:
        what, why, key = "the images have changed", MIXED, "files"
        if then.get("digest") == now.get("digest"):
            what, why, key = "other images can be read", "", "readable"
            if then["readable"] == now.get("readable"):
                what = "images have other contents"
        raise UserError(
            f"data.root: {what} since the study '{study.name}' began ({then[key]:,} then, "
            f"{now.get(key, 0):,} now): {why}new trials would be judged by other images than old "
            f"ones. Put them back to go on with it, or start another study: {ANOTHER}."
        )
    if not edits and new["choices"] == old["choices"]:
        # Of an earlier version: it did not know images by as much, and rounded limits otherwise.
        anew = ["limits", "reference"] + ["images"] * bool(now.keys() - then.keys())
        fresh = {**old, **{key: new[key] for key in anew}}
        if fresh != old:
            with suppress(UserError):  # another process was quicker
                take(fresh)
        return ""
    news = gains(old, new) or ("" if moved else "reordered")
    said = [f"the space has grown ({news}): all trials stay"] if news else []
    said += [f"the images lie in {given['data']['root']} now"] if moved else []
    if busy := at_work(study.engine, study.name):
        who = ", ".join(f"{w['host']}:{w['pid']}" for w in busy)
        raise UserError(
            f"{'; '.join(said)}. That is taken up when nobody works on '{study.name}'; now it is "
            f"searched by {who}: stop that, then run this again"
        )
    take(new)
    return "; ".join(said)


def same_images(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether images are those that a study knows, as far as it does."""
    return all(now.get(key) == then[key] for key in ("digest", "read", "contents") if key in then)


def _begins(study: Study, edits: Sequence[str], lost: Sequence[str]) -> bool:
    """Whether nothing is there yet that an edit would make incomparable: no trial, or the baseline
    alone, which has still to be trained. The objectives are fixed in the database, a trial's
    architecture and cost in its row."""
    trials = study.trials
    fixed = ("objectives", "space", "budget", "latency") if trials else ("objectives",)
    if any(not t.baseline or t.known for t in trials) or any(e.startswith(fixed) for e in edits):
        return False
    return not (trials and lost) and not at_work(study.engine, study.name)


def free_name(storage: str, name: str) -> str:
    """The name, or NAME-2 and so on, that no study of the database has, nor a folder beside it that
    is another database's."""
    url = checked_url(storage)
    (_, taken), path = _known(url), sqlite_path(url)
    stem = name[:90]  # config allows 100 characters
    names = itertools.chain([name], (f"{stem}-{i}" for i in itertools.count(2)))
    mine = ("", path.name if path else "")
    return next(
        n
        for n in names
        if n not in taken and not (path and _owner(path.parent / n / MARKER) not in mine)
    )
