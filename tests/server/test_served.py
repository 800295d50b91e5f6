"""One bundle at work: who uses it, and whether it is to be trusted."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from bundle import Canvas
from server.errors import EngineFailed
from server.estimate import Estimate
from server.metrics import Metrics
from server.served import Opened, Served
from server.settings import Settings
from tests.server.bench import NEVER_S, WIDE, Bench
from tests.server.fake_engine import POISON, FakeEngine

TALL = Canvas(height=96, width=64)


def run(test: Callable[[Served, FakeEngine], Awaitable[None]], **settings: Any) -> None:
    async def body() -> None:
        engine = FakeEngine()
        served = Served(Opened([engine]), Settings(bundle="none", **settings), Metrics(), lambda: 0.0)  # type: ignore[arg-type]
        try:
            await asyncio.wait_for(test(served, engine), 20)
        finally:
            engine.gate.set()
            await served.close()
            assert engine.closed

    asyncio.run(body())


async def infer(served: Served, corner: int = 0) -> None:
    await served.infer(Bench.image(None, corner=corner), NEVER_S, lambda: None, "interactive")  # type: ignore[arg-type]


def test_it_is_unused_when_the_last_request_has_left() -> None:
    async def test(served: Served, engine: FakeEngine) -> None:
        await served.unused()
        with served.used():
            waiting = asyncio.create_task(served.unused())
            with served.used():
                pass
            await asyncio.sleep(0)
            assert not waiting.done()
        await waiting
        with pytest.raises(ValueError, match="whatever"), served.used():
            raise ValueError("whatever")
        await served.unused()

    run(test)


def test_images_that_the_engine_fails_on_are_counted_apart() -> None:
    async def test(served: Served, engine: FakeEngine) -> None:
        for _ in range(2):
            await infer(served)
        for number in range(1, 4):
            assert served.suspicion() is None
            with pytest.raises(EngineFailed):
                await infer(served, POISON)
            assert (served.answered, served.failed) == (2, number)
        assert served.suspicion() == "its engine failed on 3 of 5 images"

    run(test)


def test_an_engine_that_was_lost_is_a_reason_by_itself() -> None:
    async def test(served: Served, engine: FakeEngine) -> None:
        engine.trouble = "raise"
        with pytest.raises(EngineFailed):
            await infer(served)
        assert served.suspicion() == "its engine died or hung"

    run(test)


def test_an_engine_that_was_handed_over_was_not_asked() -> None:
    async def test(served: Served, engine: FakeEngine) -> None:
        (verdict,) = served.verdicts
        assert (verdict.engine, verdict.result) == ("fake", "not asked")

    run(test)


def test_an_estimate_takes_over_what_is_known_of_pictures_and_nothing_of_batches() -> None:
    old, new = Estimate(1), Estimate(1)
    for _ in range(60):
        old.observe_decoding(WIDE, 0.01)
    for _ in range(30):
        old.observe_decoding(Canvas(height=1, width=1), 0.01)
    old.observe(WIDE, 1, 5.0)
    new.observe(WIDE, 1, 1.0)
    new.observe(TALL, 1, 2.0)
    new.take_over(old)
    assert new.decode_s == old.decode_s == 0.01
    assert new.batch_s(WIDE, 1) == 1.0
    assert new.mix() == {WIDE: 1.0}, "a canvas that the new bundle lacks does not count"
    new.observe_decoding(TALL, 0.5)
    assert old.mix()[WIDE] < 1
    assert TALL not in old.mix(), "they share nothing"


def test_with_no_canvas_in_common_all_are_as_likely() -> None:
    old, new = Estimate(1), Estimate(1)
    old.observe_decoding(Canvas(height=1, width=1), 0.01)
    for canvas in (WIDE, TALL):
        new.observe(canvas, 1, 1.0)
    new.take_over(old)
    assert new.mix() == {WIDE: 0.5, TALL: 0.5}
