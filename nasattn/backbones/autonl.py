"""The skeleton of AutoNL (https://arxiv.org/abs/2004.01961), without its LightNL blocks.

A row of the table is a block: (expansion, channels, stride, kernel, se). `se` is the width of the
squeeze-and-excite after the depthwise convolution, as a share of the block's input; 0 is none.
AutoNL-S and -L are such rows with LightNL behind the projections (`stage3.1.project`).
"""

from functools import partial

from torch import nn

from nasattn.backbones.layers import InvertedResidual, MobileNetwork, SqueezeExcite, conv_bn
from nasattn.catalog import AUTONL_ROWS, Rows

NORM = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01)
ACT = nn.SiLU


class AutoNL(MobileNetwork):
    """A new stage where the channels change or the stride is above 1. Swish everywhere, as in the
    authors' code. dropout: before the classifier."""

    def __init__(
        self,
        channels: int = 3,
        classes: int = 1000,
        *,
        stem: int = 32,
        stem_stride: int = 2,
        head: int = 1280,
        dropout: float = 0.2,
        rows: Rows = AUTONL_ROWS,
    ) -> None:
        first = conv_bn(channels, stem, kernel=3, stride=stem_stride, norm=NORM, act=ACT)
        stages: list[list[InvertedResidual]] = []
        cin = stem
        for expansion, cout, stride, kernel, se in rows:
            if not stages or stride > 1 or cout != cin:
                stages.append([])
            hidden, squeezed = cin * expansion, max(1, int(cin * se))
            block = InvertedResidual(
                cin,
                hidden,
                cout,
                kernel=kernel,
                stride=stride,
                norm=NORM,
                act=ACT,
                se=SqueezeExcite(hidden, squeezed, act=ACT, gate=nn.Sigmoid) if se else None,
            )
            stages[-1].append(block)
            cin = cout
        last = conv_bn(cin, head, norm=NORM, act=ACT)
        super().__init__(first, stages, last, nn.Linear(head, classes), dropout)
