"""Mobile networks as tables of rows. `build` makes one from its catalogue entry.

The contract: `class(channels, classes, **options)`, a MobileNetwork; the options are keyword-only
and those of the backbone's row in nasattn.catalog, with its defaults.
"""

from collections.abc import Callable, Mapping
from typing import Any

from nasattn.architecture import Backbone
from nasattn.backbones.autonl import AutoNL
from nasattn.backbones.layers import MobileNetwork
from nasattn.backbones.mobilenet_v2 import MobileNetV2
from nasattn.backbones.mobilenet_v3 import MobileNetV3

BACKBONES: Mapping[str, Callable[..., MobileNetwork]] = {
    "mobilenet_v2": MobileNetV2,
    "mobilenet_v3": MobileNetV3,
    "autonl": AutoNL,
}


def build(backbone: Backbone, channels: int, classes: int) -> MobileNetwork:
    """The plain network for images of `channels` channels; blocks may go to its `sites()`."""
    options: dict[str, Any] = dict(backbone.options)
    return BACKBONES[backbone.name](channels, classes, **options)
