"""What a long prompt costs those that decode meanwhile, and what a shared prefix saves."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from tandem import Engine, SamplingParams
from tandem_bench.figures import median
from tandem_bench.noise import undisturbed
from tandem_bench.settings import Settings, bar
from tandem_bench.windows import bytes_used, cancel
from tandem_bench.workload import repeat_to_fill

PART = "prompts"
_NUM_DECODING = 8
_LONG, _VERY_LONG = 4000, 32000
# Tokens that those who decode may write meanwhile.
_MEANWHILE = 6000
_SHARED, _OWN = 1000, 20
_CALM_STEPS = 40


def run(settings: Settings) -> None:
    """Measures what is not in `prompts.json` yet, each the median of the rounds."""
    results = settings.results(PART, ())
    runs: dict[str, tuple[Callable[..., dict[str, float]], int]] = {
        "long prompt": (partial(long_prompt, length=_LONG), settings.rounds),
        "shared prefix": (shared_prefix, settings.rounds),
        "very long prompt": (partial(long_prompt, length=_VERY_LONG), 1),
    }
    todo = {name: each for name, each in runs.items() if name not in results}
    with bar(PART, sum(rounds for _, rounds in todo.values()), results) as shown:
        texts = settings.prompts()
        tokens = [token for text in texts for token in text]
        loaded = 0
        for name, (run_once, rounds) in todo.items():
            room = (_VERY_LONG if "very" in name else _LONG) + 2 * settings.max_tokens
            if room != loaded:
                shown.say("loading")
                engine, loaded = _load(settings, room), room
            found = []
            for number in range(rounds):
                shown.say(f"{name}, round {number + 1}")
                figures, around = undisturbed(partial(run_once, engine, texts, tokens, number))
                found.append({**figures, **around})
                shown.advance()
            cell = {key: round(median([each[key] for each in found]), 3) for key in found[0]}
            results.put(name, cell)


def _load(settings: Settings, room: int) -> Engine:
    config = settings.engine_config(max_num_seqs=_NUM_DECODING + 1, enable_prefix_caching=True)
    num_tokens = room + _NUM_DECODING * min(room, _MEANWHILE)
    num_tokens = -(-num_tokens // config.block_size) * config.block_size
    return Engine(replace(config, max_model_len=room, kv_cache_tokens=num_tokens))


def long_prompt(
    engine: Engine, texts: list[list[int]], tokens: list[int], number: int, *, length: int
) -> dict[str, float]:
    """Milliseconds between the tokens of sequences that decode, before a prompt comes and while."""
    params = SamplingParams(max_tokens=engine.max_model_len, temperature=0.0, ignore_eos=True)
    decoding = [
        engine.make_sequence(text, params, drafter="none")
        for text in repeat_to_fill(texts, _NUM_DECODING)[:_NUM_DECODING]
    ]
    for sequence in decoding:
        engine.add(sequence)
    while not all(sequence.is_decoding for sequence in decoding):
        engine.step()
    calm = [_seconds(engine) for _ in range(_CALM_STEPS)]
    prompt = prompt_of(tokens, length, number)
    newcomer = engine.make_sequence(prompt, replace(params, max_tokens=1), drafter="none")
    engine.add(newcomer)
    busy: list[float] = []
    before, most = bytes_used(engine), 0
    while not newcomer.is_finished:
        busy.append(_seconds(engine))
        most = max(most, bytes_used(engine))
    cancel(engine, decoding)
    return {
        "prompt_tokens": length,
        "mib_more_in_the_cache": (most - before) / 2**20,
        "ms_before": 1e3 * median(calm),
        "ms_meanwhile": 1e3 * median(busy),
        "slowdown": median(busy) / median(calm),
        "slowdown_of_the_worst_step": max(busy) / median(calm),
        "seconds_to_first_token": sum(busy),
    }


def shared_prefix(
    engine: Engine, texts: list[list[int]], tokens: list[int], number: int
) -> dict[str, float]:
    """Milliseconds to the first token, of one request and of the next that begins alike."""
    # Not the beginning of any long prompt, which may still be in the cache.
    prefix = prompt_of(tokens, _SHARED, 500 + number)
    first, second = (
        seconds_to_first_token(engine, prefix + prompt_of(tokens, _OWN, 1000 + 2 * number + turn))
        for turn in range(2)
    )
    return {"ms_without": 1e3 * first, "ms_with": 1e3 * second, "times_as_fast": first / second}


def prompt_of(tokens: list[int], length: int, number: int) -> list[int]:
    """Text that no other number begins with."""
    start = 97 * number % len(tokens)
    turned = tokens[start:] + tokens[:start]
    return (turned * -(-length // len(turned)))[:length]


def seconds_to_first_token(engine: Engine, prompt: list[int]) -> float:
    """Of a request that comes alone."""
    params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    sequence = engine.make_sequence(prompt, params, drafter="none")
    start = time.perf_counter()
    engine.add(sequence)
    while not sequence.is_finished:
        engine.step()
    return time.perf_counter() - start


def _seconds(engine: Engine) -> float:
    start = time.perf_counter()
    engine.step()
    return time.perf_counter() - start
