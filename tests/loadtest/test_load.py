"""The generator, in virtual time against servers that are a few lines."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from loadtest.arrivals import Arrival
from loadtest.client import OK, REFUSED, Answer
from loadtest.load import GONE_AFTER, Load, Sample
from loadtest.payload import Payload
from tests.loadtest.virtual_time import run_in_virtual_time

PAYLOADS = [Payload(name, name.encode(), "image/jpeg") for name in ("a", "b")]
TICK_S = 0.0011  # the generator counts in milliseconds

Make = Callable[..., Load]


def run(
    detect: Callable[[Payload], Coroutine[Any, Any, Answer]],
    drive: Callable[[Load], Coroutine[Any, Any, None]],
    connections: int = 100,
    retries: int = 0,
) -> Load:
    async def main(clock: Callable[[], float]) -> Load:
        load = Load(detect, PAYLOADS, connections, retries, clock)
        await drive(load)
        return load

    return run_in_virtual_time(main)


def every(seconds: float, number: int) -> list[Arrival]:
    return [Arrival(seconds * index, index % 2) for index in range(number)]


async def ok(payload: Payload) -> Answer:
    await asyncio.sleep(0.02)
    return Answer(OK)


def test_requests_go_when_they_are_due_and_carry_their_payload() -> None:
    seen: list[str] = []

    async def detect(payload: Payload) -> Answer:
        seen.append(payload.name)
        return await ok(payload)

    load = run(detect, lambda load: load.open_loop(every(0.01, 5)))
    assert seen == ["a", "b", "a", "b", "a"]
    for sample, due_s in zip(load.samples, (0.0, 0.01, 0.02, 0.03, 0.04), strict=True):
        assert sample.due_s == due_s
        assert 0 <= sample.sent_s - due_s < TICK_S
        assert sample.latency_ms == pytest.approx(20, abs=1.2)


def test_open_loop_shows_the_waiting_that_a_slow_server_causes() -> None:
    busy = asyncio.Lock()

    async def one_at_a_time(payload: Payload) -> Answer:
        async with busy:
            await asyncio.sleep(0.1)
        return Answer(OK)

    load = run(one_at_a_time, lambda load: load.open_loop(every(0.05, 10)))  # twice what it can do
    latencies = [sample.latency_ms for sample in load.samples]
    assert latencies[0] == pytest.approx(100, abs=2)
    assert latencies[-1] == pytest.approx(1000 - 450, abs=15)  # done after 10 x 100 ms, due after 450
    assert load.in_flight_peak >= 5


def test_a_generator_held_up_is_late_and_its_latency_says_so() -> None:
    async def main(clock: Callable[[], float]) -> Load:
        load = Load(ok, PAYLOADS, 100, clock=clock)
        loop = asyncio.get_running_loop()

        def hold_up() -> None:
            loop._now_s += 0.5  # type: ignore[attr-defined]  # as a stolen CPU would

        loop.call_later(0.015, hold_up)
        await load.open_loop(every(0.01, 4))
        return load

    samples = run_in_virtual_time(main).samples
    assert samples[1].sent_s - samples[1].due_s < TICK_S
    assert samples[2].sent_s - samples[2].due_s == pytest.approx(0.495, abs=0.002)
    assert samples[2].latency_ms == pytest.approx(515, abs=3)


def test_closed_loop_keeps_so_many_on_their_way() -> None:
    load = run(ok, lambda load: load.closed_loop(3, 1.0, seed=0))
    assert load.in_flight_peak == 3
    assert len(load.samples) == pytest.approx(150, abs=3)
    assert {sample.due_s == sample.sent_s for sample in load.samples} == {True}


def answers(*given: Answer) -> Callable[[Payload], Coroutine[Any, Any, Answer]]:
    left = iter(given)

    async def detect(payload: Payload) -> Answer:
        return next(left)

    return detect


def sent_once(load: Load) -> Coroutine[Any, Any, None]:
    return load.open_loop([Arrival(0.0, 0)])


FULL = Answer("429 queue_full", retry_after_s=2.0)


@pytest.mark.parametrize(
    ("given", "retries", "outcome", "tries", "seconds"),
    [
        ([FULL, FULL, Answer(OK)], 3, OK, 3, 4.0),
        ([FULL, FULL, Answer(OK)], 1, "429 queue_full", 2, 2.0),
        ([FULL], 0, "429 queue_full", 1, 0.0),
        ([Answer("500 engine_failed")], 3, "500 engine_failed", 1, 0.0),
    ],
)
def test_retry_after_is_honoured_when_asked(
    given: Sequence[Answer], retries: int, outcome: str, tries: int, seconds: float
) -> None:
    [sample] = run(answers(*given), sent_once, retries=retries).samples
    assert (sample.outcome, sample.tries) == (outcome, tries)
    assert sample.latency_ms == pytest.approx(seconds * 1e3, abs=1.2)  # since it was first due


def test_waiting_to_try_again_takes_no_connection() -> None:
    given = [FULL, Answer(OK), FULL, Answer(OK)]
    load = run(answers(*given), lambda load: load.open_loop(every(0.1, 2)), connections=1, retries=1)
    assert load.waited_for_connection == 0
    assert load.in_flight_peak == 1


def test_requests_without_a_free_connection_are_counted() -> None:
    load = run(ok, lambda load: load.open_loop(every(0.001, 4)), connections=2)
    assert load.waited_for_connection == 2


def test_a_server_that_went_away_ends_the_run() -> None:
    sent = 0

    async def detect(payload: Payload) -> Answer:
        nonlocal sent
        sent += 1
        return Answer(OK if sent == 10 else REFUSED)

    load = run(detect, lambda load: load.open_loop(every(0.01, 10_000)))
    assert load.gone
    assert 10 + GONE_AFTER <= sent < 10 + GONE_AFTER + 5
    sent = 10
    assert run(detect, lambda load: load.closed_loop(4, 100.0, seed=0)).gone


def test_latency_is_since_due() -> None:
    assert Sample(due_s=1.0, sent_s=1.5, done_s=2.0, outcome=OK).latency_ms == 1000
