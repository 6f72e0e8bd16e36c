"""How a block that its paper does not start as the identity can be placed without a jolt."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nasattn.blocks.tokens import keep_format


class IdentityInit(nn.Module):
    """x + s (f(x) - x) with a scalar s that starts at 0; switched off, f(x) as it is.

    No paper has it: it lets any block enter a trained network without changing its output. The
    result has the dtype and the memory format of x.
    """

    def __init__(self, on: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(())) if on else None

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        out = keep_format(out.to(x.dtype), like=x)
        return out if self.scale is None else x + (self.scale * (out - x)).to(x.dtype)

    if TYPE_CHECKING:

        def __call__(self, x: Tensor, out: Tensor) -> Tensor: ...
