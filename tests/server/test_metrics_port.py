"""/metrics on a port of its own."""

import http.client
import socket

import pytest
from pydantic import ValidationError
from starlette.testclient import TestClient

from server.app import create_app
from server.errors import StartupError
from server.settings import Settings
from tests.server.fake_engine import FakeEngine
from tests.server.live import live
from tests.server.pictures import RED, encode, rectangle


@pytest.fixture
def apart(settings: Settings) -> Settings:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return settings.model_copy(update={"metrics_port": port})


def get(port: int, path: str, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    content = response.read().decode()
    connection.close()
    return response.status, content


def refuses(port: int) -> bool:
    try:
        get(port, "/metrics")
    except ConnectionRefusedError:
        return True
    return False


def test_metrics_are_there_and_nowhere_else_and_end_with_the_server(apart: Settings) -> None:
    with live(create_app(apart, FakeEngine())) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("POST", "/detect", encode(rectangle(RED)), {"Content-Type": "image/png"})
        assert connection.getresponse().status == 200
        connection.close()
        assert get(port, "/metrics")[0] == 404
        status, text = get(apart.metrics_port, "/metrics")
        assert status == 200
        assert 'ddetr_requests_total{route="/detect",status="200"} 1.0' in text
        assert 'ddetr_requests_total{route="unmatched",status="404"} 1.0' in text
        for path in ("/", "/detect", "/model", "/livez", "/docs", "/openapi.json"):
            assert get(apart.metrics_port, path)[0] == 404
        assert 'ddetr_requests_total{route="/metrics",status="200"} 1.0' in get(apart.metrics_port, "/metrics")[1]
    assert refuses(apart.metrics_port)


def test_keys_guard_it_there_too(apart: Settings) -> None:
    keys = Settings(api_keys="one").api_keys
    with live(create_app(apart.model_copy(update={"api_keys": keys}), FakeEngine())):
        assert get(apart.metrics_port, "/metrics")[0] == 401
        assert get(apart.metrics_port, "/metrics", X_API_Key="one")[0] == 200


def test_an_error_nobody_foresaw_is_500_there_too(apart: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    app = create_app(apart, FakeEngine())
    monkeypatch.setattr(app.state.service.metrics, "exposition", lambda: 1 / 0)
    with live(app):
        status, text = get(apart.metrics_port, "/metrics")
    assert (status, '"code":"internal"' in text) == (500, True)


def test_the_documentation_does_not_promise_it(apart: Settings) -> None:
    def paths(settings: Settings) -> set[str]:
        return set(create_app(settings, FakeEngine()).openapi()["paths"])

    assert paths(apart.model_copy(update={"metrics_port": 0})) - paths(apart) == {"/metrics"}


def test_a_port_that_is_taken_stops_the_start(apart: Settings) -> None:
    with (
        socket.create_server(("127.0.0.1", apart.metrics_port)),
        pytest.raises(StartupError, match=f"metrics_port: cannot listen on 127.0.0.1:{apart.metrics_port}: .*in use"),
        TestClient(create_app(apart, FakeEngine())),
    ):
        pass


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_its_address_is_its_own(apart: Settings, host: str) -> None:
    try:
        socket.create_server((host, 0), family=socket.getaddrinfo(host, 0)[0][0]).close()
    except OSError:
        pytest.skip(f"this machine has no {host}")
    with live(create_app(apart.model_copy(update={"metrics_host": host}), FakeEngine())):
        connection = http.client.HTTPConnection(host, apart.metrics_port, timeout=30)
        connection.request("GET", "/metrics")
        assert connection.getresponse().status == 200
        connection.close()


def test_it_cannot_be_the_servers_own_port() -> None:
    with pytest.raises(ValidationError, match="metrics_port 8000 is port, too"):
        Settings(metrics_port=8000)
