"""Runs requests through an engine and notes when their tokens come."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from tandem import Delta, Engine, SamplingParams, Sequence
from tandem_bench.figures import Trace


@dataclass
class Run:
    """What one load did: a trace for each request, in their order, and what the engine counted.

    Traces count from `started_at` (`time.perf_counter`, which all processes here share).
    """

    traces: list[Trace]
    started_at: float = 0.0
    seconds: float = 0.0
    num_steps: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    # Seconds in each phase of the loop.
    phases: dict[str, float] = field(default_factory=dict)


def closed_loop(
    engine: Engine,
    prompts: Items[list[int]],
    params: SamplingParams,
    drafter: str,
    concurrency: int,
) -> Run:
    """Keeps `concurrency` requests in flight until all prompts are answered."""
    return _run(engine, prompts, params, drafter, [0.0] * len(prompts), concurrency)


def open_loop(
    engine: Engine,
    prompts: Items[list[int]],
    params: SamplingParams,
    drafter: str,
    arrivals: Items[float],
) -> Run:
    """Sends each prompt at its time of arrival (seconds from the start), whatever still runs.

    A request counts as sent when it arrived, even if a step that was running held it up.
    """
    return _run(engine, prompts, params, drafter, arrivals, len(prompts))


def _run(
    engine: Engine,
    prompts: Items[list[int]],
    params: SamplingParams,
    drafter: str,
    arrivals: Items[float],
    concurrency: int,
) -> Run:
    waiting = deque(zip(prompts, arrivals, strict=True))
    live: dict[Sequence, Trace] = {}
    run = Run([])
    engine.stats.phases.clear()
    first_step = engine.stats.num_steps
    start = run.started_at = time.perf_counter()
    while waiting or live:
        now = time.perf_counter() - start
        while waiting and waiting[0][1] <= now and len(live) < concurrency:
            prompt, arrival = waiting.popleft()
            sequence = engine.make_sequence(prompt, params, drafter=drafter)
            # In a closed loop a request is sent when there is room for it.
            live[sequence] = Trace(arrival or now, [], [], [])
            run.traces.append(live[sequence])
            engine.add(sequence)
        if not live:
            time.sleep(waiting[0][1] - now)
            continue
        deltas = engine.step()
        now = time.perf_counter() - start
        for delta in deltas:
            _note(delta, live[delta.sequence], now)
            if delta.finish_reason is not None:
                _count(delta.sequence, run)
                del live[delta.sequence]
        while engine.stats.phases:
            phase, seconds = engine.stats.phases.popleft()
            run.phases[phase] = run.phases.get(phase, 0.0) + seconds
    run.seconds = time.perf_counter() - start
    run.num_steps = engine.stats.num_steps - first_step
    return run


def _note(delta: Delta, trace: Trace, now: float) -> None:
    if delta.sequence.error is not None:
        raise delta.sequence.error
    if delta.token_ids:
        trace.times.append(now)
        trace.counts.append(len(delta.token_ids))
        trace.token_ids.extend(delta.token_ids)


def _count(sequence: Sequence, run: Run) -> None:
    run.num_drafts += sequence.num_drafts
    run.num_draft_tokens += sequence.num_draft_tokens
    run.num_accepted_tokens += sequence.num_accepted_tokens
