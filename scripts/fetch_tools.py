"""Fetches into `.tools` what the tests run and no Python package carries."""

import sys

from tandem_runtime import tools
from tandem_runtime.bootstrap import lock

if __name__ == "__main__":
    with lock():
        sys.exit(tools.main())
