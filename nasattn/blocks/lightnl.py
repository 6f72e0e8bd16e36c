"""LightNL, the lightweight non-local block of AutoNL (Li et al., CVPR 2020)."""

import math

import torch
from torch import Tensor, nn

from nasattn.blocks.tokens import no_autocast, widen, width


class LightNonLocal(nn.Module):
    """x + BN(DW3x3(y)), y = theta phi^T g / (H W): no softmax, no projection but a depthwise one.

    https://arxiv.org/abs/2004.01961, section 3.1. x: (B, C, H, W) -> same. theta is the first
    `ratio` share of the channels at all T = H W positions; phi (the same channels) and g (all
    channels) are taken at the S positions of every `stride`-th row and column. The identity at
    first, as in the paper: BN's weight starts at 0.
    normalize: full divides by H W as the authors' TensorFlow code does, for any stride; none is
    the public PyTorch port, which does not divide for square maps.
    """

    def __init__(
        self, channels: int, *, ratio: float = 0.25, stride: int = 1, normalize: str = "full"
    ) -> None:
        super().__init__()
        self.keys = width(channels, ratio)
        self.stride = stride
        self.normalize = normalize
        self.spread = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.norm = nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)
        nn.init.normal_(self.spread.weight, std=math.sqrt(2 / 9))
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        # y is cubic in x: float32 until the batch norm has brought it back.
        with no_autocast(x):
            y = self.aggregate(widen(x)).to(self.spread.weight.dtype)
            out: Tensor = self.norm(self.spread(y))
        return x + out.to(x.dtype)

    def aggregate(self, x: Tensor) -> Tensor:
        """y, in channel-major form: the association that costs less, on the positions there are."""
        batch, channels, height, width = x.shape
        sampled = x[:, :, :: self.stride, :: self.stride]
        theta = x[:, : self.keys].flatten(2)
        g = sampled.flatten(2)
        phi = g[:, : self.keys]
        if self.normalize == "full":
            phi = phi / (height * width)
        if self._by_positions(height, width):
            y = torch.bmm(g, torch.bmm(phi.mT, theta))
        else:
            y = torch.bmm(torch.bmm(g, phi.mT), theta)
        return y.view(batch, channels, height, width)

    def _by_positions(self, height: int, width: int) -> bool:
        """Whether the map over positions (S x T) costs less than that over channels (C x keys)."""
        t, s = height * width, self._sampled(height, width)
        channels, keys = self.norm.num_features, self.keys
        return t * s * (channels + keys) < (t + s) * channels * keys

    def _sampled(self, height: int, width: int) -> int:
        return math.ceil(height / self.stride) * math.ceil(width / self.stride)

    def map_elements(self, height: int, width: int) -> int:
        if self._by_positions(height, width):
            return height * width * self._sampled(height, width)
        return self.norm.num_features * self.keys
