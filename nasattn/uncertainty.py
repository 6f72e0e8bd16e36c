"""What a few seeds or pairs tell: means with intervals, how sure a frontier is, whether two orders
agree. No torch."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

LEVEL = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over n seeds and its 95 % interval, which a single seed cannot give (None)."""

    mean: float
    low: float | None
    high: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        """Student's t interval of the mean: mean ± t(n - 1) s / sqrt(n). Not cut off at 0 or 1."""
        from scipy.special import stdtrit  # not at the top: slow to load, and for this alone

        n, mean = len(values), float(np.mean(values))
        if n < 2:
            return cls(mean=mean, low=None, high=None, n=n)
        half = float(stdtrit(n - 1, (1 + LEVEL) / 2) * np.std(values, ddof=1) / np.sqrt(n))
        return cls(mean=mean, low=mean - half, high=mean + half, n=n)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def kendall(x: ArrayLike, y: ArrayLike) -> tuple[float, float]:
    """Kendall's rank correlation tau-b of n pairs, and how likely chance alone agrees as well.

    The probability is one-sided, by the normal approximation with a correction for continuity
    (Kendall 1970, Rank Correlation Methods) and the variance that there is without ties: where
    values tie it is too great and not, as by theirs, far too small. 0 and 1 where all are equal.
    """
    dx, dy = (np.sign(np.subtract.outer(v, v)) for v in map(np.asarray, (x, y)))
    agreement, n = float(np.sum(dx * dy)) / 2, len(dx)
    pairs = math.sqrt(np.sum(dx**2) * np.sum(dy**2)) / 2
    if not pairs:
        return 0.0, 1.0
    deviation = math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    return agreement / pairs, 0.5 * math.erfc((agreement - 1) / deviation / math.sqrt(2))


def membership(
    costs: ArrayLike, accuracies: ArrayLike, *, seed: int, draws: int = 10_000
) -> list[float] | None:
    """The probability of each of p points to be non-dominated, given n seeds' accuracies of each.

    costs: (p, m), known exactly; accuracies: (p, n), a column a seed. An accuracy is taken as the
    point's own mean, plus what a seed adds to all points (a better backbone: it changes no
    comparison), plus noise of one variance for all. From a flat prior the means' posterior given
    the variance is normal, and the variance is the residuals' sum of squares over a chi-square of
    (p - 1)(n - 1) degrees; so two points differ by a t with as many. Counts draws of it. The
    finite validation or test split is no part of it. None for one seed: its noise is unknown.
    """
    table, prices = np.asarray(accuracies, np.float64), np.asarray(costs, np.float64)
    points, seeds = table.shape
    if points == 1:
        return [1.0]
    if seeds < 2:
        return None
    means = table.mean(axis=1)
    residuals = table - means[:, None] - table.mean(axis=0) + table.mean()
    rng = np.random.default_rng(seed)
    freedom = (points - 1) * (seeds - 1)
    scale = np.sqrt(np.sum(residuals**2) / rng.chisquare(freedom, draws) / seeds)
    drawn = means + scale[:, None] * rng.standard_normal((draws, points))
    shares = []
    for i, price in enumerate(prices):
        rivals = np.all(prices <= price, axis=1)
        cheaper = rivals & np.any(prices < price, axis=1)
        better = drawn[:, rivals] > drawn[:, [i]]
        equal = drawn[:, cheaper] >= drawn[:, [i]]
        shares.append(1 - np.mean(better.any(axis=1) | equal.any(axis=1)))
    return [float(share) for share in shares]
