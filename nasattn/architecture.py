"""What a network is, as a value: a backbone and the blocks placed in it. Plain data, no torch."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from nasattn.catalog import BACKBONES, BLOCKS, Scalar, Value, complete
from nasattn.document import (
    Mistakes,
    Positive,
    Source,
    Strict,
    check,
    dump_yaml,
    load_yaml,
    read_whole,
    tuples,
)
from nasattn.errors import UserError, lookup

NONE = "none"
SPEC = re.compile(r"\s*([a-z][a-z0-9_]*)\s*(?:\(([^()]*)\))?\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A place a block may go: after the module `name`, where the map has `channels` and 1/`stride`
    of the input's height and width."""

    name: str
    channels: int
    stride: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A block after a site. `options` holds all of the block's options, sorted."""

    site: str
    block: str
    options: tuple[tuple[str, Scalar], ...] = ()

    def __post_init__(self) -> None:
        values = complete(BLOCKS, self.block, dict(self.options), "block")
        object.__setattr__(self, "options", tuple(sorted(values.items())))

    @classmethod
    @lru_cache(4096)
    def parse(cls, site: str, spec: str) -> "Placement":
        """From a spec such as `lightnl(ratio=0.25,stride=2)`; what is left out is the default."""
        match = SPEC.fullmatch(spec)
        if not match:
            raise UserError(
                f"'{spec}' is no block spec; write it like lightnl(ratio=0.25,stride=2)"
            )
        options: dict[str, Any] = {}
        for item in filter(None, (part.strip() for part in (match[2] or "").split(","))):
            name, equals, text = (part.strip() for part in item.partition("="))
            if not equals or name in options:
                raise UserError(f"'{spec}': expected option=value, each once; got '{item}'")
            options[name] = {"true": True, "false": False}.get(text, read_whole(text))
        return cls(site=site, block=match[1], options=tuple(options.items()))

    @property
    def spec(self) -> str:
        """The block as a person reads it: numbers always, words and switches only where they are
        not the default."""
        shown = []
        for name, rule in BLOCKS[self.block].options.items():
            value = dict(self.options)[name]
            if isinstance(value, (bool, str)) and value == rule.default:
                continue
            text = str(value).lower() if isinstance(value, bool) else f"{value}"
            shown.append(f"{name}={text}")
        return f"{self.block}({','.join(shown)})" if shown else self.block


@dataclass(frozen=True, slots=True, kw_only=True)
class Backbone:
    """A mobile network by name, with all of its options, sorted."""

    name: str
    options: tuple[tuple[str, Value], ...] = ()

    def __post_init__(self) -> None:
        values = complete(BACKBONES, self.name, dict(self.options), "backbone")
        object.__setattr__(self, "options", tuple(sorted(values.items())))

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "Backbone":
        """From `{name: ..., option: ...}`."""
        options: dict[str, Any] = {k: read_whole(v) for k, v in fields.items() if k != "name"}
        return cls(name=str(fields.get("name", "")), options=tuple(options.items()))

    @classmethod
    @lru_cache(256)
    def from_json(cls, text: str) -> "Backbone":
        return cls.of(json.loads(text))

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name} | {
            key: [list(row) for row in value] if isinstance(value, tuple) else value
            for key, value in self.options
        }


def site_order(name: str) -> list[tuple[int, int | str]]:
    """A sorting key that puts stage2 before stage10 and a block's inside before its outside.

    Module paths are in forward order when they are read so; `stage1.0.project` ends within
    `stage1.0`.
    """
    parts = [p for p in re.split(r"(\d+)|\.", name) if p]
    return [(0, int(p)) if p.isdecimal() else (1, p) for p in parts] + [(2, name)]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A backbone with blocks placed in it. Canonical: equal networks are equal values, but for a
    site's second name, which needs the backbone to be known (nasattn.model.canonical).

    Placements stand in site order whatever the order given, options are complete; `input` is
    (C, H, W).
    """

    backbone: Backbone
    classes: int
    input: tuple[int, int, int]
    placements: tuple[Placement, ...] = ()

    def __post_init__(self) -> None:
        ordered = sorted(self.placements, key=lambda p: site_order(p.site))
        sites = [p.site for p in ordered]
        for site in sites:
            if sites.count(site) > 1:
                raise UserError(f"the site '{site}' holds more than one block")
        object.__setattr__(self, "placements", tuple(ordered))
        object.__setattr__(self, "input", tuple(self.input))

    @cached_property
    def key(self) -> str:
        """12 hex digits that name this architecture, equal for equal architectures only."""
        fields = self.as_dict() | {
            "placements": [[p.site, p.block, dict(p.options)] for p in self.placements]
        }
        text = json.dumps(fields, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def specs(self) -> dict[str, str]:
        """Site -> block spec, as a person reads it."""
        return {p.site: p.spec for p in self.placements}

    def as_dict(self) -> dict[str, Any]:
        """Plain data for YAML and JSON; `from_dict` is its inverse."""
        return {
            "backbone": self.backbone.as_dict(),
            "classes": self.classes,
            "input": list(self.input),
            "placements": self.specs,
        }

    @classmethod
    def from_dict(cls, fields: object, source: Source | None = None) -> "Architecture":
        file = check(_File, fields, source or Source("architecture"))
        return cls(
            backbone=Backbone.of(file.backbone),
            classes=file.classes,
            input=file.input,
            placements=_parsed(file.placements),
        )

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> "Architecture":
        """From what `as_dict` made, in a database of thousands: each part is checked once."""
        return cls(
            backbone=Backbone.from_json(json.dumps(fields["backbone"])),
            classes=fields["classes"],
            input=tuple(fields["input"]),
            placements=_parsed(fields["placements"]),
        )

    @classmethod
    def load(cls, path: str | Path) -> "Architecture":
        """From a YAML file that `save` wrote or a person did; a UserError says what is wrong."""
        return cls.from_dict(*load_yaml(Path(path)))

    def save(self, path: str | Path) -> None:
        text = dump_yaml(self.as_dict())
        try:
            Path(path).write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from None


def _parsed(specs: Mapping[str, str]) -> tuple[Placement, ...]:
    return tuple(Placement.parse(site, spec) for site, spec in specs.items() if spec != NONE)


def _known_backbone(fields: dict[str, Any]) -> dict[str, Any]:
    mistakes = Mistakes()
    with mistakes.at():
        if "name" not in fields:
            raise UserError(f"the key 'name' is missing; allowed: {', '.join(BACKBONES)}")
    mistakes.report()
    with mistakes.at("name"):
        lookup(BACKBONES, str(fields["name"]), "backbone")
    mistakes.report()
    for option, value in fields.items():
        with mistakes.at(option):
            Backbone.of({"name": fields["name"], option: value})
    mistakes.report()
    return Backbone.of(fields).as_dict()


def _known_blocks(specs: dict[str, str]) -> dict[str, str]:
    mistakes = Mistakes()
    for site, spec in specs.items():
        with mistakes.at(site):
            _parsed({site: spec})
    mistakes.report()
    return specs


# What an architecture's file and a space's have in common: a backbone, complete, and (C, H, W).
BackboneFields = Annotated[dict[str, Any], AfterValidator(_known_backbone)]
Input = Annotated[tuple[Positive, Positive, Positive], BeforeValidator(tuples)]


class _File(Strict):
    backbone: BackboneFields
    classes: Positive
    input: Input
    placements: Annotated[dict[str, str], AfterValidator(_known_blocks)] = Field(
        default_factory=dict
    )
