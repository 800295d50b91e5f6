"""One bundle at work: who uses it, and whether it is to be trusted."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bundle import Canvas
from server.errors import EngineFailed
from server.estimate import Estimate
from server.gate import Proven, Verdict
from server.metrics import Metrics
from server.served import Opened, Served, open_bundle
from server.settings import Settings
from server.worker import Worker
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


# Opened from a folder


class Proving:
    """Stands in for `open_proven`: notes what it is asked for, and says what it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds: list[float | None] = []
        self.compared: list[object] = []
        self.verdict = Verdict("fake", "passed")
        monkeypatch.setattr("server.served.read_bundle", lambda path: None)
        monkeypatch.setattr("server.served.open_proven", self)

    def __call__(
        self, settings: Settings, bundle: object, metrics: Metrics, seconds: float, compared: object, *_: object
    ) -> Proven:
        self.seconds.append(seconds)
        self.compared.append(compared)
        return Proven(FakeEngine(), replace(self.verdict, engine=threading.current_thread().name))


def test_engines_lost_at_once_each_have_their_verdict(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    second_reads, first_wrote = threading.Event(), threading.Event()

    class Slow(Opened):
        """The second engine's opener dawdles once it has read what is known of the first one."""

        @property
        def verdicts(self) -> tuple[Verdict, ...]:
            known = self._known
            if threading.current_thread().name == "second" and not second_reads.is_set():
                second_reads.set()
                first_wrote.wait(0.3)
            return known

        @verdicts.setter
        def verdicts(self, verdicts: tuple[Verdict, ...]) -> None:
            self._known = verdicts
            if threading.current_thread().name == "first":
                first_wrote.set()

    Proving(monkeypatch)
    monkeypatch.setattr("server.served.Opened", Slow)
    opened = open_bundle(Settings(bundle=tmp_path, engine_instances=2), tmp_path, Metrics(), 0.0)
    first, second = Worker("first"), Worker("second")
    reopened = [second.submit(opened.reopen[1])]
    assert second_reads.wait(30)
    reopened.append(first.submit(opened.reopen[0]))
    for each in reopened:
        each.result(30)
    first.stop()
    second.stop()
    assert [verdict.engine for verdict in opened.verdicts] == ["first", "second"]


def test_an_engine_in_a_lost_ones_place_is_compared_as_one_of_its_kind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    proving = Proving(monkeypatch)
    opened = open_bundle(Settings(bundle=tmp_path, gate_seconds=3.0), tmp_path, Metrics(), 60.0)
    opened.reopen[0]()
    assert proving.seconds == [60.0, 3.0], "a kind that is new here has the time of a start"
    assert proving.compared[0] is proving.compared[1]


def test_one_that_cannot_be_closed_keeps_no_other_from_it(caplog: pytest.LogCaptureFixture) -> None:
    class Stuck(FakeEngine):
        def close(self) -> None:
            raise RuntimeError("an illegal memory access")

    engines = [Stuck(), FakeEngine()]
    Opened(engines).close()
    assert engines[1].closed
    assert "fake could not be closed" in caplog.text
