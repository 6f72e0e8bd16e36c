"""What `nasattn cost` says of a network or an experiment. Nothing is trained."""

import importlib
import inspect
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nasattn.architecture import NONE, Architecture
from nasattn.backbones.layers import SqueezeExcite
from nasattn.config import Experiment
from nasattn.cost import CostTable, count, measure
from nasattn.document import load_yaml
from nasattn.errors import UserError, suggest
from nasattn.model import Shape, build, canonical, site_shapes
from nasattn.pricing import Candidates
from nasattn.record import amount
from nasattn.skeleton import SUFFIX
from nasattn.space import SearchSpace

# AutoNL's published figures count also the averages of squeeze-and-excite and of the head, one
# for each element that is averaged: 266,878,784 for AutoNL-S, where the products are 266,242,176.
POOLED = "with averages counted, as AutoNL's paper does"


def quote(target: str, input_shape: tuple[int, ...] | None = None) -> dict[str, Any]:
    """{"cost": {metric: number}, "by_site": [{"site", "spec", "cost"}], "notes": {name: text}}.
    Of an architecture also `key`, `backbone` (the plain one's cost), `by_block`; of an experiment
    `limits`, and of each row whether it `fits`.

    target: the YAML file of an architecture or of an experiment, or `package.module:function`, a
    function without arguments that returns an nn.Module. input_shape: of the module's input.
    """
    if ":" in target and not Path(target).exists():
        return _of_module(target, input_shape)
    if input_shape is not None:
        raise UserError(f"--shape: {target} has its own input; allowed with MODULE:FUNCTION only")
    fields, source = load_yaml(Path(target))
    if isinstance(fields, dict) and {"study", "space"} & fields.keys():
        return _of_experiment(Experiment.load(target))
    return _of_architecture(Architecture.from_dict(fields, source))


def parse_shape(text: str | None) -> tuple[int, ...] | None:
    """`3,224,224` -> (3, 224, 224)."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if len(parts) not in (3, 4) or not all(re.fullmatch("0*[1-9][0-9]{0,6}", p) for p in parts):
        raise UserError(f"--shape: got '{text}'; allowed: channels,height,width such as 3,224,224")
    return tuple(int(part) for part in parts)


@contextmanager
def _where_the_user_is() -> Iterator[None]:
    """Their own code is found, as by `python -m`. Not while torch works, which imports modules of
    Python's by names that a file there may have."""
    sys.path.insert(0, "")
    try:
        yield
    finally:
        with suppress(ValueError):  # that code may have changed it
            sys.path.remove("")


def _of_module(path: str, input_shape: tuple[int, ...] | None) -> dict[str, Any]:
    with _where_the_user_is():
        network = _made(path)
    try:
        cost = measure(network, input_shape)
    except UserError:
        raise
    except Exception as error:
        if "meta tensor" in str(error):
            raise UserError(
                f"{path}: its forward looks at values, so that it cannot be counted without being "
                f"run: {error}"
            ) from None
        shape = list(input_shape or (3, 224, 224))
        kind = "" if isinstance(error, RuntimeError) else f"{type(error).__name__}: "
        raise UserError(
            f"{path}: does not run on the input {shape} (--shape sets another): {kind}{error}"
        ) from error
    notes = {"input": str(cost.context["input"]), "convention": str(cost.context["convention"])}
    return {"cost": dict(cost.values), "by_site": [], "notes": notes}


def _made(path: str) -> nn.Module:
    """What the function `package.module:function` returns."""
    module_name, _, name = path.partition(":")
    if module_name.startswith("."):
        raise UserError(f"{path}: allowed: a module's own name, such as networks.mine:make")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        file = re.fullmatch(r"(\w+(?:/\w+)*)\.py", module_name)
        near = f"; did you mean '{file[1].replace('/', '.')}:{name}'?" if file else ""
        why = str(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: cannot be imported: {why}{near}") from error
    found = getattr(module, name, None)
    if not callable(found):
        raise UserError(f"{path}: there is no function '{name}'{suggest(name, dir(module))}")
    try:
        with suppress(ValueError):  # of what is built in
            inspect.signature(found, follow_wrapped=False).bind()
    except TypeError as error:
        raise UserError(f"{path}: it is called without arguments; {error}") from None
    try:
        network = found()
    except Exception as error:
        raise UserError(f"{path}: it raised {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module):
        raise UserError(f"{path}: expected an nn.Module; got {type(network).__name__}")
    return network


def _of_architecture(given: Architecture) -> dict[str, Any]:
    """The backbone block by block, each with what is placed in or behind it."""
    architecture = canonical(given)
    plain = replace(architecture, placements=())
    placements = {p.site: p for p in architecture.placements}

    def decode(row: Mapping[str, str]) -> Architecture:
        return replace(plain, placements=tuple(placements[site] for site in row))

    choices = {site: (NONE, spec) for site, spec in architecture.specs.items()}
    shapes = site_shapes(architecture.backbone, architecture.input)
    table = CostTable.build(shapes, choices, decode)
    return {
        "key": architecture.key,
        "cost": table(architecture.specs),
        "backbone": table.plain,
        "by_site": [
            {"site": site, "spec": spec, "cost": table.entries[site, spec]}
            for site, spec in architecture.specs.items()
        ],
        "by_block": by_block(architecture),
        "notes": {"key": architecture.key, POOLED: f"macs {_pooled(architecture):,}"},
    }


def by_block(architecture: Architecture) -> list[dict[str, Any]]:
    """The cost of each part of the network, insertions included, in forward order; they add up."""
    with torch.device("meta"):
        network = build(architecture)
    names = []
    for name, child in network.named_children():
        inner = [f"{name}.{i}" for i, _ in child.named_children()]
        names += inner if name.startswith("stage") else [name]
    maps = _maps(network, architecture, names)
    return [
        {
            "block": name,
            "output": list(maps[name][1][1:]),
            "cost": count(network.get_submodule(name), maps[name][0]),
        }
        for name in names
    ]


def _maps(
    network: nn.Module, architecture: Architecture, names: Sequence[str]
) -> dict[str, tuple[Shape, Shape]]:
    """Each named module's input and output shape, from one run on the meta device."""
    seen: dict[str, tuple[Shape, Shape]] = {}

    def watch(name: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            seen[name] = (tuple(args[0].shape), tuple(output.shape))

        return network.get_submodule(name).register_forward_hook(note)

    hooks = [watch(name) for name in names]
    with torch.no_grad():
        network.eval()(torch.empty(1, *architecture.input, device="meta"))
    for hook in hooks:
        hook.remove()
    return seen


def _pooled(architecture: Architecture) -> int:
    """MACs, and one for each element of a map that is averaged to a point (SE's, the head's)."""
    with torch.device("meta"):
        network = build(architecture)
    gates = [name for name, module in network.named_modules() if isinstance(module, SqueezeExcite)]
    maps = _maps(network, architecture, [*gates, "head"])
    averaged = [maps[name][0] for name in gates] + [maps["head"][1]]
    return int(measure(architecture).values["macs"]) + sum(math.prod(s[1:]) for s in averaged)


def _of_experiment(experiment: Experiment) -> dict[str, Any]:
    """The baseline, the budget, each single insertion, and how much of the space fits."""
    space = SearchSpace.of(experiment.space)
    candidates = Candidates.of(experiment, space)
    pricing, limits = candidates.pricing, candidates.asked
    plain = pricing.plain
    singles: list[dict[str, Any]] = [
        {
            "site": name.removesuffix(SUFFIX),
            "spec": label,
            "cost": {m: v - plain[m] for m, v in pricing({name: label}).items()},
            "fits": candidates.fits({name: label}),
        }
        for name, labels in space.parameters.items()
        for label in labels[1:]
    ]
    fitting, least, most = candidates.fitting()
    share = f"{100 * (fitting / space.size()):.3g} % of all"
    bounds = "" if least == most else f"; estimated, between {_many(least)} and {_many(most)}"
    notes = {"space": f"{space.size():,} architectures"}
    for metric, limit in limits.items():
        text = f"{limit:.4g}" if isinstance(plain[metric], float) else f"{limit:,.15g}"
        notes[f"budget {metric}"] = f"{text} ({limit / plain[metric]:.4g}x)"
    notes["within the budget"] = f"{_many(fitting)} architectures, {share}{bounds}"
    for metric in plain:
        ordered = sorted(singles, key=lambda s: s["cost"][metric])
        for word, single in (("cheapest", ordered[0]), ("dearest", ordered[-1])):
            more = single["cost"][metric]
            notes[f"{word} {'change' if space.skeleton else 'insertion'} by {metric}"] = (
                f"{single['spec']} @ {single['site']}: {'+' * (more >= 0)}{amount(more)}"
            )
    return {"cost": plain, "limits": limits, "by_site": singles, "notes": notes}


def _many(count: float) -> str:
    return f"{count:,.0f}" if count < 1e9 else f"{count:.4g}"
