"""What requests leave on `/metrics`, and that docs/metrics.md lists it."""

from __future__ import annotations

import re

import pytest
import requests
from tritonclient.utils import InferenceServerException

from stream import TIMEOUT, metric, wait_until
from tandem_runtime.paths import ROOT
from tandem_runtime.server import TritonServer
from tensors import COMMON, ask


def test_the_documentation_lists_the_metrics(server: TritonServer) -> None:
    ask(server, **{**COMMON, "ignore_eos": True, "temperature": 0.0, "max_tokens": 60})
    with pytest.raises(InferenceServerException):
        ask(server, top_p=2.0)
    text = (ROOT / "docs/metrics.md").read_text()
    rows = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| `")]
    expected = {
        name: set(re.findall(r"`(\w+)`", labels))
        for names, labels in rows
        for name in re.findall(r"`(\w+)`", names)
    }

    def shown() -> dict[str, set[str]]:
        page = requests.get(server.metrics_url, timeout=TIMEOUT).text
        found: dict[str, set[str]] = {}
        for name, labels in re.findall(r"^tandem:(\w+){(.*)}", page, re.MULTILINE):
            if 'model="tandem"' in labels:
                name = re.sub("_(bucket|sum|count)$", "", name)
                others = set(re.findall(r'(\w+)="', labels)) - {"model", "version", "le"}
                found[name] = others
        return found

    # There once a minute has shown that speculation gains little.
    wait_until(
        lambda: {n: v for n, v in shown().items() if n != "spec_decode_low_gain"} == expected
    )


def test_latencies_are_counted_by_request(server: TritonServer) -> None:
    names = ("time_to_first_token", "request_queue_time", "e2e_request_latency")

    def counts() -> list[float]:
        return [metric(server, f"{name}_seconds_count") for name in names]

    before = counts()
    ask(server, n=2, **COMMON)
    # Those of requests before it may still come in.
    wait_until(lambda: all(n >= old + 2 for n, old in zip(counts(), before, strict=True)))
    wait_until(lambda: metric(server, "step_seconds_total") > 0)
    page = requests.get(server.metrics_url, timeout=TIMEOUT).text
    phases = re.findall(r'^tandem:step_seconds_total{model="tandem",phase="(\w+)"', page, re.M)
    assert set(phases) == {"schedule", "draft", "verify", "accept", "commit"}
