"""Checks a GPU in a few minutes, or, without one, that the check itself runs."""

import argparse
import os
import sys
from pathlib import Path

import torch

_EXAMPLES = """examples:
  make gpu-check
  python scripts/gpu_check.py --output /tmp/gpu
"""
ROOT = Path(__file__).parent.parent
# From a plain checkout, where nothing is installed.
sys.path += [str(ROOT / each) for each in ("python_backend", "client", "tests/helpers")]
# The Triton language asks when it is imported.
os.environ["TRITON_INTERPRET"] = str(int(not torch.cuda.is_available()))


def main() -> int:
    """Reads the command line and runs the check."""
    from tandem_bench.gpu_check import run

    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "benchmarks/gpu",
        help="of the results (default benchmarks/gpu)",
    )
    output = parser.parse_args().output
    if torch.cuda.is_available():
        return run(output)
    # What the tests have in a card's place.
    from cuda_wing import QuickWing, cuda_wing

    with cuda_wing(QuickWing):
        return run(output)


if __name__ == "__main__":
    sys.exit(main())
