"""Options that no table has are taken, and said to be ignored."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from tandem_options.errors import shorten

# Whoever sends ever new names must not fill the memory or the log.
_MAX_NAMES = 1000


class UnknownNames:
    """Warns once of each name, of a thousand at most.

    Args:
        logger: where to.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._seen: set[str] = set()

    def warn(self, names: Iterable[str]) -> None:
        """Warns of those that are new."""
        for name in map(shorten, names):
            if name not in self._seen and len(self._seen) < _MAX_NAMES:
                self._seen.add(name)
                self._logger.warning("a request has the unknown option %s: it is ignored", name)
