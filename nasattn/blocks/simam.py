"""SimAM: a gate without weights (Yang et al., ICML 2021)."""

from torch import Tensor, nn

from nasattn.blocks.identity import IdentityInit
from nasattn.blocks.tokens import widen


class SimAM(nn.Module):
    """Gate each element by how far it stands out in its channel.

    https://proceedings.mlr.press/v139/yang21o.html, section 3.3. x: (B, C, H, W) -> same: x times
    the sigmoid of (x - mean)^2 / (4 (variance + strength)) + 1/2, a channel's variance over its
    H W - 1 degrees of freedom.
    Departs from the paper: with `identity_init`, x + s (f(x) - x), s = 0 at first.
    """

    def __init__(
        self, channels: int, *, strength: float = 1e-4, identity_init: bool = False
    ) -> None:
        super().__init__()
        self.channels = channels
        self.strength = strength
        self.identity = IdentityInit(identity_init)

    def forward(self, x: Tensor) -> Tensor:
        wide = widen(x)
        squared = (wide - wide.mean((2, 3), keepdim=True)).square()
        freedom = max(1, x.shape[2] * x.shape[3] - 1)
        variance = squared.sum((2, 3), keepdim=True) / freedom
        gate = (squared / (4 * (variance + self.strength)) + 0.5).sigmoid().to(x.dtype)
        return self.identity(x, x * gate)

    def map_elements(self, height: int, width: int) -> int:
        return self.channels * height * width
