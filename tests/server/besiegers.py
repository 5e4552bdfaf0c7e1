"""Clients that mean harm to a model, of all kinds at once.

`besiegers.py HTTP_URL GRPC_URL SECONDS` prints at the end how each kind was answered, as JSON.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests

from stream import TIMEOUT, Stream
from tandem_client import Client, TandemClientError

_NUM_THREADS = 2
_PAUSE_SECONDS = 0.1
_ENDLESS: dict[str, Any] = {"max_tokens": 12_000, "ignore_eos": True, "temperature": 0.0}


class Target:
    """A server, by its addresses."""

    def __init__(self, http_url: str, grpc_url: str) -> None:
        self.http_url = http_url
        self.grpc_url = grpc_url

    def post(self, body: bytes, verb: str = "generate") -> str:
        url = f"{self.http_url}/v2/models/tandem/{verb}"
        return str(requests.post(url, data=body, timeout=TIMEOUT).status_code)

    def ask(self, **values: Any) -> str:
        return self.post(json.dumps({"text_input": "x", "max_tokens": 3, **values}).encode())


# --- guides


def _chain(count: int) -> dict[str, Any]:
    rules: dict[str, Any] = {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(count)}
    return {"$defs": rules | {f"d{count}": {"const": "a"}}, "$ref": "#/$defs/d0"}


def _doubling(count: int) -> str:
    """Terminals of which each is twice the next."""
    rules = "".join(f"T{n}: T{n + 1} T{n + 1}\n" for n in range(count))
    return f'start: T0\n{rules}T{count}: "a"\n'


_GUIDES: list[dict[str, Any]] = [
    {"json": _chain(3000)},
    {"json": _chain(7000)},
    {"grammar": _doubling(3000)},
    {"grammar": _doubling(25)},
    {"regex": "((a{1,200}){1,200}){1,200}b"},
    {"regex": r"[^\s\S]"},
    {"json": {"$ref": "#"}},
    {"grammar": "start: " + " | ".join(f'"w{n}"' for n in range(9000))},
    {"choice": [f"{n}" for n in range(1000)]},
]


@functools.cache
def _guide(index: int) -> str:
    return json.dumps({"structured_outputs": _GUIDES[index]})


def bad_guides(target: Target, number: int) -> str:
    return target.ask(sampling_parameters=_guide(number % len(_GUIDES)))


# --- prompts


def long_prompts(target: Target, number: int) -> str:
    """One as long as the model takes, and others longer."""
    words = (7_000, 1_000_000, 100_000, 4_000_000)[number % 4]
    return target.post(b'{"max_tokens": 3, "text_input": "%d ' % number + b"a " * words + b'"}')


@functools.cache
def _messages() -> bytes:
    messages = json.dumps([{"role": "user", "content": "a"}] * 100_000)
    return json.dumps({"messages": messages}).encode()


def many_messages(target: Target, number: int) -> str:
    return target.post(_messages())


def not_utf8(target: Target, number: int) -> str:
    names = (b"id", b"cache_salt", b"text_input", b"drafter")
    return target.post(b'{"text_input": "x", "%b": "\xff\xfe"}' % names[number % len(names)])


def wrong_values(target: Target, number: int) -> str:
    values: list[Any] = [{"top_p": 2}, {"stop_token_ids": "[" * 10_000}, {"n": 10**300}, {"x": 1}]
    return target.ask(sampling_parameters=json.dumps(values[number % len(values)]))


# --- clients that go away, or don't hurry


def cancels(target: Target, number: int) -> str:
    """While it is read, in the queue, before the first token, or some tokens later."""
    with Stream(target) as stream:  # type: ignore[arg-type]
        stream.send("cancelled", f"{number} on and on", **_ENDLESS)
        time.sleep(0.02 * (number % 20))
    return "cancelled"


def closed_connections(target: Target, number: int) -> str:
    body = json.dumps({"text_input": "on and on", "stream": True, **_ENDLESS})
    url = f"{target.http_url}/v2/models/tandem/generate_stream"
    with requests.post(url, data=body, stream=True, timeout=TIMEOUT) as answer:
        next(answer.iter_lines(), None)
        return str(answer.status_code)


def deadlines(target: Target, number: int) -> str:
    """The server's, and the client's own."""
    if number % 2:
        try:
            with Client(target.grpc_url, timeout=0.05 * (1 + number % 4)) as client:
                client.generate(f"{number} on and on", **_ENDLESS)
        except TandemClientError as error:
            return type(error).__name__
    with Stream(target) as stream:  # type: ignore[arg-type]
        stream.send("late", "on and on", timeout_us=50_000 * (1 + number % 4), **_ENDLESS)
        errors = [response.error for response in stream.responses(1).values() if response.error]
    return errors[0].partition(":")[0] if errors else "done"


def slow_readers(target: Target, number: int) -> str:
    with (
        Client(target.grpc_url) as client,
        closing(client.stream(f"{number} on and on", **_ENDLESS)) as chunks,
    ):
        for _ in itertools.islice(chunks, 10):
            time.sleep(0.3)
    return "cancelled"


def slow_writers(target: Target, number: int) -> str:
    """A body that comes in many pieces."""
    body = json.dumps({"text_input": f"{number} a " * 20, "max_tokens": 3}).encode()
    parts = urlsplit(target.http_url)
    head = f"POST /v2/models/tandem/generate HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection((parts.hostname, parts.port), TIMEOUT) as connection:
        connection.sendall(f"{head}\r\n".encode())
        for start in range(0, len(body), 10):
            connection.sendall(body[start : start + 10])
            time.sleep(0.05)
        return connection.recv(65536).split(b" ")[1].decode()


Attack = Callable[[Target, int], str]
ATTACKS: tuple[Attack, ...] = (
    bad_guides,
    long_prompts,
    many_messages,
    not_utf8,
    wrong_values,
    cancels,
    closed_connections,
    deadlines,
    slow_readers,
    slow_writers,
)


def besiege(target: Target, seconds: float) -> dict[str, Counter[str]]:
    """All kinds at once, two of each; each comes again when it was answered."""
    until = time.monotonic() + seconds
    answers: dict[str, Counter[str]] = {attack.__name__: Counter() for attack in ATTACKS}

    def go_on(attack: Attack, first: int) -> None:
        for number in itertools.count(first):
            if time.monotonic() > until:
                return
            try:
                said = attack(target, number)
            except Exception as error:
                said = f"{type(error).__name__}: {error}"[:200]
            answers[attack.__name__][said] += 1
            time.sleep(_PAUSE_SECONDS)

    threads = [
        threading.Thread(target=go_on, args=(attack, 3 * n))
        for attack in ATTACKS
        for n in range(_NUM_THREADS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


if __name__ == "__main__":
    _, http_url, grpc_url, seconds = sys.argv
    # What they compute would be computed elsewhere: they have the time that nobody else wants, also
    # where the kernel divides it among terminals first (`man 7 sched`, autogroup).
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    os.setsid()
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text("19", encoding="ascii")
    print(json.dumps(besiege(Target(http_url, grpc_url), float(seconds))))
