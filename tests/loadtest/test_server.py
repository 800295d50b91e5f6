"""What a server says of itself, from stand-ins that answer what they are told."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from loadtest.client import Target
from loadtest.errors import ServerNotReady
from loadtest.host import cpu_seconds, is_this_host
from loadtest.server import inspect

MODEL = {
    "model": {"name": "bright", "version": "7"},
    "variant": "fake",
    "precision": "fp32",
    "engine": "fake",
    "categories": {},
}


@contextmanager
def standing_in(answers: dict[str, tuple[int, Any]], api_key: str = "") -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802  # the name it is called by
            status, content = answers[self.path]
            if api_key and self.headers["Authorization"] != f"Bearer {api_key}" and self.path == "/model":
                status = 401
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content if isinstance(content, bytes) else json.dumps(content).encode())

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002  # the name it is called by
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{httpd.server_port}"
        finally:
            httpd.shutdown()
            thread.join()


READY = {"/readyz": (200, {"status": "ok"}), "/model": (200, MODEL)}


def test_a_server_describes_itself() -> None:
    with standing_in(READY) as url:
        found = inspect(Target(url))
        assert (found.model, found.variant, found.engine) == ("bright 7", "fake", "fake")
        assert found.on_this_host
        assert not found.started_here
        assert inspect(Target(url), {"max_batch_size": "4"}).started_here


def test_a_key_is_asked_for_and_used() -> None:
    with standing_in(READY, api_key="k") as url:
        assert inspect(Target(url, "k")).model == "bright 7"
        with pytest.raises(ServerNotReady, match="wants an API key, none was given: --api-key-file"):
            inspect(Target(url))
        with pytest.raises(ServerNotReady, match="wants an API key, another"):
            inspect(Target(url, "wrong"))


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ({"/readyz": (503, {"status": "draining"})}, "not ready: 503 .*draining"),
        ({"/readyz": (404, b"not found")}, "not ready: 404 not found"),
        ({"/readyz": (200, b"<html>")}, "not the answer of a ddetr server"),
        (READY | {"/model": (200, {"model": "other"})}, "is not that of a ddetr server"),
        (READY | {"/model": (200, [])}, "is not that of a ddetr server"),
    ],
)
def test_what_cannot_be_tested_says_so_in_a_line(answers: dict[str, tuple[int, Any]], said: str) -> None:
    with standing_in(answers) as url, pytest.raises(ServerNotReady, match=said) as refused:
        inspect(Target(url))
    assert url in str(refused.value)


def test_nobody_there() -> None:
    with standing_in(READY) as url:
        pass
    with pytest.raises(ServerNotReady, match="no answer: .*refused"):
        inspect(Target(url))


def test_which_host_is_this_one() -> None:
    assert is_this_host("http://127.0.0.1:8000")
    assert is_this_host("http://localhost")
    assert not is_this_host("http://192.0.2.1:8000")  # of a range that nobody has
    assert not is_this_host("http://name.invalid")


def test_cpu_time_of_a_process() -> None:
    assert cpu_seconds(None) is None
    assert cpu_seconds(2**22 + 1) is None  # above the largest process id there is
    own = cpu_seconds(1)
    assert own is None or own >= 0
