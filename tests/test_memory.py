"""Peak memory: by hand, by torch's own allocator, and by the table as by a whole count."""

import random
import runpy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from torch import Tensor, nn

from nasattn import catalog
from nasattn.architecture import NONE, Architecture, Backbone, Placement
from nasattn.backbones import BACKBONES
from nasattn.blocks import BLOCKS
from nasattn.cost.memory import MemoryTable, Tape, _Backbone, inference_peak, training_peak
from nasattn.errors import UserError
from nasattn.model import build, make_block, plain_sites, site_shapes

allocated_peaks = runpy.run_path(str(ROOT / "experiments/003_cost/memory.py"))["allocated_peaks"]

PIXELS = 8 * 8 * 4  # bytes of one channel of an 8 x 8 map


def conv(cin: int, cout: int) -> nn.Module:
    return nn.Conv2d(cin, cout, 3, padding=1, bias=False)


class Apply(nn.Module):
    """Any function of x and of two convolutions from 4 channels."""

    def __init__(self, function: Callable[..., Tensor], width: int = 4) -> None:
        super().__init__()
        self.first, self.second = conv(4, width), conv(4, width)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.first, self.second)


# The live channels at the peak of a pass; the input is alive all the time.
BY_HAND = {
    "the input, a map and the next": (nn.Sequential(conv(4, 8), conv(8, 2)), 4 + 8 + 2),
    "a map is released": (nn.Sequential(conv(4, 8), conv(8, 2), conv(2, 16)), 4 + 2 + 16),
    "relu": (nn.Sequential(conv(4, 8), nn.ReLU()), 4 + 8 + 8),
    "relu in place": (nn.Sequential(conv(4, 8), nn.ReLU(inplace=True)), 4 + 8),
    "a view": (nn.Sequential(conv(4, 8), nn.Flatten()), 4 + 8),
    "a part of a map keeps all of it": (Apply(lambda x, f, g: g(f(x)[:, :4]) + 1), 4 + 4 + 4),
    "a residual": (Apply(lambda x, f, g: x + f(x)), 4 + 4 + 4),
    "a residual keeps its source": (Apply(lambda x, f, g: (y := f(x)) + g(y)), 4 + 4 + 4 + 4),
    "side by side": (Apply(lambda x, f, g: torch.cat((x, f(x)), 1)), 4 + 4 + 8),
    "broadcast": (Apply(lambda x, f, g: f(x).expand(9, *[-1] * 4)), 4 + 4),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_the_peak_of_a_pass_is_that_counted_by_hand(case: str) -> None:
    module, channels = BY_HAND[case]
    assert inference_peak(module, (1, 4, 8, 8)) == channels * PIXELS
    assert inference_peak(module, (3, 4, 8, 8)) == 3 * channels * PIXELS


# Beside the maps there are the loss and, in backward, its gradient, a number of 4 bytes each.
TRAINING_BY_HAND = {
    # When the sum is taken: x, which is saved, and the result.
    "one layer": (nn.Sequential(conv(4, 8)), 4 + 8, 4),
    # In relu's backward: x, relu's result, and two gradients.
    "relu": (nn.Sequential(conv(4, 8), nn.ReLU(), conv(8, 2)), 4 + 8 + 8 + 8, 2 * 4),
    # The same: what is overwritten was not saved.
    "relu in place": (
        nn.Sequential(conv(4, 8), nn.ReLU(inplace=True), conv(8, 2)),
        4 + 8 + 8 + 8,
        2 * 4,
    ),
    # In the second convolution's backward: x, the norm's map and result, with 8 means and 8
    # deviations, and a gradient.
    "norm": (
        nn.Sequential(conv(4, 8), nn.BatchNorm2d(8), conv(8, 2)),
        4 + 8 + 8 + 8,
        2 * 8 * 4 + 2 * 4,
    ),
    # x and f(x)'s gradients from its two halves: the engine adds one to the other in place.
    "two gradients of a map": (
        Apply(lambda x, f, g: torch.cat(((y := f(x))[:, :2], y[:, 2:]), 1), width=8),
        4 + 8 + 8,
        2 * 4,
    ),
}


@pytest.mark.parametrize("case", TRAINING_BY_HAND)
def test_the_peak_of_a_training_step_is_that_counted_by_hand(case: str) -> None:
    module, channels, rest = TRAINING_BY_HAND[case]
    assert training_peak(module, (1, 4, 8, 8)) == channels * PIXELS + rest


@pytest.mark.parametrize("case", [*BY_HAND, *TRAINING_BY_HAND])
def test_torchs_allocator_agrees_with_the_count_by_hand(case: str) -> None:
    for training, peak in ((False, inference_peak), (True, training_peak)):
        module = {**BY_HAND, **TRAINING_BY_HAND}[case][0]
        real, _ = allocated_peaks(module, (2, 4, 8, 8), training=training)
        assert peak(module, (2, 4, 8, 8)) == pytest.approx(real, rel=0.01)


# Narrow, so that blocks make the peak; a backbone that is not here comes in its own size.
SMALL = {
    "mobilenet_v2": {"stem_stride": 1, "head": 16, "rows": [[1, 16, 2, 1], [1, 32, 2, 2]]},
    "mobilenet_v3": {
        "stem_stride": 1,
        "head": 16,
        "rows": [[3, 16, 16, 1, 0, 1], [3, 16, 32, 0, 1, 2], [5, 32, 32, 1, 1, 1]],
    },
    "autonl": {
        "stem": 16,
        "stem_stride": 1,
        "head": 32,
        "rows": [[1, 16, 1, 3, 0], [1, 32, 2, 5, 0.25], [1, 32, 1, 3, 0]],
    },
}


def specs_of(block: str) -> list[str]:
    """The block with each word that an option takes."""
    words = [(o, w) for o, r in catalog.BLOCKS[block].options.items() for w in words_of(r)]
    placements = [Placement(site="site", block=block, options=(word,)) for word in words]
    return list(dict.fromkeys(p.spec for p in (Placement(site="site", block=block), *placements)))


def words_of(rule: object) -> tuple[str, ...]:
    return rule.words if isinstance(rule, catalog.Option) else ()


def stands(spec: str, channels: int) -> bool:
    try:
        with torch.device("meta"):
            make_block(Placement.parse("site", spec), channels)
    except UserError:
        return False
    return True


def small(backbone: str) -> Architecture:
    options = SMALL.get(backbone, {})
    return Architecture(
        backbone=Backbone.of({"name": backbone, **options}), classes=4, input=(3, 16, 16)
    )


def choices_of(plain: Architecture, rng: random.Random) -> dict[str, tuple[str, ...]]:
    """All blocks dealt out over the sites, each to one where it can stand."""
    sites = list(plain_sites(plain.backbone, plain.input))
    found: dict[str, list[str]] = {site.name: [NONE] for site in sites}
    for block in BLOCKS:
        # The words of options once; other backbones make no difference to a block.
        for spec in specs_of(block)[: None if plain.backbone.name == "mobilenet_v2" else 1]:
            able = [site.name for site in sites if stands(spec, site.channels)]
            found[min(rng.sample(able, len(able)), key=lambda name: len(found[name]))].append(spec)
    return {name: tuple(specs) for name, specs in found.items()}


def network_of(plain: Architecture, specs: dict[str, str]) -> nn.Module:
    placements = (Placement.parse(s, spec) for s, spec in specs.items() if spec != NONE)
    with torch.device("meta"):
        return build(replace(plain, placements=tuple(placements)))


@pytest.mark.parametrize("batch", [None, 3])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_table_gives_the_peak_of_the_whole_network(backbone: str, batch: int | None) -> None:
    rng, plain = random.Random(0), small(backbone)
    peak = inference_peak if batch is None else training_peak
    choices = choices_of(plain, rng)
    shapes = site_shapes(plain.backbone, plain.input)
    table = MemoryTable.build(plain, shapes, choices, batch=batch)
    wholes = []
    for _ in range(12):
        specs = {site: rng.choice(options) for site, options in choices.items()}
        wholes.append(peak(network_of(plain, specs), (batch or 1, *plain.input)))
        assert table(specs)["peak_memory_bytes"] == wholes[-1], specs
    assert len(set(wholes)) >= 4  # else the backbone's own peak hides the blocks


def test_in_inference_a_peak_is_the_largest_of_its_single_insertions() -> None:
    rng, plain = random.Random(1), small("mobilenet_v2")
    choices = choices_of(plain, rng)
    table = MemoryTable.build(plain, site_shapes(plain.backbone, plain.input), choices)
    for _ in range(100):
        specs = {site: rng.choice(options) for site, options in choices.items()}
        singles = [table({site: spec})["peak_memory_bytes"] for site, spec in specs.items()]
        assert table(specs)["peak_memory_bytes"] == max(singles)


def test_a_table_without_sites_is_the_backbones_own_peak() -> None:
    plain = small("mobilenet_v2")
    table = MemoryTable.build(plain, {}, {}, batch=2)
    assert table({})["peak_memory_bytes"] == training_peak(network_of(plain, {}), (2, 3, 16, 16))


@pytest.mark.parametrize("training", [False, True])
def test_cuts_in_a_row_leave_the_peak_as_it_is(training: bool) -> None:
    network = nn.Sequential(conv(4, 8), nn.ReLU(inplace=True), nn.Identity(), conv(8, 2))
    shape = (2, 4, 8, 8)
    cut = Tape.of(network, shape, training=training, cuts=("0", "1", "2"))
    whole = Tape.of(network, shape, training=training)
    assert max(_Backbone(cut).live) == max(whole.levels())


class Keeper(nn.Module):
    """Keeps what it has made, as a block that shares work with other sites would."""

    def __init__(self, channels: int, **options: object) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        self.kept = torch.cat([x * self.scale] * 9)
        return self.kept[: len(x)] + x


def test_a_block_that_breaks_the_rule_is_found_when_the_table_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = small("mobilenet_v2")
    monkeypatch.setitem(BLOCKS, "simam", Keeper)
    shapes = site_shapes(plain.backbone, plain.input)
    choices = {site: (NONE, "simam") for site in shapes}
    with pytest.raises(AssertionError, match="the network's peak is"):
        MemoryTable.build(plain, shapes, choices)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("training", [False, True])
def test_torchs_allocator_agrees_on_networks(backbone: str, training: bool) -> None:
    rng, plain = random.Random(2), small(backbone)
    peak = training_peak if training else inference_peak
    for _ in range(2):
        choices = {s: o for s, o in choices_of(plain, rng).items() if len(o) > 1}
        network = build(
            replace(
                plain,
                placements=tuple(Placement.parse(s, rng.choice(o[1:])) for s, o in choices.items()),
            )
        )
        shape = (2, 3, 24, 24)
        real, _ = allocated_peaks(network, shape, training=training)
        assert peak(network, shape) == pytest.approx(real, rel=0.01)


@pytest.mark.parametrize("block", BLOCKS)
def test_torchs_allocator_agrees_on_every_block(block: str) -> None:
    for spec in specs_of(block):
        behind = nn.Sequential(conv(3, 32), make_block(Placement.parse("site", spec), 32))
        shape = (2, 3, 20, 12)
        for training, peak in ((False, inference_peak), (True, training_peak)):
            real, _ = allocated_peaks(behind, shape, training=training)
            assert peak(behind, shape) == pytest.approx(real, rel=0.01), (spec, training)


def test_fused_attention_keeps_no_map_also_where_the_module_lies_on_meta() -> None:
    with torch.device("meta"):
        block = make_block(Placement.parse("site", "self_attention"), 16)
        positions = 64 * 64
        assert inference_peak(block, (1, 16, 64, 64)) < positions**2 * 4 / 10
        assert training_peak(block, (1, 16, 64, 64)) < positions**2 * 4 / 10


def test_a_training_step_grows_with_its_batch_by_the_same_bytes_an_image() -> None:
    network = network_of(small("mobilenet_v2"), {"stage2.0": "lightnl", "stage1.0": "se"})
    peaks = [training_peak(network, (images, 3, 16, 16)) for images in (4, 6, 12)]
    assert (peaks[1] - peaks[0]) / 2 == (peaks[2] - peaks[1]) / 6 > 4 * 3 * 16 * 16


def test_half_precision_takes_half() -> None:
    network = nn.Sequential(conv(4, 8), nn.ReLU(), conv(8, 2))
    peak = inference_peak(network, (1, 4, 8, 8))
    assert inference_peak(network.half(), (1, 4, 8, 8)) == peak / 2


def test_what_is_frozen_saves_nothing_for_its_weights() -> None:
    network = nn.Sequential(conv(4, 8), conv(8, 8), conv(8, 2))
    free = training_peak(network, (1, 4, 8, 8))
    network.requires_grad_(False)
    assert training_peak(network, (1, 4, 8, 8)) == inference_peak(network, (1, 4, 8, 8)) < free


def test_the_module_is_left_as_it_is() -> None:
    network = nn.Sequential(conv(4, 8), nn.BatchNorm2d(8), nn.Dropout())
    network[1].eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    training_peak(network, (2, 4, 8, 8))
    assert [m.training for m in network] == [True, False, True]
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())
    assert not any(m._forward_hooks for m in network)
