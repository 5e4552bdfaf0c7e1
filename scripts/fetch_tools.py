"""Fetches into `.tools` what the tests run and no Python package carries."""

import sys

from tandem_runtime.tools import main

if __name__ == "__main__":
    sys.exit(main())
