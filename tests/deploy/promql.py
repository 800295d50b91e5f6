"""What a PromQL expression names, and what a real /metrics of ours offers."""

import re
from dataclasses import dataclass

from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from server.app import create_app
from server.settings import Settings
from tests.server.fake_engine import FakeEngine
from tests.server.pictures import encode, rectangle

OF_PROMETHEUS = {"up", "ALERTS"}
"""Series that Prometheus makes itself."""
OF_SCRAPING = {"job", "instance", "alertname", "alertstate"}
"""Labels that Prometheus adds."""

_STRING = re.compile(r'"(?:[^"\\]|\\.)*"')
_MATCHERS = re.compile(r"\{([^}]*)\}")
_GROUPING = re.compile(r"\b(by|on|ignoring|without|group_left|group_right)\s*\(([^)]*)\)")
_IDENTIFIER = re.compile(r"(?<![\w:.$])[a-zA-Z_:][\w:]*")
_KEYWORDS = {"and", "or", "unless", "offset", "bool"}


@dataclass(frozen=True)
class Named:
    """Metrics and labels of an expression."""

    metrics: set[str]
    labels: set[str]


def named(expression: str) -> Named:
    """What the expression names."""
    text = _STRING.sub('""', expression)
    labels = {word.strip() for _, words in _GROUPING.findall(text) for word in words.split(",") if word.strip()}
    text = _GROUPING.sub(" ", text)
    for matchers in _MATCHERS.findall(text):
        labels |= {each.group() for each in _IDENTIFIER.finditer(matchers)}
    text = re.sub(r"\[[^\]]*\]", " ", _MATCHERS.sub(" ", text))
    metrics = set()
    for found in _IDENTIFIER.finditer(text):
        is_function = text[found.end() :].lstrip().startswith("(")
        if not is_function and found.group() not in _KEYWORDS and not re.fullmatch(r"\d+[smhdwy]", found.group()):
            metrics.add(found.group())
    return Named(metrics, labels)


@dataclass(frozen=True)
class Offered:
    """What /metrics has: the names of its series, and of their labels."""

    series: set[str]
    labels: set[str]
    latency_bounds: set[str]


def offered() -> Offered:
    """From a server in this process, after a picture, a refusal and what a bundle may go through."""
    app = create_app(Settings(decode_threads=1), FakeEngine())
    with TestClient(app) as client:
        picture = {"Content-Type": "image/jpeg"}
        assert client.post("/detect", content=encode(rectangle(), "JPEG"), headers=picture).status_code == 200
        assert client.post("/detect", content=b"none", headers=picture).status_code >= 400
        app.state.service.metrics.parity_failures.labels("some engine").inc(0)
        text = client.get("/metrics").text
    series: set[str] = set()
    labels: set[str] = set()
    bounds: set[str] = set()
    for family in text_string_to_metric_families(text):
        endings = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
        series |= {family.name + ending for ending in endings}
        for sample in family.samples:
            labels |= set(sample.labels)
            if sample.name == "ddetr_request_latency_seconds_bucket":
                bounds.add(sample.labels["le"])
    return Offered(series, labels, bounds)
