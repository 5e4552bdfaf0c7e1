"""From a request's prompts to the chunks of its answers, and what they cost."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from tandem_client import AsyncClient, Chunk, Options, Prompt, TandemClientError
from tandem_gateway.errors import APIError
from tandem_gateway.limits import Limits
from tandem_gateway.log import log_request, logger
from tandem_gateway.metrics import Metrics
from tandem_gateway.rates import Rates
from tandem_gateway.responses import Usage

# (choice, chunk), as they come.
Chunks = AsyncIterator[tuple[int, Chunk]]
# None where an answer ends.
Item = tuple[int, Chunk] | APIError | None
# Chunks that wait for a client that is slow to take them; then the server waits too.
_MAX_WAITING = 256


@dataclass(frozen=True)
class Payer:
    """Whom tokens are counted for: the key's name, and the owner of the rate."""

    key: str
    owner: str


class Generator:
    """Asks the server, for all requests of the gateway."""

    def __init__(self, limits: Limits, rates: Rates, metrics: Metrics) -> None:
        self._limits = limits
        self._rates = rates
        self._metrics = metrics
        self._num_streams = 0

    async def chunks(
        self,
        client: AsyncClient,
        prompts: Sequence[Prompt],
        options: Options,
        n: int,
        payer: Payer,
    ) -> Chunks:
        """All prompts at once; choice `n * i + j` is sequence j of prompt i.

        Args:
            client: of the model that is asked.
            payer: whom it is counted for.

        Raises:
            APIError: the request, or the server's answer to it, before the first chunk or later.
        """
        self._check(prompts)
        if n > 1:
            options["n"] = n
        queue: asyncio.Queue[Item] = asyncio.Queue(_MAX_WAITING)
        started, outcome = time.monotonic(), "cancelled"
        self._count(len(prompts))
        tasks = [
            asyncio.create_task(self._follow(client, queue, prompt, options, number * n))
            for number, prompt in enumerate(prompts)
        ]
        seen: set[int] = set()
        try:
            left = len(tasks)
            while left:
                item = await self._next(queue)
                if isinstance(item, APIError):
                    outcome = f"error {item.status}: {item}"
                    raise item
                if item is None:
                    left -= 1
                else:
                    self._charge(payer, item[1], is_first=item[0] // n not in seen)
                    seen.add(item[0] // n)
                    yield item
            outcome = "done"
        finally:
            self._count(-len(prompts))
            seconds = time.monotonic() - started
            log_request(options["request_id"], options["traceparent"], outcome, seconds)
            # Cancels the requests that still run, on the server too.
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _check(self, prompts: Sequence[Prompt]) -> None:
        if len(prompts) > self._limits.max_prompts:
            raise APIError(
                400,
                f"prompt: at most {self._limits.max_prompts} in one request, got {len(prompts)}",
                "too_many_prompts",
                "prompt",
            )
        if self._num_streams + len(prompts) > self._limits.max_streams:
            self._metrics.refused("streams")
            raise APIError(503, "too many prompts are being answered", "streams")

    async def _follow(
        self,
        client: AsyncClient,
        queue: asyncio.Queue[Item],
        prompt: Prompt,
        options: Options,
        first: int,
    ) -> None:
        try:
            async with aclosing(client.stream(prompt, **options)) as stream:
                async for chunk in stream:
                    await queue.put((first + chunk.index, chunk))
            await queue.put(None)
        except TandemClientError as error:
            await queue.put(APIError.of(error))
        except Exception as error:  # the others go on
            logger.exception("a request failed")
            await queue.put(APIError.of(error))

    async def _next(self, queue: asyncio.Queue[Item]) -> Item:
        seconds = self._limits.stream_idle_seconds
        try:
            async with asyncio.timeout(seconds):
                return await queue.get()
        except TimeoutError:
            return APIError(504, f"nothing came from the model for {seconds:g} s", "timeout")

    def _charge(self, payer: Payer, chunk: Chunk, *, is_first: bool) -> None:
        num_read = chunk.num_input_tokens if is_first else 0
        self._metrics.used(payer.key, num_read, chunk.num_output_tokens)
        self._rates.charge(payer.owner, num_read + chunk.num_output_tokens)

    def _count(self, change: int) -> None:
        self._num_streams += change
        self._metrics.streams.set(self._num_streams)


async def collect(chunks: Chunks, n: int) -> tuple[dict[int, list[Chunk]], Usage]:
    """All chunks by choice, and what they add up to."""
    answers: dict[int, list[Chunk]] = defaultdict(list)
    usage = Usage()
    async with aclosing(chunks):  # type: ignore[type-var]
        async for index, chunk in chunks:
            answers[index].append(chunk)
            usage.add(index // n, chunk)
    return answers, usage
