"""Counts on the meta device, exact.

Convention: `macs` is multiply-adds (one multiply-add is one), of convolutions and every kind of
matrix product, counted by operator and not by module, so a new block needs no code here.
Normalisation, activations, softmax, pooling and additions are not counted.
"""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode


def _twice_first(first: Sequence[int], *others: object, **_: object) -> int:
    return 2 * prod(first)


def _twice_second(_first: object, second: Sequence[int], *others: object, **_: object) -> int:
    return 2 * prod(second)


# What torch's counter leaves out of the products: those with a vector.
WITH_VECTOR: Mapping[Any, Callable[..., int]] = {
    torch.ops.aten.mv: _twice_first,
    torch.ops.aten.dot: _twice_first,
    torch.ops.aten.addmv: _twice_second,
}

# Not counted, and the input's shape comes out: left out, as each costs milliseconds on meta.
SILENT = {F.batch_norm, F.relu, F.relu6, F.hardtanh, F.hardswish, F.hardsigmoid}


class Silence(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return args[0] if args and func in SILENT else func(*args, **(kwargs or {}))


CONVENTION = "1 multiply-add = 1 MAC; norms, activations, pooling and additions not counted"


def macs(module: nn.Module, shape: Sequence[int]) -> int:
    """Multiply-adds of one pass in eval mode; the module must lie on the meta device."""
    module.eval()
    like = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    counter = FlopCounterMode(display=False, custom_mapping=dict(WITH_VECTOR))
    with torch.no_grad(), counter, Silence():
        module(torch.empty(tuple(shape), device="meta", dtype=like.dtype))
    return int(counter.get_total_flops()) // 2


def params(module: nn.Module, shape: Sequence[int]) -> int:
    """All parameters, shared ones once, frozen ones included; buffers are none."""
    return sum(p.numel() for p in module.parameters())


COUNTERS: Mapping[str, Callable[[nn.Module, Sequence[int]], int]] = {"macs": macs, "params": params}


def count(
    module: nn.Module, shape: Sequence[int], metrics: Sequence[str] = tuple(COUNTERS)
) -> dict[str, int | float]:
    """Metric -> number, of a module on the meta device for an input of that shape."""
    return {metric: COUNTERS[metric](module, shape) for metric in metrics}
