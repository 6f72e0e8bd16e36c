"""The only training loop: Lightning's, around one classifier, the same for every network.

A training is a function of (network, data, schedule, seed): on the CPU with the same number of
threads it gives the same weights bit for bit.
"""

import gc
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, EMAWeightAveraging
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, OneCycleLR, SequentialLR
from torchmetrics.classification import MulticlassAccuracy

from nasattn.config import Schedule, TrainerFile
from nasattn.data import Data
from nasattn.errors import TrialFailed
from nasattn.record import Score

Tick = Callable[[float, float | None], None]  # (share of the training done, last accuracy)

# Lightning's advice that does not hold for many short trainings on small data.
NOISE = (
    ".*does not have many workers.*",
    ".*is smaller than the logging interval.*",
    ".*GPU available but not used.*",
    ".*MPS available but not used.*",
    ".*`_pytree`.*",
    ".*isinstance\\(treespec, LeafSpec\\).*",
)


class Classifier(pl.LightningModule):
    """A network with its loss, its optimiser and its accuracies."""

    def __init__(
        self, network: nn.Module, schedule: Schedule, *, steps: int, classes: int, layout: Any
    ) -> None:
        super().__init__()
        self.network = network
        self.schedule, self.steps, self.layout = schedule, steps, layout
        self.loss = nn.CrossEntropyLoss(label_smoothing=schedule.label_smoothing)
        tops = {"accuracy": 1} | ({"top5": 5} if classes > 5 else {})
        self.metrics = nn.ModuleDict(
            {
                name: MulticlassAccuracy(classes, top_k=k, average="micro")
                for name, k in tops.items()
            }
        )
        self.curve: list[dict[str, float]] = []

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.network(x.to(memory_format=self.layout))
        return y

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = batch
        loss: Tensor = self.loss(self(x), y)
        # A NaN stays in the weights, so looking now and then finds it without a sync a step.
        if (index % 16 == 0 or self.global_step + 1 == self.steps) and not loss.isfinite():
            raise TrialFailed(f"the loss is {loss.item()} at step {self.global_step}")
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        x, y = batch
        logits = self(x)
        if not logits.isfinite().all():
            raise TrialFailed(f"the network's output is not finite after step {self.global_step}")
        for metric in self.metrics.values():
            metric.update(logits, y)  # type: ignore[operator]

    def on_validation_epoch_end(self) -> None:
        values = {name: float(m.compute()) for name, m in self.metrics.items()}  # type: ignore[operator]
        for metric in self.metrics.values():
            metric.reset()  # type: ignore[operator]
        self.curve.append(values)

    def configure_optimizers(self) -> Any:
        optimizer = _optimizer(self.network, self.schedule)
        scheduler = _scheduler(optimizer, self.schedule, self.steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def _optimizer(network: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    """Vectors and scalars (biases, norms, the blocks' zero-initialised scales) are not decayed."""
    trained = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": schedule.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if schedule.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=schedule.lr, momentum=schedule.momentum, nesterov=True)
    return torch.optim.AdamW(groups, lr=schedule.lr)


def _scheduler(optimizer: torch.optim.Optimizer, schedule: Schedule, steps: int) -> Any:
    """The rate rises over the warm-up from a tenth to `lr`, then falls along a cosine to 0."""
    rise = schedule.warmup * steps
    if schedule.schedule == "onecycle" and rise > 1 and steps - rise > 1:
        return OneCycleLR(
            optimizer,
            max_lr=schedule.lr,
            total_steps=steps + 1,  # Lightning steps once more behind the last batch
            pct_start=schedule.warmup,
            div_factor=10.0,
            final_div_factor=100.0,
            cycle_momentum=False,
        )
    fall = CosineAnnealingLR(optimizer, T_max=max(1, steps - round(rise)))
    if round(rise) == 0:
        return fall
    warm = LinearLR(optimizer, start_factor=0.1, total_iters=round(rise))
    return SequentialLR(optimizer, [warm, fall], milestones=[round(rise)])


class _Reporter(Callback):
    """Hands the share done and the last accuracy to whoever shows them."""

    def __init__(self, tick: Tick) -> None:
        self.tick = tick

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
        self._report(pl_module)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._report(pl_module)

    def _report(self, module: Any) -> None:
        last = module.curve[-1]["accuracy"] if module.curve else None
        self.tick(module.global_step / module.steps, last)


def fit(
    network: nn.Module,
    data: Data,
    schedule: Schedule,
    *,
    seed: int,
    where: TrainerFile,
    evaluator: str = "train",
    batches: int | None = None,
    tick: Tick = lambda share, accuracy: None,
) -> Score:
    """Train the network in place and score it on the validation split after every epoch.

    The score is that of the last epoch (of the weights' running mean with `ema`), never the best
    one: choosing an epoch by its validation accuracy would flatter it. batches: stop each epoch
    after so many, to time them. Raises TrialFailed with the reason when the loss is not finite or
    memory runs out.
    """
    start = time.perf_counter()
    torch.manual_seed(seed)
    train = data.loader("train", schedule.batch_size, seed)
    layout = torch.channels_last if where.channels_last else torch.contiguous_format
    network.to(memory_format=layout)
    classifier = Classifier(
        network,
        schedule,
        steps=(batches or len(train)) * schedule.epochs,
        classes=data.classes,
        layout=layout,
    )
    callbacks: list[Callback] = [_Reporter(tick)]
    if schedule.ema:
        callbacks.append(EMAWeightAveraging(decay=schedule.ema))
    with _training(where):
        trainer = _trainer(where, schedule, callbacks, batches)
        trainer.fit(classifier, train, data.loader("val", schedule.batch_size, seed))
    last = classifier.curve[-1]
    return Score(
        accuracy=last["accuracy"],
        curve=tuple(point["accuracy"] for point in classifier.curve),
        epochs=schedule.epochs,
        seconds=time.perf_counter() - start,
        seed=seed,
        evaluator=evaluator,
        top5=last.get("top5"),
    )


def test(network: nn.Module, data: Data, *, batch_size: int, where: TrainerFile) -> float:
    """Top-1 accuracy on the test split."""
    layout = torch.channels_last if where.channels_last else torch.contiguous_format
    classifier = Classifier(
        network, Schedule(batch_size=batch_size), steps=1, classes=data.classes, layout=layout
    )
    with _training(where):
        trainer = _trainer(where, classifier.schedule, [])
        trainer.validate(classifier, data.loader("test", batch_size, 0), verbose=False)
    return classifier.curve[-1]["accuracy"]


def _trainer(
    where: TrainerFile, schedule: Schedule, callbacks: list[Callback], batches: int | None = None
) -> pl.Trainer:
    return pl.Trainer(
        accelerator=where.accelerator,
        devices=where.devices,
        precision=where.precision,
        max_epochs=schedule.epochs,
        gradient_clip_val=schedule.clip or None,
        callbacks=callbacks,
        limit_train_batches=batches,
        limit_val_batches=batches,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )


@contextmanager
def _training(where: TrainerFile) -> Iterator[None]:
    """Threads set, Lightning silent, memory given back, and every known failure as TrialFailed."""
    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    levels = [logger.level for logger in loggers]
    threads = torch.get_num_threads()
    torch.set_num_threads(where.threads)
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for pattern in NOISE:
                warnings.filterwarnings("ignore", pattern)
            yield
    except SystemExit:
        # Lightning turns Ctrl-C into an exit; a search wants to end in its own way.
        raise KeyboardInterrupt from None
    except MemoryError:
        raise TrialFailed("out of memory") from None
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise TrialFailed(f"out of memory: {str(error).splitlines()[0]}") from None
        raise
    finally:
        torch.set_num_threads(threads)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def weights_of(network: nn.Module) -> Mapping[str, Tensor]:
    """The state_dict as plain contiguous CPU tensors, ready to be stored."""
    return {
        key: value.detach().to("cpu", copy=True).contiguous()
        for key, value in network.state_dict().items()
    }
