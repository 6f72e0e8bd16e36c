"""What the papers share: 1x1 projections, a map as tokens, and softmax attention over them.

A batch of maps (B, C, H, W) is tokens (B, T, C) with T = H*W. S counts the key tokens, D is the
width of a query and a key, E that of a value.
"""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasattn.errors import UserError


def project(channels: int, width: int, bias: bool = True) -> nn.Conv2d:
    """A 1x1 convolution: the same linear map at every position."""
    return nn.Conv2d(channels, width, kernel_size=1, bias=bias)


def project_norm_relu(channels: int, width: int, bias: bool = False) -> nn.Sequential:
    return nn.Sequential(
        project(channels, width, bias), nn.BatchNorm2d(width), nn.ReLU(inplace=True)
    )


def width(channels: int, ratio: float) -> int:
    """A share of the channels, truncated, and never nothing."""
    return max(1, int(channels * ratio))


def needed_width(block: str, channels: int, ratio: float, least: int = 1) -> int:
    """A share of the channels, truncated; a UserError where it is less than the block can use."""
    share = int(channels * ratio)
    if share < least:
        enough = math.ceil(least / channels * 1e4) / 1e4
        remedy = f"ratio from {enough:g}" if enough <= 1 else f"{least} channels"
        raise UserError(
            f"{block}(ratio={ratio:g}) at {channels} channels gives a width of {share}; "
            f"it needs at least {least}: {remedy}"
        )
    return share


def tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, T, C), a view."""
    return x.flatten(2).mT


def image(tokens: Tensor, like: Tensor) -> Tensor:
    """(B, T, C) -> (B, C, H, W), with the height, width and memory format of `like`."""
    batch, _, height, width = like.shape
    return keep_format(tokens.mT.reshape(batch, tokens.shape[-1], height, width), like)


def keep_format(x: Tensor, like: Tensor) -> Tensor:
    """The same values in the memory format of `like`: channels_last, or else NCHW."""
    channels_last = like.is_contiguous(memory_format=torch.channels_last)
    if channels_last and not like.is_contiguous():
        return x.contiguous(memory_format=torch.channels_last)
    return x.contiguous()


def max_pool(x: Tensor, size: int) -> Tensor:
    """The maximum over size x size cells; along a side shorter than a cell, over all of it."""
    if size == 1:
        return x
    return F.max_pool2d(x, (min(size, x.shape[2]), min(size, x.shape[3])))


def pooled(height: int, width: int, size: int) -> int:
    """How many positions `max_pool` leaves."""
    return max(1, height // size) * max(1, width // size)


def widen(x: Tensor) -> Tensor:
    """float32 for half precision, whose sums of products overflow or lose digits; else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def no_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Products inside are computed in the precision of their operands, whatever autocast says."""
    device = x.device.type
    if x.is_meta or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def attend(
    query: Tensor, key: Tensor, value: Tensor, scale: float = 1.0, bias: Tensor | None = None
) -> Tensor:
    """softmax_S(scale * query key^T + bias) value, (B, T, D), (B, S, D), (B, S, E) -> (B, T, E).

    bias: (B, 1, S). The softmax is in float32 or better. Memory is linear in T, forward and
    backward: the (T, S) map is held only where S is at most four times E.
    """
    if value.is_meta or (value.device.type == "cpu" and key.shape[1] <= 4 * value.shape[2]):
        return _attend_by_map(query, key, value, scale, bias)
    # Without zeros to fill up the widths, or without the copies of what is NCHW, the kernels fall
    # back to the full map: the CPU's takes equal widths only, CUDA's multiples of 8.
    widest = max(query.shape[2], value.shape[2])
    q, k, v = (
        _pad(x, widest if x.device.type == "cpu" else -(-x.shape[2] // 8) * 8)
        for x in (query, key, value)
    )
    mask = None if bias is None else bias.to(q.dtype).unsqueeze(1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    return out.squeeze(1)[..., : value.shape[2]]


def _attend_by_map(
    query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None
) -> Tensor:
    """At the true widths: how a small map is quickest, and what cost is counted by."""
    with no_autocast(value):
        # The query is scaled, not the map; the result is channel-major: `image` copies nothing.
        scaled = widen(query) if scale == 1.0 else widen(query) * scale
        logits = torch.bmm(scaled, widen(key).mT)
        weights = (logits if bias is None else logits + bias).softmax(2)
        return torch.bmm(value.mT, weights.to(value.dtype).mT).mT


def _pad(x: Tensor, width: int) -> Tensor:
    """(B, T, D) -> (B, 1, T, width), contiguous."""
    wide = x if x.shape[2] == width else F.pad(x, (0, width - x.shape[2]))
    return wide.contiguous().unsqueeze(1)
