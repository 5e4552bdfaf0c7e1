"""Makes the default verifier, Gemma 3 270M, or the models that are named, in `.models`."""

import sys
from pathlib import Path

# In the image the package is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python_backend"))

from tandem_runtime.models import main

if __name__ == "__main__":
    sys.exit(main())
