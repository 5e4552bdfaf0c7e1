"""Whether an answer is the same, token by token, however it comes about.

Plain decoding of one prompt after the other is what everything else is compared with: batches, each
drafter, other chunks, hits in the prefix cache, sequences that were preempted and computed again,
and answers that go on from their own middle, which is then computed as part of a prompt. In a type
as coarse as bfloat16 each of these would show where rounding depends on what else is in a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from typing import Any

from tandem import Engine, Sequence
from tandem_bench.results import Results
from tandem_bench.settings import Settings, bar
from tandem_bench.tables import Cells, table

PART = "invariance"
DTYPES = ("bfloat16", "float32")
TEMPERATURES = (0.0, 0.8)
_CONCURRENCIES = (8, 16)
_CHUNKS = (16, 50, 200)
# So many sequences fit into the cache where they are to be preempted.
_FEW = 4
_MARGIN = 16


@dataclass(frozen=True)
class Job:
    """One answer that is asked for, and the tokens that it should have."""

    prompt: list[int]
    seed: int
    expected: list[int]


@dataclass(frozen=True)
class Way:
    """How all prompts are answered.

    Attributes:
        engine: what the engine is asked for beside the bench's own settings.
        primes: prompts that are computed before, for the prefix cache.
        jobs: what is asked for, of the jobs that plain decoding alone has done.
    """

    name: str
    drafter: str = "none"
    concurrency: int = 1
    engine: dict[str, Any] = field(default_factory=dict)
    primes: Callable[[Items[Job]], Items[list[int]]] = lambda _: ()
    jobs: Callable[[Items[Job]], Items[Job]] = lambda jobs: jobs


def ways(drafters: Items[str], longest: int) -> Iterator[Way]:
    """All that is tried, those of one engine together.

    Args:
        longest: tokens of the longest prompt and its answer.
    """
    for concurrency in _CONCURRENCIES:
        yield Way(f"{concurrency} at a time", "none", concurrency)
    for drafter in drafters:
        yield Way(f"{drafter} alone", drafter)
        yield Way(f"{drafter}, 16 at a time", drafter, 16)
    yield Way("from the middle", "none", 8, jobs=_from_the_middle)
    for size in _CHUNKS:
        engine = {"max_num_batched_tokens": size, "lookahead": "fixed"}
        yield Way(f"chunks of {size}", "none", 4, engine)
    engine = {"enable_prefix_caching": True}
    yield Way("prefix hits", "none", 4, engine, _primes)
    yield Way("hits of answers", drafters[-1], 4, engine, jobs=_from_the_middle)
    length = longest + _MARGIN
    few = {"max_model_len": length, "kv_cache_tokens": _FEW * length}
    yield Way("preempted", drafters[-1], 16, few)


def run(settings: Settings) -> None:
    """Answers all prompts in all ways that are not in `invariance.json` yet, for all types."""
    results = settings.results(PART, ("num_prompts", "max_tokens"), temperatures=TEMPERATURES)
    longest = max(map(len, settings.prompts())) + settings.max_tokens
    drafters = [name for name in settings.drafters if name != "none"] or ["none"]
    todo = {
        dtype: [way for way in ways(drafters, longest) if way.name not in _done(results, dtype)]
        for dtype in DTYPES
    }
    steps = sum(1 + len(left) for left in todo.values() if left)
    with bar(PART, steps * len(TEMPERATURES), results) as shown:
        for dtype, left in todo.items():
            if not left:
                continue
            shown.say(f"{dtype}: loading")
            engine = Engine(settings.engine_config(max_num_seqs=16, dtype=dtype))
            loaded: dict[str, Any] = {}
            jobs: dict[float, list[Job]] = {}
            for temperature in TEMPERATURES:
                shown.say(f"{dtype}, temperature {temperature:g}: alone")
                prompts = [Job(p, seed, []) for seed, p in enumerate(settings.prompts())]
                found = answer(engine, settings, Way("alone"), prompts, temperature)
                jobs[temperature] = [
                    replace(job, expected=tokens)
                    for job, tokens in zip(prompts, found, strict=True)
                ]
                shown.advance()
            for way in left:
                if way.engine != loaded:
                    del engine
                    shown.say(f"{dtype}: loading")
                    config = settings.engine_config(max_num_seqs=16, dtype=dtype, **way.engine)
                    engine, loaded = Engine(config), way.engine
                cell = {}
                for temperature in TEMPERATURES:
                    shown.say(f"{dtype}, temperature {temperature:g}: {way.name}")
                    cell[f"{temperature:g}"] = compare(
                        engine, settings, way, jobs[temperature], temperature
                    )
                    shown.advance()
                results.put(dtype, results.cells.get(dtype, {}) | {way.name: cell})


def _done(results: Results, dtype: str) -> set[str]:
    return set(results.cells.get(dtype, {}))


def compare(
    engine: Engine, settings: Settings, way: Way, jobs: Items[Job], temperature: float
) -> dict[str, int]:
    """How many answers are the same, and that what was to be tried did happen."""
    wanted = way.jobs(jobs)
    for prompt in way.primes(jobs):
        # Its answer isn't wanted.
        one = replace(settings, max_tokens=1)
        answer(engine, one, Way("prime"), [Job(prompt, 0, [0])], temperature)
    preempted, hits = engine.load.num_preemptions, engine.stats.num_prefix_cache_hits
    found = answer(engine, settings, way, wanted, temperature)
    counted = {
        "same": sum(a == job.expected for a, job in zip(found, wanted, strict=True)),
        "answers": len(found),
    }
    if way.engine.get("enable_prefix_caching"):
        counted["tokens_hit"] = engine.stats.num_prefix_cache_hits - hits
    if "kv_cache_tokens" in way.engine:
        counted["preemptions"] = engine.load.num_preemptions - preempted
    return counted


def answer(
    engine: Engine, settings: Settings, way: Way, jobs: Items[Job], temperature: float
) -> list[list[int]]:
    """The tokens of all answers."""
    params = replace(settings.params, temperature=temperature)
    sequences = [
        engine.make_sequence(
            job.prompt,
            replace(params, seed=job.seed, max_tokens=len(job.expected) or params.max_tokens),
            drafter=way.drafter,
        )
        for job in jobs
    ]
    waiting, live = list(sequences), list[Sequence]()
    while waiting or live:
        while waiting and len(live) < way.concurrency:
            live.append(waiting.pop(0))
            engine.add(live[-1])
        engine.step()
        live = [sequence for sequence in live if not sequence.is_finished]
    return [sequence.output_ids for sequence in sequences]


def _primes(jobs: Items[Job]) -> list[list[int]]:
    """Beginnings of the prompts, each of another length in relation to blocks."""
    return [job.prompt[: max(1, len(job.prompt) - n)] for n, job in enumerate(jobs)]


def _from_the_middle(jobs: Items[Job]) -> list[Job]:
    """The answers from some place on: noise goes by place, so they go on as they did."""
    cuts = [1 + 7 * n % (len(job.expected) - 1) for n, job in enumerate(jobs)]
    return [
        Job(job.prompt + job.expected[:cut], job.seed, job.expected[cut:])
        for cut, job in zip(cuts, jobs, strict=True)
    ]


def summary(cells: Cells) -> str:
    """A row for each way: equal answers of each type."""
    return table(
        ["", *cells],
        [
            [
                f"{way}, temperature {temperature}",
                *(_said(c, way, temperature) for c in cells.values()),
            ]
            for way, counted in next(iter(cells.values())).items()
            for temperature in counted
        ],
    )


def _said(cell: dict[str, Any], way: str, temperature: str) -> str:
    counted = cell.get(way, {}).get(temperature)
    return f"{counted['same']}/{counted['answers']} same" if counted else "-"
