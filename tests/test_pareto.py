"""Non-dominated set, hypervolume and knee, each against its definition."""

import itertools
import math
import random
from collections.abc import Sequence

import numpy as np
import pytest

from nasattn.pareto import hypervolume, knee, non_dominated, undominated

Points = list[list[float]]


def random_points(rng: random.Random, axes: int, count: int, *, grid: bool) -> Points:
    """On a coarse grid, which gives ties and duplicates, or anywhere."""
    return [
        [float(rng.randint(0, 6)) if grid else rng.uniform(0, 6) for _ in range(axes)]
        for _ in range(count)
    ]


def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True)) and list(a) != list(b)


@pytest.mark.parametrize("grid", [True, False])
@pytest.mark.parametrize("axes", [1, 2, 3, 4])
def test_non_dominated_by_definition(axes: int, grid: bool) -> None:
    rng = random.Random(axes)
    for count in (1, 2, 3, 7, 40, 150):
        points = random_points(rng, axes, count, grid=grid)
        expected = [not any(dominates(other, point) for other in points) for point in points]
        assert non_dominated(points).tolist() == expected
        assert any(expected)


def test_equal_points_all_stay() -> None:
    assert non_dominated([[1, 2], [1, 2], [2, 1], [2, 2], [1, 2]]).tolist() == [1, 1, 1, 0, 1]
    assert non_dominated(np.empty((0, 3))).tolist() == []


def volume_by_cells(points: Points, reference: Sequence[int]) -> int:
    """How many unit cells of the box from 0 to the reference some point dominates."""
    return sum(
        any(all(p <= c for p, c in zip(point, cell, strict=True)) for point in points)
        for cell in itertools.product(*map(range, reference))
    )


def volume_by_inclusion_exclusion(points: Points, reference: Sequence[float]) -> float:
    """The union of boxes [point, reference], by the volumes of all intersections."""
    total = 0.0
    for size in range(1, len(points) + 1):
        for some in itertools.combinations(points, size):
            corner = [max(axis) for axis in zip(*some, strict=True)]
            sides = [max(0.0, r - c) for c, r in zip(corner, reference, strict=True)]
            total -= (-1) ** size * math.prod(sides)
    return total


@pytest.mark.parametrize("axes", [1, 2, 3, 4])
def test_hypervolume_by_counting_cells(axes: int) -> None:
    rng = random.Random(axes)
    for count in (1, 2, 5, 12):
        points = random_points(rng, axes, count, grid=True)
        reference = [rng.randint(2, 6) for _ in range(axes)]  # some points lie on it or beyond
        assert hypervolume(points, reference) == volume_by_cells(points, reference)


@pytest.mark.parametrize("axes", [1, 2, 3, 4])
def test_hypervolume_by_inclusion_and_exclusion(axes: int) -> None:
    rng = random.Random(10 + axes)
    for count in (1, 2, 4, 8):
        points = random_points(rng, axes, count, grid=False)
        reference = [rng.uniform(3, 7) for _ in range(axes)]
        expected = volume_by_inclusion_exclusion(points, reference)
        assert hypervolume(points, reference) == pytest.approx(expected, rel=1e-9, abs=1e-9)
        rng.shuffle(points)
        assert hypervolume(points, reference) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("grid", [True, False])
@pytest.mark.parametrize("axes", [1, 2, 3, 4, 5])
def test_what_no_point_dominates_lies_in_one_box_and_the_rest_in_none(
    axes: int, grid: bool
) -> None:
    rng = random.Random(20 + axes)
    for count in (0, 1, 2, 9, 30):
        points = np.array(random_points(rng, axes, count, grid=grid)).reshape(count, axes)
        reference = np.full(axes, 5.5)  # some points lie beyond it
        edges, lower, upper = undominated(points, reference)
        sides = [np.append(-np.inf, edge) for edge in edges]
        for side, low, high in zip(sides, lower.T, upper.T, strict=True):
            assert np.all(side[low] <= side[high])
        for _ in range(60):
            at = np.array([rng.uniform(-1, 5.5) for _ in range(axes)])
            above = [side[low] <= x for side, low, x in zip(sides, lower.T, at, strict=True)]
            below = [x < side[high] for side, high, x in zip(sides, upper.T, at, strict=True)]
            boxes = np.count_nonzero(np.all([*above, *below], axis=0))
            assert boxes == (not np.any(np.all(points <= at, axis=1)))


def test_the_boxes_are_few() -> None:
    """Lacour, Klamroth and Fonseca 2017: 2n + 1 on three axes, at most about n squared on four."""
    rng = np.random.default_rng(0)
    for axes, most in ((2, 41), (3, 81), (4, 1600)):
        front = rng.dirichlet(np.ones(axes), size=40)
        assert non_dominated(front).all()
        assert len(undominated(front, [2.0] * axes)[1]) <= most


def test_hypervolume_of_what_adds_nothing() -> None:
    points = [[1.0, 4.0], [2.0, 2.0]]
    volume = hypervolume(points, [5, 5])
    assert volume == 4 * 1 + 3 * 2
    for more in ([1.0, 4.0], [3.0, 3.0], [0.0, 5.0], [5.0, 0.0], [-9.0, 6.0], [2.0, 4.5]):
        assert hypervolume([*points, more], [5, 5]) == volume
    assert hypervolume([[5.0, 5.0]], [5, 5]) == 0.0
    assert hypervolume([], [5, 5]) == hypervolume(np.empty((0, 2)), [5, 5]) == 0.0
    assert hypervolume([[-2.0, -3.0]], [0, 0]) == 6.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_unknown_is_refused(bad: float) -> None:
    points = [[1.0, 2.0], [bad, 1.0]]
    for call in (non_dominated, knee, lambda p: hypervolume(p, [5, 5])):
        with pytest.raises(ValueError, match="finite"):
            call(points)


def test_what_has_the_wrong_shape_is_refused() -> None:
    for call in (non_dominated, knee, lambda p: hypervolume(p, [5, 5])):
        with pytest.raises(ValueError, match=r"shape \(n, m\)"):
            call([1.0, 2.0])
    with pytest.raises(ValueError, match="points of 3 axes, a reference of 2"):
        hypervolume([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]], [5, 5])
    with pytest.raises(ValueError, match="no points: there is no knee"):
        knee(np.empty((0, 2)))


def random_front(rng: random.Random, count: int) -> Points:
    """Rising along the first axis, falling along the second."""
    first = sorted(rng.sample(range(1000), count))
    second = sorted(rng.sample(range(1000), count), reverse=True)
    return [[float(x), y * 1e6] for x, y in zip(first, second, strict=True)]


def test_the_knee_is_farthest_from_the_chord() -> None:
    rng = random.Random(0)
    for count in [2, 3, 5, 20] * 10:
        front = random_front(rng, count)
        (x0, y0), (x1, y1) = front[0], front[-1]
        unit = [((x - x0) / (x1 - x0), (y - y1) / (y0 - y1)) for x, y in front]
        # The chord from (0, 1) to (1, 0); what lies below it is on the good side.
        distances = [(1 - x - y) / math.sqrt(2) for x, y in unit]
        assert distances[knee(front)] == pytest.approx(max(distances), abs=1e-12)
        assert distances[::-1][knee(front[::-1])] == pytest.approx(max(distances), abs=1e-12)


def test_the_knee_of_more_axes_has_the_least_scaled_sum() -> None:
    rng = random.Random(1)
    for axes in (3, 4):
        points = random_points(rng, axes, 12, grid=False)
        scaled = [
            sum(
                (p[a] - min(q[a] for q in points))
                / (max(q[a] for q in points) - min(q[a] for q in points))
                for a in range(axes)
            )
            for p in points
        ]
        assert knee(points) == scaled.index(min(scaled))
        # Units do not matter.
        assert knee([[p[0] * 1e9 - 5, *p[1:]] for p in points]) == knee(points)


def test_the_knee_of_few_points() -> None:
    assert knee([[3.0, 7.0]]) == 0
    assert knee([[0.0, 1.0], [1.0, 0.0]]) == 0, "a tie goes to the first"
    assert knee([[1.0, 5.0], [2.0, 5.0], [0.0, 5.0]]) == 2, "an axis without extent does not count"
    assert knee([[0.0, 1.0], [0.1, 0.1], [0.1, 0.1], [1.0, 0.0]]) == 1
