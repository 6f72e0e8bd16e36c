"""Interlaced sparse self-attention (Huang et al., ISANet, 2019)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasattn.blocks.identity import IdentityInit
from nasattn.blocks.tokens import attend, project, project_norm_relu, width

Margins = tuple[int, int, int, int]
NO_MARGINS: Margins = (0, 0, 0, 0)


class InterlacedSparse(nn.Module):
    """Attention among positions a cell apart, then within each cell: together, from all to all.

    https://arxiv.org/abs/1907.12273, section 3. x: (B, C, H, W) -> same; a cell is size x size
    positions, queries and keys are C * ratio wide, and the result is a projection of x and the
    attended map side by side. A map that cells do not tile is surrounded by zeros.
    padding: official lets the zeros take part, in the batch norms and as keys, as the authors' code
    does; masked keeps them out of both.
    Departs from the paper: with `identity_init`, x + s (f(x) - x), s = 0 at first.
    """

    def __init__(
        self,
        channels: int,
        *,
        ratio: float = 0.5,
        size: int = 8,
        padding: str = "official",
        dropout: float = 0.05,
        identity_init: bool = False,
    ) -> None:
        super().__init__()
        self.size = size
        self.masked = padding == "masked"
        self.long = CellAttention(channels, width(channels, ratio), size, within=False)
        self.short = CellAttention(channels, width(channels, ratio), size, within=True)
        self.out = nn.Sequential(project_norm_relu(2 * channels, channels), nn.Dropout2d(dropout))
        self.identity = IdentityInit(identity_init)

    def forward(self, x: Tensor) -> Tensor:
        margins = self.margins(*x.shape[2:])
        if self.masked:
            attended = self.short(self.long(x, margins), margins)
        else:
            attended = self.long(surround(x, margins), NO_MARGINS)
            attended = surround(self.short(attended, NO_MARGINS), [-m for m in margins])
        return self.identity(x, self.out(torch.cat((x, attended), 1)))

    def margins(self, height: int, width: int) -> Margins:
        """The zeros on the left, right, top and bottom that cells need; an odd one to the end."""
        rows, columns = -height % self.size, -width % self.size
        return columns // 2, columns - columns // 2, rows // 2, rows - rows // 2

    def map_elements(self, height: int, width: int) -> int:
        left, right, top, bottom = self.margins(height, width)
        padded = (height + top + bottom) * (width + left + right)
        cell = self.size**2
        return padded * (padded // cell + cell)


class CellAttention(nn.Module):
    """Self-attention `within` each cell, or among the positions at the same place of all cells."""

    def __init__(self, channels: int, keys: int, size: int, *, within: bool) -> None:
        super().__init__()
        self.size = size
        # (B, C, rows, size, columns, size) -> (B, two axes of groups, two axes of tokens, C)
        self.order = (0, 2, 4, 3, 5, 1) if within else (0, 3, 5, 2, 4, 1)
        self.scale = keys**-0.5
        self.query = nn.Sequential(project_norm_relu(channels, keys), project_norm_relu(keys, keys))
        self.key = nn.Sequential(project_norm_relu(channels, keys), project_norm_relu(keys, keys))
        self.value = project(channels, channels, bias=False)
        self.out = project_norm_relu(channels, channels)

    def forward(self, x: Tensor, margins: Margins) -> Tensor:
        """Attends on x; the zeros that `margins` put around it are no keys and are cut off."""
        query, key, value = (surround(f(x), margins) for f in (self.query, self.key, self.value))
        grouped = self.group(value)
        bias = None
        if any(margins):
            # Finite: a group that is all margin must not become NaN. Its result is cut off.
            lowest = torch.finfo(query.dtype).min / 2
            hidden = F.pad(query.new_zeros(x.shape[0], 1, *x.shape[2:]), margins, value=lowest)
            bias = as_tokens(self.group(hidden)).mT
        q, k, v = (as_tokens(g) for g in (self.group(query), self.group(key), grouped))
        attended = attend(q, k, v, self.scale, bias)
        restored = attended.view(grouped.shape).permute(*(self.order.index(i) for i in range(6)))
        out: Tensor = self.out(surround(restored.reshape(value.shape), [-m for m in margins]))
        return out

    def group(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        rows, columns = height // self.size, width // self.size
        cells = x.reshape(batch, channels, rows, self.size, columns, self.size)
        return cells.permute(self.order)


def as_tokens(grouped: Tensor) -> Tensor:
    """(B, two axes of groups, two axes of tokens, C) -> (B * groups, T, C)"""
    return grouped.flatten(3, 4).flatten(0, 2)


def surround(x: Tensor, margins: Sequence[int]) -> Tensor:
    """Zeros on the left, right, top and bottom; a negative margin cuts off."""
    return F.pad(x, tuple(margins)) if any(margins) else x
