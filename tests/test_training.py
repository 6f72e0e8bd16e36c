"""Training that pauses: what goes on from a checkpoint is what was never interrupted, bit for bit;
rungs are annealed points of one trunk."""

import gc
import json
import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, OneCycleLR, SequentialLR

from nasattn.architecture import Architecture, Placement
from nasattn.blocks import BLOCKS
from nasattn.config import CuedDigits, Experiment, Schedule, TrainerFile
from nasattn.data import Data, load
from nasattn.data.cued_digits import Composed
from nasattn.errors import DataFailed, Stopped, TrialFailed
from nasattn.evaluate import checkpoint, device
from nasattn.evaluate.candidate import Evaluator, Weights
from nasattn.evaluate.rate import rate
from nasattn.evaluate.train import Tick, fit
from nasattn.evaluate.train import test as score_test
from nasattn.model import build
from nasattn.record import Score
from nasattn.space import SearchSpace

SPACE = {
    "backbone": {
        "name": "mobilenet_v2",
        "width": 0.25,
        "stem_stride": 4,
        "head": 16,
        "divisor": 4,
        "dropout": 0.2,
        "rows": [[1, 32, 1, 1], [2, 32, 2, 2], [2, 64, 1, 1]],
    },
    "input": [1, 32, 64],
    "classes": 10,
    "sites": ["stage*.*"],
    "blocks": {
        "lightnl": {"ratio": [0.5]},
        "gcnet": {"ratio": [0.25]},
        "emanet": {"bases": [4]},
        "ccnet": {},
    },
    "max_blocks": 3,
}
PLACED = {"stage1.0": "emanet(bases=4)", "stage2.0": "gcnet(ratio=0.25)", "stage3.0": "ccnet"}
TRAINING = {"epochs": 6, "batch_size": 32, "lr": 0.01, "schedule": "wsd", "warm_start": True}


Half = tuple[Path, tuple[Score, Weights]]


class Interrupted(Exception):
    pass


class Randomly:
    """Training images that draw from Python's and numpy's own generators too, as a user's may."""

    def __init__(self, split: Any) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, indices: Any) -> tuple[Tensor, Tensor]:
        x, y = self.split.__getitems__(indices)
        return x + 0.1 * random.random() + 0.1 * float(np.random.random()), y


@pytest.fixture(scope="module")
def data() -> Data:
    return cued()


def cued() -> Data:
    sizes = CuedDigits(name="cued_digits", train=96, val=64, test=64)
    whole = load(sizes, (1, 32, 64), 10)
    return Data(
        classes=10,
        input=whole.input,
        train=Randomly(whole.train),
        val=whole.val,
        test=whole.test,
    )


def experiment(**changes: Any) -> Experiment:
    fields = {
        "study": "tiny",
        "space": SPACE,
        "data": {"name": "cued_digits", "train": 96, "val": 64, "test": 64},
        "training": TRAINING,
        "pretrain": {"epochs": 2},
    }
    return Experiment.from_dict(fields | changes)


def evaluator(data: Data, folder: Path, **changes: Any) -> Evaluator:
    config = experiment(**changes)
    plain = SearchSpace.of(config.space).baseline()
    made = Evaluator(config, data, plain, folder)
    made.notes = []  # type: ignore[attr-defined]
    made.note = made.notes.append  # type: ignore[attr-defined]
    return made


def candidate() -> Architecture:
    plain = SearchSpace.of(experiment().space).baseline()
    return Architecture(
        backbone=plain.backbone,
        classes=plain.classes,
        input=plain.input,
        placements=tuple(Placement.parse(site, spec) for site, spec in PLACED.items()),
    )


def quiet(share: float, accuracy: float | None) -> None: ...


def dying(at: int) -> Tick:
    """Raises at the tick of this number: a training has one a step and one an epoch."""
    left = [at]

    def tick(share: float, accuracy: float | None) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Interrupted

    return tick


def same(first: tuple[Score, Weights], second: tuple[Score, Weights]) -> bool:
    """All but the seconds."""

    def plain(score: Score) -> dict[str, Any]:
        fields = score.as_dict() | {"seconds": 0}
        return fields | {"repeats": [r | {"seconds": 0} for r in fields["repeats"]]}

    return plain(first[0]) == plain(second[0]) and equal(first[1], second[1])


def equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


HALVING = {"search": {"stopping": "pareto_halving", "rungs": [2, 3, 6]}}
VARIANTS: dict[str, dict[str, Any]] = {
    "wsd": {},
    "onecycle, sgd": {"training": TRAINING | {"schedule": "onecycle", "optimizer": "sgd"}},
    "clip, repeats": {"training": TRAINING | {"epochs": 3, "clip": 1.0, "seeds": 2}},
    "rungs, ema": HALVING | {"training": TRAINING | {"ema": 0.8}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_interrupted_training_goes_on_bit_for_bit(
    data: Data, tmp_path: Path, variant: str
) -> None:
    """Torn again and again after a few more steps each time, at steps and at ends of epochs."""
    changes = VARIANTS[variant]
    rung = 2 if "rungs" in variant else None
    whole = evaluator(data, tmp_path, **changes)
    whole.prepare(quiet)
    expected = whole(candidate(), quiet, rung=rung)

    kept, torn, result = tmp_path / "kept", 0, None
    for attempt in range(100):
        again = evaluator(data, tmp_path, **changes)
        again.prepare(quiet)
        try:
            result = again(candidate(), dying(9 + 2 * (attempt % 3)), checkpoints=kept, rung=rung)
            break
        except Interrupted:
            torn += 1
        assert again.notes == []  # type: ignore[attr-defined]
    assert result is not None and torn >= 2
    assert same(result, expected)
    assert same(again(candidate(), quiet, checkpoints=kept, rung=rung), expected), "trained again"


def test_rungs_are_points_of_one_trunk(data: Data, tmp_path: Path) -> None:
    """Each rung is what a training of so many epochs with the same warm-up gives; the last one is
    the training without rungs."""
    training = TRAINING | {"warmup": 0.125}
    halving = evaluator(data, tmp_path, training=training, **HALVING)
    halving.prepare(quiet)
    assert halving.experiment.rungs == (2, 3, 6)
    plain = evaluator(data, tmp_path, training=training)
    plain.prepare(quiet)
    without = plain(candidate(), quiet)
    scores = []
    for rung, epochs in enumerate(halving.experiment.rungs):
        score, weights = halving(candidate(), quiet, checkpoints=tmp_path / "kept", rung=rung)
        scores.append(score)
        assert score.accuracy == score.rungs[-1] and len(score.rungs) == rung + 1
        alone = TRAINING | {"epochs": epochs, "warmup": 0.125 * 6 / epochs}
        short = evaluator(data, tmp_path, training=alone)
        short._backbone = plain._backbone
        one, expected = short(candidate(), quiet)
        assert equal(weights, expected) and one.accuracy == score.accuracy, f"rung {epochs}"
    final = scores[-1]
    assert final.rungs[:2] == scores[1].rungs and final.rungs[0] == scores[0].rungs[0]
    assert equal(weights, without[1])
    assert (final.accuracy, final.curve) == (without[0].accuracy, without[0].curve)
    assert len(final.curve) == 6
    # Decays of 1, 1 and 2 epochs; the trunk has 4.
    assert [s.epochs for s in scores] == [2, 4, 8] and without[0].epochs == 6
    assert [len(s.curve) for s in scores] == [1, 2, 6]


def test_what_is_random_outside_is_left_alone(data: Data, tmp_path: Path) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), float(torch.rand(()))

    checkpoint.seed_generators(3)
    expected = draw()
    checkpoint.seed_generators(3)
    schedule = Schedule(batch_size=32)
    network = build(candidate())
    checkpoint.seed_generators(3)
    fit(network, data, schedule, seed=1, where=TrainerFile())
    assert draw() == expected


def test_where_slurm_is_at_hand_nothing_is_said_of_it(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning would warn at each training that `srun` is not used."""
    (tmp_path / "srun").write_text("#!/bin/sh\n")
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    fit(build(candidate()), data, Schedule(batch_size=32), seed=1, where=TrainerFile())


class Putting(nn.Module):
    """An operation of which torch has no deterministic kernel, on the CPU either."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.modes = network, list[int]()

    def forward(self, x: Tensor) -> Tensor:
        self.modes.append(torch.get_deterministic_debug_mode())
        y: Tensor = self.network(x)
        first = torch.zeros(1, dtype=torch.int64, device=y.device)
        return y.contiguous().clone().put_(first, y[0, :1].detach())


@pytest.mark.parametrize("ema", [0.0, 0.8])
def test_what_has_no_deterministic_kernel_is_trained_from_the_start_without(
    data: Data, tmp_path: Path, ema: float
) -> None:
    schedule, notes, trained, scores = Schedule(epochs=2, batch_size=32, ema=ema), [], [], []
    for strict in (False, True):
        torch.manual_seed(0)
        network = Putting(build(candidate()))
        kept = checkpoint.Checkpoints(folder=tmp_path / f"{strict}", belongs={}, note=notes.append)
        before = torch.get_deterministic_debug_mode()
        torch.use_deterministic_algorithms(strict)
        try:
            where = TrainerFile(accelerator="cpu")
            score = fit(network, data, schedule, seed=1, where=where, checkpoints=kept)
            assert torch.get_deterministic_debug_mode() == 2 * strict, "as it was"
            scored = score_test(network, data, batch_size=32, where=where)
        finally:
            torch.set_deterministic_debug_mode(before)
        trained.append((score, network.state_dict()))
        scores.append(scored)
        assert len(notes) == strict
        # 2: all others raise, 1: they warn.
        assert set(network.modes) == ({2, 1} if strict else {0})
        assert network.modes.count(2) == 2 * strict, "once in training and once in the test"
    assert same(*trained) and scores[0] == scores[1]
    text = "put_ does not have a deterministic implementation"
    assert notes == [f"not the same bits each time on a GPU: {text}"]


def test_on_a_gpu_kernels_are_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the settings of before come back."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    settings: Any = torch.utils.deterministic
    modes = []
    for accelerator in ("cpu", "auto", "gpu"):
        with device.repeatable(TrainerFile(accelerator=accelerator)):
            modes.append(torch.get_deterministic_debug_mode())
            assert settings.fill_uninitialized_memory == (accelerator == "cpu")
        assert torch.get_deterministic_debug_mode() == 0 and settings.fill_uninitialized_memory
    assert modes == [0, 2, 2]


def test_an_error_of_cublas_is_no_end() -> None:
    said, tries = list[str](), iter([RuntimeError("Deterministic behavior was enabled: CuBLAS"), 5])

    def work() -> object:
        if isinstance(found := next(tries), Exception):
            raise found
        return found

    before = torch.get_deterministic_debug_mode()
    try:
        assert device.alike(work, said.append) == 5
    finally:
        torch.set_deterministic_debug_mode(before)
    assert "CUBLAS_WORKSPACE_CONFIG=:4096:8" in said[0]
    with pytest.raises(RuntimeError, match="anything else"):
        device.alike(lambda: (_ for _ in ()).throw(RuntimeError("anything else")), said.append)


@pytest.mark.parametrize("block", BLOCKS)
def test_every_block_is_trained_to_the_same_bits_again(data: Data, block: str) -> None:
    if block == "annnet" and torch.cuda.is_available():
        pytest.skip("torch has no deterministic gradient of its pooling on a GPU")
    wide = SPACE | {"backbone": SPACE["backbone"] | {"width": 1.0}}  # type: ignore[operator]
    plain = SearchSpace.of(experiment(space=wide).space).baseline()
    placed = Architecture(
        backbone=plain.backbone,
        classes=plain.classes,
        input=plain.input,
        placements=(Placement.parse("stage1.0", block),),
    )
    trained = []
    for _ in range(2):
        torch.manual_seed(0)
        network = build(placed)
        with torch.no_grad():
            for parameter in network.parameters():
                if not parameter.any():  # else a block that begins as the identity has no gradients
                    nn.init.normal_(parameter, 0.0, 0.1)
        schedule = Schedule(epochs=2, batch_size=32)
        score = fit(network, data, schedule, seed=1, where=TrainerFile())
        trained.append((score, network.state_dict()))
    assert same(*trained)


class Unreadable:
    """A split whose images cannot be read any more."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __len__(self) -> int:
        return 96

    def __getitems__(self, indices: Any) -> Any:
        raise self.error from OSError("TrialFailed: not this")


@pytest.mark.parametrize("loaders", [0, 1])
@pytest.mark.parametrize("kind", [TrialFailed, DataFailed, Stopped])
def test_what_a_loader_says_is_told_alone(
    data: Data, tmp_path: Path, kind: type[Exception], loaders: int
) -> None:
    split = Unreadable(kind("images/a/7.png could be read before, now it cannot"))
    with pytest.raises(kind) as told:
        evaluator(replace(data, train=split, loaders=loaders), tmp_path).prepare(quiet)
    assert str(told.value) == "images/a/7.png could be read before, now it cannot"


def test_inserted_blocks_learn_at_their_own_rate(data: Data) -> None:
    """One step of plain SGD moves the blocks by the factor farther, and nothing else."""
    moved = []
    for factor in (1.0, 4.0):
        schedule = Schedule(
            batch_size=32, optimizer="sgd", momentum=0.0, weight_decay=0.0, block_lr=factor
        )
        checkpoint.seed_generators(3)
        network = build(candidate())
        before = {name: p.detach().clone() for name, p in network.named_parameters()}
        fit(network, data, schedule, seed=1, where=TrainerFile(), batches=1)
        moved.append({n: p.detach() - before[n] for n, p in network.named_parameters()})
    blocks = {name for name in moved[0] if ".attention." in name and moved[0][name].any()}
    assert blocks
    for name, once in moved[0].items():
        torch.testing.assert_close(moved[1][name], once * (4.0 if name in blocks else 1.0))


# --- files ---


@pytest.fixture(scope="module")
def half(
    data: Data, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, tuple[Score, Weights]]:
    """A folder with a training that was interrupted in its fourth epoch, and what it comes to."""
    home = tmp_path_factory.mktemp("half")
    made = evaluator(data, home)
    made.prepare(quiet)
    with pytest.raises(Interrupted):
        made(candidate(), dying(15), checkpoints=home / "kept")
    return home, made(candidate(), quiet)


def spoil(path: Path, how: str) -> None:
    raw = bytearray(path.read_bytes())
    if how == "truncated":
        raw = raw[: len(raw) // 2]
    elif how == "empty":
        raw = bytearray()
    elif how == "noise":
        raw = bytearray(random.Random(0).randbytes(1000))
    else:
        share = {"header": 0.01, "weights": 0.6, "last byte": 1.0}[how]
        raw[min(len(raw) - 1, int(len(raw) * share))] ^= 4
    path.write_bytes(raw)


@pytest.mark.parametrize(
    "how", ["truncated", "empty", "noise", "header", "weights", "last byte", "foreign"]
)
def test_a_checkpoint_of_no_use_is_reported_and_the_training_restarts(
    data: Data, half: Half, tmp_path: Path, how: str
) -> None:
    home, expected = half
    kept = tmp_path / "kept"
    (kept / "0").mkdir(parents=True)
    file = kept / "0" / "trunk.safetensors"
    file.write_bytes((home / "kept" / "0" / "trunk.safetensors").read_bytes())
    made = evaluator(data, home)
    made.prepare(quiet)
    if how == "foreign":
        made.seed = lambda *parts: 5  # type: ignore[method-assign]
        expected = made(candidate(), quiet)
    else:
        spoil(file, how)
    shares: list[float] = []
    result = made(candidate(), lambda share, _: shares.append(share), checkpoints=kept)
    assert shares[0] < 0.1, "it began at the beginning"
    assert same(result, expected)
    (note,) = made.notes  # type: ignore[attr-defined]
    reason = "belongs to another training" if how == "foreign" else "cannot be used"
    assert "trunk.safetensors" in note and reason in note


def test_it_goes_on_from_the_last_epoch(data: Data, half: Half) -> None:
    home, expected = half
    made = evaluator(data, home)
    made.prepare(quiet)
    shares: list[float] = []
    result = made(candidate(), lambda share, _: shares.append(share), checkpoints=home / "kept")
    assert shares[0] == pytest.approx(3 / 6 + 1 / 18), "three whole epochs of six were done"
    assert same(result, expected)
    assert made.notes == []  # type: ignore[attr-defined]


def test_a_backbone_that_has_not_learned_is_told(data: Data, tmp_path: Path) -> None:
    """64 images of 10 classes, 7 of the most frequent: .109 by chance, standard error .039."""
    made = evaluator(data, tmp_path)
    assert made._how_well(0.19) == "the plain backbone is trained: accuracy 0.1900"
    assert "no more than chance (0.1094 by the most frequent class" in made._how_well(0.18)


def test_chance_is_that_of_the_most_frequent_class(data: Data, tmp_path: Path) -> None:
    rare = Composed(torch.zeros(30, 1, 32, 64), torch.tensor([0] * 28 + [1] * 2))
    made = evaluator(replace(data, val=rare), tmp_path)
    assert "no more than chance (0.9333" in made._how_well(0.9333)


def test_every_flipped_bit_is_noticed(half: Half, tmp_path: Path) -> None:
    home, _ = half
    raw = (home / "kept" / "0" / "trunk.safetensors").read_bytes()
    with safe_open(home / "kept" / "0" / "trunk.safetensors", "pt") as file:
        belongs = json.loads(file.metadata()["state"])["belongs"]
    notes: list[str] = []
    files = checkpoint.Checkpoints(folder=tmp_path, belongs=belongs, note=notes.append)
    network = build(candidate())
    (tmp_path / "trunk.safetensors").write_bytes(raw)
    assert files.read("trunk", network) is not None
    rng = random.Random(0)
    for count in range(1, 61):
        spoilt = bytearray(raw)
        spoilt[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        (tmp_path / "trunk.safetensors").write_bytes(spoilt)
        assert files.read("trunk", network) is None
        assert len(notes) == count


def test_a_disk_that_is_full_is_noted_and_the_training_ends(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = evaluator(data, tmp_path)
    made.prepare(quiet)
    expected = made(candidate(), quiet)

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert same(made(candidate(), quiet, checkpoints=tmp_path / "kept"), expected)
    backbone, *notes = made.notes  # type: ignore[attr-defined]
    assert backbone.startswith("the plain backbone is trained: accuracy 0.")
    assert len(notes) == 6 and all("No space left" in note for note in notes)


def test_what_is_in_a_checkpoints_way_is_noted_and_the_training_ends(
    data: Data, tmp_path: Path
) -> None:
    made = evaluator(data, tmp_path)
    made.prepare(quiet)
    expected = made(candidate(), quiet)
    for name in ("trunk.safetensors", ".trunk.safetensors.draft"):
        kept = tmp_path / name.strip(".") / "kept"
        (kept / "0" / name).mkdir(parents=True)
        assert same(made(candidate(), quiet, checkpoints=kept), expected)
    assert made.notes  # type: ignore[attr-defined]


def test_the_backbone_goes_on_too(data: Data, tmp_path: Path) -> None:
    whole, torn = (evaluator(data, tmp_path / name) for name in ("whole", "torn"))
    whole.prepare(quiet)
    with pytest.raises(Interrupted):
        torn.prepare(dying(6))
    shares: list[float] = []
    torn.prepare(lambda share, _: shares.append(share))
    assert min(shares) > 0.5, "its second epoch alone was left"
    assert whole._backbone is not None and torn._backbone is not None
    assert equal(whole._backbone, torn._backbone)
    assert {p.name for p in torn.folder.iterdir()} == {"backbone.safetensors"}


@pytest.mark.slow
def test_kill_minus_nine_and_going_on(data: Data, half: Half, tmp_path: Path) -> None:
    """A process of its own, killed in the middle of a step, three times over."""
    home, expected = half
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_training import *
from test_training import cued
made = evaluator(cued(), Path({str(home)!r}))
made.prepare(quiet)
made(candidate(), lambda share, _: print(share, flush=True), checkpoints=Path(sys.argv[1]))
"""
    kept, starts = tmp_path / "kept", []
    for stop in (0.2, 0.5, 0.9):
        command = [sys.executable, "-c", code, str(kept)]
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert worker.stdout is not None
        shares = (float(line) for line in worker.stdout)
        starts.append(next(shares))
        while next(shares) < stop:
            pass
        worker.kill()
        worker.communicate()
        assert worker.returncode == -signal.SIGKILL
        done = int((kept / "0" / checkpoint.STEP).read_text().split("+")[0])
        assert stop <= done / 18 < 1, "of 6 epochs of 3 steps: it tells where the kill fell"
    assert starts == sorted(starts) and starts[-1] > 1 / 3  # past an epoch that the first ended
    made = evaluator(data, home)
    made.prepare(quiet)
    assert same(made(candidate(), quiet, checkpoints=kept), expected)
    assert made.notes == []  # type: ignore[attr-defined]


def test_each_step_leaves_word_while_it_is_the_last(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of training and of validation, in each repeat; only a kill leaves it."""
    made = evaluator(data, tmp_path, training=TRAINING | {"epochs": 2, "seeds": 2})
    made.prepare(quiet)
    kept, words, write = tmp_path / "kept", list[str](), os.pwrite

    def pwrite(file: int, text: bytes, at: int) -> int:
        written = write(file, text, at)
        words.extend(path.read_text().strip() for path in kept.rglob(checkpoint.STEP))
        return written

    monkeypatch.setattr(os, "pwrite", pwrite)
    made(candidate(), quiet, checkpoints=kept)
    assert words == 2 * ["1", "2", "3", "3+0", "3+1", "4", "5", "6", "6+0", "6+1"]
    assert not [*kept.rglob(checkpoint.STEP)]


@pytest.mark.slow
def test_nothing_is_left_of_many_trainings(data: Data, tmp_path: Path) -> None:
    """Objects that the collector knows, and tensors among them, after 5 trainings and after 25."""
    made = evaluator(data, tmp_path, training=TRAINING | {"epochs": 2, "ema": 0.5})
    made.prepare(quiet)

    def alive(trainings: int) -> tuple[int, int]:
        for number in range(trainings):
            made(candidate(), quiet, checkpoints=tmp_path / f"{trainings}-{number}")
        gc.collect()
        objects = gc.get_objects()
        return len(objects), sum(issubclass(type(o), Tensor) for o in objects)

    objects, tensors = alive(5)
    more_objects, more_tensors = alive(20)
    assert more_tensors == tensors
    assert more_objects - objects < 20 * 5, "Lightning alone makes thousands a training"
    assert gc.get_freeze_count() < 1000, "in Python 3.12 the collector freezes what is immortal"


# --- the rate ---


def torchs(schedule: Schedule, steps: int) -> list[float]:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=schedule.lr)
    warm = round(schedule.warmup * steps)
    made: Any
    if schedule.schedule == "onecycle":
        made = OneCycleLR(
            optimizer,
            schedule.lr,
            total_steps=steps + 1,
            pct_start=schedule.warmup,
            div_factor=10,
            final_div_factor=100,
            cycle_momentum=False,
        )
    else:
        made = CosineAnnealingLR(optimizer, T_max=steps - warm)
        if warm:
            rise = LinearLR(optimizer, start_factor=0.1, total_iters=warm)
            made = SequentialLR(optimizer, [rise, made], milestones=[warm])
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        made.step()
    return rates


@pytest.mark.parametrize("warmup", [0.0, 0.25, 0.6])
@pytest.mark.parametrize("name", ["onecycle", "cosine"])
def test_rates_are_those_of_torch(name: Any, warmup: float) -> None:
    if name == "onecycle" and not warmup:
        name = "cosine"
    schedule = Schedule(epochs=3, schedule=name, warmup=warmup, lr=0.02)
    ours = [rate(schedule, step, epoch_steps=7, rung=3) for step in range(21)]
    np.testing.assert_allclose(ours, torchs(schedule, 21), rtol=1e-9, atol=1e-12)


def test_wsd_rises_stays_and_falls_at_every_rung() -> None:
    schedule = Schedule(epochs=12, schedule="wsd", warmup=0.125, decay=0.25, lr=0.1)
    trunk = [rate(schedule, step, epoch_steps=10, rung=None) for step in range(120)]
    np.testing.assert_allclose(trunk[:15], 0.1 * np.linspace(0.1, 1, 15, endpoint=False))
    assert set(trunk[15:]) == {0.1}
    for rung, decay in ((12, 3), (4, 1), (2, 1)):
        assert schedule.decay_epochs(rung) == decay
        rates = [rate(schedule, s, epoch_steps=10, rung=rung) for s in range(10 * rung)]
        branch = 10 * (rung - decay)
        assert rates[:branch] == trunk[:branch]
        fall = rates[branch:]
        bound = [0.1 * (1 - math.sqrt(i / len(fall))) for i in range(len(fall))]
        expected = np.minimum(bound, trunk[branch : 10 * rung])
        np.testing.assert_allclose(fall, expected)
        assert fall[-1] < 0.06 * 0.1
        assert rate(schedule, 10 * rung, epoch_steps=10, rung=rung) == 0


def test_the_optimiser_gets_these_rates(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    step = torch.optim.AdamW.step

    def spy(self: Any, *args: Any, **options: Any) -> Any:
        seen.append(self.param_groups[0]["lr"])
        assert {group["lr"] for group in self.param_groups} == {seen[-1]}
        return step(self, *args, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    schedule = Schedule(epochs=4, batch_size=32, schedule="wsd", decay=0.5)
    fit(build(candidate()), data, schedule, seed=0, where=TrainerFile(), rungs=(2, 4))
    trunk = [rate(schedule, s, epoch_steps=3, rung=None) for s in range(6)]
    first = [rate(schedule, s, epoch_steps=3, rung=2) for s in range(3, 6)]
    last = [rate(schedule, s, epoch_steps=3, rung=4) for s in range(6, 12)]
    assert seen == trunk[:3] + first + trunk[3:] + last
