"""Clients that mean harm: `attackers.py PORT SECONDS KIND...` lets 60 of them loose on loopback."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress

from gateway_setup import KEY, head

NUM_ATTACKERS = 60
MIB = 2**20
# Not that of the good clients; both are this machine's.
_ADDRESS = ("127.0.0.2", 0)


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


Attack = Callable[[Peer], Awaitable[None]]
ATTACKS: dict[str, Attack] = {
    attack.__name__: attack
    for attack in (
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
    )
}


async def attack_for(seconds: float, port: int, attacks: list[Attack]) -> None:
    """Each attacker comes again as soon as it was sent away."""

    async def one(attack: Attack) -> None:
        while True:
            with suppress(OSError):
                reader, writer = await asyncio.open_connection(
                    "127.0.0.1", port, local_addr=_ADDRESS, limit=2**16
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


if __name__ == "__main__":
    _, port, seconds, *kinds = sys.argv
    # What they compute is no burden on a real gateway.
    os.nice(10)
    asyncio.run(attack_for(float(seconds), int(port), [ATTACKS[kind] for kind in kinds]))
