"""Hours of mixed load: does memory grow, and do all blocks come back?"""

from __future__ import annotations

import random
import time

import psutil

from tandem import Engine, SamplingParams, Sequence
from tandem_bench.settings import Settings, bar

PART = "soak"
_SAMPLE_SECONDS = 10
# Allocators and caches have filled up by then.
_WARM_UP_SECONDS = 60
_SEED = 0


def run(settings: Settings, minutes: float) -> None:
    """Keeps the engine full of requests of all kinds, some of them cancelled; notes its memory."""
    results = settings.results(PART, (), minutes=minutes)
    if "end" in results:
        return
    with bar(PART, round(60 * minutes), results) as shown:
        shown.say("loading")
        engine = Engine(settings.engine_config())
        prompts = settings.prompts()
        chance = random.Random(_SEED)
        live: set[Sequence] = set()
        num_requests = num_cancelled = 0
        samples: list[tuple[int, int]] = []
        warm_up = min(_WARM_UP_SECONDS, 60 * minutes / 10)
        start = last = time.monotonic()
        while (now := time.monotonic()) - start < 60 * minutes:
            while len(live) < max(settings.concurrencies):
                sequence = engine.make_sequence(
                    chance.choice(prompts),
                    SamplingParams(
                        max_tokens=chance.randint(1, 2 * settings.max_tokens),
                        temperature=chance.choice((0.0, 0.7, 1.0)),
                        top_p=chance.choice((0.9, 1.0)),
                    ),
                    drafter=chance.choice(settings.drafters),
                )
                engine.add(sequence)
                live.add(sequence)
                num_requests += 1
            if chance.random() < 0.01:
                engine.cancel(chance.choice(sorted(live, key=lambda s: s.id)))
                num_cancelled += 1
            live -= {d.sequence for d in engine.step() if d.finish_reason is not None}
            if now - last >= _SAMPLE_SECONDS or (not samples and now - start >= warm_up):
                samples.append((round(now - start), _rss_mb()))
                shown.advance(now - last)
                last = now
        for sequence in live:
            engine.cancel(sequence)
        engine.step()
        engine.check_integrity()
        results.put("samples", samples)
        results.put(
            "end",
            {
                "num_requests": num_requests,
                "num_cancelled": num_cancelled,
                "num_steps": engine.stats.num_steps,
                "num_tokens": engine.stats.num_generation_tokens,
                "rss_mb_at_start": next(mb for s, mb in samples if s >= warm_up),
                "rss_mb_at_end": _rss_mb(),
                "blocks_used_at_end": engine.load.num_blocks_used,
            },
        )


def _rss_mb() -> int:
    return round(psutil.Process().memory_info().rss / 1e6)
