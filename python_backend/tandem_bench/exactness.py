"""What `batch_invariant` costs: engines with it against engines without, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from tandem import Engine, SamplingParams
from tandem_bench.figures import median
from tandem_bench.noise import undisturbed
from tandem_bench.prompts import prompt_of, seconds_to_first_token
from tandem_bench.settings import Settings, bar, turned
from tandem_bench.tables import Cells, table
from tandem_bench.workload import repeat_to_fill

PART = "exactness"
_CONCURRENCIES = (1, 4, 16)
_PROMPTS = (1000, 250)
_MAX_TOKENS = 64
# Of equal engines in a process the first is slower, by where its weights lie, and a later one a
# little faster: the first is not measured, and the others are loaded in an order that favours none.
_ORDER = (False, False, True, True, False)
_TURNS = 8


def run(settings: Settings) -> None:
    """Measures what is not in `exactness.json` yet."""
    results = settings.results(PART, ())
    texts = repeat_to_fill(settings.prompts(), max(_CONCURRENCIES))
    tokens = [token for text in texts for token in text]

    def first_token(length: int) -> Callable[[Engine, int], float]:
        return lambda engine, number: (
            1 / seconds_to_first_token(engine, prompt_of(tokens, length, number))
        )

    def decode(drafter: str, count: int) -> Callable[[Engine, int], float]:
        return lambda engine, _: tokens_per_second(engine, texts[:count], drafter)

    speeds = {f"first token of {length}": first_token(length) for length in _PROMPTS}
    for drafter in settings.drafters:
        for count in _CONCURRENCIES:
            speeds[f"{drafter}, {count} at a time"] = decode(drafter, count)
    todo = {name: speed for name, speed in speeds.items() if name not in results}
    with bar(PART, len(todo), results) as shown:
        if not todo:
            return
        shown.say("loading")
        config = settings.engine_config(max_num_seqs=max(_CONCURRENCIES))
        engines = [(on, Engine(replace(config, batch_invariant=on))) for on in _ORDER][1:]
        for name, speed in todo.items():
            shown.say(name)
            found, around = undisturbed(partial(in_turns, engines, speed))
            results.put(name, {**found, **around})
            shown.advance()


def in_turns(
    engines: list[tuple[bool, Engine]], speed: Callable[[Engine, int], float]
) -> dict[str, float]:
    """The median speed of both kinds, and their quotient."""
    found: dict[bool, list[float]] = {True: [], False: []}
    for number in range(_TURNS):
        for on, engine in turned(engines, number):
            found[on].append(speed(engine, number))
    with_it, without = median(found[True]), median(found[False])
    quotient = round(with_it / without, 3)
    return {"on": round(with_it, 2), "off": round(without, 2), "on / off": quotient}


def tokens_per_second(engine: Engine, texts: list[list[int]], drafter: str) -> float:
    """Of all that decode together, from when all do until the first has ended."""
    params = SamplingParams(max_tokens=_MAX_TOKENS, temperature=0.0, ignore_eos=True)
    sequences = [engine.make_sequence(text, params, drafter=drafter) for text in texts]
    for sequence in sequences:
        engine.add(sequence)
    while not all(sequence.is_decoding for sequence in sequences):
        engine.step()
    before, started = sum(s.num_output_tokens for s in sequences), time.perf_counter()
    while not any(sequence.is_finished for sequence in sequences):
        engine.step()
    seconds = time.perf_counter() - started
    num_tokens = sum(s.num_output_tokens for s in sequences) - before
    while engine.has_work:
        engine.step()
    return num_tokens / seconds


def summary(cells: Cells) -> str:
    """A row for each load: tokens a second, or prompts."""
    kinds = ("on", "off", "on / off")
    return table(
        ["a second", *kinds],
        [[name, *(cell[kind] for kind in kinds)] for name, cell in cells.items()],
    )
