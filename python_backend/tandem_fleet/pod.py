"""A pod as a SimPy process, at the level of the engine's steps.

What is measured is what a step costs, and what follows is computed. Left out: preemption (a request
is admitted when its prompt and answer have room), and the spread of acceptance between texts.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict, deque
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import simpy

from tandem_fleet.costs import Costs


class Request:
    """One request, from its arrival.

    Args:
        conversation: to which it belongs.
        num_shared: tokens at the start of its prompt that were in the conversation's last turn.
    """

    def __init__(
        self,
        env: simpy.Environment,
        conversation: int,
        num_prompt: int,
        num_shared: int,
        num_output: int,
    ) -> None:
        self.at = float(env.now)
        self.conversation = conversation
        self.num_prompt = num_prompt
        self.num_shared = num_shared
        self.num_output = num_output
        self.num_cached = 0
        self.first_token_at = math.nan
        self.done_at = math.nan
        self.done = env.event()


@dataclass(frozen=True)
class PodSettings:
    """As in model.json."""

    max_num_seqs: int
    max_num_batched_tokens: int
    kv_cache_tokens: int
    lookahead: int | None  # None: what pays best
    max_prefill_slowdown: float = 2.0


class Pod:
    """One engine with its queue."""

    def __init__(self, env: simpy.Environment, costs: Costs, settings: PodSettings) -> None:
        self.env = env
        self.started_at = float(env.now)
        self.waiting: deque[Request] = deque()
        self.num_running = 0
        self.kv_used = 0
        self.num_tokens = 0
        self._costs = costs
        self._settings = settings
        self._prefilling: list[tuple[Request, int]] = []  # with the tokens still to compute
        # Tokens that every decoding sequence has got since the start: the order in which they end
        # never changes, whatever a step yields.
        self._progress = 0.0
        self._decoding: list[tuple[float, int, Request]] = []
        self._number = 0
        self._cached: OrderedDict[int, int] = OrderedDict()  # conversation -> tokens
        self._num_cached = 0
        self._arrival = env.event()
        env.process(self._run())

    @property
    def num_requests(self) -> int:
        """Running and waiting."""
        return self.num_running + len(self.waiting)

    @property
    def kv_usage(self) -> float:
        """Share of the KV cache that belongs to running requests."""
        return self.kv_used / self._settings.kv_cache_tokens

    def send(self, request: Request) -> None:
        """Takes a request into the queue."""
        self.waiting.append(request)
        if not self._arrival.triggered:
            self._arrival.succeed()

    def _run(self) -> Generator[simpy.Event, Any, None]:
        while True:
            self._admit()
            if not self.num_running:
                yield self._next_arrival()
                continue
            yield from self._prefill_step() if self._prefilling else self._decode_steps()

    def _next_arrival(self) -> simpy.Event:
        if self._arrival.triggered:
            self._arrival = self.env.event()
        return self._arrival

    def _admit(self) -> None:
        limits = self._settings
        while self.waiting and self.num_running < limits.max_num_seqs:
            request = self.waiting[0]
            needed = request.num_prompt + request.num_output
            if self.kv_used + needed > limits.kv_cache_tokens and self.num_running:
                return
            self.waiting.popleft()
            self.num_running += 1
            self.kv_used += needed
            cached = self._cached.pop(request.conversation, 0)
            self._num_cached -= cached
            request.num_cached = min(cached, request.num_shared)
            self._prefilling.append((request, request.num_prompt - request.num_cached))

    def _prefill_step(self) -> Generator[simpy.Event, Any, None]:
        """One step: decoding sequences first, and prompts with what is left of the budget."""
        lookahead = self._lookahead()
        decoding = len(self._decoding)
        limits = self._settings
        budget = max(1, limits.max_num_batched_tokens - decoding * (lookahead + 1))
        if decoding:
            slowdown = limits.max_prefill_slowdown
            budget = min(budget, self._costs.max_prompt_tokens(decoding, slowdown))
        left, ready, used = [], [], 0
        for request, tokens in self._prefilling:
            chunk = min(tokens, budget - used)
            used += chunk
            if chunk < tokens:
                left.append((request, tokens - chunk))
            else:
                ready.append(request)
        # The last token of a prompt gets logits, as a decoding sequence's.
        yield self.env.timeout(self._costs.step(max(1, decoding + len(ready)), used, lookahead))
        self._prefilling = left
        self._advance(1, lookahead)
        for request in ready:
            request.first_token_at = self.env.now
            self.num_tokens += 1
            self._number += 1
            entry = (self._progress + request.num_output - 1, self._number, request)
            heapq.heappush(self._decoding, entry)
        self._end_finished()

    def _decode_steps(self) -> Generator[simpy.Event, Any, None]:
        """Equal steps until a sequence ends, or an arrival can be admitted."""
        lookahead = self._lookahead()
        step = self._costs.step(len(self._decoding), 0, lookahead)
        gain = self._costs.tokens(lookahead)
        steps = max(1, math.ceil((self._decoding[0][0] - self._progress) / gain - 1e-9))
        start = self.env.now
        end = self.env.timeout(steps * step)
        if self._is_full():
            yield end
        else:
            yield end | self._next_arrival()
            if not end.processed:
                steps = min(steps, max(1, math.ceil((self.env.now - start) / step - 1e-9)))
                yield self.env.timeout(max(0.0, start + steps * step - self.env.now))
        self._advance(steps, lookahead)
        self._end_finished()

    def _is_full(self) -> bool:
        return bool(self.waiting) or self.num_running >= self._settings.max_num_seqs

    def _lookahead(self) -> int:
        fixed = self._settings.lookahead
        if fixed is not None:
            return min(fixed, self._costs.max_lookahead)
        return self._costs.best_lookahead(max(1, len(self._decoding)))

    def _advance(self, steps: int, lookahead: int) -> None:
        gain = steps * self._costs.tokens(lookahead)
        self.num_tokens += int(gain * len(self._decoding))
        self._progress += gain

    def _end_finished(self) -> None:
        while self._decoding and self._decoding[0][0] <= self._progress + 1e-9:
            _, _, request = heapq.heappop(self._decoding)
            request.done_at = self.env.now
            request.done.succeed()
            self.num_running -= 1
            size = request.num_prompt + request.num_output
            self.kv_used -= size
            self._num_cached += size - self._cached.pop(request.conversation, 0)
            self._cached[request.conversation] = size
        free = self._settings.kv_cache_tokens - self.kv_used
        while self._cached and self._num_cached > free:
            self._num_cached -= self._cached.popitem(last=False)[1]
