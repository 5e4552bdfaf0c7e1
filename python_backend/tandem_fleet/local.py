"""Pods without a cluster: Tritons that end as the kubelet ends them, and the deployed Envoy."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import requests
import yaml

from tandem_runtime.paths import ROOT
from tandem_runtime.server import ServerError, TritonServer

ENVOY_CONFIG = ROOT / "deploy/base/envoy/envoy.yaml"
ENVOY = ROOT / ".venv/bin/envoy"
SERVER = ROOT / "deploy/base/server.yaml"
MODEL_CONFIG = ROOT / "deploy/base/model/config.pbtxt"
_HEALTH_PORT = "8004"
_ALONE = ("--use-dynamic-base-id",)
# Of a pod's grace period, what is left to Triton when the hook is done.
_EXIT_SECONDS = 60


def free_ports(count: int) -> list[int]:
    """Ports of the loopback address that nobody listens on."""
    with ExitStack() as probes:
        sockets = [probes.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]


def container() -> dict[str, Any]:
    """The manifest of the server's container."""
    objects = yaml.safe_load_all(SERVER.read_text(encoding="utf-8"))
    deployment = next(each for each in objects if each["kind"] == "Deployment")
    found: dict[str, Any] = deployment["spec"]["template"]["spec"]["containers"][0]
    return found


def deployed_parameters() -> str:
    """What the deployed config.pbtxt adds to the published one."""
    published = (ROOT / "model_repository/tandem/config.pbtxt").read_text(encoding="utf-8")
    return MODEL_CONFIG.read_text(encoding="utf-8").removeprefix(published)


class Pod:
    """A Triton on ports of its own, with the manifest's arguments, parameters and hook.

    Args:
        repository: with a model `tandem`, to whose configuration the parameters are added.
        cores: that its processes may run on; all when not given.
        extra_args: of the server, beside the manifest's.
    """

    def __init__(
        self,
        repository: Path,
        cores: Sequence[int] | None = None,
        extra_args: Sequence[str] = (),
    ) -> None:
        self.http_port, self.grpc_port, self.metrics_port, self.health_port = free_ports(4)
        self._manifest = container()
        self._repository = repository
        self._cores = cores
        self._extra_args = extra_args
        config = repository / "tandem/config.pbtxt"
        parameters = self._with_port(deployed_parameters())
        config.write_text(config.read_text(encoding="utf-8") + parameters, encoding="utf-8")
        self.server = self._server()

    def _with_port(self, text: str) -> str:
        return text.replace(_HEALTH_PORT, str(self.health_port))

    def _server(self) -> TritonServer:
        options = [a for a in self._manifest["args"][1:] if not a.startswith("--model-repository")]
        return TritonServer(
            self._repository,
            http_port=self.http_port,
            grpc_port=self.grpc_port,
            metrics_port=self.metrics_port,
            extra_args=[*options, *self._extra_args],
        )

    def start(self) -> None:
        """Starts a Triton, and waits until it is ready.

        Raises:
            ServerError: it didn't start.
        """
        self.server = self._server()
        everywhere = os.sched_getaffinity(0)
        # Whoever starts a process hands its cores on.
        os.sched_setaffinity(0, self._cores or everywhere)
        try:
            self.server.start()
        finally:
            os.sched_setaffinity(0, everywhere)
        self.server.wait_ready()

    @property
    def health_url(self) -> str:
        """Where probes ask."""
        return f"http://127.0.0.1:{self.health_port}"

    def probe(self, path: str) -> int:
        """The status that a probe gets; 0 for no answer."""
        try:
            return requests.get(self.health_url + path, timeout=2).status_code
        except requests.RequestException:
            return 0

    def terminate(self) -> float:
        """The hook, SIGTERM to process 1 alone, and the wait; the seconds until it was gone.

        Raises:
            ServerError: it would have been killed.
        """
        started = time.monotonic()
        hook = self._manifest["lifecycle"]["preStop"]["exec"]["command"]
        subprocess.run([self._with_port(part) for part in hook], check=True)
        os.kill(self.server.pid, signal.SIGTERM)
        _wait(lambda: not self.server.is_running(), _EXIT_SECONDS, "the server doesn't end")
        return time.monotonic() - started

    def kill(self) -> None:
        """As when the node's memory runs out: all processes of the container at once."""
        os.killpg(self.server.pid, signal.SIGKILL)
        _wait(lambda: not self.server.is_running(), 10, "the server can't be killed")

    def stop(self) -> None:
        """Stops it in whatever state it is."""
        self.server.stop()


class Envoy:
    """The deployed configuration, with these pods in place of the headless service's."""

    def __init__(self, pods: Sequence[Pod], directory: Path) -> None:
        config = yaml.safe_load(ENVOY_CONFIG.read_text(encoding="utf-8"))
        self.port, http_port, status_port, admin_port = free_ports(4)
        ports = (self.port, http_port, status_port)
        for listener, port in zip(config["static_resources"]["listeners"], ports, strict=True):
            listener["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": port}
        admin = {"socket_address": {"address": "127.0.0.1", "port_value": admin_port}}
        config["admin"]["address"] = admin
        for cluster in config["static_resources"]["clusters"]:
            if cluster["name"] == "admin":
                cluster["load_assignment"]["endpoints"][0]["lb_endpoints"] = [
                    {"endpoint": {"address": admin}}
                ]
            else:
                cluster["type"] = "STATIC"
                is_http = cluster["name"] == "tandem_http"
                endpoints = [_endpoint(pod, is_http) for pod in pods]
                cluster["load_assignment"] = {
                    "cluster_name": cluster["name"],
                    "endpoints": [{"lb_endpoints": endpoints}],
                }
        self.url = f"127.0.0.1:{self.port}"
        self.http_url = f"http://127.0.0.1:{http_port}"
        self.status_url = f"http://127.0.0.1:{status_port}"
        self._config = directory / "envoy.json"
        self._config.write_text(json.dumps(config), encoding="utf-8")
        self._log = directory / "envoy.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Envoy:
        with self._log.open("wb") as log:
            # With an id of its own, several can run on one machine.
            self._process = subprocess.Popen(
                [str(ENVOY), "-c", str(self._config), "--concurrency", "1", *_ALONE],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            _wait(self._is_ready, 20, "Envoy doesn't start")
        except BaseException:
            self._stop()
            raise
        return self

    def _is_ready(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise ServerError(f"Envoy ended: {self._log.read_text(encoding='utf-8')}")
        with suppress(requests.RequestException):
            return requests.get(f"{self.status_url}/ready", timeout=1).status_code == 200
        return False

    def num_healthy(self) -> int:
        """How many pods new requests may go to."""
        text = requests.get(f"{self.status_url}/stats/prometheus", timeout=5).text
        name = 'envoy_cluster_membership_healthy{envoy_cluster_name="tandem"}'
        values = [line.split()[-1] for line in text.splitlines() if line.startswith(name)]
        return int(values[0])

    def _stop(self) -> None:
        assert self._process is not None
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()


def _endpoint(pod: Pod, is_http: bool) -> dict[str, Any]:
    port = pod.http_port if is_http else pod.grpc_port
    address = {"socket_address": {"address": "127.0.0.1", "port_value": port}}
    health = {"port_value": pod.health_port}
    return {"endpoint": {"address": address, "health_check_config": health}}


def _wait(condition: Callable[[], bool], seconds: float, failure: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise ServerError(failure)
        time.sleep(0.02)
