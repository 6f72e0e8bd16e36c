"""Each block the ordinary way: the same weights and maths, in the form that ports of it have.

Attention maps are built whole, tensors are viewed and permuted as the equations are written, and
nothing is reassociated. A port takes a block of nasattn for its weights and a map (B, C, H, W).
"""

# mypy: disable-error-code="no-any-return"

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Port = Callable[[Any, Tensor], Tensor]


class Naive(nn.Module):
    """A copy of the block's weights, computed by a port."""

    def __init__(self, block: nn.Module, port: Port) -> None:
        super().__init__()
        self.block = copy.deepcopy(block)
        self.port = port

    def forward(self, x: Tensor) -> Tensor:
        return self.port(self.block, x)


def rows(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, N, C)"""
    return x.view(x.shape[0], x.shape[1], -1).permute(0, 2, 1)


def grid(y: Tensor, like: Tensor) -> Tensor:
    """(B, N, C) -> (B, C, H, W)"""
    return y.permute(0, 2, 1).contiguous().view(y.shape[0], -1, *like.shape[2:])


def over_positions(b: Any, x: Tensor) -> Tensor:
    attention = torch.bmm(rows(b.query(x)), rows(b.key(x)).permute(0, 2, 1)).softmax(-1)
    value = b.value(x).view(x.shape[0], x.shape[1], -1)
    return torch.bmm(value, attention.permute(0, 2, 1)).view(x.shape)


def over_channels(x: Tensor) -> Tensor:
    flat = x.reshape(x.shape[0], x.shape[1], -1)
    energy = torch.bmm(flat, flat.permute(0, 2, 1))
    energy = energy.max(-1, keepdim=True)[0].expand_as(energy) - energy
    return torch.bmm(energy.softmax(-1), flat).view(x.shape)


def self_attention(b: Any, x: Tensor) -> Tensor:
    return b.gamma * over_positions(b, x) + x


def danet(b: Any, x: Tensor) -> Tensor:
    return x + b.position.gamma * over_positions(b.position, x) + b.gamma * over_channels(x)


def non_local(b: Any, x: Tensor) -> Tensor:
    theta, phi, g = rows(b.theta(x)), rows(b.phi(x)), rows(b.g(x))
    if b.mode == "concatenation":
        size = (-1, -1, theta.shape[1], phi.shape[1])
        left = theta.permute(0, 2, 1).unsqueeze(3).expand(size)
        right = phi.permute(0, 2, 1).unsqueeze(2).expand(size)
        weights = F.relu(b.concat(torch.cat([left, right], 1))).squeeze(1) / phi.shape[1]
    else:
        weights = torch.matmul(theta, phi.permute(0, 2, 1))
        if b.mode == "dot_product":
            weights = weights / phi.shape[1]
        else:
            weights = F.softmax(weights * b.scale if b.scale != 1.0 else weights, -1)
    return b.norm(b.out(grid(torch.matmul(weights, g), x))) + x


def a2net(b: Any, x: Tensor) -> Tensor:
    batch = x.shape[0]
    features = b.features(x).view(batch, -1, x.shape[2] * x.shape[3])
    gather = F.softmax(b.gather(x).view(batch, b.maps, -1), -1)
    distribute = F.softmax(b.distribute(x).view(batch, b.maps, -1), 1)
    descriptors = torch.bmm(features, gather.permute(0, 2, 1))
    return x + b.out(torch.bmm(descriptors, distribute).view(batch, -1, *x.shape[2:]))


def ccnet(b: Any, x: Tensor) -> Tensor:
    for _ in range(b.recurrence):
        x = b.gamma * criss_cross(b, x) + x
    return x


def criss_cross(b: Any, x: Tensor) -> Tensor:
    batch, _, height, width = x.shape

    def columns(t: Tensor) -> Tensor:  # (B W, d, H)
        return t.permute(0, 3, 1, 2).contiguous().view(batch * width, -1, height)

    def lines(t: Tensor) -> Tensor:  # (B H, d, W)
        return t.permute(0, 2, 1, 3).contiguous().view(batch * height, -1, width)

    query, key, value = b.query(x), b.key(x), b.value(x)
    itself = torch.diag(torch.full((height,), float("inf"), device=x.device))
    energy_h = torch.bmm(columns(query).permute(0, 2, 1), columns(key))
    energy_h = energy_h - itself.unsqueeze(0).repeat(batch * width, 1, 1)
    energy_h = energy_h.view(batch, width, height, height).permute(0, 2, 1, 3)
    energy_w = torch.bmm(lines(query).permute(0, 2, 1), lines(key))
    both = torch.cat([energy_h, energy_w.view(batch, height, width, width)], 3).softmax(3)
    to_h = both[..., :height].permute(0, 2, 1, 3).contiguous().view(-1, height, height)
    to_w = both[..., height:].contiguous().view(-1, width, width)
    out_h = torch.bmm(columns(value), to_h.permute(0, 2, 1)).view(batch, width, -1, height)
    out_w = torch.bmm(lines(value), to_w.permute(0, 2, 1)).view(batch, height, -1, width)
    return out_h.permute(0, 2, 3, 1) + out_w.permute(0, 2, 1, 3)


def gcnet(b: Any, x: Tensor) -> Tensor:
    batch, channels = x.shape[:2]
    flat = x.view(batch, channels, -1).unsqueeze(1)  # (B, 1, C, N)
    mask = b.mask(x).view(batch, 1, -1).softmax(2).unsqueeze(-1)  # (B, 1, N, 1)
    return x + b.add(torch.matmul(flat, mask).view(batch, channels, 1, 1))


def emanet(b: Any, x: Tensor) -> Tensor:
    features = b.before(x)
    with torch.no_grad():
        flat = features.view(x.shape[0], x.shape[1], -1)
        mu = b.bases.repeat(x.shape[0], 1, 1)
        for _ in range(b.stages):
            z = torch.bmm(flat.permute(0, 2, 1), mu).softmax(2)
            mu = torch.bmm(flat, z / (1e-6 + z.sum(1, keepdim=True)))
            mu = mu / (1e-6 + mu.norm(dim=1, keepdim=True))
        rebuilt = F.relu(mu.matmul(z.permute(0, 2, 1)).view(x.shape))
        b.bases.mul_(b.momentum).add_(mu.mean(0, keepdim=True) * (1 - b.momentum))
    return F.relu(b.norm(b.after(rebuilt)) + x)


def isanet(b: Any, x: Tensor) -> Tensor:
    size = b.size
    batch, channels, height, width = x.shape
    down, right = -height % size, -width % size
    margins = (right // 2, right - right // 2, down // 2, down - down // 2)
    padded = F.pad(x, margins) if down or right else x
    tall, wide = padded.shape[2] // size, padded.shape[3] // size

    def attend(step: Any, groups: Tensor) -> Tensor:
        query, key, value = rows(step.query(groups)), rows(step.key(groups)), step.value(groups)
        weights = torch.matmul(query, key.permute(0, 2, 1)) * step.scale
        return step.out(grid(torch.matmul(weights.softmax(-1), rows(value)), groups))

    y = padded.view(batch, channels, tall, size, wide, size).permute(0, 3, 5, 1, 2, 4)
    y = attend(b.long, y.contiguous().view(-1, channels, tall, wide))
    y = y.view(batch, size, size, channels, tall, wide).permute(0, 4, 5, 3, 1, 2)
    y = attend(b.short, y.contiguous().view(-1, channels, size, size))
    y = y.view(batch, tall, wide, channels, size, size).permute(0, 3, 1, 4, 2, 5)
    y = y.contiguous().view(padded.shape)
    y = y[:, :, margins[2] : margins[2] + height, margins[0] : margins[0] + width]
    return b.out(torch.cat([x, y], 1))


def annnet(b: Any, x: Tensor) -> Tensor:
    def pyramid(t: Tensor) -> Tensor:
        pooled = [F.adaptive_avg_pool2d(t, n).view(*t.shape[:2], -1) for n in (1, 3, 6, 8)]
        return torch.cat(pooled, -1)  # (B, d, 110)

    value = pyramid(b.value(x)).permute(0, 2, 1)
    query, key = rows(b.key(x)), pyramid(b.key(x))
    weights = F.softmax(torch.matmul(query, key) * key.shape[1] ** -0.5, -1)
    context = b.context(grid(torch.matmul(weights, value), x))
    return b.out(torch.cat([context, x], 1))


def lightnl_parts(b: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    g = x[:, :, :: b.stride, :: b.stride]
    return x[:, : b.keys], g[:, : b.keys], g


def lightnl_map(b: Any, x: Tensor) -> Tensor:
    """By the equation: the map over all pairs of positions."""
    theta, phi, g = lightnl_parts(b, x)
    weights = torch.einsum("bcij,bcpq->bijpq", theta, phi) / (x.shape[2] * x.shape[3])
    return x + b.norm(b.spread(torch.einsum("bijpq,bcpq->bcij", weights, g)))


def lightnl_port(b: Any, x: Tensor) -> Tensor:
    """As its authors run it: the map over channels where that costs less."""
    theta, phi, g = lightnl_parts(b, x)
    n, m = x.shape[2] * x.shape[3], g.shape[2] * g.shape[3]
    channels, keys = x.shape[1], b.keys
    if n * m * (channels + keys) < (n + m) * channels * keys:
        return lightnl_map(b, x)
    f = torch.einsum("bcpq,bdpq->bcd", phi, g)
    y = torch.einsum("bcij,bcd->bdij", theta, f) / n
    return x + b.norm(b.spread(y))


def dmsanet(b: Any, x: Tensor) -> Tensor:
    """No port exists: scale by scale, as the paper's text goes."""
    sources = [x] * 4 if b.whole else x.chunk(4, 1)
    branch = shuffle_gates if hasattr(b.attend, "norm") else two_branches
    maps = [branch(b.attend, conv(s)) for conv, s in zip(b.scales, sources, strict=True)]
    gates = [
        b.excite(F.relu(b.squeeze(F.adaptive_avg_pool2d(f, 1)))).sigmoid().unsqueeze(1)
        for f in maps
    ]
    weights = torch.cat(gates, 1).softmax(1)  # (B, 4, C / 4, 1, 1)
    return shuffle(torch.cat([f * weights[:, i] for i, f in enumerate(maps)], 1), 4)


def two_branches(b: Any, f: Tensor) -> Tensor:
    position = b.dual.position.gamma * over_positions(b.dual.position, f) + f
    return position + (b.dual.gamma * over_channels(f) + f)


def shuffle_gates(b: Any, f: Tensor) -> Tensor:
    first, second = f.chunk(2, 1)
    means = F.adaptive_avg_pool2d(first, 1)
    first = first * (b.channel_weight * means + b.channel_bias).sigmoid()
    second = second * (b.spatial_weight * b.norm(second) + b.spatial_bias).sigmoid()
    return shuffle(torch.cat([first, second], 1), 2)


def shuffle(x: Tensor, groups: int) -> Tensor:
    split = x.view(x.shape[0], groups, -1, *x.shape[2:])
    return split.permute(0, 2, 1, 3, 4).contiguous().view(x.shape)


def se(b: Any, x: Tensor) -> Tensor:
    gate = b.excite(F.relu(b.squeeze(F.adaptive_avg_pool2d(x, 1)))).sigmoid()
    return x * gate.expand_as(x)


def eca(b: Any, x: Tensor) -> Tensor:
    means = F.adaptive_avg_pool2d(x, 1).squeeze(-1).permute(0, 2, 1)
    gate = b.neighbours(means).permute(0, 2, 1).unsqueeze(-1).sigmoid()
    return x * gate.expand_as(x)


def cbam(b: Any, x: Tensor) -> Tensor:
    def bottleneck(summary: Tensor) -> Tensor:
        return b.excite(F.relu(b.squeeze(summary)))

    gate = bottleneck(F.adaptive_avg_pool2d(x, 1)) + bottleneck(F.adaptive_max_pool2d(x, 1))
    x = x * gate.sigmoid()
    summary = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)
    return x * b.norm(b.spatial(summary)).sigmoid()


def coordatt(b: Any, x: Tensor) -> Tensor:
    height, width = x.shape[2:]
    rows_ = F.adaptive_avg_pool2d(x, (height, 1))
    columns = F.adaptive_avg_pool2d(x, (1, width)).permute(0, 1, 3, 2)
    hidden = F.hardswish(b.norm(b.squeeze(torch.cat([rows_, columns], 2))))
    of_rows, of_columns = torch.split(hidden, [height, width], 2)
    gate = b.columns(of_columns.permute(0, 1, 3, 2)).sigmoid()
    return x * b.rows(of_rows).sigmoid() * gate


def simam(b: Any, x: Tensor) -> Tensor:
    freedom = x.shape[2] * x.shape[3] - 1
    squared = (x - x.mean([2, 3], keepdim=True)).pow(2)
    variance = squared.sum([2, 3], keepdim=True) / freedom
    return x * (squared / (4 * (variance + b.strength)) + 0.5).sigmoid()
