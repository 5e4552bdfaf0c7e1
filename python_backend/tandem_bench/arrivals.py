"""Requests that arrive when they like: a Poisson process at several rates, and latencies."""

from __future__ import annotations

import random
from collections.abc import Sequence as Items
from functools import partial
from itertools import accumulate

from tandem import Engine
from tandem_bench.drive import open_loop
from tandem_bench.noise import undisturbed
from tandem_bench.settings import Settings, bar
from tandem_bench.speed import figures, warm_up

PART = "arrivals"
_SEED = 0


def poisson(rate: float, count: int) -> list[float]:
    """Times of arrival in seconds, with exponential gaps; the same ones for every drafter."""
    gaps = random.Random(_SEED)
    return list(accumulate(gaps.expovariate(rate) for _ in range(count)))


def run(settings: Settings, rates: Items[float]) -> None:
    """Measures what is not in `arrivals.json` yet; rates are in requests a second."""
    results = settings.results(PART, ("num_prompts", "max_tokens"))
    todo = [
        (rate, drafter)
        for rate in rates
        for drafter in settings.drafters
        if key(drafter, rate) not in results
    ]
    if not todo:
        return
    with bar(PART, len(todo), results) as shown:
        shown.say("loading")
        engine = Engine(settings.engine_config())
        prompts = settings.prompts()
        warm_up(engine, prompts, settings)
        for rate, drafter in todo:
            shown.say(f"{drafter}, {rate:g} requests/s")
            arrivals = poisson(rate, len(prompts))
            done, surroundings = undisturbed(
                partial(open_loop, engine, prompts, settings.params, drafter, arrivals),
            )
            engine.check_integrity()
            cell = {"rate": rate, **figures(done), **surroundings}
            results.put(key(drafter, rate), cell)
            shown.advance()


def key(drafter: str, rate: float) -> str:
    """The name of one measurement."""
    return f"{drafter} at {rate:g}/s"
