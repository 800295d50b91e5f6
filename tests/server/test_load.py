"""Many requests at once: full queues, deadlines, clients that leave, a server that stops. Nothing sleeps."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest
from fastapi import FastAPI

from server.app import create_app
from server.line import Place
from server.service import Service
from server.settings import Settings
from tests.server.fake_engine import FakeEngine
from tests.server.pictures import BLUE, GREEN, HEIGHT, RED, WIDTH, encode, poison, rectangle

PNG = {"Content-Type": "image/png"}


class Site:
    """A server, its engine, and a client."""

    def __init__(self, app: FastAPI, engine: FakeEngine, client: httpx2.AsyncClient) -> None:
        self.app = app
        self.engine = engine
        self.client = client

    @property
    def service(self) -> Service:
        service = self.app.state.service
        assert isinstance(service, Service)
        return service

    def post(self, data: bytes | None = None, **headers: str) -> "asyncio.Task[httpx2.Response]":
        content = encode(rectangle(RED)) if data is None else data
        return asyncio.create_task(self.client.post("/detect", content=content, headers=PNG | headers))

    async def hold(self) -> "asyncio.Task[httpx2.Response]":
        """Keep the engine busy with one request until its gate is opened."""
        while self.engine.entered.acquire(blocking=False):
            pass  # forget the warm-up
        self.engine.gate.clear()
        task = self.post()
        await asyncio.to_thread(self.engine.entered.acquire)
        return task

    async def until(self, condition: Callable[[], bool]) -> None:
        """Yield to the server until it has come that far."""
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0)

    async def metrics(self) -> str:
        return (await self.client.get("/metrics")).text


@asynccontextmanager
async def open_site(settings: Settings) -> AsyncIterator[Site]:
    engine = FakeEngine()
    app = create_app(settings, engine)
    transport = httpx2.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx2.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        try:
            yield Site(app, engine, client)
        finally:
            engine.gate.set()


def run(settings: Settings, test: Callable[[Site], Awaitable[None]], **changes: object) -> None:
    async def body() -> None:
        async with asyncio.timeout(30), open_site(settings.model_copy(update=changes)) as site:
            await test(site)

    asyncio.run(body())


def test_mixed_sizes_and_poison_at_once_each_get_their_own_answer(settings: Settings) -> None:
    async def test(site: Site) -> None:
        first = await site.hold()
        wanted = []
        for index in range(24):
            color = (RED, GREEN, BLUE)[index % 3]
            size = ((WIDTH, HEIGHT), (HEIGHT, WIDTH), (HEIGHT, HEIGHT))[index % 3]
            box = (4 + index, 8, 40 + index % 20, 40)
            wanted.append((site.post(encode(rectangle(color, box, size))), (1, 2, 5)[index % 3], box))
        bad = [site.post(poison()) for _ in range(3)]
        await site.until(lambda: site.service.batcher.waiting == 27)
        site.engine.gate.set()
        for task, label, box in wanted:
            detection = (await task).json()["images"][0]["detections"][0]
            assert (detection["class_id"], detection["box"]) == (label, pytest.approx(box, abs=0.01))
        assert [(await task).status_code for task in bad] == [500] * 3
        assert (await first).status_code == 200
        assert max(size for size, _ in site.engine.batches) == 4

    run(settings, test)


def test_a_full_queue_is_429_with_retry_after(settings: Settings) -> None:
    async def test(site: Site) -> None:
        first = await site.hold()
        waiting = [site.post() for _ in range(3)]
        await site.until(lambda: site.service.batcher.waiting == 3)
        refused = await site.post()
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        site.engine.gate.set()
        assert [(await task).status_code for task in (first, *waiting)] == [200] * 4
        assert (await site.post()).status_code == 200
        assert 'ddetr_rejected_total{reason="queue_full"} 1.0' in await site.metrics()

    run(settings, test, queue_limit=3, max_images_per_request=3)


def test_a_full_queue_refuses_before_the_body_is_read(settings: Settings) -> None:
    async def test(site: Site) -> None:
        first = await site.hold()
        waiting = site.post()
        await site.until(lambda: site.service.batcher.waiting == 1)
        asked = 0

        async def body() -> AsyncIterator[bytes]:
            nonlocal asked
            asked += 1
            yield b"x"

        refused = await site.client.post("/detect", content=body(), headers=PNG)
        assert refused.status_code == 429
        assert asked == 0
        site.engine.gate.set()
        await asyncio.gather(first, waiting)

    run(settings, test, queue_limit=1, max_images_per_request=1)


def test_a_passed_deadline_is_504_at_once_and_costs_no_engine(settings: Settings) -> None:
    async def test(site: Site) -> None:
        first = await site.hold()
        late = await site.post(**{"X-Timeout-Ms": "50"})  # answered while the engine is still held
        assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_passed")
        assert "50 ms" in late.json()["error"]["message"]
        assert site.service.batcher.waiting == 0
        batches = len(site.engine.batches)
        site.engine.gate.set()
        assert (await first).status_code == 200
        assert len(site.engine.batches) == batches
        text = await site.metrics()
        assert 'ddetr_images_total{outcome="deadline_passed"} 1.0' in text
        assert 'ddetr_rejected_total{reason="deadline_passed"} 1.0' in text

    run(settings, test)


def test_a_deadline_that_cannot_be_met_is_503_with_retry_after(settings: Settings) -> None:
    async def test(site: Site) -> None:
        first = await site.hold()
        for canvas in site.service.served.manifest.canvases * 9:
            site.service.served.estimate.observe(canvas, images=1, seconds=100.0)
        refused = await site.post(**{"X-Timeout-Ms": "1000"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "deadline_unmeetable")
        assert int(refused.headers["retry-after"]) > 1
        site.engine.gate.set()
        await first

    run(settings, test)


def test_clients_that_leave_are_not_worked_for(settings: Settings) -> None:
    async def call_and_leave(site: Site, leave: asyncio.Event) -> None:
        sent = False

        async def receive() -> dict[str, object]:
            nonlocal sent
            if not sent:
                sent = True
                return {"type": "http.request", "body": encode(rectangle(RED)), "more_body": False}
            await leave.wait()
            return {"type": "http.disconnect"}

        async def send(message: object) -> None:
            pass

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "path": "/detect",
            "raw_path": b"/detect",
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": [(b"content-type", b"image/png")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        await site.app(scope, receive, send)

    async def test(site: Site) -> None:
        first = await site.hold()
        leave = asyncio.Event()
        leaving = [asyncio.create_task(call_and_leave(site, leave)) for _ in range(50)]
        stays = site.post(encode(rectangle(GREEN)))
        await site.until(lambda: site.service.batcher.waiting == 51)
        leave.set()
        await asyncio.gather(*leaving)
        assert site.service.batcher.waiting == 1
        assert site.service.admission.waiting == 1
        batches = len(site.engine.batches)
        site.engine.gate.set()
        assert (await stays).json()["images"][0]["detections"][0]["label"] == "green"
        await first
        assert len(site.engine.batches) == batches + 1
        text = await site.metrics()
        assert 'ddetr_requests_total{route="/detect",status="499"} 50.0' in text
        assert 'ddetr_images_total{outcome="client_gone"} 50.0' in text

    run(settings, test)


def test_draining_refuses_newcomers_and_finishes_the_rest(settings: Settings) -> None:
    async def test(site: Site) -> None:
        first = await site.hold()
        second = site.post()
        await site.until(lambda: site.service.batcher.waiting == 1)
        site.service.drain()
        refused = await site.post()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert int(refused.headers["retry-after"]) >= 1
        ready = await site.client.get("/readyz")
        assert (ready.status_code, ready.json()) == (503, {"status": "draining"})
        assert (await site.client.get("/livez")).status_code == 200
        site.engine.gate.set()
        assert [(await task).status_code for task in (first, second)] == [200, 200]

    run(settings, test)


def test_livez_fails_when_a_stage_stops_with_work_waiting(settings: Settings) -> None:
    async def test(site: Site) -> None:
        first = await site.hold()
        while (dead := await site.client.get("/livez")).status_code == 200:
            await asyncio.sleep(0.01)
        assert (dead.status_code, dead.json()) == (503, {"status": "no progress in inference"})
        site.engine.gate.set()
        assert (await first).status_code == 200
        assert (await site.client.get("/livez")).status_code == 200
        assert (await site.client.get("/readyz")).status_code == 200

    run(settings, test, stall_timeout_ms=200)


def test_a_decoder_that_hangs_is_seen_when_its_client_has_left(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, entered = threading.Event(), threading.Event()

    def hang(*_: object) -> None:
        entered.set()
        gate.wait(timeout=30)

    async def test(site: Site) -> None:
        monkeypatch.setattr("server.decoders.decode_pixels", hang)
        try:
            request = site.post()
            await asyncio.to_thread(entered.wait)
            request.cancel()
            await site.until(request.done)
            now_s = site.service.clock()
            site.service._decoders._progress._clock = lambda: now_s + 61
            assert (await site.client.get("/livez")).json() == {"status": "no progress in decode"}
        finally:
            gate.set()

    run(settings, test)


def test_an_image_that_fails_in_the_engine_gives_back_no_place_of_another(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(site: Site) -> None:
        first = await site.hold()
        files = [
            ("images", (name, data))
            for name, data in (("a", poison()), ("b", encode(rectangle())), ("c", encode(rectangle())))
        ]
        request = asyncio.create_task(site.client.post("/detect", files=files))
        await site.until(lambda: site.service.batcher.waiting == 3)
        admission = site.service.admission
        places: list[tuple[int, int]] = []

        def watched(move: Callable[..., None]) -> Callable[..., None]:
            def moved(place: Place, *args: Any) -> None:
                move(place, *args)
                places.append((admission.waiting, site.service.batcher.waiting))

            return moved

        monkeypatch.setattr(Place, "dispatched", watched(Place.dispatched))
        monkeypatch.setattr(Place, "leave", watched(Place.leave))
        site.engine.gate.set()
        await asyncio.gather(first, request)
        assert all(admitted >= queued for admitted, queued in places), places

    run(settings, test, max_batch_size=1)


def test_every_place_is_given_back_whatever_happened(settings: Settings) -> None:
    async def test(site: Site) -> None:
        async def all_sorts() -> None:
            files = [("images", ("a", encode(rectangle()))), ("images", ("b", b"")), ("images", ("c", poison()))]
            await asyncio.gather(
                site.client.post("/detect", files=files),
                site.client.post("/detect?classes=pink", content=encode(rectangle()), headers=PNG),
                site.client.post("/detect", content=b"{", headers={"Content-Type": "application/json"}),
                site.post(b"nonsense"),
                site.post(poison()),
                site.post(**{"X-Timeout-Ms": "0.001"}),
                site.post(),
            )

        for _ in range(10):
            await all_sorts()
        admission = site.service.admission
        assert (admission.waiting, admission.unanswered, site.service.batcher.waiting) == (0, 0, 0)

    run(settings, test)
