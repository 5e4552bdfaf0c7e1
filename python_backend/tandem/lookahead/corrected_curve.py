"""A measured curve, corrected point by point by what a service observes."""

from __future__ import annotations

from itertools import accumulate

from tandem.lookahead.curve import Curve, place

# How fast what was often seen follows. The first observations count as much as all before, and one
# after a long time as much as has faded.
RATE = 0.05
# One observation says at most this much: a pause of the machine is no change of its speed.
MAX_RATIO = 2.0
# A point that isn't seen any more is taken to be cheaper, by so much an observation of others, and
# down to this share: so it is tried again.
_FADING, _MOST_FADED = 0.999, 0.25
# Seen so often, a point's correction is one.
_OFTEN = 100.0


class CorrectedCurve:
    """Seconds as a function of a count, in the shape that was observed rather than measured.

    What was measured may be wrong in places: something else had the machine just then. Points that
    were seen say what they cost. Those that nobody has seen are taken to be as cheap as they can
    be: corrected like the best that was seen, no dearer than a larger count, and no dearer than as
    many times a smaller one as the counts are apart. If that is too little, they are tried, and
    seen.
    """

    def __init__(self, measured: Curve) -> None:
        """Starts with what was measured."""
        points = measured.points
        self._counts = list(points)
        self._measured = list(points.values())
        self._ratios = [1.0] * len(points)
        self._seen = [0.0] * len(points)  # observations, by how near they were
        self._ages = [0] * len(points)  # observations of others since
        self._seconds = self._measured

    def __call__(self, count: int) -> float:
        """Seconds at `count`; below the first point as there."""
        left, right, share = place(self._counts, count)
        seconds = self._seconds
        return seconds[left] + share * (seconds[right] - seconds[left])

    def observe(self, count: int, ratio: float) -> None:
        """Takes seconds at `count`, as a multiple of what is expected there."""
        change = clipped(ratio) - 1
        left, right, share = place(self._counts, count)
        share = min(max(share, 0.0), 1.0)
        for point, weight in ((left, 1 - share), (right, share)):
            if weight > 0 and self._measured[point] > 0:
                expected = self._seconds[point] / self._measured[point]
                faded = 1 - self._faded(self._ages[point])
                rate = weight * max(RATE, 1 / (1 + self._seen[point]), faded)
                self._ratios[point] = expected * (1 + rate * change)
                self._seen[point] += weight
                self._ages[point] = -1
        self._ages = [age + 1 for age in self._ages]
        self._correct()

    @property
    def distortion(self) -> float:
        """How far apart the corrections of points are that were often seen; 1 for not at all."""
        often = [r for r, seen in zip(self._ratios, self._seen, strict=True) if seen >= _OFTEN]
        return max(often) / min(often) if often else 1.0

    def _faded(self, age: int) -> float:
        """The share that is left of what was known."""
        return max(_MOST_FADED, _FADING**age)

    def _correct(self) -> None:
        seen = [s > 0 for s in self._seen]
        best = min((r for r, s in zip(self._ratios, seen, strict=True) if s), default=1.0)
        seconds = [
            self._faded(age) * measured * (ratio if s else best)
            for measured, ratio, s, age in zip(
                self._measured, self._ratios, seen, self._ages, strict=True
            )
        ]
        # No dearer than a larger count that was seen...
        least = float("inf")
        for point in reversed(range(len(seconds))):
            if seen[point]:
                least = min(least, seconds[point])
            else:
                seconds[point] = min(seconds[point], least)
        # ... nor than a smaller one again and again.
        each = float("inf")
        for point, count in enumerate(self._counts):
            if not seen[point]:
                seconds[point] = min(seconds[point], each * count)
            each = min(each, seconds[point] / count)
        self._seconds = list(accumulate(seconds, max))


def clipped(ratio: float) -> float:
    """As much of an observation, as a multiple of what was expected, as is believed."""
    return min(max(ratio, 1 / MAX_RATIO), MAX_RATIO)
