"""transformers' `generate` as a worker; asked with `prompts`, `max_tokens`, `concurrency`, `mode`.

Mode `plain` runs static batches of `concurrency` prompts, padded on the left; mode
`prompt_lookup` runs one prompt at a time, as transformers' assisted generation does only that.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from tandem_bench.figures import Trace
from tandem_bench.worker import Handler, serve

_PAD = 0


class _Clock(StoppingCriteria):
    """Never stops; notes when the sequences had how many tokens."""

    def __init__(self) -> None:
        self.lengths: list[tuple[float, int]] = []

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.lengths.append((time.perf_counter(), input_ids.shape[1]))
        return torch.zeros(len(input_ids), dtype=torch.bool)


def load() -> tuple[Handler, dict[str, Any]]:
    """Loads the model in bfloat16, as transformers does by default otherwise."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--num-lookup-tokens", type=int, required=True)
    arguments = parser.parse_args()
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.bfloat16)
    model.eval()
    # As `ignore_eos` elsewhere: an end of sequence is a token like any other.
    model.generation_config.eos_token_id = None

    def handle(request: dict[str, Any]) -> dict[str, Any]:
        lookup = request["mode"] == "prompt_lookup"
        options = {"prompt_lookup_num_tokens": arguments.num_lookup_tokens} if lookup else {}
        size = 1 if lookup else request["concurrency"]
        prompts = request["prompts"]
        start = time.perf_counter()
        traces = [
            trace
            for first in range(0, len(prompts), size)
            for trace in generate(
                model, prompts[first : first + size], request["max_tokens"], start, options
            )
        ]
        seconds = time.perf_counter() - start
        return {"traces": [dataclasses.asdict(t) for t in traces], "seconds": seconds}

    return handle, {"dtype": "bfloat16", "transformers": transformers.__version__}


def generate(
    model: Any, prompts: list[list[int]], max_tokens: int, start: float, options: dict[str, Any]
) -> list[Trace]:
    """One call of `generate` for a batch of prompts; times count from `start`."""
    length = max(map(len, prompts))
    rows = [[_PAD] * (length - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    clock = _Clock()
    sent = time.perf_counter() - start
    with torch.inference_mode():
        output = model.generate(
            torch.tensor(rows),
            attention_mask=torch.tensor(mask),
            max_new_tokens=max_tokens,
            do_sample=False,
            pad_token_id=_PAD,
            stopping_criteria=StoppingCriteriaList([clock]),
            **options,
        )
    times = [now - start for now, _ in clock.lengths]
    lengths = [length, *(count for _, count in clock.lengths)]
    counts = [after - before for before, after in itertools.pairwise(lengths)]
    answers = output[:, length:].tolist()
    return [Trace(sent, times, counts, answer) for answer in answers]


if __name__ == "__main__":
    serve(load)
