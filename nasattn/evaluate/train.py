"""The only training loop: Lightning's, around one classifier, the same for every network.

A training is a function of (network, data, schedule, seed): on the CPU with the same number of
threads, or on the same kind of GPU, it gives the same weights bit for bit, also when it was
interrupted and went on. So that there is no other way than the one that is tested, every leg of it
starts from a State.
"""

import gc
import logging
import re
import time
import warnings
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from pytorch_lightning.callbacks import Callback, EMAWeightAveraging
from torch import Tensor, nn

from nasattn.config import Schedule, TrainerFile
from nasattn.data import Data
from nasattn.errors import Stopped, TrialFailed
from nasattn.evaluate import Tick
from nasattn.evaluate.checkpoint import (
    Checkpoints,
    State,
    copies,
    generators,
    generators_kept,
    held,
    optimizer_tensors,
    put,
    put_generators,
    put_optimizer,
    seed_generators,
)
from nasattn.evaluate.classifier import Classifier
from nasattn.evaluate.device import alike, repeatable
from nasattn.record import Score

# Lightning's advice that does not hold for many short trainings on small data.
NOISE = (
    ".*does not have many workers.*",
    ".*is smaller than the logging interval.*",
    ".*GPU available but not used.*",
    ".*MPS available but not used.*",
    ".*`srun` command is available.*",  # Slurm is at hand; each worker is one process
    ".*`_pytree`.*",
    ".*isinstance\\(treespec, LeafSpec\\).*",
    ".*deterministic.*",  # device.alike notes it
)


class _Mean(EMAWeightAveraging):
    """The running mean of the weights, with what a State holds of it."""

    def tensors(self) -> Mapping[str, Tensor]:
        assert self._average_model is not None
        return held(self._average_model)

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        if tensors:
            assert self._average_model is not None
            put(self._average_model, tensors)


class _Keeper(Callback):
    """Starts a leg from a State, makes one after every epoch, and tells how far the training is.
    done: called with each step that is, of training or validation."""

    def __init__(
        self,
        state: State,
        until: int,
        mean: _Mean | None,
        run: "_Run",
        done: Callable[[str], None],
    ) -> None:
        self.state, self.start, self.until = state, state, until
        self.mean, self.run, self.done = mean, run, done

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        put_optimizer(trainer.optimizers[0], self.state.part("optimizer"))
        if self.mean:
            self.mean.put(self.state.part("mean"))
        if self.state.scaler:
            trainer.precision_plugin.load_state_dict(self.state.scaler)
        seed_generators(self.run.seed)
        if self.state.random:
            put_generators(self.state.part("random"), self.state.random)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        self.done(f"{pl_module.step}")
        self._report(pl_module)

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, index: int, *rest: Any
    ) -> None:
        self.done(f"{pl_module.step}+{index}")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        epoch = self.state.epoch + 1
        facts: dict[str, Any] = {
            "epoch": epoch,
            "spent": self.state.spent + 1,
            "points": tuple(pl_module.points),
        }
        if epoch == self.until or self.run.checkpoints:
            facts |= self._capture(trainer, pl_module)
        self.state = replace(self.state, **facts)
        self.run.write(self.state)
        self._report(pl_module)

    def _capture(self, trainer: Any, module: Any) -> dict[str, Any]:
        tensors, others = generators()
        parts = {
            "network": held(module.network),
            "optimizer": optimizer_tensors(trainer.optimizers[0]),
            "mean": self.mean.tensors() if self.mean else {},
            "random": tensors,
        }
        return {
            "seconds": self.run.seconds,
            "scaler": trainer.precision_plugin.state_dict(),
            "random": others,
            "tensors": dict(ChainMap(*(copies(name, part) for name, part in parts.items()))),
        }

    def _report(self, module: Any) -> None:
        spent = self.start.spent + module.global_step / module.epoch_steps
        last = module.points[-1]["accuracy"] if module.points else None
        self.run.tick(min(1.0, spent / self.run.planned), last)


class _Run:
    """One training: a trunk, and for each rung a decay that branches off it."""

    TRUNK, DECAY = "trunk", "decay"

    def __init__(
        self,
        network: nn.Module,
        data: Data,
        schedule: Schedule,
        *,
        seed: int,
        where: TrainerFile,
        batches: int | None,
        tick: Tick,
        rungs: Sequence[int],
        checkpoints: Checkpoints | None,
    ) -> None:
        self.network, self.data, self.schedule, self.seed = network, data, schedule, seed
        self.where, self.batches, self.tick, self.rungs = where, batches, tick, rungs
        self.checkpoints = checkpoints
        self.first = State(tensors=copies("network", held(network)))
        self.planned = rungs[-1] + sum(schedule.decay_epochs(rung) for rung in rungs[:-1])
        self.layout = torch.channels_last if where.channels_last else torch.contiguous_format
        network.to(memory_format=self.layout)

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.begun

    def __call__(self) -> tuple[State, State]:
        """The trunk and the last rung's decay; the network has the latter's weights."""
        self.begun = time.perf_counter()
        trunk = self.read(self.TRUNK) or self.first
        decay = self.read(self.DECAY)
        self.before = max(trunk.seconds, decay.seconds if decay else 0.0)
        for rung in self.rungs:
            if rung != self.rungs[-1] and str(rung) in trunk.rungs:
                continue
            if decay is None or decay.rung != rung:
                trunk = self.leg(trunk, rung - self.schedule.decay_epochs(rung))
                decay = replace(trunk, rung=rung)
            decay = self.leg(decay, rung)
            trunk = replace(
                trunk,
                rungs={**trunk.rungs, str(rung): decay.points[-1]},
                spent=decay.spent,
                seconds=decay.seconds,
            )
            if rung != self.schedule.epochs:
                self.write(trunk)
        assert decay is not None
        return trunk, decay

    def leg(self, state: State, until: int) -> State:
        """Go on from a state up to an epoch of its path. Only a rung's end is validated, but every
        epoch on the way that all trainings go."""
        put(self.network, state.part("network"))
        if state.epoch >= until:
            if means := state.part("mean"):
                inner = "module.network."
                put(self.network, {k.removeprefix(inner): v for k, v in means.items()})
            return state
        classifier = Classifier(
            self.network,
            self.schedule,
            state,
            classes=self.data.classes,
            layout=self.layout,
        )
        mean = _Mean(decay=self.schedule.ema) if self.schedule.ema else None
        aside = state.rung not in (None, self.schedule.epochs)
        size = self.schedule.batch_size
        train = self.data.loader("train", size, self.seed, first=state.epoch)
        with self.checkpoints.steps() if self.checkpoints else nullcontext(_nobody) as done:
            keeper = _Keeper(state, until, mean, self, done)
            trainer = _trainer(
                self.where,
                self.schedule,
                [mean, keeper] if mean else [keeper],
                epochs=until - state.epoch,
                validate_every=until - state.epoch if aside else 1,
                batches=self.batches,
            )
            trainer.fit(classifier, train, self.data.loader("val", size, self.seed))
        return keeper.state

    def read(self, name: str) -> State | None:
        return self.checkpoints.read(name, self.network) if self.checkpoints else None

    def write(self, state: State) -> None:
        if self.checkpoints:
            self.checkpoints.write(self.TRUNK if state.rung is None else self.DECAY, state)


def _nobody(text: str) -> None:
    """Is told of steps, and more, where there are no checkpoints."""


def fit(
    network: nn.Module,
    data: Data,
    schedule: Schedule,
    *,
    seed: int,
    where: TrainerFile,
    batches: int | None = None,
    tick: Tick = lambda share, accuracy: None,
    rungs: Sequence[int] = (),
    checkpoints: Checkpoints | None = None,
) -> Score:
    """Train the network in place and score it on the validation split after every epoch.

    The score is that of the last epoch (of the weights' running mean with `ema`), never the best
    one: choosing an epoch by its validation accuracy would flatter it. batches: stop each epoch
    after so many, to time them. rungs: epochs of the rungs to measure on the way, the last one to
    end at (default: the whole schedule alone). checkpoints: where the state is kept after every
    epoch; the training goes on from there. Raises TrialFailed with the reason when the loss is not
    finite or memory runs out.
    """
    run = _Run(
        network,
        data,
        schedule,
        seed=seed,
        where=where,
        batches=batches,
        tick=tick,
        rungs=rungs or (schedule.epochs,),
        checkpoints=checkpoints,
    )
    with _training(where), generators_kept():
        trunk, decay = alike(run, checkpoints.note if checkpoints else _nobody)
    whole = decay.points if decay.rung == schedule.epochs else trunk.points
    last = decay.points[-1]
    return Score(
        accuracy=last["accuracy"],
        curve=tuple(point["accuracy"] for point in whole),
        epochs=decay.spent,
        seconds=decay.seconds,
        seed=seed,
        evaluator="train",
        top5=last.get("top5"),
        rungs=tuple(trunk.rungs[str(rung)]["accuracy"] for rung in rungs),
    )


def test(network: nn.Module, data: Data, *, batch_size: int, where: TrainerFile) -> float:
    """Top-1 accuracy on the test split."""
    layout = torch.channels_last if where.channels_last else torch.contiguous_format
    classifier = Classifier(
        network,
        Schedule(batch_size=batch_size),
        State(tensors={}),
        classes=data.classes,
        layout=layout,
    )

    def validate() -> None:
        trainer = _trainer(where, classifier.schedule, [])
        trainer.validate(classifier, data.loader("test", batch_size, 0), verbose=False)

    with _training(where):
        alike(validate, _nobody)
    return classifier.points[-1]["accuracy"]


def _trainer(
    where: TrainerFile,
    schedule: Schedule,
    callbacks: list[Callback],
    *,
    epochs: int = 1,
    validate_every: int = 1,
    batches: int | None = None,
) -> pl.Trainer:
    return pl.Trainer(
        accelerator=where.accelerator,
        devices=1,  # with more, Lightning would start the whole command again for each
        precision=where.precision,
        max_epochs=epochs,
        check_val_every_n_epoch=validate_every,
        gradient_clip_val=schedule.clip or None,
        callbacks=callbacks,
        limit_train_batches=batches or schedule.epoch_steps,
        limit_val_batches=batches,
        # In a job of Slurm, Lightning would take this for one process of several.
        plugins=[LightningEnvironment()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


@contextmanager
def _training(where: TrainerFile) -> Iterator[None]:
    """Threads set, the same bits each time, Lightning silent, memory given back, and every known
    failure as TrialFailed."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    levels = [logger.level for logger in loggers]
    threads = torch.get_num_threads()
    torch.set_num_threads(where.threads)
    # Lightning's objects hold one another, so only the collector gives them back. What was there
    # before is kept out of its sight: to look through all of torch takes .4 s.
    gc.freeze()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), repeatable(where):
            for pattern in NOISE:
                warnings.filterwarnings("ignore", pattern)
            yield
    except SystemExit:
        # Lightning turns Ctrl-C into an exit; a search wants to end in its own way.
        raise KeyboardInterrupt from None
    except (TrialFailed, Stopped) as error:
        if (said := _said(error)) == str(error):
            raise
        raise type(error)(said) from error
    except MemoryError:
        raise TrialFailed("out of memory") from None
    except RuntimeError as error:
        if re.search("out of memory|allocate memory", str(error)):
            raise TrialFailed(f"out of memory: {_said(error).splitlines()[0]}") from None
        raise
    finally:
        torch.set_num_threads(threads)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        gc.collect()
        gc.unfreeze()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _said(error: Exception) -> str:
    """The words of an error. From a loader's process it comes with the traceback there, which ends
    with its type and them."""
    text = str(error)
    if not text.startswith("Caught "):
        return text
    return re.split(rf"^(?:\w+\.)*{type(error).__name__}: ", text, flags=re.MULTILINE)[-1].rstrip()
