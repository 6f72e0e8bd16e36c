"""MobileNetV2 (https://arxiv.org/abs/1801.04381, Table 2) of any width, depth and input.

A row of the table is a stage: (t, c, n, s), that is n blocks of c channels with expansion t, the
first of them with stride s.
"""

from torch import nn

from nasattn.backbones.layers import InvertedResidual, MobileNetwork, conv_bn, make_divisible
from nasattn.catalog import MOBILENET_V2_ROWS, Rows


class MobileNetV2(MobileNetwork):
    """A stage a row. The head is `head` wide, wider with a width above 1 and never narrower, as in
    the paper. dropout: before the classifier."""

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
        rows: Rows = MOBILENET_V2_ROWS,
    ) -> None:
        act = nn.ReLU6
        cin = make_divisible(32 * width, divisor)
        stem = conv_bn(channels, cin, kernel=3, stride=stem_stride, act=act)
        stages: list[list[InvertedResidual]] = []
        for expansion, c, repeats, stride in rows:
            cout = make_divisible(c * width, divisor)
            stages.append([])
            for step in (stride, *[1] * (repeats - 1)):
                block = InvertedResidual(cin, cin * expansion, cout, stride=step, act=act)
                stages[-1].append(block)
                cin = cout
        wide = make_divisible(head * max(1.0, width), divisor)
        last = conv_bn(cin, wide, act=act)
        super().__init__(stem, stages, last, nn.Linear(wide, classes), dropout)
