"""Sixty attackers at a time: others are served meanwhile, and memory stays level.

HOSTILE_SECONDS says for how long each kind goes on.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest
import requests

import attackers
from attackers import ATTACKS, MIB
from gateway_setup import KEY, TIMEOUT, FakeTriton, ask, fake_triton, wait_until

SECONDS = float(os.environ.get("HOSTILE_SECONDS", "1.5"))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def upstream() -> Iterator[FakeTriton]:
    with fake_triton() as fake:
        fake.seconds = 0.01
        yield fake


@pytest.fixture(scope="module")
def process(upstream: FakeTriton) -> Iterator[tuple[str, psutil.Process]]:
    """A gateway with the limits that it has by default, in a process of its own."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
    command = [sys.executable, "-m", "tandem_gateway.cli", "--url", upstream.url]
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(
        [*command, "--port", str(port)], env={**os.environ, "TANDEM_API_KEYS": KEY}
    ) as gateway:
        try:
            wait_until(lambda: is_up(url))
            yield url, psutil.Process(gateway.pid)
        finally:
            gateway.terminate()
            gateway.wait(TIMEOUT)


def is_up(url: str) -> bool:
    try:
        return requests.get(f"{url}/health", timeout=1).status_code == 200
    except requests.ConnectionError:
        return False


@pytest.mark.parametrize("kinds", [[kind] for kind in ATTACKS] + [list(ATTACKS)])
def test_others_are_served_meanwhile(process: tuple[str, psutil.Process], kinds: list[str]) -> None:
    """Of one kind, or of all kinds at once."""
    url, gateway = process
    ask(url)
    before, most, slowest, num_served = gateway.memory_info().rss, 0, 0.0, 0
    command = [sys.executable, attackers.__file__, url.rpartition(":")[2], str(SECONDS), *kinds]
    with subprocess.Popen(command) as attack:
        while attack.poll() is None:
            started = time.monotonic()
            assert requests.get(f"{url}/health", timeout=TIMEOUT).status_code == 200
            slowest = max(slowest, time.monotonic() - started)
            answer = ask(url, "still here")
            assert (answer.status_code, answer.json()["choices"][0]["text"]) == (200, "stillhere")
            num_served += 1
            most = max(most, gateway.memory_info().rss)
            time.sleep(0.05)
    print(
        f"{'+'.join(kinds)}: {num_served} served, /health after {slowest:.2f} s at most, "
        f"{(most - before) / MIB:+.0f} MB at most"
    )
    assert attack.returncode == 0
    # Far from what it was without limits, and far enough from what a busy machine makes of it.
    assert num_served > 1
    assert slowest < 3
    assert most - before < 300 * MIB
