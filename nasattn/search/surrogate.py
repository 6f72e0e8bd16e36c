"""What a search learns, and what it is worth: a Gaussian process and the expected growth of the
hypervolume, both exact. All objectives are minimised. numpy and scipy only.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular
from scipy.special import ndtr

Floats = NDArray[np.float64]
TUNED = 100  # rows the hyperparameters are chosen on
Shortfall = Callable[[Floats], Floats]  # thresholds (k,) -> expected max(0, t - value), (k, n)


def non_dominated(points: Floats) -> NDArray[np.int64]:
    """Indices of the non-dominated points, one of equal ones. Quick where the front is small."""
    spread = np.ptp(points, axis=0)
    left = np.argsort((points / np.where(spread > 0, spread, 1.0)).sum(axis=1), kind="stable")
    front = []
    while len(left):  # the least sum is dominated by none that is left
        front.append(left[0])
        left = left[np.any(points[left] < points[left[0]], axis=1)]
    return np.array(sorted(front), dtype=np.int64)


class Undominated:
    """The volume below the reference (m,) that a front (k, m) does not dominate, cut into boxes."""

    def __init__(self, front: Floats, reference: Floats) -> None:
        front = front[np.all(front < reference, axis=1)]
        front = front[np.argsort(front[:, -1], kind="stable")]
        self.edges = np.append(front[:, -1], reference[-1])
        self.heights = np.append(reference[0], np.minimum.accumulate(front[:, 0]))
        self.axes, self.slabs = len(reference), dict[int, Undominated]()
        if self.axes > 2:  # k: the slab that ends at edge k, open to the members below it
            for k in np.flatnonzero(np.diff(self.edges, prepend=-np.inf)).tolist():
                self.slabs[k] = Undominated(_thinned(front[:k, :-1]), reference[:-1])

    def growth(self, shortfalls: Sequence[Shortfall]) -> Floats:
        """How much of it each of n candidates is expected to take, exactly: (n,).

        Each axis is given by the expected shortfall E[max(0, t - Y)] of the candidates' values
        below a threshold; axes are independent. A box's share is the product over the axes of the
        differences of shortfalls.
        """
        if self.axes == 1:
            return np.asarray(shortfalls[0](self.edges[:1])[0])
        parts = np.diff(shortfalls[-1](self.edges), axis=0, prepend=0.0)
        if self.axes == 2:
            return np.asarray((parts * shortfalls[0](self.heights)).sum(axis=0))
        return sum(
            (
                parts[k] * slab.growth(shortfalls[:-1])
                for k, slab in self.slabs.items()
                if parts[k].any()
            ),
            start=np.zeros(parts.shape[1]),
        )


def _thinned(points: Floats) -> Floats:
    return points[non_dominated(points)] if len(points) else points


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the model sees of n rows. options: one-hot (n, .); counts: how often each value is taken
    by any parameter (n, .); costs: scaled (n, .); parameters: how many there are."""

    options: Floats
    counts: Floats
    costs: Floats
    parameters: int

    def joined(self, other: "Inputs") -> "Inputs":
        return Inputs(
            np.vstack([self.options, other.options]),
            np.vstack([self.counts, other.counts]),
            np.vstack([self.costs, other.costs]),
            self.parameters,
        )

    def last(self, n: int) -> "Inputs":
        return Inputs(self.options[-n:], self.counts[-n:], self.costs[-n:], self.parameters)


def _squared(a: Floats, b: Floats) -> Floats:
    apart = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T
    return np.asarray(np.maximum(apart, 0.0))


class Process:
    """A Gaussian process of log(value - floor) over parameters and their known costs.

    Its kernel has four parts: exp(-P * share of parameters that differ); exp(-P * distance of how
    often each option is taken), whatever the parameter; weighted by `a`, a radial function of the
    costs; and, weighted by TREND, the linear and quadratic function of how often each option is
    taken. The first three fall back to the mean where nothing is near; the trend goes on beyond
    what was seen, where the best are. `a` and the noise have the greatest marginal likelihood on a
    small grid, the rest is fixed (experiments/004_samplers).
    """

    P, WIDTH, TREND, MARGIN = 1.5, 0.6, 16.0, 0.3
    A, NOISE = (0.1, 1.0), (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)

    def __init__(self, inputs: Inputs, values: Floats) -> None:
        self.inputs = inputs
        spread = float(np.median(values) - values.min()) or float(np.ptp(values)) or 1.0
        self.floor = float(values.min()) - self.MARGIN * spread
        self.targets = np.log(values - self.floor)
        self.mean = float(self.targets.mean())
        self._tune()
        self._condition()

    def believe(self, inputs: Inputs) -> Floats:
        """Take the medians predicted for these rows for their values from now on; returned."""
        mean, _ = self._moments(inputs)
        self.inputs = self.inputs.joined(inputs)
        self.targets = np.append(self.targets, mean)
        self._condition()
        return np.asarray(np.exp(mean) + self.floor)

    def predict(self, inputs: Inputs) -> Shortfall:
        mean, std = self._moments(inputs)
        return log_normal(mean, std, self.floor)

    def _moments(self, inputs: Inputs) -> tuple[Floats, Floats]:
        across = _mixed(_near(inputs, self.inputs), self.a)
        mean = self.mean + across @ self.weights
        explained = ((across @ self.half) ** 2).sum(axis=1)
        own = _trend((inputs.counts**2).sum(axis=1), inputs.parameters)
        prior = _mixed((2.0 + own, np.ones(len(own))), self.a)
        variance = np.maximum(prior - explained, 1e-6) * max(self.scale, 1e-8)
        return mean, np.sqrt(variance)

    def _tune(self) -> None:
        few = self.inputs.last(TUNED)
        target = self.targets[-TUNED:] - self.mean
        near = _near(few, few)
        noise = np.array(self.NOISE)[:, None]
        best = math.inf
        for a in self.A:
            values, vectors = np.linalg.eigh(_mixed(near, a))
            values = np.maximum(values, 0.0) + noise
            scale = ((vectors.T @ target) ** 2 / values).mean(axis=1)
            loss = len(target) * np.log(scale + 1e-12) + np.log(values).sum(axis=1)
            if (least := float(loss.min())) < best:
                best, i = least, int(loss.argmin())
                self.a, self.noise, self.scale = a, self.NOISE[i], float(scale[i])

    def _condition(self) -> None:
        kernel = _mixed(_near(self.inputs, self.inputs), self.a)
        lower = np.linalg.cholesky(kernel + self.noise * np.eye(len(kernel)))
        self.half = solve_triangular(lower, np.eye(len(lower)), lower=True).T
        self.weights = self.half @ (self.half.T @ (self.targets - self.mean))


def _looked_up(function: Callable[[Floats], Floats], wholes: Floats) -> Floats:
    """The function of whole numbers, by a table where they are few: exponentials take longer."""
    most = int(wholes.max(initial=0)) + 1
    if most > wholes.size:
        return function(wholes)
    return np.asarray(function(np.arange(float(most)))[wholes.astype(np.intp)])


def _trend(products: Floats, parameters: int) -> Floats:
    """By the scalar products of the counts."""
    shares = products / parameters**2
    return np.asarray(Process.TREND * (shares + shares**2))


def _near(these: Inputs, those: Inputs) -> tuple[Floats, Floats]:
    """What the kernel makes of the parameters and of the costs: (n, k) each."""
    n, p = these.parameters, Process.P
    agree = these.options @ those.options.T
    apart = _squared(these.counts, those.counts)
    by_agree = _looked_up(lambda k: np.exp(-p * (1.0 - k / n)), agree)
    by_apart = _looked_up(lambda k: np.exp(-p * (np.sqrt(k / 2) / n)), apart)
    trend = _trend(these.counts @ those.counts.T, n)
    costs = np.exp(-0.5 * _squared(these.costs, those.costs) / Process.WIDTH**2)
    return by_agree + by_apart + trend, costs


def _mixed(near: tuple[Floats, Floats], a: float) -> Floats:
    """Both in one scale."""
    return np.asarray((near[0] + a * near[1]) / (2 + a + Process.TREND))


def log_normal(mean: Floats, std: Floats, floor: float) -> Shortfall:
    """The expected shortfall of floor + exp(N(mean, std^2)), in closed form."""
    expected = np.exp(mean + 0.5 * std**2)

    def shortfall(thresholds: Floats) -> Floats:
        room = np.maximum(thresholds - floor, 1e-300)[:, None]
        z = (np.log(room) - mean) / std
        return np.asarray(room * ndtr(z) - expected * ndtr(z - std))

    return shortfall


def exactly(values: Floats) -> Shortfall:
    """Of values that are known."""
    return lambda t: np.maximum(t[:, None] - values, 0.0)
