"""From an architecture to a network; insertion of blocks into any network by module path.

An insertion leaves the network's own state_dict keys alone (so its weights load as before) and,
since every block is placed as the identity, leaves its output alone too until it is trained.
"""

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from nasattn.architecture import Architecture, Backbone, Placement, Site, site_order
from nasattn.backbones import build as build_backbone
from nasattn.blocks import BLOCKS
from nasattn.errors import UserError, suggest

# The child that holds an inserted block: its parameters are `<site>.attention.*`.
CHILD = "attention"

Shape = tuple[int, ...]


def build(architecture: Architecture) -> nn.Module:
    """The network of an architecture with fresh weights, on the current default device."""
    network = build_backbone(architecture.backbone, architecture.input[0], architecture.classes)
    if architecture.placements:
        sites = plain_sites(architecture.backbone, architecture.input)
        channels = {site.name: site.channels for site in sites}
        for placement in canonical(architecture).placements:
            block = make_block(placement, channels[placement.site])
            _attach(network, placement.site, block)
    return network


def canonical(architecture: Architecture) -> Architecture:
    """The same network with every site by its first name: a place that has two names (inside and
    behind a block without a skip) goes by the outer one. A UserError names a site that is missing.
    """
    sites = plain_sites(architecture.backbone, architecture.input)
    names = {name: site.name for site, alias in sites.items() for name in (alias, site.name)}
    for placement in architecture.placements:
        if placement.site not in names:
            raise UserError(
                f"the backbone has no site '{placement.site}'; "
                f"allowed: {', '.join(site.name for site in sites)}{suggest(placement.site, names)}"
            )
    placements = (replace(p, site=names[p.site]) for p in architecture.placements)
    return replace(architecture, placements=tuple(placements))


def insert(module: nn.Module, placements: Mapping[str, str], example: Tensor) -> nn.Module:
    """A copy of any network with blocks behind some of its modules.

    placements: module path -> block spec, such as `{"features.3": "lightnl(ratio=0.25)"}`.
    example: an input of the network; run to learn each place's channels, which must be those of an
    (N, C, H, W) map. A UserError names a path that is unknown, is not run exactly once, or whose
    output is no such map.
    """
    if not isinstance(placements, Mapping) or not all(
        isinstance(spec, str) for spec in placements.values()
    ):
        raise UserError(
            f"placements: got {placements!r}; allowed: module path -> block spec, such as "
            '{"features.3": "lightnl(ratio=0.25)"}'
        )
    if not isinstance(example, Tensor):
        raise UserError(f"example: got {example!r}; allowed: a tensor, an input of the network")
    network = copy.deepcopy(module)
    parsed = [Placement.parse(path, spec) for path, spec in placements.items()]
    shapes = trace(network, example, [p.site for p in parsed])
    like = next((p for p in network.parameters() if p.is_floating_point()), example)
    for placement in sorted(parsed, key=lambda p: site_order(p.site)):
        shape = shapes[placement.site]
        if len(shape) != 4:
            what = f"has the shape {shape}" if shape else "is not one tensor"
            raise UserError(
                f"'{placement.site}': its output {what}; "
                "a block stands only on one map (N, C, H, W)"
            )
        _attach(network, placement.site, make_block(placement, shape[1]).to(like))
    # A module that runs its children in its own way may run the new one too, and so twice.
    trace(network, example, [f"{p.site}.{CHILD}" for p in parsed])
    return network


def make_block(placement: Placement, channels: int) -> nn.Module:
    """The placement's block for a map of that many channels; a UserError says why it cannot be."""
    options: dict[str, Any] = dict(placement.options)
    return BLOCKS[placement.block](channels, **options)


def inserted(network: nn.Module) -> dict[str, nn.Module]:
    """Module path -> the block that stands behind it."""
    blocks = {}
    for name, module in network.named_modules():
        if name.endswith(f".{CHILD}") and type(module) in BLOCKS.values():
            blocks[name.removesuffix(f".{CHILD}")] = module
    return blocks


def load_backbone(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load a plain backbone's state_dict, strictly: it lacks the blocks' own keys and no other."""
    blocks = inserted(network).items()
    own = {f"{name}.{CHILD}.{key}" for name, block in blocks for key in block.state_dict()}
    # Compared here, as torch does not call a norm's missing batch counter missing.
    wrong = sorted((set(network.state_dict()) - own) ^ set(weights))
    if wrong:
        raise UserError(
            f"these are not the weights of this backbone: {len(wrong)} keys differ: "
            f"{', '.join(wrong[:5])}"
        )
    try:
        network.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise UserError(f"these are not the weights of this backbone: {error}") from None


def trace(network: nn.Module, example: Tensor, names: Iterable[str]) -> dict[str, Shape]:
    """Each named module's output shape, from one run in eval mode; the network stays as it was.

    An output that is no tensor has the shape (). A UserError names a module that is not there, or
    that the network does not run exactly once (a block behind it would then act twice or never).
    """
    modules, shapes, calls = dict(network.named_modules()), dict[str, Shape](), dict[str, int]()
    names = list(names)
    for name in names:
        if name not in modules or not name:
            known = [n for n in modules if n]
            raise UserError(f"the network has no module '{name}'{suggest(name, known)}")

    def watch(name: str) -> Any:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            shapes[name] = tuple(output.shape) if isinstance(output, Tensor) else ()

        return modules[name].register_forward_hook(note)

    hooks = [watch(name) for name in names]
    training = {module: module.training for module in network.modules()}
    try:
        with torch.no_grad():
            network.eval()(example)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
    for name in names:
        if calls.get(name, 0) != 1:
            raise UserError(
                f"'{name}' is run {calls.get(name, 0)} times in one pass; "
                "a block needs a module that is run exactly once"
            )
    return shapes


@lru_cache(maxsize=64)
def plain_sites(backbone: Backbone, input: tuple[int, int, int]) -> Mapping[Site, str]:
    """All sites of a backbone in forward order, each with its other name (or its own)."""
    shapes, names = _traced_sites(backbone, input)
    return {
        Site(name=name, channels=shapes[name][1], stride=round(input[1] / shapes[name][2])): alias
        for name, alias in names.items()
    }


def block_inputs(plain: Architecture) -> dict[str, Shape]:
    """Block of the backbone (`stage2.1`) -> the shape of its input, counted on the meta device."""
    with torch.device("meta"):
        network = build_backbone(plain.backbone, plain.input[0], 1)
        names = [n for n, _ in network.named_modules() if re.fullmatch(r"stage\d+\.\d+", n)]
        shapes = trace(network, torch.empty(1, *plain.input), ["stem", *names])
    return {name: shapes[before] for before, name in zip(["stem", *names], names, strict=False)}


def site_shapes(backbone: Backbone, input: tuple[int, int, int]) -> Mapping[str, Shape]:
    """Site -> (1, C, H, W), counted on the meta device."""
    return _traced_sites(backbone, input)[0]


@lru_cache(maxsize=64)
def _traced_sites(
    backbone: Backbone, input: tuple[int, int, int]
) -> tuple[Mapping[str, Shape], Mapping[str, str]]:
    with torch.device("meta"):
        network = build_backbone(backbone, input[0], 1)
        names = network.sites()
        try:
            return trace(network, torch.empty(1, *input), names), names
        except RuntimeError as error:
            raise UserError(f"the backbone cannot take the input {list(input)}: {error}") from None


def _attach(network: nn.Module, path: str, block: nn.Module) -> None:
    """Put the block behind the module, as its child, so that no key of the network changes."""
    module = network.get_submodule(path)
    if hasattr(module, CHILD):
        raise UserError(f"'{path}' already has a part named '{CHILD}'; choose another module")
    block.train(module.training)
    module.add_module(CHILD, block)
    if type(module).forward is not nn.Sequential.forward:  # a Sequential runs its last child itself
        module.register_forward_hook(_through_block)


def _through_block(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    result: Tensor = module.get_submodule(CHILD)(output)
    return result
