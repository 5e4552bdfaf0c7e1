"""What else went on: other processes, and other machines on the same host, slow memory down.

Figures that were taken meanwhile are worth little, so each one says what it was like.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

import psutil
import torch

T = TypeVar("T")

# The share of others above which a figure is worth little.
NOISY = 0.05
_TRIES = 2
# The size of Gemma 3's output head, the largest matrix that a step reads; no cache holds it.
_READ_BYTES = 2 * 262_144 * 640
_READS = 5


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and of all that it started, whether they still run or not."""
    process = psutil.Process(pid)
    times = [p.cpu_times() for p in [process, *process.children(recursive=True)]]
    return float(sum(t.user + t.system + t.children_user + t.children_system for t in times))


def undisturbed(work: Callable[[], T]) -> tuple[T, dict[str, float]]:
    """Measures, and anew while others used the CPU; keeps the less disturbed of two tries.

    Returns:
        What `work` returned, and how it was meanwhile: `foreign_cpu_share`, and
        `read_gb_per_second` of memory just before.
    """
    tries = []
    for _ in range(_TRIES):
        rate = read_rate()
        share = foreign_share()
        tries.append((work(), {"foreign_cpu_share": share(), "read_gb_per_second": rate}))
        if tries[-1][1]["foreign_cpu_share"] <= NOISY:
            break
    return min(tries, key=lambda result: result[1]["foreign_cpu_share"])


def read_rate() -> float:
    """GB/s of reading memory, the best of a few times."""
    weight = torch.ones(_READ_BYTES // 8, dtype=torch.int64)
    seconds = []
    for _ in range(_READS):
        start = time.perf_counter()
        weight.amax()
        seconds.append(time.perf_counter() - start)
    return round(_READ_BYTES / min(seconds) / 1e9, 1)


def foreign_share() -> Callable[[], float]:
    """Starts to watch; the function that comes back says what others used since.

    Returns:
        The share, 0 to 1, of all cores that were used by processes other than this one and those
        that it started, or that the host took away.
    """

    def busy() -> float:
        times = psutil.cpu_times()
        return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)

    def own() -> float:
        return cpu_seconds(os.getpid())

    before, start = busy() - own(), time.monotonic()

    def share() -> float:
        capacity = (time.monotonic() - start) * (psutil.cpu_count() or 1)
        return round(max(0.0, busy() - own() - before) / capacity, 4)

    return share
