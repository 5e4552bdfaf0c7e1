"""The adaptive lookahead against every fixed one, and guesses under shared noise against argmax.

All settings generate the same tokens, so they are compared on the same work: what counts is the
tokens a second of the steps that decode at full concurrency.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from typing import Any, NamedTuple

from tandem import Engine, SamplingParams, Sequence
from tandem_bench.figures import median
from tandem_bench.noise import undisturbed
from tandem_bench.settings import Settings, bar, turned
from tandem_bench.tables import Cells, table
from tandem_bench.workload import prompts_by_kind

PART = "lookahead"
NOISE_PART = "noise"
DRAFTER = "mtp"
MAX_LOOKAHEAD = 8
ADAPTIVE = "adaptive"
TEMPERATURES = (0.3, 0.7, 1.0, 1.3)
# Batches of requests that follow one another, by concurrency: few requests take longer.
_WAVES = {1: 5, 4: 3, 8: 2.5, 16: 2, 32: 1.5}
_FEWEST = 4
_COPIES = 3
_RANDOM_TOKENS = 48


class Load(NamedTuple):
    """Prompts of one kind, and how they are answered."""

    prompts: list[list[int]]
    temperature: float
    waves: float | None = None  # by concurrency if not given


def run(settings: Settings) -> None:
    """Measures every kind of text and concurrency that is not in `lookahead.json` yet."""
    results = settings.results(PART, ("max_tokens",), max_lookahead=MAX_LOOKAHEAD)
    loads = ("code", "prose", "copying", "random")
    todo = [
        (kind, concurrency)
        for concurrency in settings.concurrencies
        for kind in loads
        if f"{kind} c{concurrency}" not in results
    ]
    if not todo:
        return
    with bar(PART, len(todo), results) as shown:
        shown.say("loading")
        engine = load_engine(settings)
        for kind, concurrency in todo:
            shown.say(f"{kind}, concurrency {concurrency}")
            load = make_load(engine, kind)
            results.put(f"{kind} c{concurrency}", measure(engine, load, settings, concurrency))
            shown.advance()


def load_engine(settings: Settings, **changes: Any) -> Engine:
    """An engine whose drafter may guess as far as is compared."""
    config = settings.engine_config(**changes)
    drafters = {DRAFTER: {**config.drafters[DRAFTER], "num_speculative_tokens": MAX_LOOKAHEAD}}
    return Engine(replace(config, drafters=drafters, default_drafter=DRAFTER))


def make_load(engine: Engine, kind: str) -> Load:
    """`code`, `prose`: as they are; `copying`: a text twice, and begun again; `random` tokens."""
    tokenizer: Any = engine.tokenizer
    if kind == "random":
        chance = random.Random(0)
        tokens = range(1000, engine.verifier.model.config.get_text_config().vocab_size)
        return Load([chance.choices(tokens, k=_RANDOM_TOKENS) for _ in range(8)], 2.0, 1.0)
    texts = prompts_by_kind()[kind if kind == "code" else "prose"]
    if kind == "copying":
        texts = ["\n".join([text] * _COPIES) + "\n" for text in texts]
    return Load([list(tokenizer(text)["input_ids"]) for text in texts], 0.0)


def measure(engine: Engine, load: Load, settings: Settings, concurrency: int) -> dict[str, Any]:
    """Tokens a second of each lookahead, medians of the rounds, and what each drafted."""
    count = max(_FEWEST, int(concurrency * (load.waves or _WAVES.get(concurrency, 1.5))))
    params = [
        SamplingParams(
            max_tokens=settings.max_tokens, temperature=load.temperature, seed=n, ignore_eos=True
        )
        for n in range(count)
    ]
    requests = list(zip(islice(cycle(load.prompts), count), params, strict=True))
    choices: list[int | None] = [None, *range(MAX_LOOKAHEAD + 1)]
    decode(engine, requests, concurrency, None)  # to learn what this kind of text is like
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for number in range(settings.rounds):
        for k in turned(choices, number):
            figures, around = undisturbed(partial(decode, engine, requests, concurrency, k))
            found[ADAPTIVE if k is None else str(k)].append({**figures, **around})
    return {
        name: {figure: round(median([each[figure] for each in rounds]), 3) for figure in rounds[0]}
        for name, rounds in found.items()
    }


def decode(
    engine: Engine,
    requests: Items[tuple[list[int], SamplingParams]],
    concurrency: int,
    k: int | None,
) -> dict[str, float]:
    """Answers the requests; figures of the steps in which `concurrency` of them decode."""
    waiting = deque(
        engine.make_sequence(*request, drafter=DRAFTER, num_speculative_tokens=k)
        for request in requests
    )
    live: list[Sequence] = []
    tokens = drafts = steps = 0
    seconds = 0.0
    while waiting or live:
        while waiting and len(live) < concurrency:
            live.append(waiting.popleft())
            engine.add(live[-1])
        full = len(live) == concurrency and all(s.is_decoding for s in live)
        started = time.perf_counter()
        deltas = engine.step()
        took = time.perf_counter() - started
        if full:
            seconds += took
            steps += 1
            tokens += sum(len(delta.token_ids) for delta in deltas)
            drafts += sum(delta.num_draft_tokens for delta in deltas)
        live = [s for s in live if not s.is_finished]
    if not steps:
        raise ValueError(f"no step had all {concurrency} requests decoding: raise --max-tokens")
    return {
        "tokens_per_second": tokens / seconds,
        "tokens_per_step": tokens / steps,
        "drafts_per_step": drafts / steps,
    }


def summary(cells: Cells) -> str:
    """A row for each kind and concurrency: plain, the best fixed lookahead, adaptive."""
    rows = []
    for key, cell in sorted(cells.items(), key=lambda item: order(item[0])):
        rate = {name: each["tokens_per_second"] for name, each in cell.items()}
        best = max((name for name in rate if name != ADAPTIVE), key=lambda name: rate[name])
        kind, concurrency = key.rsplit(" c", 1)
        rows.append(
            [
                kind,
                concurrency,
                f"{rate['0']:.1f}",
                f"{rate[best]:.1f} (k={best})",
                f"{rate[ADAPTIVE]:.1f}",
                f"{cell[ADAPTIVE]['drafts_per_step'] / int(concurrency):.1f}",
                f"{rate[ADAPTIVE] / rate[best]:.2f}",
                f"{rate[ADAPTIVE] / rate['0']:.2f}",
            ]
        )
    header = ["text", "concurrency", "plain", "best fixed", "adaptive", "its k", "of best"]
    return table([*header, "of plain"], rows)


def order(key: str) -> tuple[str, int]:
    """Kinds together, concurrencies rising."""
    kind, concurrency = key.rsplit(" c", 1)
    return kind, int(concurrency)


# --- guesses under the verifier's noise, or the likeliest ones


def run_noise(settings: Settings) -> None:
    """Measures the acceptance of both kinds of guesses at temperatures above 0."""
    results = settings.results(NOISE_PART, ("num_prompts", "max_tokens"), dtype="float32")
    todo = [t for t in TEMPERATURES if f"{t:g}" not in results]
    if not todo:
        return
    with bar(NOISE_PART, 2 * len(todo), results) as shown:
        shown.say("loading")
        # Without ties of rounding, so that the same text is the same to the last token.
        engine = load_engine(settings, dtype="float32", lookahead="fixed")
        for temperature in todo:
            cell: dict[str, Any] = {}
            texts = []
            for name in ("shared noise", "argmax"):
                shown.say(f"temperature {temperature:g}, {name}")
                with nullcontext() if name == "shared noise" else _likeliest_guesses(engine):
                    cell[name], answers = accept(engine, settings, temperature)
                texts.append(answers)
                shown.advance()
            same = sum(a == b for a, b in zip(*texts, strict=True))
            results.put(f"{temperature:g}", {**cell, "same_text": same, "prompts": len(texts[0])})


def accept(
    engine: Engine, settings: Settings, temperature: float
) -> tuple[dict[str, Any], list[list[int]]]:
    """Acceptance at four guesses a round, and the answers, one request at a time."""
    engine.drafter_stats.pop(DRAFTER, None)
    answers = []
    for seed, prompt in enumerate(settings.prompts()):
        params = SamplingParams(
            max_tokens=settings.max_tokens, temperature=temperature, seed=seed, ignore_eos=True
        )
        [output] = engine.generate([prompt], params, drafter=DRAFTER, num_speculative_tokens=4)
        answers.append(output.token_ids)
    stats = engine.drafter_stats[DRAFTER]
    return {
        "mean_acceptance_length": round(1 + stats.num_accepted_tokens / stats.num_drafts, 3),
        "accepted_by_position": [round(chance, 3) for chance in stats.chances()],
    }, answers


@contextmanager
def _likeliest_guesses(engine: Engine) -> Iterator[None]:
    """Lets the drafter guess without noise."""
    drafter: Any = engine.drafters[DRAFTER]
    advance = drafter._advance

    def greedy(*inputs: Any) -> Any:
        *others, draws, packed = inputs
        calm = [draw._replace(params=replace(draw.params, temperature=0.0)) for draw in draws]
        return advance(*others, calm, packed)

    drafter._advance = greedy
    try:
        yield
    finally:
        drafter._advance = advance


def noise_summary(cells: Cells) -> str:
    """A row for each temperature."""
    names = ("shared noise", "argmax")
    return table(
        ["temperature", *names, "same text"],
        [
            [
                temperature,
                *(
                    f"{cell[name]['mean_acceptance_length']:.2f} ("
                    + " ".join(f"{c:.2f}" for c in cell[name]["accepted_by_position"])
                    + ")"
                    for name in names
                ),
                f"{cell['same_text']}/{cell['prompts']}",
            ]
            for temperature, cell in cells.items()
        ],
    )
