"""Site, Placement, Backbone and Architecture as values: canonical, hashable, readable, checked."""

import copy
import hashlib
import itertools
import json
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from nasattn.architecture import Architecture, Backbone, Placement, site_order
from nasattn.catalog import BLOCKS, Option, Table
from nasattn.errors import UserError

SITES = ["stage10.0", "stage2.1", "stage2.1.project", "stage2.0", "stage1.0"]


def random_value(rule: Option | Table, rng: random.Random) -> Any:
    assert isinstance(rule, Option)
    if isinstance(rule.default, bool):
        return rng.random() < 0.5
    if isinstance(rule.default, str):
        return rng.choice(rule.words)
    if isinstance(rule.default, int):
        return rng.randint(int(rule.low), int(min(rule.high, 99)))
    return rng.choice([rule.low, rule.high, rng.uniform(rule.low, rule.high)])


def random_placement(site: str, block: str, rng: random.Random) -> Placement:
    options = [
        (n, random_value(r, rng)) for n, r in BLOCKS[block].options.items() if rng.random() < 0.7
    ]
    rng.shuffle(options)
    return Placement(site=site, block=block, options=tuple(options))


def with_blocks(*placements: Placement, **changes: Any) -> Architecture:
    fields = {"backbone": Backbone(name="mobilenet_v2"), "classes": 10, "input": (3, 32, 32)}
    return Architecture(**(fields | {"placements": placements} | changes))


def test_order_and_spelling_do_not_matter() -> None:
    specs = {
        "stage2.1": ["lightnl", "lightnl()", " lightnl( ratio = 0.25 , stride=1e0 ) "],
        "stage10.0": ["se(ratio=.5)", "se(identity_init=true,ratio=5e-1)", "se(ratio=0.50)"],
        "stage2.1.project": [
            "gcnet(ratio=1)",
            "gcnet(ratio=1.0,fusion=add)",
            "gcnet(pooling=att,ratio=1.)",
        ],
    }
    values = {
        with_blocks(*(Placement.parse(site, spec) for site, spec in order))
        for spelling in range(3)
        for order in itertools.permutations((site, s[spelling]) for site, s in specs.items())
    }
    assert len(values) == 1
    (value,) = values
    assert [p.site for p in value.placements] == ["stage2.1.project", "stage2.1", "stage10.0"]
    assert value.specs == {
        "stage2.1.project": "gcnet(ratio=1.0)",
        "stage2.1": "lightnl(ratio=0.25,stride=1)",
        "stage10.0": "se(ratio=0.5)",
    }


def test_one_key_a_value() -> None:
    rng = random.Random(0)
    some = [
        with_blocks(*(random_placement(s, b, rng) for s, b in zip(SITES, blocks, strict=False)))
        for blocks in itertools.product(BLOCKS, repeat=2)
    ]
    some += [with_blocks(classes=9), with_blocks(input=(3, 32, 64)), with_blocks()]
    some += [with_blocks(backbone=Backbone(name="mobilenet_v2", options=(("width", 0.5),)))]
    some += [Architecture.from_dict(a.as_dict()) for a in some]
    keys = [a.key for a in some]
    assert len(set(keys)) == len(set(some)) == len(some) // 2
    assert all((a == b) == (a.key == b.key) for a, b in itertools.combinations(some[::17], 2))
    assert keys[: len(some) // 2] == keys[len(some) // 2 :]
    assert all(len(key) == 12 and int(key, 16) >= 0 for key in keys)


def test_the_key_is_the_hash_of_the_canonical_json() -> None:
    """Written out: the key seeds trainings and names rows in databases, so it must not drift."""
    text = (
        '{"backbone":{"divisor":4,"dropout":0.0,"head":16,"name":"mobilenet_v2",'
        '"rows":[[1,16,1,1]],"stem_stride":1,"width":0.5},'
        '"classes":4,"input":[1,16,16],'
        '"placements":[["stage1.0","se",{"identity_init":true,"ratio":0.25}]]}'
    )
    fields = json.loads(text) | {"placements": {"stage1.0": "se(ratio=0.25)"}}
    expected = hashlib.sha256(text.encode()).hexdigest()[:12]
    assert Architecture.from_dict(fields).key == expected


@pytest.mark.parametrize("block", BLOCKS)
def test_spec_and_yaml_round_trip(block: str, tmp_path: Path) -> None:
    rng = random.Random(block)
    for _ in range(30):
        placement = random_placement("stage1.0", block, rng)
        assert Placement.parse("stage1.0", placement.spec) == placement
        assert [name for name, _ in placement.options] == sorted(BLOCKS[block].options)
        width = rng.choice([1, 0.35, rng.uniform(0.01, 2), 0.01])
        value = with_blocks(
            placement, backbone=Backbone(name="mobilenet_v2", options=(("width", width),))
        )
        assert Architecture.from_dict(json.loads(json.dumps(value.as_dict()))) == value
    value.save(tmp_path / "a.yaml")
    assert Architecture.load(tmp_path / "a.yaml") == value
    assert yaml.safe_load((tmp_path / "a.yaml").read_text()) == value.as_dict()


def test_plain_data() -> None:
    value = with_blocks(Placement.parse("stage1.0", "se"))
    key = value.key
    for twin in (copy.deepcopy(value), pickle.loads(pickle.dumps(value))):
        assert twin == value and hash(twin) == hash(value) and twin.key == key
    assert {value: 1}[with_blocks(Placement.parse("stage1.0", "se(ratio=0.0625)"))] == 1
    for field in ("classes", "placements", "key"):
        with pytest.raises(AttributeError):
            setattr(value, field, 5)


def test_site_order_is_total_and_reads_numbers() -> None:
    names = ["stage2.0", "stage10.0", "a.1", "a1", "a", "²", "1", "1.0", "", "stage2.0.project"]
    assert len({tuple(site_order(name)) for name in names}) == len(names)
    for some in itertools.permutations(names[:5]):
        assert sorted(some, key=site_order) == sorted(names[:5], key=site_order)
    assert sorted(SITES, key=site_order) == [
        "stage1.0",
        "stage2.0",
        "stage2.1.project",
        "stage2.1",
        "stage10.0",
    ]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lightn", "unknown block 'lightn'; allowed: self_attention, .*did you mean 'lightnl'"),
        ("lightnl(rati=1)", "block 'lightnl' has no option 'rati'; allowed: ratio, .*mean 'ratio'"),
        ("lightnl(ratio=2)", "'lightnl', option 'ratio': got 2; allowed: a number from .* to 1$"),
        ("lightnl(ratio=nan)", "got 'nan'; allowed: a number"),
        ("lightnl(ratio=1e999)", "got '1e999'; allowed: a number"),
        ("lightnl(stride=1.5)", "got 1.5; allowed: a whole number from 1 to 8"),
        ("lightnl(stride=true)", "got True; allowed: a whole number"),
        ("lightnl(normalize=ful)", "got 'ful'; allowed: full, none; did you mean 'full'"),
        ("se(identity_init=1)", "got 1; allowed: true or false"),
        ("se(ratio=.5,ratio=.5)", "expected option=value, each once; got 'ratio=.5'"),
        ("se(ratio)", "expected option=value"),
        ("se(", "is no block spec; write it like"),
        ("se)(", "is no block spec"),
        ("", "'' is no block spec"),
        ("se se", "is no block spec"),
    ],
)
def test_a_wrong_spec(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Placement.parse("stage1.0", spec)


def test_one_block_a_site() -> None:
    with pytest.raises(UserError, match=r"the site 'stage1\.0' holds more than one block"):
        with_blocks(Placement.parse("stage1.0", "se"), Placement.parse("stage1.0", "ccnet"))


GOOD = """\
backbone: {name: mobilenet_v2, width: 5e-1}
classes: 1e1
input: [1, 16, 16]
placements:
  stage1.0: none
  stage2.0: se(ratio=1)
"""


def test_a_file_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(GOOD)
    value = Architecture.load(path)
    assert (value.classes, value.specs) == (10, {"stage2.0": "se(ratio=1.0)"})
    assert dict(value.backbone.options)["width"] == 0.5


@pytest.mark.parametrize(
    ("old", "new", "messages"),
    [
        ("1e1", "0", ["2: classes: got 0; should be greater than or equal to 1"]),
        ("1e1", "ten", ["2: classes: got 'ten'; should be a valid integer"]),
        ("[1, 16, 16]", "[1, 16]", ["3: input.2: this item is missing"]),
        (
            "[1, 16, 16]",
            "[1, 16, -4]",
            ["3: input.2: got -4; should be greater than or equal to 1"],
        ),
        (
            "mobilenet_v2",
            "mobilenet",
            ["1: backbone.name: unknown backbone 'mobilenet'; allowed: "],
        ),
        (
            "name: mobilenet_v2, ",
            "",
            ["1: backbone: the key 'name' is missing; allowed: mobilenet"],
        ),
        (
            "width",
            "widht",
            ["1: backbone.widht: backbone 'mobilenet_v2' has no option 'widht'; allo"],
        ),
        ("classes: 1e1\n", "", [" classes: this key is missing"]),
        (
            "placements",
            "placement",
            ["4: placement: unknown key; allowed: backbone, classes, input, "],
        ),
        (
            "none\n  stage2.0: se(ratio=1)",
            "sex\n  stage2.0: se(ratio=x)",
            [
                "5: placements.stage1.0: unknown block 'sex'; allowed: self_attention, ",
                "6: placements.stage2.0: block 'se', option 'ratio': got 'x'; allowed: a number",
            ],
        ),
        ("none", "5", ["5: placements.stage1.0: got 5; should be a valid string"]),
        ("none", "{a: b}", ["5: placements.stage1.0: got {'a': 'b'}; should be a valid string"]),
    ],
)
def test_a_broken_file(old: str, new: str, messages: list[str], tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(UserError) as caught:
        Architecture.load(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(messages)
    for line, message in zip(lines, messages, strict=True):
        assert line.startswith(f"{path}:{message}")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere/a\.yaml: cannot be written: No such file"):
        with_blocks().save(tmp_path / "nowhere" / "a.yaml")
    with pytest.raises(UserError, match=r"nowhere/a\.yaml: there is no such file"):
        Architecture.load(tmp_path / "nowhere" / "a.yaml")
