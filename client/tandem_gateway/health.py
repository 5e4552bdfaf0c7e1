"""Whether the server behind the gateway takes requests."""

from __future__ import annotations

import asyncio
import time

from tandem_gateway.models import Models

_VALID_SECONDS = 1.0


class Health:
    """Asks the server at most once a second, however many ask here."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._lock = asyncio.Lock()
        self._asked_at = float("-inf")
        self._is_ready = False

    async def is_ready(self) -> bool:
        """True when Triton and the processes of all models live and take requests."""
        async with self._lock:
            if time.monotonic() - self._asked_at > _VALID_SECONDS:
                self._is_ready = await self._models.are_ready()
                self._asked_at = time.monotonic()
            return self._is_ready
