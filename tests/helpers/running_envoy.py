"""Envoys with deployed configurations, on ports of this machine, and what stands behind them."""

from __future__ import annotations

import json
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import yaml
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tandem_fleet.local import ENVOY, free_ports

Address = tuple[str, int]
# Where the deployed configurations listen and connect; each gets a port of its own.
GATEWAY: Address = ("127.0.0.1", 8001)
BALANCER: Address = ("tandem-envoy", 8001)
ADDRESSES: dict[str, dict[Address, str]] = {
    "gateway": {GATEWAY: "gateway", BALANCER: "grpc"},
    "balancer": {
        ("0.0.0.0", 8001): "grpc",
        ("0.0.0.0", 8000): "http",
        ("0.0.0.0", 9902): "status",
        ("127.0.0.1", 9901): "admin",
        ("tandem-headless", 8001): "server_grpc",
        ("tandem-headless", 8000): "server_http",
    },
    "server": {
        ("0.0.0.0", 8001): "server_grpc",
        ("0.0.0.0", 8000): "server_http",
        ("127.0.0.1", 18001): "triton_grpc",
        ("127.0.0.1", 18000): "triton_http",
    },
}


class StandIn:
    """Answers as Triton and the model's process do, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.bodies: list[tuple[int, str | None]] = []
        self._grpc = grpc.server(ThreadPoolExecutor(8), interceptors=[_Remembers(self.asked)])
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(_Service(), self._grpc)
        self.grpc_port = self._grpc.add_insecure_port("127.0.0.1:0")
        handler = type("Handler", (_Handler,), {"stand_in": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.http_port = self._http.server_address[1]
        self._thread = threading.Thread(target=self._http.serve_forever)

    def __enter__(self) -> StandIn:
        self._grpc.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._grpc.stop(0).wait()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


class _Remembers(grpc.ServerInterceptor):  # type: ignore[misc]
    def __init__(self, asked: list[str]) -> None:
        self._asked = asked

    def intercept_service(self, continuation: Any, details: Any) -> Any:
        self._asked.append(details.method)
        return continuation(details)


class _Service(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    # As the protocol calls them.
    def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        return service_pb2.ModelReadyResponse(ready=True)

    def ModelStreamInfer(self, requests: Any, context: Any) -> Iterator[Any]:  # noqa: N802
        for request in requests:
            yield service_pb2.ModelStreamInferResponse(
                infer_response=service_pb2.ModelInferResponse(id=request.id)
            )


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stand_in: StandIn

    def do_GET(self) -> None:
        if self.path != "/ready":  # the health checks
            self.stand_in.asked.append(self.path)
        self._answer()

    def do_POST(self) -> None:
        self.stand_in.asked.append(self.path)
        length = int(self.headers["Content-Length"])
        body = self.rfile.read(length)
        self.stand_in.bodies.append((len(body), self.headers["Transfer-Encoding"]))
        self._answer()

    def _answer(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


def make_ports(stand_in: StandIn, tls: bool) -> dict[str, int]:
    """A port for each name; without TLS nothing stands between Envoy and what it reaches."""
    names = sorted({name for each in ADDRESSES.values() for name in each.values()})
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    prefix = "triton" if tls else "server"
    ports |= {f"{prefix}_grpc": stand_in.grpc_port, f"{prefix}_http": stand_in.http_port}
    return ports | {"health": stand_in.http_port}


def localize(config: Any, part: str, ports: Mapping[str, int]) -> Any:
    """The configuration with this machine's ports in place of the cluster's addresses."""
    if isinstance(config, list):
        return [localize(each, part, ports) for each in config]
    if not isinstance(config, dict):
        return config
    if "socket_address" in config:
        address = config["socket_address"]
        name = ADDRESSES[part][address["address"], address["port_value"]]
        return {"socket_address": {"address": "127.0.0.1", "port_value": ports[name]}}
    local = {key: localize(value, part, ports) for key, value in config.items()}
    if "health_check_config" in local:
        local["health_check_config"] = {"port_value": ports["health"]}
    return local


@contextmanager
def running(
    text: str, part: str, ports: Mapping[str, int], directory: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """An Envoy, until it takes connections; checked with `--mode validate` before."""
    config = directory / f"{part}.json"
    config.write_text(json.dumps(localize(yaml.safe_load(text), part, ports)))
    command = [str(ENVOY), "-c", str(config), "--concurrency", "1", "--use-dynamic-base-id"]
    checked = subprocess.run([*command, "--mode", "validate"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    with (directory / f"{part}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        first = next(iter(ADDRESSES[part].values()))
        wait_for_port(ports[first], process)
        yield process
    finally:
        process.terminate()
        process.wait(10)


def wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    """Returns when somebody listens there."""
    deadline = time.monotonic() + 20
    while True:
        assert process.poll() is None
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert time.monotonic() < deadline
        time.sleep(0.05)
