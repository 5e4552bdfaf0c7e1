"""Fetches into `.tools` what the tests run and no Python package carries."""

from __future__ import annotations

import sys

from bootstrap import lock
from tandem_runtime import tools


def main() -> int:
    """Fetches what is missing and returns the exit status, 0 also where a tool can't be had."""
    try:
        with lock():
            tools.fetch_all()
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from here.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
