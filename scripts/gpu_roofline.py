"""Reckons what a step can take at best on data-centre GPUs; needs no GPU and no weights."""

import argparse
import os
import sys
from pathlib import Path

_EXAMPLES = """examples:
  python scripts/gpu_roofline.py
  python scripts/gpu_roofline.py --context 8000 --output /tmp/gpu
"""
ROOT = Path(__file__).parent.parent
# The Triton language asks when it is imported; the kernels are tried on the CPU.
os.environ["TRITON_INTERPRET"] = "1"


def main() -> int:
    """Reads the command line and writes the sheet."""
    from tandem_bench.gpu_roofline import CONTEXT
    from tandem_bench.gpu_sheet import run

    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=ROOT / "benchmarks/gpu",
        help="of the sheet (default benchmarks/gpu)",
    )
    parser.add_argument(
        "--context", type=int, default=CONTEXT, help=f"tokens of a sequence (default {CONTEXT})"
    )
    arguments = parser.parse_args()
    run(arguments.output, arguments.context)
    return 0


if __name__ == "__main__":
    sys.exit(main())
