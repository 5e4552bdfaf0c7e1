"""Tandem's engine as a worker; asked with `prompts`, `max_tokens`, `concurrency`, `drafter`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from tandem import Engine, EngineConfig, SamplingParams
from tandem_bench.drive import closed_loop
from tandem_bench.worker import Handler, serve


def load() -> tuple[Handler, dict[str, Any]]:
    """Loads the engine of a `model.json`; prefixes are not cached, as prompts repeat."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--max-num-seqs", type=int, required=True)
    arguments = parser.parse_args()
    config = EngineConfig.from_json(arguments.config)
    changes = {"max_num_seqs": arguments.max_num_seqs, "enable_prefix_caching": False}
    engine = Engine(dataclasses.replace(config, **changes))

    def handle(request: dict[str, Any]) -> dict[str, Any]:
        params = SamplingParams(max_tokens=request["max_tokens"], temperature=0.0, ignore_eos=True)
        run = closed_loop(
            engine, request["prompts"], params, request["drafter"], request["concurrency"]
        )
        engine.check_integrity()
        return dataclasses.asdict(run)

    description = {
        "dtype": str(engine.verifier.model.dtype).removeprefix("torch."),
        "drafters": list(config.max_lookaheads),
    }
    return handle, description


if __name__ == "__main__":
    serve(load)
