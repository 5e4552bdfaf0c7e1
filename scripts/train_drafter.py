"""Trains a drafter for a verifier and measures it."""

import sys

from tandem_train.cli import main

if __name__ == "__main__":
    sys.exit(main())
