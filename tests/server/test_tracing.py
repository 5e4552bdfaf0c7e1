"""One request followed through the gateway, the server and the trace, by its ids."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests

from stream import wait_until
from tandem_fleet.local import Pod, free_ports

pytestmark = pytest.mark.slow

TRACE = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE}-b7ad6b7169203331-01"
# Requests among which Triton reads some headers wrongly.
_MANY = 300


class Collector(ThreadingHTTPServer):
    """Takes spans as an OpenTelemetry collector does."""

    def __init__(self) -> None:
        spans: list[bytes] = []
        self.spans = spans

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                spans.append(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1/traces"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector
        collector.shutdown()


def tracing(url: str) -> list[str]:
    settings = ("mode=opentelemetry", "level=TIMESTAMPS", "rate=1", f"opentelemetry,url={url}")
    return [f"--trace-config={setting}" for setting in settings]


@pytest.fixture(scope="module", params=["traced", "forwarded"])
def pod(
    request: Any,
    tmp_path_factory: pytest.TempPathFactory,
    make_pod: Callable[..., Pod],
    collector: Collector,
) -> Iterator[Pod]:
    """Triton makes spans of its own, or only forwards the header, as deployed."""
    extra_args = tracing(collector.url) if request.param == "traced" else ()
    pod = make_pod(tmp_path_factory.mktemp("pod"), extra_args=extra_args)
    try:
        pod.start()
        yield pod
    finally:
        pod.stop()


@pytest.fixture(scope="module")
def gateway(pod: Pod, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The gateway's address and its log."""
    (port,) = free_ports(1)
    log = tmp_path_factory.mktemp("gateway") / "gateway.log"
    command = [sys.executable, "-m", "tandem_gateway.cli", "--port", str(port)]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, "--url", f"127.0.0.1:{pod.grpc_port}"], stderr=file, env=dict(os.environ)
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: b"serving" in log.read_bytes())
        wait_until(lambda: is_up(url))
        yield url, log
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(10)


def is_up(url: str) -> bool:
    try:
        return requests.get(f"{url}/health", timeout=2).status_code == 200
    except requests.ConnectionError:
        return False


def complete_lines(log: Path) -> list[str]:
    """The lines of a log that is still written to, without the one that is being written."""
    return log.read_bytes().rpartition(b"\n")[0].decode().splitlines()


def server_entries(pod: Pod) -> list[dict[str, Any]]:
    """The backend's entries; Triton writes each as a JSON string."""
    mark = '"{\\"event'
    lines = complete_lines(pod.server.log_file)
    texts = [json.loads(line[line.index(mark) :]) for line in lines if mark in line]
    return [json.loads(text) for text in texts]


def gateway_entries(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in complete_lines(log) if line.startswith("{")]


def test_a_request_has_one_id_and_one_trace(
    pod: Pod, gateway: tuple[str, Path], collector: Collector, request: Any
) -> None:
    url, log = gateway
    body = {"model": "tandem", "prompt": "hello", "max_tokens": 5, "temperature": 0}
    answer = requests.post(
        f"{url}/v1/completions", json=body, headers={"traceparent": TRACEPARENT}, timeout=30
    )
    assert answer.status_code == 200, answer.text
    request_id = answer.json()["id"]
    assert answer.headers["x-request-id"] == request_id

    def entry(entries: list[dict[str, Any]]) -> dict[str, Any]:
        found = [e for e in entries if e.get("request_id") == request_id]
        return found[0] if found else {}

    wait_until(lambda: entry(gateway_entries(log)) != {})
    assert entry(gateway_entries(log))["trace_id"] == TRACE
    assert entry(gateway_entries(log))["outcome"] == "done"
    wait_until(lambda: entry(server_entries(pod)) != {})
    served = entry(server_entries(pod))
    assert served["trace_id"] == TRACE
    assert (served["outcome"], served["num_output_tokens"]) == ("length", 5)
    if "traced" in request.node.name:
        # Triton now and then begins a trace of its own; see `trace_id`.
        requests.post(
            f"{url}/v1/completions", json=body, headers={"traceparent": TRACEPARENT}, timeout=30
        )
        wait_until(lambda: any(TRACE.encode() in spans for spans in collector.spans))


def test_the_client_names_the_trace(pod: Pod, gateway: tuple[str, Path]) -> None:
    url, _ = gateway
    body = {"model": "tandem", "prompt": "hello", "max_tokens": 1, "temperature": 0}
    sent = set()
    for _ in range(_MANY):
        answer = requests.post(
            f"{url}/v1/completions", json=body, headers={"traceparent": TRACEPARENT}, timeout=30
        )
        sent.add(answer.json()["id"])
    assert len(sent) == _MANY

    def traces() -> dict[str, str]:
        entries = server_entries(pod)
        return {e["request_id"]: e["trace_id"] for e in entries if e["request_id"] in sent}

    wait_until(lambda: traces().keys() == sent)
    assert set(traces().values()) == {TRACE}


def test_a_refused_request_is_logged_with_the_reason(pod: Pod) -> None:
    body = {"id": "wrong-1", "text_input": "x", "top_p": 2}
    answer = requests.post(
        f"{pod.server.http_url}/v2/models/tandem/generate", json=body, timeout=30
    )
    assert answer.status_code == 400
    wait_until(lambda: [e for e in server_entries(pod) if e["request_id"] == "wrong-1"] != [])
    (entry,) = [e for e in server_entries(pod) if e["request_id"] == "wrong-1"]
    assert entry["outcome"] == "invalid"
    assert "top_p" in entry["error"]
