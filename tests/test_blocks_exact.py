"""Every block against its paper's naive reference: outputs, gradients and statistics, in float64.

The weights go from the reference into the block by name and shape, so a missing or an additional
bias, norm or width fails too.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import reference_blocks as reference
import torch
from torch import Tensor, nn

from nasattn import catalog
from nasattn.blocks import BLOCKS
from nasattn.blocks.annnet import AsymmetricFusion

Options = dict[str, Any]

# The parts of a block that have another name in its state_dict than in the reference.
NAMES: Mapping[str, Mapping[str, str]] = {
    "gcnet": {
        f"{branch}.{role}": f"{branch}.{place}"
        for branch in ("add", "mul")
        for role, place in (("reduce", 0), ("norm", 1), ("expand", 3))
    },
    "lightnl": {"depthwise": "spread"},
    "danet": {
        "gamma_position": "position.gamma",
        "gamma_channel": "gamma",
        **{role: f"position.{role}" for role in ("query", "key", "value")},
    },
    "isanet": {
        **{
            f"{step}.{role}": f"{step}.{place}"
            for step in ("long", "short")
            for role, place in {
                "query1": "query.0.0",
                "query1_norm": "query.0.1",
                "query2": "query.1.0",
                "query2_norm": "query.1.1",
                "key1": "key.0.0",
                "key1_norm": "key.0.1",
                "key2": "key.1.0",
                "key2_norm": "key.1.1",
                "out": "out.0",
                "out_norm": "out.1",
            }.items()
        },
        "fuse": "out.0.0",
        "fuse_norm": "out.0.1",
    },
    "annnet": {
        "key": "key.0",
        "key_norm": "key.1",
        "out": "context",
        "fuse": "out.0.0",
        "fuse_norm": "out.0.1",
    },
    "eca": {"conv": "neighbours"},
    "emanet": {"conv1": "before", "conv2": "after"},
    "dmsanet": {
        **{f"scale{i}": f"scales.{i}" for i in range(4)},
        "gamma_position": "attend.dual.position.gamma",
        "gamma_channel": "attend.dual.gamma",
        **{role: f"attend.dual.position.{role}" for role in ("query", "key", "value")},
        **{
            role: f"attend.{role}"
            for role in (
                "channel_weight",
                "channel_bias",
                "spatial_weight",
                "spatial_bias",
                "norm",
            )
        },
    },
}

MAPS = [(2, 5, 7), (1, 6, 3)]
LINE = (1, 1, 9)

# Block, channels, options; and whether a map of one row is allowed.
CASES: list[tuple[str, int, Options, bool]] = [
    ("self_attention", 16, {}, True),
    ("self_attention", 20, {"ratio": 0.25, "value_ratio": 0.35}, True),
    ("self_attention", 20, {"pool": 2}, False),
    ("self_attention", 9, {"pool": 3, "value_ratio": 0.5}, False),
    *(
        ("non_local", 20, {"mode": mode, "subsample": subsample}, subsample == "none")
        for mode in ("embedded_gaussian", "gaussian", "dot_product", "concatenation")
        for subsample in ("none", "before", "after")
    ),
    *(
        ("non_local", 9, {"mode": mode, "scale": False, "norm": False}, True)
        for mode in ("embedded_gaussian", "gaussian", "dot_product", "concatenation")
    ),
    ("non_local", 1, {}, True),
    ("non_local", 16, {"mode": "dot_product", "ratio": 1.0}, True),
    ("danet", 16, {}, True),
    ("danet", 20, {"channel": "paper", "ratio": 0.3}, True),
    ("danet", 20, {"branches": "position"}, True),
    ("danet", 20, {"branches": "channel"}, True),
    ("danet", 20, {"branches": "channel", "channel": "paper"}, True),
    ("a2net", 16, {}, True),
    ("a2net", 20, {"ratio": 0.25, "maps_ratio": 0.4}, True),
    ("a2net", 20, {"distribute": "positions", "ratio": 1.0}, True),
    ("a2net", 9, {"identity_init": True}, True),
    ("ccnet", 16, {}, True),
    ("ccnet", 20, {"recurrence": 1}, True),
    ("ccnet", 9, {"recurrence": 3, "ratio": 0.5}, True),
    *(
        ("gcnet", 20, {"ratio": 0.25, "fusion": fusion, "pooling": pooling}, True)
        for fusion in ("add", "mul", "mul_add")
        for pooling in ("att", "avg")
    ),
    ("gcnet", 32, {}, True),
    *(
        ("gcnet", 20, {"ratio": 0.125, "fusion": fusion, "identity_init": True}, True)
        for fusion in ("add", "mul", "mul_add")
    ),
    ("emanet", 16, {}, True),
    ("emanet", 20, {"bases": 7, "stages": 2, "momentum": 0.6}, True),
    ("emanet", 20, {"bases": 5, "stages": 1, "gradients": True}, True),
    ("emanet", 9, {"bases": 6, "gradients": True, "identity_init": True}, True),
    ("isanet", 16, {"size": 3}, True),
    ("isanet", 20, {"size": 2, "ratio": 0.3}, True),
    ("isanet", 9, {}, True),
    ("isanet", 20, {"size": 3, "padding": "masked"}, True),
    ("isanet", 9, {"padding": "masked"}, True),
    ("isanet", 9, {"size": 4, "dropout": 0.5, "identity_init": True}, True),
    ("annnet", 16, {}, True),
    ("annnet", 20, {"ratio": 0.3, "dropout": 0.5}, True),
    ("annnet", 9, {"identity_init": True}, True),
    ("lightnl", 16, {}, True),
    *(
        ("lightnl", 20, {"ratio": ratio, "stride": stride, "normalize": normalize}, True)
        for ratio in (0.25, 1.0)
        for stride in (2, 3)
        for normalize in ("full", "none")
    ),
    *(
        ("dmsanet", 64, {"mode": mode, "scales": scales}, True)
        for mode in ("attention", "gate")
        for scales in ("pyramid", "depthwise", "split")
    ),
    ("dmsanet", 128, {"scales": "split", "identity_init": True}, True),
    ("dmsanet", 40, {}, True),
    ("dmsanet", 40, {"mode": "gate", "identity_init": True}, True),
    ("se", 16, {}, True),
    ("se", 20, {"ratio": 0.25}, True),
    ("se", 9, {"identity_init": True}, True),
    *(("eca", channels, {}, True) for channels in (8, 20, 32, 128)),
    ("eca", 20, {"kernel": 5}, True),
    ("eca", 9, {"kernel": 1, "identity_init": True}, True),
    ("cbam", 16, {}, True),
    ("cbam", 20, {"ratio": 0.25, "kernel": 3}, True),
    ("cbam", 9, {"identity_init": True}, True),
    ("coordatt", 16, {}, True),
    ("coordatt", 20, {"ratio": 0.5}, True),
    ("coordatt", 9, {"identity_init": True}, True),
    ("simam", 16, {}, True),
    ("simam", 20, {"strength": 0.3}, True),
    ("simam", 9, {"identity_init": True}, True),
]


# Lean attention takes other ways at many channels (more than a fused kernel's head width), at many
# positions (more than four times the channels), and at both.
LARGE: list[tuple[str, int, Options, tuple[int, int, int]]] = [
    *((name, 264, {}, (1, 9, 11)) for name in catalog.BLOCKS),
    *((name, 32, {}, (1, 13, 11)) for name in catalog.BLOCKS),
    ("non_local", 16, {"mode": "gaussian", "ratio": 0.75}, (1, 13, 11)),
    ("non_local", 16, {"mode": "concatenation"}, (1, 13, 11)),
    ("self_attention", 20, {"ratio": 0.75, "value_ratio": 0.1}, (1, 13, 11)),
    ("self_attention", 260, {}, (1, 33, 32)),
]


def label(value: object) -> str | None:
    if isinstance(value, dict):
        return ",".join(f"{key}={option}" for key, option in value.items()) or "defaults"
    return "x".join(map(str, value)) if isinstance(value, tuple) else None


def full(name: str, options: Options) -> Options:
    """All options: those given, then the class's defaults, the paper's form."""
    values: Options = catalog.complete(catalog.BLOCKS, name, options, "block")
    if "identity_init" in values:
        values["identity_init"] = options.get("identity_init", False)
    return values


def random_weights(shapes: reference.Shapes, generator: torch.Generator) -> reference.Weights:
    """No zero among them, so that nothing hides behind a zero-initialised scale."""

    def draw(role: str, shape: tuple[int, ...]) -> Tensor:
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        if role.endswith("running_var"):
            return 0.5 + noise.abs()
        if len(shape) > 1:
            return 1.5 * noise / torch.Size(shape[1:]).numel() ** 0.5
        return 0.3 * noise + (0.0 if role.endswith(("bias", "running_mean")) else 1.0)

    return {role: draw(role, shape) for role, shape in shapes.items()}


def fill(module: nn.Module, weights: reference.Weights, names: Mapping[str, str]) -> dict[str, str]:
    """Put the reference's weights into the block; the name in its state_dict of each role."""

    def place(role: str) -> str:
        part = max((p for p in names if f"{role}.".startswith(f"{p}.")), key=len, default="")
        return names[part] + role[len(part) :] if part else role

    places = {role: place(role) for role in weights}
    state = {k: v for k, v in module.state_dict().items() if "num_batches_tracked" not in k}

    def bare(shape: Sequence[int]) -> list[int]:
        return [n for n in shape if n != 1]

    assert {places[role]: bare(w.shape) for role, w in weights.items()} == {
        key: bare(value.shape) for key, value in state.items()
    }
    loaded = {places[role]: w.reshape(state[places[role]].shape) for role, w in weights.items()}
    module.load_state_dict(loaded, strict=False)
    return places


def assert_equal(seen: Tensor, wanted: Tensor, what: str, floor: float = 0.0) -> None:
    # Tight enough to see a norm's epsilon, or a single step in float32.
    seen, wanted = seen.detach().reshape(wanted.shape), wanted.detach()
    error = float((seen - wanted).abs().max())
    assert error <= 1e-9 * float(wanted.abs().max()) + floor, f"{what} differs by {error:.3g}"


def compare(
    module: nn.Module,
    weights: reference.Weights,
    names: Mapping[str, str],
    expected: Callable[[list[Tensor], reference.Weights], Tensor],
    inputs: list[Tensor],
) -> None:
    """Output, gradients by every input and parameter, and the state afterwards."""
    places = fill(module.double(), weights, names)
    learned = {n: p for n, p in module.named_parameters() if p.requires_grad}
    inputs = [x.requires_grad_() for x in inputs]
    y = module(*inputs)

    copies = [x.detach().clone().requires_grad_() for x in inputs]
    variables = {role: w.clone().requires_grad_() for role, w in weights.items()}
    after = dict(variables)
    wanted = expected(copies, after)
    assert_equal(y, wanted, "the output")
    for role, value in after.items():
        assert_equal(module.state_dict()[places[role]], value.detach(), f"{role} afterwards")

    cotangent = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad(y, [*inputs, *learned.values()], cotangent, materialize_grads=True)
    theirs = torch.autograd.grad(
        wanted, [*copies, *variables.values()], cotangent, materialize_grads=True
    )
    floor = 1e-12 * max(float(g.abs().max()) for g in theirs)
    for seen, gradient in zip(ours, theirs[: len(inputs)], strict=False):
        assert_equal(seen, gradient, "the gradient by the input", floor)
    by_name = dict(zip(learned, ours[len(inputs) :], strict=True))
    buffers = dict(module.named_buffers())
    for role, gradient in zip(variables, theirs[len(inputs) :], strict=True):
        if places[role] not in buffers:
            seen = by_name.get(places[role], torch.zeros_like(gradient))
            assert_equal(seen, gradient, f"the gradient by {role}", floor)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize(
    ("name", "channels", "options", "shape"),
    [
        (name, channels, options, shape)
        for name, channels, options, line in CASES
        for shape in MAPS + [LINE] * line
    ]
    + LARGE,
    ids=label,
)
def test_equals_the_paper(
    name: str, channels: int, options: Options, shape: tuple[int, int, int], training: bool
) -> None:
    # Dropout has a test of its own.
    options = options | ({"dropout": 0.0} if training and name in ("isanet", "annnet") else {})
    block = BLOCKS[name](channels, **options).train(training)
    generator = torch.Generator().manual_seed(0)
    batch, *size = shape
    x = torch.randn(batch, channels, *size, generator=generator, dtype=torch.float64)
    everything = full(name, options)
    weights = random_weights(reference.shapes(name, channels, everything), generator)
    names = {"identity": "identity.scale", **NAMES.get(name, {})}
    compare(
        block,
        weights,
        names,
        lambda inputs, w: reference.forward(name, inputs[0], w, training, everything),
        [x],
    )


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("batch", [1, 2])
def test_two_level_fusion_equals_the_paper(batch: int, training: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    low, high = (
        torch.randn(batch, *shape, generator=generator, dtype=torch.float64)
        for shape in ((9, 9, 11), (20, 5, 7))
    )
    names = {
        "query": "query.0",
        "query_norm": "query.1",
        "key": "key.0",
        "key_norm": "key.1",
        "out": "context",
        "fuse": "out.0",
        "fuse_norm": "out.1",
    }
    compare(
        AsymmetricFusion(9, 20, width=6, dropout=0.0).train(training),
        random_weights(reference.afnb_shapes(9, 20, 6), generator),
        names,
        lambda inputs, w: reference.afnb(*inputs, w, training),
        [low, high],
    )


@pytest.mark.parametrize("name", ["isanet", "annnet"])
def test_dropout_drops_whole_channels(name: str) -> None:
    torch.manual_seed(0)
    whole, dropping = (BLOCKS[name](16, dropout=p).train().double() for p in (0.0, 0.5))
    dropping.load_state_dict(whole.state_dict())
    x = torch.randn(2, 16, 5, 7, dtype=torch.float64)
    wanted, y = whole(x), dropping(x)
    kept = ((y - 2 * wanted).abs() <= 1e-9).all(3).all(2)
    dropped = (y == 0).all(3).all(2)
    assert (kept | dropped).all()
    assert 4 <= kept.sum() <= 28


def test_every_block_and_option_is_compared() -> None:
    assert set(BLOCKS) == set(catalog.BLOCKS) == set(reference.FORWARDS) == set(reference.SHAPES)
    for name, entry in catalog.BLOCKS.items():
        used = [full(name, options) for case, _, options, _ in CASES if case == name]
        for option, rule in entry.options.items():
            values = {values[option] for values in used}
            assert len(values) > 1, f"{name}: {option} is only {values}"
            assert isinstance(rule, catalog.Option) and values >= set(rule.words)
