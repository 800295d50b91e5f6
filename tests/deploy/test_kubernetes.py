"""The manifests: what they promise each other, the server and the published schemas; and a rollout of real servers."""

from __future__ import annotations

import asyncio
import copy
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from starlette.testclient import TestClient

from server.app import create_app
from server.metrics import Metrics
from server.settings import Settings
from server.timing import STAGES
from tests.deploy.processes import ROOT
from tests.deploy.rollout import Timing, roll_under_load
from tests.server.fake_engine import FakeEngine
from tests.server.pictures import encode, rectangle
from tests.server.tiny_bundle import write_tiny_bundle

FOLDER = ROOT / "deploy" / "kubernetes"
OVERLAYS = ("cpu", "gpu", "fleet")
OLDEST, NEWEST = "1.30", "1.37"
IMAGE_VOLUMES_SINCE = "1.35"
SPARE_S = 5  # after the drain, to close engines

Document = dict[str, Any]


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def literals(folder: str) -> dict[str, str]:
    """The settings that a kustomization generates."""
    (generator,) = load(FOLDER / folder / "kustomization.yaml")["configMapGenerator"]
    return dict(literal.split("=", 1) for literal in generator["literals"])


def settings_of(variables: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return Settings()


# --- as they are written: no tool is needed -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "folders",
    [
        ("base",),
        ("base", "overlays/gpu"),
        ("base", "overlays/gpu", "components/api-keys"),
        ("base", "overlays/gpu", "components/bundle-image"),
    ],
)
def test_every_variable_is_a_setting_and_has_a_value_it_can_have(
    folders: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = {name: value for folder in folders for name, value in literals(folder).items()}
    known = {f"DDETR_{name.upper()}" for name in Settings.model_fields}
    assert not variables.keys() - known
    settings_of(variables, monkeypatch)


def test_the_grace_period_covers_the_delay_and_the_drain(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(literals("base"), monkeypatch)
    assert settings.shutdown_delay_ms >= 10_000, "gateways need some seconds to look elsewhere"
    spec = load(FOLDER / "base" / "deployment.yaml")["spec"]["template"]["spec"]
    needed_s = (settings.shutdown_delay_ms + settings.drain_timeout_ms) / 1e3 + SPARE_S
    assert spec["terminationGracePeriodSeconds"] >= needed_s


def test_a_service_of_our_name_would_break_the_settings_and_is_kept_out(monkeypatch: pytest.MonkeyPatch) -> None:
    service = load(FOLDER / "base" / "service.yaml")
    prefix = service["metadata"]["name"].upper().replace("-", "_")
    assert f"{prefix}_PORT" == "DDETR_PORT", "the names have changed: this trap is gone"
    monkeypatch.setenv(f"{prefix}_PORT", "tcp://10.96.0.10:80")  # what Kubernetes sets where links are on
    with pytest.raises(ValidationError, match="port"):
        Settings()
    for path in ("base/deployment.yaml", "build-engine/job.yaml"):
        assert load(FOLDER / path)["spec"]["template"]["spec"]["enableServiceLinks"] is False


def test_probes_ask_what_the_server_answers_without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_of(literals("base"), monkeypatch)
    (container,) = load(FOLDER / "base" / "deployment.yaml")["spec"]["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": settings.port, "metrics": settings.metrics_port}
    probes = {name: container[f"{name}Probe"] for name in ("startup", "readiness", "liveness")}
    assert {name: probe["httpGet"]["path"] for name, probe in probes.items()} == {
        "startup": "/readyz",
        "readiness": "/readyz",
        "liveness": "/livez",
    }
    with TestClient(create_app(Settings(api_keys="secret"), FakeEngine())) as client:
        for probe in probes.values():
            assert probe["httpGet"]["port"] == "http"
            assert client.get(probe["httpGet"]["path"]).status_code == 200


def patience_s(probe: Document) -> float:
    return float(probe["periodSeconds"] * probe["failureThreshold"])


def test_the_autoscaler_asks_for_metrics_that_exist() -> None:
    (trigger,) = load(FOLDER / "components" / "autoscaling" / "scaledobject.yaml")["spec"]["triggers"]
    query = trigger["metadata"]["query"]
    (name,) = re.findall(r"ddetr_\w+", query)
    (stages,) = re.findall(r'stage=~"([\w|]+)"', query)
    exposed = Metrics().exposition().decode()
    for stage in stages.split("|"):
        assert stage in STAGES
        assert f'{name}{{stage="{stage}"}} ' in exposed, "shown from the start: no images are 0, not an error"
    assert trigger["metadata"]["threshold"] == literals("base")["DDETR_MAX_BATCH_SIZE"]


def test_the_user_is_the_images() -> None:
    users = set(re.findall(r"^USER (\d+):(\d+)$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE))
    for path in ("base/deployment.yaml", "build-engine/job.yaml"):
        context = load(FOLDER / path)["spec"]["template"]["spec"]["securityContext"]
        assert users == {(str(context["runAsUser"]), str(context["runAsGroup"]))}


# --- as kustomize renders them --------------------------------------------------------------------------------------


def kustomize() -> list[str] | None:
    if shutil.which("kustomize"):
        return ["kustomize", "build"]
    return ["kubectl", "kustomize"] if shutil.which("kubectl") else None


needs_kustomize = pytest.mark.skipif(kustomize() is None, reason="neither kustomize nor kubectl is on PATH")


@cache
def render(folder: Path) -> list[Document]:
    command = kustomize()
    assert command is not None
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def overlay(name: str) -> list[Document]:
    return render(FOLDER / "overlays" / name)


def the(documents: list[Document], kind: str) -> Document:
    (found,) = (document for document in documents if document["kind"] == kind)
    return found


def with_components(folder: Path, base: str, *components: str, literal: str = "") -> list[Document]:
    """An overlay as a user writes it, in a folder of its own."""
    up = os.path.relpath(FOLDER, folder)
    content: Document = {
        "resources": [f"{up}/{base}"],
        "components": [f"{up}/components/{name}" for name in components],
    }
    if literal:
        content["configMapGenerator"] = [
            {"name": "ddetr-settings", "namespace": "ddetr", "behavior": "merge", "literals": [literal]}
        ]
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return render(folder)


def pod_of(documents: list[Document]) -> Document:
    spec: Document = the(documents, "Deployment")["spec"]["template"]["spec"]
    return spec


@needs_kustomize
@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("folder", [*(f"overlays/{name}" for name in OVERLAYS), "build-engine"])
def test_kubernetes_own_kinds_are_as_its_schemas_want_them(folder: str, version: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed").validate
    for document in render(FOLDER / folder):
        if document["kind"] not in ("ScaledObject", "PodMonitor", "PrometheusRule"):
            validate(document, version, strict=True)


@needs_kustomize
def test_a_bundle_may_be_an_image(tmp_path: Path) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed").validate
    documents = with_components(tmp_path, "overlays/gpu", "bundle-image")
    for document in documents:
        validate(document, IMAGE_VOLUMES_SINCE, strict=True)
    assert not [document for document in documents if document["kind"] == "PersistentVolumeClaim"]
    pod = pod_of(documents)
    assert {volume["name"] for volume in pod["volumes"]} == {"tmp", "bundle"}
    mounts = {mount["name"]: mount for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts.keys() == {"tmp", "bundle"}
    assert the(documents, "ConfigMap")["data"]["DDETR_BUNDLE"] == mounts["bundle"]["mountPath"]


@needs_kustomize
@pytest.mark.parametrize(
    ("kind", "module"),
    [
        ("ScaledObject", "cloudcoil.models.keda.v1alpha1"),
        ("PodMonitor", "cloudcoil.models.prometheus_operator.v1"),
        ("PrometheusRule", "cloudcoil.models.prometheus_operator.v1"),
    ],
)
def test_kinds_of_others_are_as_their_definitions_want_them(kind: str, module: str) -> None:
    model = getattr(pytest.importorskip(module, reason="cloudcoil's models are not installed"), kind)
    documents = [copy.deepcopy(each) for each in overlay("fleet") if each["kind"] == kind]
    assert documents
    for document in documents:
        # Of KEDA 2.17; the models for old Pythons are of 2.16.
        document["spec"].get("fallback", {}).pop("behavior", None)
        understood = model.model_validate(document).model_dump(mode="json", by_alias=True, exclude_unset=True)
        assert understood == document, "what the definition does not know would be dropped without a word"


@needs_kustomize
@pytest.mark.parametrize("name", OVERLAYS, ids=lambda name: f"on-{name}")
def test_everything_finds_the_pods(name: str) -> None:
    documents = overlay(name)
    deployment = the(documents, "Deployment")
    labels = deployment["spec"]["template"]["metadata"]["labels"].items()
    selector = deployment["spec"]["selector"]["matchLabels"]
    selectors = [
        selector,
        the(documents, "Service")["spec"]["selector"],
        the(documents, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
        the(documents, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"],
        *(
            constraint["labelSelector"]["matchLabels"]
            for constraint in deployment["spec"]["template"]["spec"]["topologySpreadConstraints"]
        ),
        *(each["spec"]["selector"]["matchLabels"] for each in documents if each["kind"] == "PodMonitor"),
    ]
    for each in selectors:
        assert each
        assert each.items() <= labels
    assert {document["metadata"].get("namespace") for document in documents if document["kind"] != "Namespace"} == {
        the(documents, "Namespace")["metadata"]["name"]
    }


@needs_kustomize
@pytest.mark.parametrize("name", OVERLAYS, ids=lambda name: f"on-{name}")
def test_ports_are_called_by_names_that_the_container_has(name: str) -> None:
    documents = overlay(name)
    (container,) = pod_of(documents)["containers"]
    ports = {port["name"] for port in container["ports"]}
    named = [port["targetPort"] for port in the(documents, "Service")["spec"]["ports"]]
    named += [port["port"] for rule in the(documents, "NetworkPolicy")["spec"]["ingress"] for port in rule["ports"]]
    named += [
        endpoint["port"]
        for document in documents
        if document["kind"] == "PodMonitor"
        for endpoint in document["spec"]["podMetricsEndpoints"]
    ]
    assert set(named) <= ports


@needs_kustomize
def test_the_job_is_called_as_the_rules_have_it() -> None:
    documents = overlay("fleet")
    label = the(documents, "PodMonitor")["spec"]["jobLabel"]  # else the operator calls it NAMESPACE/NAME
    job = the(documents, "Deployment")["spec"]["template"]["metadata"]["labels"][label]
    rules = [document for document in documents if document["kind"] == "PrometheusRule"]
    assert set(re.findall(r'job="([^"]*)"', str(rules))) == {job}


def test_the_operators_rules_are_prometheus_own() -> None:
    """One object a file, as groups of one object must have different names."""
    copies = yaml.safe_load_all((FOLDER / "components/monitoring/prometheusrule.yaml").read_text(encoding="utf-8"))
    specs = {document["metadata"]["name"]: document["spec"] for document in copies}
    sources = {f"ddetr-{path.stem}": load(path) for path in (ROOT / "deploy/prometheus/rules").glob("*.yml")}
    assert specs == sources, "run deploy/prometheus/prometheusrule.sh, as it says"
    for spec in specs.values():
        names = [group["name"] for group in spec["groups"]]
        assert len(names) == len(set(names))


def test_the_script_writes_the_copy() -> None:
    script = ROOT / "deploy" / "prometheus" / "prometheusrule.sh"
    done = subprocess.run(["sh", script], capture_output=True, text=True, check=True)
    copy = FOLDER / "components" / "monitoring" / "prometheusrule.yaml"
    assert done.stdout == copy.read_text(encoding="utf-8")


@needs_kustomize
@pytest.mark.parametrize("name", OVERLAYS, ids=lambda name: f"on-{name}")
def test_an_update_drops_no_pod_before_a_new_one_is_ready(name: str) -> None:
    spec = the(overlay(name), "Deployment")["spec"]
    assert spec["strategy"] == {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}}
    (container,) = spec["template"]["spec"]["containers"]
    assert spec["progressDeadlineSeconds"] > patience_s(container["startupProbe"])
    liveness_s = patience_s(container["livenessProbe"])
    assert 60 < liveness_s <= 120, "a lost engine has a minute, in which /livez may fail; a hang has not ten"
    assert patience_s(container["readinessProbe"]) < 10


@needs_kustomize
@pytest.mark.parametrize("folder", [*(f"overlays/{name}" for name in OVERLAYS), "build-engine"])
def test_containers_may_do_nothing_they_need_not(folder: str) -> None:
    documents = render(FOLDER / folder)
    (workload,) = (document for document in documents if document["kind"] in ("Deployment", "Job"))
    pod = workload["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert pod["automountServiceAccountToken"] is False
    for container in pod["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["limits"] == container["resources"]["requests"], "nothing is overbooked"
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in pod["volumes"]}


@needs_kustomize
def test_a_changed_setting_is_a_rolling_update(tmp_path: Path) -> None:
    before, after = overlay("cpu"), with_components(tmp_path, "overlays/cpu", literal="DDETR_MAX_BATCH_SIZE=2")
    names = [the(documents, "ConfigMap")["metadata"]["name"] for documents in (before, after)]
    assert names[0] != names[1]
    for documents, name in zip((before, after), names, strict=True):
        (container,) = pod_of(documents)["containers"]
        assert container["envFrom"] == [{"configMapRef": {"name": name}}]


@needs_kustomize
def test_the_autoscaler_has_the_deployment_to_itself() -> None:
    documents = overlay("fleet")
    scaled = the(documents, "ScaledObject")
    deployment = the(documents, "Deployment")
    assert scaled["spec"]["scaleTargetRef"] == {
        "apiVersion": deployment["apiVersion"],
        "kind": "Deployment",
        "name": deployment["metadata"]["name"],
    }
    assert "replicas" not in deployment["spec"]
    assert "replicas" in the(overlay("gpu"), "Deployment")["spec"]
    (trigger,) = scaled["spec"]["triggers"]
    assert f'namespace="{deployment["metadata"]["namespace"]}"' in trigger["metadata"]["query"]
    assert trigger["metadata"]["threshold"] == the(documents, "ConfigMap")["data"]["DDETR_MAX_BATCH_SIZE"]
    assert scaled["spec"]["minReplicaCount"] >= 2, "the disruption budget lets one go"


@needs_kustomize
def test_keys_come_from_a_secret_that_can_be_read_and_changed() -> None:
    documents = overlay("fleet")
    pod = pod_of(documents)
    (container,) = pod["containers"]
    (volume,) = (volume for volume in pod["volumes"] if "secret" in volume)
    (mount,) = (mount for mount in container["volumeMounts"] if mount["name"] == volume["name"])
    file = Path(the(documents, "ConfigMap")["data"]["DDETR_API_KEYS_FILE"])
    assert file.parent == Path(mount["mountPath"])
    assert file.name in [item["path"] for item in volume["secret"]["items"]]
    assert "subPath" not in mount, "such a file never changes"
    assert volume["secret"]["defaultMode"] == 0o440
    assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsGroup"], "else the server cannot read it"
    (endpoint,) = the(documents, "PodMonitor")["spec"]["podMetricsEndpoints"]
    assert endpoint["authorization"]["credentials"]["name"] == volume["secret"]["secretName"]


@needs_kustomize
@pytest.mark.parametrize("name", ["gpu", "fleet"], ids=lambda name: f"on-{name}")
def test_a_pod_on_a_gpu_has_one_and_its_bundle(name: str) -> None:
    documents = overlay(name)
    pod = pod_of(documents)
    (container,) = pod["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    (mount,) = (mount for mount in container["volumeMounts"] if mount["name"] == "bundles")
    assert Path(the(documents, "ConfigMap")["data"]["DDETR_BUNDLE"]).parent == Path(mount["mountPath"])
    assert mount["readOnly"] is True
    claim = the(documents, "PersistentVolumeClaim")["metadata"]["name"]
    assert {"persistentVolumeClaim": {"claimName": claim, "readOnly": True}, "name": "bundles"} in pod["volumes"]
    job = the(render(FOLDER / "build-engine"), "Job")
    assert {"persistentVolumeClaim": {"claimName": claim}, "name": "bundles"} in job["spec"]["template"]["spec"][
        "volumes"
    ]


@needs_kustomize
def test_the_job_builds_the_bundle_that_is_served() -> None:
    (container,) = the(render(FOLDER / "build-engine"), "Job")["spec"]["template"]["spec"]["containers"]
    verb, *words = container["args"]
    assert verb == "build"
    flags = dict(zip(words[::2], words[1::2], strict=True))
    text = (ROOT / "export" / "trt_build.py").read_text(encoding="utf-8")
    assert all(f'"{flag}"' in text for flag in flags)
    assert flags["--output"] == literals("overlays/gpu")["DDETR_BUNDLE"]


# --- a rollout ------------------------------------------------------------------------------------------------------

WITHDRAWN_AFTER_S = 0.5
GRACE_S = 60.0


@pytest.mark.timeout(300)
def test_a_rolling_update_under_load_drops_nothing(tmp_path: Path) -> None:
    """Two servers are replaced, one after the other, while clients ask over kept connections and over new ones."""
    bundle = write_tiny_bundle(tmp_path / "bundle")
    timing = Timing(3 * WITHDRAWN_AFTER_S, GRACE_S, probe_every_s=0.2, withdrawn_after_s=WITHDRAWN_AFTER_S)
    outcomes, ended = asyncio.run(roll_under_load(bundle.path, timing, tmp_path, encode(rectangle())))
    assert outcomes.keys() == {"new 200", "kept 200"}, dict(outcomes)
    assert min(outcomes.values()) >= 50
    assert [pod.exit_status for pod in ended] == [0, 0]


@pytest.mark.timeout(300)
def test_without_the_delay_it_would(tmp_path: Path) -> None:
    """What the delay is for: the same update, and a door that closes before everybody knows."""
    bundle = write_tiny_bundle(tmp_path / "bundle")
    timing = Timing(0.0, GRACE_S, probe_every_s=0.2, withdrawn_after_s=WITHDRAWN_AFTER_S)
    outcomes, ended = asyncio.run(roll_under_load(bundle.path, timing, tmp_path, encode(rectangle()), pods=1))
    assert outcomes.keys() > {"new 200", "kept 200"}, dict(outcomes)
    assert [pod.exit_status for pod in ended] == [0]
