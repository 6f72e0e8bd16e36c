"""What Lightning trains: a network with its loss, its optimiser and its accuracies."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from nasattn.config import Schedule
from nasattn.errors import TrialFailed
from nasattn.evaluate.checkpoint import Point, State
from nasattn.evaluate.rate import rate
from nasattn.model import inserted


class Classifier(pl.LightningModule):
    """Goes on from the epoch of `state`."""

    def __init__(
        self, network: nn.Module, schedule: Schedule, state: State, *, classes: int, layout: Any
    ) -> None:
        super().__init__()
        self.network = network
        self.schedule, self.state, self.layout = schedule, state, layout
        self.loss = nn.CrossEntropyLoss(label_smoothing=schedule.label_smoothing)
        tops = {"accuracy": 1} | ({"top5": 5} if classes > 5 else {})
        self.metrics = nn.ModuleDict(
            {
                name: MulticlassAccuracy(classes, top_k=k, average="micro")
                for name, k in tops.items()
            }
        )
        self.points: list[Point] = list(state.points)

    @property
    def epoch_steps(self) -> int:
        return int(self.trainer.num_training_batches)

    @property
    def step(self) -> int:
        """Steps done on the whole path; Lightning counts those since it was started."""
        return self.state.epoch * self.epoch_steps + int(self.global_step)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.network(x.to(memory_format=self.layout))
        return y

    def on_train_batch_start(self, batch: Any, index: int) -> None:
        now = rate(self.schedule, self.step, epoch_steps=self.epoch_steps, rung=self.state.rung)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = now * group["factor"]

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = batch
        loss: Tensor = self.loss(self(x), y)
        # A NaN stays in the weights, so looking now and then finds it without a sync a step.
        if (index % 16 == 0 or index + 1 == self.epoch_steps) and not loss.isfinite():
            raise TrialFailed(
                f"the loss is {loss.item()} at step {self.step}: `lr` may be too high"
            )
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        x, y = batch
        logits = self(x)
        if not logits.isfinite().all():
            raise TrialFailed(f"the network's output is not finite after step {self.step}")
        for metric in self.metrics.values():
            metric.update(logits, y)  # type: ignore[operator]

    def on_validation_epoch_end(self) -> None:
        values = {name: float(m.compute()) for name, m in self.metrics.items()}  # type: ignore[operator]
        for metric in self.metrics.values():
            metric.reset()  # type: ignore[operator]
        self.points.append(values)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return _optimizer(self.network, self.schedule)


def _optimizer(network: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    """Vectors and scalars (biases, norms, the blocks' zero-initialised scales) are not decayed.
    What was inserted learns at a rate of its own."""
    blocks = {id(p) for block in inserted(network).values() for p in block.parameters()}
    trained = [p for p in network.parameters() if p.requires_grad]
    groups = [
        {
            "params": [p for p in trained if (p.ndim > 1, id(p) in blocks) == (decayed, new)],
            "weight_decay": schedule.weight_decay * decayed,
            "factor": schedule.block_lr if new else 1.0,
        }
        for new in (False, True)
        for decayed in (True, False)
    ]
    groups = [group for group in groups if group["params"]]
    if schedule.optimizer == "sgd":
        momentum = schedule.momentum
        return torch.optim.SGD(groups, lr=schedule.lr, momentum=momentum, nesterov=momentum > 0)
    return torch.optim.AdamW(groups, lr=schedule.lr)
