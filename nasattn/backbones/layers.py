"""What the papers share: convolutions with batch norm, inverted residuals, and their order.

Shapes: N images, C channels, H x W pixels.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from nasattn.errors import UserError

Norm = Callable[[int], nn.Module]
Act = Callable[..., nn.Module]  # nn.ReLU6 and its like: made with inplace=True


def make_divisible(channels: float, divisor: int) -> int:
    """The nearest multiple of the divisor, at least one, and never below 90 % of the channels."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


def conv_bn(
    cin: int,
    cout: int,
    *,
    act: Act | None,
    kernel: int = 1,
    stride: int = 1,
    groups: int = 1,
    norm: Norm = nn.BatchNorm2d,
) -> nn.Sequential:
    """A map's sides become ceil(side / stride). UserError for an even kernel."""
    if kernel % 2 == 0:
        raise UserError(f"the backbone has the kernel {kernel}; a kernel is odd")
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv=nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False),
        bn=norm(cout),
    )
    if act:
        layers["act"] = act(inplace=True)
    return nn.Sequential(layers)


class SqueezeExcite(nn.Module):
    """Gate each channel by a bottleneck over the channels' means: a part of a backbone's block."""

    def __init__(self, channels: int, squeezed: int, *, act: Act, gate: Act) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.act = act(inplace=True)
        self.expand = nn.Conv2d(squeezed, channels, 1)
        self.gate = gate()

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = self.gate(self.expand(self.act(self.reduce(x.mean((2, 3), keepdim=True)))))
        return x * gate


class InvertedResidual(nn.Module):
    """Expand, filter by depth, squeeze and excite, project; add the input where the shapes allow it
    (https://arxiv.org/abs/1801.04381, Figure 4). There is nothing to expand where hidden = cin."""

    def __init__(
        self,
        cin: int,
        hidden: int,
        cout: int,
        *,
        act: Act,
        kernel: int = 3,
        stride: int = 1,
        norm: Norm = nn.BatchNorm2d,
        se: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.has_skip = stride == 1 and cin == cout
        self.expand = conv_bn(cin, hidden, norm=norm, act=act) if hidden != cin else nn.Identity()
        self.depthwise = conv_bn(
            hidden, hidden, kernel=kernel, stride=stride, groups=hidden, norm=norm, act=act
        )
        self.se = se or nn.Identity()
        self.project = conv_bn(hidden, cout, norm=norm, act=None)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.project(self.se(self.depthwise(self.expand(x))))
        return x + y if self.has_skip else y


class MobileNetwork(nn.Module):
    """x: (N, channels, H, W) -> logits (N, classes).

    Modules: stem, stage1..stageK (their names are `stages`), head, whose mean over the positions is
    what the classifier sees, dropout, classifier.
    """

    def __init__(
        self,
        stem: nn.Module,
        stages: Sequence[Sequence[InvertedResidual]],
        head: nn.Module,
        classifier: nn.Module,
        dropout: float,
    ) -> None:
        super().__init__()
        self.stem = stem
        self.stages = [f"stage{number}" for number in range(1, len(stages) + 1)]
        for name, blocks in zip(self.stages, stages, strict=True):
            self.add_module(name, nn.Sequential(*blocks))
        self.head = head
        self.dropout = nn.Dropout(dropout)
        self.classifier = classifier
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = self.get_submodule(stage)(x)
        x = self.head(x).mean((2, 3))
        out: Tensor = self.classifier(self.dropout(x))
        return out

    def sites(self) -> dict[str, str]:
        """Site -> the module after which it stands under its other name, or the same name.

        After every block (`stage2.1`), and inside it, behind the projection and before the skip is
        added (`stage2.1.project`). Without a skip both are one place: it goes by the outer name.
        """
        sites: dict[str, str] = {}
        for outer, block in self.named_modules():
            if isinstance(block, InvertedResidual):
                inner = f"{outer}.project"
                sites |= {inner: inner, outer: outer} if block.has_skip else {outer: inner}
        return sites


def _initialise(module: nn.Module) -> None:
    if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
        return  # nothing to fill, and filling nothing takes most of the time of a build
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, 0.0, 0.01)
    if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
        nn.init.zeros_(module.bias)
