"""The global context block (Cao et al., ICCV workshops 2019)."""

import torch
from torch import Tensor, nn

from nasattn.blocks.identity import IdentityInit
from nasattn.blocks.tokens import needed_width, project, widen


class GlobalContext(nn.Module):
    """Add one context vector to every position, or gate the channels by it.

    https://arxiv.org/abs/1904.11492, section 3.3. x: (B, C, H, W) -> same. The context is the mean
    of the positions, weighted by a softmax over them (pooling att) or not (avg); a bottleneck of
    width C * ratio with layer norm transforms it. fusion: add is x + t(c), mul is
    x * sigmoid(t(c)), mul_add multiplies first; each has a bottleneck of its own. UserError for a
    bottleneck of 1: the layer norm of a single number is constant.
    add starts as the identity; mul starts as x / 2. Departs from the paper: with `identity_init`,
    what multiplies is x + s (f(x) - x), s = 0 at first.
    """

    def __init__(
        self,
        channels: int,
        *,
        ratio: float = 0.0625,
        pooling: str = "att",
        fusion: str = "add",
        identity_init: bool = False,
    ) -> None:
        super().__init__()
        self.channels = channels
        hidden = needed_width("gcnet", channels, ratio, least=2)
        self.mask = project(channels, 1) if pooling == "att" else None
        self.mul = transform(channels, hidden) if "mul" in fusion else None
        self.add = transform(channels, hidden) if "add" in fusion else None
        self.identity = IdentityInit(identity_init and self.mul is not None)
        if self.mask is not None:
            nn.init.kaiming_normal_(self.mask.weight, nonlinearity="relu")
            nn.init.zeros_(self.mask.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        context = self.context(x)
        out = x
        if self.mul is not None:
            out = out * self.mul(context).sigmoid().to(x.dtype)
        if self.add is not None:
            out = out + self.add(context).to(x.dtype)
        return self.identity(x, out)

    def context(self, x: Tensor) -> Tensor:
        """(B, C, 1, 1)"""
        if self.mask is None:
            return x.mean((2, 3), keepdim=True)
        weights = widen(self.mask(x).flatten(2)).softmax(2).to(x.dtype)
        return torch.bmm(x.flatten(2), weights.mT).unsqueeze(3)

    def map_elements(self, height: int, width: int) -> int:
        weights = height * width if self.mask is not None else 0
        gate = self.channels if self.mul is not None else 0
        return weights + gate


def transform(channels: int, hidden: int) -> nn.Sequential:
    """The bottleneck; its last layer is 0 at first."""
    last = project(hidden, channels)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)  # type: ignore[arg-type]
    return nn.Sequential(
        project(channels, hidden), nn.LayerNorm([hidden, 1, 1]), nn.ReLU(inplace=True), last
    )
