"""The attention blocks: one file a paper.

The contract: `class(channels, **options)`, NCHW in, the same NCHW out.

The options are keyword-only and those of the block's row in nasattn.catalog, with its defaults, but
for `identity_init`: a class has the paper's form, a placement the identity. What goes in
channels_last or half precision comes out so. `map_elements(height, width)` is the number of
attention weights for one sample, in the association that is used, stored or not; a gate counts its
own elements.
"""

from torch import nn

from nasattn.blocks.a2net import DoubleAttention
from nasattn.blocks.annnet import AsymmetricPyramid
from nasattn.blocks.cbam import ChannelThenSpatial
from nasattn.blocks.ccnet import CrissCross
from nasattn.blocks.coordatt import CoordinateAttention
from nasattn.blocks.danet import DualAttention
from nasattn.blocks.dmsanet import DualMultiScale
from nasattn.blocks.eca import EfficientChannel
from nasattn.blocks.emanet import ExpectationMaximization
from nasattn.blocks.gcnet import GlobalContext
from nasattn.blocks.isanet import InterlacedSparse
from nasattn.blocks.lightnl import LightNonLocal
from nasattn.blocks.non_local import NonLocal
from nasattn.blocks.se import SqueezeExcitation
from nasattn.blocks.self_attention import SelfAttention
from nasattn.blocks.simam import SimAM

BLOCKS: dict[str, type[nn.Module]] = {
    "self_attention": SelfAttention,
    "non_local": NonLocal,
    "danet": DualAttention,
    "a2net": DoubleAttention,
    "ccnet": CrissCross,
    "gcnet": GlobalContext,
    "emanet": ExpectationMaximization,
    "isanet": InterlacedSparse,
    "annnet": AsymmetricPyramid,
    "lightnl": LightNonLocal,
    "dmsanet": DualMultiScale,
    "se": SqueezeExcitation,
    "eca": EfficientChannel,
    "cbam": ChannelThenSpatial,
    "coordatt": CoordinateAttention,
    "simam": SimAM,
}
