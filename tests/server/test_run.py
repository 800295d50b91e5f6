"""The real server in a process of its own."""

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from bundle import Bundle
from tests.server.pictures import BOX, RED, encode, rectangle

ROOT = Path(__file__).parents[2]

SERVE = """
import sys
from server.run import serve
from server.settings import Settings
sys.exit(serve(Settings(port=0)))
"""

# The engine waits with each batch until a line comes on standard input, and says on standard output when it begins.
SERVE_HELD = """
import sys, threading
from server.run import serve
from server.settings import Settings
from tests.server.fake_engine import FakeEngine

class Held(FakeEngine):
    held = False
    def infer(self, inputs):
        if self.held:
            print("begun", flush=True)
            sys.stdin.readline()
        return super().infer(inputs)

engine = Held()
def hold():
    sys.stdin.readline()
    engine.held = True
    print("held", flush=True)

threading.Thread(target=hold).start()
sys.exit(serve(Settings(port=0, bundle="none", stall_timeout_ms=60_000), engine))
"""


# May open some files, and more when it asks for them.
SERVE_FEW = """
import resource, sys
from server.run import serve
from server.settings import Settings
from tests.server.fake_engine import FakeEngine
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 100))
sys.exit(serve(Settings(port=0, bundle="none"), FakeEngine()))
"""


class Server:
    def __init__(self, code: str, environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.log = ""
        self.port = int(self.read_log(r"running on http://127\.0\.0\.1:(\d+)")[1])

    def read_log(self, pattern: str) -> re.Match[str]:
        """Read the log up to a line that matches."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log += line
            if found := re.search(pattern, line):
                return found
        raise AssertionError(f"{pattern!r} is not in the log:\n{self.log}")

    def say(self) -> None:
        """Send a line to the process."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        """The next line that the process prints."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def get(self, path: str) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("GET", path)
        content = connection.getresponse().read()
        connection.close()
        return content

    def detect(self) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        connection.request("POST", "/detect", encode(rectangle(RED)), {"Content-Type": "image/png"})
        response = connection.getresponse()
        content = response.read()
        connection.close()
        return response.status, content

    def refuses(self) -> bool:
        """Whether a newcomer stays outside: by 503 in the moment before the socket is closed, by no answer after it."""
        try:
            return self.detect()[0] == 503
        except (ConnectionError, http.client.RemoteDisconnected):
            return True

    def end(self, signal_number: int) -> int:
        self.process.send_signal(signal_number)
        _, rest = self.process.communicate(timeout=30)
        self.log += rest
        return self.process.returncode


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    started: list[Server] = []
    yield started
    for server in started:
        if server.process.poll() is None:
            server.process.kill()
        server.process.communicate()


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_serves_a_bundle_and_ends_with_0(servers: list[Server], tiny_bundle: Bundle, signal_number: int) -> None:
    server = Server(SERVE, {"DDETR_BUNDLE": str(tiny_bundle.path), "DDETR_DEVICE": "cpu"})
    servers.append(server)
    status, content = server.detect()
    assert status == 200
    assert f'"box":[{BOX[0]}.0,{BOX[1]}.0,{BOX[2]}.0,{BOX[3]}.0]'.encode() in content
    assert server.end(signal_number) == 0, server.log
    assert "Traceback" not in server.log


def test_a_stop_under_load_loses_nothing(servers: list[Server]) -> None:
    server = Server(SERVE_HELD, {})
    servers.append(server)
    server.say()
    assert server.hear() == "held"
    waiting = 14  # behind the first one: a batch that is prepared, and three in the queue
    with ThreadPoolExecutor(1 + waiting) as pool:
        answers = [pool.submit(server.detect)]
        assert server.hear() == "begun"
        answers += [pool.submit(server.detect) for _ in range(waiting)]
        while server.get("/metrics").find(b"ddetr_queue_depth %d.0" % waiting) < 0:
            pass
        server.process.send_signal(signal.SIGTERM)
        server.read_log(f"SIGTERM: finishing {1 + waiting} images")
        server.read_log("Shutting down")
        assert server.refuses()
        assert not any(answer.done() for answer in answers)
        for _ in range(5):  # one batch after the other
            server.say()
        for answer in answers:
            status, content = answer.result(timeout=30)
            assert (status, b'"class_id":1' in content) == (200, True)
        assert [server.hear() for _ in range(4)] == ["begun"] * 4
    _, rest = server.process.communicate(timeout=30)
    assert server.process.returncode == 0, server.log + rest


def test_when_files_run_out_a_warning_says_so_and_it_serves_on_afterwards(servers: list[Server]) -> None:
    server = Server(SERVE_FEW, {})
    servers.append(server)
    with ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port))) for _ in range(100)]
        server.read_log("90 files are open and 100 may: .*ulimit -Hn")
        clients[-1].settimeout(30)
        with suppress(ConnectionResetError):
            assert clients[-1].recv(1) == b""
        clients[0].sendall(b"GET /livez HTTP/1.1\r\n\r\n")
        assert clients[0].recv(1000).startswith(b"HTTP/1.1 200 ")
    status = 0
    until_s = time.monotonic() + 30
    while not status and time.monotonic() < until_s:  # it has to see first that they have closed
        with suppress(ConnectionError):
            status = server.detect()[0]
    assert status == 200
    assert server.end(signal.SIGTERM) == 0
    assert server.log.count("files are open") == 1


def test_every_line_of_its_log_is_json_to_the_last(servers: list[Server], tiny_bundle: Bundle) -> None:
    server = Server(SERVE, {"DDETR_BUNDLE": str(tiny_bundle.path), "DDETR_DEVICE": "cpu"})
    servers.append(server)
    for _ in range(20):
        assert server.detect()[0] == 200
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"no HTTP\nat all\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 400")
    assert server.end(signal.SIGTERM) == 0
    lines = [json.loads(line) for line in server.log.splitlines()]
    answered = [line for line in lines if line["message"] == "POST /detect 200"]
    assert len(answered) == len({line["request_id"] for line in answered}) == 20
    assert all(line["inference_ms"] > 0 and line["client"] == "127.0.0.1" for line in answered)
    assert {line["logger"].partition(".")[0] for line in lines} == {"ddetr", "uvicorn"}
    assert lines[-1]["message"].startswith("Finished server process")


def test_what_keeps_it_from_starting_is_one_line(tmp_path: Path) -> None:
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "DDETR_BUNDLE": str(tmp_path / "absent")}
    ended = subprocess.run(
        [sys.executable, "-c", SERVE],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 1
    assert len(ended.stderr.splitlines()) == 1
    assert "no bundle at" in ended.stderr
    assert "absent" in ended.stderr


def test_serving_needs_neither_torch_nor_what_trains_and_exports(tiny_bundle: Bundle) -> None:
    code = """
import sys
for name in ("torch", "onnx", "onnxscript", "scipy", "safetensors", "export", "models", "training", "transformers"):
    sys.modules[name] = None  # makes importing it an ImportError

import server, server.run, server.detect
from pathlib import Path
from server.app import create_app
from server.settings import Settings
from server.options import DetectOptions
from tests.server.pictures import RED, encode, rectangle

settings = Settings(bundle=Path(sys.argv[1]), device="cpu")
engine = server.detect.open_engine(settings)
answer = server.detect.detect_picture(engine, encode(rectangle(RED)), DetectOptions(), 10**6)
assert answer.detections, answer
create_app(settings)
"""
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tiny_bundle.path)],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
