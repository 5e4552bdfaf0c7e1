"""The keys that clients show."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence

VARIABLE = "TANDEM_API_KEYS"


class Keys:
    """Knows a key when it is shown, in a time that doesn't depend on it.

    Args:
        keys: nobody is asked for one when there are none.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._names = {key.encode(): _name(key) for key in keys}

    def __bool__(self) -> bool:
        return bool(self._names)

    def find(self, authorization: bytes) -> str | None:
        """The name, for metrics, of the key in the header; None if it holds none of ours."""
        scheme, _, given = authorization.partition(b" ")
        names = [name for key, name in self._names.items() if hmac.compare_digest(given, key)]
        return names[0] if names and scheme.lower() == b"bearer" else None


def _name(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()[:8]


def read_keys(environment: Mapping[str, str]) -> list[str]:
    """The keys in `TANDEM_API_KEYS`, from the environment so that none shows among processes.

    Raises:
        ValueError: the variable is there, but names no key.
    """
    if VARIABLE not in environment:
        return []
    keys = [key.strip() for key in environment[VARIABLE].split(",")]
    if not any(keys):
        raise ValueError(
            f"{VARIABLE} names no key, got {environment[VARIABLE][:40]!r}: "
            "give key1,key2, or unset it to let everyone in"
        )
    return [key for key in keys if key]
