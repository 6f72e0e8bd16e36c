"""`nasattn train`: one architecture, from scratch."""

import json
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_search import SPACE, Write, write
from typer.testing import CliRunner

from nasattn.cli import app
from nasattn.config import Experiment
from nasattn.data import load
from nasattn.errors import UserError
from nasattn.evaluate.candidate import score_test, train_architecture
from nasattn.space import SearchSpace

__all__ = ["write"]


def test_a_training_of_its_own_leaves_its_weights_where_it_is_told(
    write: Write, tmp_path: Path
) -> None:
    """Through a link, readable for others, the same twice; its figures are those of the weights."""
    experiment, named, place = write(), tmp_path / "a.yaml", tmp_path / "far" / "w.safetensors"
    architecture = SearchSpace.of(Experiment.load(experiment).space).sample(random.Random(1))
    architecture.save(named)
    place.parent.mkdir()
    (tmp_path / "link").symlink_to(place)
    found = []
    for out in ("link", "other"):
        arguments = [
            "train",
            str(named),
            "--experiment",
            str(experiment),
            "--test",
            "--epochs",
            "1",
        ]
        done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / out)])
        assert done.exit_code == 0, done.output
        found.append(json.loads(done.stdout))
    assert (tmp_path / "link").is_symlink()
    (tmp_path / "plain").write_text("")
    assert place.stat().st_mode == (tmp_path / "plain").stat().st_mode
    weights, other = load_file(place), load_file(tmp_path / "other")
    assert all(torch.equal(weights[key], other[key]) for key in other)
    told = [{k: v for k, v in f.items() if k not in ("weights", "seconds")} for f in found]
    assert told[0] == told[1]
    settings = Experiment.load(experiment)
    data = load(settings.data, architecture.input, architecture.classes)
    assert score_test(architecture, weights, settings, data) == found[0]["test"]


@pytest.mark.parametrize("kind", ["a folder", "no file", "a link to itself"])
def test_a_training_that_could_not_leave_its_weights_does_not_begin(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("nasattn.evaluate.candidate.load", None)
    out, settings = tmp_path / "out", Experiment.load(write())
    {"a folder": out.mkdir, "no file": lambda: os.mkfifo(out)}.get(
        kind, lambda: out.symlink_to(out)
    )()
    architecture = SearchSpace.of(settings.space).baseline()
    with pytest.raises(UserError, match=f"out is {kind}; allowed: a file"):
        train_architecture(
            architecture, settings, out, epochs=1, on_test=False, tick=lambda *_: None
        )
    assert os.path.lexists(out) and (kind == "a link to itself" or not out.is_file())


def test_batches_of_one_are_refused_where_a_norm_sees_one_value(
    write: Write, tmp_path: Path
) -> None:
    rows = [[1, 16, 1, 4], [1, 16, 1, 4], [1, 16, 1, 4]]
    space = SPACE | {"backbone": {"name": "mobilenet_v2", "width": 0.25, "rows": rows}}
    settings = Experiment.load(write(space=space, pretrain={"batch_size": 1}))
    architecture = SearchSpace.of(settings.space).baseline()
    with pytest.raises(UserError, match=r"pretrain\.batch_size: got 1; allowed: from 2"):
        train_architecture(
            architecture, settings, tmp_path / "w", epochs=1, on_test=False, tick=lambda *_: None
        )


def test_a_training_does_not_take_the_place_of_an_export(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = write()
    monkeypatch.chdir(tmp_path)
    architecture = SearchSpace.of(Experiment.load(experiment).space).baseline()
    architecture.save("a.yaml")
    weights, arguments = Path("weights.safetensors"), ["train", "a.yaml", "--epochs", "1"]
    arguments += ["--experiment", str(experiment)]
    save_file({"w": torch.zeros(1)}, weights, {"key": "x", "accuracy": "0.5"})
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, UserError) and "--out FILE" in str(done.exception)
    assert load_file(weights).keys() == {"w"}
    assert CliRunner().invoke(app, [*arguments, "--out", str(weights)]).exit_code == 0, "it is told"
    assert CliRunner().invoke(app, arguments).exit_code == 0, "its own last one is replaced"
    assert "w" not in load_file(weights)
