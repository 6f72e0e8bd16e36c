"""What a search learns, and what it is worth: a Gaussian process and the expected growth of the
hypervolume, by their closed forms. All objectives are minimised. numpy and scipy only.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular
from scipy.special import ndtr

from nasattn.pareto import undominated

Floats = NDArray[np.floating[Any]]
FITTED = 200  # rows the linear stand-in is fitted to
TUNED = 100  # rows the hyperparameters are chosen on
ROUNDS = 3  # of the parameters' weights
ROUNDED = 1e-9  # of the largest value: what differs by less is equal but for rounding
BOXED = 2_000_000  # boxes times candidates looked at together
Shortfall = Callable[[Floats], Floats]  # thresholds (k,) -> expected max(0, t - value), (k, n)


class Undominated:
    """The volume below the reference (m,) that a front (k, m) does not dominate."""

    def __init__(self, front: Floats, reference: Floats) -> None:
        self.edges, lower, upper = undominated(front, reference)
        self.sides = list(zip(lower.T, upper.T, strict=True))

    def growth(self, shortfalls: Sequence[Shortfall]) -> Floats:
        """How much of it each of n candidates is expected to take, exactly: (n,).

        Each axis is given by the expected shortfall E[max(0, t - Y)] of the candidates' values
        below a threshold; axes are independent. A box's share is the product over the axes of the
        differences of shortfalls.
        """
        below = [shortfall(edges) for shortfall, edges in zip(shortfalls, self.edges, strict=True)]
        below = [np.vstack([np.zeros(values.shape[1]), values]) for values in below]
        found = np.zeros(below[0].shape[1])
        step = max(1, BOXED // max(1, len(found)))
        for k in range(0, len(self.sides[0][0]), step):
            shares = np.ones((1, 1))
            for values, (low, high) in zip(below, self.sides, strict=True):
                side = values[high[k : k + step]]
                if low.any():
                    side -= values[low[k : k + step]]
                shares = shares * side
            found += shares.sum(axis=0)
        return found


@dataclass(frozen=True, slots=True)
class Coding:
    """How the one-hot options of a row lie (o). starts: where each parameter's begin; values: the
    distinct value that each option is, whatever its parameter, one-hot (o, v)."""

    starts: NDArray[np.intp]
    values: Floats

    @property
    def parameters(self) -> int:
        return len(self.starts)

    def weighted(self, weights: Floats) -> Floats:
        """`values` by a weight for each parameter: options @ this are the weighted counts of how
        often each value is taken."""
        sizes = np.diff([*self.starts, len(self.values)])
        return np.asarray(self.values * np.repeat(weights, sizes)[:, None], dtype=np.float32)


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the model sees of n rows. options: one-hot (n, o); costs: scaled (n, .)."""

    options: Floats
    costs: Floats
    coding: Coding

    def joined(self, other: "Inputs") -> "Inputs":
        options = np.vstack([self.options, other.options])
        return Inputs(options, np.vstack([self.costs, other.costs]), self.coding)

    def last(self, n: int) -> "Inputs":
        return Inputs(self.options[-n:], self.costs[-n:], self.coding)


def weights_of(inputs: Inputs, targets: Floats, unlike: float) -> Floats:
    """How much each parameter matters, beside a mean of 1: (p,). unlike: the deviation from 1 that
    is expected; 0: all matter alike.

    The targets as the sum over the parameters of weight times value, where a value is worth the
    same at each parameter: both in turn by ridge regression, the weights drawn towards 1. Some
    sites of a network matter more than others, whatever stands there.
    """
    coding, weights = inputs.coding, np.ones(inputs.coding.parameters)
    if not unlike:
        return weights
    targets = targets - targets.mean()
    for _ in range(ROUNDS):
        x = inputs.options @ coding.weighted(weights)
        if len(x) < x.shape[1]:  # the same by the rows, of which there are fewer than values
            worth = x.T @ np.linalg.solve(x @ x.T + np.eye(len(x)), targets)
        else:
            worth = np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ targets)
        parts = np.add.reduceat(inputs.options * (coding.values @ worth), coding.starts, axis=1)
        noise = max(float(np.mean((targets - parts @ weights) ** 2)), 1e-3)
        matrix = parts.T @ parts + noise / unlike**2 * np.eye(len(weights))
        weights = 1 + np.linalg.solve(matrix, parts.T @ (targets - parts.sum(axis=1)))
        weights = np.clip(weights, 0.1, 3.0)
        weights /= weights.mean()
    return np.asarray(weights)


def _squared(a: Floats, b: Floats) -> Floats:
    apart = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2 * a @ b.T
    return np.asarray(np.maximum(apart, 0.0))


class GaussianProcess:
    """A Gaussian process of log(value - floor) over parameters and their known costs.

    Its kernel has four parts: exp(-P * share of parameters that differ); exp(-P * distance of how
    often each option is taken), whatever the parameter, or where those that matter more count for
    more; weighted by `a`, a radial function of the costs; and, weighted by TREND, the linear and
    quadratic function of how often each option is taken, counted likewise. The first three fall
    back to the mean where nothing is near; the trend goes on beyond what was seen, where the best
    are. `a`, the noise and how unlike the parameters are (`weights_of`) have the greatest marginal
    likelihood on a small grid, the rest is fixed (experiments/004_samplers). Weights are fitted to
    the same rows, so twice the logarithm of the likelihood has to gain DOUBT by them.
    """

    P, WIDTH, TREND, MARGIN, DOUBT = 1.5, 0.6, 16.0, 0.3, 12.0
    A, NOISE = (0.1, 1.0), (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3)
    UNLIKE = (0.0, 0.5, 1.5)

    def __init__(self, inputs: Inputs, values: Floats) -> None:
        self.inputs = inputs
        spread = float(np.median(values) - values.min()) or float(np.ptp(values)) or 1.0
        spread = max(spread, ROUNDED * float(np.abs(values).max()))
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

    def odds(self, inputs: Inputs, thresholds: Floats) -> Floats:
        """How many predicted deviations the values of many rows lie below a threshold each (n,), by
        a linear function of their options, fitted to the predictions for a part of them."""
        some = inputs.last(FITTED)
        mean, std = self._moments(some)
        middle, x = mean.mean(), some.options
        weights = np.linalg.solve(x.T @ x + np.eye(x.shape[1]), x.T @ (mean - middle))
        room = np.log(np.maximum(thresholds - self.floor, 1e-300))
        return np.asarray((room - middle - inputs.options @ weights) / np.median(std))

    def _moments(self, inputs: Inputs) -> tuple[Floats, Floats]:
        across = _mixed(_near(inputs, self.inputs, self.counted), self.a) @ self.half
        own = _trend(((inputs.options @ self.counted) ** 2).sum(axis=1), inputs.coding.parameters)
        prior = _mixed((2.0 + own, np.ones_like(own)), self.a)
        explained = np.einsum("ij,ij->i", across, across)
        variance = np.maximum(prior - explained, 1e-6) * max(self.scale, 1e-8)
        return self.mean + across @ self.explains, np.sqrt(variance)

    def _tune(self) -> None:
        few = self.inputs.last(TUNED)
        target = self.targets[-TUNED:] - self.mean
        noise = np.array(self.NOISE)[:, None]
        best = math.inf
        for unlike in self.UNLIKE:
            weights = weights_of(self.inputs, self.targets, unlike)
            counted = self.inputs.coding.weighted(weights)
            near, doubt = _near(few, few, counted), self.DOUBT * bool(unlike)
            for a in self.A:
                values, vectors = np.linalg.eigh(_mixed(near, a).astype(np.float64))
                values = np.maximum(values, 0.0) + noise
                scale = ((vectors.T @ target) ** 2 / values).mean(axis=1)
                loss = len(target) * np.log(scale + 1e-12) + np.log(values).sum(axis=1) + doubt
                if (least := float(loss.min())) < best:
                    best, i = least, int(loss.argmin())
                    self.a, self.noise, self.scale = a, self.NOISE[i], float(scale[i])
                    self.weights, self.counted = weights, counted

    def _condition(self) -> None:
        near = _near(self.inputs, self.inputs, self.counted)
        kernel = _mixed(near, self.a).astype(np.float64)
        lower = np.linalg.cholesky(kernel + self.noise * np.eye(len(kernel)))
        half = solve_triangular(lower, np.eye(len(lower)), lower=True)
        self.explains = half @ (self.targets - self.mean)
        self.half = half.T.astype(np.float32)


def _trend(products: Floats, parameters: int) -> Floats:
    """By the scalar products of the counts."""
    shares = products / np.float32(parameters**2)
    return np.asarray(GaussianProcess.TREND * (shares + shares**2))


def _near(these: Inputs, those: Inputs, counted: Floats) -> tuple[Floats, Floats]:
    """What the kernel makes of the parameters and of the costs: (n, k) each."""
    p, n = GaussianProcess.P, these.coding.parameters
    counts = these.options @ counted, those.options @ counted
    near = np.exp(these.options @ (those.options.T * np.float32(p / n)) - p)
    near += np.exp(np.sqrt(_squared(*counts)) * np.float32(-p / n / math.sqrt(2)))
    near += _trend(counts[0] @ counts[1].T, n)
    costs = _squared(these.costs, those.costs)
    return near, np.exp(costs * np.float32(-0.5 / GaussianProcess.WIDTH**2))


def _mixed(near: tuple[Floats, Floats], a: float) -> Floats:
    """Both in one scale."""
    return np.asarray((near[0] + a * near[1]) / (2 + a + GaussianProcess.TREND))


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
