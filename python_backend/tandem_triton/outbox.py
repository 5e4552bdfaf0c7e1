"""What steps brought and clients don't have yet.

A sequence's new tokens wait for their turn and go out as one response: beginnings, then ends, then
who has waited longest. So a sender that can't keep up sends fewer responses, not later ones.

A response is work for three processes: the model's, the server's and often the client's. Sent
while a step computes on all cores, it takes them away from threads that wait for one another, and
holds the step up for three times as long as between two steps. So there responses leave between
steps, and take no more than a small share of the time. Behind an end some go out before their time:
its client may send the next request, which then finds the next step instead of just missing it.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import Protocol

from tandem import Delta, Sequence

logger = logging.getLogger("tandem")

# Of the time of the steps, for responses that may wait.
_SHARE = 0.03
# After which they wait no longer, unless more than so many a second would leave for that.
_MAX_WAIT_SECONDS = 0.2
_MAX_IMPATIENT_PER_SECOND = 100
# From an end until its client's next request is here, when it comes at once.
_ANSWER_SECONDS = 0.003


class Receiver(Protocol):
    """A request, as far as the outbox knows it."""

    @property
    def streams(self) -> bool:
        """Whether it gets responses before its end."""

    def has_begun(self, sequence: Sequence) -> bool:
        """Whether its client has a response of the sequence."""

    def deliver(self, news: Items[tuple[float, Delta]]) -> None:
        """Sends what came to one sequence, and when (`time.monotonic`)."""


@dataclass
class _Parcel:
    """What a sequence got since its last response."""

    request: Receiver
    since: float
    news: list[tuple[float, Delta]] = field(default_factory=list)

    @property
    def ends(self) -> bool:
        """Whether the sequence has ended."""
        return self.news[-1][1].finish_reason is not None


class Outbox:
    """Sends from one thread at a time, which `run` occupies or `send_due` borrows."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._parcels: dict[Sequence, _Parcel] = {}
        # Those whose turn will come, in its order.
        self._beginning: dict[Sequence, None] = {}
        self._ending: dict[Sequence, None] = {}
        self._patient: dict[Sequence, None] = {}
        # Seconds that responses may take; below 0 after those that couldn't wait.
        self._credit = 0.0
        self._closed = False

    def put(self, request: Receiver, delta: Delta) -> None:
        """Takes what a step brought to one of the request's sequences."""
        sequence, now = delta.sequence, time.monotonic()
        begins = request.streams and not request.has_begun(sequence)
        with self._changed:
            parcel = self._parcels.setdefault(sequence, _Parcel(request, now))
            parcel.news.append((now, delta))
            if begins or sequence in self._beginning:
                self._beginning[sequence] = None
            elif delta.finish_reason is not None:
                self._patient.pop(sequence, None)
                self._ending[sequence] = None
            elif request.streams:
                self._patient[sequence] = None
            self._changed.notify()

    def send_due(self, seconds: float) -> None:
        """Sends what can't wait, and as much of the rest as a step of `seconds` allows."""
        self._credit = min(0.0, self._credit) + _SHARE * seconds
        answered_by = -math.inf
        while (parcel := self._take_due(answered_by)) is not None:
            start = time.monotonic()
            _send(parcel)
            now = time.monotonic()
            self._credit -= now - start
            if parcel.ends:
                answered_by = now + _ANSWER_SECONDS

    def _take_due(self, answered_by: float) -> _Parcel | None:
        with self._changed:
            may_wait = self._patient and not self._beginning and not self._ending
            if may_wait and self._credit <= 0 and time.monotonic() >= answered_by:
                oldest = self._parcels[next(iter(self._patient))]
                most = min(_MAX_WAIT_SECONDS, len(self._patient) / _MAX_IMPATIENT_PER_SECOND)
                if time.monotonic() - oldest.since < most:
                    return None
            return self._take()

    def run(self) -> None:
        """Sends whatever there is, until the outbox is closed and empty."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._line or self._closed)
                parcel = self._take()
            if parcel is None:
                return
            _send(parcel)

    @property
    def _line(self) -> dict[Sequence, None]:
        return self._beginning or self._ending or self._patient

    def _take(self) -> _Parcel | None:
        line = self._line
        if not line:
            return None
        sequence = next(iter(line))
        del line[sequence]
        return self._parcels.pop(sequence)

    def close(self) -> None:
        """Lets `run` end."""
        with self._changed:
            self._closed = True
            self._changed.notify()


def _send(parcel: _Parcel) -> None:
    """A response that can't be sent harms no other."""
    try:
        parcel.request.deliver(parcel.news)
    except Exception:
        logger.exception("a response could not be sent")
