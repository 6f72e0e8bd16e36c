"""What each block computes, written out naively from its paper's equations.

Full attention maps, explicit loops, nothing reassociated: slow, and easy to hold against the
papers. Where a paper and its authors' code differ, the default here is the code's form, as in the
blocks.

`SHAPES[name](channels, **options)` gives the shape of every weight and statistic by its role in
the paper; `FORWARDS[name](x, weights, training, **options)` the output. When `training`, batch
statistics are used and the running ones in `weights` are replaced by their updated values.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

Weights = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]
Positions = list[tuple[int, int]]


def width(channels: int, ratio: float) -> int:
    return max(1, int(channels * ratio))


def conv_shapes(
    role: str, outputs: int, inputs: int, kernel: int = 1, *, bias: bool = True
) -> Shapes:
    shapes: Shapes = {f"{role}.weight": (outputs, inputs, kernel, kernel)}
    return shapes | {f"{role}.bias": (outputs,)} if bias else shapes


def affine_shapes(role: str, channels: int) -> Shapes:
    return {f"{role}.weight": (channels,), f"{role}.bias": (channels,)}


def batch_norm_shapes(role: str, channels: int) -> Shapes:
    statistics = {f"{role}.running_mean": (channels,), f"{role}.running_var": (channels,)}
    return affine_shapes(role, channels) | statistics


def attention_shapes(channels: int, ratio: float) -> Shapes:
    """Queries and keys narrowed by `ratio`, values at full width."""
    narrow = width(channels, ratio)
    return (
        conv_shapes("query", narrow, channels)
        | conv_shapes("key", narrow, channels)
        | conv_shapes("value", channels, channels)
    )


def project(x: Tensor, w: Weights, role: str) -> Tensor:
    """1x1 convolution, with the bias if there is one."""
    y = torch.einsum("oc,bchw->bohw", w[f"{role}.weight"][:, :, 0, 0], x)
    bias = w.get(f"{role}.bias")
    return y if bias is None else y + bias[:, None, None]


def grouped_conv(x: Tensor, weight: Tensor, groups: int) -> Tensor:
    """k x k convolution without bias, zero padding k // 2, as a sum over the kernel's offsets."""
    height, breadth = x.shape[2:]
    kernel = weight.shape[2]
    inputs = pad(x, [kernel // 2] * 4).unflatten(1, (groups, -1))
    filters = weight.unflatten(0, (groups, -1))
    y = torch.zeros(())
    for dy, dx in product(range(kernel), repeat=2):
        shifted = inputs[..., dy : dy + height, dx : dx + breadth]
        y = y + torch.einsum("goi,bgihw->bgohw", filters[..., dy, dx], shifted)
    return y.flatten(1, 2)


def batch_norm(
    x: Tensor,
    w: Weights,
    role: str,
    training: bool,
    *,
    eps: float = 1e-5,
    momentum: float = 0.1,
    among: Tensor | None = None,
) -> Tensor:
    """Normalisation by channel; `among`, a mask over positions, restricts the batch statistics."""
    mean, var = w[f"{role}.running_mean"], w[f"{role}.running_var"]
    if training:
        samples = x.movedim(1, 0).flatten(2)
        if among is not None:
            samples = samples[:, :, among.flatten()]
        samples = samples.flatten(1)
        count = samples.shape[1]
        w[f"{role}.running_mean"] = (1 - momentum) * mean + momentum * samples.mean(1).detach()
        mean = samples.mean(1)
        squares = ((samples - mean[:, None]) ** 2).sum(1)
        unbiased = (squares / (count - 1)).detach()
        w[f"{role}.running_var"] = (1 - momentum) * var + momentum * unbiased
        var = squares / count
    mean, var, gain, shift = (
        t[:, None, None] for t in (mean, var, w[f"{role}.weight"], w[f"{role}.bias"])
    )
    return (x - mean) / (var + eps).sqrt() * gain + shift


def max_pool(x: Tensor, size: int) -> Tensor:
    """Non-overlapping windows; rows and columns that fill no window are dropped."""
    rows = [
        torch.stack(
            [
                x[:, :, i * size : (i + 1) * size, j * size : (j + 1) * size].amax((2, 3))
                for j in range(x.shape[3] // size)
            ],
            -1,
        )
        for i in range(x.shape[2] // size)
    ]
    return torch.stack(rows, 2)


def bin_means(x: Tensor, bins: int) -> Tensor:
    """Adaptive average pooling to bins x bins, flattened: (B, C, bins^2)."""

    def bounds(i: int, length: int) -> slice:
        return slice(i * length // bins, -(-(i + 1) * length // bins))

    height, breadth = x.shape[2:]
    means = [
        x[:, :, bounds(i, height), bounds(j, breadth)].mean((2, 3))
        for i, j in product(range(bins), repeat=2)
    ]
    return torch.stack(means, -1)


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float = 1.0) -> Tensor:
    """Each query position's mean of the values, weighted by a softmax over the key positions."""
    logits = torch.einsum("bdi,bdj->bij", query.flatten(2), key.flatten(2)) * scale
    mixed = torch.einsum("bij,bcj->bci", logits.softmax(2), value.flatten(2))
    return mixed.unflatten(2, query.shape[2:]) if query.dim() == 4 else mixed


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Channel j of group i goes to place j * groups + i."""
    each = x.shape[1] // groups
    return torch.stack([x[:, i * each + j] for j in range(each) for i in range(groups)], 1)


# Self-attention (SAGAN, arXiv:1805.08318, equations 1 to 3)


def self_attention_shapes(c: int, *, ratio: float, value_ratio: float, pool: int) -> Shapes:
    shapes = attention_shapes(c, ratio) | {"gamma": ()}
    if value_ratio < 1:
        values = width(c, value_ratio)
        shapes |= conv_shapes("value", values, c) | conv_shapes("out", c, values)
    return shapes


def self_attention(
    x: Tensor, w: Weights, training: bool, *, ratio: float, value_ratio: float, pool: int
) -> Tensor:
    query, key, value = (project(x, w, role) for role in ("query", "key", "value"))
    o = attend(query, max_pool(key, pool), max_pool(value, pool))
    if value_ratio < 1:
        o = project(o, w, "out")
    return w["gamma"] * o + x


# Non-local (arXiv:1711.07971, equations 1 to 6)


def non_local_shapes(c: int, *, ratio: float, mode: str, norm: bool, **_: object) -> Shapes:
    narrow = width(c, ratio)
    shapes = conv_shapes("g", narrow, c) | conv_shapes("out", c, narrow)
    if mode != "gaussian":
        shapes |= conv_shapes("theta", narrow, c) | conv_shapes("phi", narrow, c)
    if mode == "concatenation":
        shapes |= {"concat.weight": (1, 2 * narrow)}
    return shapes | (batch_norm_shapes("norm", c) if norm else {})


def non_local(
    x: Tensor,
    w: Weights,
    training: bool,
    *,
    ratio: float,
    mode: str,
    subsample: str,
    scale: bool,
    norm: bool,
) -> Tensor:
    before = max_pool(x, 2) if subsample == "before" else x
    gaussian = mode == "gaussian"
    theta = x if gaussian else project(x, w, "theta")
    phi = before if gaussian else project(before, w, "phi")
    g = project(before, w, "g")
    if subsample == "after":
        phi, g = max_pool(phi, 2), max_pool(g, 2)
    theta, phi, g = theta.flatten(2), phi.flatten(2), g.flatten(2)
    keys = g.shape[2]
    if mode == "concatenation":
        grid = (-1, -1, theta.shape[2], keys)
        pairs = torch.cat([theta[..., None].expand(grid), phi[:, :, None].expand(grid)], 1)
        weights = torch.einsum("c,bcij->bij", w["concat.weight"][0], pairs).relu() / keys
    else:
        weights = torch.einsum("bci,bcj->bij", theta, phi)
        if mode == "dot_product":
            weights = weights / keys
        else:
            # The scale belongs to the embedded Gaussian alone.
            scaled = scale and mode == "embedded_gaussian"
            weights = (weights * (theta.shape[1] ** -0.5 if scaled else 1.0)).softmax(2)
    y = torch.einsum("bij,bcj->bci", weights, g).unflatten(2, x.shape[2:])
    z = project(y, w, "out")
    return (batch_norm(z, w, "norm", training) if norm else z) + x


# DANet (arXiv:1809.02983, equations 1 to 4), both branches around one x


def danet_shapes(c: int, *, ratio: float, branches: str, **_: object) -> Shapes:
    position = attention_shapes(c, ratio) | {"gamma_position": ()}
    channel: Shapes = {"gamma_channel": ()}
    return {"both": position | channel, "position": position, "channel": channel}[branches]


def channel_attention(x: Tensor, form: str = "official") -> Tensor:
    tokens = x.flatten(2)
    energy = torch.einsum("bcn,bdn->bcd", tokens, tokens)
    if form == "official":
        energy = energy.amax(2, keepdim=True) - energy
    return torch.einsum("bcd,bdn->bcn", energy.softmax(2), tokens).unflatten(2, x.shape[2:])


def position_attention(x: Tensor, w: Weights) -> Tensor:
    return attend(project(x, w, "query"), project(x, w, "key"), project(x, w, "value"))


def danet(
    x: Tensor, w: Weights, training: bool, *, ratio: float, branches: str, channel: str
) -> Tensor:
    y = x
    if branches != "channel":
        y = y + w["gamma_position"] * position_attention(x, w)
    if branches != "position":
        y = y + w["gamma_channel"] * channel_attention(x, channel)
    return y


# A^2-Nets (arXiv:1810.11579, equations 1 to 4)


def a2net_shapes(c: int, *, ratio: float, maps_ratio: float, **_: object) -> Shapes:
    features, maps = width(c, ratio), width(c, maps_ratio)
    return (
        conv_shapes("features", features, c)
        | conv_shapes("gather", maps, c)
        | conv_shapes("distribute", maps, c)
        | conv_shapes("out", c, features)
    )


def a2net(
    x: Tensor, w: Weights, training: bool, *, ratio: float, maps_ratio: float, distribute: str
) -> Tensor:
    features, gather, vectors = (
        project(x, w, role).flatten(2) for role in ("features", "gather", "distribute")
    )
    descriptors = torch.einsum("bmn,bkn->bmk", features, gather.softmax(2))
    attention = vectors.softmax({"maps": 1, "positions": 2}[distribute])
    z = torch.einsum("bmk,bkn->bmn", descriptors, attention).unflatten(2, x.shape[2:])
    return x + project(z, w, "out")


# CCNet (arXiv:1811.11721, equations 1 and 2)


def ccnet_shapes(c: int, *, ratio: float, recurrence: int) -> Shapes:
    return attention_shapes(c, ratio) | {"gamma": ()}


def criss_cross(x: Tensor, w: Weights) -> Tensor:
    height, breadth = x.shape[2:]
    query, key, value = (project(x, w, role) for role in ("query", "key", "value"))
    pixels = []
    for i, j in product(range(height), range(breadth)):
        column = [(row, j) for row in range(height) if row != i]
        rows, columns = zip(*column, *((i, other) for other in range(breadth)), strict=True)
        logits = torch.einsum("bd,bdp->bp", query[:, :, i, j], key[:, :, rows, columns])
        pixels.append(torch.einsum("bp,bcp->bc", logits.softmax(1), value[:, :, rows, columns]))
    return torch.stack(pixels, -1).unflatten(2, (height, breadth))


def ccnet(x: Tensor, w: Weights, training: bool, *, ratio: float, recurrence: int) -> Tensor:
    for _ in range(recurrence):
        x = w["gamma"] * criss_cross(x, w) + x
    return x


# GCNet (arXiv:1904.11492, equation 5)


def gcnet_shapes(c: int, *, ratio: float, pooling: str, fusion: str) -> Shapes:
    narrow = int(c * ratio)
    shapes = conv_shapes("mask", 1, c) if pooling == "att" else {}
    for branch in fusion.split("_"):
        shapes |= (
            conv_shapes(f"{branch}.reduce", narrow, c)
            | affine_shapes(f"{branch}.norm", narrow)
            | conv_shapes(f"{branch}.expand", c, narrow)
        )
    return shapes


def gcnet(
    x: Tensor, w: Weights, training: bool, *, ratio: float, pooling: str, fusion: str
) -> Tensor:
    if pooling == "att":
        weights = project(x, w, "mask").flatten(1).softmax(1)
        context = torch.einsum("bn,bcn->bc", weights, x.flatten(2))
    else:
        context = x.mean((2, 3))

    def transform(branch: str) -> Tensor:
        t = project(context[:, :, None, None], w, f"{branch}.reduce")
        mean = t.mean(1, keepdim=True)
        var = ((t - mean) ** 2).mean(1, keepdim=True)
        gain, shift = (w[f"{branch}.norm.{part}"][:, None, None] for part in ("weight", "bias"))
        t = (t - mean) / (var + 1e-5).sqrt() * gain + shift
        return project(t.relu(), w, f"{branch}.expand")

    if "mul" in fusion:
        x = x * transform("mul").sigmoid()
    return x + transform("add") if "add" in fusion else x


# EMANet (arXiv:1907.13426, equations 9 to 14, and the moving average of section 3.5)


def emanet_shapes(c: int, *, bases: int, **_: object) -> Shapes:
    return (
        conv_shapes("conv1", c, c)
        | conv_shapes("conv2", c, c, bias=False)
        | batch_norm_shapes("norm", c)
        | {"bases": (1, c, bases)}
    )


def emanet(
    x: Tensor,
    w: Weights,
    training: bool,
    *,
    bases: int,
    stages: int,
    momentum: float,
    gradients: bool,
) -> Tensor:
    features = project(x, w, "conv1").flatten(2)
    if not gradients:
        features = features.detach()
    reconstructions, learned = [], []
    for sample in features:
        mu = w["bases"][0]
        for _ in range(stages):
            z = (sample.T @ mu).softmax(1)
            mu = sample @ (z / (1e-6 + z.sum(0, keepdim=True)))
            mu = mu / (1e-6 + (mu**2).sum(0, keepdim=True).sqrt())
        reconstructions.append((mu @ z.T).unflatten(1, x.shape[2:]))
        learned.append(mu.detach())
    y = project(torch.stack(reconstructions).relu(), w, "conv2")
    y = (batch_norm(y, w, "norm", training) + x).relu()
    if training:
        mean = torch.stack(learned).mean(0, keepdim=True)
        w["bases"] = momentum * w["bases"] + (1 - momentum) * mean
    return y


# ISANet (arXiv:1907.12273, equations 4 to 8)


def isanet_shapes(c: int, *, ratio: float, **_: object) -> Shapes:
    narrow = width(c, ratio)
    shapes = conv_shapes("fuse", c, 2 * c, bias=False) | batch_norm_shapes("fuse_norm", c)
    for step in ("long", "short"):
        for role in ("query", "key"):
            shapes |= (
                conv_shapes(f"{step}.{role}1", narrow, c, bias=False)
                | batch_norm_shapes(f"{step}.{role}1_norm", narrow)
                | conv_shapes(f"{step}.{role}2", narrow, narrow, bias=False)
                | batch_norm_shapes(f"{step}.{role}2_norm", narrow)
            )
        shapes |= (
            conv_shapes(f"{step}.value", c, c, bias=False)
            | conv_shapes(f"{step}.out", c, c, bias=False)
            | batch_norm_shapes(f"{step}.out_norm", c)
        )
    return shapes


def group_attention(
    x: Tensor, w: Weights, training: bool, step: str, groups: Sequence[Positions], real: Tensor
) -> Tensor:
    """Self-attention inside each group of positions; those not `real` take no part in anything."""

    def normed(t: Tensor, role: str) -> Tensor:
        t = project(t, w, f"{step}.{role}")
        return batch_norm(t, w, f"{step}.{role}_norm", training, among=real).relu()

    query = normed(normed(x, "query1"), "query2")
    key = normed(normed(x, "key1"), "key2")
    value = project(x, w, f"{step}.value")
    places, columns = [], []
    for group in groups:
        inside = [place for place in group if real[place]]
        if inside:
            i, j = zip(*inside, strict=True)
            q, k, v = (t[:, :, i, j] for t in (query, key, value))
            places += inside
            columns.append(attend(q, k, v, q.shape[1] ** -0.5))
    mixed = torch.cat(columns, 2)
    at = {place: mixed[:, :, n] for n, place in enumerate(places)}
    nothing = torch.zeros_like(mixed[:, :, 0])
    height, breadth = x.shape[2:]
    grid = [at.get(place, nothing) for place in product(range(height), range(breadth))]
    return normed(torch.stack(grid, -1).unflatten(2, (height, breadth)), "out")


def isanet(
    x: Tensor,
    w: Weights,
    training: bool,
    *,
    ratio: float,
    size: int,
    padding: str,
    dropout: float,
) -> Tensor:
    height, breadth = x.shape[2:]
    cells_y, cells_x = -(-height // size), -(-breadth // size)
    spare_y, spare_x = cells_y * size - height, cells_x * size - breadth
    top, left = spare_y // 2, spare_x // 2
    inner = (slice(top, top + height), slice(left, left + breadth))
    y = pad(x, [left, spare_x - left, top, spare_y - top])
    real = torch.full(y.shape[2:], padding == "official")
    real[inner] = True
    offsets = list(product(range(size), repeat=2))
    cells = list(product(range(cells_y), range(cells_x)))

    def place(cell: tuple[int, int], offset: tuple[int, int]) -> tuple[int, int]:
        return cell[0] * size + offset[0], cell[1] * size + offset[1]

    long = [[place(cell, offset) for cell in cells] for offset in offsets]
    short = [[place(cell, offset) for offset in offsets] for cell in cells]
    y = group_attention(y, w, training, "long", long, real)
    y = group_attention(y, w, training, "short", short, real)
    both = torch.cat([x, y[:, :, inner[0], inner[1]]], 1)
    return batch_norm(project(both, w, "fuse"), w, "fuse_norm", training).relu()


# ANNNet (arXiv:1908.07678, sections 3.2 and 3.3)


def annnet_shapes(c: int, *, ratio: float, dropout: float) -> Shapes:
    narrow = width(c, ratio)
    return (
        conv_shapes("key", narrow, c)
        | batch_norm_shapes("key_norm", narrow)
        | conv_shapes("value", narrow, c)
        | conv_shapes("out", c, narrow)
        | conv_shapes("fuse", c, 2 * c)
        | batch_norm_shapes("fuse_norm", c)
    )


def sampled(x: Tensor) -> Tensor:
    """The spatial pyramid's 1 + 9 + 36 + 64 means."""
    return torch.cat([bin_means(x, bins) for bins in (1, 3, 6, 8)], 2)


def annnet(x: Tensor, w: Weights, training: bool, *, ratio: float, dropout: float) -> Tensor:
    """APNB. One transform gives both the queries and the keys."""
    key = batch_norm(project(x, w, "key"), w, "key_norm", training).relu()
    value = project(x, w, "value")
    context = attend(key, sampled(key), sampled(value), key.shape[1] ** -0.5)
    both = torch.cat([project(context, w, "out"), x], 1)
    return batch_norm(project(both, w, "fuse"), w, "fuse_norm", training).relu()


def afnb_shapes(low: int, high: int, narrow: int) -> Shapes:
    return (
        conv_shapes("query", narrow, high)
        | batch_norm_shapes("query_norm", narrow)
        | conv_shapes("key", narrow, low)
        | batch_norm_shapes("key_norm", narrow)
        | conv_shapes("value", narrow, low)
        | conv_shapes("out", high, narrow)
        | conv_shapes("fuse", high, 2 * high)
        | batch_norm_shapes("fuse_norm", high)
    )


def afnb(low: Tensor, high: Tensor, w: Weights, training: bool) -> Tensor:
    """The form for two levels: keys and values from the low one, no ReLU after the fusion."""
    query = batch_norm(project(high, w, "query"), w, "query_norm", training).relu()
    key = batch_norm(project(low, w, "key"), w, "key_norm", training).relu()
    value = project(low, w, "value")
    context = attend(query, sampled(key), sampled(value), key.shape[1] ** -0.5)
    both = torch.cat([project(context, w, "out"), high], 1)
    return batch_norm(project(both, w, "fuse"), w, "fuse_norm", training)


# LightNL (arXiv:2004.01961, equations 2 to 5)


def lightnl_shapes(c: int, **_: object) -> Shapes:
    return {"depthwise.weight": (c, 1, 3, 3)} | batch_norm_shapes("norm", c)


def lightnl(
    x: Tensor, w: Weights, training: bool, *, ratio: float, stride: int, normalize: str
) -> Tensor:
    narrow = int(x.shape[1] * ratio)
    sampled = x[:, :, ::stride, ::stride]
    similarity = torch.einsum(
        "bci,bcj->bij", x[:, :narrow].flatten(2), sampled[:, :narrow].flatten(2)
    )
    if normalize == "full":
        similarity = similarity / (x.shape[2] * x.shape[3])
    y = torch.einsum("bij,bcj->bci", similarity, sampled.flatten(2)).unflatten(2, x.shape[2:])
    y = grouped_conv(y, w["depthwise.weight"], x.shape[1])
    return x + batch_norm(y, w, "norm", training, eps=1e-3, momentum=0.01)


# DMSANet (arXiv:2106.08382, readings R1 and R2: no code exists, the paper is ambiguous)

KERNELS = (3, 5, 7, 9)
GROUPS = (1, 4, 8, 16)


def dmsanet_shapes(c: int, *, mode: str, scales: str) -> Shapes:
    each = c // 4
    shapes: Shapes = {}
    for i, (kernel, groups) in enumerate(zip(KERNELS, GROUPS, strict=True)):
        if scales == "pyramid":
            inputs = c // math.gcd(groups, c, each)
            shapes |= conv_shapes(f"scale{i}", each, inputs, kernel, bias=False)
        elif scales == "depthwise":
            shapes |= conv_shapes(f"scale{i}", each, 1, kernel, bias=False)
    if mode == "attention":
        shapes |= attention_shapes(each, 1 / 8) | {"gamma_position": (), "gamma_channel": ()}
    else:
        half = each // 2
        gates = ("channel_weight", "channel_bias", "spatial_weight", "spatial_bias")
        shapes |= {gate: (half,) for gate in gates} | affine_shapes("norm", half)
    narrow = max(1, each // 16)
    return shapes | conv_shapes("squeeze", narrow, each) | conv_shapes("excite", each, narrow)


def dual_attention(f: Tensor, w: Weights) -> Tensor:
    position = f + w["gamma_position"] * position_attention(f, w)
    channel = f + w["gamma_channel"] * channel_attention(f)
    return position + channel


def shuffle_gates(f: Tensor, w: Weights) -> Tensor:
    """SA-Net's: half of the channels gated by their means, half by their normalised maps."""

    def gate(t: Tensor, kind: str) -> Tensor:
        weight, bias = (w[f"{kind}_{part}"][:, None, None] for part in ("weight", "bias"))
        return (weight * t + bias).sigmoid()

    one, two = f.chunk(2, 1)
    mean = two.mean((2, 3), keepdim=True)
    var = ((two - mean) ** 2).mean((2, 3), keepdim=True)
    normed = (two - mean) / (var + 1e-5).sqrt()
    normed = normed * w["norm.weight"][:, None, None] + w["norm.bias"][:, None, None]
    gated = [
        one * gate(one.mean((2, 3), keepdim=True), "channel"),
        two * gate(normed, "spatial"),
    ]
    return shuffle(torch.cat(gated, 1), 2)


def dmsanet(x: Tensor, w: Weights, training: bool, *, mode: str, scales: str) -> Tensor:
    each = x.shape[1] // 4
    scaled = list(x.split(each, 1))
    for i, groups in enumerate(GROUPS):
        if scales == "pyramid":
            scaled[i] = grouped_conv(x, w[f"scale{i}.weight"], math.gcd(groups, x.shape[1], each))
        elif scales == "depthwise":
            scaled[i] = grouped_conv(scaled[i], w[f"scale{i}.weight"], each)
    enriched = [{"attention": dual_attention, "gate": shuffle_gates}[mode](f, w) for f in scaled]
    strengths = [squeeze_excite(e, w, "squeeze", "excite") for e in enriched]
    attention = torch.stack(strengths).softmax(0)
    weighted = [e * a for e, a in zip(enriched, attention, strict=True)]
    return shuffle(torch.cat(weighted, 1), 4)


# The competitors


def squeeze_excite(x: Tensor, w: Weights, squeeze: str, excite: str) -> Tensor:
    means = x.mean((2, 3), keepdim=True)
    return project(project(means, w, squeeze).relu(), w, excite).sigmoid()


def se_shapes(c: int, *, ratio: float) -> Shapes:
    narrow = width(c, ratio)
    return conv_shapes("squeeze", narrow, c) | conv_shapes("excite", c, narrow)


def se(x: Tensor, w: Weights, training: bool, *, ratio: float) -> Tensor:
    """arXiv:1709.01507, equations 2 to 4."""
    return x * squeeze_excite(x, w, "squeeze", "excite")


def eca_kernel(c: int) -> int:
    """arXiv:1910.03151: the odd number nearest to (log2 C + 1) / 2, the upper of two."""
    target = (math.log2(c) + 1) / 2
    return min(range(1, 99, 2), key=lambda odd: (abs(odd - target), -odd))


def eca_shapes(c: int, *, kernel: int) -> Shapes:
    return {"conv.weight": (1, 1, kernel or eca_kernel(c))}


def eca(x: Tensor, w: Weights, training: bool, *, kernel: int) -> Tensor:
    """A 1-d convolution along the channels' means."""
    taps = w["conv.weight"].flatten()
    means = pad(x.mean((2, 3)), [len(taps) // 2] * 2)
    gate = sum(tap * means[:, i : i + x.shape[1]] for i, tap in enumerate(taps))
    return x * torch.as_tensor(gate).sigmoid()[:, :, None, None]


def cbam_shapes(c: int, *, ratio: float, kernel: int) -> Shapes:
    narrow = width(c, ratio)
    return (
        conv_shapes("squeeze", narrow, c, bias=False)
        | conv_shapes("excite", c, narrow, bias=False)
        | conv_shapes("spatial", 1, 2, kernel, bias=False)
        | batch_norm_shapes("norm", 1)
    )


def cbam(x: Tensor, w: Weights, training: bool, *, ratio: float, kernel: int) -> Tensor:
    """arXiv:1807.06521, equations 1 to 3: the channel gate, then the spatial one on [mean; max]."""
    pooled = (x.mean((2, 3), keepdim=True), x.amax((2, 3), keepdim=True))
    mlp = [project(project(p, w, "squeeze").relu(), w, "excite") for p in pooled]
    x = x * (mlp[0] + mlp[1]).sigmoid()
    maps = torch.stack([x.mean(1), x.amax(1)], 1)
    gate = batch_norm(grouped_conv(maps, w["spatial.weight"], 1), w, "norm", training)
    return x * gate.sigmoid()


def coordatt_shapes(c: int, *, ratio: float) -> Shapes:
    narrow = max(8, int(c * ratio))
    return (
        conv_shapes("squeeze", narrow, c)
        | batch_norm_shapes("norm", narrow)
        | conv_shapes("rows", c, narrow)
        | conv_shapes("columns", c, narrow)
    )


def coordatt(x: Tensor, w: Weights, training: bool, *, ratio: float) -> Tensor:
    """arXiv:2103.02907, equations 4 to 9."""
    height = x.shape[2]
    strips = torch.cat([x.mean(3), x.mean(2)], 2)[..., None]
    f = batch_norm(project(strips, w, "squeeze"), w, "norm", training)
    f = f * (f + 3).clamp(0, 6) / 6
    rows = project(f[:, :, :height], w, "rows").sigmoid()
    columns = project(f[:, :, height:], w, "columns").sigmoid()
    return x * rows * columns.mT


def simam_shapes(c: int, *, strength: float) -> Shapes:
    return {}


def simam(x: Tensor, w: Weights, training: bool, *, strength: float) -> Tensor:
    """Equation 5 and the authors' code: the variance over H W - 1."""
    squares = (x - x.mean((2, 3), keepdim=True)) ** 2
    var = squares.sum((2, 3), keepdim=True) / (x.shape[2] * x.shape[3] - 1)
    return x * (squares / (4 * (var + strength)) + 0.5).sigmoid()


SHAPES: Mapping[str, Callable[..., Shapes]] = {
    "self_attention": self_attention_shapes,
    "non_local": non_local_shapes,
    "danet": danet_shapes,
    "a2net": a2net_shapes,
    "ccnet": ccnet_shapes,
    "gcnet": gcnet_shapes,
    "emanet": emanet_shapes,
    "isanet": isanet_shapes,
    "annnet": annnet_shapes,
    "lightnl": lightnl_shapes,
    "dmsanet": dmsanet_shapes,
    "se": se_shapes,
    "eca": eca_shapes,
    "cbam": cbam_shapes,
    "coordatt": coordatt_shapes,
    "simam": simam_shapes,
}

FORWARDS: Mapping[str, Callable[..., Tensor]] = {
    "self_attention": self_attention,
    "non_local": non_local,
    "danet": danet,
    "a2net": a2net,
    "ccnet": ccnet,
    "gcnet": gcnet,
    "emanet": emanet,
    "isanet": isanet,
    "annnet": annnet,
    "lightnl": lightnl,
    "dmsanet": dmsanet,
    "se": se,
    "eca": eca,
    "cbam": cbam,
    "coordatt": coordatt,
    "simam": simam,
}


def wraps(name: str, options: Mapping[str, Any]) -> bool:
    """Whether the block has the scaled residual around it: GCNet's sum is the identity without."""
    return bool(options.get("identity_init")) and (name, options.get("fusion")) != ("gcnet", "add")


def paper_options(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key != "identity_init"}


def shapes(name: str, channels: int, options: Mapping[str, Any]) -> Shapes:
    """The roles of the block's state and their shapes, with the identity scale where asked for."""
    scale: Shapes = {"identity": ()} if wraps(name, options) else {}
    return SHAPES[name](channels, **paper_options(options)) | scale


def forward(
    name: str, x: Tensor, weights: Weights, training: bool, options: Mapping[str, Any]
) -> Tensor:
    """The block's output: f(x), or x + s (f(x) - x) with `identity_init`."""
    y = FORWARDS[name](x, weights, training, **paper_options(options))
    return x + weights["identity"] * (y - x) if wraps(name, options) else y
