"""From the sum of a network's parts to its latency: a line, and how well it predicts others."""

from collections.abc import Sequence
from typing import Self

import numpy as np

from nasattn.cost.latency import Floats, Latency, LatencyRefused
from nasattn.document import Strict
from nasattn.uncertainty import kendall


class Network(Latency):
    """A whole network. sum: what the plain backbone and its blocks add up to, before calibration.
    fit: whether a and b are fitted on it, or their error found."""

    sum: float
    fit: bool

    @classmethod
    def of(cls, latency: Latency, sum: float, *, fit: bool) -> Self:
        return cls(**latency.model_dump(), sum=round(sum, 9), fit=fit)

    def scaled(self, factor: float) -> Self:
        return super().scaled(factor).model_copy(update={"sum": round(factor * self.sum, 9)})


class Calibration(Strict):
    """latency = a + b * sum, by robust least squares on `n_fit` networks and the plain backbone.

    Found on `n_held_out` others: mape (mean absolute error as a share of the latency), within_5 and
    within_10 (the share of them predicted within 5 % and 10 %), kendall_tau (tau-b), and noise: the
    seconds that a prediction is too low by in one case of twenty (1.645 root mean square errors).
    """

    a: float
    b: float
    mape: float
    within_5: float
    within_10: float
    kendall_tau: float
    noise: float
    n_fit: int
    n_held_out: int


def calibrate(plain: float, networks: Sequence[Network]) -> Calibration:
    """The line on the fitted networks and (plain, plain), its error on the others.

    Raises LatencyRefused when the sums say nothing of the networks.
    """
    fitted, held_out = ([n for n in networks if n.fit == side] for side in (True, False))
    sums = np.array([plain, *(n.sum for n in fitted)])
    a, b = _robust_line(sums, np.array([plain, *(n.seconds for n in fitted)]))
    if not b > 0:
        raise LatencyRefused(
            f"whole networks do not take longer where their blocks do (b = {b:.3g}): the noise of "
            "this machine hides the blocks; delete the table and measure when it is idle"
        )
    truth = np.array([n.seconds for n in held_out])
    predicted = a + b * np.array([n.sum for n in held_out])
    errors = np.abs(predicted - truth)
    return Calibration(
        a=round(a, 9),
        b=round(b, 6),
        mape=round(float(np.mean(errors / truth)), 6),
        within_5=round(float(np.mean(errors <= 0.05 * truth)), 4),
        within_10=round(float(np.mean(errors <= 0.10 * truth)), 4),
        kendall_tau=round(kendall(predicted, truth)[0], 4),
        noise=round(1.645 * float(np.sqrt(np.mean(errors**2))), 9),
        n_fit=len(fitted),
        n_held_out=len(held_out),
    )


def _robust_line(x: Floats, y: Floats) -> tuple[float, float]:
    """a, b of y = a + b x by Huber's weights: what lies far off the line pulls no harder than what
    lies at 1.345 of the spread."""
    weights = np.ones_like(x)
    b, a = np.polyfit(x, y, 1)
    for _ in range(50):
        off = np.abs(y - a - b * x)
        limit = 1.345 * 1.4826 * np.median(off)
        weights = np.where(off <= limit, 1.0, limit / np.maximum(off, 1e-300))
        b, a = np.polyfit(x, y, 1, w=np.sqrt(weights))
    return float(a), float(b)
