"""Writes the Grafana dashboard, deploy/components/monitoring/dashboard.json."""

import sys

from tandem_fleet.dashboard import main

if __name__ == "__main__":
    sys.exit(main())
