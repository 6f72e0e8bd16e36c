"""The non-local block (Wang et al., CVPR 2018)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasattn.blocks.tokens import (
    attend,
    image,
    max_pool,
    no_autocast,
    pooled,
    project,
    tokens,
    widen,
    width,
)


class NonLocal(nn.Module):
    """x + BN(W_z y), y_i the mean of g(x_j) over the positions j, weighted by f(x_i, x_j).

    https://arxiv.org/abs/1711.07971, section 3. x: (B, C, H, W) -> same; theta, phi and g have
    width C * ratio. The identity at first, as in the paper: BN's weight starts at 0, or, without
    `norm`, W_z.
    mode: embedded_gaussian is a softmax of theta_i phi_j, times width^-1/2 with `scale` (as the
    authors' code has it, though not the paper); gaussian one of x_i x_j; dot_product is theta_i
    phi_j / S; concatenation relu(w [theta_i, phi_j]) / S; S counts the key positions.
    subsample: a 2x2 max-pool of the keys and values, before their projections (the authors' code)
    or after them (the public ports).
    """

    def __init__(
        self,
        channels: int,
        *,
        ratio: float = 0.5,
        mode: str = "embedded_gaussian",
        subsample: str = "none",
        scale: bool = True,
        norm: bool = True,
    ) -> None:
        super().__init__()
        self.width = width(channels, ratio)
        self.mode = mode
        self.subsample = subsample
        self.scale = self.width**-0.5 if scale and mode == "embedded_gaussian" else 1.0
        embedded = mode != "gaussian"
        self.theta = project(channels, self.width) if embedded else nn.Identity()
        self.phi = project(channels, self.width) if embedded else nn.Identity()
        self.g = project(channels, self.width)
        self.concat = project(2 * self.width, 1, bias=False) if mode == "concatenation" else None
        self.out = project(self.width, channels)
        self.norm = nn.BatchNorm2d(channels) if norm else nn.Identity()
        for conv in self.modules():
            if isinstance(conv, nn.Conv2d):
                nn.init.normal_(conv.weight, std=0.01)
                if conv.bias is not None:
                    nn.init.zeros_(conv.bias)
        for zero in self.norm.parameters() if norm else self.out.parameters():
            nn.init.zeros_(zero)

    def forward(self, x: Tensor) -> Tensor:
        source = max_pool(x, 2) if self.subsample == "before" else x
        phi, g = self.phi(source), self.g(source)
        if self.subsample == "after":
            phi, g = max_pool(phi, 2), max_pool(g, 2)
        theta, phi, g = tokens(self.theta(x)), tokens(phi), tokens(g)
        if self.mode == "dot_product":
            y = self.dot_product(theta, phi, g)
        elif self.mode == "concatenation":
            y = self.concatenation(theta, phi, g)
        else:
            y = attend(theta, phi, g, self.scale)
        out: Tensor = self.norm(self.out(image(y.to(g.dtype), like=x)))
        return x + out.to(x.dtype)

    def dot_product(self, theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
        """theta phi^T g / S, in the association that costs less."""
        with no_autocast(theta):
            theta, phi, g = widen(theta), widen(phi) / phi.shape[1], widen(g)
            if self._by_positions(theta.shape[1], phi.shape[1]):
                return torch.bmm(torch.bmm(theta, phi.mT), g)
            return torch.bmm(theta, torch.bmm(phi.mT, g))

    def concatenation(self, theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
        """sum_j relu(a_i + b_j) g_j / S, where w [theta_i, phi_j] = a_i + b_j, with no (T, S) map.

        With b sorted from high to low, the terms that relu lets through are the first n_i, so both
        a_i * sum(g_j) and sum(b_j g_j) are read from running sums.
        """
        assert self.concat is not None
        w = self.concat.weight.flatten(1).mT
        with no_autocast(theta):
            theta, phi, g, w = widen(theta), widen(phi), widen(g), widen(w)
            a = theta @ w[: self.width]  # (B, T, 1)
            b, order = (phi @ w[self.width :]).sort(1, descending=True)  # (B, S, 1)
            g = g.gather(1, order.expand_as(g)) / g.shape[1]
            g_sum = F.pad(g.cumsum(1), (0, 0, 1, 0))  # (B, S + 1, width); row n sums n terms
            bg_sum = F.pad((b * g).cumsum(1), (0, 0, 1, 0))
            passed = below(a, -b).expand(-1, -1, self.width)
            return a * g_sum.gather(1, passed) + bg_sum.gather(1, passed)

    def _by_positions(self, queries: int, keys: int) -> bool:
        """Whether the map over positions costs less than that over channels."""
        return 2 * queries * keys < (queries + keys) * self.width

    def map_elements(self, height: int, width: int) -> int:
        queries = height * width
        keys = queries if self.subsample == "none" else pooled(height, width, 2)
        if self.mode == "dot_product" and not self._by_positions(queries, keys):
            return self.width**2
        return queries * keys


def below(values: Tensor, bounds: Tensor) -> Tensor:
    """For each value how many bounds are less than it: (B, T, 1), (B, S, 1) -> (B, T, 1).

    searchsorted, which ONNX lacks, by one sort. Whether an equal bound counts is left open: it
    stands for a term relu(0).
    """
    order = torch.cat((values, bounds), 1).argsort(1)
    counts = (order >= values.shape[1]).cumsum(1)
    return torch.empty_like(order).scatter(1, order, counts)[:, : values.shape[1]]
