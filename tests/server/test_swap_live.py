"""Twenty swaps between two real bundles, over real sockets, under load."""

import gc
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest

from parity.proof import proof_bytes
from server.app import create_app
from server.engine import RawDetections
from server.malloc import give_back
from server.onnxruntime_engine import OnnxRuntimeEngine
from server.settings import Settings
from tests.server.live import live
from tests.server.pictures import RED, encode, rectangle
from tests.server.proofs import proof_by
from tests.server.test_run import ROOT, Server
from tests.server.tiny_bundle import write_tiny_bundle

SWAPS = 20
CLIENTS = 4
LABELS = {"a": 1, "b": 2, "c": 1}
NAMES = {"a": "red", "b": "green", "c": "red"}
MOST_GROWTH_MB = 25.0  # measured below 6; a session that stays costs 2, and its two threads' heaps more


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three good bundles with proofs, and three bad ones."""
    folder = tmp_path_factory.mktemp("live")
    proofs = {}
    for version, label in LABELS.items():
        engine = OnnxRuntimeEngine(
            write_tiny_bundle(folder / version, version, label), Settings(bundle=folder / version, device="cpu")
        )
        proofs[version] = proof_bytes(proof_by(engine))
        engine.close()
        write_tiny_bundle(folder / version, version, label, proof=proofs[version])
    write_tiny_bundle(folder / "wrong", "wrong", LABELS["b"], proof=proofs["a"])
    write_tiny_bundle(folder / "spoilt", "spoilt", proof=proofs["a"])
    (folder / "spoilt" / "model.onnx").write_bytes(b"x")
    (folder / "empty").mkdir()
    return folder


class Client(threading.Thread):
    """Asks and asks, over one connection, and notes what is not right."""

    def __init__(self, port: int, stop: threading.Event) -> None:
        super().__init__()
        self.answers: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._port = port
        self._stopping = stop

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        picture = encode(rectangle(RED))
        while not self._stopping.is_set():
            try:
                connection.request("POST", "/detect", picture, {"Content-Type": "image/png"})
                response = connection.getresponse()
                body = response.read()
                content = json.loads(body)
                version = content["model"]["version"]
                labels = [found["label"] for image in content["images"] for found in image["detections"]]
            except Exception as error:
                self.wrong.append(repr(error))
                return
            if response.status != 200 or labels != [NAMES.get(version)]:
                self.wrong.append(body.decode()[:300])
            self.answers[version] += 1
        connection.close()


def post(port: int, path: Path) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Content-Type": "application/json", "X-API-Key": "secret"}
    connection.request("POST", "/admin/bundle?wait=true", json.dumps({"path": str(path)}), headers)
    response = connection.getresponse()
    content = response.read().decode()
    connection.close()
    return response.status, content


@contextmanager
def clients(port: int) -> Iterator[Counter[str]]:
    """Clients that ask all the while; their answers by version. At the end each must have been right."""
    stop = threading.Event()
    asking = [Client(port, stop) for _ in range(CLIENTS)]
    answers: Counter[str] = Counter()
    for client in asking:
        client.start()
    try:
        yield answers
    finally:
        stop.set()
        for client in asking:
            client.join(60)
            answers += client.answers
    assert [client.wrong for client in asking] == [[]] * CLIENTS


def settings_for(bundle: Path, **others: Any) -> Settings:
    """Of a server that may swap, on a machine whose other programs may stop it for a while."""
    return Settings(
        bundle=bundle,
        device="cpu",
        engine_threads=1,
        admin_keys="secret",  # type: ignore[arg-type]
        stall_timeout_ms=60_000,
        **others,
    )


def at_rest() -> tuple[int, int, float]:
    """Sessions of ONNX Runtime, threads, and resident memory in MB."""
    gc.collect()
    give_back()
    sessions = sum(issubclass(type(each), ort.InferenceSession) for each in gc.get_objects())
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return sessions, threading.active_count(), pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def test_twenty_swaps_under_load_lose_nothing(folder: Path) -> None:
    app = create_app(settings_for(folder / "a", rollback_seconds=0))
    with live(app) as port, clients(port) as answers:
        for path in ("b", "a"):  # the warm-up of the swaps themselves
            assert post(port, folder / path)[0] == 200
        before = at_rest()
        for number in range(SWAPS):
            status, content = post(port, folder / "ba"[number % 2])
            assert status == 200, content
            if number % 5 == 4:
                for bad, why in (
                    ("wrong", "canvas"),
                    ("spoilt", "SHA-256"),
                    ("empty", "does not exist"),
                    ("absent", "no such folder"),
                ):
                    status, content = post(port, folder / bad)
                    assert status == 422
                    assert why in content
        after = at_rest()
    assert set(answers) == {"a", "b"}
    assert after[0] == before[0], "an engine of a bundle that is gone stays in memory"
    assert after[1] <= before[1] + 2, "threads stay"
    assert after[2] < before[2] + MOST_GROWTH_MB


def test_swaps_that_live_pictures_are_shown_in_lose_nothing_either(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To a bundle that agrees, to one that does not, and to one that does until it is in service."""
    app = create_app(settings_for(folder / "a", shadow_percent=100, shadow_seconds=1, rollback_seconds=2))
    finish = OnnxRuntimeEngine.finish

    def finish_elsewhere(engine: OnnxRuntimeEngine, outputs: Sequence[Any]) -> RawDetections:
        raw = finish(engine, outputs)
        if engine.manifest.model.version == app.state.service.served.manifest.model.version == "c":
            return RawDetections(1 - raw.boxes[..., [2, 3, 0, 1]], raw.scores, raw.labels)
        return raw

    monkeypatch.setattr(OnnxRuntimeEngine, "finish", finish_elsewhere)
    with live(app) as port, clients(port) as answers:
        status, content = post(port, folder / "a")
        swap = json.loads(content)
        assert (status, swap["state"]) == (200, "promoted")
        for seen in (swap["shadow"], swap["shadow_after"]):
            assert seen["compared"] > 0
            assert (seen["agreement"], seen["failed"]) == (1.0, 0)
        before = at_rest()
        status, content = post(port, folder / "b")
        assert (status, "its answers agree with those in service to 0.000" in content) == (422, True), content
        status, content = post(port, folder / "c")
        assert (status, "after the switch its answers agree with the old bundle's to 0.0" in content) == (422, True)
        after = at_rest()
    assert set(answers) == {"a", "c"}
    assert after[0] == before[0], "an engine of a bundle that is gone stays in memory"
    assert after[1] <= before[1] + 2, "threads stay"


def test_the_gate_of_a_start_reaches_the_model_page(folder: Path) -> None:
    app = create_app(Settings(bundle=folder / "a", device="cpu"))
    with live(app) as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/model")
        (gate,) = json.loads(connection.getresponse().read())["gate"]
        connection.close()
    assert gate["result"] == "passed"
    assert gate["compared"] >= 3


SERVE = """
import sys
from server.run import serve
from server.settings import Settings
sys.exit(serve(Settings(port=0, rollback_seconds=0, gate_seconds=0)))
"""


@pytest.fixture
def current(tmp_path: Path, folder: Path) -> Path:
    """A link to the first bundle."""
    link = tmp_path / "current"
    link.symlink_to(folder / "a")
    return link


def test_sighup_looks_where_the_link_leads_now(current: Path, folder: Path) -> None:
    server = Server(SERVE, {"DDETR_BUNDLE": str(current), "DDETR_DEVICE": "cpu", "DDETR_LOG_FORMAT": "text"})
    assert json.loads(server.get("/model"))["model"]["version"] == "a"
    for _ in range(100):
        server.process.send_signal(signal.SIGHUP)
    server.read_log("is in service already")
    current.unlink()
    current.symlink_to(folder / "b")
    server.process.send_signal(signal.SIGHUP)
    server.read_log("swap 1: promoted")
    assert json.loads(server.get("/model"))["model"]["version"] == "b"
    current.unlink()
    server.process.send_signal(signal.SIGHUP)
    server.read_log("swap 2: rejected: no bundle at")
    assert json.loads(server.get("/model"))["model"]["version"] == "b"
    assert server.end(signal.SIGTERM) == 0


def test_a_terminal_that_is_closed_stops_the_server(current: Path) -> None:
    """Otherwise it would go on with nobody there to stop it."""
    terminal, its_end = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "DDETR_BUNDLE": str(current), "DDETR_DEVICE": "cpu"},
        stdin=its_end,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(its_end)
    assert process.stderr is not None
    with process.stderr as log:
        assert any("running on" in line for line in log)
        process.send_signal(signal.SIGHUP)  # from elsewhere: the terminal is still there
        assert any("is in service already" in line for line in log)
        os.close(terminal)
        process.send_signal(signal.SIGHUP)  # it is not the terminal's own process here, so it must be told
        assert process.wait(60) == 0


# Opening hangs, in a thread that is inside of an engine.
SERVE_HANGING = """
import sys, threading
import server.app
from server.run import serve
from server.settings import Settings
from tests.server.fake_engine import FakeEngine

def open_bundle(*_):
    print("opening", flush=True)
    threading.Event().wait()

server.app.open_bundle = open_bundle
sys.exit(serve(Settings(port=0, bundle="none", admin_keys="secret"), FakeEngine()))
"""


def test_a_stop_in_the_middle_of_an_opening_that_hangs_ends_with_0() -> None:
    server = Server(SERVE_HANGING, {})
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", "/admin/bundle", json.dumps({"path": "/bundles/8"}), {"X-API-Key": "secret"})
    assert connection.getresponse().status == 202
    connection.close()
    assert server.hear() == "opening"
    assert server.end(signal.SIGTERM) == 0
    assert "not waited for: bundle" in server.log


def test_a_stop_while_a_new_bundles_engine_runs_is_no_crash(folder: Path) -> None:
    server = Server(SERVE, {"DDETR_BUNDLE": str(folder / "a"), "DDETR_DEVICE": "cpu", "DDETR_ADMIN_KEYS": "secret"})
    for path in ("b", "a") * 3:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        body, headers = json.dumps({"path": str(folder / path)}), {"X-API-Key": "secret"}
        connection.request("POST", "/admin/bundle", body, headers)
        connection.getresponse().read()
        connection.close()
    assert server.end(signal.SIGTERM) == 0
