"""The YAML of a search space as a strict model: nothing is guessed or ignored."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Self

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from nasattn.architecture import BackboneFields, Input
from nasattn.catalog import BLOCKS, Entry, Scalar
from nasattn.document import Mistakes, Positive, Share, Strict, check, load_yaml, read_whole, tuples
from nasattn.errors import UserError, lookup


class Vary(Strict):
    """What of each block of the backbone is searched; the baseline takes the first of each. The
    rows' own expansion (but 1, which stays), kernel and SE say nothing then.

    optional: a block that repeats the one before it may be left out.
    """

    expansion: Annotated[tuple[Positive, ...], BeforeValidator(tuples), Field(min_length=1)]
    kernel: Annotated[tuple[Positive, ...], BeforeValidator(tuples), Field(min_length=1)]
    se: Annotated[tuple[Share, ...], BeforeValidator(tuples), Field(min_length=1)] = (0.0,)
    optional: bool = False

    @field_validator("expansion", "kernel", "se")
    @classmethod
    def _readable(cls, values: tuple[float, ...], info: ValidationInfo) -> tuple[float, ...]:
        """Each is told in a label, from which it is read again."""
        for value in values:
            if info.field_name == "kernel" and value % 2 == 0:
                raise ValueError(f"got {value}; a kernel is odd")
            if float(f"{value:g}") != value:
                raise ValueError(f"got {value!r}; allowed: numbers of at most six digits")
            if values.count(value) > 1:
                raise ValueError(f"got {value:g} twice; allowed: each value once")
        return values


class SpaceFile(Strict):
    """A search space: which blocks, with which options, may stand where in which backbone."""

    backbone: BackboneFields
    input: Input = (3, 224, 224)
    classes: Positive = 1000
    sites: Annotated[
        tuple[str, ...], BeforeValidator(tuples), Field(min_length=1, examples=['["stage*.*"]'])
    ]
    blocks: Annotated[
        dict[str, dict[str, tuple[Scalar, ...]]],
        Field(min_length=1, examples=["{se: {}, lightnl: {ratio: [0.25]}}"]),
    ]
    max_blocks: Positive | None = None
    vary: Vary | None = None

    @model_validator(mode="after")
    def _varied(self) -> Self:
        if self.vary and self.backbone["name"] != "autonl":
            raise ValueError(f"vary: got it with {self.backbone['name']}; allowed with: autonl")
        return self

    @field_validator("blocks", mode="before")
    @classmethod
    def _known_blocks(cls, blocks: object) -> object:
        """`{lightnl: {ratio: [0.125, 0.25]}}`; a single value may stand without brackets."""
        if not isinstance(blocks, Mapping):
            return blocks
        read: dict[str, dict[str, tuple[Scalar, ...]]] = {}
        mistakes = Mistakes()
        for name, options in ((str(name), options) for name, options in blocks.items()):
            with mistakes.at(name):
                block = lookup(BLOCKS, name, "block")
                if options is not None and not isinstance(options, Mapping):
                    raise UserError(f"got {options!r}; allowed: options such as ratio: [0.25]")
                read[name] = {}
                for option, given in (options or {}).items():
                    with mistakes.at(name, str(option)):
                        read[name][str(option)] = _values(block, str(option), given)
        mistakes.report()
        return read

    @classmethod
    def load(cls, path: str | Path) -> Self:
        return check(cls, *load_yaml(Path(path)))


def _values(block: Entry, option: str, given: object) -> tuple[Scalar, ...]:
    """What an option may be: the values of a list, or the only one."""
    rule = lookup(block.options, option, "option")
    values = given if isinstance(given, (list, tuple)) else [given]
    if not values:
        raise UserError("the list is empty")
    checked = tuple(rule.check(read_whole(value)) for value in values)
    if len(set(checked)) < len(checked):
        raise UserError(f"got {given!r}: a value is given twice")
    return checked  # type: ignore[return-value]  # no block's option is a table
