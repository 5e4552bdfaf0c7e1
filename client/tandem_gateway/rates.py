"""How much one key may ask for in a minute."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from tandem_gateway.errors import APIError
from tandem_gateway.limits import Limits

# Without keys, addresses stand for them, of which there are many.
_MAX_BUCKETS = 10_000


class _Bucket:
    """Holds a minute's worth and fills steadily; may owe, as answers' lengths aren't known."""

    def __init__(self, per_minute: int, now: float) -> None:
        self._per_minute = self._level = float(per_minute)
        self._at = now

    def level(self, now: float) -> float:
        filled = self._level + (now - self._at) * self._per_minute / 60
        self._level, self._at = min(self._per_minute, filled), now
        return self._level

    def take(self, amount: float, now: float) -> None:
        self._level = self.level(now) - amount

    def seconds_until(self, level: float, now: float) -> float:
        return max(0.0, (level - self.level(now)) * 60 / self._per_minute)


class Rates:
    """Requests and tokens a minute, by key."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = {
            "requests": limits.requests_per_minute,
            "tokens": limits.tokens_per_minute,
        }
        self._clock = clock
        self._buckets: dict[tuple[str, str], _Bucket] = {}

    def admit(self, owner: str) -> None:
        """Counts a request.

        Raises:
            APIError: 429, one of the rates is used up.
        """
        now = self._clock()
        for what in ("tokens", "requests"):
            bucket = self._bucket(what, owner, now)
            wait = bucket.seconds_until(1, now) if bucket else 0.0
            if wait > 0:
                raise APIError(
                    429,
                    f"more than {self._limits[what]} {what} a minute with this key",
                    f"{what}_rate_limit",
                    retry_after=math.ceil(wait),
                )
        if requests := self._bucket("requests", owner, now):
            requests.take(1, now)

    def charge(self, owner: str, num_tokens: int) -> None:
        """Counts tokens, of prompts and answers."""
        now = self._clock()
        if bucket := self._bucket("tokens", owner, now):
            bucket.take(num_tokens, now)

    def _bucket(self, what: str, owner: str, now: float) -> _Bucket | None:
        if not self._limits[what]:
            return None
        if (what, owner) not in self._buckets and len(self._buckets) >= _MAX_BUCKETS:
            self._buckets = {  # the full ones say nothing
                name: each
                for name, each in self._buckets.items()
                if each.seconds_until(self._limits[name[0]], now)
            }
        return self._buckets.setdefault((what, owner), _Bucket(self._limits[what], now))
