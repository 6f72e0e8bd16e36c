"""How well a candidate does: `train` trains it."""

from collections.abc import Callable

from nasattn.config import TrainerFile

Tick = Callable[[float, float | None], None]  # (share of the training done, last accuracy)


def on_cuda(where: TrainerFile) -> bool:
    """Whether a training of this process is on a GPU of CUDA's."""
    if where.accelerator not in ("auto", "gpu"):
        return False
    import torch  # not at the top: what runs a worker elsewhere needs none

    return torch.cuda.is_available()
