"""Peak memory of the activations: the largest sum of bytes alive at once, found without computing.

A network runs on fake tensors that say they lie on the CPU. So every operator is the one that the
CPU runs (fused attention is one operator, without a map; on meta it would be another) and makes
results of the same size, but no data. Each storage is followed from its making to its release.

Counted: the input, the results of operators, what is saved for backward, gradients of activations.
A view, or an operator in place, adds nothing. Not counted: parameters, buffers, the parameters'
gradients and the optimiser's state, which depend neither on the image nor on the batch; and what a
kernel takes and gives back while it runs (im2col, oneDNN's reordered copies), which depends on the
processor.
"""

import copy
import itertools
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nasattn.architecture import NONE, Architecture, Placement
from nasattn.model import Shape, build, make_block

Ints = npt.NDArray[np.int64]
Seam = tuple[int, int]


def inference_peak(module: nn.Module, shape: Sequence[int]) -> int:
    """Bytes at the peak of one pass in eval mode, without gradients.

    shape: (N, C, H, W). The module may lie on any device, meta too, and is left as it is.
    """
    return int(Tape.of(module, shape, training=False).levels().max())


def peaks_by_part(module: nn.Module, shape: Sequence[int], ends: Sequence[str]) -> list[int]:
    """As `inference_peak`, of the parts of the pass: up to the end of each module that is named, in
    the order in which they run, and behind the last."""
    tape = Tape.of(module, shape, training=False, marks=ends)
    levels = tape.levels()
    bounds = itertools.pairwise((0, *tape.marks, len(levels)))
    return [int(levels[start:end].max(initial=0)) for start, end in bounds]


def training_peak(module: nn.Module, shape: Sequence[int]) -> int:
    """Bytes at the peak of a training step: a pass in train mode and the backward of its sum.

    shape: (N, C, H, W), N the batch. The module is left as it is.
    """
    return int(Tape.of(module, shape, training=True).levels().max())


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryTable:
    """The peak of every architecture of a space, exactly, from one row a block and site.

    A peak is no sum of parts, but what is alive at one moment is. plain: bytes that the backbone
    holds at each moment that can be a peak. rows: (site, spec) -> what the block adds to them.

    It is exact as a block keeps its map's shape, makes a result that is not its map, does the same
    for every map of a shape, and comes in one piece, in backward too: autograd runs in the reverse
    order of the pass. In inference a block adds nothing outside of its own pass, so a peak is the
    largest of those of its single insertions.
    """

    plain: Ints
    rows: Mapping[tuple[str, str], Ints]

    def __call__(self, specs: Mapping[str, str]) -> dict[str, int]:
        """The backbone with these blocks: site -> spec, `none` included or left out."""
        live = self.plain.copy()
        for item in specs.items():
            if item[1] != NONE:
                live += self.rows[item]
        return {"peak_memory_bytes": int(live.max())}

    @classmethod
    def build(
        cls,
        plain: Architecture,
        shapes: Mapping[str, Shape],
        choices: Mapping[str, tuple[str, ...]],
        *,
        batch: int | None = None,
    ) -> "MemoryTable":
        """Run the backbone once, and each different (map, spec). shapes: site -> (1, C, H, W).

        batch: that of a training step; None is inference on one image.
        """
        images, training = batch or 1, batch is not None

        @cache
        def run(shape: Shape, spec: str) -> _Block:
            with torch.device("meta"):
                block = make_block(Placement.parse("site", spec), shape[1])
            return _Block(block, (images, *shape[1:]), training=training)

        with torch.device("meta"):
            network = build(plain)
        tape = Tape.of(network, (images, *plain.input), training=training, cuts=choices)
        backbone = _Backbone(tape)
        rows = {
            (site, spec): backbone.row(site, run(shapes[site], spec))
            for site, specs in choices.items()
            for spec in specs
            if spec != NONE
        }
        table = cls(plain=backbone.live, rows=rows)
        table._check(plain, batch)
        return table

    def _check(self, plain: Architecture, batch: int | None) -> None:
        """On a network that has the largest block at every site."""
        specs = dict(sorted(self.rows, key=lambda item: self.rows[item].max()))
        placements = tuple(Placement.parse(site, spec) for site, spec in specs.items())
        with torch.device("meta"):
            network = build(replace(plain, placements=placements))
        peak = inference_peak if batch is None else training_peak
        whole, found = peak(network, (batch or 1, *plain.input)), self(specs)["peak_memory_bytes"]
        if whole != found:
            raise AssertionError(f"the network's peak is {whole} bytes, the table's {found}")


class Tape(TorchDispatchMode):
    """Which storages the operators of a run made, and until when they were alive.

    Moment i is the making of storage i, of sizes[i] bytes; last[i] is the last moment at which it
    is alive. maps and grads: by the path of a module, for a network cut behind it, the two storages
    that stand for its result, and for the gradient of that: (made in the network, made by the cut).
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: list[int] = []
        self.last: list[int] = []
        self.maps: dict[str, Seam] = {}
        self.grads: dict[str, Seam] = {}
        self.marks: list[int] = []  # the moments at which the marked modules had run
        self._added: list[tuple[int, int]] = []
        self._alive: dict[int, int] = {}  # the id of a storage -> its number

    @classmethod
    def of(
        cls,
        module: nn.Module,
        shape: Sequence[int],
        *,
        training: bool,
        cuts: Iterable[str] = (),
        marks: Iterable[str] = (),
        input_gradient: bool = False,
    ) -> "Tape":
        """Of one pass or training step of a copy, cut behind the modules named by `cuts`. marks:
        the modules at whose ends `marks` are set, in the order in which they run."""

        def mark(*_: object) -> None:
            tape.marks.append(len(tape.sizes))

        tape = cls()
        with FakeTensorMode(allow_non_fake_inputs=True):
            network = _on_fake_cpu(module).train(training)
            for path in cuts:
                network.get_submodule(path).register_forward_hook(partial(_cut, tape, path))
            for path in marks:
                network.get_submodule(path).register_forward_hook(mark)
            floats = (p.dtype for p in network.parameters() if p.is_floating_point())
            dtype = next(floats, torch.float32)
            with torch.set_grad_enabled(training), tape:
                x = torch.empty(tuple(shape), dtype=dtype, device="cpu")
                tape._step(network, x.requires_grad_(input_gradient))
        tape.last = [len(tape.sizes) - 1 if moment < 0 else moment for moment in tape.last]
        tape._add_in_place()
        return tape

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        # An operand that no operator made is a parameter, a buffer or a constant.
        self._note((args, kwargs), counted=False)
        out = func(*args, **(kwargs or {}))
        self._note(out, counted=True)
        if func is torch.ops.aten.add.Tensor and isinstance(args[0], Tensor):
            self._added.append((self.number(args[0]), self.number(out)))
        return out

    def number(self, tensor: Tensor) -> int:
        """Of the tensor's storage; -1 when that is not counted."""
        return self._alive[id(tensor.untyped_storage())]

    def levels(self) -> Ints:
        """Bytes alive at each moment."""
        return _levels(self.sizes, self.last)

    def alive(self, number: int) -> Ints:
        """1 at the moments at which the storage is alive, else 0."""
        alive = np.zeros(len(self.sizes), np.int64)
        alive[number : self.last[number] + 1] = 1
        return alive

    def _note(self, values: Any, *, counted: bool) -> None:
        for value in tree_leaves(values):
            if isinstance(value, Tensor) and id(value.untyped_storage()) not in self._alive:
                storage = value.untyped_storage()
                self._alive[id(storage)] = len(self.sizes) if counted else -1
                weakref.finalize(storage, self._release, id(storage))
                if counted:
                    self.sizes.append(storage.nbytes())
                    self.last.append(-1)

    def _release(self, key: int) -> None:
        number = self._alive.pop(key)
        if number >= 0:
            self.last[number] = len(self.sizes) - 1

    def _step(self, network: nn.Module, x: Tensor) -> None:
        outputs = [out for out in tree_leaves(network(x)) if isinstance(out, Tensor)]
        sums = [out.sum() for out in outputs if out.requires_grad]
        del outputs
        self._added.clear()
        if sums:
            wanted = [t for t in (*network.parameters(), x) if t.requires_grad]
            for grad in torch.autograd.grad(sum(sums[1:], sums[0]), wanted, allow_unused=True):
                if grad is not None:
                    self.sizes[self.number(grad)] = 0

    def _add_in_place(self) -> None:
        """To a gradient that nobody else holds, the engine adds another one in place; but when a
        dispatch mode looks on, it makes a new one."""
        for old, new in self._added:
            if 0 <= old < new and self.last[old] == new and self.sizes[old] == self.sizes[new]:
                self.last[old] = new - 1


class _Cut(torch.autograd.Function):
    """A copy of a map and, in backward, of its gradient. It parts the storages that the network
    holds before and behind it, so that what is on one side can be exchanged for something else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tape: Tape, path: str) -> Tensor:
        ctx.tape, ctx.path = tape, path
        made = x.clone()
        tape.maps[path] = tape.number(x), tape.number(made)
        return made

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        made = grad.clone(memory_format=torch.contiguous_format)
        ctx.tape.grads[ctx.path] = ctx.tape.number(grad), ctx.tape.number(made)
        return made, None, None


def _cut(tape: Tape, path: str, module: nn.Module, args: Any, output: Tensor) -> Tensor:
    result: Tensor = _Cut.apply(output, tape, path)
    return result


class _Block:
    """A block's run between two cuts.

    size: bytes of its map x, of its result y and of their gradients. own: bytes of all else that it
    holds, at each moment. ends: 1 where it holds x, y and, in training, the gradients of y and x.
    spans: the moments of its pass and, in training, of its backward.
    """

    def __init__(self, block: nn.Module, shape: Shape, *, training: bool) -> None:
        chain = nn.Sequential(nn.Identity(), block)
        tape = Tape.of(chain, shape, training=training, cuts=("0", "1"), input_gradient=training)
        (_, x), (y, end) = tape.maps["0"], tape.maps["1"]
        ends, self.spans = [x, y], [slice(x, end)]
        if training:
            (x_grad, end), (_, y_grad) = tape.grads["0"], tape.grads["1"]
            ends += [y_grad, x_grad]
            self.spans += [slice(y_grad, end)]
        self.size = tape.sizes[x]
        self.ends = [tape.alive(number) for number in ends]
        sizes = np.zeros(len(tape.sizes), np.int64)
        for span in self.spans:
            sizes[span] = tape.sizes[span]
        sizes[ends] = 0
        self.own = _levels(sizes, tape.last)

    def in_pass(self) -> int:
        """At most, in its pass, through which its caller holds x."""
        live = self.own + self.size * (1 + self.ends[1])
        return int(live[self.spans[0]].max())

    def saved(self) -> tuple[int, int, int]:
        """From its pass to its backward: bytes of its own, and 1 or 0 for holding x, and y."""
        if len(self.spans) == 1:
            return 0, 0, 0
        turn = self.spans[1].start
        return int(self.own[turn]), int(self.ends[0][turn]), int(self.ends[1][turn])

    def in_backward(self, x: int, y: int, y_grad: int) -> int:
        """At most, in its backward; 1 for what the network around it holds anyway."""
        ends = (self.ends[0] | x) + (self.ends[1] | y) + (self.ends[2] | y_grad) + self.ends[3]
        return int((self.own + self.size * ends)[self.spans[1]].max())


class _Backbone:
    """A backbone's run, cut at every site, reduced to the moments that can be a peak.

    live: bytes at these moments, the storages at a cut taken for one, as they are without it. held:
    moment of a cut -> when the storages before and behind it are held, 1 or 0 at every moment.
    """

    def __init__(self, tape: Tape) -> None:
        self.tape = tape
        seams = sorted((*tape.maps.values(), *tape.grads.values()), key=max)
        self.held = {made: self._held(old, made) for old, made in seams}
        live = self._uncut(seams)
        # As long as what is held at the cuts stays the same, the highest moment stands for all.
        states = np.reshape(
            [side for sides in self.held.values() for side in sides], (-1, len(live))
        )
        changes = (states[:, 1:] != states[:, :-1]).any(0)
        spans = np.flatnonzero(np.concatenate(([True], changes)))
        cuts = np.array(list(self.held), np.int64)
        self.moments = np.concatenate((spans, cuts))
        self.column = {cut: len(spans) + index for index, cut in enumerate(self.held)}
        self.live = np.concatenate((np.maximum.reduceat(live, spans), live[cuts]))

    def _held(self, old: int, made: int) -> tuple[Ints, Ints]:
        """The old one: by others than the cut."""
        before = self.tape.alive(old)
        before[made] = self.tape.last[old] > made
        return before, self.tape.alive(made)

    def _uncut(self, seams: Iterable[Seam]) -> Ints:
        """Bytes at each moment, if the storages at a cut, or at several in a row, were one."""
        sizes, last, whole = [*self.tape.sizes], [*self.tape.last], dict[int, int]()
        for old, made in seams:
            first = whole[made] = whole.get(old, old)
            last[first] = max(last[first], last[made])
            sizes[made] = 0
        return _levels(sizes, last)

    def row(self, site: str, block: _Block) -> Ints:
        """What the block adds to `live` at this site."""
        cut, turn = self.tape.maps[site][1], self.tape.grads.get(site, (-1, -1))[1]
        before, behind = self.held[cut]
        grad_behind, grad_before = self.held.get(turn, (before * 0, before * 0))
        plain = block.size * ((before | behind) + (grad_behind | grad_before))
        between = before * 0
        between[cut:turn] = 1
        saved, saves_x, saves_y = block.saved()
        ends = (before | saves_x * between) + (behind | saves_y * between)
        live = block.size * (ends + grad_behind + grad_before) + saved * between
        row: Ints = (live - plain)[self.moments]
        row[self.column[cut]] = block.in_pass() - plain[cut]
        if turn in self.held:
            around = int(before[turn]), int(behind[turn]), int(grad_behind[turn])
            row[self.column[turn]] = block.in_backward(*around) - plain[turn]
        return row


def _levels(sizes: Sequence[int] | Ints, last: Sequence[int]) -> Ints:
    steps = np.array([*sizes, 0], np.int64)
    np.subtract.at(steps, np.array(last) + 1, sizes)
    return steps.cumsum()[:-1]


def _on_fake_cpu(module: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers are fake tensors of the CPU, whatever they were."""
    memo: dict[int, object] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        if isinstance(tensor, nn.Parameter):
            fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = fake
    return copy.deepcopy(module, memo)
