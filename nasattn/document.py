"""YAML in, checked models out: every mistake is named with its file, line and key path.

Safe by construction (no tags, no objects), numbers as people write them (`1e-3`, `60k`, `3e8`;
PyYAML alone reads the first and the last as strings), and a key that is given twice is an error.
"""

import math
import re
import types
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

from nasattn.errors import UserError, first_few, suggest

Location = tuple[int | str, ...]
M = TypeVar("M", bound="Strict")

SUFFIXES = {"k": "e3", "M": "e6", "G": "e9"}
NUMBER = re.compile(r"([-+]?(?:\d[\d_]*\.?\d*|\.\d+))([eE][-+]?\d+|[kMG])?")


class Strict(BaseModel):
    """The base of all that is read from a file: no unknown keys, no coercion, no later change."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True, allow_inf_nan=False
    )


def read_number(value: object) -> object:
    """`'60k'` -> 60000, `'1e-3'` -> 0.001; anything that is no such text is returned as it is."""
    if not (isinstance(value, str) and (match := NUMBER.fullmatch(value.strip()))):
        return value
    digits, power = match[1].replace("_", ""), match[2] or ""
    # The suffix as an exponent: 2.01 * 1000 is not 2010 in floating point.
    number = float(digits + SUFFIXES.get(power, power))
    if not math.isfinite(number):
        return value
    whole = number.is_integer() and (power or "." not in digits)
    return int(number) if whole else number


def read_whole(value: object) -> object:
    """As `read_number`, and a float that is a whole number (`1.5k`, `3e8`) is an int."""
    number = read_number(value)
    return int(number) if isinstance(number, float) and number.is_integer() else number


def tuples(value: object) -> object:
    """Lists as tuples, all the way down: YAML knows only lists, frozen models want tuples."""
    return tuple(tuples(item) for item in value) if isinstance(value, (list, tuple)) else value


Int = Annotated[int, BeforeValidator(read_whole)]
Float = Annotated[float, BeforeValidator(read_number)]
Positive = Annotated[Int, Field(ge=1, le=2**31 - 1)]
Natural = Annotated[Int, Field(ge=0)]
Share = Annotated[Float, Field(ge=0, lt=1)]

MERGE = "tag:yaml.org,2002:merge"
KEY = "[key]"  # pydantic's mark where the key of a mapping is wrong, not its value


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's plain scalars: `on`, `yes` and `1:30` stay strings, `1e-3` is a
    number. A tag (`!!python/object`) is refused, and so is an anchor that holds itself."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.deep_construct = True  # what finds an anchor that holds itself

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if tag := getattr(event, "tag", None):
            raise yaml.constructor.ConstructorError(
                None, None, f"the tag '{tag}' is not allowed here", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[object] = set()
        for key_node, _ in node.value:
            if key_node.tag == MERGE:
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be a plain word", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key}' is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag.rsplit(":", 1)[1] not in ("bool", "int", "float", "timestamp")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|false|True|False)$"), list("tTfF")
)
# More digits than a float can hold stay a string, which no field takes.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?\d{1,300}$"), list("-+0123456789")
)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what either kind of YAML would read as something else than a string:
    an architecture's key may look like `123e45`."""


for _resolving in (_Loader, _Dumper):
    _resolving.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE]))(?:[eE][-+]?\d+)?$"),
        list("-+.0123456789"),
    )


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(loader.construct_scalar(node))  # `010` is ten, not eight as in YAML 1.1


def _construct_float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(loader.construct_scalar(node))


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def dump_yaml(value: object, *, flow: bool | None = None, width: int = 100) -> str:
    """Plain data as a text that `load_yaml` and other YAML readers read back as it is.

    flow: True in braces, False in lines, None in braces where nothing is nested.
    """
    text: str = yaml.dump(
        value, Dumper=_Dumper, sort_keys=False, default_flow_style=flow, width=width
    )
    return text


class Source:
    """Where a document came from: turns a location in the data into `file:line: key.path`."""

    def __init__(self, name: str, node: yaml.Node | None = None) -> None:
        self.name = name
        self._node = node

    def holds(self, location: Location) -> bool:
        """Whether the file itself has this key: false for what was filled in from elsewhere."""
        node = self._node
        for part in location:
            if node is not None and (child := _child(node, part)) is None:
                return False
            node = child[1] if node is not None and child else None
        return True

    def where(self, location: Location) -> str:
        line, node = None, self._node
        for part in location:
            child = _child(node, part)
            if child is None:
                break
            line, node = child
        place = self.name if line is None else f"{self.name}:{line + 1}"
        path = ".".join(str(part) for part in location)
        return f"{place}: {path}" if path else place


def _child(node: yaml.Node | None, part: int | str) -> tuple[int, yaml.Node] | None:
    if isinstance(node, yaml.MappingNode):
        for key, value in reversed(node.value):  # what is merged in comes first and counts last
            if getattr(key, "value", None) == str(part):
                return key.start_mark.line, value
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        return node.value[part].start_mark.line, node.value[part]
    return None


def load_yaml(path: Path) -> tuple[Any, Source]:
    """The plain data of a YAML file, and its source for messages."""
    try:
        text = path.read_text(encoding="utf-8")
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            data = loader.construct_document(node) if node else None
        finally:
            loader.dispose()
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file{_neighbour(path)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f":{mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None
    return data, Source(str(path), node)


def _neighbour(path: Path) -> str:
    names = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
    return suggest(path.name, names)


class Mistakes:
    """What a validator finds wrong below its field: reported together, each at its own place."""

    def __init__(self) -> None:
        self._found: list[InitErrorDetails] = []

    @contextmanager
    def at(self, *location: str) -> Iterator[None]:
        """Keep a UserError that is raised inside."""
        try:
            yield
        except UserError as error:
            kind = PydanticCustomError("refused", "{reason}", {"reason": str(error)})
            self._found.append(InitErrorDetails(type=kind, loc=location, input=None))

    def report(self) -> None:
        if self._found:
            raise ValidationError.from_exception_data("mistakes", self._found)


def check(model: type[M], data: object, source: Source, context: object = None) -> M:
    """The data as a model, or one UserError that lists everything that is wrong with it."""
    if not isinstance(data, dict):
        seen = "nothing" if data is None else repr(data)[:60]
        allowed = ", ".join(model.model_fields)
        raise UserError(f"{source.name}: expected a mapping with the keys {allowed}; got {seen}")
    names = model.model_fields
    misspelt = sum(bool(suggest(key, names)) for key in data)
    if data and not data.keys() & names.keys() and 2 * misspelt < len(data):  # of another kind
        seen = first_few([str(key) for key in data])
        raise UserError(f"{source.name}: has the keys {seen}; expected: {', '.join(names)}")
    try:
        return model.model_validate(data, context=context)
    except ValidationError as error:
        raise UserError("\n".join(_messages(model, error, source))) from None


def _messages(model: type[BaseModel], error: ValidationError, source: Source) -> Iterator[str]:
    for detail in error.errors(include_url=False):
        location, owner = _locate(model, detail["loc"])
        about_key = detail["type"] in ("missing", "invalid_key") or detail["loc"][-1:] == (KEY,)
        if not about_key and not source.holds(location):
            continue  # inherited from a key that is reported itself
        if detail["type"].startswith("union_tag"):
            location = (*location, "name")
        where, seen = source.where(location), _show(detail["input"])
        match detail["type"]:
            case "extra_forbidden":
                names = list(owner.model_fields) if owner else []
                near = suggest(location[-1], names)
                yield f"{where}: unknown key; allowed: {', '.join(names)}{near}"
            case "missing" | "union_tag_not_found":
                what = "key" if isinstance(location[-1], str) else "item"
                yield f"{where}: this {what} is missing"
            case "refused":
                yield f"{where}: {detail['msg']}"
            case "literal_error" | "union_tag_invalid":
                context = detail["ctx"]
                expected = str(context.get("expected") or context.get("expected_tags"))
                word = context.get("tag", detail["input"])
                near = suggest(word, re.findall(r"'([^']*)'", expected))
                yield f"{where}: got {_show(word)}; allowed: {expected}{near}"
            case "value_error" | "assertion_error":
                yield f"{where}: {detail['msg'].split(', ', 1)[-1]}"
            case _:
                rule = detail["msg"].replace("Input should be", "should be")
                for ours, theirs in (("mapping", "dictionary( or .*)?"), ("list", "tuple")):
                    rule = re.sub(theirs, ours, rule, flags=re.IGNORECASE)
                field = owner.model_fields.get(str(location[-1])) if owner and location else None
                such = f", such as {field.examples[0]}" if field and field.examples else ""
                yield f"{where}: got {seen}; {rule[:1].lower()}{rule[1:]}{such}"


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _locate(model: type[BaseModel], loc: Location) -> tuple[Location, type[BaseModel] | None]:
    """The key path without pydantic's union tags, and the model that holds its last key."""
    path: list[int | str] = []
    owner: type[BaseModel] | None = model
    candidates: list[type[BaseModel]] = [model]
    for part in loc:
        if part == KEY:
            continue
        tagged = [c for c in candidates if len(candidates) > 1 and _tag(c) == part]
        if tagged:
            candidates = tagged
            continue
        path.append(part)
        owner = candidates[0] if candidates else None
        field = owner.model_fields.get(str(part)) if owner else None
        candidates = list(_models(field.annotation)) if field else []
    return tuple(path), owner


def _tag(model: type[BaseModel]) -> object:
    field = model.model_fields.get("name")
    return get_args(field.annotation)[0] if field and get_args(field.annotation) else None


def _models(annotation: object) -> Iterable[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        return [m for arg in get_args(annotation) for m in _models(arg)]
    return []
