"""Sends the same load to real pods and to simulated ones, and compares."""

import sys

from tandem_fleet.measure import main

if __name__ == "__main__":
    sys.exit(main())
