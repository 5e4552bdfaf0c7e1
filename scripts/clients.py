"""Runs clients that nobody here wrote against a server and its gateway."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python_backend"))

from tandem_bench.client_matrix import main

if __name__ == "__main__":
    sys.exit(main())
