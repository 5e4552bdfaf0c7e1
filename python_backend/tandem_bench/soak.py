"""Minutes of mixed load: does memory grow, and do all blocks come back?"""

from __future__ import annotations

import random
import time

import psutil

from tandem import Engine, SamplingParams, Sequence
from tandem_bench.settings import Settings, bar

PART = "soak"
_SAMPLE_SECONDS = 10
# By then allocators and caches have filled up.
_WARM_UP_SECONDS = 60
_SEED = 0


class Load:
    """Requests of all kinds, as many at once as the engine runs; one step in a hundred cancels."""

    def __init__(self, engine: Engine, settings: Settings) -> None:
        self._engine = engine
        self._settings = settings
        self._prompts = settings.prompts()
        self._chance = random.Random(_SEED)
        self._live: dict[Sequence, None] = {}
        self.num_requests = 0
        self.num_cancelled = 0

    def step(self) -> None:
        """Tops the load up and steps the engine once."""
        while len(self._live) < self._engine.config.max_num_seqs:
            sequence = self._make()
            self._engine.add(sequence)
            self._live[sequence] = None
            self.num_requests += 1
        if self._chance.random() < 0.01:
            self._engine.cancel(self._chance.choice(list(self._live)))
            self.num_cancelled += 1
        for delta in self._engine.step():
            if delta.finish_reason is not None:
                del self._live[delta.sequence]

    def _make(self) -> Sequence:
        chance = self._chance
        params = SamplingParams(
            max_tokens=chance.randint(1, 2 * self._settings.max_tokens),
            temperature=chance.choice((0.0, 0.7, 1.0)),
            top_p=chance.choice((0.9, 1.0)),
        )
        drafter = chance.choice(self._settings.drafters)
        return self._engine.make_sequence(chance.choice(self._prompts), params, drafter=drafter)

    def end(self) -> None:
        """Cancels what still runs."""
        for sequence in self._live:
            self._engine.cancel(sequence)
        self._engine.step()


def run(settings: Settings, minutes: float) -> None:
    """Runs for so many minutes, unless `soak.json` has it; memory is noted on the way."""
    results = settings.results(PART, (), minutes=minutes)
    if "end" in results:
        return
    results.cells.clear()
    seconds = 60 * minutes
    warm_up = min(_WARM_UP_SECONDS, seconds / 4)
    with bar(PART, round(seconds), results) as shown:
        shown.say("loading")
        engine = Engine(settings.engine_config())
        load = Load(engine, settings)
        samples: list[tuple[float, float]] = []
        shown.say(f"{engine.config.max_num_seqs} requests at once")
        start = last = time.monotonic()
        while (now := time.monotonic()) - start < seconds:
            load.step()
            if now - last >= min(_SAMPLE_SECONDS, warm_up):
                samples.append((round(now - start, 1), _rss_mb()))
                results.put("samples", samples)
                shown.advance(now - last)
                last = now
        load.end()
        engine.check_integrity()
        results.put(
            "end",
            {
                "num_requests": load.num_requests,
                "num_cancelled": load.num_cancelled,
                "num_steps": engine.stats.num_steps,
                "num_tokens": engine.stats.num_generation_tokens,
                "rss_mb_at_start": next(mb for second, mb in samples if second >= warm_up),
                "rss_mb_at_end": samples[-1][1],
                "kv_cache_blocks_used_at_end": engine.load.num_blocks_used,
            },
        )


def _rss_mb() -> float:
    return round(psutil.Process().memory_info().rss / 1e6, 1)
