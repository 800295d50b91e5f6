import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest
from starlette.datastructures import Headers

from bundle import Canvas
from server.admit import Admission, Limits, Ticket, body_length, priority, timeout_ms
from server.errors import (
    BadParameter,
    BodyTimeout,
    BodyTooLarge,
    DeadlinePassed,
    DeadlineUnmeetable,
    Draining,
    QueueFull,
)
from server.estimate import Estimate
from server.line import Line

NOW_S, NEVER_S = 50.0, 1e9
CANVAS = Canvas(height=64, width=96)
BODY_TIMEOUT_S = 20.0


class Door:
    """An admission, what it stands on, and a clock that is moved by hand."""

    def __init__(self, images: int = 4, queued_bytes: int = 1000, body_bytes: int = 400, batch_size: int = 1) -> None:
        self.now_s = NOW_S
        self.estimate = Estimate(engine_instances=1)
        self.line = Line(self.estimate, batch_size, 1, lambda: self.now_s)
        limits = Limits(images, queued_bytes, body_bytes, BODY_TIMEOUT_S)
        self.admission = Admission(limits, self.line, self.estimate, batch_size, lambda: self.now_s)

    def dispatched(self, ticket: Ticket) -> None:
        """One engine has all its images."""
        ticket.read([0] * len(ticket.places))
        for place in ticket.places:
            place.decoded(CANVAS)
            place.dispatched()

    @property
    def counts(self) -> tuple[int, int, int]:
        return self.admission.waiting, self.admission.unanswered, self.admission.held_bytes


@pytest.fixture
def door() -> Door:
    return Door()


def test_places_and_bytes_are_given_back(door: Door) -> None:
    with door.admission.admit(NEVER_S, length=100) as ticket:
        assert door.counts == (1, 1, 0)
        ticket.received(100)
        assert door.counts == (1, 1, 100)
        ticket.read([30, 20, 10])
        assert door.counts == (3, 3, 60)
        ticket.places[0].decoded(CANVAS)
        assert door.counts == (3, 3, 30)
        ticket.places[0].dispatched()
        assert door.counts == (2, 3, 30)
        ticket.places[0].leave()
        assert door.counts == (2, 2, 30)
    assert door.counts == (0, 0, 0)


def test_places_are_given_back_on_errors_too(door: Door) -> None:
    with pytest.raises(QueueFull), door.admission.admit(NEVER_S, length=7) as ticket:
        ticket.received(1001)
    assert door.counts == (0, 0, 0)


def test_an_upload_that_is_kept_counts_until_its_request_ends(door: Door) -> None:
    with door.admission.admit(NEVER_S, length=100) as ticket:
        ticket.read([80], keep=True)
        ticket.places[0].decoded(CANVAS)
        ticket.places[0].leave()
        assert door.counts == (0, 0, 80)
    assert door.counts == (0, 0, 0)


def test_what_happens_twice_or_too_late_counts_nothing_twice(door: Door) -> None:
    with door.admission.admit(NEVER_S) as ticket:
        ticket.read([5])
        (place,) = ticket.places
        for _ in range(2):
            place.decoded(CANVAS)
        for _ in range(2):
            place.dispatched()
        for _ in range(2):
            place.leave()
        place.hold(9)
        place.decoded(CANVAS)
    assert door.counts == (0, 0, 0)


def test_a_full_queue_refuses_with_the_time_to_work_it_off(door: Door) -> None:
    door.estimate.observe(CANVAS, images=1, seconds=2.5)
    with door.admission.admit(NEVER_S) as first, door.admission.admit(NEVER_S):
        with pytest.raises(QueueFull, match="2 images are waiting and 4 may: no place for 3 more") as caught:
            first.read([0] * 4)
        assert caught.value.retry_after_s is not None
        assert 5 <= caught.value.retry_after_s <= 20
        assert door.admission.waiting == 2


def test_images_with_an_engine_take_no_place_in_the_queue(door: Door) -> None:
    tickets = [door.admission.admit(NEVER_S) for _ in range(4)]
    with pytest.raises(QueueFull):
        door.admission.admit(NEVER_S)
    door.dispatched(tickets[0])
    door.admission.admit(NEVER_S)


def test_a_body_that_would_find_no_room_is_refused_by_what_it_declares(door: Door) -> None:
    with door.admission.admit(NEVER_S, length=400) as first, door.admission.admit(NEVER_S, length=400) as second:
        first.received(400)
        second.received(400)
        with pytest.raises(QueueFull, match="800 bytes are held and 1000 may: no place for 201 more") as caught:
            door.admission.admit(NEVER_S, length=201)
        assert caught.value.retry_after_s == 1
        with door.admission.admit(NEVER_S, length=200) as ticket:
            ticket.received(200)
            assert door.admission.held_bytes == 1000


@pytest.mark.parametrize("length", [None, 300])
def test_bodies_count_with_what_has_come_of_them(door: Door, length: int | None) -> None:
    with door.admission.admit(NEVER_S, length=400) as first, door.admission.admit(NEVER_S, length=400) as second:
        with door.admission.admit(NEVER_S, length=length) as third:
            first.received(400)
            second.received(400)
            third.received(150)
            third.received(50)
            assert door.admission.held_bytes == 1000
            with pytest.raises(QueueFull, match="no place for 1 more"):
                third.received(1)
            assert door.admission.held_bytes == 1000
        assert door.admission.held_bytes == 800


def test_who_only_declares_keeps_no_room_from_others(door: Door) -> None:
    for _ in range(3):
        door.admission.admit(NEVER_S, length=400)
    with door.admission.admit(NEVER_S, length=400) as ticket:
        ticket.received(400)
        assert door.admission.held_bytes == 400


def test_batch_work_leaves_half_of_the_queue_to_interactive_work(door: Door) -> None:
    batch = [door.admission.admit(NEVER_S, "batch") for _ in range(2)]
    with pytest.raises(QueueFull, match="2 images of batch work are waiting and 2 may"):
        door.admission.admit(NEVER_S, "batch")
    interactive = [door.admission.admit(NEVER_S) for _ in range(2)]
    with pytest.raises(QueueFull, match="4 images are waiting and 4 may"):
        door.admission.admit(NEVER_S)
    for ticket in batch + interactive:
        ticket.leave()
    interactive = [door.admission.admit(NEVER_S) for _ in range(4)]  # which may have all of it


def test_batch_work_leaves_half_of_the_bytes_to_interactive_work(door: Door) -> None:
    with door.admission.admit(NEVER_S, "batch", 400) as ticket:
        ticket.received(400)
        with pytest.raises(QueueFull, match="400 bytes of batch work are held and 500 may"):
            door.admission.admit(NEVER_S, "batch", 101)
        with door.admission.admit(NEVER_S, "interactive", 400) as other:
            other.received(400)


def test_a_deadline_that_cannot_be_met_is_refused_at_the_door(door: Door) -> None:
    door.estimate.observe(CANVAS, images=1, seconds=2.0)
    with door.admission.admit(NOW_S + 0.1):  # nobody ahead: whoever comes is let in
        with pytest.raises(DeadlineUnmeetable, match="1 images ahead take about 8000 ms, 1500 are left") as caught:
            door.admission.admit(NOW_S + 1.5)
        assert caught.value.retry_after_s is not None
        assert caught.value.retry_after_s > 6
        door.admission.admit(NOW_S + 8.1)


def test_a_request_does_not_queue_behind_itself(door: Door) -> None:
    door.estimate.observe(CANVAS, images=1, seconds=60.0)  # gone wrong: only a request that is let in can correct it
    with door.admission.admit(NOW_S + 1) as ticket:
        ticket.read([0] * 3)
        assert door.admission.unanswered == 3


def test_others_ahead_count_when_a_request_turns_out_to_be_large(door: Door) -> None:
    door.estimate.observe(CANVAS, images=1, seconds=2.0)
    with door.admission.admit(NEVER_S) as other:
        other.read([0])
        with door.admission.admit(NOW_S + 9) as ticket:
            with pytest.raises(DeadlineUnmeetable, match="1 images ahead take about 12000 ms, 9000 are left"):
                ticket.read([0] * 2)
            ticket.read([0])


def test_batch_work_is_not_ahead_of_interactive_work(door: Door) -> None:
    door.estimate.observe(CANVAS, images=1, seconds=2.0)
    with door.admission.admit(NEVER_S, "batch"), door.admission.admit(NEVER_S, "batch"):
        door.admission.admit(NOW_S + 4.5)
        with pytest.raises(DeadlineUnmeetable):
            door.admission.admit(NOW_S + 4.5)


def test_who_is_refused_at_once_is_told_to_come_back_one_after_the_other() -> None:
    door = Door(images=1)
    door.estimate.observe(CANVAS, images=1, seconds=0.4)
    door.admission.admit(NEVER_S)
    told = []
    for _ in range(300):
        with pytest.raises(QueueFull) as caught:
            door.admission.admit(NEVER_S)
        told.append(caught.value.retry_after_s)
    assert told[0] == 1
    assert told == sorted(told)
    assert all(told.count(second) <= 2 for second in set(told) - {60})  # 0.8 of 2.5 a second
    assert told[-1] == 60
    door.now_s += 60
    with pytest.raises(QueueFull) as caught:
        door.admission.admit(NEVER_S)
    assert caught.value.retry_after_s == 1  # they have come back, or will not


def test_batch_work_is_sent_behind_interactive_work() -> None:
    door = Door(images=1)
    door.estimate.observe(CANVAS, images=1, seconds=2.0)
    door.admission.admit(NEVER_S)
    told = {}
    for lane in ("interactive", "batch", "interactive"):
        with pytest.raises(QueueFull) as caught:
            door.admission.admit(NEVER_S, lane)
        told.setdefault(lane, []).append(caught.value.retry_after_s)
    assert told == {"interactive": [5, 7], "batch": [7]}


def test_promises_count_the_images_that_requests_have_had() -> None:
    door = Door(images=16)
    door.estimate.observe(CANVAS, images=1, seconds=0.1)
    for _ in range(200):
        with door.admission.admit(NEVER_S) as ticket:
            ticket.read([0] * 8)
    for _ in range(16):
        door.admission.admit(NEVER_S)
    told = []
    for _ in range(20):
        with pytest.raises(QueueFull) as caught:
            door.admission.admit(NEVER_S)
        told.append(caught.value.retry_after_s or 0)
    assert told[-1] - told[0] == pytest.approx(19 * 8 * 0.1 / 0.8, abs=1)


def test_draining_refuses_everyone(door: Door) -> None:
    door.admission.draining = True
    with pytest.raises(Draining) as caught:
        door.admission.admit(NEVER_S)
    assert caught.value.retry_after_s == 1


def test_answers_later_than_predicted_make_the_door_careful_and_others_calm_it(door: Door) -> None:
    door.estimate.observe(CANVAS, images=1, seconds=0.001)
    other = door.admission.admit(NEVER_S)
    other.read([0])

    def lets_in(left_ms: float) -> bool:
        try:
            door.admission.admit(door.now_s + left_ms / 1e3).leave()
        except DeadlineUnmeetable:
            return False
        return True

    def answer(taken_ms: float, left_ms: float = 11.9) -> None:  # from 12 ms on its time would be enough for certain
        with door.admission.admit(door.now_s + left_ms / 1e3) as ticket:
            ticket.read([0])
            door.now_s += taken_ms / 1e3
            ticket.answered()

    def give_up(taken_ms: float) -> None:
        with suppress(DeadlinePassed), door.admission.admit(door.now_s + 0.0119) as ticket:
            ticket.read([0])
            door.now_s += taken_ms / 1e3
            raise DeadlinePassed("too late")

    assert lets_in(4.1)
    for _ in range(200):
        answer(6.0)
    assert not lets_in(6.5)
    assert lets_in(6.7)
    for _ in range(200):
        answer(2.0)
    door.now_s += 0.1
    assert lets_in(2.3)
    for _ in range(200):
        give_up(3.0)
    assert not lets_in(2.9)


def test_of_those_with_time_enough_one_in_a_while_is_learnt_from(door: Door) -> None:
    door.estimate.observe(CANVAS, images=1, seconds=0.001)
    other = door.admission.admit(NEVER_S)
    other.read([0])

    def answer(taken_s: float) -> None:
        with door.admission.admit(NEVER_S) as ticket:
            ticket.read([0])
            door.now_s += taken_s
            ticket.answered()

    with pytest.raises(DeadlineUnmeetable):
        door.admission.admit(door.now_s + 0.0039)  # 2 ms, and as much again while nothing is learnt
    for _ in range(200):
        answer(0.002)
        answer(0.006)  # comes too soon after the other
        door.now_s += 0.0321
    door.admission.admit(door.now_s + 0.0023)


def run(body: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(20):
            await body()

    asyncio.run(limited())


def test_a_body_that_takes_too_long_is_given_up() -> None:
    door = Door()

    async def body() -> None:
        limits = Limits(4, 1000, 400, body_timeout_s=0.01)
        admission = Admission(limits, door.line, door.estimate, 1, lambda: door.now_s)
        with admission.admit(NEVER_S, length=10) as ticket:
            ticket.received(3)
            with pytest.raises(BodyTimeout, match=r"3 of 10 bytes of the body came .* it may take 0\.01 s"):
                async with ticket.reading():
                    await asyncio.Event().wait()

    run(body)
    assert door.counts == (0, 0, 0)


def test_a_slow_sender_whose_time_is_up_in_the_same_moment_is_in_nobodys_way() -> None:
    door = Door()

    async def send(admission: Admission) -> None:
        with admission.admit(NEVER_S, length=10) as ticket:
            async with ticket.reading():
                await asyncio.Event().wait()

    async def body() -> None:
        limits = Limits(1, 1000, 400, body_timeout_s=0.01)
        admission = Admission(limits, door.line, door.estimate, 1, lambda: door.now_s)
        sender = asyncio.create_task(send(admission))
        await asyncio.sleep(0)
        door.now_s += 5
        let_in: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def enter() -> None:
            try:
                admission.admit(NEVER_S).leave()
                let_in.set_result(None)
            except Exception as error:
                let_in.set_exception(error)

        asyncio.get_running_loop().call_later(0.01, enter)
        time.sleep(0.05)  # so that both are due in one turn of the loop, the sender's end first
        await let_in
        with pytest.raises(BodyTimeout):
            await sender

    run(body)


@pytest.mark.parametrize(
    ("needs", "after_s", "slow"),
    [
        ("a place", 0.2, []),  # in its first moment nobody is slow
        ("a place", 0.9, ["silent"]),
        ("a place", 2.5, ["silent", "slow"]),
        ("bytes", 0.2, []),
        ("bytes", 0.9, ["silent"]),  # who has sent nothing: that makes no room
        ("bytes", 2.5, ["silent", "slow"]),
    ],
)
def test_slow_senders_give_way_when_their_places_are_needed(needs: str, after_s: float, slow: list[str]) -> None:
    door = Door(images=3, queued_bytes=240_000 if needs == "bytes" else 10_000_000)
    door.estimate.observe(CANVAS, images=1, seconds=2.0)
    ended: list[str] = []

    async def send(name: str, received: int) -> None:
        try:
            with door.admission.admit(NEVER_S, length=20_000) as ticket:
                async with ticket.reading():
                    if received:
                        ticket.received(received)
                    await asyncio.Event().wait()
        except BodyTimeout:
            ended.append(name)

    async def body() -> None:
        sent = {"silent": 0, "slow": 30_000, "steady": 200_000}
        senders = [asyncio.create_task(send(*each)) for each in sent.items()]
        await asyncio.sleep(0)
        door.now_s += after_s
        assert door.admission.waiting == 3  # slow, and in nobody's way
        held = sum(received for name, received in sent.items() if name not in slow)
        length = 20_000 if needs == "bytes" else 0
        if held + length <= 240_000 and slow:
            with door.admission.admit(NEVER_S, length=length):
                assert (door.admission.waiting, door.admission.held_bytes) == (3 - len(slow) + 1, held)
        else:
            with pytest.raises(QueueFull):
                door.admission.admit(NEVER_S, length=length)
        for _ in range(10):
            await asyncio.sleep(0.001)
        assert ended == slow
        for task in senders:
            task.cancel()
        await asyncio.gather(*senders, return_exceptions=True)

    run(body)
    assert door.counts == (0, 0, 0)


def test_nobody_gives_way_to_who_is_refused_all_the_same() -> None:
    door = Door(images=2)
    door.estimate.observe(CANVAS, images=1, seconds=2.0)

    async def body() -> None:
        with door.admission.admit(NEVER_S, length=100) as ticket:
            async with ticket.reading():
                door.now_s += 5
                door.dispatched(door.admission.admit(NEVER_S))
                with pytest.raises(DeadlineUnmeetable):
                    door.admission.admit(door.now_s + 0.001)
                door.admission.admit(NEVER_S, "batch")
                with pytest.raises(QueueFull):
                    door.admission.admit(NEVER_S, "batch")

    run(body)


def test_who_gave_way_in_the_moment_that_the_rest_came_is_not_inside() -> None:
    door = Door(images=1)

    async def read(ticket: Ticket) -> None:
        async with ticket.reading():
            door.now_s += 5
            door.admission.admit(NEVER_S)

    async def body() -> None:
        with door.admission.admit(NEVER_S, length=100) as ticket:
            with pytest.raises(BodyTimeout):
                await read(ticket)
            assert door.admission.waiting == 1

    run(body)


@pytest.mark.parametrize(
    ("given", "expected"),
    [(None, "interactive"), ("interactive", "interactive"), ("batch", "batch"), (" Batch ", "batch")],
)
def test_priorities(given: str | None, expected: str) -> None:
    assert priority(Headers({"X-Priority": given} if given else {})) == expected


@pytest.mark.parametrize("given", ["urgent", "", "0", "interactive, batch"])
def test_priorities_that_are_none(given: str) -> None:
    with pytest.raises(BadParameter, match=f"X-Priority: '{given}' is neither interactive nor batch"):
        priority(Headers({"X-Priority": given}))


@pytest.mark.parametrize(("given", "expected"), [("250", 250), ("0.5", 0.5), (None, 99)])
def test_timeouts(given: str | None, expected: float) -> None:
    assert timeout_ms(Headers({"X-Timeout-Ms": given} if given else {}), 99) == expected


@pytest.mark.parametrize("given", ["1_000", "0", "-1", "soon", "nan", "inf", "1e99", ""])
def test_timeouts_that_are_none(given: str) -> None:
    with pytest.raises(BadParameter, match="X-Timeout-Ms"):
        timeout_ms(Headers({"X-Timeout-Ms": given}), 99)


@pytest.mark.parametrize(
    ("given", "expected"), [(None, None), ("10", 10), ("0", 0), ("many", None), ("-1", None), ("0" * 5000 + "7", 7)]
)
def test_lengths(given: str | None, expected: int | None) -> None:
    assert body_length(Headers({"Content-Length": given} if given else {}), 10) == expected


@pytest.mark.parametrize("given", ["11", "9" * 5000, "0" * 30 + "11"])
def test_length_is_refused_by_the_header(given: str) -> None:
    with pytest.raises(BodyTooLarge, match="exceed 10"):
        body_length(Headers({"Content-Length": given}), 10)
