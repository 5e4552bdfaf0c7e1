"""Measures Tandem, part by part; `--help` names them."""

import sys

from tandem_bench.cli import main

if __name__ == "__main__":
    sys.exit(main())
