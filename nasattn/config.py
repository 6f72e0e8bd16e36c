"""The YAML of an experiment as strict models: nothing is guessed or ignored."""

import json
import math
import os
import re
from collections.abc import Mapping
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticSerializationError

from nasattn.document import (
    Float,
    Int,
    Natural,
    Positive,
    Share,
    Source,
    Strict,
    check,
    load_yaml,
    read_number,
    tuples,
)
from nasattn.errors import UserError, suggest
from nasattn.space_file import SpaceFile

Rate = Annotated[Float, Field(gt=0)]
Metric = Literal["macs", "params", "latency_s", "peak_memory_bytes"]


def rebased(path: str, folder: Path | None) -> Path:
    """A path in a file is relative to the file's folder; None: it is stored as it is to be. Raises
    ValueError."""
    return Path(folder or ".", _expanded(path, folder)).resolve()


def _expanded(path: str, folder: Path | None) -> str:
    """`~` and `$NAME` as a shell takes them; in files alone, as what is stored is whole. A server's
    URL stays: its password may look so."""
    if folder is None or (":" in path and not path.startswith("sqlite")):
        return path
    for whole, name in re.findall(r"(\$\{?(\w+)\}?)", path):
        if name not in os.environ:
            raise ValueError(f"got '{path}': the environment has no {whole}")
    return at_home(os.path.expandvars(path))


def at_home(path: str) -> str:
    """A path, or a sqlite URL of one, with `~` expanded: a shell leaves it alone in a URL."""
    scheme, separator, rest = path.rpartition(":///")
    return scheme + separator + os.path.expanduser(rest)


class Limit(Strict):
    """A budget: absolute in base units, or relative to the plain backbone (`1.25x`)."""

    value: float
    relative: bool = False

    @classmethod
    def parse(cls, text: object) -> "Limit":
        relative = isinstance(text, str) and text.strip().endswith("x")
        number = read_number(str(text).strip()[:-1] if relative else text)
        if (
            isinstance(number, bool)
            or not isinstance(number, (int, float))
            or not 0 < number < math.inf
        ):
            raise ValueError(
                f"got {text!r}; allowed: a number above zero such as 300M, 60k or 3e8, "
                "or relative to the plain backbone such as 1.25x"
            )
        return cls(value=float(number), relative=relative)

    def __str__(self) -> str:
        return repr(self.value).removesuffix(".0") + "x" * self.relative

    def resolve(self, plain: int | float) -> float:
        """The limit in base units, where the plain backbone costs `plain`."""
        if not self.relative:
            return self.value
        # In decimals: 1.15 * 100 is less than 115 in floating point, and 115 would not fit.
        return float(Decimal(str(self.value)) * Decimal(str(plain)))


def mistaken(limit: float, plain: float) -> str:
    """`; did you mean 1.1x?` where a limit in base units looks like a relative one."""
    return f"; did you mean {limit:g}x?" if limit <= 100 < plain else ""


Budget = Annotated[
    Limit,
    BeforeValidator(lambda v: v if isinstance(v, Limit) else Limit.parse(v)),
    PlainSerializer(str),
]


Images = Annotated[Int, Field(ge=1, le=1_000_000)]  # composed in memory, 2 kB each


class CuedDigits(Strict):
    """The embedded data set (nasattn.data.cued_digits): the splits' sizes, seed and noise."""

    name: Literal["cued_digits"]
    train: Images = 16_000
    val: Images = 4_000
    test: Images = 4_000
    seed: Natural = 0
    noise: Annotated[Float, Field(ge=0, le=1)] = 0.1


def _each(value: object) -> object:
    """One number as a list of it."""
    return tuples([value] if isinstance(value, (int, float, str)) else value)


class ImageFolder(Strict):
    """Images in folders, one a class: `root/{train,val,test}/CLASS/`, or `root/CLASS/` split by a
    seed.

    size: what is read is resized and cropped to the space's input. mean, std: of pixels in [0, 1],
    one number a channel or one for all (default: ImageNet's). val, test: the shares of the images
    where the split is drawn by the seed. bad: the largest share of files that may be unreadable
    before the run is refused. loaders: worker processes that read; 0: the training process reads.
    """

    name: Literal["image_folder"]
    root: Path
    size: Positive | None = None
    mean: Annotated[tuple[Float, ...], BeforeValidator(_each), Field(min_length=1)] | None = None
    std: Annotated[tuple[Rate, ...], BeforeValidator(_each), Field(min_length=1)] | None = None
    augment: Literal["none", "crop_flip", "crop_flip_color"] = "crop_flip"
    val: Annotated[Float, Field(gt=0, lt=1)] = 0.15
    test: Annotated[Float, Field(gt=0, lt=1)] = 0.15
    seed: Natural = 0
    bad: Share = 0.01
    loaders: Natural = 0

    @field_validator("root", mode="before")
    @classmethod
    def _root(cls, path: object, info: ValidationInfo) -> object:
        return rebased(path, info.context) if isinstance(path, str) else path

    @model_validator(mode="after")
    def _shares(self) -> Self:
        if self.val + self.test >= 1:
            raise ValueError(
                f"val and test take {self.val:g} + {self.test:g} of the images; "
                "allowed: together below 1, so that some are left to train on"
            )
        return self


DataFile = Annotated[CuedDigits | ImageFolder, Field(discriminator="name")]


class Schedule(Strict):
    """How a network is trained. `ema` is the decay of the weights' running mean (0: none), `clip`
    the largest gradient norm (0: none), `warmup` the share of the steps in which the rate rises,
    `decay` the share of the epochs in which `wsd` (warm-up, stable, decay) lets it fall to 0.
    block_lr: the inserted blocks' rate over the rest's; they begin as the identity in a network
    that is trained, so they have most to learn, and show sooner what they are worth. epoch_steps:
    end an epoch after so many batches, drawn anew each time; of use where the train split is large,
    since validation, checkpoints and rungs come at the ends of epochs."""

    epochs: Positive = 1
    epoch_steps: Positive | None = None
    batch_size: Positive = 64
    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: Rate = 5e-3
    block_lr: Rate = 1.0
    momentum: Share = 0.9
    weight_decay: Annotated[Float, Field(ge=0)] = 0.02
    schedule: Literal["onecycle", "cosine", "wsd"] = "onecycle"
    warmup: Share = 0.25
    decay: Annotated[Float, Field(gt=0, le=1)] = 0.25
    label_smoothing: Share = 0.0
    ema: Share = 0.0
    clip: Annotated[Float, Field(ge=0)] = 0.0

    def decay_epochs(self, rung: int) -> int:
        """How many of a rung's epochs are its own, not the trunk's: whole ones, at least one. Only
        `wsd` has a trunk that rungs share."""
        return max(1, round(self.decay * rung)) if self.schedule == "wsd" else rung


class Training(Schedule):
    """A candidate's schedule. warm_start: candidates and the baseline go on from the plain
    backbone's weights, else all are trained from scratch. seeds: repeats of each evaluation."""

    warm_start: bool = False
    seeds: Positive = 1


class Search(Strict):
    """population: of nsga2 only. trials: finished ones in the whole study, the baseline counted.

    stopping: pareto_halving trains every candidate to the first rung and one in eta on; when no new
    one is to come, one in two, or in eta if that is less, but none that no gain seen so far could
    bring to the frontier. rungs: their epochs, the last those of the whole training (default: those
    over eta, eta squared and so on, rounded, down to one epoch; at least two).
    """

    sampler: Literal["frontier", "tpe", "nsga2", "gp", "random"] = "frontier"
    trials: Positive = 40
    seed: Natural = 0
    workers: Positive = 1
    population: Annotated[Int, Field(ge=2)] | None = None
    stopping: Literal["none", "pareto_halving"] = "none"
    eta: Annotated[Float, Field(gt=1)] = 8.0
    rungs: Annotated[tuple[Positive, ...], BeforeValidator(tuples)] | None = None

    @model_validator(mode="after")
    def _population(self) -> Self:
        if self.population is not None and self.sampler != "nsga2":
            raise ValueError(f"population is an option of nsga2; the sampler is {self.sampler}")
        return self


class Final(Strict):
    """The frontier is evaluated again when the search has its trials: with so many seeds, the plain
    backbone trained anew for each. test: on the test split too, which nothing else touches."""

    seeds: Positive = 3
    test: bool = True


class TrainerFile(Strict):
    """Where a training runs. threads: of one process on the CPU. devices: always one."""

    accelerator: Literal["auto", "cpu", "gpu", "mps"] = "auto"
    devices: int = 1
    precision: Literal["32-true", "16-mixed", "bf16-mixed"] = "32-true"
    channels_last: bool = True
    threads: Annotated[Int, Field(ge=1, le=1024)] = 1

    @field_validator("accelerator", mode="before")
    @classmethod
    def _by_lightnings_name(cls, accelerator: object) -> object:
        if accelerator == "cuda":  # nearer to cpu by its letters
            raise ValueError("got 'cuda'; allowed: auto, cpu, gpu or mps; did you mean 'gpu'?")
        return accelerator

    @field_validator("devices")
    @classmethod
    def _one_device(cls, devices: int) -> int:
        if devices != 1:
            raise ValueError(
                f"got {devices}; allowed: 1, as each candidate is trained on one device; for "
                "candidates on several devices at once: `nasattn search --workers N`"
            )
        return devices


class Experiment(Strict):
    """One study, whole: what is searched, on which data, how candidates are trained and judged.

    artifacts: where the study's files lie for all of its machines: a folder of a network file
    system, s3://bucket/prefix or gs://bucket/prefix; none: in the study's folder alone.
    latency: the target device's table, which `nasattn profile` measured, for the metric latency_s.
    """

    study: Annotated[str, Field(max_length=100, examples=["mine_2"])]
    storage: Annotated[str, Field(validate_default=True)] = "sqlite:///runs/nasattn.db"
    artifacts: str | None = None
    space: SpaceFile
    data: Annotated[DataFile, Field(examples=["{name: cued_digits}"])]
    training: Annotated[Training, Field(examples=["{epochs: 5}"])] = Training()
    pretrain: Annotated[Schedule, Field(examples=["{epochs: 60}"])] = Schedule()
    objectives: Annotated[tuple[Literal["accuracy", Metric], ...], BeforeValidator(tuples)] = (
        "accuracy",
        "macs",
    )
    budget: dict[Metric, Budget] = Field(default_factory=dict, examples=["{macs: 1.1x}"])
    latency: dict[str, Any] | None = None
    search: Annotated[Search, Field(examples=["{trials: 40}"])] = Search()
    final: Annotated[Final | None, Field(examples=["{seeds: 3}"])] = None
    trainer: Annotated[TrainerFile, Field(examples=["{accelerator: cpu}"])] = TrainerFile()

    @field_validator("study")
    @classmethod
    def _study(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError(
                f"got {name!r}; allowed: letters, digits, '.', '_' and '-', a letter or a digit "
                "first, such as mine_2"
            )
        return name

    @model_validator(mode="before")
    @classmethod
    def _pretrain_as_training(cls, fields: Any) -> Any:
        """What `pretrain` leaves out is as in `training`, but for the rate of blocks that are put
        into a trained network: from scratch all learn alike."""
        if not isinstance(fields, dict):
            return fields
        training, pretrain = fields.get("training", {}), fields.get("pretrain", {})
        if not isinstance(training, dict) or not isinstance(pretrain, dict):
            return fields
        own = set(Schedule.model_fields) - {"block_lr"}
        shared = {k: v for k, v in training.items() if k in own}
        return fields | {"pretrain": shared | pretrain}

    @field_validator("latency", mode="before")
    @classmethod
    def _latency(cls, table: object, info: ValidationInfo) -> object:
        """The table itself, or the path of its file: it is stored with the study."""
        if not isinstance(table, str):
            return _table(table, "what stands there", info)
        path = rebased(table, info.context)
        if not path.exists():
            raise ValueError(
                f"{path}: there is no such file; `nasattn profile`, run on the target device, "
                "makes it"
            )
        try:
            return _table(load_yaml(path)[0], path, info)
        except UserError as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="after")
    def _latency_given(self) -> Self:
        if "latency_s" in (*self.objectives, *self.budget) and self.latency is None:
            raise ValueError(
                "latency: this key is missing: latency_s needs the table of the target device, "
                "which `nasattn profile` measures there"
            )
        return self

    @field_validator("storage")
    @classmethod
    def _storage(cls, url: str, info: ValidationInfo) -> str:
        return storage_url(_expanded(url, info.context), info.context or ".")

    @field_validator("artifacts")
    @classmethod
    def _artifacts(cls, url: str | None, info: ValidationInfo) -> str | None:
        if url is None:
            return None
        return artifacts_url(_expanded(url, info.context), info.context or ".")

    @field_validator("space", mode="before")
    @classmethod
    def _space(cls, space: object, info: ValidationInfo) -> object:
        """The space itself, or the path of the file that holds it."""
        if isinstance(space, str):
            try:
                return SpaceFile.load(rebased(space, info.context))
            except UserError as error:
                raise ValueError(str(error)) from None
        return space

    @model_validator(mode="after")
    def _warm_start(self) -> Self:
        if self.training.warm_start and self.space.vary:
            raise ValueError(
                "training.warm_start: got true with a space that varies the backbone (`vary`), "
                "whose weights do not fit one another; allowed: false"
            )
        return self

    @model_validator(mode="after")
    def _rungs(self) -> Self:
        search, training = self.search, self.training
        stops = search.stopping != "none"
        if stops and training.schedule != "wsd":
            raise ValueError(
                f"search.stopping: got {search.stopping} with training.schedule: "
                f"{training.schedule}, of which a part ranks nothing; allowed with: wsd"
            )
        if search.rungs is not None:
            increasing = all(a < b for a, b in pairwise(search.rungs))
            if not stops:
                raise ValueError("search.rungs: they are of use with search.stopping only")
            if len(search.rungs) < 2 or not increasing or search.rungs[-1] != training.epochs:
                raise ValueError(
                    f"search.rungs: got {list(search.rungs)}; allowed: two or more, increasing, "
                    f"the last one training.epochs ({training.epochs})"
                )
        elif stops and search.eta < 1.1:
            raise ValueError(
                f"search.eta: got {search.eta:g}, by which nothing is halved; allowed: from 1.1"
            )
        if stops and len(self.rungs) < 2:
            raise ValueError(
                f"training.epochs: got {training.epochs}, before which search.stopping has no "
                "rung to stop at; allowed: 2 or more"
            )
        return self

    @field_validator("objectives")
    @classmethod
    def _objectives(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if names.count("accuracy") != 1 or len(set(names)) < len(names) or len(names) < 2:
            raise ValueError(
                f"got {list(names)}; allowed: accuracy exactly once and at least one cost, "
                f"each once ({', '.join(get_args(Metric))})"
            )
        return names

    @property
    def rungs(self) -> tuple[int, ...]:
        """The epochs at which a candidate may be stopped; the last: those of the whole training."""
        search, epochs = self.search, self.training.epochs
        if search.stopping == "none":
            return (epochs,)
        if search.rungs is not None:
            return search.rungs
        found, part = {epochs}, max(1.0, epochs / search.eta)
        while part >= 1:
            found.add(round(part))
            part /= search.eta
        return tuple(sorted(found))

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """All costs that the study needs: MACs and parameters always."""
        named = [*self.objectives, *self.budget]
        return tuple(m for m in get_args(Metric) if m in ("macs", "params") or m in named)

    @property
    def costs(self) -> tuple[Metric, ...]:
        """The objectives that are minimised."""
        return tuple(name for name in self.objectives if name != "accuracy")

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """From a YAML file; one UserError lists everything that is wrong with it."""
        path = Path(path)
        data, source = load_yaml(path)
        return check(cls, data, source, context=path.parent.resolve())

    def as_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` reads back, the space included: no file is needed again."""
        try:
            fields: dict[str, Any] = json.loads(self.model_dump_json())
        except PydanticSerializationError as error:
            raise UserError(
                "a path of the experiment is not UTF-8, as which it is stored with the study: "
                f"{error}"
            ) from None
        return fields

    @classmethod
    def from_dict(cls, fields: object, name: str = "experiment") -> Self:
        return check(cls, fields, Source(name))


def _table(table: object, name: object, info: ValidationInfo) -> object:
    """What a file gives for a latency table, which nasattn.cost reads where it is asked for."""
    keys = {"context", "plain", "blocks"}
    if table is None:
        return None
    if info.context is not None and not (isinstance(table, dict) and keys <= table.keys()):
        raise ValueError(f"{name} is no table of `nasattn profile`, which makes it")
    return table


def storage_url(url: str, folder: str | Path = ".") -> str:
    """The URL as SQLAlchemy wants it: a relative sqlite path taken from `folder`, psycopg for
    PostgreSQL."""
    scheme, separator, rest = url.partition("://")
    sqlite = scheme.partition("+")[0] == "sqlite"
    if not separator or not scheme or (sqlite and rest and not rest.startswith("/")):
        raise ValueError(
            f"got '{url}'; allowed: a database URL such as sqlite:///runs/nasattn.db "
            "or postgresql://user@host/name"
        )
    if scheme in ("postgresql", "postgres"):
        return f"postgresql+psycopg://{rest}"
    if sqlite and rest.strip("/") not in ("", ":memory:") and not rest.startswith("//"):
        return f"{scheme}:///{Path(folder, rest[1:]).resolve()}"
    return url


def artifacts_url(url: str, folder: str | Path = ".") -> str:
    """A store's URL without a last slash; a folder as its whole path, taken from `folder`."""
    scheme = re.match(r"[A-Za-z0-9+]+(?=:)", url)
    bucket = re.fullmatch(r"(s3|gs)://[a-z0-9][a-z0-9._-]+(/[^/]+)*/?", url)
    if not url.strip() or (scheme and not bucket) or (bucket and "/../" in f"{url}/"):
        raise ValueError(
            f"got '{url}'; allowed: a folder, s3://bucket/prefix or gs://bucket/prefix"
            + (suggest(scheme[0], ("s3", "gs")) if scheme and scheme[0] not in ("s3", "gs") else "")
        )
    return url.rstrip("/") if bucket else str(Path(folder, url).resolve())


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`key.path: old -> new` for each leaf that differs."""
    lines: list[str] = []
    for key in {**old, **new}:
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            lines += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            was, now = ("nothing" if v is None else repr(v) for v in (before, after))
            lines.append(f"{prefix}{key}: {was} -> {now}")
    return lines
