"""The prefix cache's hit rate through Envoy, with affinity by conversation and without.

Each pod is a Triton with the default model on a core of its own. The same conversations run twice,
in different words: once with a `prompt_cache_key`, by which Envoy picks the pod, and once without.
Between turns a user reads: without that pause, the pod that has just answered is the one with the
fewest requests and gets the next turn anyway.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import requests
from prometheus_client.parser import text_string_to_metric_families

from tandem_client import AsyncClient, Options
from tandem_fleet.local import Envoy, Pod
from tandem_fleet.measure import PROMPTS, copy_model
from tandem_runtime.server import ServerError

_HITS, _QUERIES = "tandem:prefix_cache_hits_total", "tandem:prefix_cache_queries_total"


def main() -> int:
    """Measures, prints, and returns the exit status."""
    arguments = parse_arguments()
    os.environ["OMP_NUM_THREADS"] = "1"
    cores = sorted(os.sched_getaffinity(0))
    try:
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            pods = [
                Pod(copy_model(folder / str(number)), [cores[number % len(cores)]])
                for number in range(arguments.pods)
            ]
            for pod in pods:
                stack.callback(pod.stop)
                pod.start()
            envoy = stack.enter_context(Envoy(pods, folder))
            for name, affinity in (("with affinity", True), ("without", False)):
                before = totals(pods)
                asyncio.run(converse(envoy.url, arguments, name, affinity))
                hits, queries = (b - a for a, b in zip(before, totals(pods), strict=True))
                share = hits / max(1, queries)
                print(f"{name:14}{hits:8.0f} of {queries:8.0f} tokens found: {share:.0%}")
    except ServerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def totals(pods: list[Pod]) -> tuple[float, float]:
    """Tokens found and asked for, of all pods."""
    sums = dict.fromkeys((_HITS, _QUERIES), 0.0)
    for pod in pods:
        page = requests.get(pod.server.metrics_url, timeout=5).text
        for family in text_string_to_metric_families(page):
            for sample in family.samples:
                if sample.name in sums:
                    sums[sample.name] += sample.value
    return sums[_HITS], sums[_QUERIES]


async def converse(url: str, arguments: argparse.Namespace, name: str, affinity: bool) -> None:
    """Conversations side by side; each turn's prompt is all that was said before, and more."""
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["prompt"] for line in lines]

    async def one(client: AsyncClient, number: int) -> None:
        text = f"{name}, {number}. "
        draw = random.Random(number)
        for turn in range(arguments.turns):
            text += texts[(number * arguments.turns + turn) % len(texts)] + "\n"
            options: Options = {"max_tokens": 32, "temperature": 0.0}
            if affinity:
                options["prompt_cache_key"] = f"{name} {number}"
            answer = await client.generate(text, **options)
            text += answer.text + "\n"
            await asyncio.sleep(draw.expovariate(1 / arguments.think_seconds))

    async with AsyncClient(url) as client:
        await asyncio.gather(*(one(client, n) for n in range(arguments.conversations)))


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pods", type=int, default=2)
    parser.add_argument("--conversations", type=int, default=12)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--think-seconds", type=float, default=3, help="between turns, mean (3)")
    return parser.parse_args()
