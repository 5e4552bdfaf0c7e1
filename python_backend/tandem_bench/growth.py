"""How step time and memory grow with the context and with concurrency."""

from __future__ import annotations

import dataclasses
import time
from functools import partial
from typing import Any

import psutil

from tandem import Engine, SamplingParams
from tandem_bench.figures import median
from tandem_bench.noise import undisturbed
from tandem_bench.settings import Settings, bar
from tandem_bench.workload import prompt_of_length, repeat_to_fill

PART = "growth"
_STEPS = 24
_WARM_UP_STEPS = 4
# Room behind the prompt for what the steps add at most, with drafts.
_ROOM = (_STEPS + _WARM_UP_STEPS) * 17
# The longest of the short prompts.
_SHORT = 512


def run(settings: Settings, contexts: tuple[int, ...]) -> None:
    """Measures what is not in `growth.json` yet: contexts alone, concurrencies on short prompts."""
    results = settings.results(PART, ())
    todo = [
        (kind, size, drafter)
        for kind, sizes in (("context", contexts), ("concurrency", settings.concurrencies))
        for size in sizes
        for drafter in settings.drafters
        if key(kind, size, drafter) not in results
    ]
    if not todo:
        return
    with bar(PART, len(todo), results) as shown:
        shown.say("loading")
        longest = max(contexts) + _ROOM
        num_tokens = max(longest, max(settings.concurrencies) * (_SHORT + _ROOM))
        config = settings.engine_config(max_model_len=longest)
        # Whole blocks are allocated.
        num_blocks = -(-num_tokens // config.block_size)
        config = dataclasses.replace(config, kv_cache_tokens=num_blocks * config.block_size)
        engine = Engine(config)
        prompts = settings.prompts()
        for kind, size, drafter in todo:
            shown.say(f"{kind} {size}, {drafter}")
            load = (
                [prompt_of_length(prompts, size)]
                if kind == "context"
                else repeat_to_fill(prompts, size)[:size]
            )
            cell, surroundings = undisturbed(partial(measure, engine, load, drafter))
            results.put(key(kind, size, drafter), {**cell, **surroundings})
            shown.advance()


def key(kind: str, size: int, drafter: str) -> str:
    """The name of one measurement."""
    return f"{kind} {size} {drafter}"


def measure(engine: Engine, prompts: list[list[int]], drafter: str) -> dict[str, Any]:
    """Prefills all prompts at once, then times steps in which all of them decode."""
    params = SamplingParams(max_tokens=_ROOM, temperature=0.0, ignore_eos=True)
    sequences = [engine.make_sequence(prompt, params, drafter=drafter) for prompt in prompts]
    start = time.perf_counter()
    for sequence in sequences:
        engine.add(sequence)
    while not all(sequence.is_decoding for sequence in sequences):
        engine.step()
    prefill = time.perf_counter() - start
    times = []
    for _ in range(_WARM_UP_STEPS + _STEPS):
        start = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start)
    assert all(sequence.is_decoding for sequence in sequences), "a sequence ended too early"
    blocks = engine.load.num_blocks_used
    for sequence in sequences:
        engine.cancel(sequence)
    engine.step()
    engine.check_integrity()
    num_tokens = sum(map(len, prompts))
    return {
        "num_prompt_tokens": num_tokens,
        "prefill_s": round(prefill, 3),
        "prefill_tokens_per_second": round(num_tokens / prefill, 1),
        "step_ms": round(1e3 * median(times[_WARM_UP_STEPS:]), 2),
        "kv_cache_blocks_used": blocks,
        "rss_mb": round(psutil.Process().memory_info().rss / 1e6),
    }
