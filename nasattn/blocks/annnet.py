"""Asymmetric non-local blocks: few, pooled keys (Zhu et al., ANNNet, ICCV 2019)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasattn.blocks.identity import IdentityInit
from nasattn.blocks.tokens import attend, image, project, project_norm_relu, tokens, width

GRIDS = (1, 3, 6, 8)
SAMPLES = sum(n * n for n in GRIDS)


def pyramid(x: Tensor) -> Tensor:
    """The means over n x n grids of cells, for every n in GRIDS: (B, C, H, W) -> (B, C, 110, 1)."""
    return torch.cat([F.adaptive_avg_pool2d(x, n).flatten(2) for n in GRIDS], 2).unsqueeze(3)


class AsymmetricPyramid(nn.Module):
    """APNB: every position attends to 110 pooled ones; then project it and x, side by side.

    https://arxiv.org/abs/1908.07678, section 3.2. x: (B, C, H, W) -> same. Query and key are one
    projection with batch norm and ReLU, as in the authors' code, and, like the values, C * ratio
    wide; the logits are scaled by width^-1/2.
    Departs from the paper: with `identity_init`, x + s (f(x) - x), s = 0 at first.
    """

    def __init__(
        self,
        channels: int,
        *,
        ratio: float = 0.5,
        dropout: float = 0.05,
        identity_init: bool = False,
    ) -> None:
        super().__init__()
        inner = width(channels, ratio)
        self.key = project_norm_relu(channels, inner, bias=True)
        self.value = project(channels, inner)
        self.context = zero_projection(inner, channels)
        self.out = nn.Sequential(
            project_norm_relu(2 * channels, channels, bias=True), nn.Dropout2d(dropout)
        )
        self.identity = IdentityInit(identity_init)

    def forward(self, x: Tensor) -> Tensor:
        query = self.key(x)
        value = pooled_projection(self.value, x)
        context = self.context(sampled_attention(query, pyramid(query), value))
        return self.identity(x, self.out(torch.cat((context, x), 1)))

    def map_elements(self, height: int, width: int) -> int:
        return height * width * SAMPLES


class AsymmetricFusion(nn.Module):
    """AFNB: every position of a high-level map attends to 110 pooled ones of a low-level map.

    https://arxiv.org/abs/1908.07678, section 3.3. (B, low, h, w), (B, high, H, W) -> (B, high, H,
    W): two levels, so it is none of BLOCKS. Query and key have projections of their own, and the
    last batch norm has no ReLU.
    """

    def __init__(self, low: int, high: int, *, width: int = 256, dropout: float = 0.05) -> None:
        super().__init__()
        self.query = project_norm_relu(high, width, bias=True)
        self.key = project_norm_relu(low, width, bias=True)
        self.value = project(low, width)
        self.context = zero_projection(width, high)
        self.out = nn.Sequential(
            project(2 * high, high), nn.BatchNorm2d(high), nn.Dropout2d(dropout)
        )

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        value = pooled_projection(self.value, low)
        context = self.context(sampled_attention(self.query(high), pyramid(self.key(low)), value))
        out: Tensor = self.out(torch.cat((context, high), 1))
        return out

    def map_elements(self, height: int, width: int) -> int:
        return height * width * SAMPLES


def pooled_projection(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """pyramid(conv(x)), in the order that costs less: a mean and a linear map commute."""
    out: Tensor = conv(pyramid(x)) if x.shape[2] * x.shape[3] > SAMPLES else pyramid(conv(x))
    return out


def sampled_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """(B, D, H, W) of queries and (B, D or E, S, 1) of samples -> (B, E, H, W)"""
    scale = query.shape[1] ** -0.5
    return image(attend(tokens(query), tokens(key), tokens(value), scale), like=query)


def zero_projection(inner: int, channels: int) -> nn.Conv2d:
    conv = project(inner, channels)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv
