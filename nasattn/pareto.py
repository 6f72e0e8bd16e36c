"""Non-dominated sets, hypervolume and knee of points whose coordinates are all minimised.

numpy only. Maximised quantities are negated by the caller. Points are arrays of shape (n, m).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
PAIRS = 100  # at most so many points are compared all with all at once


def _points(points: ArrayLike) -> Floats:
    array = np.asarray(points, dtype=np.float64)
    if array.ndim != 2:
        raise ValueError(f"points must have the shape (n, m); got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("points must be finite: a failed trial has no point")
    return array


def non_dominated(points: ArrayLike) -> NDArray[np.bool_]:
    """Mask of the points that no other point dominates: nowhere worse and somewhere better.

    Equal points do not dominate each other, so duplicates of a non-dominated point all stay.
    """
    array = _points(points)
    if len(array) <= PAIRS:
        worse = np.all(array[:, None] <= array, axis=2)
        return np.asarray(~np.any(worse & ~worse.T, axis=0))
    mask = np.zeros(len(array), dtype=bool)
    left = np.lexsort(array.T[::-1])
    while len(left):
        # The first of what no member dominates, axis by axis, is dominated by nothing.
        member = array[left[0]]
        mask[left[0]] = True
        rivals = array[left]
        left = left[~np.all(rivals >= member, axis=1) | np.all(rivals == member, axis=1)][1:]
    return mask


def hypervolume(points: ArrayLike, reference: Sequence[float]) -> float:
    """Volume that the points dominate inside the box below the reference, exactly.

    Points that are not better than the reference everywhere add nothing. In two dimensions a sweep,
    above by slicing along the last axis (exact, polynomial in n for the few objectives here).
    """
    limit = np.asarray(reference, dtype=np.float64)
    array = np.asarray(points, dtype=np.float64)
    if not array.size:
        return 0.0
    if (array := _points(array)).shape[1] != len(limit):
        raise ValueError(f"points of {array.shape[1]} axes, a reference of {len(limit)}")
    return _volume(array[np.all(array < limit, axis=1)], limit)


def _volume(array: Floats, limit: Floats) -> float:
    if not len(array):
        return 0.0
    if len(limit) == 1:
        return float(limit[0] - array.min())
    array = array[non_dominated(array)]
    if len(limit) == 2:  # sorted by the first axis, a front falls along the second
        array = array[np.argsort(array[:, 0], kind="stable")]
        right = np.append(array[1:, 0], limit[0])
        return float(np.sum((right - array[:, 0]) * (limit[1] - array[:, 1])))
    array = array[np.argsort(array[:, -1], kind="stable")]
    depths = np.append(array[1:, -1], limit[-1]) - array[:, -1]
    return sum(
        float(depth) * _volume(array[: i + 1, :-1], limit[:-1])
        for i, depth in enumerate(depths)
        if depth > 0
    )


def knee(points: ArrayLike) -> int:
    """Index of the point that stands out most from the line between the front's ends.

    Axes are scaled to the front's extent; the largest mean gain against the plane through the axes'
    worst corners wins (for two axes: the largest distance from the chord). Ties go to the first.
    """
    array = _points(points)
    if not len(array):
        raise ValueError("no points: there is no knee")
    low, high = array.min(axis=0), array.max(axis=0)
    extent = np.where(high > low, high - low, 1.0)
    return int(np.argmin(((array - low) / extent).sum(axis=1)))
