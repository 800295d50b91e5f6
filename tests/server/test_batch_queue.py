import asyncio
from collections.abc import Iterator

import numpy as np
import pytest

from bundle import Canvas
from server.batch_queue import MOST_PASSED_OVER, BatchQueue, Entry, Priority
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

    def __call__(
        self, at_s: float, canvas: Canvas = WIDE, deadline_s: float = NEVER_S, priority: Priority = "interactive"
    ) -> Entry:
        pixels = np.zeros((canvas.height, canvas.width, 3), np.uint8)
        image = PreparedImage(pixels, canvas, canvas.width, canvas.height, StageTimes())
        return Entry(image, at_s, deadline_s, self._loop.create_future(), lambda: None, priority)


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


def pushed(queue: BatchQueue, entry: Entries, count: int, at_s: float, **options: object) -> list[Entry]:
    entries = [entry(at_s, **options) for _ in range(count)]  # type: ignore[arg-type]
    for each in entries:
        queue.push(each)
    return entries


def test_ahead_of_an_idle_engine_only_what_cannot_grow_leaves(queue: BatchQueue, entry: Entries) -> None:
    two = pushed(queue, entry, 2, 0.0)
    assert queue.pop(0.1, ahead=True) is None
    assert queue.pop(10.0, ahead=True) is None  # overdue, and it may grow all the same
    third = pushed(queue, entry, 1, 0.1)
    batch = queue.pop(0.1, ahead=True)
    assert batch is not None
    assert (batch.entries, batch.reason) == (tuple(two + third), "full")


def test_no_full_line_leaves_ahead_of_one_that_is_overdue(queue: BatchQueue, entry: Entries) -> None:
    pushed(queue, entry, 1, 0.0, canvas=TALL)
    pushed(queue, entry, 3, 0.1)
    assert queue.pop(0.2, ahead=True) is not None
    pushed(queue, entry, 3, 0.3)
    assert queue.pop(MAX_DELAY_S, ahead=True) is None
    batch = queue.pop(MAX_DELAY_S)
    assert batch is not None
    assert batch.canvas == TALL


def test_interactive_images_lead_and_batch_work_fills_their_batch(queue: BatchQueue, entry: Entries) -> None:
    bulk = pushed(queue, entry, 4, 0.0, priority="batch")
    pushed(queue, entry, 3, 0.0, priority="batch", canvas=TALL)
    interactive = pushed(queue, entry, 2, 0.3)
    batch = queue.pop(1.0)
    assert batch is not None
    assert batch.entries == (*interactive, bulk[0])
    assert (batch.canvas, batch.reason, batch.yields) == (WIDE, "full", False)


def test_batch_work_leads_when_nobody_else_waits(queue: BatchQueue, entry: Entries) -> None:
    bulk = pushed(queue, entry, 4, 0.0, priority="batch")
    batch = queue.pop(0.1, ahead=True)
    assert batch is not None
    assert (batch.entries, batch.yields) == (tuple(bulk[:3]), True)
    assert queue.pop(0.1, ahead=True) is None
    rest = queue.pop(0.1)
    assert rest is not None
    assert rest.entries == (bulk[3],)


def test_a_batch_filled_up_with_batch_work_may_still_become_better(queue: BatchQueue, entry: Entries) -> None:
    pushed(queue, entry, 3, 0.0, priority="batch")
    pushed(queue, entry, 1, 0.1)
    assert queue.pop(0.1, ahead=True) is None


@pytest.mark.parametrize(("canvas", "turns"), [(WIDE, 6), (TALL, 3)])
def test_batch_work_does_not_starve(queue: BatchQueue, entry: Entries, canvas: Canvas, turns: int) -> None:
    """Of any five batches in a row that leave while some wait, one takes the oldest of them along."""
    bulk = pushed(queue, entry, 5, 0.0, priority="batch", canvas=canvas)
    lonely = pushed(queue, entry, 1, 0.5, priority="batch", canvas=Canvas(height=6, width=6))
    waiting, left_behind = [*bulk, *lonely], 0
    for turn in range(40):
        pushed(queue, entry, 3, float(turn))  # interactive images fill every batch
        batch = queue.pop(float(turn), ahead=True) or queue.pop(float(turn))
        assert batch is not None
        left_behind = 0 if waiting[0] in batch.entries else left_behind + 1
        assert left_behind <= MOST_PASSED_OVER
        waiting = [each for each in waiting if each not in batch.entries]
        if not waiting:
            break
    assert not waiting
    # Each fifth batch takes one along, and as many more as interactive images of its canvas leave place for.
    assert turn + 1 == 5 * turns


def until_batch_work_is_due(queue: BatchQueue, entry: Entries) -> None:
    for _ in range(MOST_PASSED_OVER):
        pushed(queue, entry, 3, 1.0)
        assert queue.pop(2.0) is not None


def test_by_its_turn_one_image_goes_first_and_interactive_ones_next(queue: BatchQueue, entry: Entries) -> None:
    bulk = pushed(queue, entry, 3, 0.0, priority="batch")
    until_batch_work_is_due(queue, entry)
    one, two, _ = pushed(queue, entry, 3, 2.0)
    batch = queue.pop(2.0, ahead=True)
    assert batch is not None
    assert (batch.entries, batch.yields) == ((bulk[0], one, two), False)


def test_by_its_turn_batch_work_fills_what_interactive_work_leaves(queue: BatchQueue, entry: Entries) -> None:
    bulk = pushed(queue, entry, 3, 0.0, priority="batch")
    until_batch_work_is_due(queue, entry)
    interactive = pushed(queue, entry, 1, 2.0)
    assert queue.pop(2.0, ahead=True) is None  # one more interactive image could still get into it
    batch = queue.pop(2.0)
    assert batch is not None
    assert batch.entries == (bulk[0], *interactive, bulk[1])


def test_by_its_turn_only_the_first_image_does_not_yield(queue: BatchQueue, entry: Entries) -> None:
    bulk = pushed(queue, entry, 3, 0.0, priority="batch")
    until_batch_work_is_due(queue, entry)
    batch = queue.pop(2.0, ahead=True)
    assert batch is not None
    assert (batch.entries, batch.yields) == (tuple(bulk), True)
    queue.put_back(batch)
    interactive = pushed(queue, entry, 2, 3.0)
    batch = queue.pop(3.0, ahead=True)
    assert batch is not None
    assert (batch.entries, batch.yields) == ((bulk[0], *interactive), False)


def test_alone_in_its_batch_the_one_whose_turn_it_is_does_not_yield(entry: Entries) -> None:
    queue = BatchQueue(max_batch_size=1, max_delay_s=MAX_DELAY_S)
    bulk = pushed(queue, entry, 1, 0.0, priority="batch")
    until_batch_work_is_due(queue, entry)
    batch = queue.pop(2.0, ahead=True)
    assert batch is not None
    assert (batch.entries, batch.yields) == (tuple(bulk), False)


def test_what_is_put_back_stands_where_it_stood_and_keeps_its_turn(queue: BatchQueue, entry: Entries) -> None:
    bulk = pushed(queue, entry, 3, 0.0, priority="batch")
    for _ in range(MOST_PASSED_OVER - 1):
        pushed(queue, entry, 3, 1.0)
        assert queue.pop(2.0) is not None
    batch = queue.pop(2.0, ahead=True)
    assert batch is not None
    assert batch.yields
    interactive = pushed(queue, entry, 3, 3.0)
    younger = pushed(queue, entry, 1, 3.0, priority="batch")
    bulk[1].future.cancel()
    queue.put_back(batch)
    assert len(queue) == 2 + 3 + 1
    leaving = [queue.pop(4.0), queue.pop(4.0)]
    assert [each and each.entries for each in leaving] == [tuple(interactive), (bulk[0], bulk[2], *younger)]
    assert len(queue) == 0


def test_retries_leave_first_and_alone(queue: BatchQueue, entry: Entries) -> None:
    pushed(queue, entry, 3, 0.0)
    lost = [entry(0.0), entry(0.0, deadline_s=1.0), entry(0.0, TALL)]
    for each in lost:
        queue.push_retry(each)
    assert len(queue) == 6
    assert queue.pop(0.5, ahead=True) is None
    assert queue.drop_expired(1.0) == [lost[1]]
    first = queue.pop(1.0)
    assert first is not None
    assert (first.entries, first.retry, first.reason) == ((lost[0],), True, "idle")
    queue.put_back(first)
    assert queue.pop(1.0) == first
    assert queue.drop_retries() == [lost[2]]
    batch = queue.pop(1.0)
    assert batch is not None
    assert not batch.retry
    assert len(queue) == 0
