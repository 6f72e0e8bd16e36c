"""What there is to place, and on what: every block and backbone with its options, without torch.

A block's class (nasattn.blocks) and a backbone's builder (nasattn.backbones) take exactly the
options of their row, with these defaults; tests hold the two together. Having the table apart lets
a file be checked, an architecture be made canonical and a study be read in milliseconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nasattn.errors import UserError, lookup, suggest

Scalar = bool | int | float | str
Rows = tuple[tuple[Any, ...], ...]  # of ints and floats: a column says which
Value = Scalar | Rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One option: its default, which also sets its type, and what is allowed."""

    default: Scalar
    low: float = float("-inf")
    high: float = float("inf")
    words: tuple[str, ...] = ()

    @property
    def allowed(self) -> str:
        if isinstance(self.default, bool):
            return "true or false"
        if isinstance(self.default, str):
            return ", ".join(self.words)
        kind = "a whole number" if isinstance(self.default, int) else "a number"
        return f"{kind} from {self.low:g}" + (f" to {self.high:g}" if self.high < 1e308 else "")

    def check(self, value: object) -> Scalar:
        """The value in its canonical type (1 is 1.0 where a float is meant), or a UserError."""
        match self.default:
            case bool():
                fits = isinstance(value, bool)
            case str():
                fits = value in self.words
            case int():
                fits = type(value) is int and self.low <= value <= self.high
            case _:
                number = isinstance(value, (int, float)) and not isinstance(value, bool)
                fits = number and self.low <= value <= self.high  # type: ignore[operator]
        if not fits:
            near = suggest(value, self.words) if isinstance(value, str) else ""
            raise UserError(f"got {value!r}; allowed: {self.allowed}{near}")
        if isinstance(self.default, float):
            return float(value)  # type: ignore[arg-type]
        return value  # type: ignore[return-value]


CELL = Option(default=1, low=1, high=4096)


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A network as rows of numbers; `columns` names them. A cell is a whole number from 1, but for
    the columns in `others`; their defaults only set the type."""

    default: Rows
    columns: tuple[str, ...]
    others: Mapping[str, Option] = field(default_factory=dict)

    @property
    def allowed(self) -> str:
        others = "".join(f", but {name} {rule.allowed}" for name, rule in self.others.items())
        numbers = f"whole numbers from {CELL.low} to {CELL.high}"
        return f"rows of [{', '.join(self.columns)}], {numbers}{others}"

    def check(self, value: object) -> Rows:
        """The rows as tuples, each cell in its column's type, or a UserError."""
        if not isinstance(value, (list, tuple)) or not value:
            raise UserError(f"got {value!r}; allowed: {self.allowed}")
        return tuple(self._row(row) for row in value)

    def _row(self, row: object) -> tuple[Scalar, ...]:
        if not isinstance(row, (list, tuple)) or len(row) != len(self.columns):
            raise UserError(f"got the row {row!r}; allowed: {self.allowed}")
        cells = []
        for column, cell in zip(self.columns, row, strict=True):
            try:
                cells.append(self.others.get(column, CELL).check(cell))
            except UserError:
                raise UserError(
                    f"got the row {row!r} with {column} {cell!r}; allowed: {self.allowed}"
                ) from None
        return tuple(cells)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A row of the catalogue. `starts_as_identity`: by the paper's own zero-initialisation."""

    title: str
    year: int
    url: str
    options: Mapping[str, Option | Table] = field(default_factory=dict)
    starts_as_identity: bool = True


def share(default: float) -> Option:
    """A width as a share of the channels."""
    return Option(default=default, low=1 / 1024, high=1.0)


def whole(default: int, low: int = 1, high: int = 65_536) -> Option:
    return Option(default=default, low=low, high=high)


def word(default: str, *others: str) -> Option:
    return Option(default=default, words=(default, *others))


# Placement inserts a block as the identity. Those whose paper does not start so take
# `identity_init`; the class's own default is false (the paper's form), a placement's is true.
IDENTITY = Option(default=True)

BLOCKS: dict[str, Entry] = {
    "self_attention": Entry(
        title="Self-Attention Generative Adversarial Networks",
        year=2018,
        url="https://arxiv.org/abs/1805.08318",
        options={"ratio": share(0.125), "value_ratio": share(1.0), "pool": whole(1, high=8)},
    ),
    "non_local": Entry(
        title="Non-local Neural Networks",
        year=2017,
        url="https://arxiv.org/abs/1711.07971",
        options={
            "ratio": share(0.5),
            "mode": word("embedded_gaussian", "gaussian", "dot_product", "concatenation"),
            "subsample": word("none", "before", "after"),
            "scale": Option(default=True),
            "norm": Option(default=True),
        },
    ),
    "danet": Entry(
        title="Dual Attention Network for Scene Segmentation",
        year=2018,
        url="https://arxiv.org/abs/1809.02983",
        options={
            "ratio": share(0.125),
            "branches": word("both", "position", "channel"),
            "channel": word("official", "paper"),
        },
    ),
    "a2net": Entry(
        title="A^2-Nets: Double Attention Networks",
        year=2018,
        url="https://arxiv.org/abs/1810.11579",
        options={
            "ratio": share(0.5),
            "maps_ratio": share(0.5),
            "distribute": word("maps", "positions"),
            "identity_init": IDENTITY,
        },
        starts_as_identity=False,
    ),
    "ccnet": Entry(
        title="CCNet: Criss-Cross Attention for Semantic Segmentation",
        year=2018,
        url="https://arxiv.org/abs/1811.11721",
        options={"ratio": share(0.125), "recurrence": whole(2, high=8)},
    ),
    "gcnet": Entry(
        title="GCNet: Non-local Networks Meet Squeeze-Excitation Networks and Beyond",
        year=2019,
        url="https://arxiv.org/abs/1904.11492",
        options={
            "ratio": share(0.0625),
            "pooling": word("att", "avg"),
            "fusion": word("add", "mul", "mul_add"),
            "identity_init": IDENTITY,
        },
    ),
    "emanet": Entry(
        title="Expectation-Maximization Attention Networks for Semantic Segmentation",
        year=2019,
        url="https://arxiv.org/abs/1907.13426",
        options={
            "bases": whole(64),
            "stages": whole(3),
            "momentum": Option(default=0.9, low=0.0, high=1.0),
            "gradients": Option(default=False),
            "identity_init": IDENTITY,
        },
        starts_as_identity=False,
    ),
    "isanet": Entry(
        title="Interlaced Sparse Self-Attention for Semantic Segmentation",
        year=2019,
        url="https://arxiv.org/abs/1907.12273",
        options={
            "ratio": share(0.5),
            "size": whole(8),
            "padding": word("official", "masked"),
            "dropout": Option(default=0.05, low=0.0, high=0.9),
            "identity_init": IDENTITY,
        },
        starts_as_identity=False,
    ),
    "annnet": Entry(
        title="Asymmetric Non-local Neural Networks for Semantic Segmentation",
        year=2019,
        url="https://arxiv.org/abs/1908.07678",
        options={
            "ratio": share(0.5),
            "dropout": Option(default=0.05, low=0.0, high=0.9),
            "identity_init": IDENTITY,
        },
        starts_as_identity=False,
    ),
    "lightnl": Entry(
        title="Neural Architecture Search for Lightweight Non-Local Networks",
        year=2020,
        url="https://arxiv.org/abs/2004.01961",
        options={
            "ratio": share(0.25),
            "stride": whole(1, high=8),
            "normalize": word("full", "none"),
        },
    ),
    "dmsanet": Entry(
        title="DMSANet: Dual Multi Scale Attention Network",
        year=2021,
        url="https://arxiv.org/abs/2106.08382",
        options={
            "mode": word("attention", "gate"),
            "scales": word("pyramid", "depthwise", "split"),
            "identity_init": IDENTITY,
        },
        starts_as_identity=False,
    ),
    "se": Entry(
        title="Squeeze-and-Excitation Networks",
        year=2017,
        url="https://arxiv.org/abs/1709.01507",
        options={"ratio": share(0.0625), "identity_init": IDENTITY},
        starts_as_identity=False,
    ),
    "eca": Entry(
        title="ECA-Net: Efficient Channel Attention for Deep Convolutional Neural Networks",
        year=2019,
        url="https://arxiv.org/abs/1910.03151",
        options={"kernel": whole(0, low=0, high=99), "identity_init": IDENTITY},
        starts_as_identity=False,
    ),
    "cbam": Entry(
        title="CBAM: Convolutional Block Attention Module",
        year=2018,
        url="https://arxiv.org/abs/1807.06521",
        options={
            "ratio": share(0.0625),
            "kernel": whole(7, high=99),
            "identity_init": IDENTITY,
        },
        starts_as_identity=False,
    ),
    "coordatt": Entry(
        title="Coordinate Attention for Efficient Mobile Network Design",
        year=2021,
        url="https://arxiv.org/abs/2103.02907",
        options={"ratio": share(0.03125), "identity_init": IDENTITY},
        starts_as_identity=False,
    ),
    "simam": Entry(
        title="SimAM: A Simple, Parameter-Free Attention Module for CNNs",
        year=2021,
        url="https://proceedings.mlr.press/v139/yang21o.html",
        options={
            "strength": Option(default=1e-4, low=1e-8, high=1.0),
            "identity_init": IDENTITY,
        },
        starts_as_identity=False,
    ),
}

MOBILENET_V2_ROWS: Rows = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)

# MobileNetV3-Large; small is search_spaces/architectures/mobilenet_v3_small.yaml.
MOBILENET_V3_ROWS: Rows = (
    (3, 16, 16, 0, 0, 1),
    (3, 64, 24, 0, 0, 2),
    (3, 72, 24, 0, 0, 1),
    (5, 72, 40, 1, 0, 2),
    (5, 120, 40, 1, 0, 1),
    (5, 120, 40, 1, 0, 1),
    (3, 240, 80, 0, 1, 2),
    (3, 200, 80, 0, 1, 1),
    (3, 184, 80, 0, 1, 1),
    (3, 184, 80, 0, 1, 1),
    (3, 480, 112, 1, 1, 1),
    (3, 672, 112, 1, 1, 1),
    (5, 672, 160, 1, 1, 2),
    (5, 960, 160, 1, 1, 1),
    (5, 960, 160, 1, 1, 1),
)

# The skeleton of AutoNL's search at its smallest kernels and expansions. What the search found is
# search_spaces/architectures/autonl_s.yaml and autonl_l.yaml.
AUTONL_ROWS: Rows = (
    (1, 16, 1, 3, 0.0),
    (3, 24, 2, 3, 0.0),
    *[(3, 24, 1, 3, 0.0)] * 2,
    (3, 40, 2, 3, 0.0),
    *[(3, 40, 1, 3, 0.0)] * 3,
    (3, 80, 2, 3, 0.0),
    *[(3, 80, 1, 3, 0.0)] * 3,
    *[(3, 96, 1, 3, 0.0)] * 4,
    (3, 192, 2, 3, 0.0),
    *[(3, 192, 1, 3, 0.0)] * 3,
    (3, 320, 1, 3, 0.0),
)

WIDTH = Option(default=1.0, low=0.01, high=100.0)
STEM_STRIDE = whole(2, high=4)
DROPOUT = Option(default=0.2, low=0.0, high=0.9)
SWITCH = whole(0, low=0, high=1)

BACKBONES: dict[str, Entry] = {
    "mobilenet_v2": Entry(
        title="MobileNetV2: Inverted Residuals and Linear Bottlenecks",
        year=2018,
        url="https://arxiv.org/abs/1801.04381",
        options={
            "width": WIDTH,
            "stem_stride": STEM_STRIDE,
            "head": whole(1280),
            "divisor": whole(8),
            "dropout": DROPOUT,
            "rows": Table(
                default=MOBILENET_V2_ROWS,
                columns=("expansion", "channels", "repeats", "stride"),
            ),
        },
    ),
    "mobilenet_v3": Entry(
        title="Searching for MobileNetV3",
        year=2019,
        url="https://arxiv.org/abs/1905.02244",
        options={
            "width": WIDTH,
            "stem_stride": STEM_STRIDE,
            "head": whole(1280),
            "divisor": whole(8),
            "dropout": DROPOUT,
            "rows": Table(
                default=MOBILENET_V3_ROWS,
                columns=("kernel", "expanded", "channels", "se", "hard_swish", "stride"),
                others={"se": SWITCH, "hard_swish": SWITCH},
            ),
        },
    ),
    "autonl": Entry(
        title="Neural Architecture Search for Lightweight Non-Local Networks",
        year=2020,
        url="https://arxiv.org/abs/2004.01961",
        options={
            "stem": whole(32),
            "stem_stride": STEM_STRIDE,
            "head": whole(1280),
            "dropout": DROPOUT,
            "rows": Table(
                default=AUTONL_ROWS,
                columns=("expansion", "channels", "stride", "kernel", "se"),
                others={"se": Option(default=0.0, low=0.0, high=1.0)},
            ),
        },
    ),
}


def complete(
    table: Mapping[str, Entry], name: str, options: Mapping[str, object], what: str
) -> dict[str, Value]:
    """All options of `name` in the catalogue's order: those given, checked, and the defaults.

    A UserError names the option that is unknown or has a value that is not allowed.
    """
    known = lookup(table, name, what).options
    for option in options:
        if option not in known:
            raise UserError(
                f"{what} '{name}' has no option '{option}'; "
                f"allowed: {', '.join(known) or 'none'}{suggest(option, known)}"
            )
    values: dict[str, Value] = {}
    for option, rule in known.items():
        try:
            values[option] = rule.check(options.get(option, rule.default))
        except UserError as error:
            raise UserError(f"{what} '{name}', option '{option}': {error}") from None
    return values
