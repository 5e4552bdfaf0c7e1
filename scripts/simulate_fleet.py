"""How a fleet of pods answers under load, computed from measured costs."""

import sys

from tandem_fleet.simulate import main

if __name__ == "__main__":
    sys.exit(main())
