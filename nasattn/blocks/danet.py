"""Dual attention: over positions and over channels (Fu et al., DANet, CVPR 2019)."""

import torch
from torch import Tensor, nn

from nasattn.blocks.self_attention import SelfAttention
from nasattn.blocks.tokens import needed_width, no_autocast, widen


class DualAttention(nn.Module):
    """x + gamma_p * position(x) + gamma_c * channel(x), or one of the two branches alone.

    https://arxiv.org/abs/1809.02983, section 3. x: (B, C, H, W) -> same. The position branch is
    plain self-attention, its keys C * ratio wide (a UserError where that is less than 1). The
    channel branch has no weights: the channels' Gram matrix e = x x^T gives A x, with A_ij, by
    channel: official, the softmax over j of max_j e_ij - e_ij, which is that of -e_ij (as the
    authors' code has it), or paper, that of e_ij.
    The identity at first, as in the paper: both gammas start at 0. The authors' head sums two
    branches that each add x, after convolutions of their own; here x is added once.
    """

    def __init__(
        self,
        channels: int,
        *,
        ratio: float = 0.125,
        branches: str = "both",
        channel: str = "official",
    ) -> None:
        super().__init__()
        self.channels = channels
        self.sign = -1.0 if channel == "official" else 1.0
        self.position = None
        if branches != "channel":
            needed_width("danet", channels, ratio)
            self.position = SelfAttention(channels, ratio=ratio)
        self.gamma = nn.Parameter(torch.zeros(1)) if branches != "position" else None

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x if self.position is None else self.position(x)
        if self.gamma is not None:
            out = out + (self.gamma * self.over_channels(x)).to(x.dtype)
        return out

    def over_channels(self, x: Tensor) -> Tensor:
        # e sums squares over all positions, which float16 cannot hold.
        with no_autocast(x):
            rows = widen(x.flatten(2))  # (B, C, T)
            weights = (self.sign * torch.bmm(rows, rows.mT)).softmax(2)  # (B, C, C)
        return torch.bmm(weights.to(x.dtype), x.flatten(2)).view(x.shape)

    def map_elements(self, height: int, width: int) -> int:
        positions = 0 if self.position is None else self.position.map_elements(height, width)
        return positions + (0 if self.gamma is None else self.channels**2)
