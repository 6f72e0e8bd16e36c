"""Plain self-attention over positions (Zhang et al., SAGAN, ICML 2019)."""

import torch
from torch import Tensor, nn

from nasattn.blocks.tokens import (
    attend,
    image,
    max_pool,
    needed_width,
    pooled,
    project,
    tokens,
    width,
)


class SelfAttention(nn.Module):
    """x + gamma * softmax(q k^T) v over all positions, without a scale.

    https://arxiv.org/abs/1805.08318, section 3. x: (B, C, H, W) -> same. Queries and keys have
    width C * ratio (a UserError where that is less than 1), values C * value_ratio; narrower values
    are projected back to C. pool: keys and values are max-pooled over pool x pool cells after their
    projections; the authors' code has value_ratio 0.5 and pool 2, the public ports the defaults.
    The identity at first, as in the paper: gamma starts at 0.
    """

    def __init__(
        self, channels: int, *, ratio: float = 0.125, value_ratio: float = 1.0, pool: int = 1
    ) -> None:
        super().__init__()
        keys = needed_width("self_attention", channels, ratio)
        values = width(channels, value_ratio)
        self.pool = pool
        self.query = project(channels, keys)
        self.key = project(channels, keys)
        self.value = project(channels, values)
        self.out = project(values, channels) if value_ratio < 1 else nn.Identity()
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        key, value = max_pool(self.key(x), self.pool), max_pool(self.value(x), self.pool)
        attended = attend(tokens(self.query(x)), tokens(key), tokens(value))
        out: Tensor = self.out(image(attended, like=x))
        return x + (self.gamma * out).to(x.dtype)

    def map_elements(self, height: int, width: int) -> int:
        return height * width * pooled(height, width, self.pool)
