"""A request's line in the log, and the headers of every answer."""

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.app import create_app
from server.errors import EngineFailed
from server.logs import JsonForm
from server.metrics import Metrics
from server.observe import Observe
from server.settings import Settings
from tests.server.fake_engine import FakeEngine
from tests.server.pictures import RED, encode, poison, rectangle

PNG = {"Content-Type": "image/png"}
STAGES = {"admit_ms", "decode_ms", "preprocess_ms", "queue_ms", "inference_ms", "postprocess_ms"}


class Lines(logging.Handler):
    """The lines of requests as a reader of the log gets them."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JsonForm())
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(self.format(record))

    @property
    def last(self) -> dict[str, Any]:
        content = json.loads(self.texts[-1])
        assert isinstance(content, dict)
        return content


@pytest.fixture
def lines() -> Iterator[Lines]:
    lines, logger = Lines(), logging.getLogger("ddetr.access")
    logger.addHandler(lines)
    logger.setLevel(logging.DEBUG)
    yield lines
    logger.removeHandler(lines)
    logger.setLevel(logging.NOTSET)


def test_a_request_with_boxes_has_a_line_with_all_there_is_to_know(client: TestClient, lines: Lines) -> None:
    files = [("images", (name, encode(rectangle(RED)))) for name in "ab"]
    response = client.post("/detect?threshold=0.1", files=files, headers={"X-Request-Id": "abc"})
    line = lines.last
    assert line.keys() >= STAGES
    assert {name: line[name] for name in ("level", "message", "request_id", "route", "method", "status", "client")} == {
        "level": "info",
        "message": "POST /detect 200",
        "request_id": "abc",
        "route": "/detect",
        "method": "POST",
        "status": 200,
        "client": "testclient",
    }
    assert line["images"] == 2
    assert line["batch_size"] in (1, 2)
    assert line["priority"] == "interactive"
    assert line["bytes_in"] == int(response.request.headers["content-length"])
    assert line["bytes_out"] == len(response.content)
    assert sum(line[stage] for stage in STAGES) <= line["total_ms"]
    assert not {"error", "path", "trace_id"} & line.keys()
    assert len(lines.texts) == 1


@pytest.mark.parametrize(
    ("path", "level", "status", "code"),
    [
        ("/detect?threshold=2", "warning", 400, "bad_parameter"),
        ("/detect", "warning", 422, "image_unreadable"),
        ("/nowhere", "warning", 404, "not_found"),
        ("/model", "warning", 405, "method_not_allowed"),
    ],
)
def test_what_is_refused_is_a_warning_with_its_code(
    client: TestClient, lines: Lines, path: str, level: str, status: int, code: str
) -> None:
    client.post(path, content=b"nonsense", headers=PNG)
    assert (lines.last["level"], lines.last["status"], lines.last["error"]) == (level, status, code)


def test_probes_are_for_debugging_unless_they_fail(settings: Settings, lines: Lines) -> None:
    app = create_app(settings, FakeEngine())
    TestClient(app).get("/readyz")  # before the start
    assert lines.last["level"] == "warning"
    with TestClient(app) as client:
        for path in ("/livez", "/readyz", "/metrics"):
            client.get(path)
            assert (lines.last["level"], lines.last["route"]) == ("debug", path)
        client.get("/model")
        assert lines.last["level"] == "info"


def test_an_error_nobody_foresaw_has_its_traceback_in_the_requests_line(
    client: TestClient, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.routes.json_body", lambda *_: 1 / 0)
    response = client.post("/detect", content=encode(rectangle(RED)), headers=PNG | {"X-Request-Id": 'a"b'})
    assert response.json()["request_id"] == 'a"b'
    assert (lines.last["request_id"], lines.last["level"], lines.last["error"]) == ('a"b', "error", "internal")
    assert "ZeroDivisionError" in lines.last["traceback"]
    assert "ZeroDivisionError" not in response.text


def test_of_headers_given_twice_the_first_counts(client: TestClient) -> None:
    twice = [("X-Request-Id", "first"), ("X-Request-Id", "second")]
    assert client.get("/model", headers=httpx2.Headers(twice)).headers["x-request-id"] == "first"


def test_detection_passes_no_layer_of_the_framework(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    def passed(*_: object) -> None:
        raise AssertionError("passed")

    for layer in (ServerErrorMiddleware, ExceptionMiddleware):
        monkeypatch.setattr(layer, "__call__", passed)
    assert client.post("/detect", content=encode(rectangle(RED)), headers=PNG).status_code == 200
    assert client.get("/model").status_code == 500


def test_layers_may_be_added_and_built_again(app: FastAPI) -> None:
    class Mark:
        """Adds a header to what all other layers answer."""

        def __init__(self, app: ASGIApp) -> None:
            self._app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            async def marked(message: Message) -> None:
                if message["type"] == "http.response.start":
                    message["headers"].append((b"x-mark", b"1"))
                await send(message)

            await self._app(scope, receive, marked)

    app.add_middleware(Mark)
    for _ in range(2):
        app.middleware_stack = None
        response = TestClient(app).get("/model")
        assert response.headers["x-mark"] == "1"
        assert response.headers["x-request-id"]


def test_who_leaves_elsewhere_is_gone_too(settings: Settings, lines: Lines) -> None:
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def leave() -> Message:
        return {"type": "http.disconnect"}

    app = create_app(settings.model_copy(update={"admin_keys": Settings(admin_keys="a").admin_keys}), FakeEngine())
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/admin/bundle",
        "headers": [(b"authorization", b"Bearer a"), (b"content-type", b"application/json")],
        "query_string": b"",
        "client": None,
    }
    asyncio.run(app(scope, leave, send))
    assert not sent
    assert (lines.last["status"], lines.last["bytes_out"]) == (499, 0)


def test_many_answers_are_counted_before_anybody_asks(settings: Settings) -> None:
    app = create_app(settings, FakeEngine())
    with TestClient(app) as client:
        for _ in range(70):
            assert client.post("/detect", content=encode(rectangle(RED)), headers=PNG).status_code == 200
        answered = app.state.service.metrics.images.labels("ok")
        assert answered._value.get() == 64
        assert 'ddetr_images_total{outcome="ok"} 70.0' in client.get("/metrics").text


def test_so_it_is_beyond_detection(client: TestClient, lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.routes.gate_content", lambda *_: 1 / 0)
    for method in ("GET", "HEAD"):
        response = client.request(method, "/model", headers={"X-Request-Id": "a"})
        assert (response.status_code, response.headers["x-request-id"]) == (500, "a")
        assert response.headers["x-content-type-options"] == "nosniff"
        assert (lines.last["status"], lines.last["level"], lines.last["error"]) == (500, "error", "internal")
        assert "ZeroDivisionError" in lines.last["traceback"]
        if method == "GET":
            assert response.json() == {
                "error": {"code": "internal", "message": response.json()["error"]["message"]},
                "request_id": "a",
            }
        else:
            assert response.content == b""
    assert 'ddetr_requests_total{route="/model",status="500"} 2.0' in client.get("/metrics").text


@pytest.mark.parametrize("whole", [True, False])
def test_an_error_after_the_answer_began_ends_the_connection_unless_it_is_whole(lines: Lines, whole: bool) -> None:
    async def fail_late(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x", "more_body": not whole})
        raise ZeroDivisionError

    observe = Observe(fail_late, Metrics(), iter(range(100)).__next__, ["/model"])
    scope = {"type": "http", "method": "GET", "path": "/model", "headers": [], "client": None}
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        raise NotImplementedError

    with nullcontext() if whole else pytest.raises(ZeroDivisionError):
        asyncio.run(observe(scope, receive, send))
    assert len(sent) == 2
    assert (lines.last["status"], lines.last["level"]) == (200, "error")
    assert "ZeroDivisionError" in lines.last["traceback"]


def test_an_answer_that_could_not_be_sent_is_not_taken_for_whole(lines: Lines) -> None:
    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x"})

    async def fail(message: Message) -> None:
        if message["type"] == "http.response.body":
            raise RuntimeError("shorter than its length")

    async def receive() -> Message:
        raise NotImplementedError

    scope = {"type": "http", "method": "GET", "path": "/model", "headers": [], "client": None}
    with pytest.raises(RuntimeError):
        asyncio.run(Observe(answer, Metrics(), iter(range(100)).__next__, ["/model"])(scope, receive, fail))
    assert lines.last["level"] == "error"


def test_an_engine_that_fails_has_its_traceback_in_the_requests_line(client: TestClient, lines: Lines) -> None:
    response = client.post("/detect", content=poison(), headers=PNG)
    assert (response.status_code, response.json()["error"]["code"]) == (500, EngineFailed.code)
    assert lines.last["request_id"] == response.json()["request_id"]
    assert "poison" in lines.last["traceback"]


def test_an_engine_that_fails_on_one_image_of_several_is_an_error_too(client: TestClient, lines: Lines) -> None:
    files = [("images", ("a", encode(rectangle(RED)))), ("images", ("b", poison()))]
    assert client.post("/detect", files=files).status_code == 200
    assert (lines.last["level"], lines.last["images"], lines.last["images_failed"]) == ("error", 2, 1)
    assert "poison" in lines.last["traceback"]


def test_nothing_from_outside_forges_a_line_or_tells_a_secret(client: TestClient, lines: Lines) -> None:
    picture = encode(rectangle(RED))
    forged = "/x%0A%7B%22level%22:%22critical%22%7D%0D%E2%80%A8" + "y" * 1000
    client.get(f"{forged}?api_key=hidden", headers={"User-Agent": "a\tb", "X-API-Key": "hidden", "Cookie": "hidden"})
    client.post(
        "/detect?api_key=hidden", content=picture, headers=PNG | {"X-Priority": "hidden\t", "X-Timeout-Ms": "hidden"}
    )
    client.post("/detect", content=b"hidden picture", headers=PNG)
    assert len(lines.texts) == 3
    for text in lines.texts:
        assert "hidden" not in text
        assert text.isascii()
        assert len(text.splitlines()) == 1
    first = json.loads(lines.texts[0])
    assert (first["level"], first["route"], len(first["path"])) == ("warning", "unmatched", 200)
    assert first["path"].startswith('/x\n{"level":"critical"}\r\u2028')


def test_the_callers_trace_is_named_even_where_no_traces_are_sent(client: TestClient, lines: Lines) -> None:
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    for given, found in ((f"00-{trace}-00f067aa0ba902b7-01", trace), ("00-nonsense", None)):
        assert "traceresponse" not in client.get("/model", headers={"traceparent": given}).headers
        assert lines.last.get("trace_id") == found


def test_who_leaves_is_logged_as_gone(lines: Lines) -> None:
    async def leave(scope: Scope, receive: Receive, send: Send) -> None:
        raise asyncio.CancelledError

    metrics = Metrics()
    observe = Observe(leave, metrics, iter(range(100)).__next__, ["/detect"])
    scope = {"type": "http", "method": "POST", "path": "/detect", "headers": [], "client": None}

    async def nothing(*_: object) -> Message:
        raise NotImplementedError

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(observe(scope, nothing, nothing))
    assert (lines.last["status"], lines.last["level"], lines.last["client"]) == (499, "info", None)
    assert b'ddetr_requests_total{route="/detect",status="499"} 1.0' in metrics.exposition()
    assert b"ddetr_requests_in_flight 0.0" in metrics.exposition()


def test_requests_in_flight_and_their_bytes_are_told(settings: Settings) -> None:
    async def body() -> None:
        app = create_app(settings, FakeEngine())
        picture, rest_may_come = encode(rectangle(RED)), asyncio.Event()

        async def in_two_pieces() -> AsyncIterator[bytes]:
            yield picture[:100]
            await rest_may_come.wait()
            yield picture[100:]

        async with (
            app.router.lifespan_context(app),
            httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test") as client,
        ):
            task = asyncio.create_task(client.post("/detect", content=in_two_pieces(), headers=PNG))
            text = ""
            while "ddetr_held_bytes 100.0" not in text:
                await asyncio.sleep(0.001)  # answering a scrape suspends nowhere
                text = (await client.get("/metrics")).text
            assert "ddetr_requests_in_flight 1.0" in text
            rest_may_come.set()
            assert (await task).status_code == 200
            text = (await client.get("/metrics")).text
            assert "ddetr_requests_in_flight 0.0" in text
            assert "ddetr_held_bytes 0.0" in text

    asyncio.run(asyncio.wait_for(body(), 30))


def test_metrics_tell_of_the_process_and_the_software(client: TestClient) -> None:
    text = client.get("/metrics").text
    for name in ("process_resident_memory_bytes", "process_cpu_seconds_total", "process_open_fds"):
        assert re.search(rf"^{name} [1-9]", text, re.MULTILINE)
    assert re.search(r'^ddetr_build_info\{python="3\.\d+\.\d+\w*",version="[^"]+"\} 1\.0$', text, re.MULTILINE)


# --- headers ----------------------------------------------------------------------------------------------------------

EVERYWHERE = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
ON_PAGES = {"cross-origin-opener-policy": "same-origin", "x-frame-options": "DENY"}


def ask(client: TestClient, method: str, path: str) -> httpx2.Response:
    content = encode(rectangle(RED)) if method == "POST" else None
    response: httpx2.Response = client.request(method, path, content=content, headers=PNG)
    return response


@pytest.fixture
def failing(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.routes.coco_body", lambda *_: 1 / 0)


@pytest.mark.usefixtures("failing")
@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "/detect", 200),
        ("POST", "/detect?format=image", 200),
        ("POST", "/detect?threshold=2", 400),
        ("POST", "/detect?format=coco", 500),
        ("GET", "/model", 200),
        ("GET", "/metrics", 200),
        ("GET", "/livez", 200),
        ("GET", "/openapi.json", 200),
        ("GET", "/nowhere", 404),
        ("PUT", "/detect", 405),
    ],
)
def test_answers_are_for_those_who_asked_and_for_nothing_else(
    client: TestClient, method: str, path: str, status: int
) -> None:
    response = ask(client, method, path)
    assert response.status_code == status
    headers = response.headers
    assert EVERYWHERE.items() <= headers.items()
    assert headers["cache-control"] == "no-store"
    assert headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
    assert response.headers["x-request-id"]
    assert "server" not in headers


@pytest.mark.parametrize("path", ["/", "/docs"])
def test_pages_run_their_own_scripts_and_stand_in_no_frame(client: TestClient, path: str) -> None:
    headers = client.get(path).headers
    assert (EVERYWHERE | ON_PAGES).items() <= headers.items()
    assert "camera=()" in headers["permissions-policy"]
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert "unsafe-inline" not in policy["script-src"]
    assert "unsafe-eval" not in policy["script-src"]
    assert "http" not in headers["content-security-policy"]
    assert headers["cache-control"] == "no-cache"


def test_files_of_the_pages_may_be_kept(client: TestClient) -> None:
    for path in ("/sample.jpg", "/static-offline-docs/swagger-ui.css"):
        headers = client.get(path).headers
        assert EVERYWHERE.items() <= headers.items()
        assert headers.get("cache-control") != "no-store"


def test_no_other_site_gets_to_read(client: TestClient) -> None:
    origin = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
    for response in (client.get("/model", headers=origin), client.options("/detect", headers=origin)):
        assert not [name for name in response.headers if name.startswith("access-control-")]


def test_no_header_is_sent_twice(client: TestClient, tmp_path: Path) -> None:
    for path in ("/", "/docs", "/model", "/sample.jpg", "/nowhere"):
        names = [name.lower() for name, _ in client.get(path).headers.multi_items()]
        assert len(names) == len(set(names)), path
