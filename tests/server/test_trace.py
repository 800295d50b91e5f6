"""Traces, as a collector on this machine gets them."""

import http.server
import importlib.util
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.app import create_app
from server.settings import Settings
from server.timing import STAGES
from server.trace import open_tracing
from tests.server.fake_engine import FakeEngine
from tests.server.pictures import RED, encode, poison, rectangle
from tests.server.test_observe import Lines

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("opentelemetry.exporter") is None, reason="needs the extra otel: make setup brings it"
)

ROOT = Path(__file__).parents[2]
PNG = {"Content-Type": "image/png"}
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


class Collector:
    """Receives OTLP over HTTP, and decodes it."""

    def __init__(self) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        self.spans: list[Any] = []
        self.resource: dict[str, Any] = {}
        self.paths: set[str] = set()
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:  # noqa: N802, the name that http.server calls
                collector.paths.add(self.path)
                request = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
                for resource in request.resource_spans:
                    collector.resource = values(resource.resource.attributes)
                    for scope in resource.scope_spans:
                        collector.spans += scope.spans
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def roots(self) -> list[Any]:
        return [span for span in self.spans if span.kind == 2]  # SPAN_KIND_SERVER

    def children(self, of: Any) -> list[Any]:
        found = [span for span in self.spans if span.parent_span_id == of.span_id]
        return sorted(found, key=lambda span: span.start_time_unix_nano)

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    collector = Collector()
    monkeypatch.setenv(ENDPOINT, collector.url)
    yield collector
    collector.close()


def values(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


def test_a_request_is_a_span_of_the_callers_trace_with_a_span_for_each_stage(
    settings: Settings, collector: Collector
) -> None:
    headers = PNG | {
        "traceparent": f"00-{TRACE}-{PARENT}-01",
        "X-Request-Id": "abc",
        "X-Priority": "batch",
        "User-Agent": "probe/1",
    }
    lines = Lines()
    logging.getLogger("ddetr.access").addHandler(lines)
    logging.getLogger("ddetr.access").setLevel(logging.INFO)
    try:
        with TestClient(create_app(settings, FakeEngine())) as client:
            response = client.post("/detect?threshold=0.4&classes=red", content=encode(rectangle(RED)), headers=headers)
    finally:
        logging.getLogger("ddetr.access").removeHandler(lines)
        logging.getLogger("ddetr.access").setLevel(logging.NOTSET)

    # The application has ended: it has sent all there was.
    assert collector.paths == {"/v1/traces"}
    assert collector.resource["service.name"] == "ddetr"
    (span,) = collector.roots()
    assert (span.name, span.trace_id.hex(), span.parent_span_id.hex()) == ("POST /detect", TRACE, PARENT)
    assert response.headers["traceresponse"] == f"00-{TRACE}-{span.span_id.hex()}-01"
    assert lines.last["trace_id"] == TRACE
    attributes = values(span.attributes)
    assert (
        attributes.items()
        >= {
            "http.request.method": "POST",
            "http.route": "/detect",
            "url.path": "/detect",
            "url.scheme": "http",
            "http.response.status_code": 200,
            "client.address": "testclient",
            "user_agent.original": "probe/1",
            "ddetr.request_id": "abc",
            "ddetr.images": 1,
            "ddetr.batch_size": 1,
            "ddetr.priority": "batch",
        }.items()
    )
    assert attributes["http.request.body.size"] > 0
    assert span.status.code == 0

    stages = collector.children(span)
    assert [stage.name for stage in stages] == list(STAGES)
    assert {stage.trace_id.hex() for stage in stages} == {TRACE}
    assert stages[0].start_time_unix_nano == span.start_time_unix_nano
    for before, after in zip(stages, stages[1:], strict=False):
        assert before.end_time_unix_nano == after.start_time_unix_nano  # end to end
    assert stages[-1].end_time_unix_nano <= span.end_time_unix_nano
    for stage in stages:
        taken_ms = (stage.end_time_unix_nano - stage.start_time_unix_nano) / 1e6
        assert taken_ms == pytest.approx(lines.last[f"{stage.name}_ms"], abs=0.002)
    assert values(stages[STAGES.index("inference")].attributes) == {"ddetr.batch_size": 1}


def test_errors_refusals_and_probes(settings: Settings, collector: Collector) -> None:
    with TestClient(create_app(settings, FakeEngine())) as client:
        client.post("/detect", content=poison(), headers=PNG)
        client.post("/detect?threshold=2", content=poison(), headers=PNG)
        client.get("/a/secret?path=secret")
        for path in ("/livez", "/readyz", "/metrics"):
            client.get(path)
    failed, refused, unknown = collector.roots()
    assert failed.status.code == 2  # STATUS_CODE_ERROR
    assert values(failed.attributes)["error.type"] == "RuntimeError"
    assert values(failed.events[0].attributes)["exception.message"] == "poison"
    assert refused.status.code == 0
    assert values(refused.attributes)["ddetr.error"] == "bad_parameter"
    assert len({span.trace_id for span in collector.roots()}) == 3
    assert unknown.name == "GET"
    assert "http.route" not in values(unknown.attributes)
    assert all("path=secret" not in str(value) for value in values(unknown.attributes).values())
    assert not any(collector.children(span) for span in collector.roots())


def test_another_protocol_than_ours_is_told(
    settings: Settings, collector: Collector, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with TestClient(create_app(settings, FakeEngine())) as client:
        client.get("/model")
    assert "traces are sent as http/protobuf, not as 'grpc'" in caplog.text
    assert len(collector.roots()) == 1


def test_the_environment_names_the_service_and_decides_on_sampling(
    settings: Settings, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "cells")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_always_off")
    with TestClient(create_app(settings, FakeEngine())) as client:
        client.get("/model")
        client.get("/model", headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
        assert client.get("/model", headers={"traceparent": f"00-{TRACE}-{PARENT}-01"}).status_code == 200
    (span,) = collector.roots()
    assert span.trace_id.hex() == TRACE
    assert collector.resource["service.name"] == "cells"


def test_a_collector_that_is_not_there_costs_no_answer(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:9")  # the port of `discard`, where nobody listens
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    with TestClient(create_app(settings, FakeEngine())) as client:
        assert client.get("/model").status_code == 200


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {ENDPOINT: ""},
        {ENDPOINT: "http://collector:4318", "OTEL_SDK_DISABLED": "true"},
        {ENDPOINT: "http://collector:4318", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_without_a_collector_there_is_no_tracing(environment: dict[str, str]) -> None:
    assert open_tracing("1", environment) is None


CODE = """
import json, sys
{block}
from server.app import create_app
from server.settings import Settings
from tests.server.fake_engine import FakeEngine
import logging; logging.basicConfig()
create_app(Settings(), FakeEngine())
print(json.dumps([name for name in sys.modules if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter"))]))
"""


def create(environment: dict[str, str], block: str = "") -> tuple[list[str], str]:
    """The modules of OpenTelemetry's SDK that a fresh process has after making an application; its log."""
    ended = subprocess.run(
        [sys.executable, "-c", CODE.format(block=block)],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return json.loads(ended.stdout), ended.stderr


def test_nothing_of_the_sdk_is_imported_unless_it_is_asked_for() -> None:
    assert create({}) == ([], "")
    assert "opentelemetry.sdk.trace" in create({ENDPOINT: "http://127.0.0.1:9"})[0]


def test_without_the_extra_the_server_says_so_and_serves() -> None:
    block = "sys.modules['opentelemetry.exporter'] = sys.modules['opentelemetry.sdk'] = None"
    _, log = create({ENDPOINT: "http://127.0.0.1:9"}, block)
    assert f"{ENDPOINT} is set, but no traces are sent: pip install 'ddetr[otel]'" in log
