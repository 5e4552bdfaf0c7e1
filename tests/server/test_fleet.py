"""Two Tritons behind the deployed Envoy: restarts, kills and probes, as in a cluster."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from stream import Stream, metric, wait_until
from tandem_client import AsyncClient, Client, ServerUnavailableError, TandemClientError
from tandem_fleet.local import Envoy, Pod, container

pytestmark = pytest.mark.slow

NUM_STREAMS = 200
NUM_TOKENS = 300
ENDLESS: dict[str, Any] = {"max_tokens": 12000, "ignore_eos": True, "temperature": 0.0}


@pytest.fixture(scope="module")
def pods(
    tmp_path_factory: pytest.TempPathFactory, make_pod: Callable[..., Pod]
) -> Iterator[list[Pod]]:
    pods = [make_pod(tmp_path_factory.mktemp("pod")) for _ in range(2)]
    try:
        for pod in pods:
            pod.start()
        yield pods
    finally:
        for pod in pods:
            pod.stop()


@pytest.fixture(scope="module")
def envoy(pods: list[Pod], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Envoy]:
    with Envoy(pods, tmp_path_factory.mktemp("envoy")) as envoy:
        wait_until(lambda: envoy.num_healthy() == 2)
        yield envoy


@pytest.fixture(autouse=True)
def _all_up(pods: list[Pod], envoy: Envoy) -> None:
    for pod in pods:
        if not pod.server.is_running():
            pod.start()
    wait_until(lambda: envoy.num_healthy() == 2)


class Load:
    """Streams one after the other, so many at a time, until there have been enough."""

    def __init__(self, url: str, concurrency: int) -> None:
        self.num_started = 0
        self.running: set[int] = set()
        self.started_at: dict[int, float] = {}
        self.errors: dict[int, TandemClientError] = {}
        self.counts: Counter[int] = Counter()
        self.wanted = NUM_STREAMS
        self._url = url
        self._concurrency = concurrency
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    async def _run(self) -> None:
        # A connection each: with one for all, only Envoy would balance.
        await asyncio.gather(*(self._worker() for _ in range(self._concurrency)))

    async def _worker(self) -> None:
        async with AsyncClient(self._url, timeout=60) as client:
            while self.num_started < self.wanted:
                self.num_started += 1
                await self._stream(client, self.num_started)

    async def _stream(self, client: AsyncClient, number: int) -> None:
        self.running.add(number)
        self.started_at[number] = time.monotonic()
        options: dict[str, Any] = {"max_tokens": NUM_TOKENS, "ignore_eos": True, "seed": number}
        try:
            async for chunk in client.stream(f"stream {number}", **options):
                self.counts[number] += chunk.num_output_tokens
        except TandemClientError as error:
            self.errors[number] = error
        self.running.remove(number)

    def __enter__(self) -> Load:
        self._thread.start()
        wait_until(lambda: len(self.running) == self._concurrency)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self.wanted = 0
        self._thread.join()


def test_restarts_break_no_stream(pods: list[Pod], envoy: Envoy) -> None:
    with Load(envoy.url, concurrency=12) as load:
        load.wanted = 10**9
        for pod in pods:
            before = load.num_started
            pod.terminate()
            assert load.num_started > before, "nothing was served meanwhile"
            pod.start()
            wait_until(lambda: envoy.num_healthy() == 2)
        load.wanted = max(NUM_STREAMS, load.num_started)
    assert load.num_started >= NUM_STREAMS
    assert load.errors == {}
    assert set(load.counts.values()) == {NUM_TOKENS}
    assert len(load.counts) == load.num_started
    print(f"{load.num_started} streams, {len(load.errors)} broken")


def test_a_killed_pod_takes_only_its_own_streams_along(pods: list[Pod], envoy: Envoy) -> None:
    with Load(envoy.url, concurrency=12) as load:
        load.wanted = 10**9
        wait_until(lambda: metric(pods[0].server, "num_requests_running") >= 4)
        pods[0].kill()
        killed_at = time.monotonic()
        assert pods[0].probe("/ready") == 0
        running = set(load.running)
        wait_until(lambda: load.num_started > NUM_STREAMS // 2, seconds=240)
        load.wanted = load.num_started
    # Of those that ran, the pod's own; of those that came later, none.
    assert 1 <= len(load.errors) < len(running)
    for number, error in load.errors.items():
        assert load.started_at[number] < killed_at, f"a request that came later failed: {error}"
        assert isinstance(error, ServerUnavailableError), error
    served = set(range(1, load.num_started + 1)) - set(load.errors)
    assert {load.counts[number] for number in served} == {NUM_TOKENS}
    print(f"{load.num_started} streams, {len(load.errors)} broken")


def kubelet_notices(pod: Pod) -> float:
    """Probes as the manifest says; seconds until the liveness probe has failed often enough."""
    probe = container()["livenessProbe"]
    started, failures = time.monotonic(), 0
    while failures < probe["failureThreshold"]:
        time.sleep(probe["periodSeconds"])
        failures = 0 if pod.probe(probe["httpGet"]["path"]) == 200 else failures + 1
        assert time.monotonic() - started < 30
    return time.monotonic() - started


def test_a_dead_stub_is_not_live(pods: list[Pod], envoy: Envoy) -> None:
    """Triton says that all is well and leaves its clients hanging; the probes don't."""
    pod = pods[0]
    assert pod.probe("/live") == pod.probe("/ready") == 200
    with Stream(pod.server) as stream:
        stream.send("hangs", "on and on", **ENDLESS)
        wait_until(lambda: metric(pod.server, "num_requests_running") == 1)
        for child in psutil.Process(pod.server.pid).children(recursive=True):
            if "stub" in child.name():
                child.kill()
        wait_until(lambda: pod.probe("/ready") == 0, seconds=1)
        assert requests.get(f"{pod.server.http_url}/v2/health/live", timeout=5).status_code == 200
        assert requests.get(f"{pod.server.http_url}/v2/health/ready", timeout=5).status_code == 200
        assert kubelet_notices(pod) < 10
        wait_until(lambda: envoy.num_healthy() == 1, seconds=3)
    with Client(envoy.url) as client:
        assert client.generate("elsewhere", max_tokens=3, ignore_eos=True).num_output_tokens == 3
    pod.kill()


def test_a_full_server_is_live_and_ready_and_refuses_clearly(
    tmp_path: Path, make_pod: Callable[..., Pod]
) -> None:
    pod = make_pod(tmp_path, max_queue_size=4)
    try:
        pod.start()
        with Stream(pod.server) as full, Stream(pod.server) as late:
            for number in range(8):
                full.send(str(number), "on and on", **ENDLESS)
            wait_until(lambda: metric(pod.server, "num_requests_running") == 8)
            for number in range(20):
                late.send(str(number), "too many", max_tokens=3)
            errors = [r.error for r in late.responses(16).values()]
            assert all("the queue is full" in error for error in errors)
            assert pod.probe("/live") == pod.probe("/ready") == 200
    finally:
        pod.stop()


def test_only_the_pod_itself_may_drain(pods: list[Pod]) -> None:
    address = ("127.0.0.1", pods[0].health_port)
    with socket.create_connection(address, timeout=5, source_address=("127.0.0.2", 0)) as peer:
        peer.sendall(b"POST /drain HTTP/1.0\r\nSec-Tandem-Drain: 1\r\n\r\n")
        assert b" 403 " in peer.recv(1000)
    assert pods[0].probe("/drain") == 405
    assert requests.post(f"{pods[0].health_url}/drain", timeout=5).status_code == 403
    assert pods[0].probe("/ready") == 200
    with suppress(requests.RequestException):
        assert requests.get(f"{pods[0].health_url}/else", timeout=5).status_code == 404


@pytest.mark.parametrize("chunk", [10, 4_000_100])
def test_a_body_that_kills_a_triton_does_not_reach_one(
    pods: list[Pod], envoy: Envoy, chunk: int
) -> None:
    body = json.dumps({"text_input": "a" * 4_000_000}).encode()
    pieces = (body[at : at + chunk] for at in range(0, len(body), chunk))
    url = f"{envoy.http_url}/v2/models/tandem/generate"
    # Refused while it is sent: the answer may be lost on the way.
    with suppress(requests.ConnectionError):
        assert requests.post(url, data=pieces, timeout=30).status_code == 413
    good = {"text_input": "a good one", "max_tokens": 3, "ignore_eos": True}
    assert requests.post(url, json=good, timeout=30).status_code == 200
    assert all(pod.server.is_running() for pod in pods)
