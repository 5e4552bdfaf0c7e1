"""Measures the prefix cache's hit rate through Envoy, with affinity and without."""

import sys

from tandem_fleet.affinity import main

if __name__ == "__main__":
    sys.exit(main())
