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
    different, places = np.unique(array, axis=0, return_inverse=True)
    mask = np.zeros(len(different), dtype=bool)
    left = np.arange(len(different))
    while len(left):  # the first in order, axis by axis, is dominated by none that is left
        mask[left[0]] = True
        left = left[np.any(different[left] < different[left[0]], axis=1)]
    return np.asarray(mask[places.reshape(-1)])  # numpy 2.0 gives it a second axis


def undominated(
    points: ArrayLike, reference: ArrayLike
) -> tuple[list[Floats], NDArray[np.int64], NDArray[np.int64]]:
    """What lies below the reference (m,) and none of the points (n, m) dominates, cut into disjoint
    boxes, in the order of n to the power of m // 2 at most: Lacour, Klamroth and Fonseca 2017, "A
    box decomposition algorithm to compute the hypervolume indicator".

    Returned are the edges of each axis, the points' coordinates in order and the reference, and the
    lower and the upper corners of the boxes (b, m) by their places among the edges: one is the
    first, zero minus infinity.
    """
    limit = np.asarray(reference, dtype=np.float64)
    array = np.asarray(points, dtype=np.float64)
    array = array[np.all(array < limit, axis=1)]
    count, axes = array.shape
    edges = [np.append(np.sort(column), end) for column, end in zip(array.T, limit, strict=True)]
    # Places differ where coordinates are equal, which leaves some boxes without a volume.
    places = np.argsort(np.argsort(array, axis=0, kind="stable"), axis=0) + 1
    if axes == 2:
        return edges, *_stairs(places[np.argsort(places[:, 0])], count + 1)
    # What no point dominates is below the upper corner of a zone; zones overlap. bounds[z, k] is
    # the point that bounds zone z on axis k: what it is there is upper[z, k], and zero here.
    upper = np.full((1, axes), count + 1)
    bounds = np.zeros((1, axes, axes), dtype=np.int64)
    for point in places[np.argsort(places[:, 0])]:  # so that a dominated one is in no zone any more
        inside = np.all(point < upper, axis=1)
        zone, axis = np.nonzero(point > bounds[inside].max(axis=1))
        each = np.arange(len(zone))
        cut, by = upper[inside][zone], bounds[inside][zone]
        cut[each, axis] = point[axis]
        by[each, axis] = point
        by[each, axis, axis] = 0
        upper = np.concatenate([upper[~inside], cut])
        bounds = np.concatenate([bounds[~inside], by])
    lower = np.zeros_like(upper)
    for k in range(1, axes):
        lower[:, k] = bounds[:, :k, k].max(axis=1)
    return edges, lower, upper


def _stairs(places: NDArray[np.int64], end: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The corners of `undominated` on two axes, by places in the order of the first axis."""
    heights = np.minimum.accumulate(np.append(end, places[:, 1]))
    steps = places[heights[1:] < heights[:-1]]
    right, top = np.append(steps[:, 0], end), np.append(end, steps[:, 1])
    lower = np.column_stack([np.zeros_like(right), np.append(steps[:, 1], 0)])
    return lower, np.column_stack([right, top])


def hypervolume(points: ArrayLike, reference: Sequence[float]) -> float:
    """Volume that the points dominate inside the box below the reference: the box above their
    ideal point less what they leave open in it, so to rounding of the box.

    Points that are not better than the reference everywhere add nothing.
    """
    limit = np.asarray(reference, dtype=np.float64)
    array = np.asarray(points, dtype=np.float64)
    if not array.size:
        return 0.0
    if (array := _points(array)).shape[1] != len(limit):
        raise ValueError(f"points of {array.shape[1]} axes, a reference of {len(limit)}")
    array = array[np.all(array < limit, axis=1)]
    if not len(array):
        return 0.0
    ideal = array.min(axis=0)
    edges, lower, upper = undominated(array[non_dominated(array)], limit)
    outside = np.ones(len(lower))
    for least, edge, low, high in zip(ideal, edges, lower.T, upper.T, strict=True):
        values = np.append(least, edge)
        outside *= values[high] - values[low]
    return max(0.0, float(np.prod(limit - ideal) - outside.sum()))


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
