"""vLLM's CPU build as a worker; asked with `prompts`, `max_tokens` and `concurrency`.

Runs in the virtual environment that `scripts/bench_peers.py` makes. Tokens are not turned into
text, as none of the others does that here; prefixes are not cached, as prompts repeat.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time
from collections import deque
from typing import Any

import vllm
from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.sampling_params import RequestOutputKind

from tandem_bench.figures import Trace
from tandem_bench.worker import Handler, serve

# The longest and the shortest run of tokens that is looked up.
_LOOKUP = {"prompt_lookup_max": 4, "prompt_lookup_min": 2}


def load() -> tuple[Handler, dict[str, Any]]:
    """Starts the engine in bfloat16, plain or with its n-gram drafter."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--max-num-seqs", type=int, required=True)
    parser.add_argument("--max-model-len", type=int, required=True)
    parser.add_argument("--num-ngram-tokens", type=int, default=0, help="0: plain")
    arguments = parser.parse_args()
    options: dict[str, Any] = {}
    if arguments.num_ngram_tokens:
        options["speculative_config"] = {
            "method": "ngram",
            "num_speculative_tokens": arguments.num_ngram_tokens,
            **_LOOKUP,
        }
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=arguments.model,
            dtype="bfloat16",
            max_num_seqs=arguments.max_num_seqs,
            max_model_len=arguments.max_model_len,
            enable_prefix_caching=False,
            **options,
        )
    )
    ids = itertools.count()

    def handle(request: dict[str, Any]) -> dict[str, Any]:
        params = SamplingParams(
            max_tokens=request["max_tokens"],
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        traces, seconds = closed_loop(
            engine, ids, request["prompts"], params, request["concurrency"]
        )
        return {"traces": [dataclasses.asdict(t) for t in traces], "seconds": seconds}

    return handle, {"dtype": "bfloat16", "vllm": vllm.__version__}


def closed_loop(
    engine: Any,
    ids: Any,
    prompts: list[list[int]],
    params: Any,
    concurrency: int,
) -> tuple[list[Trace], float]:
    """Keeps `concurrency` requests in flight until all prompts are answered."""
    waiting = deque(prompts)
    live: dict[str, Trace] = {}
    traces = []
    start = time.perf_counter()
    while waiting or live:
        while waiting and len(live) < concurrency:
            name = str(next(ids))
            live[name] = Trace(time.perf_counter() - start, [], [], [])
            traces.append(live[name])
            engine.add_request(name, {"prompt_token_ids": waiting.popleft()}, params)
        outputs = engine.step()
        now = time.perf_counter() - start
        for output in outputs:
            trace, tokens = live[output.request_id], list(output.outputs[0].token_ids)
            if tokens:
                trace.times.append(now)
                trace.counts.append(len(tokens))
                trace.token_ids.extend(tokens)
            if output.finished:
                del live[output.request_id]
    return traces, time.perf_counter() - start


if __name__ == "__main__":
    serve(load)
