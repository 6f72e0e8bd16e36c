"""Criss-cross attention (Huang et al., ICCV 2019)."""

import torch
from torch import Tensor, nn

from nasattn.blocks.tokens import needed_width, no_autocast, project, widen


class CrissCross(nn.Module):
    """Attend along each position's own column and row; twice over, every position sees every other.

    https://arxiv.org/abs/1811.11721, section 3.2. x: (B, C, H, W) -> same. One softmax, without a
    scale, over the H + W - 1 positions of the cross; y = gamma * attended + x, `recurrence` times
    with the same weights. Keys have width C * ratio; a UserError where that is less than 1.
    The identity at first, as in the paper: gamma starts at 0.
    """

    def __init__(self, channels: int, *, ratio: float = 0.125, recurrence: int = 2) -> None:
        super().__init__()
        keys = needed_width("ccnet", channels, ratio)
        self.recurrence = recurrence
        self.query = project(channels, keys)
        self.key = project(channels, keys)
        self.value = project(channels, channels)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.recurrence):
            x = x + (self.gamma * self.cross(x)).to(x.dtype)
        return x

    def cross(self, x: Tensor) -> Tensor:
        query, key, value = self.query(x), self.key(x), self.value(x)
        height = x.shape[2]
        with no_autocast(x):  # unscaled products
            columns = torch.einsum("bdhw,bdiw->bhwi", widen(query), widen(key))
            rows = torch.einsum("bdhw,bdhj->bhwj", widen(query), widen(key))
        # The position itself stands in its row: out of its column, so that it counts once.
        itself = torch.eye(height, dtype=torch.bool, device=x.device)[:, None, :]
        columns = columns.masked_fill(itself, float("-inf"))
        weights = torch.cat((columns, rows), 3).softmax(3).to(value.dtype)
        along_column = torch.einsum("bhwi,bciw->bchw", weights[..., :height], value)
        return along_column + torch.einsum("bhwj,bchj->bchw", weights[..., height:], value)

    def map_elements(self, height: int, width: int) -> int:
        return height * width * (height + width)
