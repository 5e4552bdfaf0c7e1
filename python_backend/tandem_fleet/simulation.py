"""A simulated fleet: pods behind a balancer, what is sent to them, and an autoscaler."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import simpy

from tandem_fleet.balancing import balancer
from tandem_fleet.costs import Costs
from tandem_fleet.pod import Pod, PodSettings, Request

# How a pod starts and ends, and deploy/overlays/autoscale/hpa.yaml.
_BOOT_SECONDS = 90.0
_SYNC_SECONDS = 15.0
_CALM_SECONDS = 600.0
_SHRINK_SECONDS = 120.0
_TOLERANCE = 0.1
_MAX_PODS = 16
_SPREAD = 0.6  # of the logarithm of lengths


@dataclass(frozen=True)
class Workload:
    """Conversations of `turns` requests; lengths are means, in tokens."""

    prompt_tokens: int
    output_tokens: int
    turns: int
    think_seconds: float


@dataclass(frozen=True)
class Study:
    """What all studies share."""

    costs: Costs
    settings: PodSettings
    workload: Workload
    price: float
    output: Path

    def capacity(self) -> float:
        """Requests a second that one pod can serve with all its places taken, nothing cached."""
        num, costs = self.settings.max_num_seqs, self.costs
        fixed = self.settings.lookahead
        lookahead = costs.best_lookahead(num) if fixed is None else min(fixed, costs.max_lookahead)
        token = costs.step(num, 0, lookahead) / num / costs.tokens(lookahead)
        prompt = costs.step(1, 100, 0) / 100 - costs.step(1, 0, 0) / 100
        work = self.workload
        # Each turn's prompt holds all before it.
        turn = work.prompt_tokens + work.output_tokens
        num_prompt = work.prompt_tokens + turn * (work.turns - 1) / 2
        return 1 / (num_prompt * prompt + work.output_tokens * token)


@dataclass(frozen=True)
class Arrival:
    """A request that stands alone: when it comes, in seconds, and its tokens."""

    at: float
    num_prompt: int
    num_output: int


def made_up_arrivals(workload: Workload, rate: float, seconds: float) -> list[Arrival]:
    """Requests of one load, as they may come; always the same."""
    rng, now, arrivals = random.Random(0), 0.0, []
    while (now := now + rng.expovariate(rate)) < seconds:
        prompt = _length(rng, workload.prompt_tokens)
        arrivals.append(Arrival(now, prompt, _length(rng, workload.output_tokens)))
    return arrivals


def _length(rng: random.Random, mean: int) -> int:
    median = math.log(mean) - _SPREAD**2 / 2
    return max(1, min(8 * mean, round(rng.lognormvariate(median, _SPREAD))))


@dataclass
class Fleet:
    """Pods, and the requests that went to them.

    Args:
        rule: see `balancing.balancer`.
    """

    study: Study
    num_pods: int
    rule: str
    seed: int = 0
    env: simpy.Environment = field(default_factory=simpy.Environment)
    requests: list[Request] = field(default_factory=list)
    pod_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.pods = [self._pod() for _ in range(self.num_pods)]
        self._draining: list[tuple[Pod, float]] = []
        self._balance = balancer(self.rule, self.rng)
        self.most_pods = self.num_pods
        self._num_running = 0
        self._boots: list[float] = []  # when pods that are starting will be ready

    def run(self, rate: Callable[[float], float], seconds: float) -> Fleet:
        """Lets conversations begin at `rate(now)` requests a second, for so long."""
        self.env.process(self._arrivals(rate, seconds))
        self.env.run(until=seconds)
        self.pod_seconds += sum(seconds - pod.started_at for pod in self.pods)
        self.pod_seconds += sum(seconds - pod.started_at for pod, _ in self._draining)
        return self

    def replay(self, arrivals: Sequence[Arrival]) -> Fleet:
        """Lets these requests come, and ends when all are done."""
        for number, arrival in enumerate(arrivals):
            self.env.process(self._arrive(number, arrival))
        self.env.run()
        return self

    def _arrive(self, number: int, arrival: Arrival) -> Generator[simpy.Event, Any, None]:
        yield self.env.timeout(arrival.at)
        yield from self._serve(Request(self.env, number, arrival.num_prompt, 0, arrival.num_output))

    def scale(self, signal: str) -> None:
        """Lets the number of pods follow "requests", "queue" or "kv"."""
        self.env.process(self._autoscaler(signal))

    def first_token_seconds(self, skip: float = 0.25) -> np.ndarray[Any, Any]:
        """Times to first token of those that came after the first `skip` of the time, sorted.

        Requests that got none by the end count with what they have waited.
        """
        start = skip * self.env.now
        ends = [
            (r.first_token_at if r.first_token_at == r.first_token_at else self.env.now) - r.at
            for r in self.requests
            if r.at >= start
        ]
        return np.sort(ends)

    @property
    def num_tokens(self) -> int:
        """Generated, by all pods that there ever were."""
        return sum(r.num_output for r in self.requests if r.done_at == r.done_at)

    def price(self) -> float:
        """Of a million generated tokens."""
        hours = self.pod_seconds / 3600
        return self.study.price * hours / max(1e-9, self.num_tokens / 1e6)

    def _pod(self) -> Pod:
        return Pod(self.env, self.study.costs, self.study.settings)

    def _arrivals(
        self, rate: Callable[[float], float], seconds: float
    ) -> Generator[simpy.Event, Any, None]:
        turns, number = self.study.workload.turns, 0
        while self.env.now < seconds:
            yield self.env.timeout(self.rng.expovariate(rate(self.env.now) / turns))
            number += 1
            self.env.process(self._conversation(number))

    def _conversation(self, number: int) -> Generator[simpy.Event, Any, None]:
        workload, limit = self.study.workload, self.study.settings.kv_cache_tokens // 2
        shared = 0
        for _ in range(workload.turns):
            prompt = min(limit, shared + _length(self.rng, workload.prompt_tokens))
            request = Request(
                self.env, number, prompt, shared, _length(self.rng, workload.output_tokens)
            )
            yield from self._serve(request)
            shared = min(limit, prompt + request.num_output)
            if workload.think_seconds:
                yield self.env.timeout(self.rng.expovariate(1 / workload.think_seconds))

    def _serve(self, request: Request) -> Generator[simpy.Event, Any, None]:
        self.requests.append(request)
        self._num_running += 1
        self._balance(self.pods, self._num_running, request).send(request)
        yield request.done
        self._num_running -= 1

    def _autoscaler(self, signal: str) -> Generator[simpy.Event, Any, None]:
        wanted: deque[tuple[float, int]] = deque()
        shrunk_at = 0.0
        while True:
            yield self.env.timeout(_SYNC_SECONDS)
            now = self.env.now
            pods = len(self.pods)
            ratio = self._load(signal) / pods
            desired = pods if abs(ratio - 1) <= _TOLERANCE else math.ceil(ratio * pods - 1e-9)
            wanted.append((now, desired))
            while wanted[0][0] < now - _CALM_SECONDS:
                wanted.popleft()
            booting = sum(1 for at in self._boots if at > now)
            if desired > pods + booting:
                room = _MAX_PODS - pods - booting
                for _ in range(min(desired - pods - booting, max(2, pods + booting), room)):
                    self.env.process(self._boot())
            elif (
                max(self.num_pods, *(n for _, n in wanted)) < pods
                and now >= shrunk_at + _SHRINK_SECONDS
            ):
                shrunk_at = now
                self.env.process(self._drain(self.pods.pop()))

    def _load(self, signal: str) -> float:
        """The sum over the pods, in targets of one pod."""
        if signal == "requests":
            target = 0.75 * self.study.settings.max_num_seqs
            return sum(pod.num_requests for pod in self.pods) / target
        if signal == "queue":
            return sum(len(pod.waiting) for pod in self.pods) / 2
        return sum(pod.kv_usage for pod in self.pods) / 0.8

    def _boot(self) -> Generator[simpy.Event, Any, None]:
        started = self.env.now
        self._boots.append(started + _BOOT_SECONDS)
        yield self.env.timeout(_BOOT_SECONDS)
        pod = self._pod()
        pod.started_at = started
        self.pods.append(pod)
        self.most_pods = max(self.most_pods, len(self.pods))

    def _drain(self, pod: Pod) -> Generator[simpy.Event, Any, None]:
        self._draining.append((pod, self.env.now))
        while pod.num_requests:
            yield self.env.timeout(1)
        self._draining = [pair for pair in self._draining if pair[0] is not pod]
        self.pod_seconds += self.env.now - pod.started_at
