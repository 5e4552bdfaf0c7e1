"""Loads that take turns of a few seconds, so that all of them meet the same machine.

Memory that is shared with other machines is faster or slower from second to second and from minute
to minute. Of two runs of half a minute, one after the other, either may be 10 % faster than the
other for that alone; of two that take turns, the difference is much smaller.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import psutil

T = TypeVar("T")


@dataclass
class Load(Generic[T]):
    """Work that is done in other processes, and when it was its turn.

    Attributes:
        work: waits in this process until the others are done; it begins with the first turn.
        processes: those that compute now, the one that needs the others before them.
    """

    work: Callable[[], T]
    processes: Callable[[], list[psutil.Process]]
    _turns: list[tuple[float, float]] = field(default_factory=list)

    def own_seconds(self, moment: float) -> float:
        """How long it had been its turn at a moment (`time.perf_counter`)."""
        return sum(min(end, moment) - begin for begin, end in self._turns if begin < moment)

    def take_turn(self, work: Future[T], seconds: float) -> None:
        """Goes on for a while, or to its end."""
        begin = time.perf_counter()
        self.resume()
        wait([work], seconds)
        self.suspend()
        self._turns.append((begin, time.perf_counter()))

    def suspend(self) -> None:
        """Holds its processes up."""
        for process in self._live():
            with suppress(psutil.NoSuchProcess):
                process.suspend()

    def resume(self) -> None:
        """Lets them go on; whom the others ask is there first."""
        for process in reversed(self._live()):
            with suppress(psutil.NoSuchProcess):
                process.resume()

    def _live(self) -> list[psutil.Process]:
        try:
            return self.processes()
        except psutil.NoSuchProcess:
            return []


def in_turns(loads: Items[Load[T]], seconds: float) -> list[T]:
    """Does the work of all loads, and returns what came of each.

    If one fails, the others still come to their end, and can be begun again. What interrupts this
    doesn't wait for them.

    Args:
        seconds: of a turn.

    Raises:
        BaseException: what the first work that failed raised, or what interrupted this.
    """
    begun: dict[int, Future[T]] = {}
    try:
        while len(begun) < len(loads) or not all(work.done() for work in begun.values()):
            for number, load in enumerate(loads):
                if number not in begun:
                    begun[number] = _begin(load.work)
                if not begun[number].done():
                    load.take_turn(begun[number], seconds)
    finally:
        for load in loads:
            load.resume()
    return [begun[number].result() for number in range(len(loads))]


def _begin(work: Callable[[], T]) -> Future[T]:
    """Like an executor's `submit`, but nobody has to wait for the end."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
