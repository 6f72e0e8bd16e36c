"""Experiment and space files: what is read, and how every mistake is named."""

import copy
import itertools
import json
import os
import random
import shutil
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from nasattn.architecture import Architecture
from nasattn.config import Experiment, Limit, differences, storage_url
from nasattn.document import dump_yaml, load_yaml, read_number, read_whole
from nasattn.errors import UserError
from nasattn.space_file import SpaceFile

SPACE = """\
backbone:
  name: mobilenet_v2
  width: 0.5
  rows: [[1, 16, 1, 1], [3, 24, 2, 2]]
input: [1, 32, 64]
classes: 10
sites: ["stage2.*"]
blocks:
  lightnl: {ratio: [0.125, 0.25], stride: 1}
  ccnet:
max_blocks: 2
"""

EXPERIMENT = """\
study: cued-digits
storage: sqlite:///runs/nasattn.db
space: space.yaml
data: {name: cued_digits, train: 16000, noise: 0.1}
training:
  epochs: 2
  lr: 5.0e-3
  optimizer: adamw
pretrain: {epochs: 3}
objectives: [accuracy, macs]
budget: {macs: 1.25x, params: 60k}
search: {sampler: tpe, trials: 40, seed: 0}
trainer: {accelerator: cpu}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "space.yaml").write_text(SPACE)
    (tmp_path / "e.yaml").write_text(EXPERIMENT)
    return tmp_path


def refusal(path: Path, text: str | bytes) -> list[str]:
    """The lines of the message, without the file's name where a line begins with it."""
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        (SpaceFile if path.name == "space.yaml" else Experiment).load(path)
    return [line.removeprefix(f"{path}:").strip() for line in str(caught.value).splitlines()]


def test_a_good_experiment(folder: Path) -> None:
    experiment = Experiment.load(folder / "e.yaml")
    assert experiment.space == SpaceFile.load(folder / "space.yaml")
    assert experiment.space.blocks == {
        "lightnl": {"ratio": (0.125, 0.25), "stride": (1,)},
        "ccnet": {},
    }
    assert experiment.space.backbone["head"] == 1280, "defaults are filled in"
    assert (experiment.training.epochs, experiment.training.lr) == (2, 0.005)
    assert experiment.costs == ("macs",)
    assert experiment.budget["params"] == Limit(value=60_000.0)
    assert experiment.budget["macs"].resolve(1000) == 1250.0
    for n, plain in itertools.product(range(1, 400), (100, 300_000_000)):
        # In floating point 1.15 * 100 is less than 115.
        assert Limit.parse(f"{n / 100}x").resolve(plain) == n * plain // 100


def test_what_may_be_left_out() -> None:
    least = {"study": "s", "data": {"name": "cued_digits"}}
    space = {"backbone": {"name": "mobilenet_v2"}, "sites": ["stage*.*"], "blocks": {"se": None}}
    experiment = Experiment.from_dict(least | {"space": space})
    assert (experiment.space.input, experiment.space.classes) == ((3, 224, 224), 1000)
    assert experiment.space.max_blocks is None
    sizes = experiment.data.model_dump()
    assert (sizes["train"], sizes["val"], sizes["test"], sizes["seed"]) == (16000, 4000, 4000, 0)
    assert experiment.objectives == ("accuracy", "macs")
    assert experiment.storage == f"sqlite:///{Path.cwd()}/runs/nasattn.db"
    assert (experiment.training.warm_start, experiment.training.seeds) == (False, 1)
    assert experiment.budget == {} and experiment.search.workers == 1


def test_the_shares_of_a_folder_of_images(folder: Path) -> None:
    data = "data: {name: image_folder, root: pictures, val: 0.75, test: 0.25}"
    (line,) = refusal(folder / "e.yaml", EXPERIMENT.replace(EXPERIMENT.splitlines()[3], data))
    assert line.startswith(
        "4: data: val and test take 0.75 + 0.25 of the images; allowed: together"
    )
    data = data.replace("0.75", "0.7")
    (folder / "e.yaml").write_text(EXPERIMENT.replace(EXPERIMENT.splitlines()[3], data))
    assert Experiment.load(folder / "e.yaml").data.name == "image_folder"


def test_pretrain_is_as_training_where_it_is_silent(folder: Path) -> None:
    pretrain = Experiment.load(folder / "e.yaml").pretrain
    assert (pretrain.epochs, pretrain.lr, pretrain.optimizer) == (3, 0.005, "adamw")
    (folder / "e.yaml").write_text(EXPERIMENT.replace("pretrain: {epochs: 3}\n", ""))
    assert Experiment.load(folder / "e.yaml").pretrain.epochs == 2
    quick = EXPERIMENT.replace("  epochs: 2", "  epochs: 2\n  block_lr: 10.0")
    (folder / "e.yaml").write_text(quick)
    found = Experiment.load(folder / "e.yaml")
    assert (found.training.block_lr, found.pretrain.block_lr) == (10.0, 1.0)


# What is changed in EXPERIMENT, the place of the one mistake, and what its message says.
BROKEN: list[tuple[str, str, str, tuple[str, ...]]] = [
    # keys
    (
        "trainer:",
        "trianer:",
        "13: trianer",
        ("unknown key; allowed: study, storage", "mean 'trainer'?"),
    ),
    (
        "  epochs",
        "  epoch",
        "6: training.epoch",
        ("unknown key; allowed: epochs,", "mean 'epochs'?"),
    ),
    ("sampler", "smapler", "12: search.smapler", ("unknown key; allowed: sampler, ", "'sampler'?")),
    ("train: 1", "trian: 1", "4: data.trian", ("unknown key; allowed: name, train, ", "'train'?")),
    (
        "params:",
        "parms:",
        "11: budget.parms",
        ("got 'parms'; allowed: 'macs', ", "'params'?"),
    ),
    ("space: space.yaml\n", "", "space", ("this key is missing",)),
    ("name: cued_digits, ", "", "4: data.name", ("this key is missing",)),
    ("seed: 0", "5: 0", "12: search.5", ("got 5; keys should be strings",)),
    # types
    ("epochs: 2", "epochs: two", "6: training.epochs", ("got 'two'; should be a valid integer",)),
    ("epochs: 2", "epochs: 2.5", "6: training.epochs", ("got 2.5; should be a valid integer",)),
    ("epochs: 2", "epochs: true", "6: training.epochs", ("got True; should be a valid integer",)),
    ("epochs: 2", "epochs: [2]", "6: training.epochs", ("got [2]; should be a valid integer",)),
    ("epochs: 2", "epochs:", "6: training.epochs", ("got None; should be a valid integer",)),
    ("lr: 5.0e-3", "lr: fast", "7: training.lr", ("got 'fast'; should be a valid number",)),
    ("lr: 5.0e-3", "lr: .inf", "7: training.lr", ("got '.inf'; should be a valid number",)),
    ("lr: 5.0e-3", "lr: 1e999", "7: training.lr", ("got inf; should be a finite number",)),
    ("cued-digits", "2026", "1: study", ("got 2026; should be a valid string",)),
    ("{accelerator: cpu}", "[cpu]", "13: trainer", ("got ['cpu']; should be a valid mapping",)),
    ("{accelerator: cpu}", "cpu", "13: trainer", ("got 'cpu'; should be a valid mapping",)),
    ("[accuracy, macs]", "macs", "10: objectives", ("got 'macs'; should be a valid list",)),
    (
        "{accelerator: cpu}",
        "{channels_last: on}",
        "13: trainer.channels_last",
        ("got 'on'; ", "bool"),
    ),
    ("{accelerator: cpu}", "{accelerator: cuda}", "13: trainer.accelerator", ("'cuda'", "'gpu'?")),
    ("{accelerator: cpu}", "{devices: 2}", "13: trainer.devices", ("got 2; ", "1", "--workers N")),
    (
        "{name: cued_digits, train: 16000, noise: 0.1}",
        "x",
        "4: data",
        ("got 'x'; should be a valid m",),
    ),
    ("space: space.yaml", "space: 5", "3: space", ("got 5; should be a valid mapping",)),
    # values
    ("train: 16000", "train: 10000000", "4: data.train", ("got 10000000; ", "to 1000000")),
    (
        "epochs: 2",
        "epochs: 0",
        "6: training.epochs",
        ("got 0; should be greater than or equal to 1",),
    ),
    (
        "epochs: 2",
        "epochs: 3e9",
        "6: training.epochs",
        ("should be less than or equal to 2147483647",),
    ),
    ("lr: 5.0e-3", "lr: 0", "7: training.lr", ("got 0; should be greater than 0",)),
    ("noise: 0.1", "noise: 1.5", "4: data.noise", ("got 1.5; should be less than or equal to 1",)),
    ("cued-digits", "a/b", "1: study", ("got 'a/b'; ", "allowed: letters, digits")),
    ("cued-digits", "x" * 101, "1: study", ("at most 100 characters",)),
    (
        "adamw",
        "adam",
        "8: training.optimizer",
        ("got 'adam'; allowed: 'adamw' or 'sgd'", "'adamw'?"),
    ),
    (
        "tpe",
        "tpee",
        "12: search.sampler",
        ("got 'tpee'; allowed: 'frontier', 'tpe'", "mean 'tpe'?"),
    ),
    (
        "cued_digits",
        "cued_digit",
        "4: data.name",
        ("got 'cued_digit'; allowed: 'cued_d", "'cued_digits'?"),
    ),
    (
        "macs]",
        "mac]",
        "10: objectives.1",
        ("got 'mac'; allowed: 'accuracy', 'macs'", "mean 'macs'?"),
    ),
    (", macs]", "]", "10: objectives", ("got ['accuracy']; allowed: accuracy exactly once",)),
    ("macs]", "macs, macs]", "10: objectives", ("each once (macs, params",)),
    (
        "1.25x",
        "1.25y",
        "11: budget.macs",
        ("got '1.25y'; allowed: a number above zero such as 300M",),
    ),
    ("1.25x", "-1x", "11: budget.macs", ("got '-1x'; allowed: a number above zero",)),
    ("1.25x", "x", "11: budget.macs", ("got 'x'; allowed: a number above zero",)),
    ("1.25x", "1e999", "11: budget.macs", ("got inf; allowed: a number above zero",)),
    ("1.25x", "1" * 400, "11: budget.macs", ("allowed: a number above zero",)),
    ("1.25x", "true", "11: budget.macs", ("got True; allowed: a number above zero",)),
    (
        "seed: 0",
        "population: 8",
        "12: search",
        ("population is an option of nsga2; the sampler is tpe",),
    ),
    (
        "seed: 0",
        "workers: 0",
        "12: search.workers",
        ("got 0; should be greater than or equal to 1",),
    ),
    ("sqlite:///", "sqlite://", "2: storage", ("got 'sqlite://runs/nasattn.db'; allowed: a data",)),
    ("sqlite:///", "", "2: storage", ("got 'runs/nasattn.db'; allowed: a database URL such as",)),
    # files and YAML
    (
        "space.yaml",
        "spac.yaml",
        "3: space",
        ("spac.yaml: there is no such file; did you mean 'space.yaml'?",),
    ),
    ("space: space.yaml", "space: .", "3: space", ("cannot be read: ", "Is a directory")),
    ("space: space.yaml", 'space: "a\\0"', "3: space", ("embedded null",)),
    ("objectives", "study", "10", ("not valid YAML: the key 'study' is given twice",)),
    ("  lr", "  epochs", "7", ("not valid YAML: the key 'epochs' is given twice",)),
    (
        "tpe",
        "!!python/object:os.system tpe",
        "12",
        ("the tag 'tag:yaml.org,2002:python/object:os.sy",),
    ),
    (
        "epochs: 2",
        "epochs: !!int two",
        "6",
        ("the tag 'tag:yaml.org,2002:int' is not allowed here",),
    ),
    (
        "[accuracy, macs]",
        "&a [*a]",
        "10",
        ("not valid YAML: found unconstructable recursive node",),
    ),
    ("macs]", "*nowhere]", "10", ("not valid YAML: found undefined alias 'nowhere'",)),
    ("seed: 0", "[a]: 0", "12", ("not valid YAML: a key must be a plain word",)),
    ("macs]", "macs", "11", ("not valid YAML: ",)),
    ("  lr", "\tlr", "7", ("not valid YAML: ",)),
]


@pytest.mark.parametrize(("old", "new", "place", "says"), BROKEN)
def test_a_broken_experiment(
    old: str, new: str, place: str, says: tuple[str, ...], folder: Path
) -> None:
    assert EXPERIMENT.count(old) >= 1
    (line,) = refusal(folder / "e.yaml", EXPERIMENT.replace(old, new, 1))
    assert line.startswith(f"{place}: ")
    for words in says:
        assert words in line


BROKEN_SPACES: list[tuple[str, str, str, tuple[str, ...]]] = [
    (
        "max_blocks",
        "max_block",
        "11: max_block",
        ("unknown key; allowed: backbone", "'max_blocks'?"),
    ),
    ("max_blocks: 2", "max_blocks: 0", "11: max_blocks", ("got 0; should be greater than or",)),
    ("[1, 32, 64]", "[32, 64]", "5: input.2", ("this item is missing",)),
    ("[1, 32, 64]", "[1, 32, 64, 1]", "5: input", ("list should have at most 3 items",)),
    ("[1, 32, 64]", "[1, 32, 0]", "5: input.2", ("got 0; should be greater than or equal to 1",)),
    ('["stage2.*"]', "[]", "7: sites", ("at least 1 item",)),
    ('["stage2.*"]', "stage2", "7: sites", ("got 'stage2'; should be a valid list",)),
    (
        "mobilenet",
        "mobilnet",
        "2: backbone.name",
        ("unknown backbone 'mobilnet_v2'; allowed: mobilenet_v2", "did you mean 'mobilenet_v2'?"),
    ),
    (
        "  name: mobilenet_v2\n",
        "",
        "1: backbone",
        ("the key 'name' is missing; allowed: mobilenet_v2",),
    ),
    (
        "width",
        "wdth",
        "3: backbone.wdth",
        ("has no option 'wdth'; allowed: width,", "mean 'width'?"),
    ),
    ("0.5", "0", "3: backbone.width", ("got 0; allowed: a number from 0.01 to 100",)),
    (
        "[3, 24, 2, 2]",
        "[3, 24]",
        "4: backbone.rows",
        ("got the row [3, 24]; allowed: rows of [expan",),
    ),
    ("[3, 24, 2, 2]", "[3, 24, 9e9, 2]", "4: backbone.rows", ("whole numbers from 1 to 4096",)),
    (
        "lightnl",
        "lightn",
        "9: blocks.lightn",
        ("unknown block 'lightn'; allowed: self_", "'lightnl'?"),
    ),
    (
        "ratio",
        "ratios",
        "9: blocks.lightnl.ratios",
        ("unknown option 'ratios'; allowed: ratio, stri",),
    ),
    (
        "0.125",
        "1.5",
        "9: blocks.lightnl.ratio",
        ("got 1.5; allowed: a number from 0.000976562 to 1",),
    ),
    ("0.125", "a", "9: blocks.lightnl.ratio", ("got 'a'; allowed: a number",)),
    ("0.125", "2.5e-1", "9: blocks.lightnl.ratio", ("got [0.25, 0.25]: a value is given twice",)),
    ("[0.125, 0.25]", "[]", "9: blocks.lightnl.ratio", ("the list is empty",)),
    (
        "stride: 1",
        "stride: 1.5",
        "9: blocks.lightnl.stride",
        ("got 1.5; allowed: a whole number from",),
    ),
    (
        "stride: 1",
        "normalize: ful",
        "9: blocks.lightnl.normalize",
        ("got 'ful'; allowed: full, none; did",),
    ),
    ("ccnet:", "ccnet: 5", "10: blocks.ccnet", ("got 5; allowed: options such as ratio: [0.25]",)),
    (
        "\n  lightnl: {ratio: [0.125, 0.25], stride: 1}\n  ccnet:",
        " []",
        "8: blocks",
        ("valid mapping",),
    ),
    (
        "\n  lightnl: {ratio: [0.125, 0.25], stride: 1}\n  ccnet:",
        " {}",
        "8: blocks",
        ("at least 1 item",),
    ),
]


@pytest.mark.parametrize(("old", "new", "place", "says"), BROKEN_SPACES)
def test_a_broken_space(
    old: str, new: str, place: str, says: tuple[str, ...], folder: Path
) -> None:
    assert SPACE.count(old) >= 1
    text = SPACE.replace(old, new, 1)
    (line,) = refusal(folder / "space.yaml", text)
    assert line.startswith(f"{place}: ")
    for words in says:
        assert words in line
    # Through the experiment: the same, behind the place that names the space's file.
    (outer,) = refusal(folder / "e.yaml", EXPERIMENT)
    assert outer == f"3: space: {folder / 'space.yaml'}:{line}"
    # And inside the experiment's own file.
    inline = "space:\n" + "".join(f"  {row}\n" for row in text.splitlines())
    (inner,) = refusal(folder / "e.yaml", EXPERIMENT.replace("space: space.yaml\n", inline))
    number, _, rest = line.partition(": ")
    assert inner == f"{int(number) + 3}: space.{rest}"


def test_only_a_skeleton_varies(folder: Path) -> None:
    vary = "vary: {expansion: [3], kernel: [3]}\n"
    (line,) = refusal(folder / "space.yaml", SPACE + vary)
    assert "vary: got it with mobilenet_v2; allowed with: autonl" in line
    rows = "[[1, 16, 1, 3, 0]]"
    skeleton = SPACE.replace("_v2", "").replace("mobilenet", "autonl")
    skeleton = skeleton.replace("[[1, 16, 1, 1], [3, 24, 2, 2]]", rows).replace(
        "  width: 0.5\n", ""
    )
    (folder / "space.yaml").write_text(skeleton + vary)
    assert SpaceFile.load(folder / "space.yaml").vary is not None
    for given, said in {
        "expansion: [3, 3], kernel: [3]": "vary.expansion: got 3 twice; allowed: each value once",
        "expansion: [3], kernel: [4]": "vary.kernel: got 4; a kernel is odd",
        "expansion: [3], kernel: [3], se: [0, 0.0]": "vary.se: got 0 twice",
        "expansion: [3], kernel: [3], se: [0.1234567]": "vary.se: got 0.1234567; allowed: numbers",
    }.items():
        (line,) = refusal(folder / "space.yaml", skeleton + f"vary: {{{given}}}\n")
        assert said in line
    (folder / "space.yaml").write_text(skeleton + vary)
    Experiment.load(folder / "e.yaml")
    warm = EXPERIMENT.replace("  epochs: 2", "  warm_start: true")
    (line,) = refusal(folder / "e.yaml", warm)
    assert "warm_start: got true with a space that varies the backbone" in line


def halving(**search: object) -> Experiment:
    training = {"epochs": search.pop("epochs", 9), "schedule": search.pop("schedule", "wsd")}
    fields = yaml.safe_load(EXPERIMENT) | {"space": yaml.safe_load(SPACE), "training": training}
    return Experiment.from_dict(fields | {"search": {"stopping": "pareto_halving"} | search})


def test_rungs_of_halving() -> None:
    assert halving().rungs == (1, 9)
    assert halving(eta=3).rungs == (1, 3, 9)
    assert halving(epochs=10, eta=2).rungs == (1, 2, 5, 10)
    assert halving(epochs=50, eta=4).rungs == (3, 12, 50)
    assert halving(epochs=3).rungs == (1, 3), "no eighth of it is an epoch"
    assert halving(rungs=[2, 9]).rungs == (2, 9)
    assert halving(rungs=[2, 9]).as_dict()["search"]["rungs"] == [2, 9]
    assert halving(stopping="none", schedule="onecycle").rungs == (9,)
    schedule = halving().training
    assert [schedule.decay_epochs(r) for r in (1, 3, 9, 10, 12)] == [1, 1, 2, 2, 3]
    assert halving(stopping="none", schedule="cosine").training.decay_epochs(9) == 9


@pytest.mark.parametrize(
    ("search", "says"),
    [
        ({"schedule": "onecycle"}, r"stopping: got pareto_halving .*onecycle.*; allowed with: wsd"),
        ({"rungs": [3, 3, 9]}, r"rungs: got \[3, 3, 9\]; allowed: .*, increasing, .* \(9\)"),
        ({"rungs": [9]}, r"rungs: got \[9\]; allowed: two or more, increasing, .* \(9\)"),
        (
            {"rungs": [1, 3]},
            r"rungs: got \[1, 3\]; allowed: .*, the last one training.epochs",
        ),
        ({"rungs": [0, 9]}, r"search.rungs.*: got 0"),
        ({"rungs": [1, 9], "stopping": "none"}, "they are of use with search.stopping only"),
        ({"epochs": 1}, r"training.epochs: got 1, .*no rung to stop at; allowed: 2 or more"),
        ({"eta": 1}, "search.eta: got 1; should be greater than 1"),
        ({"eta": 1 + 1e-9}, "search.eta: got 1, by which nothing is halved; allowed: from 1.1"),
    ],
)
def test_rungs_that_are_refused(search: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        halving(**search)


def test_several_mistakes_at_once(folder: Path) -> None:
    text = EXPERIMENT.replace("epochs: 2", "epochs: 0").replace("lr: 5.0e-3", "lr: x")
    text = text.replace("tpe", "tpy").replace("trainer", "trainr").replace("60k", "0")
    lines = refusal(folder / "e.yaml", text)
    assert sorted(line.split(": ")[1] for line in lines) == [
        "budget.params",
        "search.sampler",
        "training.epochs",
        "training.lr",
        "trainr",
    ], "and nothing a second time for pretrain, which takes after training"
    text = SPACE.replace("0.125", "7").replace("stride: 1", "strid: 1").replace("ccnet", "cnet")
    text = text.replace("width: 0.5", "width: 0\n  hed: 1")
    assert [line.split(": ")[1] for line in refusal(folder / "space.yaml", text)] == [
        "backbone.width",
        "backbone.hed",
        "blocks.lightnl.ratio",
        "blocks.lightnl.strid",
        "blocks.cnet",
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "expected a mapping with the keys study, storage, artifacts, space, .*; got nothing"),
        (b"# nothing\n", "got nothing"),
        (b"5", "expected a mapping with the keys .*; got 5"),
        (b"- study: a", "expected a mapping with the keys .*; got \\[{'study': 'a'}\\]"),
        (b"study: a\0b", "not valid YAML: unacceptable character #x0000"),
        (b"\0" * 64, "not valid YAML: unacceptable character #x0000"),
        (b"study: caf\xe9", "cannot be read: 'utf-8' codec can't decode byte 0xe9"),
        (EXPERIMENT.encode("utf-16"), "cannot be read: 'utf-8' codec"),
        (b"study: 'a", "not valid YAML: found unexpected end of stream"),
        (b"study: a\n---\nstudy: b", "2: not valid YAML: but found another document"),
        (b"%YAML 9.9\n---\nstudy: a", "not valid YAML: found incompatible YAML document"),
        (b"[" * 5000, "not valid YAML: maximum recursion depth"),
        (b"a: {" * 5000, "not valid YAML: maximum recursion depth"),
        (b"- " * 5000, "not valid YAML: maximum recursion depth"),
    ],
    ids=range(14),
)
def test_no_experiment_at_all(text: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "e.yaml"
    path.write_bytes(text)
    with pytest.raises(UserError, match=says) as caught:
        Experiment.load(path)
    assert str(caught.value).startswith(f"{path}:")


def test_not_a_file(folder: Path) -> None:
    with pytest.raises(UserError, match=r"cannot be read: .*Is a directory"):
        Experiment.load(folder)
    with pytest.raises(UserError, match=r"/s\.yaml: there is no such file; did you mean 'e\.yaml'"):
        Experiment.load(folder / "s.yaml")
    with pytest.raises(UserError, match=r"there is no such file$"):
        Experiment.load(folder / "nowhere" / "e.yaml")
    fields = yaml.safe_load((folder / "e.yaml").read_text()) | {"latency": "table.yaml"}
    (folder / "e.yaml").write_text(yaml.safe_dump(fields))
    said = r"latency: .*table\.yaml: there is no such file; `nasattn profile`, .* makes it"
    with pytest.raises(UserError, match=said):
        Experiment.load(folder / "e.yaml")


def test_anchors_and_merge_keys(folder: Path) -> None:
    text = EXPERIMENT.replace("training:\n", "training: &t\n  batch_size: 7\n")
    text = text.replace("pretrain: {epochs: 3}", "pretrain:\n  <<: *t\n  epochs: 9")
    (folder / "e.yaml").write_text(text)
    experiment = Experiment.load(folder / "e.yaml")
    assert (experiment.pretrain.batch_size, experiment.pretrain.epochs) == (7, 9)
    assert experiment.training.epochs == 2
    # The place of a mistake is that of the value which counts: the one that overrides.
    assert refusal(folder / "e.yaml", text.replace("epochs: 9", "epochs: 0")) == [
        "12: pretrain.epochs: got 0; should be greater than or equal to 1"
    ]
    assert refusal(folder / "e.yaml", text.replace("epochs: 9", "epochs: 9\n  epochs: 9")) == [
        "13: not valid YAML: the key 'epochs' is given twice"
    ]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1e-3", 0.001),
        ("3e8", 300_000_000),
        ("5M", 5_000_000),
        ("60k", 60_000),
        ("1.5G", 1_500_000_000),
        ("2.01k", 2010.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("-2", -2),
        ("+1.50", 1.5),
        ("1_000", 1000),
        (" 7 ", 7),
        ("1e5", 100_000),
        ("1.5e1", 15),
        ("1.5e0", 1.5),
        ("010", 10),
        ("0", 0),
    ],
)
def test_numbers(text: str, number: float) -> None:
    assert read_number(text) == number
    assert type(read_whole(text)) is (int if number == int(number) else float)


def test_a_point_alone_makes_a_float() -> None:
    kinds = {text: type(read_number(text)) for text in ("5.", "1.0", "7", "2.01k", "3e8", "1e-3")}
    assert kinds == {"5.": float, "1.0": float, "7": int, "2.01k": int, "3e8": int, "1e-3": float}


@pytest.mark.parametrize(
    "text",
    ["", "k", "x", "1.25x", "1e", "1e999", "1 k", "1e3k", "5m", "0x10", "1:30", "nan", "."],
)
def test_no_numbers(text: str) -> None:
    assert read_number(text) == text


def test_numbers_agree_with_exact_arithmetic() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        digits = f"{rng.randint(-9999, 9999)}.{rng.randint(0, 99999)}"
        power = rng.choice(["k", "M", "G", f"e{rng.randint(-30, 30)}", ""])
        exponent = {"k": 3, "M": 6, "G": 9, "": 0}.get(power) or int(power[1:] or 0 if power else 0)
        exact = Decimal(digits).scaleb(exponent)
        assert read_number(digits + power) == float(exact)
        whole = read_whole(digits + power)
        assert isinstance(whole, int) == float(exact).is_integer()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("3e8", 3e8),
        (".5", 0.5),
        ("1.", 1.0),
        ("010", 10),
        ("-3", -3),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("on", "on"),
        ("yes", "yes"),
        ("no", "no"),
        ("1:30", "1:30"),
        ("0x1F", "0x1F"),
        ("1_000", "1_000"),
        ("2026-01-01", "2026-01-01"),
        (".nan", ".nan"),
        ("60k", "60k"),
        ("'7'", "7"),
    ],
)
def test_plain_scalars(text: str, value: object, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(f"a: {text}\n")
    data, source = load_yaml(tmp_path / "a.yaml")
    assert data == {"a": value} and type(data["a"]) is type(value)
    assert source.where(("a",)) == f"{tmp_path / 'a.yaml'}:1: a"


@pytest.mark.parametrize(
    "text", ["123e456789", "1e5", "123456789012", "0x1f", "1:30", "on", "no", "1_000", "~", "é"]
)
def test_what_is_dumped_is_read_back(text: str, tmp_path: Path) -> None:
    value = {text: [text, 1e-05, 1.5e300, 7, None, True], "a": {"b": text}}
    for flow in (None, True, False):
        (tmp_path / "a.yaml").write_text(dump_yaml(value, flow=flow), encoding="utf-8")
        assert load_yaml(tmp_path / "a.yaml")[0] == value
        assert yaml.safe_load(dump_yaml(value, flow=flow)) == value


def test_limits() -> None:
    rng = random.Random(0)
    for _ in range(200):
        value = rng.choice([rng.uniform(0, 3), rng.uniform(1, 1e12), float(rng.randint(1, 10**15))])
        for text in (f"{value!r}", f"{value!r}x"):
            limit = Limit.parse(text)
            assert limit == Limit(value=value, relative=text.endswith("x"))
            assert Limit.parse(str(limit)) == limit
    assert [str(Limit.parse(t)) for t in ("1.25x", "60k", 3e8, "1.1M")] == [
        "1.25x",
        "60000",
        "300000000",
        "1100000",
    ]


WHOLE: dict[str, Any] = {
    "study": "all.of-it_1",
    "storage": "sqlite:////tmp/x.db",
    "space": yaml.safe_load(SPACE),
    "data": {
        "name": "image_folder",
        "root": "pictures",
        "size": 40,
        "mean": [0.5, 0.4, 0.3],
        "std": ["2.5e-1"],
        "augment": "none",
        "val": 0.2,
        "bad": 0.5,
    },
    "training": {"lr": "1e-3", "seeds": 3, "warm_start": True, "ema": 0.999},
    "pretrain": {"epochs": 7, "schedule": "cosine"},
    "objectives": ["params", "accuracy", "macs"],
    "budget": {"macs": "1.2345678901234567x", "params": 60_000.5},
    "search": {"sampler": "nsga2", "population": 8},
    "trainer": {"precision": "bf16-mixed", "threads": 2},
}


def test_round_trip(folder: Path) -> None:
    for experiment in (Experiment.from_dict(WHOLE), Experiment.load(folder / "e.yaml")):
        stored = json.loads(json.dumps(experiment.as_dict()))
        again = Experiment.from_dict(stored)
        assert again == experiment
        assert again.as_dict() == stored
        assert differences(stored, again.as_dict()) == []


@pytest.mark.parametrize(
    ("change", "such"),
    [
        ({"budget": "1.3x"}, "{macs: 1.1x}"),
        ({"study": "a b"}, "mine_2"),
        ({"data": "cued_digits"}, "{name: cued_digits}"),
        ({"final": True}, "{seeds: 3}"),
        ({"space": {"sites": "stage*"}}, '["stage*.*"]'),
        ({"space": {"sites": []}}, '["stage*.*"]'),
        ({"space": {"blocks": ["se"]}}, "{se: {}, lightnl: {ratio: [0.25]}}"),
    ],
)
def test_what_is_of_a_wrong_kind_is_told_with_an_example(change: dict[str, Any], such: str) -> None:
    space = {**WHOLE["space"], **change.pop("space", {})}
    with pytest.raises(UserError) as refused:
        Experiment.from_dict(WHOLE | {"space": space} | change)
    assert any(line.endswith(f", such as {such}") for line in str(refused.value).splitlines())


def test_paths_are_taken_as_a_shell_takes_them(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("SCRATCH", "/scratch")
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.chdir(folder)

    def taken(**fields: Any) -> Experiment:
        Path("new.yaml").write_text(yaml.safe_dump(WHOLE | fields))
        return Experiment.load("new.yaml")

    data = {"name": "image_folder", "root": "${SCRATCH}/photos"}
    found = taken(storage="sqlite:///~/x.db", artifacts="$SCRATCH/store", data=data)
    assert found.storage == "sqlite:////home/me/x.db" and found.artifacts == "/scratch/store"
    assert found.data.root == Path("/scratch/photos")  # type: ignore[union-attr]
    assert Experiment.from_dict(found.as_dict()) == found
    whole = taken(storage="sqlite:////data/$SCRATCH/x.db")
    assert whole.storage == "sqlite:////data//scratch/x.db"
    server = "postgresql+psycopg://me:pa$$word~@host/x"
    assert taken(storage=server).storage == server
    with pytest.raises(UserError, match=r"storage: .*the environment has no \$NOWHERE"):
        taken(storage="sqlite:///$NOWHERE/x.db")
    odd = folder / "d$ollar"
    odd.mkdir()
    for file in ("e.yaml", "space.yaml"):
        (odd / file).write_text((folder / file).read_text())
    kept = Experiment.load(odd / "e.yaml")
    assert Experiment.from_dict(kept.as_dict()) == kept, "what is stored is whole"


def test_differences(folder: Path) -> None:
    old = Experiment.load(folder / "e.yaml").as_dict()
    new = copy.deepcopy(old)
    new["training"]["lr"] = 0.1
    new["space"]["blocks"]["se"] = {}
    new["search"]["trials"] = 99
    del new["budget"]["params"]
    assert sorted(differences(old, new)) == [
        "budget.params: '60000' -> nothing",
        "search.trials: 40 -> 99",
        "space.blocks.se: nothing -> {}",
        "training.lr: 0.005 -> 0.1",
    ]


def test_nothing_can_be_changed(folder: Path) -> None:
    experiment = Experiment.load(folder / "e.yaml")
    for part, field in (
        (experiment, "study"),
        (experiment.training, "lr"),
        (experiment.space, "classes"),
    ):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(part, field, 5)


def test_paths_are_relative_to_the_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = folder / "experiments" / "one"
    deep.mkdir(parents=True)
    text = EXPERIMENT.replace("space.yaml", "../../space.yaml")
    data = EXPERIMENT.splitlines()[3]
    (deep / "e.yaml").write_text(
        text.replace(data, "data: {name: image_folder, root: ../pictures}")
    )
    (folder / "elsewhere").mkdir()
    found = []
    for here, path in (
        (folder, "experiments/one/e.yaml"),
        (deep, "e.yaml"),
        (folder / "elsewhere", deep / "e.yaml"),
    ):
        monkeypatch.chdir(here)
        found.append(Experiment.load(path))
    assert found[0] == found[1] == found[2]
    assert found[0].data.root == folder / "experiments" / "pictures"  # type: ignore[union-attr]
    assert found[0].storage == f"sqlite:///{deep}/runs/nasattn.db"
    assert Experiment.from_dict(found[0].as_dict()) == found[0], "absolute: from anywhere the same"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("sqlite:///a.db", "sqlite:////here/a.db"),
        ("sqlite:///../a.db", "sqlite:////a.db"),
        ("sqlite:////abs/a.db", "sqlite:////abs/a.db"),
        ("sqlite+pysqlite:///a.db", "sqlite+pysqlite:////here/a.db"),
        ("sqlite://", "sqlite://"),
        ("sqlite:///:memory:", "sqlite:///:memory:"),
        ("postgresql://u@h/n", "postgresql+psycopg://u@h/n"),
        ("postgres://u@h/n", "postgresql+psycopg://u@h/n"),
        ("postgresql+psycopg2://u@h/n", "postgresql+psycopg2://u@h/n"),
        ("mysql://u@h/n", "mysql://u@h/n"),
    ],
)
def test_storage_urls(url: str, expected: str) -> None:
    assert storage_url(url, "/here") == expected
    assert storage_url(expected, "/there") == expected


@pytest.mark.parametrize(
    "url", ["", "a.db", "sqlite:a.db", "sqlite:/a.db", "sqlite://a.db", "://x"]
)
def test_no_storage_urls(url: str) -> None:
    with pytest.raises(ValueError, match=f"got '{url}'; allowed: a database URL such as"):
        storage_url(url)


# Fuzzing: a wrong file is refused in words, whatever is wrong with it.
NASTY: list[Any] = [
    *(
        None,
        True,
        0,
        -1,
        1e308,
        2**70,
        -0.0,
        "",
        "x",
        "²",
        "\0",
        "a\nb",
        "none",
        "1e999",
        "~",
        "[z",
    ),
    *(
        "9" * 400,
        [],
        [[]],
        {},
        {"": None},
        {"name": 5},
        [None, {}],
        "!!int x",
        "../..",
        "1.25x",
        "*",
    ),
]
SCRAPS = [
    *"[]{}:,-?&*!|>'\"%@`#=~<\t\0\n ²0123456789",
    *("!!int ", "!!python/name:os ", "&a ", "*a", "<<: ", "1e999", "9" * 400, "\n---\n", "\n...\n"),
    *("? ", "- ", ": ", "\ufeff", "\x85", "\ud800", "0x", "null", "true: ", " # ", "_"),
]


def mutated(data: Any, rng: random.Random) -> Any:
    """The same tree with one node replaced, dropped, renamed, doubled or swapped for another."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], (dict, list)):
                walk(node[key])

    data = copy.deepcopy(data)
    walk(data)
    node, key = rng.choice(places)
    other, name = rng.choice(places)
    match rng.randrange(5):
        case 0:
            node[key] = rng.choice(NASTY)
        case 1:
            del node[key]
        case 2 if isinstance(node, dict):
            node[rng.choice([f"{key}s", str(key)[1:], "", "name"])] = node.pop(key)
        case 3:
            node[key] = copy.deepcopy(other[name])
        case _:
            node[key] = [node[key], node[key]]
    return data


def survives(path: Path, text: bytes) -> bool:
    """Whether the file is taken; if not, it is refused in words that name it."""
    path.write_bytes(text)
    try:
        experiment = Experiment.load(path)
    except UserError as error:
        assert str(error).startswith(str(path)), text
        assert len(str(error)) > len(str(path)) + 10, text
        return False
    assert Experiment.from_dict(experiment.as_dict()) == experiment, text
    return True


def test_random_trees(tmp_path: Path) -> None:
    rng = random.Random(1)
    taken = 0
    for _ in range(250):
        data = mutated(WHOLE, rng)
        while rng.random() < 0.3:
            data = mutated(data, rng)
        # JSON is YAML; unlike YAML's own writer it leaves every number as it is.
        taken += survives(tmp_path / "e.yaml", json.dumps(data).encode())
    assert 10 < taken < 130, "the mutations are too wild or too tame to tell anything"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("latency: space.yaml", r"^\S+e\.yaml:\d+: latency: \S+space\.yaml is no table of"),
        ("latency: {blocks: {}}", r"^\S+e\.yaml:\d+: latency: what stands there is no table of"),
    ],
)
def test_what_would_else_be_noticed_late_or_never(folder: Path, text: str, said: str) -> None:
    with (folder / "e.yaml").open("a") as file:
        file.write(f"\n{text}\n")
    with pytest.raises(UserError, match=said):
        Experiment.load(folder / "e.yaml")


def test_a_file_of_another_kind_is_told_in_a_line(folder: Path) -> None:
    with pytest.raises(
        UserError, match=r"^\S+e\.yaml: has the keys study, .*; expected: backb"
    ) as e:
        Architecture.load(folder / "e.yaml")
    assert "\n" not in str(e.value)
    (folder / "a.yaml").write_text("Backbone: {}\nClass: 3\n")
    with pytest.raises(UserError, match=r"a\.yaml:1: Backbone: unknown key; .* mean 'backbone'\?"):
        Architecture.load(folder / "a.yaml")
    with (folder / "e.yaml").open("a") as file:
        file.write("\nlatency:\n")
    assert Experiment.load(folder / "e.yaml").latency is None


def test_a_path_that_the_database_cannot_hold_is_refused(folder: Path) -> None:
    """It is stored as text."""
    odd = folder / os.fsdecode(b"caf\xe9")
    odd.mkdir()
    for name in ("e.yaml", "space.yaml"):
        shutil.copy(folder / name, odd)
    with pytest.raises(UserError, match=r"^a path of the experiment is not UTF-8, as which it is"):
        Experiment.load(odd / "e.yaml").as_dict()


def test_random_texts(tmp_path: Path) -> None:
    rng = random.Random(2)
    inline = "space:\n" + "".join(f"  {row}\n" for row in SPACE.splitlines())
    good = EXPERIMENT.replace("space: space.yaml\n", inline)
    assert survives(tmp_path / "e.yaml", good.encode())
    taken = 0
    for _ in range(300):
        text = good
        for _ in range(rng.choice([1, 1, 2])):
            start = rng.randrange(len(text))
            text = text[:start] + rng.choice(SCRAPS) + text[start + rng.choice([0, 1, 5]) :]
        taken += survives(tmp_path / "e.yaml", text.encode("utf-8", "surrogatepass"))
    assert 5 < taken < 150, "the mutations are too wild or too tame to tell anything"
