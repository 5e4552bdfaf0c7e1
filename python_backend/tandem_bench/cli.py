"""Measures Tandem: each part writes a file of results, step by step, and goes on if it is stopped.

Parts, each of which can be run alone:
  ceilings  what the machine can do at best: reading memory, products in bfloat16
  engine    the engine alone: throughput, latencies, phases of a step, by drafter and concurrency
  profile   where the time of a step goes, by torch's profiler
  triton    the same load through Triton and gRPC (perf_analyzer), in turns with the engine alone
  peers     transformers' generate and, after `make bench-peers`, vLLM, in turns with Tandem
  lookahead the adaptive lookahead against every fixed one, on four kinds of text
  noise     acceptance of guesses under shared noise against the likeliest ones
  mechanisms  what each mechanism for a CPU brings: the engine without it, in turns with all of it
  invariance  whether answers are the same alone, in a batch and with drafts
  exactness  what batch_invariant costs, in turns with an engine without it
  prompts   what a long prompt costs those that decode, and what a shared prefix saves
  windows   what freeing K/V behind a window saves, against keeping all of it
  growth    step time and memory as context and concurrency grow
  arrivals  latencies when requests arrive as a Poisson process
  soak      memory over minutes of mixed load
  report    tables and plots of all that was measured; with --readme into README.md as well
  all       all of these in turn
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from transformers.utils import logging as transformers_logging

from tandem.errors import TandemError
from tandem_bench import (
    arrivals,
    ceilings,
    compare,
    exactness,
    growth,
    invariance,
    lookahead,
    mechanisms,
    profile,
    prompts,
    report,
    soak,
    speed,
    through_triton,
    windows,
)
from tandem_bench.settings import Settings
from tandem_bench.worker import WorkerError
from tandem_runtime.server import ServerError

_EXAMPLES = """examples:
  python scripts/bench.py all                             # hours; what make bench does
  python scripts/bench.py engine -c 1 8 --drafters none mtp --rounds 1
  python scripts/bench.py peers -c 1 --prompts 8 --rounds 2 --output /tmp/try
  python scripts/bench.py arrivals --rates 0.5 1 2
  python scripts/bench.py soak --minutes 30
  python scripts/bench.py report --readme
"""

PARTS: dict[str, Callable[[Settings, argparse.Namespace], None]] = {
    "ceilings": lambda settings, _: ceilings.run(settings),
    "engine": lambda settings, _: speed.run(settings),
    "profile": lambda settings, _: profile.run(settings),
    "triton": lambda settings, _: through_triton.run(settings),
    "peers": lambda settings, _: compare.run(settings),
    "lookahead": lambda settings, _: lookahead.run(settings),
    "noise": lambda settings, _: lookahead.run_noise(settings),
    "mechanisms": lambda settings, _: mechanisms.run(settings),
    "invariance": lambda settings, _: invariance.run(settings),
    "exactness": lambda settings, _: exactness.run(settings),
    "prompts": lambda settings, _: prompts.run(settings),
    "windows": lambda settings, _: windows.run(settings),
    "growth": lambda settings, given: growth.run(settings, tuple(given.contexts)),
    "arrivals": lambda settings, given: arrivals.run(settings, given.rates),
    "soak": lambda settings, given: soak.run(settings, given.minutes),
    "report": lambda settings, given: report.run(settings.output, given.readme),
}


def main() -> int:
    """Runs the parts asked for and returns the exit status."""
    # SIGTERM acts as Ctrl-C does, and so does SIGINT where a shell's background job ignores it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    arguments = parse_arguments()
    transformers_logging.disable_progress_bar()
    settings = Settings(
        config=arguments.config,
        output=arguments.output,
        num_prompts=arguments.prompts,
        max_tokens=arguments.max_tokens,
        rounds=arguments.rounds,
        concurrencies=tuple(arguments.concurrency),
        drafters=tuple(arguments.drafters),
    )
    try:
        for part in PARTS if arguments.part == "all" else [arguments.part]:
            PARTS[part](settings, arguments)
    except (TandemError, WorkerError, ServerError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = Settings()
    parser.add_argument("part", choices=[*PARTS, "all"])
    parser.add_argument(
        "--output", type=Path, default=defaults.output, help="of the results (default benchmarks/)"
    )
    parser.add_argument(
        "--config", type=Path, default=defaults.config, help="the model.json that is measured"
    )
    parser.add_argument("--prompts", type=positive, default=defaults.num_prompts, help="default 40")
    parser.add_argument(
        "--max-tokens", type=positive, default=defaults.max_tokens, help="of an answer; default 128"
    )
    parser.add_argument("--rounds", type=positive, default=defaults.rounds, help="default 3")
    parser.add_argument(
        "-c",
        "--concurrency",
        type=positive,
        nargs="+",
        default=defaults.concurrencies,
        help="requests in flight (default 1 4 8 16 32)",
    )
    parser.add_argument(
        "--drafters", nargs="+", default=defaults.drafters, help="default none mtp ngram ngram+mtp"
    )
    parser.add_argument(
        "--contexts",
        type=positive,
        nargs="+",
        default=[256, 512, 1024, 2048, 4096, 8192],
        help="growth: tokens of the prompt (default 256 to 8192)",
    )
    parser.add_argument(
        "--rates",
        type=float,
        nargs="+",
        default=[0.25, 0.5, 1.0, 2.0],
        help="arrivals: requests a second (default 0.25 0.5 1 2)",
    )
    parser.add_argument("--minutes", type=float, default=30, help="soak: how long (default 30)")
    parser.add_argument("--readme", action="store_true", help="report: renew README.md's table")
    return parser.parse_args()


def positive(value: str) -> int:
    """A whole number from 1."""
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return number
