"""One study's database, above all with several processes on it: PostgreSQL and sqlite, both real."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from nasattn import load_study
from nasattn.config import Experiment
from nasattn.errors import UserError
from nasattn.search.database import connect
from nasattn.search.study import FACTS, Study, open_study

FIELDS: dict[str, Any] = {
    "study": "shared",
    "space": {
        "backbone": {"name": "mobilenet_v2", "width": 0.25, "rows": [[1, 32, 1, 1]]},
        "sites": ["stage*.*"],
        "blocks": {"se": {}},
    },
    "data": {"name": "cued_digits"},
}
KNOWN = {"plain": {"macs": 1}, "limits": {}, "cheapest": {"macs": 1}, "reference": {"macs": 2}}


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "postgres":
        return str(request.getfixturevalue("postgres"))
    return f"sqlite:///{tmp_path}/one.db"


def opened(url: str, **changes: Any) -> Study:
    experiment = Experiment.from_dict(FIELDS | {"storage": url} | changes)
    return open_study(experiment, KNOWN, optuna.samplers.RandomSampler())


def test_many_create_one_study_at_once(url: str) -> None:
    """Each with connections of its own, as processes have; Optuna alone fails here."""
    found: list[Study] = []
    errors: list[BaseException] = []
    together = threading.Barrier(6)

    def create() -> None:
        together.wait()
        try:
            found.append(opened(url))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=create) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(found) == 6
    assert len({study.optuna._study_id for study in found}) == 1
    assert [s.study_name for s in connect(url).get_all_studies()] == ["shared"]
    assert all(study.facts == found[0].facts for study in found)
