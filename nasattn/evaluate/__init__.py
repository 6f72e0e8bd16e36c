"""How well a candidate does: `train` trains it."""

from collections.abc import Callable

Tick = Callable[[float, float | None], None]  # (share of the training done, last accuracy)
