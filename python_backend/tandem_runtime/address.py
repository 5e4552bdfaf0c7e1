"""Addresses to listen on, of IPv4 and IPv6, and which ports are free there."""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from contextlib import ExitStack

# Who listens everywhere is asked on this machine's own address.
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def is_ipv6(host: str) -> bool:
    """Whether this is an address of IPv6."""
    return ":" in host


def in_url(host: str) -> str:
    """As it stands in a URL."""
    return f"[{host}]" if is_ipv6(host) else host


def client_host(host: str) -> str:
    """Where to ask whoever listens on `host`, as it stands in a URL."""
    return in_url(_EVERYWHERE.get(host, host))


def port_is_free(host: str, port: int) -> bool:
    """Whether nobody else listens on the port.

    Raises:
        OSError: listening there fails for another reason, such as a host that is not this one.
    """
    with _socket(host) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise
    return True


def pick_ports(host: str, ports: Sequence[int | None]) -> list[int]:
    """The ports, with a free one for each None or 0."""
    with ExitStack() as probes:
        picked = []
        for port in ports:
            if not port:
                # All stay bound until the last is picked, so that they differ.
                probe = probes.enter_context(_socket(host))
                probe.bind((host, 0))
                port = probe.getsockname()[1]
            picked.append(port)
    return picked


def _socket(host: str) -> socket.socket:
    return socket.socket(socket.AF_INET6 if is_ipv6(host) else socket.AF_INET)
