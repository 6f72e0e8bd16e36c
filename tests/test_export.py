"""What is exported, loaded again by its own README, computes what the searched network computes."""

import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, FakeStudy
from PIL import Image
from safetensors import safe_open
from test_search import Write, by_formula, write
from torch import Tensor, nn
from typer.testing import CliRunner

import nasattn
from nasattn import export
from nasattn.cli import app
from nasattn.config import ImageFolder
from nasattn.data import load
from nasattn.errors import UserError
from nasattn.export import ExportRefused, check_export, export_trial, weights_path
from nasattn.record import Trial
from nasattn.search.opening import load_study
from nasattn.search.study import Study
from nasattn.skeleton import changes

__all__ = ["write"]

NAMES = ["README.md", "architecture.yaml", "model.onnx", "weights.safetensors"]
WHY = "the export's packages are not installed: pip install 'nasattn[export]'"


class Exported:
    """One export of a network with two blocks that act, made once for all tests."""

    def __init__(self, study: Study, folder: Path) -> None:
        self.study, self.folder = study, folder
        self.trial = next(
            t for t in study.trials if t.score and len(t.architecture.placements) == 2
        )
        self.network = lively(self.trial, seed=0)
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
        self.text = export_trial(study, self.trial, self.network.state_dict(), folder)
        self.readme = (folder / "README.md").read_text()


def lively(trial: Trial, seed: int) -> nn.Module:
    """The trial's network with random weights, what begins at zero included, so that blocks act."""
    torch.manual_seed(seed)
    network = nasattn.build(trial.architecture).eval()
    with torch.no_grad():
        for value in network.state_dict().values():
            if value.is_floating_point():
                vector = value.ndim <= 1  # a bias, a norm's part, a gate: a variance stays positive
                value += 0.5 * torch.rand_like(value) if vector else 0.1 * torch.randn_like(value)
    return network


@pytest.fixture(scope="module")
def fakes(fake_study: FakeStudy) -> Study:
    return fake_study(8, seeds=3, failures=0)


@pytest.fixture(scope="module")
def exported(fakes: Study, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    for name in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(name, reason=WHY)
    return Exported(fakes, tmp_path_factory.mktemp("export") / "out")


def run_readme(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The names that each Python block of the README leaves behind."""
    monkeypatch.chdir(exported.folder)
    spaces: list[dict[str, Any]] = []
    for code in re.findall(r"```python\n(.*?)```", exported.readme, flags=re.DOTALL):
        spaces.append({})
        exec(code, spaces[-1])
    return spaces


def test_the_readme_loads_exactly_the_eager_network(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, run = run_readme(exported, monkeypatch)
    assert loaded["architecture"] == exported.trial.architecture
    image = torch.randn(4, *exported.trial.architecture.input)
    with torch.no_grad():
        assert torch.equal(loaded["network"](image), exported.network(image))
        plain = exported.network(torch.zeros(1, *exported.trial.architecture.input))
    torch.testing.assert_close(torch.from_numpy(run["logits"]), plain, rtol=1e-4, atol=1e-5)


def test_the_blocks_act(exported: Exported) -> None:
    """By far more than the tolerance of the comparisons, which would else say nothing of them."""
    image = torch.randn(2, *exported.trial.architecture.input)
    for placement in exported.trial.architecture.placements:
        other = lively(exported.trial, seed=0)
        other.get_submodule(placement.site).attention = nn.Identity()
        with torch.no_grad():
            eager = exported.network(image)
            assert (other(image) - eager).abs().max() > 2e-3 * eager.abs().max()


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_onnx_takes_any_batch(exported: Exported, batch: int) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(exported.folder / "model.onnx")
    (image,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (image.name, image.shape[1:]) == ("image", list(exported.trial.architecture.input))
    assert (logits.name, logits.shape[1]) == ("logits", exported.trial.architecture.classes)
    x = torch.randn(batch, *exported.trial.architecture.input)
    with torch.no_grad():
        eager = exported.network(x)
    found = torch.from_numpy(session.run(None, {"image": x.numpy()})[0])
    torch.testing.assert_close(found, eager, rtol=0.0, atol=1e-4 * float(eager.abs().max()))


def test_the_files_name_what_they_are(exported: Exported) -> None:
    import onnx

    trial = exported.trial
    assert trial.score is not None
    own = trial.score.repeats[0].accuracy  # the weights are the first seed's
    facts = {"key": trial.architecture.key, "accuracy": f"{own:.6f}"}
    assert f"the first seed's, of {own:.4f}." in (exported.folder / "README.md").read_text()
    with safe_open(exported.folder / "weights.safetensors", "pt") as file:
        assert file.metadata() == facts
    model = onnx.load(exported.folder / "model.onnx")
    assert {p.key: p.value for p in model.metadata_props} == facts
    assert nasattn.Architecture.load(exported.folder / "architecture.yaml").key == facts["key"]


def test_the_readme_has_the_records_figures(exported: Exported) -> None:
    trial, baseline = exported.trial, exported.study.trials[0]
    assert trial.score is not None and baseline.score is not None
    table = dict(
        (cells[1], cells[2:4])
        for cells in ([c.strip() for c in line.split("|")] for line in exported.readme.splitlines())
        if len(cells) == 5
    )
    for column, score in enumerate((trial.score, baseline.score)):
        spread = torch.tensor(score.accuracies, dtype=torch.float64).std().item()
        expected = f"{score.accuracy:.4f} ± {spread:.4f} (n=3)"
        assert table["validation accuracy"][column] == expected
    for metric, value in trial.cost.values.items():
        plain = baseline.cost.values[metric]
        assert table[metric] == [f"{value:,} ({value / plain:.3f}x)", f"{plain:,}"]
    for site, spec in trial.architecture.specs.items():
        assert f"`{spec}` after `{site}`" in exported.readme
    assert f"torch {torch.__version__}" in exported.readme


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "kind", ["wide.jpg", "alpha.png", "grey.png", "deep.png", "deep.tiff", "turned.jpg"]
)
def test_the_readme_prepares_an_image_as_the_validation_did(
    fake_study: FakeStudy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    channels: int,
    kind: str,
) -> None:
    rng = np.random.default_rng(0)
    depth = {"alpha.png": 4, "grey.png": 1}.get(kind, 3)
    pixels = rng.integers(0, 256, (70, 130, depth), np.uint8)
    image = Image.fromarray(pixels.squeeze())
    if "deep" in kind:
        image = Image.fromarray(rng.integers(0, 65536, (70, 130)).astype(np.uint16))
    exif = image.getexif()
    if kind == "turned.jpg":
        exif[0x0112] = 6
    for number in range(8):
        path = tmp_path / f"photos/{'ab'[number % 2]}/{number}{Path(kind).suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path, exif=exif)
    photo = f"photo{Path(kind).suffix}"
    image.save(tmp_path / photo, exif=exif)
    config = ImageFolder.model_validate({"name": "image_folder", "root": tmp_path / "photos"})
    shape = (channels, 32, 48)
    study = fake_study(2)
    monkeypatch.setattr(study, "config", study.config.model_copy(update={"data": config}))
    data = load(config, shape, 2)
    monkeypatch.setattr(study, "facts", {**study.facts, "images": data.facts})
    text = export._prepared(study, shape)
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names: dict[str, Any] = {}
    monkeypatch.chdir(tmp_path)
    exec(code.replace("photo.jpg", photo), names)
    expected, _ = data.val.__getitems__([0])
    torch.testing.assert_close(torch.from_numpy(names["image"]), expected, rtol=0, atol=1e-6)
    assert text.endswith("\n\n    0  a\n    1  b\n")


def test_the_readme_has_the_finals_figures(
    fakes: Study, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    gain = {"mean": 0.01, "low": -0.1, "high": 0.12, "n": 2}
    figures = {"mean": 0.52, "low": 0.5, "high": 0.54, "n": 2, "gain": gain}
    row = {"number": exported.trial.number, "test": figures}
    final = {"done": 4, "test": True, "seeds": 2, "rows": [{"number": 0, "test": figures}, row]}
    monkeypatch.setattr(Study, "final", lambda self: final)
    said = export._final(fakes, exported.trial)
    assert "2 seeds: test accuracy 0.5200 [0.5000, 0.5400]" in said
    assert ", +0.0100 [-0.1000, +0.1200] over the plain backbone (means" in said
    final["done"] = 0
    assert export._final(fakes, exported.trial) == ""


def test_other_files_stay_and_nothing_else_is_left(exported: Exported) -> None:
    assert sorted(p.name for p in exported.folder.iterdir()) == sorted([*NAMES, "notes.txt"])
    assert (exported.folder / "notes.txt").read_text() == "mine"
    assert "largest difference from eager" in exported.text


def test_files_of_a_person_are_not_replaced(exported: Exported, tmp_path: Path) -> None:
    check_export(exported.folder)
    mine = tmp_path / "architecture.yaml"
    mine.write_text("mine")
    with pytest.raises(UserError, match=r"^--out: the export would replace architecture\.yaml in "):
        check_export(tmp_path)
    for folder in (exported.folder, tmp_path):
        with pytest.raises(UserError, match=r"architecture\.yaml is there and holds no weights"):
            weights_path(folder / "architecture.yaml")
    assert mine.read_text() == "mine"
    (tmp_path / "README.md").write_text("# Trial and error\n")
    with pytest.raises(UserError, match=r"would replace architecture\.yaml, README\.md in "):
        check_export(tmp_path)
    shutil.copy(exported.folder / "README.md", tmp_path)
    check_export(tmp_path)
    beside = tmp_path / "large" / "model.onnx.data"
    beside.parent.mkdir()
    beside.write_text("mine")
    with pytest.raises(UserError, match=r"would replace model\.onnx\.data in "):
        check_export(beside.parent)
    with export._replacing(beside.parent) as draft:
        (draft / "README.md").write_text(export.OURS)
    assert not beside.exists(), "of an earlier export, whose network was larger"
    (tmp_path / "model.onnx").mkdir()
    with pytest.raises(UserError, match=r"^--out: \S+model\.onnx is a folder"):
        check_export(tmp_path)
    assert mine.read_text() == "mine"
    weights = exported.folder / "weights.safetensors"
    (tmp_path / "empty").touch()
    for path in (weights, tmp_path / "empty", tmp_path / "new"):
        assert weights_path(path) == path


def test_the_readme_tells_blocks_that_are_placed_from_the_backbones_own(write: Write) -> None:
    pytest.importorskip("onnxruntime", reason=WHY)
    space = {
        "backbone": {"name": "autonl", "rows": [[3, 8, 2, 3, 0.0], [3, 8, 1, 3, 0.0]]},
        "vary": {"expansion": [3, 6], "kernel": [3], "optional": True},
        "input": [1, 32, 64],
        "classes": 10,
        "sites": ["stage*.*"],
        "blocks": {"gcnet": {"ratio": 0.25}},
    }
    study = by_formula(write(space=space, training={"warm_start": False}), 12)
    own = "\nThe backbone's own blocks, where they are not the plain one's:\n\n"
    for trial in study.trials:
        changed = changes(study.config.space, trial.architecture.backbone)
        specs = trial.architecture.specs
        blocks = [f"- `{spec}` after `{site}`\n" for site, spec in specs.items()]
        varied = [f"- `{where}`: `{label}`\n" for where, label in changed.items()]
        varied = [line.replace(": `left_out`", " is left out") for line in varied]
        none = "- none\n" if varied else "- none: this is the plain backbone\n"
        told = "".join(blocks) or none
        told += own + "".join(varied) if varied else ""
        assert f"):\n\n{told}\n| | this" in export._readme(study, trial, "")


def test_no_path_of_this_machine_is_in_the_files(exported: Exported) -> None:
    for name in NAMES:
        data = (exported.folder / name).read_bytes()
        assert str(ROOT).encode() not in data
        assert b'.py"' not in data
        assert sys.prefix.encode() not in data


def test_an_onnx_file_of_other_weights_is_refused(
    exported: Exported, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The comparison is real: the exporter is replaced by one that writes another network."""

    def stale(network: nn.Module, shape: Any, path: Path, facts: Mapping[str, str]) -> None:
        shutil.copy(exported.folder / "model.onnx", path)

    before = {p.name: p.read_bytes() for p in exported.folder.iterdir()}
    monkeypatch.setattr(export, "_write_onnx", stale)
    other = lively(exported.trial, seed=1).state_dict()
    for out in (tmp_path / "new", exported.folder):
        with pytest.raises(ExportRefused, match="largest difference from eager"):
            export_trial(exported.study, exported.trial, other, out)
    assert not (tmp_path / "new").exists()
    assert {p.name: p.read_bytes() for p in exported.folder.iterdir()} == before


@pytest.mark.parametrize("bad", [float("nan"), 2e-3, float("inf")])
def test_what_is_beyond_the_limit_or_unknown_is_refused(
    exported: Exported, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bad: float
) -> None:
    monkeypatch.setattr(export, "_write_onnx", lambda *rest: rest[2].touch())
    monkeypatch.setattr(export, "_difference", lambda *rest: (bad, bad))
    with pytest.raises(ExportRefused, match=r"allowed: 0\.001"):
        export_trial(exported.study, exported.trial, exported.network.state_dict(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_the_exporter_cannot_express_is_refused(
    exported: Exported, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(*rest: object, **options: object) -> None:
        raise RuntimeError("no such operator\nlong story")

    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(ExportRefused, match=r"cannot be written as ONNX: no such operator$"):
        export_trial(exported.study, exported.trial, exported.network.state_dict(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_weights_of_another_network_are_refused(exported: Exported, tmp_path: Path) -> None:
    weights: dict[str, Tensor] = dict(exported.network.state_dict())
    weights.popitem()
    with pytest.raises(UserError, match="not the weights of trial"):
        export_trial(exported.study, exported.trial, weights, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_the_old_files(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*rest: object) -> str:
        raise OSError(28, "No space left on device")

    before = {p.name: p.read_bytes() for p in exported.folder.iterdir()}
    monkeypatch.setattr(export, "_write_onnx", full)
    with pytest.raises(UserError, match="No space left"):
        export_trial(exported.study, exported.trial, exported.network.state_dict(), exported.folder)
    assert {p.name: p.read_bytes() for p in exported.folder.iterdir()} == before


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"onnxruntime.*pip install 'nasattn\[export\]'"):
        check_export(tmp_path)


def test_a_path_that_cannot_be_written_is_refused(exported: Exported, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere")):
        with pytest.raises(UserError, match="--out: "):
            check_export(out)
    check_export(tmp_path / "a" / "b")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_strangers_yaml_runs_no_code(tmp_path: Path) -> None:
    trap = tmp_path / "trap"
    text = f"backbone: !!python/object/apply:os.mkdir ['{trap}']\nclasses: 2\ninput: [1, 8, 8]\n"
    (tmp_path / "architecture.yaml").write_text(text)
    yaml.unsafe_load(text)  # the trap works ...
    trap.rmdir()
    with pytest.raises(UserError, match="not valid YAML"):
        nasattn.Architecture.load(tmp_path / "architecture.yaml")
    assert not trap.exists()  # ... and was not sprung


@pytest.mark.slow
def test_from_a_search_to_a_file_that_scores_the_same(tmp_path: Path) -> None:
    """The command, on a study really searched, also once its weights are gone: the ONNX file
    reaches on the validation images the accuracy that the study recorded."""
    for name in ("onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(name, reason=WHY)
    import onnxruntime

    space = yaml.safe_load((ROOT / "search_spaces/cued_digits.yaml").read_text())
    fields = {
        "study": "real",
        "storage": "sqlite:///runs/real.db",
        "space": space,
        "data": {"name": "cued_digits", "train": 512, "val": 256, "test": 64},
        "training": {"epochs": 1, "batch_size": 32, "lr": 0.01, "warm_start": True},
        "pretrain": {"epochs": 4},
        "search": {"sampler": "random", "trials": 3},
    }
    file = tmp_path / "experiment.yaml"
    file.write_text(yaml.safe_dump(fields))
    runner = CliRunner()
    assert runner.invoke(app, ["search", str(file)]).exit_code == 0
    study = load_study(f"sqlite:///{tmp_path}/runs/real.db", "real")
    placed = [t for t in study.trials if t.architecture.placements][-1]
    data = load(study.config.data, placed.architecture.input, 10)
    for trial, again in ((study.trials[0], False), (placed, True)):
        if again:
            shutil.rmtree(study.folder)
        out = tmp_path / f"out{again}"
        arguments = ["export", str(file), "--out", str(out), "--select", f"trial={trial.number}"]
        result = runner.invoke(app, arguments)
        assert result.exit_code == 0, result.output
        assert ("it is trained again" in result.output) == again
        assert sorted(p.name for p in out.iterdir()) == NAMES
        session = onnxruntime.InferenceSession(out / "model.onnx")
        right = 0
        for x, y in data.loader("val", 64, 0):
            logits = session.run(None, {"image": x.numpy()})[0]
            right += int((torch.from_numpy(logits).argmax(1) == y).sum())
        assert trial.score is not None
        assert right / 256 == pytest.approx(trial.score.accuracy, abs=1.5 / 256)
