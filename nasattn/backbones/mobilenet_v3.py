"""MobileNetV3 (https://arxiv.org/abs/1905.02244, Tables 1 and 2) of any width, depth and input.

A row of the table is a block: (kernel, expanded, channels, se, hard_swish, stride). `expanded` is
the width of the depthwise convolution, `se` 1 where it is followed by squeeze-and-excite,
`hard_swish` 1 for that activation and 0 for ReLU. With another width the ratio of `expanded` to
the channels before it is kept, as in the authors' code; so come the paper's 155M MACs at 0.75.
"""

from collections import OrderedDict
from functools import partial

from torch import nn

from nasattn.backbones.layers import (
    InvertedResidual,
    MobileNetwork,
    SqueezeExcite,
    conv_bn,
    make_divisible,
)
from nasattn.catalog import MOBILENET_V3_ROWS, Rows

NORM = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)


class MobileNetV3(MobileNetwork):
    """A new stage where the channels change or the stride is above 1. The head: a convolution six
    times as wide as the last block, and, once pooled, one `head` wide with no norm, wider with a
    width above 1 and never narrower. dropout: before the classifier.

    Large and small differ in their rows and in `head`, 1280 and 1024.
    """

    def __init__(
        self,
        channels: int = 3,
        classes: int = 1000,
        *,
        width: float = 1.0,
        stem_stride: int = 2,
        head: int = 1280,
        divisor: int = 8,
        dropout: float = 0.2,
        rows: Rows = MOBILENET_V3_ROWS,
    ) -> None:
        swish = nn.Hardswish
        cin = make_divisible(16 * width, divisor)
        stem = conv_bn(channels, cin, kernel=3, stride=stem_stride, norm=NORM, act=swish)
        stages: list[list[InvertedResidual]] = []
        before = 16
        for kernel, expanded, c, se, hard_swish, stride in rows:
            if not stages or stride > 1 or c != before:
                stages.append([])
            hidden = make_divisible(cin * expanded / before, divisor)
            cout = make_divisible(c * width, divisor)
            squeezed = make_divisible(hidden / 4, divisor)
            block = InvertedResidual(
                cin,
                hidden,
                cout,
                kernel=kernel,
                stride=stride,
                norm=NORM,
                act=swish if hard_swish else nn.ReLU,
                se=SqueezeExcite(hidden, squeezed, act=nn.ReLU, gate=nn.Hardsigmoid)
                if se
                else None,
            )
            stages[-1].append(block)
            cin, before = cout, c
        wide = make_divisible(head * max(1.0, width), divisor)
        last = nn.Sequential(
            OrderedDict(
                conv=conv_bn(cin, 6 * cin, norm=NORM, act=swish),
                pool=nn.AdaptiveAvgPool2d(1),
                expand=nn.Conv2d(6 * cin, wide, 1),
                act=swish(inplace=True),
            )
        )
        super().__init__(stem, stages, last, nn.Linear(wide, classes), dropout)
