"""Engines that fail and clients that leave, over a real socket."""

import asyncio
import http.client
import json
import resource
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from bundle import Bundle, Canvas
from server import decoders
from server.app import create_app
from server.engine import Engine, OpenEngine
from server.headers import Header
from server.preprocess import Pixels
from server.service import Service
from server.settings import Settings
from tests.server.fake_engine import LETHAL, TAR, FakeEngine, FakeEngines
from tests.server.live import live
from tests.server.pictures import BOX, HEIGHT, RED, WIDTH, encode, poison, rectangle

WIDE, TALL = Canvas(height=64, width=96), Canvas(height=96, width=64)
STORM = 500
LONGEST_S = 30.0
NOISE_S = 1.0  # of a slow machine's clock


@dataclass(frozen=True)
class Answer:
    status: int
    headers: dict[str, str]
    content: dict[str, object]

    @property
    def box(self) -> object:
        return self.content["images"][0]["detections"][0]["box"]  # type: ignore[index]


class Site:
    """A server and its clients."""

    def __init__(self, service: Service, port: int, engines: FakeEngines, pool: ThreadPoolExecutor) -> None:
        self.service = service
        self.port = port
        self.engines = engines
        self._pool = pool

    @property
    def engine(self) -> FakeEngine:
        """The first one."""
        return self.engines.opened[0]

    def ask(self, method: str, path: str, body: bytes = b"", **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LONGEST_S)
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        is_json = response.headers["Content-Type"] == "application/json"
        return Answer(response.status, dict(response.headers), json.loads(content) if is_json else {"text": content})

    def post(self, picture: bytes, **headers: str) -> "Future[Answer]":
        """What /detect says, once it says it."""
        return self._pool.submit(self.ask, "POST", "/detect", picture, **{"Content-Type": "image/png"}, **headers)

    def health(self) -> tuple[int, int]:
        """Status of /livez and /readyz."""
        return self.ask("GET", "/livez").status, self.ask("GET", "/readyz").status

    def hold(self) -> "Future[Answer]":
        """Keep the engine busy with one request until its gate is opened."""
        self.engine.gate.clear()
        answer = self.post(encode(rectangle(RED)))
        self.until(lambda: self.service.batcher._busy and self.service.batcher.waiting == 0)
        return answer

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for the server to come that far."""
        deadline_s = time.monotonic() + LONGEST_S
        while not condition():
            assert time.monotonic() < deadline_s
            threading.Event().wait(0.005)

    def metric(self, line: str) -> bool:
        return line.encode() in self.ask("GET", "/metrics").content["text"]  # type: ignore[operator]


@contextmanager
def site(settings: Settings, *, reopen: bool = True, **changes: object) -> Iterator[Site]:
    engines = FakeEngines()
    source: Engine | OpenEngine = engines if reopen else engines()
    app = create_app(settings.model_copy(update=changes), source)
    with ThreadPoolExecutor(32) as pool, live(app) as port:
        try:
            yield Site(app.state.service, port, engines, pool)
        finally:
            engines.release()


def grey(level: int) -> bytes:
    """A picture that begins with a pixel of this grey level."""
    picture = rectangle(RED)
    picture.putpixel((0, 0), (level, level, level))
    return encode(picture)


def test_one_bad_image_costs_its_own_request_500_with_its_id_and_no_other(settings: Settings) -> None:
    with site(settings, max_batch_size=8) as server:
        first = server.hold()
        boxes = [(4 * n, 8, 40 + 4 * n, 40) for n in range(7)]
        good = [server.post(encode(rectangle(RED, box))) for box in boxes]
        bad = server.post(poison(), **{"X-Request-Id": "the-bad-one"})
        server.until(lambda: server.service.batcher.waiting == 8)
        server.engine.gate.set()
        for box, answer in zip(boxes, good, strict=True):
            assert answer.result().status == 200
            assert answer.result().box == pytest.approx(box, abs=0.01)
        refused = bad.result()
        assert refused.status == 500
        assert refused.headers["x-request-id"] == "the-bad-one"
        assert refused.content["request_id"] == "the-bad-one"
        assert refused.content["error"]["code"] == "engine_failed"  # type: ignore[index]
        assert first.result().status == 200
        assert (8, WIDE) in server.engine.batches
        assert server.metric('ddetr_engine_restarts_total{reason="died"} 0.0')
        assert server.health() == (200, 200)


@pytest.mark.parametrize("trouble", ["raise", "nan", "shape", "exit"])
def test_an_engine_that_dies_is_replaced_and_nobody_notices(settings: Settings, trouble: str) -> None:
    with site(settings) as server:
        first = server.hold()
        others = [server.post(encode(rectangle(RED))) for _ in range(9)]
        server.until(lambda: server.service.batcher.waiting == 9)
        server.engines.gate.clear()
        server.engine.trouble = trouble
        server.engine.gate.set()
        server.until(lambda: not server.service.batcher.works)
        ready = server.ask("GET", "/readyz")
        assert (ready.status, ready.content) == (503, {"status": "restarting the engine"})
        server.engines.gate.set()
        for answer in (first, *others):
            assert answer.result().status == 200
            assert answer.result().box == list(BOX)
        assert server.health() == (200, 200)
        assert server.metric('ddetr_engine_restarts_total{reason="died"} 1.0')


def test_an_engine_that_hangs_is_replaced_and_health_tells(settings: Settings) -> None:
    with site(settings, stall_timeout_ms=500) as server:
        server.engines.gate.clear()
        first = server.hold()
        others = [server.post(encode(rectangle(RED))) for _ in range(9)]
        server.until(lambda: server.service.batcher.waiting == 9)
        server.until(lambda: server.health() == (503, 503))
        assert server.ask("GET", "/livez").content == {"status": "no progress in inference"}
        server.engines.gate.set()
        for answer in (first, *others):
            assert answer.result().status == 200
            assert answer.result().box == list(BOX)
        assert server.health() == (200, 200)
        assert not server.engine.gate.is_set()  # the first one hangs to this moment
        assert server.metric('ddetr_engine_restarts_total{reason="hung"} 1.0')


@pytest.mark.parametrize("trouble", ["raise", None])
def test_an_engine_that_is_lost_while_the_server_stops_costs_no_answer(settings: Settings, trouble: str | None) -> None:
    with site(settings, stall_timeout_ms=500) as server:
        first = server.hold()
        others = [server.post(encode(rectangle(RED))) for _ in range(9)]
        server.until(lambda: server.service.batcher.waiting == 9)
        server.service.drain()
        if trouble is not None:  # else it hangs
            server.engine.trouble = trouble
            server.engine.gate.set()
        assert [answer.result().status for answer in (first, *others)] == [200] * 10
        assert len(server.engines.opened) == 2


def test_the_bundles_engine_is_opened_again(tiny_bundle: Bundle) -> None:
    app = create_app(Settings(bundle=tiny_bundle.path, device="cpu", stall_timeout_ms=60_000))
    picture = encode(rectangle(RED, (60, 20, 200, 90), (320, 128)))
    with live(app) as port, ThreadPoolExecutor(4) as pool:
        server = Site(app.state.service, port, FakeEngines(), pool)
        before = server.post(picture).result()
        engine = server.service.batcher._lanes[0]._runner.engine
        engine.infer = lambda _: 1 / 0  # type: ignore[method-assign,union-attr]
        after = [server.post(picture) for _ in range(4)]
        assert [answer.result().content["images"] for answer in after] == [before.content["images"]] * 4
        assert server.service.batcher._lanes[0]._runner.engine is not engine
        assert server.metric('ddetr_engine_restarts_total{reason="died"} 1.0')


@pytest.mark.parametrize("stage", ["inference", "decode"])
def test_health_fails_within_two_seconds_by_default(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, entered = threading.Event(), threading.Event()
    decode, hangs = decoders.decode_pixels, iter([True])

    def decode_or_hang(header: Header) -> Pixels:
        if next(hangs, False):
            entered.set()
            gate.wait(LONGEST_S)
        return decode(header)

    with site(Settings(bundle=Path("no-bundle"), decode_threads=2)) as server:
        try:
            server.engines.gate.clear()
            if stage == "decode":
                monkeypatch.setattr(decoders, "decode_pixels", decode_or_hang)
                stuck = server.post(encode(rectangle(RED)), **{"X-Timeout-Ms": "500"})
                assert entered.wait(LONGEST_S)
            else:
                stuck = server.hold()
            began_s = time.monotonic()
            assert server.health()[0] == 200
            while server.health()[0] == 200:
                if stage == "decode":  # the other thread gets on
                    assert server.post(encode(rectangle(RED))).result().status == 200
                assert time.monotonic() - began_s < 2 + NOISE_S
            assert server.ask("GET", "/livez").content == {"status": f"no progress in {stage}"}
        finally:
            gate.set()
            server.engines.release()
        assert stuck.result().status == (504 if stage == "decode" else 200)
        server.until(lambda: server.health() == (200, 200))


@pytest.mark.parametrize("level", [LETHAL, TAR])
def test_an_image_that_takes_engines_down_costs_only_its_own_request(settings: Settings, level: int) -> None:
    with site(settings, stall_timeout_ms=500) as server:
        first = server.hold()
        good = [server.post(encode(rectangle(RED))) for _ in range(2)]
        bad = server.post(grey(level))
        good.append(server.post(encode(rectangle(RED))))
        server.until(lambda: server.service.batcher.waiting == 4)
        server.engine.gate.set()
        assert [answer.result().status for answer in (first, *good)] == [200] * 4
        assert bad.result().status == 500
        assert "twice" in str(bad.result().content["error"])
        server.until(lambda: server.health() == (200, 200))
        assert server.post(encode(rectangle(RED))).result().status == 200


def test_with_no_engine_to_be_had_requests_end_and_the_server_recovers(settings: Settings) -> None:
    with site(settings) as server:
        server.engines.trouble = "open"
        server.engine.trouble = "raise"
        lost = server.post(encode(rectangle(RED))).result()
        assert lost.status == 500
        assert "cannot be restarted" in str(lost.content["error"])
        late = server.post(encode(rectangle(RED)), **{"X-Timeout-Ms": "50"}).result()
        assert late.status == 504
        server.engines.trouble = None
        assert server.post(encode(rectangle(RED))).result().status == 200
        assert server.health() == (200, 200)


def test_a_storm_of_clients_that_leave_leaves_the_queue_empty_and_the_server_serving(settings: Settings) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4 * STORM)), hard))
    picture = encode(Image.new("RGB", (WIDTH, HEIGHT)))
    request = b"POST /detect HTTP/1.1\r\nHost: test\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n%s" % (
        len(picture),
        picture,
    )

    async def storm(server: Site) -> None:
        writers = []
        for _ in range(STORM):
            _, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(request)
            writers.append(writer)
        await asyncio.to_thread(server.until, lambda: server.service.batcher.waiting == STORM)
        for writer in writers:
            writer.transport.abort()
        await asyncio.to_thread(server.until, lambda: server.service.batcher.waiting == 0)

    try:
        with site(settings, queue_limit=2 * STORM, stall_timeout_ms=60_000) as server:
            first = server.hold()
            asyncio.run(storm(server))
            assert server.service.admission.unanswered == 1
            assert server.metric("ddetr_queue_depth 0.0")
            batches = len(server.engine.batches)
            server.engine.gate.set()
            assert first.result().status == 200
            assert server.post(encode(rectangle(RED))).result().box == list(BOX)
            assert len(server.engine.batches) == batches + 1  # nobody who left cost the engine anything
            server.until(lambda: server.metric(f'ddetr_images_total{{outcome="client_gone"}} {STORM}.0'))
            assert server.health() == (200, 200)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_interactive_requests_go_before_batch_work(settings: Settings) -> None:
    with site(settings) as server:
        first = server.hold()
        bulk = [server.post(encode(rectangle(RED)), **{"X-Priority": "batch"}) for _ in range(9)]
        server.until(lambda: server.service.batcher.waiting == 9)
        interactive = server.post(encode(rectangle(RED, size=(HEIGHT, WIDTH))))
        server.until(lambda: server.service.batcher.waiting == 10)
        server.engine.gate.set()
        assert [answer.result().status for answer in (first, interactive, *bulk)] == [200] * 11
        assert server.engine.batches[-5:] == [(1, WIDE), (1, TALL), (4, WIDE), (4, WIDE), (1, WIDE)]
        refused = server.post(encode(rectangle(RED)), **{"X-Priority": "now"}).result()
        assert (refused.status, refused.content["error"]["code"]) == (400, "bad_parameter")  # type: ignore[index]
