"""The models that the gateway offers: those named at its start, or all that the server has."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Sequence

from tandem_client import AsyncClient, Description, RequestTimeoutError, TandemClientError
from tandem_gateway.errors import APIError, shorten

_VALID_SECONDS = 1.0
_ANSWER_SECONDS = 5.0
# A model may be loaded anew, with another chat template.
_DESCRIBED_SECONDS = 60.0


class Models:
    """Finds models by name, and asks the server at most once a second which there are.

    Args:
        client: of the server; its connection serves all models.
        names: the models to offer; the server is asked when there are none.
        any_name: whether the one model there is answers to every name.
    """

    def __init__(
        self, client: AsyncClient, names: Sequence[str] = (), *, any_name: bool = False
    ) -> None:
        self._client = client
        self._any_name = any_name
        self._is_fixed = bool(names)
        self._clients = {name: client.for_model(name) for name in names}
        # By name, with when they are asked for again.
        self._descriptions: dict[str, tuple[Description, float]] = {}
        self._lock = asyncio.Lock()
        self._asked_at = float("-inf")

    async def clients(self) -> dict[str, AsyncClient]:
        """All of them by name, in order.

        Raises:
            TandemClientError: the server doesn't say.
        """
        async with self._lock:
            if not self._is_fixed and time.monotonic() - self._asked_at > _VALID_SECONDS:
                names = await self._client.models()
                self._clients = {
                    name: self._clients.get(name) or self._client.for_model(name) for name in names
                }
                for name in self._descriptions.keys() - self._clients.keys():
                    del self._descriptions[name]
                self._asked_at = time.monotonic()
            return self._clients

    async def find(self, name: str) -> AsyncClient:
        """The client of a model; the server is asked only for one that isn't known yet.

        Raises:
            APIError: there is no such model.
            TandemClientError: the server doesn't say.
        """
        if name in self._clients:
            return self._clients[name]
        clients = await self.clients()
        meant = meant_by(name, clients, any_name=self._any_name)
        if meant is None:
            there = " and ".join(map(repr, clients)) or "none"
            message = f"the model {shorten(name)!r} does not exist; this server has {there}"
            raise APIError(404, message, "model_not_found", "model")
        return clients[meant]

    async def describe(self, name: str) -> Description:
        """What a model is; it is asked once a minute at most.

        Raises:
            APIError: there is no such model.
            TandemClientError: the model has never said.
        """
        client = await self.find(name)
        name = client.model
        known, until = self._descriptions.get(name, (None, 0.0))
        if known is not None and time.monotonic() < until:
            return known
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                known = await client.describe()
        except TimeoutError:
            if known is None:
                raise RequestTimeoutError(f"the model {name!r} doesn't answer") from None
        except TandemClientError:
            if known is None:
                raise
        self._descriptions[name] = known, time.monotonic() + _DESCRIBED_SECONDS
        return known

    async def are_ready(self) -> bool:
        """Whether there are models, and all of them take requests."""
        try:
            clients = await self.clients()
        except TandemClientError:
            return False
        ready = await asyncio.gather(*(client.is_ready() for client in clients.values()))
        return bool(ready) and all(ready)

    async def close(self) -> None:
        """Closes the connection."""
        await self._client.close()


def meant_by(name: str, there: Collection[str], *, any_name: bool = False) -> str | None:
    """The model that a name means, which may have its provider's before it: `openai/NAME`.

    Args:
        there: the models to choose from.
        any_name: whether the one that is there, if it is alone, is meant by every name.
    """
    fits = [each for each in there if name == each or name.endswith(f"/{each}")]
    if not fits and any_name and len(there) == 1:
        fits = list(there)
    return max(fits, key=len, default=None)
