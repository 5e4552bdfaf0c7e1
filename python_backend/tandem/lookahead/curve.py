"""Seconds as a function of a count, between points that were measured."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from collections.abc import Sequence as Items
from statistics import median_low


class Curve:
    """Linear between the measured points, and behind them; more never costs less.

    Where it seems so, the points are moved as little as possible, one that is far off as easily as
    one that is close (isotonic regression by least absolute deviations, in its minimax form:
    Robertson and Wright, "Algorithms in order restricted statistical inference", 1980).
    """

    def __init__(self, points: Mapping[int, float]) -> None:
        """Takes seconds by count."""
        self._counts = sorted(points)
        measured = [points[count] for count in self._counts]
        last = len(measured)
        self._seconds = [
            max(
                min(median_low(measured[start:stop]) for stop in range(index + 1, last + 1))
                for start in range(index + 1)
            )
            for index in range(last)
        ]

    def __call__(self, count: int) -> float:
        """Seconds at `count`; below the first point as there."""
        left, right, share = place(self._counts, count)
        return self._seconds[left] + share * (self._seconds[right] - self._seconds[left])

    @property
    def points(self) -> dict[int, float]:
        """Seconds by count, in order."""
        return dict(zip(self._counts, self._seconds, strict=True))


def place(counts: Items[int], count: int) -> tuple[int, int, float]:
    """The points around a count, and how far it lies from the first to the second, or behind it."""
    right = bisect_left(counts, count)
    if right == 0 or len(counts) == 1:
        return 0, 0, 0.0
    right = min(right, len(counts) - 1)
    start, stop = counts[right - 1], counts[right]
    return right - 1, right, (count - start) / (stop - start)
