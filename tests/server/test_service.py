"""What requests hold while they are inside, over HTTP: places and bytes, slow senders, lanes, decoding threads."""

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest

from server.batch_queue import Inferred
from server.decoders import read_header
from server.preprocess import PreparedImage
from server.settings import Settings
from tests.server.pictures import RED, encode, rectangle
from tests.server.test_load import PNG, Site, run

PICTURE = encode(rectangle(RED))


def refusal(response: httpx2.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def held(site: Site) -> tuple[int, int, int]:
    """Images not with an engine, images without an answer, bytes."""
    admission = site.service.admission
    return admission.waiting, admission.unanswered, admission.held_bytes


class Sender:
    """A client that sends its body piece by piece, as the test says."""

    def __init__(self, site: Site, **headers: str) -> None:
        self._pieces: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        sent = {"content-type": "image/png", **headers}
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
            "headers": [(name.encode(), value.encode()) for name, value in sent.items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 2),
        }
        self.task = asyncio.create_task(site.app(scope, self._pieces.get, self._hear))

    def send(self, body: bytes, *, last: bool = False) -> None:
        self._pieces.put_nowait({"type": "http.request", "body": body, "more_body": not last})

    def leave(self) -> None:
        self._pieces.put_nowait({"type": "http.disconnect"})

    async def _hear(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], dict(message["headers"])


def test_a_body_that_trickles_is_408_and_frees_its_place(settings: Settings) -> None:
    async def test(site: Site) -> None:
        slow = Sender(site, **{"content-length": "1000"})
        slow.send(b"x")
        await slow.task
        assert slow.status == 408
        assert slow.headers[b"connection"] == b"close"
        assert held(site) == (0, 0, 0)
        text = await site.metrics()
        assert 'ddetr_rejected_total{reason="body_timeout"} 1.0' in text
        assert (await site.post()).status_code == 200

    run(settings, test, body_timeout_ms=20)


def test_the_deadline_ends_a_slow_body_too(settings: Settings) -> None:
    async def test(site: Site) -> None:
        slow = Sender(site, **{"x-timeout-ms": "20"})
        slow.send(b"x")
        await slow.task
        assert slow.status == 504
        assert held(site) == (0, 0, 0)

    run(settings, test)


def test_slow_senders_cannot_fill_the_queue(settings: Settings) -> None:
    async def test(site: Site) -> None:
        senders = [Sender(site, **{"content-length": "1000"}) for _ in range(4)]
        for sender in senders:
            sender.send(b"x")
        await site.until(lambda: site.service.admission.waiting == 4)
        assert refusal(await site.post()) == (429, "queue_full")
        clock = site.service.clock
        for ticket in site.service.admission._readers:
            ticket._clock = lambda: clock() + 2
        assert (await site.post()).status_code == 200
        await asyncio.gather(*(sender.task for sender in senders))
        assert [sender.status for sender in senders] == [408] * 4
        assert held(site) == (0, 0, 0)

    run(settings, test, queue_limit=4, max_images_per_request=4)


def test_a_client_that_leaves_while_it_sends_frees_its_place(settings: Settings) -> None:
    async def test(site: Site) -> None:
        sender = Sender(site, **{"content-length": "1000"})
        sender.send(b"x" * 10)
        await site.until(lambda: held(site) == (1, 1, 10))
        sender.leave()
        await sender.task
        assert sender.status == 0
        assert held(site) == (0, 0, 0)
        assert 'ddetr_requests_total{route="/detect",status="499"} 1.0' in await site.metrics()

    run(settings, test)


def test_bodies_are_bounded_together_before_they_are_read(settings: Settings) -> None:
    async def test(site: Site) -> None:
        first = Sender(site, **{"content-length": "1000"})
        first.send(bytes(900))
        await site.until(lambda: held(site)[2] == 900)
        asked = 0

        async def body() -> AsyncIterator[bytes]:
            nonlocal asked
            asked += 1
            yield bytes(101)

        declared = await site.client.post("/detect", content=body(), headers=PNG | {"Content-Length": "101"})
        assert refusal(declared) == (429, "queue_full")
        assert "900 bytes are held and 1000 may: no place for 101 more" in declared.text
        assert int(declared.headers["retry-after"]) >= 1
        assert asked == 0
        assert refusal(await site.client.post("/detect", content=body(), headers=PNG)) == (429, "queue_full")
        assert held(site) == (1, 1, 900)
        first.leave()
        await first.task

    run(settings, test, max_queued_bytes=1000, max_body_bytes=1000)


def test_chunked_bodies_without_end_never_hold_more_than_the_bound(settings: Settings) -> None:
    most = 0

    async def test(site: Site) -> None:
        async def endless() -> AsyncIterator[bytes]:
            nonlocal most
            while True:
                most = max(most, site.service.admission.held_bytes)
                yield bytes(300)
                await asyncio.sleep(0)

        answers = await asyncio.gather(*(site.client.post("/detect", content=endless(), headers=PNG) for _ in range(8)))
        assert {refusal(answer) for answer in answers} <= {(413, "too_many_bytes"), (429, "queue_full")}
        assert held(site) == (0, 0, 0)

    run(settings, test, max_queued_bytes=5000, max_body_bytes=2000)
    assert 2000 < most <= 5000


def test_uploads_are_let_go_when_they_are_decoded(settings: Settings) -> None:
    async def test(site: Site) -> None:
        first = await site.hold()
        waiting = [site.post() for _ in range(2)]
        drawn = asyncio.create_task(site.client.post("/detect?format=image", content=PICTURE, headers=PNG))
        await site.until(lambda: site.service.batcher.waiting == 3)
        assert held(site) == (3, 4, len(PICTURE)), "the picture to draw on is kept"
        site.engine.gate.set()
        assert {task.status_code for task in await asyncio.gather(first, drawn, *waiting)} == {200}
        assert held(site) == (0, 0, 0)

    run(settings, test)


def test_interactive_work_goes_first_and_finds_a_place_in_a_queue_full_of_batch_work(settings: Settings) -> None:
    async def test(site: Site) -> None:
        first = await site.hold()
        order: list[str] = []

        async def post(lane: str) -> None:
            assert (await site.post(**{"X-Priority": lane})).status_code == 200
            order.append(lane)

        batch = [asyncio.create_task(post("batch")) for _ in range(2)]
        await site.until(lambda: site.service.batcher.waiting == 2)
        assert refusal(await site.post(**{"X-Priority": "batch"})) == (429, "queue_full")
        interactive = [asyncio.create_task(post("interactive")) for _ in range(2)]
        await site.until(lambda: site.service.batcher.waiting == 4)
        assert refusal(await site.post()) == (429, "queue_full")
        site.engine.gate.set()
        await asyncio.gather(first, *batch, *interactive)
        assert order == ["interactive", "interactive", "batch", "batch"]
        assert held(site) == (0, 0, 0)

    run(settings, test, queue_limit=4, max_images_per_request=4, max_batch_size=1)


def test_more_batch_images_than_its_lane_can_ever_hold_are_413(settings: Settings) -> None:
    async def test(site: Site) -> None:
        files = [("images", (str(index), PICTURE)) for index in range(3)]
        answer = await site.client.post("/detect", files=files, headers={"X-Priority": "batch"})
        assert refusal(answer) == (413, "too_many_images")
        assert (await site.client.post("/detect", files=files)).status_code == 200

    run(settings, test, queue_limit=4, max_images_per_request=4)


def test_a_lane_that_is_none_is_400(settings: Settings) -> None:
    async def test(site: Site) -> None:
        answer = await site.post(**{"X-Priority": "urgent"})
        assert refusal(answer) == (400, "bad_parameter")
        assert "X-Priority: 'urgent' is neither interactive nor batch" in answer.text

    run(settings, test)


@pytest.mark.parametrize("why", ["its deadline passes", "its client leaves"])
def test_nothing_is_decoded_for_nobody(settings: Settings, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    gate, entered, read = threading.Event(), threading.Semaphore(0), []

    def read_slowly(data: bytes, limit: int) -> Any:
        read.append(data)
        entered.release()
        assert gate.wait(timeout=30)
        return read_header(data, limit)

    async def test(site: Site) -> None:
        monkeypatch.setattr("server.decoders.read_header", read_slowly)
        try:
            first = site.post()
            await asyncio.to_thread(entered.acquire)
            if why == "its deadline passes":
                assert refusal(await site.post(**{"X-Timeout-Ms": "30"})) == (504, "deadline_passed")
            else:
                sender = Sender(site)
                sender.send(PICTURE, last=True)
                await site.until(lambda: site.service.admission.waiting == 2)
                await asyncio.sleep(0)
                sender.leave()
                await sender.task
            assert held(site) == (1, 1, len(PICTURE))
            last = site.post()
        finally:
            gate.set()
        assert [(await task).status_code for task in (first, last)] == [200, 200]
        assert len(read) == 2

    run(settings, test, decode_threads=1)


def test_what_nobody_foresaw_ends_the_work_on_the_other_images(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(site: Site) -> None:
        infer = site.service.batcher.infer

        async def infer_or_fail(image: PreparedImage, *rest: Any) -> Inferred:
            if image.width == 40:
                await site.until(lambda: site.service.batcher.waiting == 1)
                raise MemoryError("told to")
            return await infer(image, *rest)

        monkeypatch.setattr(site.service.batcher, "infer", infer_or_fail)
        first = await site.hold()
        await site.until(lambda: site.service.batcher.waiting == 0)
        files = [("images", PICTURE), ("images", encode(rectangle(RED, size=(40, 60))))]
        answer = await site.client.post("/detect", files=files)
        assert refusal(answer) == (500, "internal")
        await site.until(lambda: site.service.batcher.waiting == 0)
        site.engine.gate.set()
        assert (await first).status_code == 200

    run(settings, test)


def test_the_watch_over_engines_outlives_what_nobody_foresaw(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test(site: Site) -> None:
        await site.service.start()
        looks = 0

        def check() -> None:
            nonlocal looks
            looks += 1
            raise RuntimeError("told to")

        monkeypatch.setattr(site.service.batcher, "check", check)
        await site.until(lambda: looks > 1)

    run(settings, test)
