"""How a model comes to its end without breaking an answer off."""

from __future__ import annotations

import logging
import time
from threading import Event, Lock

logger = logging.getLogger("tandem")

# For balancers to notice that the model isn't ready any more.
_SETTLE_SECONDS = 10.0
# Triton hands requests over as they come: nothing here for so long means that nothing waits there.
_IDLE_SECONDS = 1.0


class Drain:
    """Counts down from the announcement of an end to the end.

    The model keeps taking requests while it drains: some are still on their way to it.

    Args:
        seconds: how long running requests may go on.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._lock = Lock()
        self._started_at: float | None = None
        self._busy_at = 0.0
        self._idle = Event()

    def start(self) -> None:
        """Announces the end; the first time counts."""
        with self._lock:
            if self._started_at is None:
                self._started_at = self._busy_at = time.monotonic()
                logger.info("shutting down: running requests have %g s", self.seconds)

    @property
    def has_started(self) -> bool:
        """Whether the end was announced."""
        return self._started_at is not None

    @property
    def is_over(self) -> bool:
        """Whether running requests have had their time."""
        return self._started_at is not None and time.monotonic() > self._started_at + self.seconds

    def observe(self, busy: bool) -> None:
        """Looks whether requests are running; called many times a second."""
        now = time.monotonic()
        if busy:
            self._busy_at = now
        if self._started_at is None:
            return
        settled = now > self._started_at + _SETTLE_SECONDS
        if (settled and now > self._busy_at + _IDLE_SECONDS) or (self.is_over and not busy):
            self._idle.set()

    def run(self) -> None:
        """Announces the end; returns when balancers had time to notice, and nothing runs."""
        self.start()
        self._idle.wait()
