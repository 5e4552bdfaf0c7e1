"""Sets up all that `make demo`, `make test` and `make serve` need."""

import sys
from pathlib import Path

# Runs before there is a virtual environment, which has the package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python_backend"))

from tandem_runtime.bootstrap import main

if __name__ == "__main__":
    sys.exit(main())
