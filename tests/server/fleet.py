"""Pods without a cluster: Tritons that end as the kubelet ends them, and the deployed Envoy."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import requests
import yaml
from stream import wait_until

from conftest import write_repository
from triton_runtime import ROOT
from triton_server import TritonServer

ENVOY_CONFIG = ROOT / "deploy/base/envoy/envoy.yaml"
ENVOY = ROOT / ".venv/bin/envoy"
SERVER = ROOT / "deploy/base/server.yaml"
# So that several can run on one machine.
_ALONE = ("--use-dynamic-base-id",)
# Of a pod's grace period, what is left to Triton when the hook is done.
_EXIT_SECONDS = 60


def free_ports(count: int) -> list[int]:
    with ExitStack() as probes:
        sockets = [probes.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]


def container() -> dict[str, Any]:
    """The manifest of the server's container."""
    deployment = next(iter(yaml.safe_load_all(SERVER.read_text())))
    found: dict[str, Any] = deployment["spec"]["template"]["spec"]["containers"][0]
    return found


class Pod:
    """A Triton with its health port, and the manifest's arguments and hook."""

    def __init__(self, directory: Path, verifier: Path, **settings: Any) -> None:
        self.http_port, self.grpc_port, self.metrics_port, self.health_port = free_ports(4)
        self._manifest = container()
        self.repository = write_repository(directory, verifier, **settings)
        config = directory / "tandem" / "config.pbtxt"
        deployed = (ROOT / "deploy/base/model/config.pbtxt").read_text()
        published = (ROOT / "model_repository/tandem/config.pbtxt").read_text()
        extra = deployed.removeprefix(published).replace("8004", str(self.health_port))
        text = config.read_text().partition('\nparameters { key: "drain_seconds"')[0]
        config.write_text(text + extra)
        self.server = self._server()

    def _server(self) -> TritonServer:
        options = [a for a in self._manifest["args"][1:] if not a.startswith("--model-repository")]
        return TritonServer(
            self.repository,
            http_port=self.http_port,
            grpc_port=self.grpc_port,
            metrics_port=self.metrics_port,
            extra_args=options,
        )

    def start(self) -> None:
        self.server = self._server()
        self.server.start()
        self.server.wait_ready()

    def probe(self, path: str) -> int:
        """The status that a probe gets; 0 for no answer."""
        try:
            return requests.get(self.health_url + path, timeout=2).status_code
        except requests.RequestException:
            return 0

    @property
    def health_url(self) -> str:
        return f"http://127.0.0.1:{self.health_port}"

    def terminate(self) -> float:
        """The hook, SIGTERM to process 1 alone, and the wait; the seconds until it was gone."""
        started = time.monotonic()
        hook = [
            part.replace("8004", str(self.health_port))
            for part in self._manifest["lifecycle"]["preStop"]["exec"]["command"]
        ]
        subprocess.run(hook, check=True)
        os.kill(self.server.pid, signal.SIGTERM)
        wait_until(lambda: not self.server.is_running(), _EXIT_SECONDS)
        return time.monotonic() - started

    def kill(self) -> None:
        """As when the node's memory runs out: all processes of the container at once."""
        os.killpg(self.server.pid, signal.SIGKILL)
        wait_until(lambda: not self.server.is_running())

    def stop(self) -> None:
        self.server.stop()


class Envoy:
    """The deployed configuration, with these pods in place of the headless service's."""

    def __init__(self, pods: list[Pod], directory: Path) -> None:
        config = yaml.safe_load(ENVOY_CONFIG.read_text())
        self.port, self._status_port, self.admin_port = free_ports(3)
        ports = (self.port, self._status_port)
        for listener, port in zip(config["static_resources"]["listeners"], ports, strict=True):
            listener["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": port}
        admin = {"socket_address": {"address": "127.0.0.1", "port_value": self.admin_port}}
        config["admin"]["address"] = admin
        endpoints = [
            {
                "endpoint": {
                    "address": {
                        "socket_address": {"address": "127.0.0.1", "port_value": pod.grpc_port}
                    },
                    "health_check_config": {"port_value": pod.health_port},
                }
            }
            for pod in pods
        ]
        for cluster in config["static_resources"]["clusters"]:
            if cluster["name"] == "admin":
                cluster["load_assignment"]["endpoints"][0]["lb_endpoints"] = [
                    {"endpoint": {"address": admin}}
                ]
            else:
                cluster["type"] = "STATIC"
                cluster["load_assignment"] = {
                    "cluster_name": cluster["name"],
                    "endpoints": [{"lb_endpoints": endpoints}],
                }
        self.url = f"127.0.0.1:{self.port}"
        self.status_url = f"http://127.0.0.1:{self._status_port}"
        self._config = directory / "envoy.json"
        self._config.write_text(json.dumps(config))
        self._log = directory / "envoy.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Envoy:
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [str(ENVOY), "-c", str(self._config), "--concurrency", "1", *_ALONE],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        try:
            wait_until(self._is_ready)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _is_ready(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self._log.read_text()
        with suppress(requests.RequestException):
            return requests.get(f"{self.status_url}/ready", timeout=1).status_code == 200
        return False

    def healthy_pods(self) -> int:
        """How many pods new requests may go to."""
        text = requests.get(f"{self.status_url}/stats/prometheus", timeout=5).text
        name = 'envoy_cluster_membership_healthy{envoy_cluster_name="tandem"}'
        values = [line.split()[-1] for line in text.splitlines() if line.startswith(name)]
        return int(values[0])

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
