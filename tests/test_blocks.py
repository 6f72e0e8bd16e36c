"""The contract, over every registered block and every option of the catalogue, and the costs."""

import inspect
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from nasattn.blocks import BLOCKS, tokens
from nasattn.blocks.annnet import AsymmetricFusion
from nasattn.catalog import BLOCKS as CATALOG
from nasattn.catalog import Option, Scalar
from nasattn.errors import UserError

Options = dict[str, Any]
FORMATS = (torch.contiguous_format, torch.channels_last)

# What another option must be, for this one to matter.
NEEDS: dict[tuple[str, str], Options] = {("gcnet", "identity_init"): {"fusion": "mul"}}


def other_values(option: str, rule: Option) -> list[Scalar]:
    """Allowed values that are not the default: all words, one number."""
    default = rule.default
    if isinstance(default, bool):
        return [not default]
    if isinstance(default, str):
        return [word for word in rule.words if word != default]
    if option == "kernel":
        return [9]
    if isinstance(default, int):
        return [default + 2]
    return [2 * default if 2 * default <= rule.high else default / 2]


def changes(name: str) -> Iterator[tuple[str, Scalar]]:
    for option, rule in CATALOG[name].options.items():
        assert isinstance(rule, Option)
        for value in other_values(option, rule):
            yield option, value


def case_id(value: object) -> str | None:
    if isinstance(value, dict):
        return ",".join(f"{option}={setting}" for option, setting in value.items()) or "defaults"
    return None


CHANGES = [(n, option, value) for n in BLOCKS for option, value in changes(n)]
# Every block in its paper's form, and with each option changed in turn.
VARIANTS = [(n, {}) for n in BLOCKS] + [
    (n, NEEDS.get((n, option), {}) | {option: value})
    for n, option, value in CHANGES
    if not (option == "identity_init" and value is False)
]
VARIANTS += [(n, {"identity_init": True}) for n in BLOCKS if "identity_init" in CATALOG[n].options]
every_variant = pytest.mark.parametrize(("name", "options"), VARIANTS, ids=case_id)
every_block = pytest.mark.parametrize("name", BLOCKS)


def make(name: str, channels: int = 64, *, lifted: bool = True, **options: Any) -> nn.Module:
    """The block; `lifted`, with its zero-initialised parameters at random values instead."""
    torch.manual_seed(0)
    block = BLOCKS[name](channels, **options)
    if lifted:
        for parameter in block.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.5)
    return block


def maps(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def strides(x: Tensor) -> list[int]:
    """Without those of axes of length 1, which say nothing."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


# The registry


def test_registry_and_catalogue_have_the_same_blocks() -> None:
    assert list(BLOCKS) == list(CATALOG)


@every_block
def test_signature_is_the_catalogues_row(name: str) -> None:
    first, *rest = inspect.signature(BLOCKS[name]).parameters.values()
    assert first.name == "channels"
    assert all(p.kind is p.KEYWORD_ONLY for p in rest)
    wanted = {o: rule.default for o, rule in CATALOG[name].options.items()}
    if "identity_init" in wanted:
        wanted["identity_init"] = False
    assert {p.name: p.default for p in rest} == wanted
    assert CATALOG[name].starts_as_identity or "identity_init" in wanted


# The contract


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@pytest.mark.parametrize("shape", [(2, 7, 5), (1, 7, 5), (1, 14, 14), (2, 1, 9)])
@every_variant
def test_same_shape_dtype_and_memory_format(
    name: str, options: Options, shape: tuple[int, int, int], memory_format: torch.memory_format
) -> None:
    batch, height, width = shape
    x = maps(batch, 64, height, width).contiguous(memory_format=memory_format)
    block = make(name, **options)
    for training in (True, False):
        y = block.train(training)(x)
        assert y.shape == x.shape and y.dtype == x.dtype
        assert strides(y) == strides(x)
        assert y.isfinite().all()


# A zero gradient that mathematics demands: a softmax does not see what it adds to all logits alike.
SHIFT = "adds the same to all logits of a softmax"
NO_GRADIENT: dict[str, dict[str, str]] = {
    "self_attention": {"key.bias": SHIFT},
    "danet": {"position.key.bias": SHIFT},
    "ccnet": {"key.bias": SHIFT},
    "gcnet": {"mask.bias": SHIFT},
    "a2net": {"gather.bias": SHIFT},
    "dmsanet": {"attend.dual.position.key.bias": SHIFT},
}


def no_gradient(name: str, options: Options) -> set[str]:
    excused = set(NO_GRADIENT.get(name, {}))
    if name == "non_local" and options.get("mode", "embedded_gaussian") == "embedded_gaussian":
        excused.add("phi.bias")
    if options.get("distribute") == "positions":
        excused.add("distribute.bias")
    return excused


@every_variant
def test_every_parameter_learns_once_it_is_not_zero(name: str, options: Options) -> None:
    # In eval mode: in training a batch norm takes away the bias of what is before it.
    block = make(name, **options).eval().double()
    x = maps(2, 64, 12, 11, dtype=torch.float64)  # more than one cell of isanet
    y = block(x)
    if list(block.parameters()):
        (y * maps(*y.shape, dtype=torch.float64, seed=2)).sum().backward()
    trained = {n: p for n, p in block.named_parameters() if p.requires_grad}
    frozen = {n for n, p in block.named_parameters() if not p.requires_grad}
    assert all(p.grad is not None for p in trained.values())
    none = {n for n, p in trained.items() if p.grad is not None and p.grad.abs().max() < 1e-9}
    assert none == no_gradient(name, options) & set(trained)
    official = name == "emanet" and not options.get("gradients", False)
    assert frozen == ({"before.weight", "before.bias"} if official else set())


@every_variant
def test_an_empty_batch_stays_empty(name: str, options: Options) -> None:
    """As any module of torch's leaves it: a detector may have found nothing to crop."""
    out = BLOCKS[name](32, **options).eval()(torch.zeros(0, 32, 7, 5))
    assert out.shape == (0, 32, 7, 5)


@every_variant
def test_samples_are_independent_in_eval(name: str, options: Options) -> None:
    block = make(name, **options).eval().double()
    x = maps(3, 64, 7, 6, dtype=torch.float64)
    alone = torch.cat([block(sample) for sample in x.split(1)])
    torch.testing.assert_close(block(x), alone, rtol=1e-9, atol=1e-9)


def observe(block: nn.Module, x: Tensor) -> list[Tensor]:
    """All that a training pass shows: the output, the gradients and the buffers afterwards."""
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    y = block.train()(x)
    y.square().sum().backward()
    grads = [p.grad if p.grad is not None else torch.zeros(()) for p in block.parameters()]
    return [y, *([] if x.grad is None else [x.grad]), *grads, *block.buffers()]


@pytest.mark.parametrize(("name", "option", "value"), CHANGES)
def test_every_option_changes_something(name: str, option: str, value: Scalar) -> None:
    default: Options = {"identity_init": True} if option == "identity_init" else {}
    default = NEEDS.get((name, option), {}) | default
    # 256 channels, where CoordAtt's least width of 8 does not hide its ratio.
    plain, changed = (make(name, 256, **o) for o in (default, default | {option: value}))
    state, others = plain.state_dict(), changed.state_dict()
    if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in others.items()}:
        return
    changed.load_state_dict(state)
    x = maps(2, 256, 6, 5)
    pairs = zip(observe(plain, x), observe(changed, x), strict=True)
    assert not all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["nchw", "channels_last"])
@every_variant
def test_identity_at_first(name: str, options: Options, memory_format: torch.memory_format) -> None:
    if "identity_init" in CATALOG[name].options:
        options = options | {"identity_init": True}
    block = make(name, lifted=False, **options)
    x = maps(2, 64, 7, 6).contiguous(memory_format=memory_format)
    for training in (True, False):
        assert (block.train(training)(x) - x).abs().max() == 0


@every_block
def test_papers_form_is_the_identity_where_the_catalogue_says_so(name: str) -> None:
    x = maps(2, 64, 7, 6)
    assert torch.equal(make(name, lifted=False)(x), x) == CATALOG[name].starts_as_identity


def test_zero_scales_have_at_most_one_axis_so_that_they_do_not_decay() -> None:
    scales = 0
    for name in BLOCKS:
        options = {o: True for o in CATALOG[name].options if o == "identity_init"}
        for key, parameter in make(name, lifted=False, **options).named_parameters():
            if key.rpartition(".")[2] in ("gamma", "scale"):
                scales += 1
                assert parameter.ndim <= 1 and not parameter.any()
    assert scales == 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@every_variant
def test_autocast_is_finite_and_close(name: str, options: Options, dtype: torch.dtype) -> None:
    block = make(name, **options).eval()
    x = maps(2, 64, 7, 6)
    wanted = block(x)
    with torch.autocast("cpu", dtype):
        y = block(x)
        narrow = block(x.to(dtype))
    assert y.dtype == x.dtype and narrow.dtype == dtype
    # Attention without a scale turns logits' rounding into much of a weight: close, not equal.
    for seen in (y, narrow.float()):
        assert (seen - wanted).norm() <= 0.1 * wanted.norm()


@every_variant
def test_large_activations_survive_float16_autocast(name: str, options: Options) -> None:
    block = make(name, **options).eval()
    with torch.autocast("cpu", torch.float16):
        assert block(100 * maps(2, 64, 13, 11)).isfinite().all()


@every_variant
def test_float64_stays_float64(name: str, options: Options) -> None:
    block = make(name, **options).eval()
    x = maps(2, 64, 7, 6)
    single, double = block(x), block.double()(x.double())
    assert double.dtype == torch.float64
    assert (single - double).norm() <= 1e-4 * double.norm()


REFUSED = [
    ("self_attention", 7, {}),
    ("danet", 7, {}),
    ("danet", 12, {"ratio": 0.07}),
    ("ccnet", 7, {}),
    ("gcnet", 31, {}),
    ("gcnet", 24, {"fusion": "mul"}),
    ("dmsanet", 24, {}),
    ("dmsanet", 34, {}),
    ("dmsanet", 12, {"mode": "gate"}),
    ("eca", 16, {"kernel": 4}),
    ("cbam", 16, {"kernel": 2}),
]


@pytest.mark.parametrize(("name", "channels", "options"), REFUSED, ids=case_id)
def test_refused_with_a_remedy(name: str, channels: int, options: Options) -> None:
    with pytest.raises(UserError, match=rf"^{name}\(.*(needs|odd)") as caught:
        BLOCKS[name](channels, **options)
    if remedy := re.search(r"ratio from ([\d.]+)", str(caught.value)):
        ratio = float(remedy[1])
        BLOCKS[name](channels, **(options | {"ratio": ratio}))
        with pytest.raises(UserError):
            BLOCKS[name](channels, **(options | {"ratio": ratio * 0.99}))


def test_a_block_that_no_ratio_saves_is_refused_by_its_channels() -> None:
    with pytest.raises(UserError, match=r"gcnet\(ratio=1\) at 1 channels .* 2 channels"):
        BLOCKS["gcnet"](1, ratio=1.0)


# Cost: closed forms of the papers' blocks, C channels at H x W; a convolution a -> b of N positions
# is N a b, softmax attention of N queries, M keys, widths d and e is N M (d + e).


def share(c: int, ratio: float) -> int:
    return max(1, int(c * ratio))


Costs = tuple[int, int, int]  # parameters, MACs, map elements


def self_attention(c: int, h: int, w: int, ratio: float, value_ratio: float, pool: int) -> Costs:
    n, m, d, e = h * w, (h // pool) * (w // pool), share(c, ratio), share(c, value_ratio)
    out = value_ratio < 1
    params = c * (2 * d + e) + 2 * d + e + 1 + out * (e * c + c)
    return params, n * c * (2 * d + e) + out * n * e * c + n * m * (d + e), n * m


def non_local(  # type: ignore[no-untyped-def]
    c: int, h: int, w: int, ratio: float, mode: str, subsample: str, scale: bool, norm: bool
):
    n, d = h * w, share(c, ratio)
    m = n if subsample == "none" else (h // 2) * (w // 2)
    source = m if subsample == "before" else n
    embedded = 0 if mode == "gaussian" else 1
    params = d * c + c + d * c + d + 2 * embedded * (c * d + d) + 2 * c * norm
    macs = n * c * d * (1 + embedded) + source * c * d * (1 + embedded)
    match mode:
        case "embedded_gaussian":
            return params, macs + 2 * n * m * d, n * m
        case "gaussian":
            return params, macs + n * m * (c + d), n * m
        case "dot_product":
            by_positions, by_channels = 2 * n * m * d, (n + m) * d * d
            elements = n * m if by_positions < by_channels else d * d
            return params, macs + min(by_positions, by_channels), elements
        case _:
            return params + 2 * d, macs + (n + m) * d, n * m


def danet(c: int, h: int, w: int, ratio: float, branches: str, channel: str) -> Costs:
    n, d = h * w, share(c, ratio)
    position, channels = branches != "channel", branches != "position"
    params = position * (c * (2 * d + c) + 2 * d + c + 1) + channels
    macs = position * (n * c * (2 * d + c) + n * n * (d + c)) + channels * 2 * n * c * c
    return params, macs, position * n * n + channels * c * c


def a2net(c: int, h: int, w: int, ratio: float, maps_ratio: float, **_: Any) -> Costs:
    n, cm, cn = h * w, share(c, ratio), share(c, maps_ratio)
    params = c * cm + cm + 2 * (c * cn + cn) + cm * c + c
    return params, n * c * (cm + 2 * cn) + 2 * n * cm * cn + n * cm * c, 2 * n * cn


def ccnet(c: int, h: int, w: int, ratio: float, recurrence: int) -> Costs:
    n, d = h * w, share(c, ratio)
    macs = n * c * (2 * d + c) + n * (h + w) * (d + c)
    return c * (2 * d + c) + 2 * d + c + 1, recurrence * macs, n * (h + w)


def gcnet(c: int, h: int, w: int, ratio: float, pooling: str, fusion: str, **_: Any) -> Costs:
    n, p = h * w, int(c * ratio)
    transforms, attended = len(fusion.split("_")), pooling == "att"
    params = attended * (c + 1) + transforms * (2 * c * p + 3 * p + c)
    macs = attended * 2 * n * c + transforms * 2 * c * p
    return params, macs, attended * n + ("mul" in fusion) * c


def emanet(c: int, h: int, w: int, bases: int, stages: int, **_: Any) -> Costs:
    n = h * w
    return 2 * c * c + 3 * c, 2 * n * c * c + (2 * stages + 1) * n * bases * c, n * bases


def isanet(c: int, h: int, w: int, ratio: float, size: int, padding: str, **_: Any) -> Costs:
    k, p = share(c, ratio), size * size
    n, padded = h * w, math.ceil(h / size) * math.ceil(w / size) * p
    q = padded // p
    projected = n if padding == "masked" else padded
    params = 2 * (2 * (c * k + k * k) + 2 * c * c + 8 * k + 2 * c) + 2 * c * c + 2 * c
    macs = projected * 2 * (2 * (c * k + k * k) + 2 * c * c) + padded * (q + p) * (k + c)
    return params, macs + n * 2 * c * c, padded * (q + p)


def annnet(c: int, h: int, w: int, ratio: float, **_: Any) -> Costs:
    n, k, s = h * w, share(c, ratio), 110
    params = (c * k + 3 * k) + (c * k + k) + (k * c + c) + (2 * c * c + c + 2 * c)
    # The values are projected where that is less: on the samples, or before the pooling.
    macs = n * c * k + min(n, s) * c * k + n * k * c + n * 2 * c * c + n * s * 2 * k
    return params, macs, n * s


def lightnl(c: int, h: int, w: int, ratio: float, stride: int, **_: Any) -> Costs:
    n, m, r = h * w, math.ceil(h / stride) * math.ceil(w / stride), share(c, ratio)
    by_positions, by_channels = n * m * (c + r), (n + m) * c * r
    elements = n * m if by_positions < by_channels else c * r
    return 11 * c, min(by_positions, by_channels) + 9 * c * n, elements


def dmsanet(c: int, h: int, w: int, mode: str, scales: str, **_: Any) -> Costs:
    n, q, s = h * w, c // 4, max(1, c // 64)
    groups = [math.gcd(g, c, q) for g in (1, 4, 8, 16)]
    kernels = (3, 5, 7, 9)
    convs = {
        "pyramid": sum(c // g * q * k * k for g, k in zip(groups, kernels, strict=True)),
        "depthwise": sum(q * k * k for k in kernels),
        "split": 0,
    }[scales]
    params, macs = convs + 2 * q * s + s + q, n * convs + 4 * 2 * q * s
    if mode == "gate":
        return params + 3 * q, macs, 4 * (q // 2 + q // 2 * n) + c
    d = q // 8
    params += q * q + 2 * q * d + q + 2 * d + 2
    macs += 4 * (n * (q * q + 2 * q * d) + n * n * (d + q) + 2 * n * q * q)
    return params, macs, 4 * (n * n + q * q) + c


def se(c: int, h: int, w: int, ratio: float, **_: Any) -> Costs:
    d = share(c, ratio)
    return 2 * c * d + d + c, 2 * c * d, c


def eca(c: int, h: int, w: int, kernel: int, **_: Any) -> Costs:
    t = int(abs(math.log2(c) + 1) / 2)
    k = kernel or t + 1 - t % 2
    return k, k * c, c


def cbam(c: int, h: int, w: int, ratio: float, kernel: int, **_: Any) -> Costs:
    d, taps = share(c, ratio), 2 * kernel**2
    return 2 * c * d + taps + 2, 4 * c * d + taps * h * w, c + h * w


def coordatt(c: int, h: int, w: int, ratio: float, **_: Any) -> Costs:
    m = max(8, int(c * ratio))
    return c * m + 3 * m + 2 * (m * c + c), 2 * (h + w) * c * m, c * (h + w)


def simam(c: int, h: int, w: int, **_: Any) -> Costs:
    return 0, 0, c * h * w


FORMS: dict[str, Callable[..., Costs]] = {
    form.__name__: form
    for form in (
        *(self_attention, non_local, danet, a2net, ccnet, gcnet, emanet, isanet, annnet, lightnl),
        *(dmsanet, se, eca, cbam, coordatt, simam),
    )
}


def cost(name: str, c: int, h: int, w: int, **options: Any) -> Costs:
    with torch.device("meta"):
        block = BLOCKS[name](c, **options).eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            y = block(torch.empty(1, c, h, w))
    assert y.is_meta and y.shape == (1, c, h, w)
    params = sum(p.numel() for p in block.parameters())
    return params, counter.get_total_flops() // 2, block.map_elements(h, w)


@pytest.mark.parametrize(("c", "h", "w"), [(64, 56, 56), (96, 14, 13), (160, 7, 7), (512, 97, 97)])
@every_variant
def test_cost_equals_the_closed_form(name: str, options: Options, c: int, h: int, w: int) -> None:
    values = {o: rule.default for o, rule in CATALOG[name].options.items()}
    values = values | {"identity_init": False} | options
    params, macs, elements = FORMS[name](
        c, h, w, **{o: v for o, v in values.items() if o in CATALOG[name].options}
    )
    scale = values["identity_init"] and (name, values.get("fusion")) != ("gcnet", "add")
    assert cost(name, c, h, w, **options) == (params + bool(scale), macs, elements)


# Figures of a survey of the public code, computed there: params, GMACs, attention-map elements.
SURVEY = [
    ("self_attention", {}, 512, 97, 328_321, 54.076, 88_529_281),
    ("non_local", {}, 512, 97, 526_592, 50.260, 88_529_281),
    ("non_local", {"subsample": "after"}, 512, 97, 526_592, 16.032, 21_678_336),
    ("non_local", {"mode": "dot_product"}, 512, 97, 526_592, 6.166, 65_536),
    ("danet", {}, 512, 97, 328_322, 59.009, 88_791_425),
    ("a2net", {"ratio": 0.25, "maps_ratio": 0.25}, 512, 97, 263_040, 2.775, 2_408_704),
    ("a2net", {}, 512, 97, 525_568, 6.166, 4_817_408),
    ("ccnet", {"recurrence": 1}, 512, 97, 328_321, 4.135, 1_825_346),
    ("ccnet", {}, 512, 97, 328_321, 8.269, 1_825_346),
    ("gcnet", {}, 512, 97, 33_889, 0.010, 9_409),
    ("emanet", {}, 512, 97, 525_824, 7.091, 602_176),
    ("isanet", {}, 512, 97, 2_366_464, 26.716, 2_520_128),
    ("lightnl", {}, 512, 97, 5_632, 1.277, 65_536),
    ("lightnl", {"stride": 2}, 512, 97, 5_632, 0.817, 65_536),
    ("self_attention", {}, 1024, 14, 1_312_001, 0.301, 38_416),
    ("non_local", {"mode": "dot_product"}, 1024, 14, 2_101_760, 0.450, 38_416),
    ("gcnet", {}, 1024, 14, 133_313, 0.001, 196),
    ("isanet", {}, 1024, 14, 9_451_520, 2.317, 17_408),
    ("lightnl", {}, 1024, 14, 11_264, 0.051, 38_416),
    ("lightnl", {"stride": 2}, 1024, 14, 11_264, 0.014, 9_604),
    ("danet", {}, 64, 56, 5_202, 0.750, 9_838_592),
    ("emanet", {}, 64, 56, 8_384, 0.116, 200_704),
    ("lightnl", {}, 64, 56, 704, 0.008, 1_024),
]


@pytest.mark.parametrize(("name", "options", "c", "side", "params", "gmacs", "elements"), SURVEY)
def test_cost_is_that_of_the_survey(
    name: str, options: Options, c: int, side: int, params: int, gmacs: float, elements: int
) -> None:
    seen = cost(name, c, side, side, **options)
    assert (seen[0], round(seen[1] / 1e9, 3), seen[2]) == (params, gmacs, elements)


# Lean


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that any operator returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(each, Tensor):
                self.elements = max(self.elements, each.numel())
        return out


@every_variant
def test_no_map_from_all_positions_to_all(name: str, options: Options) -> None:
    positions = 40 * 41
    block = make(name, 32, **options)
    x = maps(1, 32, 40, 41).requires_grad_()
    with Largest() as largest:
        block(x).sum().backward()
    # Less than the map from all positions to a quarter of them; crosses, cells and bases are less.
    assert largest.elements < positions**2 / 4


@pytest.mark.parametrize("d, e", [(2, 16), (16, 16), (24, 8)])
@pytest.mark.parametrize("hidden", [False, True], ids=["all", "some-hidden"])
def test_attention_without_a_map_equals_attention_by_its_map(d: int, e: int, hidden: bool) -> None:
    # Channel-major, as NCHW gives them: the kernels do not take such strides.
    shapes = ((2, d, 50), (2, d, 70), (2, e, 70))
    q, k, v = (maps(*s, dtype=torch.float64, seed=i).mT for i, s in enumerate(shapes))
    bias = maps(2, 1, 70, dtype=torch.float64) * 9 if hidden else None
    operands = [x.requires_grad_() for x in (q, k, v)]
    assert 70 > 4 * e, "else both are by the map"
    lean = tokens.attend(*operands, 0.7, bias)
    by_map = tokens._attend_by_map(*operands, 0.7, bias)
    torch.testing.assert_close(lean, by_map, rtol=1e-9, atol=1e-12)
    cotangent = maps(*lean.shape, dtype=torch.float64, seed=9)
    for a, b in zip(
        torch.autograd.grad(lean, operands, cotangent),
        torch.autograd.grad(by_map, operands, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


# What belongs to one block


def ema(**options: Any) -> nn.Module:
    return make("emanet", 8, bases=5, lifted=False, **options).train()


def test_bases_move_once_a_step_however_the_batch_is_cut() -> None:
    x = maps(4, 8, 5, 4)
    whole, cut = ema(), ema()
    whole(x)
    for part in x.split((1, 3)):
        cut(part).sum().backward()
    assert not torch.equal(whole.bases, ema().bases)
    torch.testing.assert_close(cut.bases, whole.bases)


def test_bases_move_on_after_a_step() -> None:
    x = maps(2, 8, 5, 4)
    block = ema(identity_init=True)
    optimiser = torch.optim.SGD([p for p in block.parameters() if p.requires_grad], lr=0.1)
    seen = [block.bases.clone()]
    for _ in range(2):
        for _ in range(2):  # two passes a step
            block(x).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
        seen.append(block.bases.clone())
    again = ema()
    again.load_state_dict(block.state_dict(), strict=False)
    again.bases.copy_(seen[1])
    again(x)
    assert not torch.equal(seen[1], seen[2])
    torch.testing.assert_close(again.bases, seen[2])


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_repeats_the_pass_and_not_the_move(reentrant: bool, gradients: bool) -> None:
    plain, checked = ema(gradients=gradients), ema(gradients=gradients)
    for step in range(2):
        x = maps(2, 8, 5, 4, seed=step)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        plain(inputs[0]).square().sum().backward()
        out = checkpoint(checked, inputs[1], use_reentrant=reentrant)
        out.square().sum().backward()
        assert torch.equal(inputs[0].grad, inputs[1].grad)
        torch.testing.assert_close(plain.bases, checked.bases)
        for block in (plain, checked):
            torch.optim.SGD([block.norm.weight], lr=0.1).step()


def test_bases_follow_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks in one process: what one sends is noted, and added to what the other sends."""
    x = maps(5, 8, 5, 4)
    whole = ema()
    whole(x)
    sent: list[Tensor] = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t: sent.append(t.clone()))
    ema()(x[:2])
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t: t.add_(sent[0]))
    rank = ema()
    rank(x[2:])
    torch.testing.assert_close(rank.bases, whole.bases)


def test_eval_leaves_the_bases_and_they_are_all_that_is_saved() -> None:
    block = ema()
    before = block.bases.clone()
    block.eval()(maps(2, 8, 5, 4))
    assert torch.equal(block.bases, before)
    extra = {k for k, _ in block.named_buffers()} & {"start", "total", "count", "seen"}
    assert extra and not extra & set(block.state_dict())


@pytest.mark.parametrize("stride", [1, 2])
def test_lightnl_counts_the_same_by_both_associations(stride: int) -> None:
    x = maps(2, 16, 7, 5, dtype=torch.float64)
    by_way = []
    for by_positions in (True, False):
        block = make("lightnl", 16, stride=stride).double()
        block._by_positions = lambda *_, by=by_positions: by
        by_way.append(block(x))
    torch.testing.assert_close(*by_way, rtol=1e-12, atol=1e-12)


def test_interlaced_attention_reaches_every_position_from_every_other() -> None:
    block = make("isanet", 16, size=3).eval()
    x = maps(1, 16, 6, 9).requires_grad_()
    padded = block.short(block.long(x, (0, 0, 0, 0)), (0, 0, 0, 0))
    padded[0, :, 1, 7].sum().backward()
    assert x.grad.abs().sum(1).all()


def test_two_level_fusion_learns_from_both_levels() -> None:
    torch.manual_seed(0)
    block = AsymmetricFusion(8, 16, width=6).eval()
    for zero in block.context.parameters():
        nn.init.normal_(zero)
    low, high = maps(2, 8, 12, 10).requires_grad_(), maps(2, 16, 6, 5).requires_grad_()
    y = block(low, high)
    y.square().sum().backward()
    assert y.shape == high.shape and block.map_elements(6, 5) == 30 * 110
    assert low.grad.abs().sum(1).all() and high.grad.abs().sum(1).all()
    assert all(p.grad.abs().max() > 0 for p in block.parameters())
