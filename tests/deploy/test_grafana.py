"""The dashboard: what its panels name exists, each says what it shows and in what unit, and it is provisioned."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.promql import OF_PROMETHEUS, OF_SCRAPING, Offered, named, offered
from tests.deploy.test_prometheus import RECORDED
from tests.server.test_gpu import fake_nvml

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "grafana"
DASHBOARD = json.loads((FOLDER / "dashboards" / "ddetr.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
COLUMNS = 24


def read(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def expressions() -> list[str]:
    asked = [target["expr"] for panel in PANELS for target in panel["targets"]]
    return asked + [each["expr"] for each in DASHBOARD["annotations"]["list"]]


def test_every_series_and_label_that_a_panel_names_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    there: Offered = offered()
    for expression in expressions():
        names = named(expression)
        assert names.metrics, expression
        assert names.metrics <= there.series | OF_PROMETHEUS | RECORDED, expression
        assert names.labels <= there.labels | OF_SCRAPING, expression


def test_what_the_server_measures_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    shown = set().union(*(named(expression).metrics for expression in expressions()))
    missing = {
        name
        for name in offered().series
        if name.startswith("ddetr_") and not name.endswith(("_bucket", "_sum", "_count", "_created"))
    } - shown
    assert missing == NOT_SHOWN


NOT_SHOWN = {"ddetr_build_info", "ddetr_gate_seconds", "ddetr_parity_passed"}
"""Variables ask for the first; the second is a duration of the start; of the third the table of engines tells more."""


NOT_OF_EVERY_DATASOURCE = [
    *(f".annotations.list[{at}].{name}" for at in (0, 1) for name in ("step", "titleFormat", "textFormat")),
    *(f".templating.list[{at}].definition" for at in (1, 2)),
]
"""What Prometheus in particular asks of an annotation, and what is shown of a variable."""


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_says_what_it_shows(panel: dict[str, Any]) -> None:
    assert len(panel["description"]) > 20
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["targets"]
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def unknown(ours: Any, understood: Any, place: str = "") -> list[str]:
    """Where something of ours is not in what was understood, or is another value there."""
    if isinstance(ours, dict) and isinstance(understood, dict):
        missing = [f"{place}.{name}" for name in ours if name not in understood]
        both = [name for name in ours if name in understood]
        return missing + [each for name in both for each in unknown(ours[name], understood[name], f"{place}.{name}")]
    if isinstance(ours, list) and isinstance(understood, list) and len(ours) == len(understood):
        pairs = enumerate(zip(ours, understood, strict=True))
        return [each for at, (one, other) in pairs for each in unknown(one, other, f"{place}[{at}]")]
    return [] if ours == understood else [place]


def test_panels_are_as_grafanas_own_schema_wants_them() -> None:
    """Read and written again by its types: what they do not know, Grafana would not either."""
    sdk = pytest.importorskip("grafana_foundation_sdk", reason="grafana-foundation-sdk is not installed").__name__
    plugins, encoder, dashboard = (
        importlib.import_module(f"{sdk}.{name}") for name in ("cog.plugins", "cog.encoder", "models.dashboard")
    )
    plugins.register_default_plugins()
    understood = json.loads(json.dumps(dashboard.Dashboard.from_json(DASHBOARD), cls=encoder.JSONEncoder))
    assert unknown(DASHBOARD, understood) == NOT_OF_EVERY_DATASOURCE


def test_panels_have_their_own_numbers_and_places() -> None:
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(numbers)) == len(numbers)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= COLUMNS
        cells = {(place["x"] + dx, place["y"] + dy) for dx in range(place["w"]) for dy in range(place["h"])}
        assert not cells & taken, panel["title"]
        taken |= cells


def test_ten_seconds_are_enough() -> None:
    first = [panel["title"] for panel in PANELS if panel["gridPos"]["y"] == 0]
    assert first == ["Alerts", "Servers", "Requests", "Failed", "Slow", "Refused for load", "p99", "Waiting"]


def test_the_dashboard_is_provisioned() -> None:
    compose = read("docker-compose.yml")["services"]
    mounts = dict(volume.split(":")[:2] for volume in compose["grafana"]["volumes"])
    source = read("deploy/grafana/provisioning/datasources/prometheus.yml")["datasources"][0]
    assert mounts["./deploy/grafana/provisioning"] == "/etc/grafana/provisioning"
    provider = read("deploy/grafana/provisioning/dashboards/ddetr.yml")["providers"][0]
    assert mounts["./deploy/grafana/dashboards"] == provider["options"]["path"]
    home = compose["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/ddetr.json"
    assert source["url"] == "http://prometheus:9090"
    variable = DASHBOARD["templating"]["list"][0]
    assert (variable["type"], variable["query"], variable["current"]["value"]) == (
        "datasource",
        source["type"],
        source["uid"],
    )
