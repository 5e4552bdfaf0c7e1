"""Sixty attackers at a time: others are served meanwhile, and memory stays level.

HOSTILE_SECONDS says for how long each kind goes on.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress

import psutil
import pytest
import requests

from gateway_setup import KEY, TIMEOUT, FakeTriton, ask, fake_triton, head, wait_until

SECONDS = float(os.environ.get("HOSTILE_SECONDS", "2.5"))
NUM_ATTACKERS = 60
MIB = 2**20
# Not that of the good client; both are this machine's.
ADDRESS = ("127.0.0.2", 0)

pytestmark = [
    pytest.mark.slow,
    # Streams that an attack was cut off in.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


class Peer:
    """One connection of an attacker."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def post(self, body: bytes, key: str = KEY) -> None:
        await self.send(head(f"Content-Length: {len(body)}", key=key) + body)

    async def read(self) -> None:
        await self.reader.read(2**16)


async def slow_headers(peer: Peer) -> None:
    await peer.send(b"GET / HTTP/1.1\r\n")
    while True:
        await peer.send(b"a: b\r\n")
        await asyncio.sleep(0.2)


async def slow_bodies(peer: Peer) -> None:
    await peer.send(head(f"Content-Length: {8 * MIB}"))
    while True:
        await peer.send(b" " * 10_000)
        await asyncio.sleep(0.05)


async def large_bodies_without_a_key(peer: Peer) -> None:
    await peer.post(b"[" + b"[]," * (8 * MIB // 3 - 1) + b"[]]", key="wrong")
    await peer.read()


async def large_texts(peer: Peer) -> None:
    body = b'{"model": "tandem", "prompt": "' + b'\\"' * (4 * MIB - 50) + b'"}'
    await peer.post(body)
    await peer.read()


async def many_values(peer: Peer) -> None:
    await peer.post(b"[" + b"[]," * (8 * MIB // 3 - 1) + b"[]]")
    await peer.read()


async def many_prompts(peer: Peer) -> None:
    await peer.post(json.dumps({"model": "tandem", "prompt": ["x"] * 20_000}).encode())
    await peer.read()


async def wrong_values(peer: Peer) -> None:
    bias = {str(number): "x" for number in range(100_000)}
    await peer.post(json.dumps({"model": "tandem", "prompt": "x", "logit_bias": bias}).encode())
    await peer.read()


async def idle(peer: Peer) -> None:
    await asyncio.sleep(100)


async def come_and_go(peer: Peer) -> None:
    await peer.send(b"GET / HT")


async def never_read(peer: Peer) -> None:
    await peer.post(b'{"model": "tandem", "prompt": "...", "stream": true}')
    await asyncio.sleep(100)


async def tiny_pieces(peer: Peer) -> None:
    await peer.send(head("Transfer-Encoding: chunked") + b"1\r\nx\r\n" * 50_000)
    await peer.read()


async def garbage(peer: Peer) -> None:
    await peer.send(os.urandom(5000))
    await peer.read()


ATTACKS: list[Callable[[Peer], Awaitable[None]]] = [
    slow_headers,
    slow_bodies,
    large_bodies_without_a_key,
    large_texts,
    many_values,
    many_prompts,
    wrong_values,
    idle,
    come_and_go,
    never_read,
    tiny_pieces,
    garbage,
]


async def attack_for(
    seconds: float, port: int, attacks: list[Callable[[Peer], Awaitable[None]]]
) -> None:
    async def one(attack: Callable[[Peer], Awaitable[None]]) -> None:
        while True:
            with suppress(ConnectionError):
                reader, writer = await asyncio.open_connection(
                    "127.0.0.1", port, local_addr=ADDRESS, limit=2**16
                )
                try:
                    await attack(Peer(reader, writer))
                finally:
                    writer.transport.abort()
            await asyncio.sleep(0.01)

    tasks = [asyncio.create_task(one(attacks[n % len(attacks)])) for n in range(NUM_ATTACKERS)]
    await asyncio.wait(tasks, timeout=seconds)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


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


@pytest.mark.parametrize("attack", [*ATTACKS, None])
def test_others_are_served_meanwhile(
    process: tuple[str, psutil.Process], attack: Callable[[Peer], Awaitable[None]] | None
) -> None:
    """Of one kind, or of all kinds at once."""
    url, gateway = process
    port = int(url.rpartition(":")[2])
    ask(url)
    before, most, slowest, num_served = gateway.memory_info().rss, 0, 0.0, 0
    attacks = ATTACKS if attack is None else [attack]
    attackers = threading.Thread(target=asyncio.run, args=(attack_for(SECONDS, port, attacks),))
    attackers.start()
    while attackers.is_alive():
        started = time.monotonic()
        assert requests.get(f"{url}/health", timeout=TIMEOUT).status_code == 200
        slowest = max(slowest, time.monotonic() - started)
        answer = ask(url, "still here")
        assert (answer.status_code, answer.json()["choices"][0]["text"]) == (200, "stillhere")
        num_served += 1
        most = max(most, gateway.memory_info().rss)
        time.sleep(0.05)
    attackers.join()
    name = "all" if attack is None else attack.__name__
    print(
        f"{name}: {num_served} served, /health after {slowest:.2f} s at most, "
        f"{(most - before) / MIB:+.0f} MB at most"
    )
    assert num_served > SECONDS
    assert slowest < 1
    assert most - before < 300 * MIB
