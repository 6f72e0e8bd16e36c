"""Coordinate attention (Hou et al., CVPR 2021)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasattn.blocks.identity import IdentityInit
from nasattn.blocks.tokens import project


class CoordinateAttention(nn.Module):
    """Gate each channel by row and by column, from the means along them.

    https://arxiv.org/abs/2103.02907, section 3.2. x: (B, C, H, W) -> same. Rows' and columns' means
    share a bottleneck with batch norm and hard swish, C * ratio wide and at least 8.
    Departs from the paper: with `identity_init`, x + s (f(x) - x), s = 0 at first.
    """

    def __init__(
        self, channels: int, *, ratio: float = 0.03125, identity_init: bool = False
    ) -> None:
        super().__init__()
        hidden = max(8, int(channels * ratio))
        self.squeeze = project(channels, hidden)
        self.norm = nn.BatchNorm2d(hidden)
        self.rows = project(hidden, channels)
        self.columns = project(hidden, channels)
        self.identity = IdentityInit(identity_init)

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = x.mean(3, keepdim=True), x.mean(2, keepdim=True)
        means = torch.cat((rows, columns.mT), 2)  # (B, C, H + W, 1)
        hidden = F.hardswish(self.norm(self.squeeze(means)))
        of_rows, of_columns = hidden.tensor_split([x.shape[2]], 2)
        row_gate = self.rows(of_rows).sigmoid().to(x.dtype)
        column_gate = self.columns(of_columns.mT).sigmoid().to(x.dtype)
        return self.identity(x, x * row_gate * column_gate)

    def map_elements(self, height: int, width: int) -> int:
        return self.rows.out_channels * (height + width)
