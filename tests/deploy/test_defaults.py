"""What an overlay lets nobody do unless it says so: keys, networks, secrets, images."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from overlays import DEPLOY, OVERLAYS, build, find, pod_spec

CLUSTERS = tuple(folder for folder in OVERLAYS if folder != "overlays/cpu-demo")
DNS = {
    "to": [
        {
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}},
            "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}},
        }
    ],
    "ports": [{"protocol": "UDP", "port": 53}, {"protocol": "TCP", "port": 53}],
}
INTERNET = {"ports": [{"protocol": "TCP", "port": 443}]}
BALANCER, SERVER = (
    {"podSelector": {"matchLabels": {"app.kubernetes.io/component": name}}}
    for name in ("balancer", "server")
)


def rules(folder: str, component: str, direction: str) -> list[dict[str, Any]]:
    """What the policies that choose a component's pods allow, which adds up."""
    found = []
    for each in build(folder):
        if each["kind"] == "NetworkPolicy":
            chosen = each["spec"]["podSelector"].get("matchLabels", {})
            if chosen in ({}, {"app.kubernetes.io/component": component}):
                found += each["spec"].get(direction, [])
    return found


def containers(folder: str) -> Iterator[dict[str, Any]]:
    for each in build(folder):
        if each["kind"] in ("Deployment", "Job"):
            spec = each["spec"]["template"]["spec"]
            yield from (*spec["containers"], *spec.get("initContainers", ()))


@pytest.mark.parametrize("folder", CLUSTERS)
def test_no_gateway_starts_without_the_secret_of_the_keys(folder: str) -> None:
    (gateway,) = pod_spec(folder, "tandem-gateway")["containers"]
    (keys,) = [e for e in gateway["env"] if e["name"] == "TANDEM_API_KEYS"]
    # Not optional: the kubelet makes no container without it.
    assert keys["valueFrom"] == {"secretKeyRef": {"name": "tandem-api-keys", "key": "keys"}}


def test_only_the_component_open_asks_for_no_key() -> None:
    (gateway,) = pod_spec("overlays/cpu-demo", "tandem-gateway")["containers"]
    assert not gateway.get("env")
    users = [p.parent.name for p in DEPLOY.rglob("kustomization.yaml") if "/open" in p.read_text()]
    assert users == ["cpu-demo"]


@pytest.mark.parametrize("folder", OVERLAYS)
def test_who_comes_in_is_named_by_namespace_and_label(folder: str) -> None:
    policies = [o["spec"] for o in build(folder) if o["kind"] == "NetworkPolicy"]
    incoming = [rule for policy in policies for rule in policy.get("ingress", ())]
    assert len(incoming) >= 5
    for rule in incoming:
        assert rule["ports"]
        for peer in rule["from"]:
            assert peer["podSelector"]["matchLabels"]
            # Without a namespaceSelector: pods of this namespace.
            assert "namespaceSelector" not in peer or peer["namespaceSelector"]["matchLabels"]


@pytest.mark.parametrize("folder", OVERLAYS)
def test_servers_reach_dns_and_are_reached_by_envoy_and_prometheus(folder: str) -> None:
    assert rules(folder, "server", "egress") == [DNS]
    inference = [r for r in rules(folder, "server", "ingress") if {"port": 8002} not in ports(r)]
    assert [r["from"] for r in inference] == [[BALANCER]]
    everyone = {"policyTypes": ["Ingress", "Egress"], "podSelector": {}}
    assert find(folder, "NetworkPolicy", "deny-all")["spec"] == everyone


def ports(rule: dict[str, Any]) -> list[dict[str, int]]:
    return [{"port": p["port"]} for p in rule["ports"]]


@pytest.mark.parametrize("folder", OVERLAYS)
def test_gateway_and_envoy_reach_what_is_next_and_dns(folder: str) -> None:
    gateway, envoy = (rules(folder, name, "egress") for name in ("gateway", "balancer"))
    assert [r["to"] for r in gateway if r != DNS] == [[BALANCER]]
    assert [r["to"] for r in envoy if r != DNS] == [[SERVER]]


@pytest.mark.parametrize("folder", OVERLAYS)
def test_only_the_job_reaches_the_internet_and_has_the_hubs_token(folder: str) -> None:
    assert rules(folder, "weights", "egress") == [DNS, INTERNET]
    assert rules(folder, "weights", "ingress") == []
    job = find(folder, "Job", "tandem-weights")["spec"]
    assert job["template"]["metadata"]["labels"]["app.kubernetes.io/component"] == "weights"
    # A job can't be changed: it is gone by the time that somebody would.
    assert job["ttlSecondsAfterFinished"] <= 600
    for each in build(folder):
        if each["kind"] == "Deployment":
            assert "hub-token" not in json.dumps(each)


@pytest.mark.parametrize("folder", CLUSTERS)
def test_the_hubs_token_is_a_file(folder: str) -> None:
    spec = pod_spec(folder, "tandem-weights", "Job")
    (container,) = spec["containers"]
    assert {"name": "HF_TOKEN_PATH", "value": "/hub/token"} in container["env"]
    assert {"name": "hub", "mountPath": "/hub", "readOnly": True} in container["volumeMounts"]
    secret = {"secretName": "hub-token", "defaultMode": 0o440}
    assert {"name": "hub", "secret": secret} in spec["volumes"]


@pytest.mark.parametrize("folder", CLUSTERS)
def test_images_are_named_by_digest(folder: str) -> None:
    images = {container["image"] for container in containers(folder)}
    assert len(images) == 3
    for image in images:
        name, _, digest = image.partition("@sha256:")
        assert len(digest) == 64
        # No tag, and nothing that could be pulled before the operator has named it.
        assert name.startswith("registry.invalid/")
        assert ":" not in name


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was downloaded, by a hub that isn't one."""
    downloaded: list[str] = []
    hub = ModuleType("huggingface_hub")
    hub.snapshot_download = downloaded.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    return downloaded


def run_fetch(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    overlay = DEPLOY / "overlays/gpu"
    monkeypatch.setattr(sys, "argv", ["fetch_weights.py", *arguments])
    script = runpy.run_path(str(overlay / "fetch_weights.py"))
    main = script["main"]
    main.__globals__["MODEL_JSON"] = overlay / "model.json"
    main.__globals__["time"] = ModuleType("time")
    main.__globals__["time"].sleep = _no_more_waiting
    main()


class _WaitsError(Exception):
    """Instead of sleeping."""


def _no_more_waiting(_: float) -> None:
    raise _WaitsError


def test_servers_wait_for_the_job_and_download_nothing(
    weights: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(_WaitsError):
        run_fetch(monkeypatch, "--wait")
    assert weights == []
    run_fetch(monkeypatch)
    assert weights == ["google/gemma-4-E2B-it", "google/gemma-4-E2B-it-assistant"]
    run_fetch(monkeypatch)
    run_fetch(monkeypatch, "--wait")
    assert len(weights) == 2
