"""How a fleet of pods answers under load, computed from what a step was measured to cost.

Four studies, each a table and a plot in --output:
  load         time to first token and cost by load, for 1 to 1,000 pods
  balancing    rules between pods, for conversations whose prefixes are cached
  scaling      what the autoscaler follows, while the load rises and falls
  speculation  up to which batch drafting pays
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tandem_fleet.costs import Costs
from tandem_fleet.pod import PodSettings
from tandem_fleet.simulation import Study, Workload
from tandem_fleet.studies import balancing, load, scaling, speculation
from tandem_runtime.paths import ROOT

STUDIES = {"load": load, "balancing": balancing, "scaling": scaling, "speculation": speculation}


def main() -> int:
    """Runs the studies asked for and returns the exit status."""
    arguments = parse_arguments()
    try:
        values = json.loads(arguments.costs.read_text(encoding="utf-8"))
        costs = Costs(values, arguments.drafter, arguments.acceptance)
    except (OSError, ValueError) as error:
        print(f"error: {arguments.costs}: {error}", file=sys.stderr)
        return 1
    settings = PodSettings(
        arguments.max_num_seqs, 512, arguments.kv_cache_tokens, arguments.lookahead
    )
    workload = Workload(
        arguments.prompt_tokens, arguments.output_tokens, arguments.turns, arguments.think_seconds
    )
    arguments.output.mkdir(parents=True, exist_ok=True)
    study = Study(costs, settings, workload, arguments.price, arguments.output)
    chosen = list(STUDIES) if arguments.study == "all" else [arguments.study]
    for name in chosen:
        STUDIES[name](study, arguments.pods)
    return 0


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=[*STUDIES, "all"])
    parser.add_argument(
        "--costs",
        type=Path,
        default=ROOT / "docs/scaling/costs-cpu.json",
        help="what a step costs: a file that the backend wrote when it loaded a model",
    )
    parser.add_argument("--drafter", default="mtp", help='of the file, or "none" (mtp)')
    parser.add_argument(
        "--acceptance",
        type=float,
        nargs="+",
        default=[0.579, 0.682, 0.684, 0.678],
        metavar="P",
        help="chance of each guess, if those before it were accepted",
    )
    parser.add_argument(
        "--lookahead", type=int, metavar="K", help="guesses a step; by default what pays best"
    )
    parser.add_argument("--pods", type=int, nargs="+", default=[1, 2, 10, 100, 1000], metavar="N")
    parser.add_argument("--max-num-seqs", type=int, default=16, metavar="N")
    parser.add_argument("--kv-cache-tokens", type=int, default=32768, metavar="N")
    parser.add_argument("--prompt-tokens", type=int, default=200, metavar="N", help="mean (200)")
    parser.add_argument("--output-tokens", type=int, default=128, metavar="N", help="mean (128)")
    parser.add_argument("--turns", type=int, default=1, metavar="N", help="of a conversation (1)")
    parser.add_argument("--think-seconds", type=float, default=20, metavar="S")
    parser.add_argument("--price", type=float, default=1.0, help="of a pod for an hour (1)")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/scaling")
    return parser.parse_args()
