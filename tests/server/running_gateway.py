"""A gateway that is a process of its own, before a real server."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import requests

from stream import wait_until
from tandem_runtime.server import TritonServer


@contextmanager
def running_gateway(server: TritonServer, *options: str, keys: str = "") -> Iterator[str]:
    """Its address."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
    command = [sys.executable, "-m", "tandem_gateway.cli", "--url", server.grpc_url]
    process = subprocess.Popen(
        [*command, "--port", str(port), *options],
        env={**os.environ, **({"TANDEM_API_KEYS": keys} if keys else {})},
    )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: is_up(url))
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) in (0, -signal.SIGINT, 130)


def is_up(url: str) -> bool:
    try:
        return requests.get(f"{url}/health", timeout=1).status_code == 200
    except requests.ConnectionError:
        return False
