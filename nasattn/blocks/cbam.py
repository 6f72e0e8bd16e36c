"""The convolutional block attention module (Woo et al., ECCV 2018)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasattn.blocks.identity import IdentityInit
from nasattn.blocks.tokens import project, width
from nasattn.errors import UserError


class ChannelThenSpatial(nn.Module):
    """Gate the channels by their means and maxima, then the positions by theirs.

    https://arxiv.org/abs/1807.06521, section 3. x: (B, C, H, W) -> same. One bottleneck without
    biases, C * ratio wide, serves means and maxima; the positions' gate is a kernel x kernel
    convolution with batch norm, as in the authors' code. UserError for an even kernel.
    Departs from the paper: with `identity_init`, x + s (f(x) - x), s = 0 at first.
    """

    def __init__(
        self,
        channels: int,
        *,
        ratio: float = 0.0625,
        kernel: int = 7,
        identity_init: bool = False,
    ) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise UserError(f"cbam(kernel={kernel}): a kernel is odd")
        hidden = width(channels, ratio)
        self.squeeze = project(channels, hidden, bias=False)
        self.excite = project(hidden, channels, bias=False)
        self.spatial = nn.Conv2d(2, 1, kernel, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(1)
        self.identity = IdentityInit(identity_init)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.bottleneck(x.mean((2, 3), keepdim=True))
        # Not adaptive_max_pool2d, whose gradient on a GPU comes out differently each time.
        highest = x.flatten(2).max(2).values[..., None, None]
        gate = gate + self.bottleneck(highest)
        out = x * gate.sigmoid().to(x.dtype)
        summary = torch.cat((out.mean(1, keepdim=True), out.max(1, keepdim=True).values), 1)
        out = out * self.norm(self.spatial(summary)).sigmoid().to(x.dtype)
        return self.identity(x, out)

    def bottleneck(self, summary: Tensor) -> Tensor:
        out: Tensor = self.excite(F.relu(self.squeeze(summary)))
        return out

    def map_elements(self, height: int, width: int) -> int:
        return self.excite.out_channels + height * width
