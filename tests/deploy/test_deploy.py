"""The files of deploy/ and the Dockerfile: built, against schemas, linted, and true to the code."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from cloudcoil.models.cert_manager import v1 as cert_manager
from cloudcoil.models.prometheus_operator import v1 as operator

from overlays import DEPLOY, OVERLAYS, build, find, pod_spec
from tandem import EngineConfig
from tandem_runtime.paths import ROOT

FOLDERS = OVERLAYS
# The oldest with all that is used (the sleep hook), and the newest that there are schemas for.
KUBERNETES_VERSIONS = ("1.30", kubernetes_validate.latest_version())
CUSTOM = {
    "PodMonitor": operator.PodMonitor,
    "PrometheusRule": operator.PrometheusRule,
    "Issuer": cert_manager.Issuer,
    "Certificate": cert_manager.Certificate,
}


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_every_object_fits_its_schema(folder: str, version: str) -> None:
    objects = build(folder)
    assert len(objects) >= 15
    for each in objects:
        if each["kind"] in CUSTOM:
            model = CUSTOM[each["kind"]].model_validate(each)
            # The classes leave unknown fields out: what comes back must be what went in.
            known = model.model_dump(mode="json", by_alias=True, exclude_unset=True)
            assert known == each
        else:
            kubernetes_validate.validate(each, version, strict=True)


def test_a_misspelt_field_is_found() -> None:
    wrong = json.loads(json.dumps(find("overlays/gpu", "Deployment", "tandem")))
    wrong["spec"]["template"]["spec"]["terminationGraceSeconds"] = 1
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGraceSeconds"):
        kubernetes_validate.validate(wrong, KUBERNETES_VERSIONS[0], strict=True)


@pytest.mark.parametrize("folder", FOLDERS)
def test_names_and_ports_lead_somewhere(folder: str) -> None:
    """Volumes, claims, services, policies and budgets name what the overlay has."""
    objects = build(folder)
    names = {(o["kind"], o["metadata"]["name"]) for o in objects}
    pods = [o["spec"]["template"] for o in objects if o["kind"] in ("Deployment", "Job")]
    for pod in pods:
        assert ("ServiceAccount", pod["spec"]["serviceAccountName"]) in names
        for volume in pod["spec"]["volumes"]:
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in names
            if "persistentVolumeClaim" in volume:
                claim = volume["persistentVolumeClaim"]["claimName"]
                assert ("PersistentVolumeClaim", claim) in names
    for each in objects:
        if each["kind"] in ("Service", "PodDisruptionBudget"):
            selector = each["spec"]["selector"]
            wanted = selector.get("matchLabels", selector).items()
            (pod,) = [p for p in pods if wanted <= p["metadata"]["labels"].items()]
            ports = {p["name"] for c in pod["spec"]["containers"] for p in c["ports"]}
            assert {p["targetPort"] for p in each["spec"].get("ports", ())} <= ports
        if each["kind"] == "NetworkPolicy":
            chosen = each["spec"]["podSelector"].get("matchLabels", {}).items()
            assert any(chosen <= p["metadata"]["labels"].items() for p in pods)


def test_the_deployed_configuration_is_the_published_one() -> None:
    """A kustomization can't reach outside its folder, so there is a copy with an addition."""
    published = (ROOT / "model_repository/tandem/config.pbtxt").read_text()
    deployed = (DEPLOY / "base/model/config.pbtxt").read_text()
    assert deployed.startswith(published)
    assert deployed.count("parameters {") == published.count("parameters {") + 2


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_gateway_names_the_one_model_of_the_image(folder: str) -> None:
    """Envoy lets nobody ask which there are."""
    (gateway,) = pod_spec(folder, "tandem-gateway")["containers"]
    assert "--model=tandem" in gateway["args"]
    assert "Repository" not in (DEPLOY / "base/envoy/envoy.yaml").read_text()
    copied = "COPY model_repository/tandem /opt/tandem/model_repository/tandem\n"
    assert copied in (ROOT / "Dockerfile").read_text()


@pytest.mark.parametrize("path", ["base/model/model.json", "overlays/gpu/model.json"])
def test_every_model_json_is_one(path: str) -> None:
    config = EngineConfig.from_json(DEPLOY / path)
    assert config.drafter_name == "mtp"


def test_a_drain_fits_into_the_grace_period() -> None:
    spec = pod_spec("overlays/gpu")
    (container,) = spec["containers"]
    (exit_timeout,) = [
        int(a.partition("=")[2]) for a in container["args"] if a.startswith("--exit-timeout-secs=")
    ]
    config = (DEPLOY / "base/model/config.pbtxt").read_text()
    (drain,) = [
        int(line.split('string_value: "')[1].partition('"')[0])
        for line in config.splitlines()
        if "drain_seconds" in line and not line.startswith("#")
    ]
    # The longest generation of the default pair: its 2048 tokens at two a second.
    assert drain >= 600
    assert spec["terminationGracePeriodSeconds"] >= drain + exit_timeout + 10


def test_scaling_targets_follow_the_configuration() -> None:
    model = json.loads((DEPLOY / "overlays/gpu/model.json").read_text())
    spec = find("overlays/autoscale", "HorizontalPodAutoscaler", "tandem")["spec"]
    targets = {m["pods"]["metric"]["name"]: m["pods"]["target"] for m in spec["metrics"]}
    assert float(targets["tandem_requests"]["averageValue"]) == 0.75 * model["max_num_seqs"]
    adapter = yaml.safe_load((DEPLOY / "overlays/autoscale/prometheus-adapter.yaml").read_text())
    assert {rule["name"]["as"] for rule in adapter["rules"]["custom"]} == set(targets)
    assert "replicas" not in find("overlays/autoscale", "Deployment", "tandem")["spec"]


def test_the_gpu_overlay_has_one_gpu_a_pod_and_keeps_its_weights() -> None:
    spec = pod_spec("overlays/gpu")
    (container,) = spec["containers"]
    for kind in ("requests", "limits"):
        assert container["resources"][kind]["nvidia.com/gpu"] == 1
    # Only what downloads can write.
    for each in (container, *spec["initContainers"]):
        mounts = {m["name"]: m for m in each["volumeMounts"]}
        assert mounts["weights"]["readOnly"]


def test_hadolint_finds_nothing_in_the_dockerfile() -> None:
    command = [str(ROOT / ".venv/bin/hadolint"), str(ROOT / "Dockerfile")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "")


def test_the_dockerfile_copies_what_is_there_and_not_ignored() -> None:
    kept = [
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"
    ]
    for line in (ROOT / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY "):
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), source
                folders = (Path(source), *Path(source).parents)
                assert any(f.match(pattern) for f in folders for pattern in kept), source


def test_checkov_finds_nothing_that_is_not_explained(tmp_path: Path) -> None:
    checkov = ROOT / ".checkov/bin/checkov"
    assert checkov.exists(), "`make test` installs it; alone: make .checkov/.stamp"
    for folder in FOLDERS:
        name = folder.replace("/", "-")
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump_all(build(folder)))
    (tmp_path / "Dockerfile").write_text((ROOT / "Dockerfile").read_text())
    command = [str(checkov), "--config-file", str(DEPLOY / "checkov.yaml"), "-d", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert "Passed checks: 0" not in result.stdout
