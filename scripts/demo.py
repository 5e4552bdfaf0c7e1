"""Starts a server, sends it real prompts with speculation and without, and compares."""

import sys

from tandem_runtime.demo import main

if __name__ == "__main__":
    sys.exit(main())
