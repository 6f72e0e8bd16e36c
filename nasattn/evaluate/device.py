"""The device that a training is on: whether it is there, and that it computes alike each time."""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from nasattn.config import TrainerFile
from nasattn.errors import UserError
from nasattn.evaluate import on_cuda

T = TypeVar("T")


def check(where: TrainerFile) -> None:
    """A UserError where this machine has not the device that is asked for."""
    mps = torch.backends.mps.is_available()
    there = {"gpu": torch.cuda.is_available() or mps, "mps": mps}
    if not there.get(where.accelerator, True):
        allowed = ", ".join(["auto", "cpu", *(name for name, found in there.items() if found)])
        raise UserError(
            f"trainer.accelerator: got {where.accelerator}, but torch finds none here; allowed: "
            f"{allowed}"
        )
    on_cpu = where.accelerator == "cpu" or not there["gpu"]
    if on_cpu and where.precision == "16-mixed":  # Lightning would take bf16-mixed
        raise UserError(
            "trainer.precision: got 16-mixed, which is for GPUs; allowed on the CPU: 32-true, "
            "bf16-mixed"
        )


@contextmanager
def repeatable(where: TrainerFile) -> Iterator[None]:
    """On a GPU kernels that add in the same order each time; what has none raises RuntimeError."""
    settings: Any = torch.utils.deterministic
    fills = settings.fill_uninitialized_memory
    on = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    if on_cuda(where):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS has none
        settings.fill_uninitialized_memory = False  # it would only take time
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(on, warn_only=warns)
        settings.fill_uninitialized_memory = fills


def alike(work: Callable[[], T], note: Callable[[str], None]) -> T:
    """What `work` gives within `repeatable`; where a kernel is not deterministic it is noted, and
    the work done anew with what deterministic ones there are."""
    try:
        return work()
    except RuntimeError as error:
        text = str(error)
        if "does not have a deterministic" not in text and not text.startswith("Deterministic"):
            raise
    # Not in the handler: the error holds all that was computed until it came.
    why = text.partition(", but")[0]
    if "CuBLAS" in text:
        why = "something came before CUBLAS_WORKSPACE_CONFIG=:4096:8 was set"
    note(f"not the same bits each time on a GPU: {why}")
    gc.collect()
    torch.use_deterministic_algorithms(True, warn_only=True)
    return work()
