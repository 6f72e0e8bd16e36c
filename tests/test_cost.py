"""MACs and parameters against formulas written beside them, and the table against the whole."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasattn import measure
from nasattn.architecture import Architecture, Backbone, Placement
from nasattn.blocks import BLOCKS
from nasattn.cost import excess
from nasattn.errors import UserError
from nasattn.model import build
from nasattn.space import SearchSpace


class Function(nn.Module):
    """A network that is one function of its input."""

    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


class SelfAttended(nn.Module):
    """Torch's own attention over (1, 1, T, C)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x[0], x[0], x[0])[0]
        return out


def values(network: nn.Module, *shape: int) -> tuple[int | float, int | float]:
    cost = measure(network, shape).values
    return cost["macs"], cost["params"]


@pytest.mark.parametrize(
    ("network", "macs", "params"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), 8 * 3 * 9 * 5 * 7, 8 * 3 * 9 + 8),
        (nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), 8 * 3 * 9 * 3 * 4, 8 * 3 * 9),
        (nn.Conv2d(3, 6, 3, groups=3, padding=1), 6 * 9 * 5 * 7, 6 * 9 + 6),
        (nn.Conv2d(3, 4, (1, 7), padding="same"), 4 * 3 * 7 * 5 * 7, 4 * 3 * 7 + 4),
        (nn.ConvTranspose2d(3, 8, 2, stride=2), 8 * 3 * 4 * 5 * 7, 8 * 3 * 4 + 8),
        (nn.Linear(7, 2), 3 * 5 * 7 * 2, 7 * 2 + 2),
        (nn.Sequential(nn.Flatten(), nn.Linear(105, 2)), 105 * 2, 105 * 2 + 2),
        (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.AvgPool2d(2), nn.Softmax(1)), 0, 6),
        (Function(lambda x: x @ x.mT), 3 * 5 * 7 * 5, 0),
        (Function(lambda x: torch.einsum("nchw,ndhw->ncd", x, x)), 3 * 3 * 35, 0),
        (Function(lambda x: F.scaled_dot_product_attention(x, x, x)), 3 * 2 * 5 * 5 * 7, 0),
        (Function(lambda x: x @ x[0, 0, 0]), 3 * 5 * 7, 0),
        (Function(lambda x: x[0, 0, 0] @ x[0, 0, 1]), 7, 0),
        (Function(lambda x: torch.addmv(x[0, 0, :, 0], x[0, 0], x[0, 0, 0])), 5 * 7, 0),
        (Function(lambda x: x + x * x.mean() - x.softmax(1)), 0, 0),
    ],
)
def test_one_layer(network: nn.Module, macs: int, params: int) -> None:
    assert values(network, 3, 5, 7) == (macs, params)
    assert values(network, 1, 3, 5, 7) == (macs, params), "(C, H, W) is one image"
    if not isinstance(network, Function):
        assert values(network, 4, 3, 5, 7) == (4 * macs, params)
        assert values(network.double(), 3, 5, 7) == (macs, params)


def test_multi_head_attention() -> None:
    """In eval mode and without gradients torch may take a fused path that hides its products."""
    network = SelfAttended(8, 2)
    t, width = 5, 8
    projections, products = 4 * t * width * width, 2 * t * t * width
    assert values(network, 1, 1, t, width) == (
        projections + products,
        4 * width * width + 4 * width,
    )


def test_shared_weights_count_once_and_work_each_time() -> None:
    conv, other = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
    other.weight = conv.weight
    assert values(nn.Sequential(conv, conv), 3, 2, 2) == (2 * 9 * 4, 12)
    assert values(nn.Sequential(conv, other), 3, 2, 2) == (2 * 9 * 4, 15), "two biases, one weight"


def test_frozen_weights_are_weights_and_buffers_are_none() -> None:
    network = nn.Sequential(nn.Conv2d(3, 3, 1).requires_grad_(False), nn.BatchNorm2d(3))
    assert values(network, 3, 2, 2) == (36, 12 + 6)


def test_the_network_is_left_as_it_is() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout()).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    measure(network, (3, 4, 4))
    assert all(module.training for module in network.modules())
    assert all(p.device.type == "cpu" and p.requires_grad for p in network.parameters())
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_shapes_metrics_and_context() -> None:
    network = nn.Conv2d(3, 2, 1)
    assert measure(network).values["macs"] == 6 * 224 * 224
    assert measure(network, [3, 2, 2], metrics="macs").values.keys() == {"macs"}
    cost = measure(network, [3, 2, 2], metrics=["params"])
    assert cost.values == {"params": 8}
    assert cost.context["input"] == [1, 3, 2, 2]
    assert "1 multiply-add = 1 MAC" in cost.context["convention"]
    with pytest.raises(UserError, match=r"unknown metric 'mac'; allowed: macs, params; .* 'macs'"):
        measure(network, metrics=["mac"])


def test_an_architecture_by_hand() -> None:
    """A stem, one inverted residual without expansion, head and classifier, written out."""
    backbone = Backbone.of(
        {
            "name": "mobilenet_v2",
            "width": 0.25,
            "head": 16,
            "rows": [[1, 32, 1, 1]],
            "stem_stride": 1,
        }
    )
    plain = Architecture(backbone=backbone, classes=5, input=(2, 6, 10))
    pixels = 6 * 10
    convs = 8 * 2 * 9 + 8 * 9 + 8 * 8 + 16 * 8
    norms = 2 * (8 + 8 + 8 + 16)
    expected = {"macs": convs * pixels + 16 * 5, "params": convs + norms + 16 * 5 + 5}
    assert measure(plain).values == expected
    assert measure(build(plain), (2, 6, 10)).values == expected
    assert measure(plain, (2, 12, 10)).values["macs"] == convs * 2 * pixels + 16 * 5
    # LightNL with 2 of 8 channels as keys: the cheaper association, and a 3x3 depthwise.
    placed = Architecture(
        backbone=backbone,
        classes=5,
        input=(2, 6, 10),
        placements=(Placement.parse("stage1.0", "lightnl(ratio=0.25)"),),
    )
    products = min(pixels * pixels * (2 + 8), 2 * pixels * 2 * 8)
    assert measure(placed).values == {
        "macs": expected["macs"] + products + 9 * 8 * pixels,
        "params": expected["params"] + 9 * 8 + 2 * 8,
    }


def test_the_table_is_the_whole(tiny_space: SearchSpace) -> None:
    """Three ways: the sum of the table, the architecture on meta, the real network's own counts."""
    rng = random.Random(0)
    seen = {tiny_space.sample(rng) for _ in range(7)} | {tiny_space.baseline()}
    assert len(seen) > 5
    for architecture in seen:
        cost = tiny_space.cost(architecture)
        network = build(architecture)
        assert cost.values == measure(architecture).values
        assert cost.values == measure(network, architecture.input).values
        assert cost.values["params"] == sum(p.numel() for p in network.parameters())
        assert cost.context["input"] == [1, 1, 16, 16]
        assert all(isinstance(value, int) for value in cost.values.values())


@pytest.mark.parametrize("block", BLOCKS)
def test_the_table_is_the_whole_for_every_block(block: str, tmp_path: Path) -> None:
    """On maps of odd sizes, inside and behind a skip and where there is none."""
    (tmp_path / "space.yaml").write_text(
        "backbone: {name: mobilenet_v2, head: 16, rows: [[1, 32, 2, 1], [1, 64, 1, 2]]}\n"
        "input: [3, 23, 37]\nclasses: 3\n"
        f"sites: [stage1.0.project, stage1.1, stage2.0]\nblocks: {{{block}: }}\n"
    )
    space = SearchSpace.load(tmp_path / "space.yaml")
    sites = [site.name for site in space.sites]
    assert sites == ["stage1.0.project", "stage1.1", "stage2.0"]
    (spec,) = set(space.choices["stage2.0"]) - {"none"}
    plain = space.cost(space.baseline()).values
    for some in ([], ["stage1.0.project", "stage2.0"], sites):
        architecture = space.decode(dict.fromkeys(some, spec))
        assert len(architecture.placements) == len(some)
        values = space.cost(architecture).values
        assert values == measure(architecture).values
        assert (values["params"] > plain["params"]) == bool(some)


@pytest.mark.parametrize("name", ["autonl", "cued_digits", "mobilenet_v2"])
def test_every_entry_of_the_shipped_spaces_adds_up(name: str) -> None:
    """Each once, together with others, in a whole network."""
    root = Path(__file__).parents[1]
    space = SearchSpace.load(root / "search_spaces" / f"{name}.yaml")
    wide = replace(space, max_blocks=len(space.sites))
    unseen = set(wide.table.entries)
    for turn in range(max(map(len, wide.parameters.values()))):
        # Left-out blocks are last: turning backwards at an offset mixes them with kept ones.
        row = {name: labels[-1 - turn % len(labels)] for name, labels in wide.parameters.items()}
        row = wide.canonical(row)
        unseen -= set(row.items())
        assert wide.table(row) == measure(wide.decode(row)).values
    assert not unseen


def test_excess() -> None:
    assert excess({"macs": 10, "params": 3}, {"macs": 8.5, "params": 3}) == {"macs": 1.5}
    assert excess({"macs": 10, "params": 3}, {}) == {}
