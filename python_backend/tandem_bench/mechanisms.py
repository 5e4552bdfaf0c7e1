"""What each of the engine's mechanisms on a CPU brings: the engine without it against all of it.

Each variant has a process of its own. All of a group take short turns at the same requests, and
count the same number of tokens from the middle of them. Not all fit into memory at once, so there
are groups, each with the whole engine in it. Of two processes that do the same, one may be 10 %
faster for as long as both live, as it lies elsewhere in memory; so they are new in each round.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import psutil

from tandem_bench.noise import undisturbed
from tandem_bench.settings import Settings, bar, turned
from tandem_bench.switches import MECHANISMS, without
from tandem_bench.turns import Load, in_turns
from tandem_bench.worker import Worker, WorkerError
from tandem_runtime.paths import ROOT

PART = "mechanisms"
_LOGS = ROOT / ".bench"
_CONCURRENCIES = (1, 16)
_DRAFTERS = ("none", "mtp")
_WAYS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.8, "top_p": 0.95},
}
# Of the whole engine; the others count as many tokens as it makes in this time. Turns are much
# shorter: memory changes its speed by some percent from second to second.
_SECONDS, _TURN_SECONDS = 1.2, 0.3
# Tokens of a request: to see how fast the engine is, and to warm it up.
_TRIAL_TOKENS, _WARM_UP_TOKENS = 16, 8
# How many prompts further each round begins.
_STRIDE = 7

ALL = "everything"
EAGER = "nothing compiled"
EAGER_NORMS = "nothing compiled, norms not fused"
_COMPILED = ("compiled pass", "compiled drafter step")
VARIANTS: dict[str, tuple[str, ...]] = {
    ALL: (),
    **{name: (name,) for name in MECHANISMS},
    EAGER: _COMPILED,
    EAGER_NORMS: (*_COMPILED, "fused norms"),
}
# An engine takes 1.6 GB.
GROUPS: dict[str, tuple[str, ...]] = {
    "kernels": (
        *(ALL, "likeliest in 8 bits", "exp sums", "own products"),
        *("joined linears", "int8 drafter weights"),
    ),
    "memory": (
        *(ALL, "tied embedding", "blocked matrix"),
        *("few kept products", "released file"),
    ),
    "passes": (ALL, "fused norms", *_COMPILED, "attention kernel", EAGER, EAGER_NORMS),
}


def run(settings: Settings) -> None:
    """Measures what is not in `mechanisms.json` yet."""
    results = settings.results(
        PART,
        ("num_prompts", "max_tokens"),
        lookahead="fixed",
        sampled=_WAYS["sampled"],
        seconds=_SECONDS,
        turn_seconds=_TURN_SECONDS,
    )
    cells = [
        (drafter, way, concurrency)
        for concurrency in settings.concurrencies
        for drafter in settings.drafters
        for way in _WAYS
        if concurrency in _CONCURRENCIES and drafter in _DRAFTERS
    ]
    todo = {
        (number, group): missing
        for number in range(settings.rounds)
        for group in GROUPS
        if (missing := [cell for cell in cells if key(group, *cell, number) not in results])
    }
    if not todo:
        return
    prompts = settings.prompts()
    with bar(PART, sum(map(len, todo.values())), results) as shown:
        for (number, group), missing in todo.items():
            shown.say(f"loading, {group}, round {number + 1}")
            with start(turned(GROUPS[group], number), settings) as workers:
                for name, worker in workers.items():
                    results.put(f"about {name}", worker.about)
                warm_up(workers, _request(prompts, settings, *missing[-1], number))
                for cell in missing:
                    shown.say(key(group, *cell, number))
                    request = _request(prompts, settings, *cell, number)
                    variants, surroundings = undisturbed(partial(measure, workers, request))
                    results.put(key(group, *cell, number), {**surroundings, "variants": variants})
                    shown.advance()


def key(group: str, drafter: str, way: str, concurrency: int, number: int) -> str:
    """The name of one measurement, of all variants of a group."""
    return f"{group}: {drafter} {way} c{concurrency} r{number}"


def _request(
    prompts: Items[list[int]],
    settings: Settings,
    drafter: str,
    way: str,
    concurrency: int,
    number: int,
) -> dict[str, Any]:
    return {
        "prompts": turned(prompts, number * _STRIDE),
        "max_tokens": settings.max_tokens,
        "drafter": drafter,
        "sampling": _WAYS[way],
        "concurrency": concurrency,
    }


@contextmanager
def start(names: Items[str], settings: Settings) -> Iterator[dict[str, Worker]]:
    """Starts a worker for each variant that is another engine on this machine.

    Raises:
        WorkerError: something that was switched off works, or something else doesn't.
    """
    command = [sys.executable, "-m", "tandem_bench.peers.tandem_without", str(settings.config)]
    command += ["--max-num-seqs", str(max(_CONCURRENCIES))]
    with ExitStack() as stack:
        # All at once, so that none has the first pages, or the last, to itself.
        workers = {
            name: Worker(
                name,
                [*command, "--without", *VARIANTS[name]],
                {},
                _LOGS / f"{name.replace(' ', '-')}.log",
            )
            for name in names
        }
        for worker in workers.values():
            stack.callback(worker.close)
        for worker in workers.values():
            worker.wait_ready()
        found = {name: set(worker.about["at_work"]) for name, worker in workers.items()}
        for name in names:
            if found[ALL].issuperset(VARIANTS[name]):
                check(name, found[ALL], found[name])
            else:
                del workers[name]
        yield workers


def check(name: str, whole: set[str], found: set[str]) -> None:
    """Whether a variant has what it should.

    Args:
        whole: the mechanisms of the whole engine on this machine.
        found: those of the variant.

    Raises:
        WorkerError: it has not.
    """
    expected = whole - without(VARIANTS[name])
    if found != expected:
        raise WorkerError(
            f"{name}: these work, and should not: {sorted(found - expected)}; these don't, and "
            f"should: {sorted(expected - found)}"
        )


def warm_up(workers: dict[str, Worker], request: dict[str, Any]) -> None:
    """Runs every variant shortly."""
    for worker in workers.values():
        worker.ask(**request, num_tokens=_WARM_UP_TOKENS * request["concurrency"])


def measure(workers: dict[str, Worker], request: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Figures of each variant, which take turns."""
    trial = workers[ALL].ask(**request, num_tokens=_TRIAL_TOKENS * request["concurrency"])
    rate = trial["num_tokens"] / (trial["ended_at"] - trial["started_at"])
    ask = {**request, "num_tokens": round(rate * _SECONDS)}
    loads = {
        name: Load(partial(worker.ask, **ask), partial(_process, worker.pid))
        for name, worker in workers.items()
    }
    answers = in_turns(list(loads.values()), _TURN_SECONDS)
    return {
        name: _figures(answer, load)
        for (name, load), answer in zip(loads.items(), answers, strict=True)
    }


def _process(pid: int) -> list[psutil.Process]:
    return [psutil.Process(pid)]


def _figures(answer: dict[str, Any], load: Load[dict[str, Any]]) -> dict[str, float]:
    seconds = load.own_seconds(answer["ended_at"]) - load.own_seconds(answer["started_at"])
    return {
        "tokens_per_second": round(answer["num_tokens"] / seconds, 2),
        "steps_per_second": round(answer["num_steps"] / seconds, 3),
        "seconds": round(seconds, 3),
        "rss_mb": round(answer["rss_mb"]),
    }
