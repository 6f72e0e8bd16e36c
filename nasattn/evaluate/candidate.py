"""Evaluation of an architecture: built, given the plain backbone's weights, trained, scored."""

import json
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from nasattn.architecture import Architecture
from nasattn.config import Experiment, Schedule, TrainerFile
from nasattn.data import Data, load
from nasattn.errors import UserError
from nasattn.evaluate import Tick
from nasattn.evaluate.checkpoint import Checkpoints
from nasattn.evaluate.device import check
from nasattn.files import Files, check_file, whole
from nasattn.model import build, canonical, load_backbone
from nasattn.record import Score
from nasattn.seed import derive

Weights = Mapping[str, Tensor]


def fit(*arguments: Any, **options: Any) -> Score:
    """See train.fit."""
    from nasattn.evaluate import train

    return train.fit(*arguments, **options)


def load_training(where: TrainerFile) -> None:
    """Lightning takes as long as all else together, so it is loaded when something is to be
    trained; before a trial is taken, for to be killed meanwhile would count as the trial's fault.
    A UserError where this machine has not what the trainer asks for."""
    from nasattn.evaluate import train  # noqa: F401

    check(where)


def test(*arguments: Any, **options: Any) -> float:
    """See train.test."""
    from nasattn.evaluate import train

    return train.test(*arguments, **options)


class Evaluator:
    """Scores architectures of one experiment, the plain backbone like every other.

    With `warm_start` all of them go on from one trained plain backbone, whose weights lie in
    `folder`; when they are gone it is trained again, from the same seed. note: told of checkpoints
    that cannot be used or written. files: where what lies in `folder` lies beside this disk.
    """

    def __init__(
        self,
        experiment: Experiment,
        data: Data,
        plain: Architecture,
        folder: Path,
        note: Callable[[str], None] = lambda text: None,
        files: Files | None = None,
    ) -> None:
        self.experiment, self.data, self.plain, self.folder = experiment, data, plain, folder
        self.note, self.files = note, files or Files()
        self._backbone: Weights | None = None

    def __call__(
        self,
        architecture: Architecture,
        tick: Tick,
        *,
        checkpoints: Path | None = None,
        rung: int | None = None,
    ) -> tuple[Score, Weights]:
        """The mean score over the repeats, and the first repeat's weights. Raises TrialFailed.

        checkpoints: a folder of this architecture's own; what is found there is gone on with. rung:
        train to this one of the experiment's `rungs` and measure those before it too; None: train
        the whole schedule and nothing beside it.
        """
        training = self.experiment.training
        rungs = () if rung is None else self.experiment.rungs[: rung + 1]
        scores, weights = [], None
        for repeat in range(training.seeds):
            seed = self.seed(architecture, repeat)
            network = self.start(architecture, seed)
            files = self._checkpoints(
                checkpoints and checkpoints / str(repeat),
                architecture,
                training,
                seed,
                start=self._facts() if training.warm_start else None,
                rungs=self.experiment.rungs if rungs else (),
            )
            score = fit(
                network,
                self.data,
                training,
                seed=seed,
                where=self.experiment.trainer,
                tick=partial(_part, tick, repeat, training.seeds),
                rungs=rungs,
                checkpoints=files,
            )
            scores.append(score)
            weights = weights or weights_of(network)
        assert weights is not None
        return Score.mean(scores), weights

    def from_scratch(
        self,
        architecture: Architecture,
        schedule: Schedule,
        tick: Tick,
        *,
        checkpoints: Path | None = None,
    ) -> tuple[Score, Weights]:
        """One training without the backbone's weights."""
        seed = self.seed(architecture, "scratch")
        torch.manual_seed(seed)
        network = build(architecture)
        score = fit(
            network,
            self.data,
            schedule,
            seed=seed,
            where=self.experiment.trainer,
            tick=tick,
            checkpoints=self._checkpoints(checkpoints, architecture, schedule, seed),
        )
        return score, weights_of(network)

    def prepare(self, tick: Tick) -> None:
        """Have the plain backbone's weights ready. What trains is loaded."""
        load_training(self.experiment.trainer)
        if not self.experiment.training.warm_start or self._backbone is not None:
            return
        self._backbone = self._stored()
        if self._backbone is None:
            kept = self.training
            score, self._backbone = self.from_scratch(
                self.plain, self.experiment.pretrain, tick, checkpoints=kept
            )
            self.note(self._how_well(score.accuracy))
            facts = self._facts() | self._more() | {"accuracy": f"{score.accuracy:.6f}"}
            store(self._file, self._backbone, facts)
            self.files.publish(self._file, must=True)
            self.files.drop(kept)
            return
        self.files.publish(self._file, must=True)  # its training may have ended before this one did

    def _how_well(self, reached: float) -> str:
        """Of the plain backbone: within two standard errors of what the most frequent class alone
        would give, it has not learned."""
        labels = self.data.val.labels
        chance = labels.bincount().max().item() / len(labels)
        error = math.sqrt(chance * (1 - chance) / len(labels))
        text = f"the plain backbone is trained: accuracy {reached:.4f}"
        if reached <= chance + 2 * error:
            text += (
                f", no more than chance ({chance:.4f} by the most frequent class, of {len(labels)} "
                "images): what goes on from it will hardly learn; more `pretrain: epochs`, another "
                "`lr`, or other augmentation may help"
            )
        return text

    @property
    def training(self) -> Path:
        """Where the plain backbone's training leaves its checkpoints."""
        return self.folder / "backbone.checkpoints"

    @property
    def stored(self) -> bool:
        """Whether the plain backbone's weights are at hand."""
        return self._backbone is not None or self._stored() is not None

    def seed(self, architecture: Architecture, repeat: int | str) -> int:
        return derive(self.experiment.search.seed, architecture.key, repeat)

    def estimate(self, trainings: float, *, prepare: bool) -> float:
        """Seconds that so many candidates will take, from a few steps of the plain backbone. Blocks
        come on top, so it is a lower figure; prepare: with the backbone's own training."""
        load_training(self.experiment.trainer)
        training = self.experiment.training
        few = min(8, int(self._steps(training) / training.epochs))
        with torch.random.fork_rng(devices=[]):
            network, seconds = build(self.plain), 0.0
            for _ in range(2):  # the first run warms up
                start = time.perf_counter()
                fit(
                    network,
                    self.data,
                    training.model_copy(update={"epochs": 1}),
                    seed=0,
                    where=self.experiment.trainer,
                    batches=few,
                )
                seconds = time.perf_counter() - start
        steps = trainings * training.seeds * self._steps(training)
        steps += self._steps(self.experiment.pretrain) if prepare else 0
        return steps * seconds / few

    def _steps(self, schedule: Schedule) -> float:
        whole = len(self.data.train) / schedule.batch_size
        return schedule.epochs * min(whole, schedule.epoch_steps or whole)

    def start(self, architecture: Architecture, seed: int) -> torch.nn.Module:
        """The network as its training finds it."""
        torch.manual_seed(seed)
        network = build(architecture)
        if self.experiment.training.warm_start:
            assert self._backbone is not None, "prepare() comes first"
            load_backbone(network, self._backbone)
        return network

    def _checkpoints(
        self,
        folder: Path | None,
        architecture: Architecture,
        schedule: Schedule,
        seed: int,
        **more: Any,
    ) -> Checkpoints | None:
        """more: what else the training is a function of."""
        if folder is None:
            return None
        belongs = {
            "architecture": architecture.key,
            "schedule": schedule.model_dump(mode="json"),
            "seed": seed,
            "data": self._data(),
            "contents": self.data.facts.get("contents"),
            "trainer": self.experiment.as_dict()["trainer"],
            **more,
        }
        return Checkpoints(folder=folder, belongs=belongs, note=self.note, files=self.files)

    @property
    def _file(self) -> Path:
        return self.folder / "backbone.safetensors"

    def _facts(self) -> dict[str, str]:
        """What the stored weights must have come from to be used."""
        what = {
            "data": self._data(),
            "pretrain": self.experiment.as_dict()["pretrain"],
            "architecture": self.plain.key,
            "seed": self.seed(self.plain, "scratch"),
        }
        return {"from": json.dumps(what, sort_keys=True)}

    def _more(self) -> dict[str, str]:
        """More of it, compared only where the stored weights have it: of earlier versions not."""
        contents = self.data.facts.get("contents")
        more = {"trainer": self.experiment.as_dict()["trainer"], "contents": contents}
        return {key: json.dumps(value, sort_keys=True) for key, value in more.items()}

    def _data(self) -> dict[str, Any]:
        """What images there are; wherever they lie and whoever reads them, they are the same."""
        data, facts = self.experiment.as_dict()["data"], self.data.facts
        kept = {k: v for k, v in data.items() if k not in ("loaders", "root")}
        return kept | {key: facts[key] for key in ("digest", "read") if key in facts}

    def _stored(self) -> Weights | None:
        def read(path: Path) -> Weights | None:
            stored, wanted = facts_of(path), self._facts() | self._more()
            ours = all(stored.get(k, v) == v for k, v in wanted.items()) and "from" in stored
            return load_file(path) if ours else None

        try:
            return self.files.read(self._file, read)
        except (OSError, SafetensorError):
            return None


def weights_of(network: torch.nn.Module) -> Weights:
    """The state_dict as plain contiguous CPU tensors, ready to be stored."""
    return {
        key: value.detach().to("cpu", copy=True).contiguous()
        for key, value in network.state_dict().items()
    }


def check_trainable(schedule: Schedule, key: str, architecture: Architecture, data: Data) -> None:
    """A UserError where there is one class; where the training images do not fill a batch; or where
    batches are of one image and a BatchNorm of the network sees one value a channel then, of which
    there is no variance. key: the schedule's, in the experiment."""
    if architecture.classes == 1:
        raise UserError("classes: got 1; allowed: from 2 on, else there is nothing to tell apart")
    try:
        data.loader("train", schedule.batch_size, 0)
    except UserError as error:
        raise UserError(f"{key}.{error}") from None
    if schedule.batch_size == 1:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            try:
                build(architecture).train()(torch.zeros(1, *architecture.input))
            except ValueError as error:
                raise UserError(f"{key}.batch_size: got 1; allowed: from 2: {error}") from None


def train_architecture(
    architecture: Architecture,
    experiment: Experiment,
    out: Path,
    *,
    epochs: int | None,
    on_test: bool,
    tick: Tick,
) -> dict[str, Any]:
    """Train one architecture from scratch by the experiment's full schedule (`pretrain`), write its
    weights to `out` and return its figures. on_test: score the test split too."""
    place, architecture = check_file(out), canonical(architecture)
    load_training(experiment.trainer)
    data = load(experiment.data, architecture.input, architecture.classes)
    check_trainable(experiment.pretrain, "pretrain", architecture, data)
    schedule = experiment.pretrain.model_copy(update={"epochs": epochs} if epochs else {})
    evaluator = Evaluator(experiment, data, architecture, place.parent)
    score, weights = evaluator.from_scratch(architecture, schedule, tick)
    store(place, weights, {"key": architecture.key})
    figures: dict[str, Any] = {"key": architecture.key, "weights": str(out), **score.as_dict()}
    if on_test:
        figures["test"] = score_test(architecture, weights, experiment, data)
    return figures


def score_test(
    architecture: Architecture, weights: Weights, experiment: Experiment, data: Data
) -> float:
    """Top-1 accuracy of trained weights on the test split."""
    network = build(architecture)
    network.load_state_dict(weights)
    batch_size = experiment.training.batch_size
    return test(network, data, batch_size=batch_size, where=experiment.trainer)


def _part(tick: Tick, done: int, repeats: int, share: float, accuracy: float | None) -> None:
    tick((done + share) / repeats, accuracy)


def facts_of(path: Path) -> dict[str, str]:
    """What stands with stored weights. Raises OSError, or SafetensorError where there are none."""
    with safe_open(path, "pt") as file:
        return dict(file.metadata() or {})


def store(path: Path, weights: Weights, facts: Mapping[str, str] | None = None) -> None:
    """Write weights as safetensors, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as draft:
        # Not by save_file, whose files none but their owner can read.
        draft.write_bytes(save(dict(weights), dict(facts or {})))
