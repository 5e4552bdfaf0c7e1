"""Tandem's engine without some of its mechanisms, as a worker; see `tandem_bench.mechanisms`."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterator
from collections.abc import Sequence as Items
from itertools import count
from pathlib import Path
from typing import Any

import psutil

from tandem import Engine, EngineConfig, SamplingParams, Sequence
from tandem_bench.switches import MECHANISMS, at_work, switch_off
from tandem_bench.worker import Handler, serve

# So that an engine takes little memory, as many are loaded at once.
_MAX_MODEL_LEN = 512


def load() -> tuple[Handler, dict[str, Any]]:
    """Loads the engine of a `model.json`, which always drafts as far as it may.

    An adaptive lookahead would draft more or less where something is switched off.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--max-num-seqs", type=int, required=True)
    parser.add_argument("--without", nargs="*", choices=MECHANISMS, default=[])
    arguments = parser.parse_args()
    switch_off(arguments.without)
    engine = Engine(
        dataclasses.replace(
            EngineConfig.from_json(arguments.config),
            max_num_seqs=arguments.max_num_seqs,
            max_model_len=_MAX_MODEL_LEN,
            enable_prefix_caching=False,
            lookahead="fixed",
        )
    )

    def handle(request: dict[str, Any]) -> dict[str, Any]:
        num_tokens, concurrency = request.pop("num_tokens"), request.pop("concurrency")
        return {
            **steady(engine, requests(engine, concurrency, **request), concurrency, num_tokens),
            "rss_mb": psutil.Process().memory_info().rss / 2**20,
        }

    return handle, {"at_work": at_work(engine)}


def requests(
    engine: Engine,
    concurrency: int,
    prompts: Items[list[int]],
    max_tokens: int,
    drafter: str,
    sampling: dict[str, Any],
) -> Iterator[Sequence]:
    """Sequences without end, each under a seed of its own.

    The first few are shorter by and by, so that those in flight never all end at once.
    """
    for number in count():
        share = min(1.0, (number + 1) / concurrency)
        params = SamplingParams(
            max_tokens=max(1, round(share * max_tokens)), seed=number, ignore_eos=True, **sampling
        )
        yield engine.make_sequence(prompts[number % len(prompts)], params, drafter=drafter)


def steady(
    engine: Engine, waiting: Iterator[Sequence], concurrency: int, num_tokens: int
) -> dict[str, Any]:
    """Counts so many tokens, from when all first requests decode, with always as many in flight."""
    live: set[Sequence] = set()

    def step() -> int:
        while len(live) < concurrency:
            sequence = next(waiting)
            live.add(sequence)
            engine.add(sequence)
        made = 0
        for delta in engine.step():
            if delta.sequence.error is not None:
                raise delta.sequence.error
            made += len(delta.token_ids)
            if delta.finish_reason is not None:
                live.remove(delta.sequence)
        return made

    step()
    first = set(live)
    while any(not sequence.is_finished and not sequence.is_decoding for sequence in first):
        step()
    started_at, made, num_steps = time.perf_counter(), 0, 0
    while made < num_tokens:
        made += step()
        num_steps += 1
    ended_at = time.perf_counter()
    for sequence in live:
        engine.cancel(sequence)
    while engine.has_work:
        engine.step()
    engine.check_integrity()
    return {
        "started_at": started_at,
        "ended_at": ended_at,
        "num_tokens": made,
        "num_steps": num_steps,
    }


if __name__ == "__main__":
    serve(load)
