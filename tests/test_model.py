"""Building and insertion: published figures, and no weight or output that changes unasked."""

import copy
import io
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nasattn import build, insert, measure
from nasattn.architecture import Architecture, Backbone, Placement, site_order
from nasattn.blocks import BLOCKS
from nasattn.catalog import BLOCKS as CATALOG
from nasattn.catalog import Option
from nasattn.errors import UserError
from nasattn.model import canonical, inserted, load_backbone, plain_sites, trace

# Wide enough for every block; stage 1 has an inside and an outside, stage 2 has no skip.
SMALL = Backbone.of(
    {
        "name": "mobilenet_v2",
        "stem_stride": 2,
        "head": 16,
        "dropout": 0.0,
        "rows": [[2, 32, 1, 1], [1, 64, 1, 2]],
    }
)
INPUT = (2, 19, 22)
SITES = ["stage1.0.project", "stage1.0", "stage2.0"]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def small(**specs: str) -> Architecture:
    """The small network with blocks: `stage1_0="se"`."""
    placements = (Placement.parse(site.replace("_", "."), spec) for site, spec in specs.items())
    return Architecture(backbone=SMALL, classes=5, input=INPUT, placements=tuple(placements))


def trained(network: nn.Module) -> nn.Module:
    """Weights and statistics as a training leaves them: nothing is 0 or 1 by chance."""
    for tensor in network.state_dict().values():
        if tensor.is_floating_point():
            tensor.mul_(0.9).add_(torch.rand_like(tensor) * 0.2)
    return network


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    torch.manual_seed(1)
    return trained(build(small())).eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(3, *INPUT, generator=torch.Generator().manual_seed(2))


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


# Published: facts of timm's and torchvision's networks, and of the paper for width 1.


@pytest.mark.parametrize(
    ("width", "params", "macs"),
    [(1.0, 3_504_872, 300_774_272), (0.5, 1_968_680, 97_131_840), (1.4, 6_108_776, 582_195_824)],
)
def test_mobilenet_v2_has_its_published_cost(width: float, params: int, macs: int) -> None:
    backbone = Backbone.of({"name": "mobilenet_v2", "width": width})
    network = Architecture(backbone=backbone, classes=1000, input=(3, 224, 224))
    assert measure(network).values == {"params": params, "macs": macs}


def test_sites_in_the_order_of_the_forward_pass() -> None:
    backbone = Backbone(name="mobilenet_v2")
    sites = list(plain_sites(backbone, (3, 64, 96)))
    names = [site.name for site in sites]
    assert len(names) == 17 + 10, "17 blocks, 10 of them with a skip"
    assert names == sorted(names, key=site_order)
    network = build(Architecture(backbone=backbone, classes=2, input=(3, 64, 96))).eval()
    seen: list[tuple[str, int, int]] = []
    for name in names:
        network.get_submodule(name).register_forward_hook(
            lambda _m, _i, out, name=name: seen.append((name, out.shape[1], 64 // out.shape[2]))  # type: ignore[misc]
        )
    network(torch.zeros(1, 3, 64, 96))
    assert seen == [(site.name, site.channels, site.stride) for site in sites]


# Insertion


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("block", BLOCKS)
def test_insertion_changes_neither_weights_nor_output(
    block: str, site: str, memory_format: torch.memory_format, plain: nn.Module, images: Tensor
) -> None:
    architecture = small(**{site: block})
    network = build(architecture)
    own = {k for k in network.state_dict() if k.startswith(f"{site}.attention.")}
    assert set(network.state_dict()) - own == set(plain.state_dict())
    answer = network.load_state_dict(plain.state_dict(), strict=False)
    counted = {
        k for k in own if not k.endswith("num_batches_tracked")
    }  # torch misses none of these
    assert (set(answer.missing_keys), answer.unexpected_keys) == (counted, [])
    load_backbone(network, plain.state_dict())
    assert list(inserted(network)) == [site]
    network, plain = (
        copy.deepcopy(n).eval().to(memory_format=memory_format) for n in (network, plain)
    )
    x = images.to(memory_format=memory_format)
    with torch.no_grad():
        assert gap(network(x), plain(x)) == 0.0
    # By hand: the block really stands there, so another function in its place shows.
    inserted(network)[site].register_forward_hook(lambda m, i, out: out + 1)
    with torch.no_grad():
        assert gap(network(x), plain(x)) > 1e-4


def variants() -> Iterator[tuple[str, str]]:
    """Every option of every block once at each other end of what is allowed."""
    for block, entry in CATALOG.items():
        for name, rule in entry.options.items():
            assert isinstance(rule, Option)
            values: tuple[Any, ...] = rule.words or (rule.low, min(rule.high, 11))
            if isinstance(rule.default, bool):
                values = (not rule.default,)
            for value in values:
                if name != "identity_init" and value != rule.default:
                    kind = int if type(rule.default) is int else str
                    text = str(value).lower() if isinstance(value, bool) else kind(value)
                    yield block, f"{block}({name}={text})"


@pytest.mark.parametrize("spec", [spec for _, spec in variants()])
def test_every_option_is_placed_as_the_identity(
    spec: str, plain: nn.Module, images: Tensor
) -> None:
    try:
        network = build(small(stage2_0=spec))
    except UserError as error:
        assert "channels" in str(error)  # too narrow a width is refused when it is made
        return
    load_backbone(network, plain.state_dict())
    with torch.no_grad():
        assert gap(network.eval()(images), plain(images)) == 0.0


@pytest.mark.parametrize("block", BLOCKS)
def test_the_first_step_of_training(block: str, images: Tensor) -> None:
    """The same output and gradients as the plain network's, and then the block learns."""
    plain = trained(build(small())).train()
    network = build(small(stage1_0=block)).train()
    load_backbone(network, plain.state_dict())
    labels = torch.tensor([0, 1, 2])
    losses = [nn.functional.cross_entropy(n(images), labels) for n in (plain, network)]
    assert losses[0].item() == losses[1].item()
    for loss in losses:
        loss.backward()  # type: ignore[no-untyped-call]
    ours = dict(network.named_parameters())
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None and ours[name].grad is not None
        # relu(0) and a softmax over equal numbers may round elsewhere; no more than that.
        assert gap(parameter.grad, ours[name].grad) <= 1e-5 * (1 + parameter.grad.abs().max())
    inside = dict(inserted(network)["stage1.0"].named_parameters())
    grads = {name: p.grad for name, p in inside.items() if p.grad is not None}
    assert all(torch.isfinite(g).all() for g in grads.values())
    assert any(g.abs().max() > 0 for g in grads.values())
    torch.optim.SGD(inside.values(), lr=1.0).step()
    with torch.no_grad():
        assert gap(network(images), plain(images)) > 0


def test_blocks_at_all_sites_at_once(plain: nn.Module, images: Tensor) -> None:
    network = build(small(**dict(zip(SITES, ("ccnet", "se", "lightnl"), strict=True)))).eval()
    load_backbone(network, plain.state_dict())
    assert list(inserted(network)) == SITES
    with torch.no_grad():
        assert gap(network(images), plain(images)) == 0.0


def test_inside_and_behind_a_skip_are_two_places(plain: nn.Module, images: Tensor) -> None:
    """Written out: x + f(project(...)) inside, f(x + project(...)) behind."""
    outputs = []
    for site in ("stage1.0.project", "stage1.0"):
        network = build(small(**{site: "se"})).eval()
        load_backbone(network, plain.state_dict())
        f = trained(inserted(network)[site])
        block, maps = plain.get_submodule("stage1.0"), plain.get_submodule("stem")(images)
        assert block.has_skip is True
        y = block.project(block.depthwise(block.expand(maps)))  # type: ignore[operator]
        y = maps + f(y) if site.endswith("project") else f(maps + y)
        rest = plain.get_submodule("head")(plain.get_submodule("stage2")(y)).mean((2, 3))
        outputs.append(plain.get_submodule("classifier")(rest))
        assert gap(network(images), outputs[-1]) <= 1e-6
    assert gap(*outputs) > 1e-3


def test_without_a_skip_inside_and_behind_are_one_place(plain: nn.Module, images: Tensor) -> None:
    outer, inner = small(stage2_0="se"), small(**{"stage2.0.project": "se"})
    assert canonical(inner) == outer == canonical(outer)
    networks = [trained(build(outer)).eval(), build(inner).eval()]
    networks[1].load_state_dict(networks[0].state_dict())
    assert gap(*(n(images) for n in networks)) == 0.0
    with pytest.raises(UserError, match=r"the site 'stage2\.0' holds more than one block"):
        build(small(**{"stage2.0": "se", "stage2.0.project": "se"}))


def test_a_site_that_is_not_there() -> None:
    with pytest.raises(
        UserError, match=r"no site 'stage2\.1'; allowed: stage1\.0\.project, stage1"
    ):
        build(small(stage2_1="se"))
    with pytest.raises(UserError, match=r"did you mean 'stage1\.0'"):
        build(small(stag1_0="se"))


def test_a_block_that_cannot_stand_there() -> None:
    with pytest.raises(UserError, match="at 32 channels"):
        build(small(stage1_0="gcnet(ratio=0.03)"))


def test_weights_of_another_backbone_are_refused(plain: nn.Module) -> None:
    network = build(small(stage1_0="se"))
    good = plain.state_dict()
    load_backbone(network, good)
    some = next(iter(good))
    less = {k: v for k, v in good.items() if k != some}
    counter = next(k for k in good if k.endswith("num_batches_tracked"))
    no_counter = {k: v for k, v in good.items() if k != counter}
    for wrong, names in (
        (less, f"1 keys differ: {some}"),
        (no_counter, f"1 keys differ: {counter}"),
        ({**good, "extra": good[some]}, "1 keys differ: extra"),
        ({**good, "stage1.0.attention.squeeze.bias": good[some]}, "1 keys differ: stage1"),
        ({**good, some: torch.zeros(1)}, "size mismatch"),
    ):
        with pytest.raises(UserError, match=f"not the weights of this backbone: (.|\n)*{names}"):
            load_backbone(network, wrong)


def test_copies_and_pickles(images: Tensor) -> None:
    network = trained(build(small(stage1_0="ccnet", stage2_0="gcnet"))).eval()
    y = network(images)
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    loaded = build(small(stage1_0="ccnet", stage2_0="gcnet")).eval()
    loaded.load_state_dict(torch.load(file))
    twins = [loaded, copy.deepcopy(network), pickle.loads(pickle.dumps(network))]
    assert all(torch.equal(twin(images), y) for twin in twins)
    for parameter in network.parameters():
        parameter.data.zero_()
    assert all(torch.equal(twin(images), y) for twin in twins), "no copy shares a weight"


# Any module


class Foreign(nn.Module):
    """What people write: a Sequential, a module used twice, one used by its weights only, pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(2, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True)
        )
        self.twice = nn.Conv2d(16, 16, 1)
        self.never = nn.Conv2d(16, 16, 1)
        self.by_weight = nn.Conv2d(16, 16, 1)
        self.layers = nn.ModuleList([nn.Conv2d(16, 24, 3, stride=2), nn.Identity()])
        self.pair = Pair()
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(self.features(x)))
        x = nn.functional.conv2d(x, self.by_weight.weight)
        for layer in self.layers:
            x = layer(x)
        x, _ = self.pair(x)
        out: Tensor = self.head(x.mean((2, 3)))
        return out


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Iterating(nn.Module):
    """Runs all of its children, whichever they are."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(2, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        for child in self.children():
            x = child(x)
        return x


def test_insert_into_any_network(images: Tensor) -> None:
    network = trained(Foreign()).train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    places = {
        "features": "se",
        "features.0": "lightnl",
        "layers.0": "ccnet(ratio=.25)",
        "layers.1": "se",
    }
    bigger = insert(network, places, images)
    assert set(inserted(bigger)) == set(places)
    assert {
        k: v for k, v in bigger.state_dict().items() if ".attention." not in k
    }.keys() == before.keys()
    assert gap(bigger.eval()(images), copy.deepcopy(network).eval()(images)) == 0.0
    # What was given is what it was: weights, statistics, mode, hooks.
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert all(m.training and not m._forward_hooks for m in network.modules())
    assert not inserted(network)
    with torch.no_grad():
        bigger.get_submodule("layers.0").weight.zero_()
    assert gap(network.get_submodule("layers.0").weight, torch.zeros(1)) > 0


def test_inserted_blocks_take_the_mode_and_the_type_of_the_network(images: Tensor) -> None:
    network = Foreign().double().eval()
    bigger = insert(network, {"features.1": "ccnet", "layers.0": "lightnl"}, images.double())
    assert all(not m.training for m in bigger.modules())
    assert bigger(images.double()).dtype == torch.float64
    assert {p.dtype for p in bigger.parameters()} == {torch.float64}
    assert all(m.training for m in insert(Foreign(), {"layers.0": "se"}, images).modules())


def test_insert_into_a_network_on_meta() -> None:
    with torch.device("meta"):
        network, x = Foreign(), torch.empty(1, 2, 8, 8)
    bigger = insert(network, {"layers.0": "gcnet(ratio=.25)"}, x)
    assert {p.device.type for p in bigger.parameters()} == {"meta"}
    assert measure(bigger, (2, 8, 8)).values["macs"] > measure(network, (2, 8, 8)).values["macs"]


def test_insert_twice(images: Tensor) -> None:
    once = insert(Foreign(), {"features.0": "se"}, images)
    twice = insert(once, {"layers.0": "se"}, images)
    assert set(inserted(twice)) == {"features.0", "layers.0"}
    with pytest.raises(UserError, match=r"'features\.0' already has a part named 'attention'"):
        insert(once, {"features.0": "se"}, images)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"twice": "se"}, "'twice' is run 2 times in one pass; a block needs a module that is run"),
        ({"never": "se"}, "'never' is run 0 times"),
        ({"by_weight": "se"}, "'by_weight' is run 0 times"),
        ({"layers": "se"}, "'layers' is run 0 times"),
        (
            {"head": "se"},
            r"'head': its output has the shape \(3, 3\); a block stands only on one map",
        ),
        ({"pair": "se"}, r"'pair': its output is not one tensor; a block"),
        (
            {"feature.0": "se"},
            r"the network has no module 'feature\.0'; did you mean 'features\.0'\?",
        ),
        ({"": "se"}, "the network has no module ''"),
        ({"features.0": "see"}, "unknown block 'see'; allowed: .*; did you mean 'se'"),
        ({"features.0": "gcnet(ratio=0.1)"}, "at 16 channels"),
    ],
)
def test_what_cannot_be_inserted(places: dict[str, str], message: str, images: Tensor) -> None:
    network = Foreign()
    with pytest.raises(UserError, match=message):
        insert(network, places, images)
    assert all(m.training and not m._forward_hooks for m in network.modules())


@pytest.mark.parametrize("odd", ["se", ["features.0"], {"features.0": {"lightnl": {}}}, None])
def test_what_are_no_placements_is_told(odd: Any, images: Tensor) -> None:
    with pytest.raises(UserError, match=r"placements: got .*; allowed: module path -> block spec"):
        insert(Foreign(), odd, images)
    with pytest.raises(UserError, match=r"example: got \(3, 32, 32\); allowed: a tensor"):
        insert(Foreign(), {"features.0": "se"}, (3, 32, 32))  # type: ignore[arg-type]


def test_a_module_that_runs_whatever_children_it_has_is_refused(images: Tensor) -> None:
    network = nn.Sequential(Iterating())
    with pytest.raises(UserError, match=r"'0\.attention' is run 2 times"):
        insert(network, {"0": "se"}, images)
    assert inserted(insert(network, {"0.one": "se"}, images)).keys() == {"0.one"}


def test_tracing_leaves_the_network_as_it_was(images: Tensor) -> None:
    network = Foreign().train()
    network.features.eval()
    modes = {name: m.training for name, m in network.named_modules()}
    before = {k: v.clone() for k, v in network.state_dict().items()}
    shapes = trace(network, images, ["features.0", "layers.0", "head", "pair"])
    assert shapes == {
        "features.0": (3, 16, 19, 22),
        "layers.0": (3, 24, 9, 10),
        "head": (3, 3),
        "pair": (),
    }
    with pytest.raises(RuntimeError):
        trace(network, images[:, :1], ["features.0"])
    assert {name: m.training for name, m in network.named_modules()} == modes
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert all(not m._forward_hooks for m in network.modules())
