"""Prometheus' rules and the dashboard, with promtool and made-up series."""

from __future__ import annotations

import json
import math
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tandem_fleet import dashboard
from tandem_runtime.paths import ROOT

MONITORING = ROOT / "deploy/components/monitoring"
HPA = ROOT / "deploy/overlays/autoscale/hpa.yaml"
OF_POD = 'namespace="tandem", pod="a"'
OF_MODEL = f'{OF_POD}, model="tandem", version="1"'
OF_DRAFTER = f'{OF_MODEL}, drafter="mtp"'


def rules() -> dict[str, Any]:
    spec: dict[str, Any] = yaml.safe_load((MONITORING / "rules.yaml").read_text())["spec"]
    return spec


def alerts() -> dict[str, dict[str, Any]]:
    return {r["alert"]: r for g in rules()["groups"] for r in g["rules"] if "alert" in r}


@pytest.fixture
def promtool(tmp_path: Path, find_tool: Callable[[str], str]) -> Any:
    """Runs promtool in a folder with `rules.yaml`, as Prometheus takes it."""
    program = find_tool("promtool")
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules()))

    def run(*arguments: str, **files: Any) -> subprocess.CompletedProcess[str]:
        for name, content in files.items():
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
        command = [program, *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    return run


def test_promtool_accepts_the_rules(promtool: Any) -> None:
    result = promtool("check", "rules", "--lint-fatal", "rules.yaml")
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{sum(len(g['rules']) for g in rules()['groups'])} rules found" in result.stdout


def exported_names() -> set[str]:
    """What the backend exports; its module can only be imported inside Triton."""
    source = (ROOT / "python_backend/tandem_triton/metrics.py").read_text()
    table = source[source.index("_DESCRIPTIONS = {") : source.index("_BUCKETS")]
    return {f"tandem:{name}" for name in re.findall(r'^    "(\w+)":', table, re.MULTILINE)}


def counter(per_minute: float, minutes: int, start: float = 0) -> str:
    return f"{start}+{per_minute}x{minutes}"


# Alert -> series by which it fires, and when.
FIRING: dict[str, tuple[dict[str, str], str]] = {
    "TandemAcceptanceFell": (
        {
            f"tandem:spec_decode_num_draft_tokens_total{{{OF_DRAFTER}}}": counter(100, 400),
            # 60 % for six hours, then 20 %.
            f"tandem:spec_decode_num_accepted_tokens_total{{{OF_DRAFTER}}}": "0+60x360 21620+20x40",
        },
        "6h40m",
    ),
    "TandemSpeculationOff": (
        {
            f"tandem:spec_decode_num_draft_tokens_total{{{OF_DRAFTER}}}": "500+0x60",
            f"tandem:generation_tokens_total{{{OF_MODEL}}}": counter(100, 60),
        },
        "40m",
    ),
    "TandemQueueGrowing": (
        {
            f"tandem:num_requests_waiting{{{OF_MODEL}}}": "0x60",
            f"nv_inference_pending_request_count{{{OF_MODEL}}}": "0x10 1+2x50",
        },
        "30m",
    ),
    "TandemKVCacheFull": (
        {
            f'tandem:kv_cache_blocks_used{{{OF_MODEL}, group="full"}}': "95 100x20",
            f'tandem:kv_cache_blocks{{{OF_MODEL}, group="full"}}': "100x20",
            f'tandem:kv_cache_blocks_used{{{OF_MODEL}, group="window_512"}}': "10x21",
            f'tandem:kv_cache_blocks{{{OF_MODEL}, group="window_512"}}': "50x21",
        },
        "10m",
    ),
    "TandemModelNotReady": ({f"tandem:alive_timestamp_seconds{{{OF_MODEL}}}": "60x20"}, "5m"),
    "TandemPodUnreachable": ({f'up{{job="tandem/tandem", {OF_POD}}}': "0x30"}, "20m"),
    "TandemTimeToFirstTokenSlow": (
        {
            f'tandem:time_to_first_token_seconds_bucket{{{OF_MODEL}, le="1"}}': counter(1, 60),
            f'tandem:time_to_first_token_seconds_bucket{{{OF_MODEL}, le="2.5"}}': counter(2, 60),
            f'tandem:time_to_first_token_seconds_bucket{{{OF_MODEL}, le="5"}}': counter(10, 60),
            f'tandem:time_to_first_token_seconds_bucket{{{OF_MODEL}, le="+Inf"}}': counter(10, 60),
        },
        "40m",
    ),
}
# All is well: steady traffic, a queue now and then, and a pod that drains.
QUIET = {
    f"tandem:spec_decode_num_draft_tokens_total{{{OF_DRAFTER}}}": counter(100, 600),
    f"tandem:spec_decode_num_accepted_tokens_total{{{OF_DRAFTER}}}": counter(55, 600),
    f"tandem:generation_tokens_total{{{OF_MODEL}}}": counter(100, 600),
    f"tandem:num_requests_running{{{OF_MODEL}}}": "16x600",
    f"tandem:num_requests_waiting{{{OF_MODEL}}}": "0x600",
    f"nv_inference_pending_request_count{{{OF_MODEL}}}": "0 3 5 0 7 9 0 1 2 0x600",
    f"tandem:kv_cache_blocks_used{{{OF_MODEL}}}": "80x600",
    f"tandem:kv_cache_blocks{{{OF_MODEL}}}": "100x600",
    f"tandem:alive_timestamp_seconds{{{OF_MODEL}}}": counter(60, 600),
    f'up{{job="tandem/tandem", {OF_POD}}}': "1x600",
    f'tandem:time_to_first_token_seconds_bucket{{{OF_MODEL}, le="1"}}': counter(10, 600),
    f'tandem:time_to_first_token_seconds_bucket{{{OF_MODEL}, le="+Inf"}}': counter(10, 600),
}


def case(series: dict[str, str], **checks: Any) -> dict[str, Any]:
    values = [{"series": name, "values": value} for name, value in series.items()]
    return {"interval": "1m", "input_series": values, **checks}


def test_every_alert_is_tested() -> None:
    assert set(FIRING) == set(alerts())


@pytest.mark.parametrize("name", FIRING)
def test_every_alert_fires_on_what_it_is_for(promtool: Any, name: str) -> None:
    series, at = FIRING[name]
    result = fired(promtool, name, series, at)
    assert "exp:[" in result, result  # it fires, and nothing was expected
    assert f'alertname="{name}"' in result


@pytest.mark.parametrize("name", FIRING)
def test_no_alert_fires_when_all_is_well(promtool: Any, name: str) -> None:
    assert fired(promtool, name, QUIET, "8h") == ""


def fired(promtool: Any, name: str, series: dict[str, str], at: str) -> str:
    """What promtool says when it is told that the alert must not fire; empty if it doesn't."""
    check = [{"eval_time": at, "alertname": name, "exp_alerts": []}]
    tests = {
        "rule_files": ["rules.yaml"],
        "evaluation_interval": "1m",
        "tests": [case(series, alert_rule_test=check)],
    }
    result = promtool("test", "rules", "test.yaml", test=tests)
    text = str(result.stdout + result.stderr)
    assert (result.returncode == 0) == ("SUCCESS" in text), text
    return "" if result.returncode == 0 else text


@pytest.mark.parametrize(
    ("requests", "kv_usage", "replicas"),
    [
        # By pod: running and waiting requests, and the share of the KV cache in use.
        ([(24, 0), (24, 0)], [0.5, 0.5], 2),
        ([(32, 28), (32, 28)], [0.7, 0.7], 5),
        ([(3, 0), (2, 0), (4, 0)], [0.1, 0.1, 0.1], 2),
        ([(10, 0), (10, 0)], [0.95, 0.95], 3),
        ([(32, 100)] * 10, [1.0] * 10, 16),
    ],
)
def test_the_autoscaler_asks_for_the_right_number_of_pods(
    promtool: Any, requests: list[tuple[int, int]], kv_usage: list[float], replicas: int
) -> None:
    series, expected = {}, {"tandem:requests:pod": [], "tandem:kv_cache_usage:pod": []}
    for number, ((running, waiting), usage) in enumerate(zip(requests, kv_usage, strict=True)):
        of = f'namespace="tandem", pod="{number}", model="tandem"'
        series |= {
            f"tandem:num_requests_running{{{of}}}": f"{running}x9",
            f"tandem:num_requests_waiting{{{of}}}": "0x9",
            f"nv_inference_pending_request_count{{{of}}}": f"{waiting}x9",
            f"tandem:kv_cache_blocks_used{{{of}}}": f"{1000 * usage}x9",
            f"tandem:kv_cache_blocks{{{of}}}": "1000x9",
        }
        labels = f'{{namespace="tandem", pod="{number}"}}'
        for name, value in zip(expected, (running + waiting, usage), strict=True):
            expected[name].append({"labels": f"{name}{labels}", "value": value})
    checks = [
        {"expr": name, "eval_time": "5m", "exp_samples": samples}
        for name, samples in expected.items()
    ]
    test = case(series, promql_expr_test=checks)
    tests = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": [test]}
    result = promtool("test", "rules", "test.yaml", test=tests)
    assert result.returncode == 0, result.stdout
    values = {name: [s["value"] for s in samples] for name, samples in expected.items()}
    assert desired(values) == replicas


def desired(values: dict[str, list[float]]) -> int:
    """As the autoscaler reckons with values by pod: the largest of the metrics' answers.

    For a target that is an average, ceil(sum / target), unless that is within a tenth of now.
    """
    spec = yaml.safe_load(HPA.read_text())["spec"]
    wanted = []
    for metric in spec["metrics"]:
        name = metric["pods"]["metric"]["name"].replace("tandem_", "tandem:", 1) + ":pod"
        text = metric["pods"]["target"]["averageValue"]
        target = float(text.removesuffix("m")) / (1000 if text.endswith("m") else 1)
        ratio = sum(values[name]) / target
        now = len(values[name])
        wanted.append(now if abs(ratio / now - 1) <= 0.1 else math.ceil(ratio))
    return max(spec["minReplicas"], min(spec["maxReplicas"], *[max(wanted)]))


def test_the_dashboard_is_what_the_script_makes() -> None:
    assert dashboard.PATH.read_text(encoding="utf-8") == dashboard.build(), (
        "run scripts/make_dashboard.py"
    )


def test_rules_and_dashboard_ask_for_metrics_that_there_are() -> None:
    recorded = {r["record"] for g in rules()["groups"] for r in g["rules"] if "record" in r}
    text = (MONITORING / "rules.yaml").read_text() + dashboard.build()
    asked = set(re.findall(r"tandem:[a-z0-9_]+(?::[a-z0-9]+)?", json.dumps(text)))
    asked = {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked} - recorded
    assert asked - {"tandem:num_requests_"} <= exported_names()
