"""What a network costs, before it is trained: multiply-adds and parameters."""

import copy
from collections.abc import Sequence

import torch
from torch import nn

from nasattn.architecture import Architecture
from nasattn.cost.analytic import CONVENTION, COUNTERS, count
from nasattn.cost.table import CostTable, excess
from nasattn.errors import lookup
from nasattn.model import build
from nasattn.record import Cost

__all__ = ["CONVENTION", "CostTable", "count", "excess", "measure"]


def measure(
    network: Architecture | nn.Module,
    input_shape: Sequence[int] | None = None,
    metrics: str | Sequence[str] = ("macs", "params"),
) -> Cost:
    """Cost of an architecture or of any module, counted on the meta device: nothing is computed.

    input_shape: (N, C, H, W), or (C, H, W) for one image; None is the architecture's own input and
    1x3x224x224 for a module. metrics: of `macs`, `params`. The module given is left as it is.
    """
    metrics = (metrics,) if isinstance(metrics, str) else metrics
    for metric in metrics:
        lookup(COUNTERS, metric, "metric")
    if isinstance(network, Architecture):
        shape = tuple(input_shape or network.input)
        with torch.device("meta"):
            module = build(network)
    else:
        shape = tuple(input_shape or (3, 224, 224))
        module = _on_meta(network)
    shape = (1, *shape) if len(shape) == 3 else shape
    context = {"input": list(shape), "convention": CONVENTION}
    return Cost(values=count(module, shape, metrics), context=context)


def _on_meta(network: nn.Module) -> nn.Module:
    """A copy without data. Not by `.to`, which gives shared parameters one copy each."""
    memo: dict[int, object] = {id(b): b.to("meta") for b in network.buffers()}
    for p in network.parameters():
        memo[id(p)] = nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad)
    return copy.deepcopy(network, memo)
