"""Sets up vLLM's CPU build in `.vllm`, for the benchmark to compare with."""

import sys
from pathlib import Path

# Any Python can run this, with the package installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python_backend"))

from tandem_bench.install_peers import main

if __name__ == "__main__":
    sys.exit(main())
