"""Sends the same load to real pods and to simulated ones, and compares.

Each pod is a Triton with the default model on a core of its own, behind the deployed Envoy. The
costs must be those of such a pod: measured on one core. Two figures are found from one pod: what a
step takes beside its costs, and what a request takes beside its steps. Two pods are prediction.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from tandem_client import AsyncClient, Options
from tandem_fleet.costs import Costs
from tandem_fleet.local import Envoy, Pod
from tandem_fleet.pod import PodSettings
from tandem_fleet.simulation import Arrival, Fleet, Study, Workload, made_up_arrivals
from tandem_runtime.paths import ROOT
from tandem_runtime.server import ServerError

MODEL = ROOT / "model_repository/tandem"
PROMPTS = ROOT / "prompts/held_out.jsonl"
_FIRST_TOKEN, _WHOLE = "time to first token, mean", "whole answer, mean"
_FIRST = 0.25  # of the requests, while the pods fill


@dataclass(frozen=True)
class Times:
    """Of all requests, in seconds."""

    first_token: list[float]
    whole: list[float]

    def figures(self) -> dict[str, float]:
        """What is compared."""
        start = int(_FIRST * len(self.first_token))
        first, whole = self.first_token[start:], self.whole[start:]
        return {
            _FIRST_TOKEN: float(np.mean(first)),
            "time to first token, p50": float(np.quantile(first, 0.5)),
            "time to first token, p95": float(np.quantile(first, 0.95)),
            _WHOLE: float(np.mean(whole)),
            "whole answer, p95": float(np.quantile(whole, 0.95)),
        }

    def later(self, seconds: float) -> Times:
        """All of them this much later."""
        return Times([t + seconds for t in self.first_token], [t + seconds for t in self.whole])


def main() -> int:
    """Measures, simulates, prints, and returns the exit status."""
    arguments = parse_arguments()
    model = json.loads((MODEL / "1/model.json").read_text(encoding="utf-8"))
    settings = PodSettings(
        model["max_num_seqs"],
        512,
        model["max_num_seqs"] * model["max_model_len"],
        arguments.lookahead,
    )
    values = json.loads(arguments.costs.read_text(encoding="utf-8"))
    workload = Workload(arguments.prompt_tokens, arguments.output_tokens, 1, 0)

    def study(rest: float) -> Study:
        costs = Costs(values, arguments.drafter, arguments.acceptance, rest)
        return Study(costs, settings, workload, 1.0, Path())

    rest, delay, capacity = 0.0, 0.0, study(0.0).capacity()
    try:
        for num in (1, 2):
            rate = arguments.load * num * capacity
            arrivals = made_up_arrivals(workload, rate, arguments.seconds)
            measured = measure(num, arrivals, arguments.drafter, arguments.lookahead).figures()
            if num == 1:
                rest = find_rest(lambda r: simulate(study(r), 1, arrivals), measured)  # noqa: B023
                without = simulate(study(rest), 1, arrivals).figures()
                delay = measured[_FIRST_TOKEN] - without[_FIRST_TOKEN]
                print(f"a step takes {1000 * rest:.1f} ms beside its costs,")
                print(f"a request {1000 * delay:.1f} ms beside its steps")
            simulated = simulate(study(rest), num, arrivals).later(delay).figures()
            print(f"{num} pods, {rate:.2f} requests/s, {len(arrivals)} requests")
            print(f"{'':28}{'measured':>10}{'simulated':>11}{'ratio':>8}")
            for name, seconds in measured.items():
                ratio = simulated[name] / seconds
                print(f"{name:28}{seconds:10.3f}{simulated[name]:11.3f}{ratio:8.2f}", flush=True)
    except ServerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def find_rest(run: Callable[[float], Times], measured: dict[str, float]) -> float:
    """The seconds a step with which answers take as long, from the first token on, as measured."""

    def generation(figures: dict[str, float]) -> float:
        return figures[_WHOLE] - figures[_FIRST_TOKEN]

    low, high = 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        if generation(run(middle).figures()) < generation(measured):
            low = middle
        else:
            high = middle
    return low


def simulate(study: Study, num_pods: int, arrivals: list[Arrival]) -> Times:
    """The same requests to simulated pods."""
    requests = Fleet(study, num_pods, "least").replay(arrivals).requests
    return Times(
        [request.first_token_at - request.at for request in requests],
        [request.done_at - request.at for request in requests],
    )


def measure(num_pods: int, arrivals: list[Arrival], drafter: str, lookahead: int) -> Times:
    """The requests to real pods, when they come."""
    os.environ["OMP_NUM_THREADS"] = "1"
    cores = sorted(os.sched_getaffinity(0))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        pods = [
            Pod(copy_model(folder / str(number)), [cores[number % len(cores)]])
            for number in range(num_pods)
        ]
        for pod in pods:
            stack.callback(pod.stop)
            pod.start()
        envoy = stack.enter_context(Envoy(pods, folder))
        while envoy.num_healthy() < num_pods:
            time.sleep(0.1)
        options: Options = {"drafter": drafter, "temperature": 0.0, "ignore_eos": True}
        if drafter != "none":
            options["num_speculative_tokens"] = lookahead
        return asyncio.run(send(envoy.url, arrivals, options))


def copy_model(repository: Path) -> Path:
    """The default model in a repository of its own."""
    version = repository / "tandem/1"
    version.mkdir(parents=True)
    config = (MODEL / "config.pbtxt").read_text(encoding="utf-8")
    (repository / "tandem/config.pbtxt").write_text(config, encoding="utf-8")
    text = (MODEL / "1/model.json").read_text(encoding="utf-8")
    (version / "model.json").write_text(text.replace("../../..", str(ROOT)), encoding="utf-8")
    return repository


async def send(url: str, arrivals: list[Arrival], options: Options) -> Times:
    """Sends each request at its time, whatever became of the others."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / ".models/gemma-3-270m")
    lines = PROMPTS.read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line)["prompt"] for line in lines]
    tokens = list(chain.from_iterable(tokenizer(texts, add_special_tokens=False)["input_ids"]))
    tokens *= 1 + max(arrival.num_prompt for arrival in arrivals) // len(tokens)
    async with AsyncClient(url) as client:
        # The first makes the connections.
        await client.generate("x", max_tokens=1)
        start = time.monotonic()

        async def one(number: int, arrival: Arrival) -> tuple[float, float]:
            await asyncio.sleep(start + arrival.at - time.monotonic())
            offset = 37 * number % len(tokens)
            prompt = (tokens[offset:] + tokens[:offset])[: arrival.num_prompt]
            sent = time.monotonic()
            mine = options.copy()
            mine["max_tokens"] = arrival.num_output
            # In one response each: writing and reading thousands would take the pods' own time.
            answer = await client.generate(prompt, **mine)
            return answer.time_to_first_token or 0.0, time.monotonic() - sent

        pairs = await asyncio.gather(*(one(*pair) for pair in enumerate(arrivals)))
    return Times([first for first, _ in pairs], [whole for _, whole in pairs])


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--costs", type=Path, default=ROOT / "docs/scaling/costs-one-core.json")
    parser.add_argument("--drafter", default="none")
    parser.add_argument("--acceptance", type=float, nargs="+", default=[])
    parser.add_argument("--lookahead", type=int, default=0, help="guesses a step (0)")
    parser.add_argument("--load", type=float, default=0.5, help="share of capacity (0.5)")
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--prompt-tokens", type=int, default=40)
    parser.add_argument("--output-tokens", type=int, default=32)
    return parser.parse_args()
