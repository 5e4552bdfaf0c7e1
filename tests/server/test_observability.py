"""A real Prometheus reads a real Triton: what it records, and every alert made to fire."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import pytest
import requests
import yaml

from stream import wait_until
from tandem_client import Client, TandemClientError
from tandem_fleet.local import Pod, free_ports
from tandem_runtime.paths import ROOT

pytestmark = pytest.mark.slow

RULES = ROOT / "deploy/components/monitoring/rules.yaml"
# Minutes become half seconds.
FASTER = 120


def faster(rules: Any) -> Any:
    """The rules with all durations shortened."""
    units = {"s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}

    def shorten(match: re.Match[str]) -> str:
        before, number, unit, after = match.groups()
        return f"{before}{int(number) * units[unit] // FASTER}ms{after}"

    text = re.sub(r"(\[)(\d+)([smhd])(\])", shorten, json.dumps(rules))
    return json.loads(re.sub(r'("for": ")(\d+)([smhd])(")', shorten, text))


class Prometheus:
    """Debian's, with the deployed rules, faster."""

    def __init__(self, program: str, pods: dict[str, Pod], directory: Path) -> None:
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        config = {
            "global": {"scrape_interval": "500ms", "evaluation_interval": "500ms"},
            "rule_files": ["rules.yaml"],
            "scrape_configs": [
                {
                    "job_name": "tandem/tandem",
                    "scrape_timeout": "500ms",
                    "static_configs": [
                        {
                            "targets": [f"127.0.0.1:{pod.metrics_port}"],
                            "labels": {"namespace": "tandem", "pod": name},
                        }
                        for name, pod in pods.items()
                    ],
                }
            ],
        }
        (directory / "prometheus.yaml").write_text(yaml.safe_dump(config))
        rules = faster(yaml.safe_load(RULES.read_text())["spec"])
        (directory / "rules.yaml").write_text(yaml.safe_dump(rules))
        self.log = directory / "log"
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    program,
                    f"--config.file={directory / 'prometheus.yaml'}",
                    f"--storage.tsdb.path={directory / 'data'}",
                    f"--web.listen-address=127.0.0.1:{port}",
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def get(self, path: str, **params: str) -> Any:
        try:
            answer = requests.get(f"{self.url}/api/v1/{path}", params=params, timeout=5)
        except requests.ConnectionError:
            assert self._process.poll() is None, self.log.read_text()
            return {}
        if answer.status_code == 503:  # it is starting
            return {}
        assert answer.ok, answer.text
        return answer.json()["data"]

    def values(self, expression: str) -> dict[str, float]:
        """An expression's values now, by pod."""
        result = self.get("query", query=expression).get("result", [])
        return {r["metric"].get("pod", ""): float(r["value"][1]) for r in result}

    def firing(self) -> set[str]:
        alerts = self.get("alerts").get("alerts", [])
        return {a["labels"]["alertname"] for a in alerts if a["state"] == "firing"}

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(20)


class Traffic:
    """Clients that send one request after the other until they are told to stop."""

    def __init__(self, pod: Pod, num_clients: int, **options: Any) -> None:
        self._stopped = threading.Event()
        self._pod = pod
        self._options: dict[str, Any] = {"ignore_eos": True, **options}
        self._threads: list[threading.Thread] = []
        for _ in range(num_clients):
            self.add()

    def add(self) -> None:
        thread = threading.Thread(target=self._run)
        self._threads.append(thread)
        thread.start()

    def _run(self) -> None:
        with Client(f"127.0.0.1:{self._pod.grpc_port}") as client:
            while not self._stopped.is_set():
                try:
                    # Each its own prompt, so that nothing is found in the prefix cache.
                    for _ in client.stream(f"{uuid4()}", **self._options):
                        if self._stopped.is_set():
                            break
                except TandemClientError:
                    return

    def __enter__(self) -> Traffic:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(20)


@pytest.fixture
def pods(tmp_path: Path, make_pod: Callable[..., Pod]) -> Iterator[dict[str, Pod]]:
    """Two; the second has places for 32 requests, and room in its cache for a few of them."""
    pods = {
        "a": make_pod(tmp_path / "a"),
        "b": make_pod(tmp_path / "b", max_num_seqs=32, max_model_len=1600, kv_cache_tokens=1600),
    }
    try:
        for pod in pods.values():
            pod.start()
        yield pods
    finally:
        for pod in pods.values():
            pod.kill() if pod.server.is_running() else pod.stop()


@pytest.fixture
def prometheus(
    find_tool: Callable[[str], str], pods: dict[str, Pod], tmp_path: Path
) -> Iterator[Prometheus]:
    (tmp_path / "prometheus").mkdir()
    prometheus = Prometheus(find_tool("prometheus"), pods, tmp_path / "prometheus")
    try:
        wait_until(lambda: prometheus.values("up") == {"a": 1, "b": 1}, 30)
        yield prometheus
    finally:
        prometheus.stop()


def test_prometheus_records_the_load_and_every_alert_fires(
    pods: dict[str, Pod], prometheus: Prometheus
) -> None:
    a, b = pods["a"], pods["b"]
    fired: set[str] = set()

    def fires(*names: str, meanwhile: Callable[[], object] = lambda: None) -> None:
        def check() -> bool:
            meanwhile()
            fired.update(prometheus.firing())
            return fired >= set(names)

        try:
            wait_until(check, 60)
        except AssertionError:
            raise AssertionError(f"{set(names) - fired} did not fire, {fired} did") from None

    # Greedy, a tiny model repeats itself: what comes next is easily guessed.
    with Traffic(a, 3, temperature=0.0, max_tokens=2000):
        wait_until(lambda: prometheus.values("tandem:requests:pod").get("a") == 3)
        wait_until(lambda: prometheus.values("tandem:kv_cache_usage:pod")["a"] > 0)
        time.sleep(8)
        assert fired | prometheus.firing() == set()

    # Then nothing is; more and more wait at one pod, and the other's cache is too small.
    sampled: dict[str, Any] = {"temperature": 1.0}
    with (
        Traffic(a, 8, max_tokens=8000, **sampled) as at_a,
        Traffic(b, 32, max_tokens=600, **sampled),
    ):
        last = time.monotonic()

        def add_one() -> None:
            nonlocal last
            if time.monotonic() > last + 0.7:
                last = time.monotonic()
                at_a.add()

        fires("TandemQueueGrowing", meanwhile=add_one)
        assert prometheus.values("tandem:requests_waiting:pod")["a"] > 0
        fires("TandemAcceptanceFell", "TandemKVCacheFull", "TandemTimeToFirstTokenSlow")

    # Nobody drafts; and one pod's model dies.
    with Traffic(a, 2, num_speculative_tokens=0, max_tokens=500):
        for child in psutil.Process(b.server.pid).children(recursive=True):
            if "stub" in child.name():
                child.kill()
        fires("TandemSpeculationOff", "TandemModelNotReady")
        assert prometheus.values("up")["b"] == 1  # Triton is none the wiser
        b.kill()
        fires("TandemPodUnreachable")
    groups = yaml.safe_load(RULES.read_text())["spec"]["groups"]
    assert fired == {r["alert"] for g in groups for r in g["rules"] if "alert" in r}
