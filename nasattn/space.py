"""A search space: a backbone's sites times the blocks' options. A function of a chooser."""

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Self

import torch

from nasattn.architecture import NONE, Architecture, Backbone, Placement, Site
from nasattn.chain import Chain, Row, Step
from nasattn.cost import CONVENTION, CostTable
from nasattn.errors import UserError, lookup, suggest
from nasattn.model import canonical, make_block, plain_sites, site_shapes
from nasattn.record import Cost
from nasattn.skeleton import LEFT_OUT, SUFFIX, Skeleton, position_of
from nasattn.space_file import SpaceFile

Choose = Callable[[str, Sequence[str]], str]


class TooManyBlocks(ValueError):
    """A draw went over `max_blocks` (at the site it names): no architecture of this space."""


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """Architectures with at most `max_blocks` blocks, at each site one of its `choices` or none.

    choices: site -> block specs, `none` first. skeleton: where the backbone's own blocks are
    choices too. dropped: what the file asks for and cannot stand: (site, spec, reason), listed
    once. A row is an architecture as a dict parameter -> label, which is what Optuna stores.
    """

    backbone: Backbone
    classes: int
    input: tuple[int, int, int]
    sites: tuple[Site, ...]
    choices: Mapping[str, tuple[str, ...]]
    max_blocks: int
    skeleton: Skeleton | None = None
    dropped: tuple[tuple[str, str, str], ...] = field(default=(), compare=False)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """From a YAML file; a UserError says what is wrong with it."""
        file = SpaceFile.load(path)
        try:
            return cls.of(file)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    @classmethod
    def of(cls, file: SpaceFile) -> Self:
        backbone = Backbone.of(file.backbone)
        skeleton = Skeleton(backbone, file.vary) if file.vary else None
        if skeleton:
            backbone = skeleton.backbone({})
        sites = _select(plain_sites(backbone, file.input), file.sites)
        if skeleton:
            _refuse_uneven(skeleton, sites)
        specs = [
            Placement(site="site", block=block, options=tuple(zip(options, values, strict=True)))
            for block, options in file.blocks.items()
            for values in itertools.product(*options.values())
        ]
        refusal = cache(_refusal)
        choices: dict[str, tuple[str, ...]] = {}
        dropped: list[tuple[str, str, str]] = []
        for site in sites:
            refusals = {p.spec: refusal(p, site.channels) for p in specs}
            choices[site.name] = (NONE, *(spec for spec, why in refusals.items() if not why))
            dropped += [(site.name, spec, why) for spec, why in refusals.items() if why]
        for spec in {p.spec: None for p in specs}:
            if all(spec not in options for options in choices.values()):
                why = next(why for _, name, why in dropped if name == spec)
                raise UserError(f"blocks: {spec} can stand at none of the sites: {why}")
        return cls(
            backbone=backbone,
            classes=file.classes,
            input=file.input,
            sites=sites,
            choices=choices,
            max_blocks=min(file.max_blocks or len(sites), len(sites)),
            skeleton=skeleton,
            dropped=tuple(dropped),
        )

    @cached_property
    def parameters(self) -> Mapping[str, tuple[str, ...]]:
        """What a draw chooses, in order: the sites, each position's block before its sites."""
        if not self.skeleton:
            return self.choices
        parameters: dict[str, tuple[str, ...]] = {}
        for position in self.skeleton.positions:
            parameters[position.name + SUFFIX] = position.labels
            parameters |= {
                site: specs
                for site, specs in self.choices.items()
                if position_of(site) == position.name
            }
        return parameters

    def draw(self, choose: Choose) -> Architecture:
        """The architecture of one choice a parameter: `choose(name, labels)` returns a label.

        Raises TooManyBlocks at the first site that goes over `max_blocks`.
        """
        row: Row = {}
        for name, labels in self.parameters.items():
            row[name] = choose(name, labels)
            if not self.sparse(row):
                raise TooManyBlocks(name)
        return self.decode(row)

    def sparse(self, row: Mapping[str, str]) -> bool:
        """Whether it holds at most `max_blocks` blocks."""
        return self._blocks(row) <= self.max_blocks

    def decode(self, row: Mapping[str, str]) -> Architecture:
        """The architecture of a row; a parameter that is left out takes its first label.

        A UserError names a parameter or a label that is not of the space.
        """
        for name, label in row.items():
            if label not in (labels := lookup(self.parameters, name, "site")):
                raise UserError(
                    f"{name}: got '{label}'; allowed: {', '.join(labels)}{suggest(label, labels)}"
                )
        if not self.sparse(row):
            raise TooManyBlocks(f"{self._blocks(row)} blocks")
        row = self.canonical(row)
        placed = (p for item in row.items() if (p := self._placements.get(item)))
        backbone = self.backbone
        if self.skeleton:
            backbone = self.skeleton.backbone(_labels(row))
        return self._architecture(backbone, tuple(placed))

    def canonical(self, row: Mapping[str, str]) -> Row:
        """The row that stands for the same network: whole, and with the kept blocks of each stage,
        and what is placed in them, in front of what is left out."""
        whole = {name: row.get(name, labels[0]) for name, labels in self.parameters.items()}
        if not self.skeleton:
            return whole
        for _, group in itertools.groupby(self.skeleton.positions, key=lambda p: p.stage):
            positions = [p.name for p in group]
            kept = [p for p in positions if whole[p + SUFFIX] != LEFT_OUT]
            moved = {
                name: whole[source + name.removeprefix(target)]
                for target, source in zip(positions, kept, strict=False)
                for name in self._of_position[target]
            }
            cleared = {
                name: LEFT_OUT if name.endswith(SUFFIX) else NONE
                for target in positions[len(kept) :]
                for name in self._of_position[target]
            }
            whole |= moved | cleared
        return whole

    def row_of(self, architecture: Architecture) -> Row | None:
        """The canonical row of an architecture; None when it is not of this space."""
        fixed = (architecture.classes, architecture.input)
        if fixed != (self.classes, self.input):
            return None
        row: Row = {}
        if self.skeleton and architecture.backbone.name == self.backbone.name:
            labels = self.skeleton.labels(architecture.backbone)
            if labels is None:
                return None
            row |= {name + SUFFIX: label for name, label in labels.items()}
        elif architecture.backbone != self.backbone:
            return None
        try:
            row |= canonical(architecture).specs
        except UserError:
            return None
        if any(label not in self.parameters.get(name, ()) for name, label in row.items()):
            return None
        return self.canonical(row) if self.sparse(row) else None

    def contains(self, architecture: Architecture) -> bool:
        """Whether it can be drawn from this space."""
        return self.row_of(architecture) is not None

    def sample(self, rng: random.Random) -> Architecture:
        """One architecture, uniformly over all of them."""
        return self.decode(self.chain.sample(rng))

    def enumerate(self) -> Iterator[Architecture]:
        """Every architecture once, the baseline first."""
        return (self.decode(row) for row in self.chain.rows())

    def size(self) -> int:
        """How many architectures there are, exactly, the baseline included."""
        return self.chain.size()

    def baseline(self) -> Architecture:
        """The plain backbone; where it varies, that of each position's first label."""
        return self._architecture(self.backbone, ())

    def cost(self, architecture: Architecture) -> Cost:
        """MACs and parameters by the table: nothing is built. A UserError when the architecture is
        not of this space."""
        row = self.row_of(architecture)
        if row is None:
            raise UserError(f"the architecture {architecture.key} is not of this space")
        return Cost(values=self.table(row), context=self.context)

    @property
    def context(self) -> dict[str, Any]:
        """What its counts stand for."""
        return {"input": [1, *self.input], "convention": CONVENTION}

    @cached_property
    def table(self) -> CostTable:
        """Built at its first use, in about ten milliseconds a different block and map."""
        shapes = site_shapes(self.backbone, self.input)
        return CostTable.build(shapes, self.choices, self._unlimited, self.skeleton)

    @cached_property
    def chain(self) -> Chain:
        """The canonical rows, to be counted, drawn and listed."""
        return Chain([self._step(name, {}) for name in self.parameters], self.max_blocks)

    def priced(self, table: CostTable) -> Chain:
        """As `chain`, with the table's costs, for budgets."""
        steps = []
        for name, labels in self.parameters.items():
            added = {label: table.entries.get((name, label), {}) for label in labels}
            costs = {
                metric: {label: values.get(metric, 0) for label, values in added.items()}
                for metric in table.plain
            }
            steps.append(self._step(name, costs))
        return Chain(steps, self.max_blocks)

    def _step(self, name: str, costs: Mapping[str, Mapping[str, float]]) -> Step:
        labels, block = self.parameters[name], name.endswith(SUFFIX)
        return Step(
            name=name,
            labels=labels,
            blocks=frozenset() if block else frozenset(labels) - {NONE},
            stage=name.split(".")[0] if self.skeleton and self.skeleton.vary.optional else "",
            ends=LEFT_OUT if block and LEFT_OUT in labels else None,
            rest=LEFT_OUT if block else NONE,
            costs=costs,
        )

    def _unlimited(self, row: Mapping[str, str]) -> Architecture:
        """`decode` without `max_blocks`: the table is checked with a block at every site."""
        return replace(self, max_blocks=len(self.sites)).decode(row)

    def _blocks(self, row: Mapping[str, str]) -> int:
        if not self.skeleton:
            return len(row) - list(row.values()).count(NONE)
        placed = [site for site in self.choices if row.get(site, NONE) != NONE]
        return sum(row.get(position_of(site) + SUFFIX) != LEFT_OUT for site in placed)

    @cached_property
    def _of_position(self) -> dict[str, list[str]]:
        names: dict[str, list[str]] = {}
        for name in self.parameters:
            names.setdefault(position_of(name.removesuffix(SUFFIX)), []).append(name)
        return names

    @cached_property
    def _placements(self) -> dict[tuple[str, str], Placement]:
        return {
            (site, spec): Placement.parse(site, spec)
            for site, specs in self.choices.items()
            for spec in specs
            if spec != NONE
        }

    def _architecture(self, backbone: Backbone, placements: tuple[Placement, ...]) -> Architecture:
        return Architecture(
            backbone=backbone, classes=self.classes, input=self.input, placements=placements
        )


def _labels(row: Mapping[str, str]) -> dict[str, str]:
    """Position -> label of a row."""
    return {n.removesuffix(SUFFIX): label for n, label in row.items() if n.endswith(SUFFIX)}


def _select(sites: Mapping[Site, str], patterns: Sequence[str]) -> tuple[Site, ...]:
    """The sites a name of which matches a glob; `*` stays within one part of the path."""

    def matches(name: str, pattern: str) -> bool:
        parts, globs = name.split("."), pattern.split(".")
        return len(parts) == len(globs) and all(map(fnmatchcase, parts, globs))

    for pattern in patterns:
        if not any(
            matches(n, pattern) for site, alias in sites.items() for n in (site.name, alias)
        ):
            names = [site.name for site in sites]
            raise UserError(
                f"sites: '{pattern}' matches nothing; the backbone's sites: {', '.join(names)}"
                f"{suggest(pattern, names)}"
            )
    return tuple(
        site
        for site, alias in sites.items()
        if any(matches(n, pattern) for pattern in patterns for n in (site.name, alias))
    )


def _refuse_uneven(skeleton: Skeleton, sites: Sequence[Site]) -> None:
    """Positions that may stand for one another need the same sites."""
    suffixes: dict[str, set[str]] = {p.name: set() for p in skeleton.positions}
    for site in sites:
        suffixes[position_of(site.name)].add(site.name.removeprefix(position_of(site.name)))
    uneven: dict[str, set[str]] = {}
    for p in skeleton.positions:
        if (
            LEFT_OUT in p.labels
            and uneven.setdefault(p.stage, suffixes[p.name]) != suffixes[p.name]
        ):
            raise UserError(
                f"sites: with vary.optional all repeated blocks of a stage need the same sites; "
                f"{p.name} has other ones than those before it in {p.stage}"
            )


def _refusal(placement: Placement, channels: int) -> str:
    """Why the block cannot stand on that many channels; empty when it can."""
    try:
        with torch.device("meta"):
            make_block(placement, channels)
    except UserError as error:
        return str(error)
    return ""
