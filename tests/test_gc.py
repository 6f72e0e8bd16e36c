"""What `nasattn gc` keeps and drops, with invented trials and files of known sizes."""

import errno
import random
from pathlib import Path
from shutil import rmtree
from typing import Any

import pytest
from conftest import FakeStudy
from optuna.trial import TrialState
from typer.testing import CliRunner

from nasattn import files
from nasattn.architecture import NONE
from nasattn.cli import app
from nasattn.record import Score
from nasattn.search.final import Evaluation, contenders
from nasattn.search.gc import collect, size_text
from nasattn.search.study import FACTS, PARTIAL, Study, claim
from nasattn.space import SearchSpace

ACCURACIES = {"stopped": (0.3, 0.1, 0.2), "running": (0.05,)}


@pytest.fixture
def study(fake_study: FakeStudy) -> Study:
    """Twelve finished trials, two of them failed, then three stopped and one that runs; each with a
    file of weights (100 bytes) and a checkpoint (1000 bytes in two files)."""
    found = fake_study(12, failures=2)
    space = SearchSpace.of(found.config.space)
    taken = {t.architecture.key for t in found.trials}
    rng = random.Random(1)
    for state, accuracies in ACCURACIES.items():
        for accuracy in accuracies:
            while (drawn := space.sample(rng)).key in taken:
                pass
            taken.add(drawn.key)
            add(found, space, drawn, state, accuracy)
    folder = found.folder
    (folder / "weights").mkdir(parents=True)
    for trial in found.trials:
        (folder / "weights" / f"{trial.number}.safetensors").write_bytes(bytes(100))
        kept = folder / "checkpoints" / str(trial.number) / "0"
        kept.mkdir(parents=True)
        (kept / "epoch.safetensors").write_bytes(bytes(900))
        (kept / "epoch.json").write_bytes(bytes(100))
    (folder / "backbone.safetensors").write_bytes(bytes(50))
    return found


def add(study: Study, space: SearchSpace, drawn: Any, state: str, accuracy: float) -> None:
    study.optuna.enqueue_trial({site: drawn.specs.get(site, NONE) for site in space.choices})
    row = study.optuna.ask()
    space.draw(row.suggest_categorical)
    row.set_user_attr(FACTS, claim(len(study.trials), drawn, space.cost(drawn)))
    so_far = Score(
        accuracy=accuracy, curve=(accuracy,), epochs=1, seconds=1.0, seed=0, evaluator="train"
    )
    row.set_user_attr(PARTIAL, so_far.as_dict())
    if state == "stopped":
        study.optuna.tell(row, state=TrialState.PRUNED)


def there(study: Study) -> tuple[set[int], set[int]]:
    """The trials that have weights, and those that have a checkpoint."""
    weights = {int(p.stem) for p in (study.folder / "weights").iterdir()}
    return weights, {int(p.name) for p in (study.folder / "checkpoints").iterdir()}


def numbers(study: Study, *states: str) -> set[int]:
    return {t.number for t in study.trials if t.state in states}


def total(folder: Path) -> int:
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != "database.txt")
    return sum(p.stat().st_size for p in files)


def test_the_frontier_the_baseline_and_what_can_go_on_are_kept(study: Study) -> None:
    before = total(study.folder)
    planned = collect(study, dry_run=True)
    assert total(study.folder) == before, "a dry run removes nothing"
    done = collect(study)
    assert {i.path for i in done.dropped} == {i.path for i in planned.dropped}
    front = {t.number for t in study.frontier()}
    assert there(study) == (
        front | {0} | numbers(study, "running"),
        numbers(study, "running", "stopped"),
    )
    assert (study.folder / "backbone.safetensors").exists()
    assert before - done.freed == done.left == total(study.folder)
    assert done.freed > 0 and collect(study).freed == 0
    assert study.workers() == [], "the turn was given back"


def test_a_limit_drops_the_worst_stopped_first_and_never_the_rest(study: Study) -> None:
    collect(study)
    size = total(study.folder)
    by_accuracy = {t.partial.accuracy: t.number for t in study.trials if t.partial}
    running = by_accuracy.pop(0.05)
    stopped = set(by_accuracy.values())
    assert collect(study, limit=size).freed == 0
    collect(study, limit=size - 1)
    assert there(study)[1] == {running} | stopped - {by_accuracy[0.1]}
    collect(study, limit=size - 1001)
    assert there(study)[1] == {running, by_accuracy[0.3]}
    weights, _ = there(study)
    done = collect(study, limit=0)
    assert there(study) == (weights, {running})
    assert done.left == total(study.folder) == 1000 + 100 * len(weights) + 50


def test_what_is_not_a_trials_is_left_alone_or_dropped(study: Study) -> None:
    collect(study)
    strange = study.folder / "weights" / "mine.safetensors"
    strange.touch()
    orphan = study.folder / "weights" / "999.safetensors"
    orphan.touch()
    kept = study.folder / "backbone.checkpoints"
    kept.mkdir()
    (study.folder / "frontier.json").touch()
    collect(study)
    assert strange.exists() and (study.folder / "frontier.json").exists()
    assert not orphan.exists() and not kept.exists()
    (study.folder / "backbone.safetensors").unlink()
    kept.mkdir()
    collect(study)
    assert kept.exists(), "the backbone's training goes on from it"


def test_the_finals_files_are_kept_until_it_is_done(fake_study: FakeStudy) -> None:
    study = fake_study(4, failures=0, final={"seeds": 1, "test": False})
    backbone = study.folder / "final" / "seed0" / "backbone.safetensors"
    backbone.parent.mkdir(parents=True)
    backbone.write_bytes(bytes(10))
    assert collect(study).freed == 0
    for contender in contenders(study.trials, study.frontier()):
        cost = study.trials[0].cost
        made = Evaluation(seed=0, architecture=contender.architecture, cost=cost, val=0.5)
        study.optuna.set_user_attr(made.name, made.as_dict())
    assert collect(study).freed == 10 and not backbone.exists()


def test_what_cannot_be_removed_is_named_and_counts_as_kept(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user's, say."""
    (folder, *_) = (i.path for i in collect(study, dry_run=True).dropped if i.path.is_dir())
    (file, *_) = (i.path for i in collect(study, dry_run=True).dropped if i.path.is_file())
    unlink, size = Path.unlink, total(study.folder)

    def refuse(path: Path, missing_ok: bool = False) -> None:
        if path == file:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", refuse)
    (folder / "more").write_bytes(b"part")
    size += 4

    def part(path: Path, **options: Any) -> None:
        if path == folder:
            unlink(path / "more", missing_ok=True)
        else:
            rmtree(path, **options)

    monkeypatch.setattr(files, "rmtree", part)
    done = collect(study)
    assert {i.path for i in done.stuck} == {file, folder} <= {i.path for i in done.kept}
    assert [i.bytes for i in done.dropped if i.path == folder] == [4]
    assert size - done.freed == done.left == total(study.folder)
    options = ["gc", "--storage", study.storage, "--study", study.name]
    said = CliRunner().invoke(app, options)
    assert said.exit_code == 1 and said.stdout.startswith("freed 0 bytes")
    assert f"{file} cannot be removed" in said.stderr and f"{folder} cannot" in said.stderr
    monkeypatch.undo()
    assert CliRunner().invoke(app, options).exit_code == 0 and not folder.exists()


def test_the_command_says_what_it_freed_and_what_would_be_needed(study: Study) -> None:
    options = ["gc", "--storage", study.storage, "--study", study.name]
    dry = CliRunner().invoke(app, [*options, "--dry-run"])
    assert dry.exit_code == 0 and "would free" in dry.output
    done = CliRunner().invoke(app, options)
    assert done.exit_code == 0 and done.output == dry.output.replace("would free", "freed")
    assert "checkpoints/1  1 kB  its trial is scored" in done.output
    short = CliRunner().invoke(app, [*options, "--max-gb", "1e-9"])
    assert short.exit_code == 1 and "not finished need" in short.output
    assert there(study)[1] == numbers(study, "running")
    assert CliRunner().invoke(app, [*options, "--max-gb", "-1"]).exit_code == 2
    assert CliRunner().invoke(app, ["gc"]).exit_code != 0


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (2.5e6, "2.5 MB"), (1.25e9, "1.25 GB")],
)
def test_size_text(count: float, text: str) -> None:
    assert size_text(count) == text


@pytest.mark.parametrize("name", ["final", "weights", "checkpoints"])
def test_a_study_may_be_named_as_one_of_its_folders(fake_study: FakeStudy, name: str) -> None:
    study = fake_study(6, study=name)
    study.folder.mkdir(parents=True, exist_ok=True)
    backbone = study.folder / "backbone.safetensors"
    backbone.write_bytes(bytes(50))
    assert [item.path for item in collect(study).kept] == [backbone]
    assert backbone.exists()


def test_what_a_person_put_there_stays(study: Study) -> None:
    names = "checkpoints/3.bak", "weights/3.bak.safetensors", "backbone.bak", "final/seed0.bak"
    mine = [study.folder / name for name in (*names, ".notes.draft")]
    for path in mine:
        path.mkdir(parents=True)
    found = collect(study)
    assert not {item.path for item in (*found.kept, *found.dropped)} & set(mine)
    assert all(path.exists() for path in mine)


def test_what_killed_writers_leave_goes_when_nobody_works(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ".backbone.safetensors.draft", "weights/.5.safetensors.0f3a.draft"
    drafts = [study.folder / name for name in names]
    for draft in drafts:
        draft.write_bytes(bytes(10))
    with monkeypatch.context() as patch:
        patch.setattr(Study, "workers", lambda self: [{"pid": 1}])
        assert set(drafts) <= {item.path for item in collect(study).kept}
    assert set(drafts) <= {item.path for item in collect(study).dropped}
    assert not any(draft.exists() for draft in drafts)
