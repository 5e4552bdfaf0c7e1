"""Whether an answer is the same alone and in a batch, with drafts and without, and what it costs.

In bfloat16 two ways of computing the same thing round differently, and sooner or later a close
decision falls otherwise; `batch_invariant` leaves one way only.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from typing import Any

from tandem import Engine, Sequence
from tandem_bench.noise import undisturbed
from tandem_bench.settings import Settings, bar
from tandem_bench.tables import Cells, table

PART = "invariance"
_CONCURRENCY = 16
_TEMPERATURES = (0.0, 1.0)


def run(settings: Settings) -> None:
    """Answers all prompts in all ways that are not in `invariance.json` yet."""
    results = settings.results(PART, ("num_prompts", "max_tokens"), concurrency=_CONCURRENCY)
    todo = [
        (invariant, temperature)
        for invariant in (True, False)
        for temperature in _TEMPERATURES
        if name(invariant, temperature) not in results
    ]
    if not todo:
        return
    # Drafter, and requests at a time; the first is what the others are compared with.
    ways = [("none", 1), *((drafter, _CONCURRENCY) for drafter in settings.drafters)]
    ways.append((settings.drafters[-1], 1))
    with bar(PART, len(todo) * len(ways), results) as shown:
        engine, loaded = None, None
        for invariant, temperature in todo:
            if engine is None or loaded != invariant:
                shown.say("loading")
                config = settings.engine_config(max_num_seqs=_CONCURRENCY)
                engine, loaded = Engine(replace(config, batch_invariant=invariant)), invariant
            cell: dict[str, Any] = {}
            expected: list[list[int]] = []
            for drafter, concurrency in ways:
                shown.say(f"{name(invariant, temperature)}, {drafter}, {concurrency} at a time")
                (answers, seconds), around = undisturbed(
                    partial(answer, engine, settings, drafter, concurrency, temperature)
                )
                expected = expected or answers
                cell[f"{drafter}, {concurrency} at a time"] = {
                    "same": sum(a == b for a, b in zip(answers, expected, strict=True)),
                    "prompts": len(answers),
                    "tokens_per_second": round(sum(map(len, answers)) / seconds, 1),
                    **around,
                }
                shown.advance()
            results.put(name(invariant, temperature), cell)


def name(invariant: bool, temperature: float) -> str:
    """What a cell is called."""
    return f"batch_invariant {str(invariant).lower()}, temperature {temperature:g}"


def answer(
    engine: Engine, settings: Settings, drafter: str, concurrency: int, temperature: float
) -> tuple[list[list[int]], float]:
    """All answers, and how long they took."""
    waiting = [
        engine.make_sequence(
            prompt, replace(settings.params, temperature=temperature, seed=seed), drafter=drafter
        )
        for seed, prompt in enumerate(settings.prompts())
    ]
    sequences = list(waiting)
    live: list[Sequence] = []
    started = time.perf_counter()
    while waiting or live:
        while waiting and len(live) < concurrency:
            live.append(waiting.pop(0))
            engine.add(live[-1])
        engine.step()
        live = [sequence for sequence in live if not sequence.is_finished]
    return [sequence.output_ids for sequence in sequences], time.perf_counter() - started


def summary(cells: Cells) -> str:
    """A row for each mode and temperature: equal answers and speed in each way."""
    ways = list(next(iter(cells.values())))
    return table(
        ["", *ways],
        [
            [
                key,
                *(
                    f"{cell[way]['same']}/{cell[way]['prompts']} same, "
                    f"{cell[way]['tokens_per_second']:.0f} tokens/s"
                    for way in ways
                ),
            ]
            for key, cell in cells.items()
        ],
    )
