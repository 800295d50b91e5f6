"""Rules and alerts: what they name exists, each alert is tested and explained, and a real Prometheus agrees."""

import contextlib
import json
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.app import create_app
from server.settings import Settings
from tests.deploy.promql import OF_PROMETHEUS, OF_SCRAPING, Offered, named, offered
from tests.server.fake_engine import FakeEngine
from tests.server.live import live
from tests.server.pictures import encode, rectangle
from tests.server.test_gpu import fake_nvml

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "prometheus"
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "ddetr.json"
LONGEST_S = 60.0

needs_promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="no promtool (apt-get install prometheus)")
needs_prometheus = pytest.mark.skipif(
    not shutil.which("prometheus"), reason="no prometheus (apt-get install prometheus)"
)


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


RULES = [
    rule for path in sorted(FOLDER.glob("rules/*.yml")) for group in read(path)["groups"] for rule in group["rules"]
]
ALERTS = {rule["alert"]: rule for rule in RULES if "alert" in rule}
RECORDED = {rule["record"] for rule in RULES if "record" in rule}


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Offered:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    return offered()


def test_every_series_and_label_that_a_rule_names_exists(there: Offered) -> None:
    for rule in RULES:
        names = named(rule["expr"])
        recorded = {name for name in names.metrics if ":" in name}
        assert recorded <= RECORDED, rule
        assert names.metrics - recorded <= there.series | OF_PROMETHEUS, rule
        assert names.labels <= there.labels | OF_SCRAPING, rule


def test_the_latency_objective_is_a_bound_of_the_histogram(there: Offered) -> None:
    bounds = {bound for rule in RULES for bound in re.findall(r'le="([^"]+)"', rule["expr"])}
    assert bounds
    assert bounds <= there.latency_bounds


def test_what_is_recorded_is_used() -> None:
    used = DASHBOARD.read_text(encoding="utf-8") + " ".join(rule["expr"] for rule in RULES)
    assert not [name for name in RECORDED if name not in used]


def anchors(text: str) -> set[str]:
    """Of the headings, as a Markdown viewer makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_every_alert_says_who_should_look_what_is_wrong_and_where_to_read_on() -> None:
    for name, rule in ALERTS.items():
        assert rule["labels"]["severity"] in {"page", "ticket"}, name
        assert {"summary", "description", "runbook"} == set(rule["annotations"]), name
        page, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert anchor == name.lower()
        assert anchor in anchors((ROOT / page).read_text(encoding="utf-8")), f"{page} explains no {name}"


def test_the_page_of_operations_has_these_alerts_and_no_others() -> None:
    """With the severity that they have, and what to do."""
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    told = re.findall(r"^### (Ddetr\w+)\n\n\*\*(\w+)\.\*\* .+ \*What to do:\* .+", text, re.MULTILINE)
    assert told == [(name, rule["labels"]["severity"]) for name, rule in ALERTS.items()]


def test_every_alert_fires_in_a_test() -> None:
    fired = set()
    for path in FOLDER.glob("tests/*.yml"):
        for case in read(path)["tests"]:
            for test in case.get("promql_expr_test", []):
                for sample in test["exp_samples"]:
                    fired |= set(re.findall(r'alertname="(\w+)", .*alertstate="firing"', sample["labels"]))
            fired |= {test["alertname"] for test in case.get("alert_rule_test", []) if test["exp_alerts"]}
    assert fired == set(ALERTS)


def run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_rules_are_valid() -> None:
    run("promtool", "check", "rules", *FOLDER.glob("rules/*.yml"))


@needs_promtool
@pytest.mark.parametrize("path", sorted(FOLDER.glob("tests/*.yml")), ids=lambda path: path.stem)
def test_rules_do_what_is_meant(path: Path) -> None:
    run("promtool", "test", "rules", path)


def configuration(folder: Path, port: int) -> Path:
    """Ours, with the server at `port` as its target, asked every second."""
    shutil.copytree(FOLDER / "rules", folder / "rules")
    (folder / "key").touch()
    config = read(FOLDER / "prometheus.yml")
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    ours = next(job for job in config["scrape_configs"] if job["job_name"] == "ddetr")
    ours["authorization"]["credentials_file"] = "key"
    ours["static_configs"] = [{"targets": [f"127.0.0.1:{port}"]}]
    config["scrape_configs"] = [ours]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


@needs_promtool
def test_the_configuration_is_valid(tmp_path: Path) -> None:
    run("promtool", "check", "config", configuration(tmp_path, 1))


class Asked:
    """A Prometheus at `port`."""

    def __init__(self, port: int) -> None:
        self._base = f"http://127.0.0.1:{port}/api/v1/"

    def get(self, path: str, **query: str) -> Any:
        with urllib.request.urlopen(f"{self._base}{path}?{urllib.parse.urlencode(query)}", timeout=10) as response:
            return json.load(response)["data"]

    def value(self, expression: str) -> float | None:
        """Of the first series, or None where there is none."""
        result = self.get("query", query=expression)["result"]
        return float(result[0]["value"][1]) if result else None

    def wait(self, expression: str) -> None:
        """Until the expression has a series."""
        until = time.monotonic() + LONGEST_S
        while time.monotonic() < until:
            try:
                if self.value(expression) is not None:
                    return
            except OSError:
                pass  # not listening yet
            time.sleep(0.1)  # Prometheus tells nobody when it has scraped
        pytest.fail(f"no {expression} after {LONGEST_S} s")


@contextlib.contextmanager
def prometheus(folder: Path, served: int, key: str = "") -> Iterator[Asked]:
    """A Prometheus of our configuration that asks the server at `served`, and is ready."""
    config = configuration(folder, served)
    (folder / "key").write_text(key, encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        "prometheus",
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            yield Asked(port)
        finally:
            process.terminate()
            process.wait(30)


@needs_prometheus
def test_a_real_prometheus_scrapes_a_real_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    with live(create_app(Settings(decode_threads=1), FakeEngine())) as served:
        body = encode(rectangle(), "JPEG")
        request = urllib.request.Request(f"http://127.0.0.1:{served}/detect", body, {"Content-Type": "image/jpeg"})
        urllib.request.urlopen(request, timeout=30).close()
        with prometheus(tmp_path, served) as asked:
            asked.wait('up{job="ddetr"} == 1')
            asked.wait('ddetr_requests_total{route="/detect", status="200"} == 1')
            asked.wait('job:ddetr_detect_requests:rate5m{job="ddetr"}')
            assert asked.value('ddetr_gpu_memory_used_bytes{gpu="0"}') == 5 * 2**30
            rules = [rule for group in asked.get("rules")["groups"] for rule in group["rules"]]
            assert {rule["name"] for rule in rules} == set(ALERTS) | RECORDED
            assert {rule["health"] for rule in rules} <= {"ok", "unknown"}, "unknown: not yet evaluated"
            firing = [alert for alert in asked.get("alerts")["alerts"] if alert["state"] == "firing"]
            assert not firing
            silent = set()
            for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]:
                for target in panel.get("targets", []):
                    expression = target["expr"].replace("$job", "ddetr").replace("$instance", ".*")
                    found = asked.get("query", query=expression.replace("$__rate_interval", "10s"))  # raises for a 400
                    silent |= set() if found["result"] else {panel["title"]}
            assert silent <= MAY_BE_EMPTY, "panels that show nothing of a server that has answered a picture"


@needs_prometheus
def test_a_real_prometheus_is_let_in_by_its_key(tmp_path: Path) -> None:
    app = create_app(Settings(decode_threads=1, api_keys=("for-prometheus",)), FakeEngine())
    with live(app) as served, prometheus(tmp_path, served, key="for-prometheus\n") as asked:
        asked.wait('up{job="ddetr"} == 1')


MAY_BE_EMPTY = {"Firing alerts", "Refusals by reason", "Refused for load", "Swaps and proofs"}
"""On a server on which nothing has gone wrong."""
