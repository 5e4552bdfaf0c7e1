"""From when tokens came to the figures that are reported; no clock and no model in here."""

from __future__ import annotations

import statistics
from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Any

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class Trace:
    """One request: when it was sent and when how many of its tokens came, in seconds."""

    sent: float
    times: list[float]
    counts: list[int]
    token_ids: list[int]

    @property
    def num_tokens(self) -> int:
        """Tokens of the answer."""
        return sum(self.counts)

    @property
    def time_to_first_token(self) -> float:
        """Seconds from sending to the first token."""
        return self.times[0] - self.sent

    @property
    def time_per_output_token(self) -> float | None:
        """Seconds for each token behind those that came first; None if there are none."""
        behind = self.num_tokens - self.counts[0]
        return (self.times[-1] - self.times[0]) / behind if behind else None


def percentile(values: Items[float], percent: float) -> float:
    """The percentile, linear between neighbours, as numpy has it.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("no values, so no percentile")
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def latencies(traces: Items[Trace]) -> dict[str, Any]:
    """Percentiles of time to first token and of time per output token, in ms."""
    first = [trace.time_to_first_token for trace in traces]
    per_token = [t for trace in traces if (t := trace.time_per_output_token) is not None]
    return {
        name: {
            f"p{percent}": round(1e3 * percentile(values, percent), 2) for percent in PERCENTILES
        }
        for name, values in (("ttft_ms", first), ("tpot_ms", per_token))
        if values
    }


def summary(traces: Items[Trace], seconds: float) -> dict[str, Any]:
    """Throughput and latencies of one run."""
    num_tokens = sum(trace.num_tokens for trace in traces)
    return {
        "num_requests": len(traces),
        "num_tokens": num_tokens,
        "seconds": round(seconds, 3),
        "tokens_per_second": round(num_tokens / seconds, 2),
        **latencies(traces),
    }


def sustained(traces: Items[Trace]) -> dict[str, float]:
    """Throughput and requests in flight until the last request was sent.

    Afterwards there are fewer and fewer in flight, unless all end at once, as they do in a loop
    that begins them at once. Tokens count as spread evenly between a request's first and last.
    """
    start, end = min(trace.sent for trace in traces), max(trace.sent for trace in traces)
    if end == start:
        end = max(trace.times[-1] for trace in traces)
    num_tokens = in_flight = 0.0
    for trace in traces:
        first, last = trace.times[0], trace.times[-1]
        in_flight += min(last, end) - trace.sent
        if last <= end:
            num_tokens += trace.num_tokens
        elif first < end:
            num_tokens += trace.num_tokens * (end - first) / (last - first)
    seconds = end - start
    return {
        "tokens_per_second": round(num_tokens / seconds, 2),
        "mean_in_flight": round(in_flight / seconds, 2),
    }


def median(values: Items[float]) -> float:
    """The median of several rounds."""
    return statistics.median(values)


def spread(values: Items[float]) -> float:
    """Largest less smallest, as a share of the median: how far rounds lie apart."""
    return (max(values) - min(values)) / median(values)


def ratio(ours: Items[float], theirs: Items[float]) -> float:
    """The ratio of two medians, of rounds that were taken in turns."""
    return median(ours) / median(theirs)


def first_divergence(ours: Items[int], theirs: Items[int]) -> int | None:
    """The first place where two answers differ, or None if they don't as far as both go."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((place for place, (a, b) in pairs if a != b), None)


def agreement(ours: Items[Items[int]], theirs: Items[Items[int]]) -> dict[str, Any]:
    """How many answers are equal, and where the others part (tokens from 0, median and least)."""
    places = [first_divergence(a, b) for a, b in zip(ours, theirs, strict=True)]
    parted = [place for place in places if place is not None]
    return {
        "num_answers": len(places),
        "num_equal": len(places) - len(parted),
        "first_divergence_median": median(parted) if parted else None,
        "first_divergence_least": min(parted, default=None),
    }
