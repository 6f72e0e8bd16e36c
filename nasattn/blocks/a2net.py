"""Double attention: gather, then distribute (Chen et al., A^2-Nets, NeurIPS 2018)."""

import torch
from torch import Tensor, nn

from nasattn.blocks.identity import IdentityInit
from nasattn.blocks.tokens import image, project, tokens, widen, width


class DoubleAttention(nn.Module):
    """Gather global descriptors by attention over positions, then hand each position a mixture.

    https://arxiv.org/abs/1810.11579, section 3.1. x: (B, C, H, W) -> same. With features A of width
    m = C * ratio and maps B and V of width n = C * maps_ratio, all 1x1 projections of x, the n
    descriptors are G = A softmax_positions(B)^T, and the block is x + W (G softmax(V)).
    distribute: V's softmax is over the n maps, as the paper has it, or over the positions, as one
    public port has it.
    Departs from the paper: with `identity_init`, x + s (f(x) - x), s = 0 at first.
    """

    def __init__(
        self,
        channels: int,
        *,
        ratio: float = 0.5,
        maps_ratio: float = 0.5,
        distribute: str = "maps",
        identity_init: bool = False,
    ) -> None:
        super().__init__()
        self.maps = width(channels, maps_ratio)
        features = width(channels, ratio)
        self.axis = 2 if distribute == "positions" else 1
        self.features = project(channels, features)
        self.gather = project(channels, self.maps)
        self.distribute = project(channels, self.maps)
        self.out = project(features, channels)
        self.identity = IdentityInit(identity_init)

    def forward(self, x: Tensor) -> Tensor:
        features = tokens(self.features(x))  # (B, T, m)
        # Positions lie in rows: for a softmax over few and long columns a GPU has few threads.
        gather = widen(self.gather(x).flatten(2)).softmax(2).to(features.dtype)  # (B, n, T)
        distribute = widen(self.distribute(x).flatten(2)).softmax(self.axis).to(features.dtype)
        descriptors = torch.bmm(gather, features)  # (B, n, m)
        out = self.out(image(torch.bmm(distribute.mT, descriptors), like=x))
        return self.identity(x, x + out.to(x.dtype))

    def map_elements(self, height: int, width: int) -> int:
        return 2 * height * width * self.maps
