"""The compose files: valid, guarded, closed to the network, and in line with the server's settings."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from cli.main import main
from server.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
MAIN, CPU = "docker-compose.yml", "docker-compose.cpu.yml"


class Loader(yaml.SafeLoader):
    """Understands compose's !reset: the key is taken out."""


Loader.add_constructor("!reset", lambda loader, node: None)


def read(name: str) -> Any:
    return yaml.load((ROOT / name).read_text(encoding="utf-8"), Loader)  # noqa: S506


SERVICES = read(MAIN)["services"]


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_can_do_no_more_than_it_must(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["mem_limit"]
    assert service["pids_limit"]
    assert "privileged" not in service
    assert not [volume for volume in service["volumes"] if "docker.sock" in volume]


def test_ports_are_the_hosts_own_unless_told_otherwise() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(ports) == 3
    for port in ports:
        assert re.match(r"\$\{\w+:-127\.0\.0\.1\}:", port), port


def test_there_is_no_password() -> None:
    grafana = SERVICES["grafana"]["environment"]
    assert not [key for key in grafana if "PASSWORD" in key]
    assert grafana["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true", "else admin may sign in as admin"
    assert grafana["GF_AUTH_BASIC_ENABLED"] == "false"
    assert grafana["GF_AUTH_DISABLE_LOGIN_FORM"] == "true"
    assert grafana["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"


def test_images_are_of_a_release() -> None:
    for name, service in SERVICES.items():
        assert re.search(r":[\w.-]+\}$", service["image"]), name
        assert "latest" not in service["image"]


def test_variables_of_ours_are_settings() -> None:
    environment = SERVICES["detector"]["environment"]
    ours = {name for name in environment if name.startswith("DDETR_")}
    assert ours <= {f"DDETR_{name.upper()}" for name in Settings.model_fields}
    given = {name.removeprefix("DDETR_").lower(): environment[name] for name in ours if environment[name] is not None}
    Settings(**given)  # raises for a value that cannot be
    assert "DDETR_PORT" not in ours, "the port inside is the one that is published"
    assert "ddetr" not in SERVICES, "links to it would set DDETR_PORT, which is a setting"


FIXED = {
    "host",  # by the image: all of the container's addresses
    "port",  # the one inside that is published
    "metrics_host",
    "metrics_port",
    "drain_timeout_ms",  # the grace period is made for it
    "build_engine",  # needs torch, which the image has not: the service build-engine is for that
    "engine_cache",
}


def test_every_setting_is_handed_on_or_fixed() -> None:
    environment = SERVICES["detector"]["environment"]
    handed_on = {name for name in Settings.model_fields if environment.get(f"DDETR_{name.upper()}", "") is None}
    assert handed_on == Settings.model_fields.keys() - FIXED


def seconds(text: str) -> int:
    assert text.endswith("s")
    return int(text[:-1])


def test_docker_waits_for_longer_than_the_server_drains() -> None:
    detector = SERVICES["detector"]
    given = Settings(drain_timeout_ms=detector["environment"]["DDETR_DRAIN_TIMEOUT_MS"], shutdown_delay_ms=15_000)
    (grace,) = re.findall(r"^\$\{STOP_GRACE_PERIOD:-(\d+s)\}$", detector["stop_grace_period"])
    assert seconds(grace) * 1000 > given.drain_timeout_ms + given.shutdown_delay_ms


def test_prometheus_asks_where_the_server_tells() -> None:
    config = read("deploy/prometheus/prometheus.yml")
    job = next(job for job in config["scrape_configs"] if job["job_name"] == "ddetr")
    port = SERVICES["detector"]["environment"]["DDETR_METRICS_PORT"]
    assert job["static_configs"] == [{"targets": [f"detector:{port}"]}]
    targets = [volume.split(":")[-2] for volume in SERVICES["prometheus"]["volumes"] if volume.endswith("key:ro")]
    assert targets == [job["authorization"]["credentials_file"]]


def test_what_is_mounted_of_the_repository_is_there() -> None:
    ours = [volume.split(":")[0] for service in SERVICES.values() for volume in service["volumes"]]
    paths = [path for path in ours if path.startswith("./deploy")]
    assert len(paths) == 3
    assert all((ROOT / path).is_dir() for path in paths)


def test_the_builder_runs_only_when_asked_and_writes_what_the_detector_reads() -> None:
    builder, detector = SERVICES["build-engine"], SERVICES["detector"]
    assert builder["profiles"] == ["build"]
    assert builder["restart"] == "no"
    bundles = "${BUNDLES:-./bundles}:/bundles"
    assert bundles in builder["volumes"]
    assert f"{bundles}:ro" in detector["volumes"]


def test_the_builders_command_is_one_that_ddetr_takes(capsys: pytest.CaptureFixture[str]) -> None:
    words = [re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", word) for word in SERVICES["build-engine"]["command"]]
    with pytest.raises(SystemExit) as left:
        main([*words, "--help"])  # a value that cannot be is refused before
    assert left.value.code == 0
    told = capsys.readouterr().out
    assert "usage: ddetr build" in told
    for word in words[1:]:
        assert f"{word.partition('=')[0]} " in told


def test_without_a_gpu_none_is_reserved() -> None:
    override = read(CPU)["services"]
    with_gpu = {
        name for name, service in SERVICES.items() if "reservations" in service.get("deploy", {}).get("resources", {})
    }
    assert with_gpu == {"detector", "build-engine"}
    for name in with_gpu:
        assert override[name]["deploy"]["resources"] == {"reservations": None}, name
    assert override["detector"]["build"]["target"] == "cpu"


def compose() -> tuple[list[str], int]:
    """A compose command, and its major version; skips the test where there is none."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]):
            told = subprocess.run([*command, "version", "--short"], capture_output=True, text=True, check=False)
            if told.returncode == 0:
                return command, int(told.stdout.strip().lstrip("v").split(".")[0])
    pytest.skip("no docker compose (apt-get install docker-compose)")


def config(*files: str, **environment: str) -> str:
    command, _ = compose()
    words = [word for name in files for word in ("-f", name)]
    done = subprocess.run(
        [*command, *words, "--profile", "build", "config"],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr.strip(), "clean: no warning either"
    return done.stdout


def test_compose_takes_the_file() -> None:
    told = yaml.safe_load(config(MAIN, DDETR_BUNDLE="/bundles/current"))["services"]
    assert set(told) == set(SERVICES)
    assert told["detector"]["environment"]["DDETR_BUNDLE"] == "/bundles/current"
    assert not told["detector"]["environment"].get("DDETR_DEVICE"), "not set: the server's own default"
    assert "gpu" in json.dumps(told["detector"]["deploy"])


def test_compose_takes_the_override() -> None:
    if compose()[1] < 2:
        pytest.skip("docker compose 1 does not know !reset")
    told = yaml.safe_load(config(MAIN, CPU))["services"]
    assert "devices" not in json.dumps(told)
    assert told["detector"]["image"] == "ddetr:cpu"
