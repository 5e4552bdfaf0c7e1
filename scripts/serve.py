"""Serves a model repository with Triton in the foreground, until Ctrl-C."""

import sys

from tandem_runtime.serve import main

if __name__ == "__main__":
    sys.exit(main())
