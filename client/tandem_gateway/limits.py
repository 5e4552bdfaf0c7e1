"""What the gateway takes from clients, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

MIB = 2**20


def _limit(default: float, help_: str, *, or_none: bool = False) -> Any:
    return field(default=default, metadata={"help": help_, "or_none": or_none})


@dataclass(frozen=True)
class Limits:
    """Each is an option of `tandem-gateway` by the same name.

    Raises:
        ValueError: one that isn't positive, by name; of the rates, 0 means that there is none.
    """

    header_seconds: float = _limit(10.0, "for a request's headers")
    body_seconds: float = _limit(30.0, "for a request's body")
    idle_seconds: float = _limit(30.0, "that a connection may stay open between requests")
    write_seconds: float = _limit(60.0, "that a client may take nothing of its answer")
    stream_idle_seconds: float = _limit(300.0, "that the server may take for an answer's next part")
    max_connections: int = _limit(512, "open connections")
    max_connections_per_address: int = _limit(128, "open connections from one address")
    max_body_bytes: int = _limit(8 * MIB, "bytes in a request's body")
    max_bodies_bytes: int = _limit(64 * MIB, "bytes in the bodies of all requests under way")
    max_json_values: int = _limit(2**18, "values in a body: numbers, texts, lists, objects")
    max_prompts: int = _limit(128, "prompts in one request")
    max_streams: int = _limit(512, "prompts that are being answered, of all requests")
    requests_per_minute: int = _limit(0, "requests a minute with one key", or_none=True)
    tokens_per_minute: int = _limit(
        0, "tokens a minute, read and written, with one key", or_none=True
    )

    def __post_init__(self) -> None:
        for each in fields(self):
            value, or_none = getattr(self, each.name), each.metadata["or_none"]
            if not (value > 0 or (or_none and value == 0)):
                least = "at least 0" if or_none else "more than 0"
                raise ValueError(f"{each.name} must be {least}, got {value}")
