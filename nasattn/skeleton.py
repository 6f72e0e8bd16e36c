"""A backbone whose own blocks are choices: AutoNL's skeleton (arXiv 2004.01961). No torch.

Each position of the skeleton takes one label, such as `expansion=3,kernel=5,se=0.25`, or is left
out. What is left is a backbone of its own, so equal networks are equal values whichever position
was left out: within a stage the kept blocks move to the front, and their sites with them.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import cast

from nasattn.architecture import Architecture, Backbone
from nasattn.catalog import Rows
from nasattn.space_file import SpaceFile, Vary

LEFT_OUT = "left_out"
SUFFIX = ":block"  # the parameter `stage2.1:block` chooses the block, `stage2.1` what follows it

# A row of the backbone `autonl`.
EXPANSION, CHANNELS, STRIDE, KERNEL, SE = range(5)

BlockRow = tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Position:
    """A place for a block. labels: the baseline's first, `left_out` last where it is allowed."""

    name: str
    stage: str
    labels: tuple[str, ...]
    row: BlockRow

    def block(self, label: str) -> BlockRow:
        """The row of the backbone for this label."""
        row = list(self.row)
        for item in label.split(","):
            key, _, value = item.partition("=")
            column = {"expansion": EXPANSION, "kernel": KERNEL, "se": SE}[key]
            row[column] = float(value) if column == SE else int(value)
        return tuple(row)


@dataclass(frozen=True)
class Skeleton:
    """The largest backbone and what of it varies."""

    largest: Backbone
    vary: Vary

    @cached_property
    def positions(self) -> tuple[Position, ...]:
        positions: list[Position] = []
        stage, index, channels = 0, 0, None
        for row in _rows(self.largest):
            repeated = row[CHANNELS] == channels and row[STRIDE] == 1
            stage, index = (stage, index + 1) if repeated else (stage + 1, 0)
            channels = row[CHANNELS]
            positions.append(
                Position(
                    name=f"stage{stage}.{index}",
                    stage=f"stage{stage}",
                    labels=self._labels(row, repeated and self.vary.optional),
                    row=tuple(row),
                )
            )
        return tuple(positions)

    def _labels(self, row: BlockRow, optional: bool) -> tuple[str, ...]:
        vary = self.vary
        # An expansion of 1 has no expanding convolution: it is another block, and stays (block 0).
        expansions = (int(row[EXPANSION]),) if row[EXPANSION] == 1 else vary.expansion
        labels = [
            f"expansion={e},kernel={k},se={s:g}"
            for e, k, s in itertools.product(expansions, vary.kernel, vary.se)
        ]
        return (*labels, LEFT_OUT) if optional else tuple(labels)

    def backbone(self, labels: Mapping[str, str]) -> Backbone:
        """The backbone of one label a position; a position that is not given takes its first."""
        chosen = [(p, labels.get(p.name, p.labels[0])) for p in self.positions]
        rows = tuple(p.block(label) for p, label in chosen if label != LEFT_OUT)
        options = {**dict(self.largest.options), "rows": rows}
        return Backbone(name=self.largest.name, options=tuple(options.items()))

    def labels(self, backbone: Backbone) -> dict[str, str] | None:
        """Position -> label of a backbone, left-out positions behind the kept ones of their stage;
        None when it is none of this skeleton's."""
        rows = list(_rows(backbone))
        labels: dict[str, str] = {}
        for position in self.positions:
            by_row = {position.block(n): n for n in position.labels if n != LEFT_OUT}
            if rows and tuple(rows[0]) in by_row:
                labels[position.name] = by_row[tuple(rows.pop(0))]
            elif LEFT_OUT in position.labels:
                labels[position.name] = LEFT_OUT
            else:
                return None
        return labels if not rows and self.backbone(labels) == backbone else None


def changes(space: SpaceFile, backbone: Backbone) -> dict[str, str]:
    """Position -> label, where a backbone is not the space's plain one."""
    if not space.vary:
        return {}
    skeleton = Skeleton(Backbone.of(space.backbone), space.vary)
    labels = skeleton.labels(backbone) or {}
    plain = {position.name: position.labels[0] for position in skeleton.positions}
    return {name: label for name, label in labels.items() if label != plain[name]}


def in_words(space: SpaceFile, architecture: Architecture) -> str:
    """On one line what is placed, and what of the backbone is changed."""
    parts = [*changes(space, architecture.backbone).items(), *architecture.specs.items()]
    return ", ".join(f"{label} @ {name}" for name, label in parts) or "plain backbone"


def _rows(backbone: Backbone) -> Rows:
    return cast(Rows, dict(backbone.options)["rows"])


def position_of(site: str) -> str:
    """`stage2.1` of the sites `stage2.1` and `stage2.1.project`."""
    return ".".join(site.split(".")[:2])
