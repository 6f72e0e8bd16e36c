"""Every cost of a row by table, against the network; what fits, against listing all."""

import functools
import random
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from nasattn import Architecture, SearchSpace, measure
from nasattn.cli import app
from nasattn.config import Experiment
from nasattn.cost.memory import inference_peak
from nasattn.errors import UserError
from nasattn.model import build
from nasattn.pricing import Candidates, Pricing
from nasattn.quote import quote
from nasattn.skeleton import LEFT_OUT, SUFFIX
from nasattn.space_file import SpaceFile

ROOT = Path(__file__).parents[1]
PUBLISHED = {
    "autonl_s": (266_242_176, 4_389_350, "266,878,784"),
    "autonl_l": (352_108_448, 5_580_336, "352,829,728"),
}


@pytest.fixture(scope="module")
def autonl() -> SearchSpace:
    return SearchSpace.load(ROOT / "search_spaces/autonl.yaml")


@pytest.mark.parametrize("name", PUBLISHED)
def test_autonl_is_in_its_space_at_its_published_cost(name: str, autonl: SearchSpace) -> None:
    path = ROOT / f"search_spaces/architectures/{name}.yaml"
    architecture = Architecture.load(path)
    macs, params, published = PUBLISHED[name]
    assert autonl.contains(architecture)
    assert autonl.cost(architecture).values == {"macs": macs, "params": params}
    row = autonl.row_of(architecture)
    assert row is not None and autonl.decode(row) == architecture
    found = quote(str(path))
    assert found["cost"] == {"macs": macs, "params": params}
    assert any(published in text for text in found["notes"].values())
    for metric, total in found["cost"].items():
        assert sum(part["cost"][metric] for part in found["by_block"]) == total
        placed = sum(part["cost"][metric] for part in found["by_site"])
        assert found["backbone"][metric] + placed == total


def test_autonl_costs_by_table_are_the_networks(autonl: SearchSpace) -> None:
    for seed in range(6):
        architecture = autonl.sample(random.Random(seed))
        assert autonl.cost(architecture).values == measure(architecture).values
    assert autonl.cost(autonl.baseline()).values == measure(autonl.baseline()).values


def test_equal_networks_have_one_key(autonl: SearchSpace) -> None:
    """Whichever repeated block is left out, and whatever is said of what is not there."""
    base = {f"stage3.2{SUFFIX}": "expansion=6,kernel=5,se=0.5", "stage3.2.project": "none"}
    assert autonl.skeleton is not None
    light = "lightnl(ratio=0.25,stride=2)"
    first = autonl.decode({**base, f"stage3.1{SUFFIX}": LEFT_OUT, "stage3.1.project": light})
    moved = {f"stage3.1{SUFFIX}": "expansion=6,kernel=5,se=0.5"}
    assert first == autonl.decode({**moved, f"stage3.2{SUFFIX}": LEFT_OUT})
    assert first.key == autonl.decode({**moved, f"stage3.3{SUFFIX}": LEFT_OUT}).key
    assert len(dict(first.backbone.options)["rows"]) == 20  # type: ignore[arg-type]
    for seed in range(20):
        rng = random.Random(seed)
        row = {name: rng.choice(labels) for name, labels in autonl.parameters.items()}
        once = autonl.canonical(row)
        assert autonl.canonical(once) == once
        assert autonl.decode(row) == autonl.decode(once)
        assert autonl.row_of(autonl.decode(row)) == once


def test_what_fits_is_counted_exactly_in_small_spaces(tiny_space: SearchSpace) -> None:
    pricing = Pricing(tiny_space, ("macs", "params"))
    costs = [tiny_space.cost(a).values for a in tiny_space.enumerate()]
    limits = {
        "macs": sorted(c["macs"] for c in costs)[len(costs) // 3],
        "params": sorted(c["params"] for c in costs)[len(costs) // 2],
    }
    expected = sum(all(c[m] <= limit for m, limit in limits.items()) for c in costs)
    assert 0 < expected < len(costs)
    assert Candidates(pricing, limits).fitting() == (expected,) * 3
    assert pricing.dearest == {m: max(c[m] for c in costs) for m in ("macs", "params")}


def test_what_fits_is_estimated_with_its_error(
    tiny_space: SearchSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = [tiny_space.cost(a).values for a in tiny_space.enumerate()]
    limits = {
        "macs": float(sorted(c["macs"] for c in costs)[len(costs) // 2]),
        "params": float(sorted(c["params"] for c in costs)[len(costs) // 2]),
    }
    expected = sum(all(c[m] <= limit for m, limit in limits.items()) for c in costs)
    monkeypatch.setattr("nasattn.pricing.LISTED", 1)
    candidates = Candidates(Pricing(tiny_space, ("macs", "params")), limits)
    assert candidates.listed is None
    count, least, most = candidates.fitting()
    assert least <= expected <= most
    assert least <= count <= most
    assert most - least < 0.2 * expected
    rng, seen = random.Random(0), set[tuple[str, ...]]()
    for _ in range(30):
        row = candidates.draw(rng, seen)
        assert row is not None and candidates.fits(row) and tuple(row.values()) not in seen
        seen.add(tuple(row.values()))


def test_what_fits_a_limit_of_memory_alone_is_estimated_too(
    tiny_space: SearchSpace, monkeypatch: pytest.MonkeyPatch
) -> None:
    pricing = Pricing(tiny_space, ("peak_memory_bytes",))
    peaks = [pricing(row)["peak_memory_bytes"] for row in tiny_space.chain.rows()]
    limit = sorted(peaks)[len(peaks) // 2]
    expected = sum(peak <= limit for peak in peaks)
    assert expected < len(peaks)
    exact = Candidates(pricing, {"peak_memory_bytes": limit}).fitting()
    monkeypatch.setattr("nasattn.pricing.LISTED", 1)
    count, least, most = Candidates(pricing, {"peak_memory_bytes": limit}).fitting()
    assert exact == (expected,) * 3
    assert least <= expected <= most and least <= count <= most < len(peaks)


@pytest.mark.parametrize("sites", ["stage*.*", "stage*.*.project"])
def test_memory_of_a_backbone_that_varies_is_the_networks(
    sites: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the parts of networks that were built for other rows."""
    rows = [[1, 8, 1, 3, 0], [2, 8, 2, 3, 0], [2, 12, 2, 3, 0], *[[2, 12, 1, 3, 0]] * 2]
    rows.append([2, 40, 1, 3, 0])
    fields = {
        "backbone": {"name": "autonl", "stem": 8, "head": 16, "rows": rows},
        "vary": {"expansion": [1, 6], "kernel": [3], "se": [0, 0.25], "optional": True},
        "input": [3, 32, 24],
        "classes": 3,
        "sites": [sites],
        "blocks": {"self_attention": {}, "gcnet": {}},
    }
    space = SearchSpace.of(SpaceFile.model_validate(fields))
    pricing, rng = Pricing(space, ("peak_memory_bytes",)), random.Random(0)
    made: list[Architecture] = []
    monkeypatch.setattr("nasattn.pricing.build", lambda a: made.append(a) or build(a))
    known = 0
    for _ in range(60):
        row = space.chain.sample(rng)
        before, peak = len(made), pricing(row)["peak_memory_bytes"]
        if before == len(made):
            known += 1
            with torch.device("meta"):
                network = build(space.decode(row))
            assert peak == inference_peak(network, (1, 3, 32, 24))
    assert known > 12


def test_memory_of_a_row_is_the_networks(tiny_space: SearchSpace) -> None:
    pricing = Pricing(tiny_space, ("macs", "params", "peak_memory_bytes"))
    for seed in range(8):
        architecture = tiny_space.sample(random.Random(seed))
        row = tiny_space.row_of(architecture)
        assert row is not None
        values = pricing(row)
        assert values["peak_memory_bytes"] == inference_peak(
            build(architecture), (1, *architecture.input)
        )
        assert {m: values[m] for m in ("macs", "params")} == measure(architecture).values
        assert values["peak_memory_bytes"] <= pricing.dearest["peak_memory_bytes"]


def test_a_limit_on_a_noisy_cost_keeps_its_margin(tiny_space: SearchSpace) -> None:
    pricing = Pricing(tiny_space, ("macs", "params"))
    pricing.margins["macs"] = 500.0
    plain = pricing.plain["macs"]
    assert Candidates(pricing, {"macs": plain + 500}).fits({})
    assert not Candidates(pricing, {"macs": plain + 499}).fits({})


def test_the_quote_of_an_experiment_and_of_a_module() -> None:
    path = ROOT / "experiments/001_quickstart/experiment.yaml"
    found = quote(str(path))
    space = SearchSpace.of(Experiment.load(path).space)
    plain = space.table.plain
    assert found["cost"] == plain
    assert found["limits"] == {"macs": 1.25 * plain["macs"], "params": 60_000}
    assert len(found["by_site"]) == sum(len(specs) - 1 for specs in space.choices.values())
    for single in found["by_site"]:
        architecture = space.decode({single["site"]: single["spec"]})
        whole = measure(architecture).values
        assert single["cost"] == {m: whole[m] - plain[m] for m in whole}
        assert single["fits"] == (whole["macs"] <= 1.25 * plain["macs"])
    assert quote("torch.nn:Identity", (3, 8, 8))["cost"] == {"macs": 0, "params": 0}


class Looking(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.mean() > 0 else -x


def wanting(width: int) -> nn.Module:
    return nn.Identity()


@functools.wraps(wanting)
def wrapped() -> nn.Module:
    return wanting(3)


def breaking() -> nn.Module:
    raise RuntimeError("no weights here")


class OfTwo(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


def test_a_module_that_cannot_be_counted_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("unreadable.py").write_text("def make(:")
    with pytest.raises(UserError, match=r"unreadable:make: cannot be imported: SyntaxError: "):
        quote("unreadable:make")
    for name, said in {
        "OfTwo": r"does not run on the input \[3, 8, 8\] .*: TypeError: .*forward\(\) missing 1",
        "Looking": "its forward looks at values, so that it cannot be counted without being run",
        "breaking": "breaking: it raised RuntimeError: no weights here",
        "wanting": "it is called without arguments; missing a required argument: 'width'",
    }.items():
        with pytest.raises(UserError, match=said):
            quote(f"{__name__}:{name}", (3, 8, 8))
    assert quote(f"{__name__}:wrapped", (3, 8, 8))["cost"] == {"macs": 0, "params": 0}
    Path("mine_too.py").write_text(
        "import sys\nfrom torch import nn\nsys.path.insert(0, 'lib')\n"
        "def make():\n    import beside, inner\n    return nn.Conv2d(3, beside.WIDTH, 1)\n"
    )
    Path("beside.py").write_text("WIDTH = 5\n")
    Path("profile.py").write_text("1 / 0\n")  # which torch imports, once it counts
    Path("lib").mkdir()
    Path("lib/inner.py").touch()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", list(sys.path))
        assert quote("mine_too:make", (3, 8, 8))["cost"]["params"] == 20
        assert "" not in sys.path
    with pytest.raises(UserError, match=r"did you mean 'nets\.mine:make'\?$"):
        quote("nets/mine.py:make")
    with pytest.raises(UserError, match=r"^\./mine\.py:make: allowed: a module's own name"):
        quote("./mine.py:make")
    with pytest.raises(UserError, match=r"expected an nn\.Module; got dict"):
        quote("builtins:dict")
    with pytest.raises(UserError, match=r"--shape: .* has its own input"):
        quote(str(ROOT / "experiments/001_quickstart/experiment.yaml"), (3, 8, 8))
    for shape in ("0,3,3", "²,3,3", "3,3", "3,3,3,3,3", ""):
        done = CliRunner().invoke(app, ["cost", "torch.nn:Identity", "--shape", shape])
        assert "allowed: channels,height,width" in str(done.exception)
    done = CliRunner().invoke(app, ["cost", "torch.nn:Identity", "--by-site"])
    assert isinstance(done.exception, UserError) and "--by-site" in str(done.exception)
