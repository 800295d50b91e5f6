import asyncio
from collections.abc import Iterator

import numpy as np
import pytest

from bundle import Canvas
from server.batch_queue import BatchQueue, Entry
from server.preprocess import PreparedImage
from server.timing import StageTimes

WIDE, TALL = Canvas(height=4, width=8), Canvas(height=8, width=4)
MAX_DELAY_S = 0.5
NEVER_S = 1e9


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture
def queue() -> BatchQueue:
    return BatchQueue(max_batch_size=3, max_delay_s=MAX_DELAY_S)


class Entries:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def __call__(self, at_s: float, canvas: Canvas = WIDE, deadline_s: float = NEVER_S) -> Entry:
        pixels = np.zeros((canvas.height, canvas.width, 3), np.uint8)
        image = PreparedImage(pixels, canvas, canvas.width, canvas.height, StageTimes())
        return Entry(image, at_s, deadline_s, self._loop.create_future(), lambda: None)


@pytest.fixture
def entry(loop: asyncio.AbstractEventLoop) -> Entries:
    return Entries(loop)


def test_nothing_waits_nothing_leaves(queue: BatchQueue) -> None:
    assert queue.pop(0.0) is None
    assert len(queue) == 0


def test_an_idle_engine_takes_what_is_there_in_order(queue: BatchQueue, entry: Entries) -> None:
    entries = [entry(0.0), entry(0.1)]
    for each in entries:
        queue.push(each)
    batch = queue.pop(0.2)
    assert batch is not None
    assert batch.entries == tuple(entries)
    assert (batch.canvas, batch.reason) == (WIDE, "idle")
    assert queue.pop(0.2) is None


def test_a_batch_is_never_larger_than_allowed(queue: BatchQueue, entry: Entries) -> None:
    entries = [entry(0.0) for _ in range(5)]
    for each in entries:
        queue.push(each)
    first, second = queue.pop(0.1), queue.pop(0.1)
    assert first is not None
    assert second is not None
    assert (first.entries, first.reason) == (tuple(entries[:3]), "full")
    assert (second.entries, second.reason) == (tuple(entries[3:]), "idle")


def test_only_one_canvas_to_a_batch(queue: BatchQueue, entry: Entries) -> None:
    for each in (entry(0.0, WIDE), entry(0.1, TALL), entry(0.2, WIDE)):
        queue.push(each)
    first, second = queue.pop(0.3), queue.pop(0.3)
    assert first is not None
    assert second is not None
    assert (first.canvas, len(first.entries)) == (WIDE, 2)
    assert (second.canvas, len(second.entries)) == (TALL, 1)


def test_a_full_batch_goes_before_an_older_one_that_is_not(queue: BatchQueue, entry: Entries) -> None:
    queue.push(entry(0.0, TALL))
    for _ in range(3):
        queue.push(entry(0.1, WIDE))
    batch = queue.pop(0.2)
    assert batch is not None
    assert (batch.canvas, batch.reason) == (WIDE, "full")


def test_after_the_delay_the_oldest_goes_before_a_full_batch(queue: BatchQueue, entry: Entries) -> None:
    queue.push(entry(0.0, TALL))
    for _ in range(3):
        queue.push(entry(0.1, WIDE))
    batch = queue.pop(MAX_DELAY_S)
    assert batch is not None
    assert (batch.canvas, batch.reason) == (TALL, "delay")


def test_a_batch_that_is_full_and_overdue_is_called_full(queue: BatchQueue, entry: Entries) -> None:
    for _ in range(3):
        queue.push(entry(0.0))
    batch = queue.pop(10.0)
    assert batch is not None
    assert batch.reason == "full"


def test_draining_is_a_reason(queue: BatchQueue, entry: Entries) -> None:
    queue.push(entry(0.0))
    batch = queue.pop(10.0, draining=True)
    assert batch is not None
    assert batch.reason == "drain"


def test_discarding_is_idempotent_and_counts(queue: BatchQueue, entry: Entries) -> None:
    kept, gone = entry(0.0), entry(0.1)
    queue.push(gone)
    queue.push(kept)
    queue.discard(gone)
    queue.discard(gone)
    assert len(queue) == 1
    batch = queue.pop(0.2)
    assert batch is not None
    assert batch.entries == (kept,)
    queue.discard(kept)
    assert len(queue) == 0


def test_answered_and_expired_entries_are_dropped(queue: BatchQueue, entry: Entries) -> None:
    answered, expired, alive = entry(0.0), entry(0.0, deadline_s=1.0), entry(0.0, TALL, deadline_s=1.1)
    answered.future.cancel()
    for each in (answered, expired, alive):
        queue.push(each)
    assert queue.drop_expired(1.0) == [answered, expired]
    assert len(queue) == 1
