"""Squeeze and excitation (Hu et al., CVPR 2018)."""

import torch.nn.functional as F
from torch import Tensor, nn

from nasattn.blocks.identity import IdentityInit
from nasattn.blocks.tokens import project, width


class SqueezeExcitation(nn.Module):
    """Gate each channel by a bottleneck over the channels' means.

    https://arxiv.org/abs/1709.01507, section 3. x: (B, C, H, W) -> same; the bottleneck has width
    C * ratio. Departs from the paper: with `identity_init`, x + s (f(x) - x) with s = 0 at first.
    """

    def __init__(
        self, channels: int, *, ratio: float = 0.0625, identity_init: bool = False
    ) -> None:
        super().__init__()
        hidden = width(channels, ratio)
        self.squeeze = project(channels, hidden)
        self.excite = project(hidden, channels)
        self.identity = IdentityInit(identity_init)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))
        gate = self.excite(hidden).sigmoid().to(x.dtype)
        return self.identity(x, x * gate)

    def map_elements(self, height: int, width: int) -> int:
        return self.excite.out_channels
