"""What several test files need."""

import os
import random
import subprocess
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from nasattn.architecture import NONE, Architecture
from nasattn.config import Experiment
from nasattn.pricing import Candidates
from nasattn.record import Score
from nasattn.search.opening import open_study
from nasattn.search.study import FACTS, REASON, SCORE, Study, claim
from nasattn.space import SearchSpace

ROOT = Path(__file__).parents[1]
FakeStudy = Callable[..., Study]


def run_script(name: str, *arguments: str) -> str:
    """What a script of tests/ prints; skips where its server is not installed."""
    done = subprocess.run([ROOT / "tests" / name, *arguments], capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """A real PostgreSQL: the one CI started, else one of this session."""
    if url := os.environ.get("NASATTN_TEST_POSTGRES"):
        yield url
        return
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path: the server's user must reach it
        Path(folder).chmod(0o755)
        yield run_script("postgres.sh", "start", f"{folder}/postgres")
        run_script("postgres.sh", "stop", f"{folder}/postgres")


@pytest.fixture
def postgres(postgres_server: str) -> str:
    """The URL of a new, empty PostgreSQL database, with its driver, as an experiment keeps it."""
    import psycopg

    name = f"test_{uuid.uuid4().hex}"
    with psycopg.connect(postgres_server, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
    server = postgres_server.rpartition("/")[0].partition(":")[2]
    return f"postgresql+psycopg:{server}/{name}"


@pytest.fixture(params=["sqlite", "postgres"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a new database of each kind, and the folder in which a server's studies keep
    their files."""
    monkeypatch.chdir(tmp_path)
    if request.param == "postgres":
        return str(request.getfixturevalue("postgres"))
    return f"sqlite:///{tmp_path}/one.db"


@pytest.fixture(scope="session")
def fake_study(tmp_path_factory: pytest.TempPathFactory) -> FakeStudy:
    """Makes a study of invented scores, its rows as the search writes them: no training.

    trials: rows in all, the baseline first; failures: how many of the last ones failed; seeds:
    repeats of each; other keyword arguments replace the experiment's keys.
    """

    from nasattn.search.loop import space_facts  # not at the top: it takes Lightning's seconds

    def made(trials: int = 24, *, seeds: int = 3, failures: int = 2, **changes: Any) -> Study:
        fields = {
            "study": "fake",
            "storage": f"sqlite:///{tmp_path_factory.mktemp('fake')}/fake.db",
            "space": yaml.safe_load((ROOT / "search_spaces/cued_digits.yaml").read_text()),
            "data": {"name": "cued_digits"},
            "training": {"warm_start": True, "seeds": seeds},
            "budget": {"macs": "1.25x"},
        } | changes
        experiment = Experiment.from_dict(fields)
        space = SearchSpace.of(experiment.space)
        candidates = Candidates.of(experiment, space)
        study = open_study(experiment, space_facts(candidates))
        for slot, architecture in enumerate(_fitting(space, candidates.asked, trials)):
            _add(study, space, slot, architecture, seeds, failed=slot >= trials - failures)
        return study

    return made


def _fitting(space: SearchSpace, limits: Mapping[str, float], count: int) -> list[Architecture]:
    """The plain backbone, then others that fit the budget, each once."""
    rng, found = random.Random(0), [space.baseline()]
    while len(found) < count:
        drawn = space.sample(rng)
        cost = space.cost(drawn).values
        if drawn not in found and all(cost[m] <= limit for m, limit in limits.items()):
            found.append(drawn)
    return found[:count]


def _add(
    study: Study,
    space: SearchSpace,
    slot: int,
    architecture: Architecture,
    seeds: int,
    *,
    failed: bool,
) -> None:
    study.optuna.enqueue_trial({site: architecture.specs.get(site, NONE) for site in space.choices})
    trial = study.optuna.ask()
    assert space.draw(trial.suggest_categorical) == architecture
    cost = space.cost(architecture)
    trial.set_user_attr(FACTS, claim(slot, architecture, cost))
    if failed:
        trial.set_user_attr(REASON, "out of memory")
        study.optuna.tell(trial, state=optuna.trial.TrialState.FAIL)
        return
    score = Score.mean([_score(architecture.specs, slot, repeat) for repeat in range(seeds)])
    trial.set_user_attr(SCORE, score.as_dict())
    values = {**cost.values, "accuracy": score.accuracy}
    study.optuna.tell(trial, [values[o] for o in study.config.objectives])


def _score(specs: dict[str, str], slot: int, repeat: int) -> Score:
    """Criss-cross attention helps, most at stage 3; the rest is little, and noise."""
    worth = {"ccnet": 0.17, "lightnl": 0.05, "non_local": 0.02, "gcnet": 0.0, "se": -0.01}
    place = {"stage2.0": 0.7, "stage2.1": 0.9, "stage3.0": 1.0, "stage4.0": 0.5}
    effects = [worth[spec.partition("(")[0]] * place[site] for site, spec in specs.items()]
    rng = random.Random(1000 * slot + repeat)
    accuracy = min(0.99, 0.72 + sum(effects) + rng.gauss(0.0, 0.01))
    return Score(
        accuracy=accuracy, curve=(accuracy,), epochs=1, seconds=9.0, seed=repeat, evaluator="train"
    )


# A network that builds in milliseconds, with every kind of site: inside and after a skip, no skip.
TINY = """\
backbone:
  name: mobilenet_v2
  width: 0.5
  stem_stride: 1
  head: 16
  divisor: 4
  dropout: 0.0
  rows: [[1, 16, 1, 1], [2, 16, 1, 1], [2, 24, 2, 2]]
input: [1, 16, 16]
classes: 4
sites: ["stage*.*", "stage*.*.project"]
blocks:
  lightnl: {ratio: [0.25, 0.5], stride: [1, 2]}
  se: {ratio: 0.25}
  ccnet:
max_blocks: 2
"""


@pytest.fixture(scope="session")
def tiny_space_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="session")
def tiny_space(tiny_space_file: Path) -> SearchSpace:
    return SearchSpace.load(tiny_space_file)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow ones first, so that at the end no process waits for one."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
