"""DMSANet (Sagar, 2021): a re-implementation from the paper's text; no authors' code exists."""

from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasattn.blocks.danet import DualAttention
from nasattn.blocks.identity import IdentityInit
from nasattn.blocks.tokens import project, widen
from nasattn.errors import UserError

KERNELS = (3, 5, 7, 9)
GROUPS = (1, 4, 8, 16)
SCALES = len(KERNELS)


class DualMultiScale(nn.Module):
    """Attention over channels and positions at four scales, recalibrated by a softmax over them.

    https://arxiv.org/abs/2106.08382; a reading of it, as the text leaves much open. x: (B, C, H, W)
    -> same. Four maps of c = C / 4 channels each pass, with shared weights, through dual attention
    and then a squeeze and excitation, the softmax of which over the scales weighs them, channel by
    channel; they are put side by side and their channels shuffled.
    mode: attention is DANet's sum of the position and channel branches (C a multiple of 4 and at
    least 32, else a UserError); gate is Shuffle Attention's pair of gates (C a multiple of 8).
    scales: pyramid projects x by 3, 5, 7 and 9 wide grouped convolutions; depthwise convolves a
    quarter of the channels so, each by itself; split takes the quarters as they are.
    Departs from the paper: with `identity_init`, x + s (f(x) - x), s = 0 at first.
    """

    def __init__(
        self,
        channels: int,
        *,
        mode: str = "attention",
        scales: str = "pyramid",
        identity_init: bool = False,
    ) -> None:
        super().__init__()
        least, multiple = (32, 4) if mode == "attention" else (8, 8)
        if channels < least or channels % multiple:
            raise UserError(
                f"dmsanet(mode={mode}) at {channels} channels: "
                f"it needs a multiple of {multiple}, at least {least}"
            )
        quarter = channels // SCALES
        self.whole = scales == "pyramid"
        self.scales = nn.ModuleList(
            scale_conv(scales, channels, kernel, groups)
            for kernel, groups in zip(KERNELS, GROUPS, strict=True)
        )
        self.attend = TwoBranches(quarter) if mode == "attention" else ShuffleGates(quarter)
        self.squeeze = project(quarter, max(1, quarter // 16))
        self.excite = project(max(1, quarter // 16), quarter)
        self.identity = IdentityInit(identity_init)

    def forward(self, x: Tensor) -> Tensor:
        sources = [x] * SCALES if self.whole else x.chunk(SCALES, 1)
        maps = torch.cat(
            [conv(source) for conv, source in zip(self.scales, sources, strict=True)], 1
        )
        batch, quarter = x.shape[0], x.shape[1] // SCALES
        maps = self.attend(maps.reshape(SCALES * batch, quarter, *x.shape[2:]))
        importance = self.excite(F.relu(self.squeeze(maps.mean((2, 3), keepdim=True)))).sigmoid()
        weights = widen(importance.reshape(batch, SCALES, quarter, 1, 1)).softmax(1).to(x.dtype)
        maps = maps.reshape(batch, SCALES, quarter, *x.shape[2:])
        out = shuffle((maps * weights).flatten(1, 2), SCALES)
        return self.identity(x, out)

    def map_elements(self, height: int, width: int) -> int:
        channels = SCALES * self.excite.out_channels
        return SCALES * self.attend.map_elements(height, width) + channels


class TwoBranches(nn.Module):
    """DANet's sum of its two branches, each of which adds x."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dual = DualAttention(channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.dual(x)
        return out

    def map_elements(self, height: int, width: int) -> int:
        return self.dual.map_elements(height, width)


class ShuffleGates(nn.Module):
    """Gate half of the channels by their means and half by themselves, normalised, then mix.

    SA-Net, https://arxiv.org/abs/2102.00039. Gates are sigmoid(weight * summary + bias), one weight
    and bias a channel, which start at 0 and 1.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.channel_weight = nn.Parameter(torch.zeros(half, 1, 1))
        self.channel_bias = nn.Parameter(torch.ones(half, 1, 1))
        self.spatial_weight = nn.Parameter(torch.zeros(half, 1, 1))
        self.spatial_bias = nn.Parameter(torch.ones(half, 1, 1))
        self.norm = nn.GroupNorm(half, half)

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, 1)
        means = first.mean((2, 3), keepdim=True)
        first = first * (self.channel_weight * means + self.channel_bias).sigmoid()
        second = second * (self.spatial_weight * self.norm(second) + self.spatial_bias).sigmoid()
        return shuffle(torch.cat((first, second), 1), 2)

    def map_elements(self, height: int, width: int) -> int:
        half = len(self.channel_bias)
        return half + half * height * width


def scale_conv(scales: str, channels: int, kernel: int, groups: int) -> nn.Module:
    quarter = channels // SCALES
    if scales == "split":
        return nn.Identity()
    source = channels if scales == "pyramid" else quarter
    groups = gcd(groups, channels, quarter) if scales == "pyramid" else quarter
    return nn.Conv2d(source, quarter, kernel, padding=kernel // 2, groups=groups, bias=False)


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Channel i of group g comes to stand at i * groups + g."""
    grouped = x.reshape(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
    return grouped.transpose(1, 2).flatten(1, 2)
