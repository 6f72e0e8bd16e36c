"""The state of a training, and its files: written whole or not at all, read without running code.

A file is safetensors: the tensors of the state, the rest of it as JSON, what training it belongs
to, and a checksum over all of this, so that a damaged or a foreign file is told from a good one.
"""

import json
import os
import random
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim import Optimizer

from nasattn.files import Files, whole

FORMAT = 1
LATER = ("contents",)  # of what a training is a function of, what earlier versions did not tell
STEP = "step"  # a file beside the checkpoints: the last step that was done, where one is under way
Point = Mapping[str, float]  # accuracies on the validation split: accuracy, top5


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """A training after some epochs: all that the next step depends on.

    epoch: epochs done on this path. rung: the rung that the path decays to; None on the trunk.
    points: of the validated epochs of the path. rungs: epochs of a rung -> what was measured there.
    spent: epochs trained in all, the decays of earlier rungs too. random: Python's and numpy's
    generators. tensors: parameters and buffers, their mean, the optimiser's, torch's generators.
    """

    epoch: int = 0
    rung: int | None = None
    points: tuple[Point, ...] = ()
    rungs: Mapping[str, Point] = field(default_factory=dict)
    spent: int = 0
    seconds: float = 0.0
    scaler: Mapping[str, Any] = field(default_factory=dict)
    random: tuple[Any, Any] | None = None
    tensors: Mapping[str, Tensor]

    def facts(self) -> dict[str, Any]:
        """All but the tensors, as plain data."""
        names = (f.name for f in fields(self) if f.name != "tensors")
        return {name: getattr(self, name) for name in names}

    def fits(self, network: nn.Module) -> bool:
        """Whether the network has these parameters and buffers, and no others."""
        own = {name: tensor.shape for name, tensor in held(network).items()}
        return own == {name: tensor.shape for name, tensor in self.part("network").items()}

    def part(self, name: str) -> dict[str, Tensor]:
        prefix = f"{name}/"
        return {k[len(prefix) :]: v for k, v in self.tensors.items() if k.startswith(prefix)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoints:
    """The files of one training. belongs: what it is a function of; note: told what went wrong;
    files: where they lie beside this disk."""

    folder: Path
    belongs: Mapping[str, Any]
    note: Callable[[str], None] = lambda text: None
    files: Files = field(default_factory=Files)

    def read(self, name: str, network: nn.Module) -> State | None:
        """The state that was written last; None, with a note, where there is none of use."""
        path = self._path(name)
        try:
            tensors, text = self.files.read(path, _whole)
            wanted = self._belongs()
            if {k: wanted[k] for k in LATER if k in wanted} | text["belongs"] != wanted:
                raise ValueError("it belongs to another training")
            facts = text["facts"] | {"points": tuple(text["facts"]["points"])}
            state = State(**facts, tensors=tensors)
            if not state.fits(network):
                raise ValueError("its weights do not fit the network")
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            self.note(f"{path}: this checkpoint cannot be used and is passed over: {error}")
            return None
        return state

    def write(self, name: str, state: State) -> None:
        """A failure, such as a full disk, is noted: the training itself does not need the file."""
        text = json.dumps({"belongs": self._belongs(), "facts": state.facts()})
        path = self._path(name)
        metadata = {"state": text, "checksum": _checksum(state.tensors, text)}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with whole(path) as draft:
                draft.write_bytes(save(dict(state.tensors), metadata))
        except OSError as error:
            self.note(f"{path}: this checkpoint cannot be written: {error}")
        else:
            self.files.publish(path)

    @contextmanager
    def steps(self) -> Iterator[Callable[[str], None]]:
        """What it yields leaves word on this disk of each step that is done, so that others can see
        at which one a process was killed: only a kill leaves the file. It stays open, as on a
        network's disk to close it would take longer than many a step."""
        path = self.folder / STEP
        with ExitStack() as stack:
            file = None
            with suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(path.open("wb", buffering=0))

            def done(step: str) -> None:
                if file:
                    with suppress(OSError):
                        os.pwrite(file.fileno(), f"{step:24}".encode(), 0)

            try:
                yield done
            finally:
                with suppress(OSError):
                    path.unlink(missing_ok=True)

    def _belongs(self) -> dict[str, Any]:
        read: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **self.belongs}))
        return read

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def _whole(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of an undamaged file, and what stands beside them."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    if metadata.get("checksum") != _checksum(tensors, metadata.get("state", "")):
        raise ValueError("it is damaged: its checksum does not fit")
    return tensors, json.loads(metadata["state"])


def _checksum(tensors: Mapping[str, Tensor], text: str) -> str:
    """Over names, types, shapes, contents and text; safetensors itself has none."""
    crc = zlib.crc32(text.encode())
    for name, tensor in sorted(tensors.items()):
        crc = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), crc)
        raw: Any = tensor.reshape(-1).view(torch.uint8).numpy()
        crc = zlib.crc32(raw, crc)
    return f"{crc:08x}"


def held(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and all buffers: a block may keep what it needs between steps in buffers that are
    not part of its state_dict."""
    return dict(chain(module.named_parameters(), module.named_buffers()))


def copies(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        f"{prefix}/{name}": tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in tensors.items()
    }


@torch.no_grad()
def put(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """In place, so that the memory format and the device stay."""
    for name, tensor in held(module).items():
        tensor.copy_(tensors[name])


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """`0/exp_avg`: of the first parameter."""
    return {
        f"{i}/{name}": value
        for i, parameter in enumerate(_parameters(optimizer))
        for name, value in optimizer.state[parameter].items()
        if value is not None
    }


def put_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """With the memory format of each parameter: another one may round differently."""
    parameters = _parameters(optimizer)
    for key, value in tensors.items():
        index, _, name = key.partition("/")
        parameter = parameters[int(index)]
        counter = name == "step"  # stays on the CPU
        optimizer.state[parameter][name] = (
            value.clone() if counter else torch.empty_like(parameter).copy_(value)
        )


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def generators() -> tuple[dict[str, Tensor], tuple[Any, Any]]:
    """The states of torch's generators, and of Python's and numpy's."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        tensors |= {f"cuda/{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    kind, keys, *rest = np.random.get_state()
    return tensors, (random.getstate(), (kind, np.asarray(keys).tolist(), *rest))


def put_generators(tensors: Mapping[str, Tensor], others: tuple[Any, Any]) -> None:
    torch.set_rng_state(tensors["torch"])
    for i in range(sum(name.startswith("cuda/") for name in tensors)):
        if i < torch.cuda.device_count():
            torch.cuda.set_rng_state(tensors[f"cuda/{i}"], i)
    (version, internal, gauss), numpys = others
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(numpys))


def seed_generators(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def generators_kept() -> Iterator[None]:
    """What is random outside a training does not depend on it."""
    tensors, others = generators()
    try:
        yield
    finally:
        put_generators(tensors, others)
