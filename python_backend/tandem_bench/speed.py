"""The engine alone: throughput, latencies, phases of a step, for each drafter and concurrency."""

from __future__ import annotations

from functools import partial
from typing import Any

from tandem import Engine
from tandem_bench import ceilings
from tandem_bench.drive import Run, closed_loop
from tandem_bench.figures import agreement, summary
from tandem_bench.noise import undisturbed
from tandem_bench.settings import Settings, bar, turned
from tandem_bench.workload import repeat_to_fill

PART = "engine"
_DEPENDS = ("num_prompts", "max_tokens")


def run(settings: Settings) -> None:
    """Measures what is not in `engine.json` yet."""
    results = settings.results(PART, _DEPENDS)
    todo = [
        (drafter, concurrency, number)
        for number in range(settings.rounds)
        for concurrency in settings.concurrencies
        for drafter in turned(settings.drafters, number)
        if key(drafter, concurrency, number) not in results
    ]
    if not todo:
        return
    with bar(PART, len(todo), results) as shown:
        shown.say("loading")
        engine = Engine(settings.engine_config())
        prompts = settings.prompts()
        if "ceilings" not in results:
            results.put("ceilings", ceilings.measure())
        plain = warm_up(engine, prompts, settings)
        for drafter, concurrency, number in todo:
            shown.say(f"{drafter}, concurrency {concurrency}, round {number + 1}")
            load = repeat_to_fill(prompts, concurrency)
            done, surroundings = undisturbed(
                partial(closed_loop, engine, load, settings.params, drafter, concurrency),
            )
            shown.advance()
            engine.check_integrity()
            answers = [trace.token_ids for trace in done.traces[: len(plain)]]
            results.put(
                key(drafter, concurrency, number),
                {
                    **figures(done),
                    **surroundings,
                    "against_plain_alone": agreement(answers, plain),
                },
            )


def key(drafter: str, concurrency: int, number: int) -> str:
    """The name of one measurement."""
    return f"{drafter} c{concurrency} r{number}"


def warm_up(engine: Engine, prompts: list[list[int]], settings: Settings) -> list[list[int]]:
    """Runs every drafter once; the answers of a few prompts decoded plainly, one at a time."""
    for drafter in settings.drafters:
        closed_loop(engine, prompts[:2], settings.params, drafter, 2)
    alone = closed_loop(engine, prompts[:8], settings.params, "none", 1)
    return [trace.token_ids for trace in alone.traces]


def figures(run: Run) -> dict[str, Any]:
    """What is reported of a run of the engine."""
    steps = max(1, run.num_steps)
    return {
        **summary(run.traces, run.seconds),
        "num_steps": run.num_steps,
        "step_ms": round(1e3 * run.seconds / steps, 3),
        "phases_ms": {name: round(1e3 * s / steps, 3) for name, s in run.phases.items()},
        "acceptance_rate": _share(run.num_accepted_tokens, run.num_draft_tokens),
        "mean_acceptance_length": round(1 + run.num_accepted_tokens / max(1, run.num_drafts), 3),
    }


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None
