"""Efficient channel attention (Wang et al., CVPR 2020)."""

import math

from torch import Tensor, nn

from nasattn.blocks.identity import IdentityInit
from nasattn.errors import UserError


class EfficientChannel(nn.Module):
    """Gate each channel by a convolution over its neighbours' means.

    https://arxiv.org/abs/1910.03151, section 3. x: (B, C, H, W) -> same. kernel: an odd width, else
    a UserError; 0 takes the paper's, log2(C) / 2 + 1/2 made odd (equation 12).
    Departs from the paper: with `identity_init`, x + s (f(x) - x), s = 0 at first.
    """

    def __init__(self, channels: int, *, kernel: int = 0, identity_init: bool = False) -> None:
        super().__init__()
        self.channels = channels
        if kernel == 0:
            kernel = int(math.log2(channels) / 2 + 0.5) | 1
        if kernel % 2 == 0:
            raise UserError(f"eca(kernel={kernel}): a kernel is odd, or 0 for the paper's own size")
        self.neighbours = nn.Conv1d(1, 1, kernel, padding=kernel // 2, bias=False)
        self.identity = IdentityInit(identity_init)

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean((2, 3)).unsqueeze(1)  # (B, 1, C)
        gate = self.neighbours(means).sigmoid().to(x.dtype)
        return self.identity(x, x * gate.view(*x.shape[:2], 1, 1))

    def map_elements(self, height: int, width: int) -> int:
        return self.channels
