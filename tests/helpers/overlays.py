"""The overlays of deploy/ as `kubectl apply -k` sends them."""

from __future__ import annotations

import subprocess
from functools import cache
from typing import Any

import yaml

from tandem_runtime.paths import ROOT

DEPLOY = ROOT / "deploy"
OVERLAYS = ("overlays/cpu-demo", "overlays/gpu", "overlays/autoscale", "overlays/gpu-tls")


@cache
def build(folder: str) -> list[dict[str, Any]]:
    """An overlay's objects."""
    command = [str(ROOT / ".venv/bin/kubectl"), "kustomize", str(DEPLOY / folder)]
    output = subprocess.run(command, check=True, capture_output=True, text=True)
    assert output.stderr == ""
    return list(yaml.safe_load_all(output.stdout))


def find(folder: str, kind: str, name: str) -> dict[str, Any]:
    """The object of this kind and name."""
    (found,) = [o for o in build(folder) if (o["kind"], o["metadata"]["name"]) == (kind, name)]
    return found


def pod_spec(folder: str, name: str = "tandem", kind: str = "Deployment") -> dict[str, Any]:
    """What the pods of a deployment or job are made from."""
    spec: dict[str, Any] = find(folder, kind, name)["spec"]["template"]["spec"]
    return spec
