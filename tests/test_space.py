"""A space against brute force: what it holds, how it is drawn from, what cannot stand where."""

import itertools
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, replace
from math import comb
from pathlib import Path
from typing import Any

import pytest
import yaml

from nasattn import measure
from nasattn.architecture import NONE, Architecture, Placement
from nasattn.errors import UserError
from nasattn.space import SearchSpace, TooManyBlocks

ROOT = Path(__file__).parents[1]


def written(path: Path, base: Path, **changes: Any) -> Path:
    """A space's file with some keys replaced."""
    fields = yaml.safe_load(base.read_text()) | changes
    path.write_text(yaml.safe_dump({k: v for k, v in fields.items() if v is not None}))
    return path


def every_architecture(space: SearchSpace) -> Iterator[Architecture]:
    """By brute force: all products of the choices, each through `draw`, without those too large."""
    for specs in itertools.product(*space.choices.values()):
        chosen = dict(zip(space.choices, specs, strict=True))
        blocks = sum(spec != NONE for spec in specs)
        try:
            architecture = space.draw(lambda site, _, row=chosen: row[site])  # type: ignore[misc]
        except TooManyBlocks:
            assert blocks > space.max_blocks
            continue
        assert len(architecture.placements) == blocks <= space.max_blocks
        yield architecture


def narrowed(space: SearchSpace, options: list[int], most: int) -> SearchSpace:
    """The first sites only, with so many blocks at each."""
    kept = [(site.name, count) for site, count in zip(space.sites, options, strict=False)]
    return replace(
        space,
        sites=space.sites[: len(options)],
        choices={name: space.choices[name][: count + 1] for name, count in kept},
        max_blocks=most,
    )


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ([2], 1),
        ([1, 1, 1], 3),
        ([2, 0, 3], 1),
        ([1, 2, 3, 2], 2),
        ([2, 2, 2, 1], 4),
        ([6, 6, 6], 3),
    ],
)
def test_size_and_members_by_brute_force(
    options: list[int], most: int, tiny_space: SearchSpace
) -> None:
    space = narrowed(tiny_space, options, most)
    members = list(every_architecture(space))
    assert len(set(members)) == len(members) == space.size()
    assert len({a.key for a in members}) == len(members)
    assert [space.decode(row) for row in space.chain.rows()] == members
    assert members[0] == space.baseline() == space.decode({})
    for architecture in members:
        assert space.contains(architecture)
        assert space.decode(architecture.specs) == architecture


def test_the_size_of_a_large_space(tiny_space_file: Path, tmp_path: Path) -> None:
    """20 blocks, the first without a skip, 3 choices a site: 2^78 architectures."""
    backbone = yaml.safe_load(tiny_space_file.read_text())["backbone"] | {"rows": [[1, 8, 20, 1]]}
    for most in (5, None):
        path = written(
            tmp_path / "s.yaml",
            tiny_space_file,
            backbone=backbone,
            blocks={"se": {"ratio": [0.25, 0.5]}, "eca": {}},
            max_blocks=most,
        )
        space = SearchSpace.load(path)
        n = len(space.sites)
        assert n == 39
        assert space.max_blocks == (most or n)
        assert space.size() == sum(comb(n, b) * 3**b for b in range(space.max_blocks + 1))
    sampled = [len(space.sample(random.Random(seed)).placements) for seed in range(60)]
    assert all(space.contains(space.sample(random.Random(seed))) for seed in range(3))
    # Without a limit each site is none with 1/4: the mean of 60 draws is 3n/4, deviating by 0.35.
    assert sum(sampled) / len(sampled) == pytest.approx(0.75 * n, abs=1.5)


@pytest.mark.parametrize("most", [1, 2, 3])
def test_sampling_is_uniform(most: int, tiny_space: SearchSpace) -> None:
    space = narrowed(tiny_space, [1, 3, 2], most)
    members = set(every_architecture(space))
    rng = random.Random(most)
    draws = 60 * len(members)
    counts = Counter(space.sample(rng) for _ in range(draws))
    assert set(counts) == members
    chi_square = sum((counts[a] - 60) ** 2 / 60 for a in members)
    freedom = len(members) - 1
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5


VARIED = """\
backbone:
  name: autonl
  rows: [[1, 8, 1, 3, 0], [2, 12, 2, 3, 0], [2, 12, 1, 3, 0], [2, 12, 1, 3, 0]]
vary: {expansion: [2, 3], kernel: [3], se: [0.25], optional: OPTIONAL}
input: [1, 16, 16]
classes: 3
sites: ["stage2.*"]
blocks: {eca: , lightnl: }
max_blocks: 2
"""


@pytest.mark.parametrize("optional", ["true", "false"])
def test_a_space_that_varies_its_backbone_by_brute_force(tmp_path: Path, optional: str) -> None:
    """Networks are told apart here by what is kept in each stage, in order, and what follows it."""
    (tmp_path / "s.yaml").write_text(VARIED.replace("OPTIONAL", optional))
    space = SearchSpace.load(tmp_path / "s.yaml")
    members: dict[tuple[Any, ...], Architecture] = {}
    names = [name.removesuffix(":block") for name in space.parameters if name.endswith(":block")]
    assert names == ["stage1.0", "stage2.0", "stage2.1", "stage2.2"]
    for labels in itertools.product(*space.parameters.values()):
        row = dict(zip(space.parameters, labels, strict=True))
        kept = [n for n in names if row[f"{n}:block"] != "left_out"]
        content = tuple((n[:6], row[f"{n}:block"], row.get(n, NONE)) for n in kept)
        if sum(placed != NONE for *_, placed in content) > 2:
            with pytest.raises(TooManyBlocks):
                space.draw(lambda name, _, row=row: row[name])  # type: ignore[misc]
            continue
        drawn = space.draw(lambda name, _, row=row: row[name])  # type: ignore[misc]
        assert members.setdefault(content, drawn) == drawn == space.decode(row)
    assert len(set(members.values())) == len(members) == space.size()
    assert any(len(content) < 4 for content in members) == (optional == "true")
    assert [space.decode(row) for row in space.chain.rows()] == list(
        dict.fromkeys(members.values())
    )
    rng = random.Random(0)
    for architecture in rng.sample(list(members.values()), 8):
        assert space.contains(architecture)
        assert space.cost(architecture).values == measure(architecture).values
    counts = Counter(space.sample(rng) for _ in range(10 * len(members)))
    freedom = len(members) - 1
    chi_square = sum((counts[a] - 10) ** 2 / 10 for a in members.values())
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5


def test_sampling_follows_the_seed(tiny_space: SearchSpace) -> None:
    first, again, other = (
        [tiny_space.sample(rng) for _ in range(20)] for rng in map(random.Random, (1, 1, 2))
    )
    assert first == again != other


def test_a_draw_asks_for_each_site_once_in_order(tiny_space: SearchSpace) -> None:
    asked = []

    def last(site: str, specs: Any) -> str:
        asked.append(site)
        assert tuple(specs) == tiny_space.choices[site] and specs[0] == NONE
        return str(specs[-1])

    with pytest.raises(TooManyBlocks, match=re.escape(tiny_space.sites[2].name)):
        tiny_space.draw(last)
    names = [site.name for site in tiny_space.sites]
    assert asked == names[:3], "it stops at the first site that goes over"
    asked.clear()
    assert (
        tiny_space.draw(lambda s, options: (asked.append(s), options[0])[1])
        == tiny_space.baseline()
    )
    assert asked == names == list(tiny_space.choices)


def test_a_row_of_another_space_is_no_plain_backbone(tiny_space: SearchSpace) -> None:
    with pytest.raises(UserError, match=r"unknown site 'stage9\.0'; allowed: stage1\.0, .*mean"):
        tiny_space.decode({"stage9.0": "se(ratio=0.25)"})
    with pytest.raises(
        UserError, match=r"stage2\.0: got 'se\(ratio=0\.2\)'; .*mean 'se\(ratio=0\.25"
    ):
        tiny_space.decode({"stage2.0": "se(ratio=0.2)"})


def test_what_it_does_not_contain(tiny_space: SearchSpace) -> None:
    spec = "se(ratio=0.25)"
    inside = tiny_space.decode({"stage2.0": spec, "stage3.0": spec})

    def placed(**specs: str) -> Architecture:
        sites = {site.replace("_", "."): spec for site, spec in specs.items()}
        return replace(inside, placements=tuple(Placement.parse(*item) for item in sites.items()))

    strangers = [
        replace(inside, classes=5),
        replace(inside, input=(1, 16, 32)),
        replace(inside, backbone=replace(inside.backbone, options=(("width", 0.25),))),
        placed(stage2_0="se(ratio=0.5)"),
        placed(stage2_0="se(ratio=0.25,identity_init=false)"),
        placed(stage2_0="eca"),
        placed(stage9_0=spec),
        placed(stage1_0=spec, stage2_0=spec, stage3_0=spec),
    ]
    assert tiny_space.contains(inside)
    for stranger in strangers:
        assert not tiny_space.contains(stranger)
        with pytest.raises(
            UserError, match=f"the architecture {stranger.key} is not of this space"
        ):
            tiny_space.cost(stranger)


def test_a_site_by_its_other_name(tiny_space: SearchSpace) -> None:
    """Where there is no skip, inside and behind are one place."""
    outer = tiny_space.decode({"stage3.0": "ccnet(ratio=0.125,recurrence=2)"})
    inner = replace(outer, placements=(replace(outer.placements[0], site="stage3.0.project"),))
    assert tiny_space.contains(inner)
    assert tiny_space.cost(inner).values == tiny_space.cost(outer).values
    assert tiny_space.cost(outer).values != tiny_space.cost(tiny_space.baseline()).values


ALL = ["stage1.0", "stage2.0.project", "stage2.0", "stage3.0", "stage3.1.project", "stage3.1"]


@pytest.mark.parametrize(
    ("globs", "names"),
    [
        (["stage*.*", "stage*.*.project"], ALL),
        (["*.*", "*.*.*"], ALL),
        (["stage*.*"], ["stage1.0", "stage2.0", "stage3.0", "stage3.1"]),
        (["*.*.project"], ["stage1.0", "stage2.0.project", "stage3.0", "stage3.1.project"]),
        (["stage[2-3].0"], ["stage2.0", "stage3.0"]),
        (["stage[!3].*"], ["stage1.0", "stage2.0"]),
        (["stage3.1", "stage1.?"], ["stage1.0", "stage3.1"]),
        (["stage3.1", "stage3.*", "stage3.1"], ["stage3.0", "stage3.1"]),
        (["stage3.0.project"], ["stage3.0"]),
    ],
)
def test_globs(globs: list[str], names: list[str], tiny_space_file: Path, tmp_path: Path) -> None:
    space = SearchSpace.load(written(tmp_path / "s.yaml", tiny_space_file, sites=globs))
    assert [site.name for site in space.sites] == names == list(space.choices)
    assert space.max_blocks == min(2, len(names))


@pytest.mark.parametrize(
    "glob", ["stage4.*", "*", "stage1", "stage1.0.expand", "Stage1.0", "", "[z"]
)
def test_a_glob_that_matches_nothing(glob: str, tiny_space_file: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "s.yaml", tiny_space_file, sites=["stage1.*", glob])
    message = f"{path}: sites: '{glob}' matches nothing; the backbone's sites: {', '.join(ALL)}"
    with pytest.raises(UserError, match=re.escape(message)):
        SearchSpace.load(path)


def test_sites_know_their_map(tiny_space: SearchSpace) -> None:
    assert [(s.name, s.channels, s.stride) for s in tiny_space.sites] == [
        (name, 12 if name.startswith("stage3") else 8, 2 if name.startswith("stage3") else 1)
        for name in ALL
    ]


def test_what_cannot_stand_is_dropped_and_listed(tiny_space_file: Path, tmp_path: Path) -> None:
    """GCNet's bottleneck needs two channels: 0.2 of 8 are one, of 12 two."""
    blocks = {"gcnet": {"ratio": [0.2, 0.5]}, "se": {}}
    space = SearchSpace.load(written(tmp_path / "s.yaml", tiny_space_file, blocks=blocks))
    narrow = [name for name in ALL if not name.startswith("stage3")]
    assert [(site, spec) for site, spec, _ in space.dropped] == [
        (site, "gcnet(ratio=0.2)") for site in narrow
    ]
    assert all("at 8 channels" in why for _, _, why in space.dropped)
    for site, specs in space.choices.items():
        assert ("gcnet(ratio=0.2)" in specs) == (site not in narrow)
        assert {NONE, "gcnet(ratio=0.5)", "se(ratio=0.0625)"} <= set(specs)
    assert SearchSpace.load(tiny_space_file).dropped == ()


def test_a_block_that_can_stand_nowhere(tiny_space_file: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "s.yaml", tiny_space_file, blocks={"se": {}, "gcnet": {"ratio": 0.1}})
    with pytest.raises(UserError) as caught:
        SearchSpace.load(path)
    assert str(caught.value).startswith(
        f"{path}: blocks: gcnet(ratio=0.1) can stand at none of the"
    )
    assert "at 8 channels" in str(caught.value)


def test_a_backbone_that_cannot_take_the_input(tiny_space_file: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "s.yaml", tiny_space_file, input=[3, 2**31 - 1, 2**31 - 1])
    with pytest.raises(UserError, match="the backbone cannot take the input"):
        SearchSpace.load(path)


def test_it_stays_as_it_is(tiny_space: SearchSpace, tiny_space_file: Path) -> None:
    with pytest.raises(FrozenInstanceError):
        tiny_space.max_blocks = 3  # type: ignore[misc]
    assert SearchSpace.load(tiny_space_file) == tiny_space


@pytest.mark.parametrize(
    "path", sorted((ROOT / "search_spaces").glob("*.yaml")), ids=lambda p: p.stem
)
def test_a_space_has_the_size_that_its_file_states(path: Path) -> None:
    stated = re.match(r"# ([\d,]+) ", path.read_text())
    assert stated, "a space's header begins with its size"
    assert SearchSpace.load(path).size() == int(stated[1].replace(",", ""))
