"""Engines that raise, die, hang or are slow: who is answered, what is replaced, and what health says meanwhile."""

import asyncio
import random
import threading

import pytest

from server.batch_queue import Inferred, Priority
from server.batcher import CHECK_EVERY_S
from server.engine import Engine
from server.errors import DeadlinePassed, EngineFailed, Unavailable
from server.lane import MOST_ABANDONED
from server.runner import Runner
from tests.server.bench import NEVER_S, TALL, WIDE, Bench, left_edge_px, run, settle, until
from tests.server.fake_engine import LETHAL, MANIFEST, POISON, TAR, FakeEngine

COLUMNS = (8, 16, 24, 32)


async def submit_batch(bench: Bench, corners: tuple[int, ...]) -> list["asyncio.Task[Inferred]"]:
    """One batch of images with these first pixels, all waiting behind a first image."""
    first = await bench.hold()
    tasks = [bench.submit(bench.image(column, corner=corner)) for column, corner in zip(COLUMNS, corners, strict=False)]
    await settle()
    bench.engine.gate.set()
    await first
    return tasks


async def only_fails(tasks: list["asyncio.Task[Inferred]"], corners: tuple[int, ...], message: str) -> None:
    """All have their boxes but those whose first pixel is not black."""
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    for answer, column, corner in zip(answers, COLUMNS, corners, strict=False):
        if corner:
            assert isinstance(answer, EngineFailed), answer
            assert message in answer.message
        else:
            assert isinstance(answer, Inferred), answer
            assert left_edge_px(answer) == pytest.approx(column)


async def answers_of(bench: Bench, tasks: list["asyncio.Task[Inferred]"]) -> None:
    """Wait for all; time passes for the batcher only while its engine hangs or is down."""
    while not all(task.done() for task in tasks):
        if not bench.batcher.works or not bench.opened[-1].gate.is_set():
            await bench.pass_time(CHECK_EVERY_S)
        await asyncio.sleep(0)


async def hang(bench: Bench) -> None:
    """Make the engine hang on an image that nobody waits for, until that is noticed."""
    task = bench.submit(bench.image(corner=TAR))
    await until(lambda: not bench.opened[-1].gate.is_set())
    await until(lambda: bench.batcher.waiting == 0)
    task.cancel()
    before = bench.restarts("hung")
    while bench.restarts("hung") == before:
        await bench.pass_time(CHECK_EVERY_S)


def test_a_bad_image_is_no_reason_to_replace_an_engine() -> None:
    async def test(bench: Bench) -> None:
        corners = (0, POISON, 0, 0)
        await only_fails(await submit_batch(bench, corners), corners, "the engine failed on this image: RuntimeError")
        assert (bench.restarts("died"), len(bench.opened)) == (0, 1)
        assert bench.batcher.trouble() is None

    run(test, reopen=True)


def test_the_error_of_an_image_carries_the_engines_own() -> None:
    async def test(bench: Bench) -> None:
        with pytest.raises(EngineFailed) as caught:
            await bench.submit(bench.image(corner=POISON))
        assert str(caught.value.__cause__) == "poison"

    run(test)


@pytest.mark.parametrize("trouble", ["raise", "nan", "shape", "exit"])
def test_an_engine_that_dies_is_replaced_and_its_images_are_tried_once_more(trouble: str) -> None:
    async def test(bench: Bench) -> None:
        first = await bench.hold()
        tasks = [bench.submit(bench.image(column)) for column in COLUMNS]
        await until(lambda: bench.engine.prepared == [1, 4])
        bench.engine.trouble = trouble
        bench.engine.gate.set()
        await only_fails(tasks, (0, 0, 0, 0), "")
        assert left_edge_px(await first) == 8
        old, new = bench.opened
        assert bench.restarts("died") == 1
        assert bench.batcher.works
        # Warm first; then what it was lost with, alone; then the batch that had not begun.
        assert {canvas for _, canvas in new.batches[: 2 * len(MANIFEST.canvases)]} == set(MANIFEST.canvases)
        assert [size for size, _ in new.batches[2 * len(MANIFEST.canvases) :]] == [1, 4]
        await until(lambda: old.closed)

    run(test, reopen=True)


@pytest.mark.parametrize("position", range(4))
def test_an_image_that_kills_engines_costs_only_its_own_request(position: int) -> None:
    async def test(bench: Bench) -> None:
        corners = tuple(LETHAL if slot == position else 0 for slot in range(4))
        tasks = await submit_batch(bench, corners)
        await answers_of(bench, tasks)
        await only_fails(tasks, corners, "lost with this image, twice")
        assert bench.restarts("died") == 2
        await bench.pass_time(1)
        await until(lambda: bench.batcher.works)
        assert left_edge_px(await bench.submit(bench.image(40))) == pytest.approx(40)

    run(test, reopen=True)


@pytest.mark.parametrize("position", range(4))
def test_an_image_that_hangs_engines_costs_only_its_own_request(position: int) -> None:
    async def test(bench: Bench) -> None:
        corners = tuple(TAR if slot == position else 0 for slot in range(4))
        tasks = await submit_batch(bench, corners)
        await answers_of(bench, tasks)
        await only_fails(tasks, corners, "lost with this image, twice")
        assert bench.restarts("hung") == 2
        await bench.pass_time(1)
        await until(lambda: bench.batcher.works)
        assert left_edge_px(await bench.submit(bench.image(40))) == pytest.approx(40)

    run(test, reopen=True)


def test_a_hang_is_seen_within_two_seconds_and_health_follows() -> None:
    async def test(bench: Bench) -> None:
        bench.open_engine.gate.clear()  # the next engine takes its time
        task = await bench.hold()
        await bench.pass_time(1.4)
        assert (bench.batcher.works, bench.batcher.trouble()) == (True, None)
        await bench.pass_time(0.5)
        assert (bench.batcher.works, bench.batcher.trouble()) == (False, "no progress in inference")
        assert bench.restarts("hung") == 1
        bench.open_engine.gate.set()
        assert left_edge_px(await task) == 8  # though the first engine still holds its copy
        assert (bench.batcher.works, bench.batcher.trouble()) == (True, None)
        assert len(bench.opened) == 2

    run(test, reopen=True)


def test_the_late_answer_of_an_engine_that_was_given_up_is_not_listened_to() -> None:
    async def test(bench: Bench) -> None:
        bench.open_engine.gate.clear()
        task = await bench.hold()
        behind = [bench.submit(bench.image()) for _ in range(4)]
        await until(lambda: bench.engine.prepared == [1, 4])
        await bench.pass_time(2)
        sizes = bench.metrics.exposition().decode().count
        bench.engine.gate.set()
        assert bench.engine.left.acquire(timeout=10)
        await until(lambda: bench.engine.closed)  # and its thread is let go
        assert not task.done()
        assert bench.engine.batches == [(1, WIDE)]  # it does not go on with what was prepared for it
        assert bench.batcher.waiting == 5
        bench.open_engine.gate.set()
        await asyncio.gather(task, *behind)
        assert sizes('ddetr_batches_total{reason="idle"} 1.0')
        assert bench.estimate.batch_s(WIDE, 1) is not None
        assert bench.restarts("hung") == 1

    run(test, reopen=True)


def test_a_slow_engine_is_not_a_hung_one() -> None:
    async def test(bench: Bench) -> None:
        bench.estimate.observe(WIDE, 1, 2.0)
        task = await bench.hold()
        await bench.pass_time(9)
        assert (bench.batcher.works, bench.batcher.trouble()) == (True, None)
        bench.engine.gate.set()
        await task
        assert bench.restarts("hung") == 0

    run(test, reopen=True)


def test_what_was_slow_and_not_stuck_is_not_called_a_hang_again() -> None:
    async def test(bench: Bench) -> None:
        slow = await bench.hold()
        await bench.pass_time(3)
        assert bench.restarts("hung") == 1
        bench.engine.gate.set()
        await slow
        assert (bench.estimate.batch_s(WIDE, 1) or 0) > 1
        bench.engine.gate.clear()
        again = bench.submit(bench.image())
        await settle()
        await until(lambda: bench.batcher.waiting == 0)
        await bench.pass_time(3)
        assert bench.restarts("hung") == 1
        bench.engine.gate.set()
        await again

    run(test)


def test_every_call_of_a_batch_has_time_of_its_own() -> None:
    async def test(bench: Bench) -> None:
        bench.engine.gate.clear()
        task = bench.submit(bench.image(corner=POISON))
        for _ in range(2):  # the image, and the blank picture
            await asyncio.to_thread(bench.engine.entered.acquire)
            await bench.pass_time(1.2)
            bench.engine.gate.set()
            await asyncio.to_thread(bench.engine.left.acquire)
            bench.engine.gate.clear()
        with pytest.raises(EngineFailed, match="failed on this image"):
            await task
        assert bench.restarts("hung") == 0

    run(test, reopen=True)


def test_a_process_that_was_stopped_does_not_take_its_engine_for_hung() -> None:
    async def test(bench: Bench) -> None:
        task = await bench.hold()
        bench.clock.now_s += 3600
        bench.batcher.check()
        await bench.pass_time(1)
        assert bench.batcher.works
        bench.engine.gate.set()
        await task
        assert bench.restarts("hung") == 0

    run(test, reopen=True)


def test_a_hang_in_preparing_is_one_too() -> None:
    async def test(bench: Bench) -> None:
        gate, prepare = threading.Event(), bench.engine.prepare
        bench.engine.prepare = lambda images, canvas: gate.wait(30) and prepare(images, canvas)  # type: ignore
        task = bench.submit(bench.image())
        await settle()
        await until(lambda: bench.batcher.waiting == 0)
        while not bench.restarts("hung"):
            await bench.pass_time(CHECK_EVERY_S)
        assert left_edge_px(await task) == 8
        gate.set()

    run(test, reopen=True)


def test_an_engine_that_raises_in_preparing_dies_like_any_other() -> None:
    async def test(bench: Bench) -> None:
        bench.engine.trouble = "prepare"
        assert left_edge_px(await bench.submit(bench.image())) == 8
        assert (bench.restarts("died"), len(bench.opened)) == (1, 2)

    run(test, reopen=True)


def test_threads_that_hang_are_bounded_and_then_health_stays_bad() -> None:
    async def test(bench: Bench) -> None:
        for lost in range(1, MOST_ABANDONED + 2):
            await hang(bench)
            assert bench.restarts("hung") == lost
            if lost <= MOST_ABANDONED:
                await until(lambda: bench.batcher.works)
                await bench.submit(bench.image())
                assert bench.batcher.trouble() is None
        assert not bench.batcher.works
        assert bench.batcher.trouble() == f"{MOST_ABANDONED + 1} engines hang"
        await bench.pass_time(100)
        assert len(bench.opened) == 1 + MOST_ABANDONED
        with pytest.raises(Unavailable, match="no engine is left"):
            await bench.submit(bench.image())
        for engine in bench.opened:
            engine.gate.set()
        await bench.pass_time(1)
        assert bench.batcher.trouble() is not None

    run(test, reopen=True)


def test_a_thread_that_comes_back_is_not_counted() -> None:
    async def test(bench: Bench) -> None:
        for lost in range(2 * MOST_ABANDONED):
            await hang(bench)
            bench.opened[lost].gate.set()
            await until(lambda lost=lost: bench.opened[lost].closed)  # type: ignore[misc]
            await until(lambda: bench.batcher.works)
            await bench.submit(bench.image())
        assert bench.batcher.trouble() is None

    run(test, reopen=True)


def test_an_engine_that_cannot_be_opened_is_tried_less_and_less_often() -> None:
    async def test(bench: Bench) -> None:
        tries: list[float] = []
        bench.open_engine.trouble = "open"
        open_engine = bench.open_engine.__call__
        lane = bench.batcher._lanes[0]

        def watched() -> Engine:
            tries.append(round(bench.clock.now_s, 1))
            return open_engine()

        lane._reopen = watched
        bench.engine.trouble = "raise"
        task = bench.submit(bench.image())
        with pytest.raises(EngineFailed, match="cannot be restarted"):
            await task
        waits = bench.submit(bench.image(), deadline_s=bench.clock.now_s + 20)
        began_s = tries[0]
        while len(tries) < 9:
            await bench.pass_time(CHECK_EVERY_S)
            await until(lambda: lane._opening is None)
        assert bench.batcher.trouble() is not None
        gaps = [after - before for before, after in zip(tries, tries[1:], strict=False)]
        assert gaps == pytest.approx([0.5, 1, 2, 4, 8, 16, 30, 30], abs=0.25)
        assert tries[0] == began_s
        bench.open_engine.trouble = None
        await bench.pass_time(31)
        await until(lambda: bench.batcher.works)
        with pytest.raises(DeadlinePassed):
            await waits
        assert left_edge_px(await bench.submit(bench.image())) == 8
        assert bench.batcher.trouble() is None

    run(test, reopen=True)


def test_nobody_waits_for_an_engine_that_cannot_be_opened_beside_one_out_of_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def test(bench: Bench) -> None:
        monkeypatch.setattr("server.lane.MOST_ABANDONED", 0)
        given_up = await bench.hold()
        given_up.cancel()
        await bench.pass_time(3)
        assert bench.batcher.trouble() == "1 engines hang"
        bench.open_engine.trouble = "open"
        bench.engines[1].trouble = "raise"
        with pytest.raises(EngineFailed, match="cannot be restarted"):
            await bench.submit(bench.image())

    run(test, engines=2, reopen=True)


def test_an_engine_for_which_there_is_no_thread_is_opened_later(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(bench: Bench) -> None:
        def no_runner(*_: object) -> Runner:
            raise RuntimeError("can't start new thread")

        task = await bench.hold()
        with monkeypatch.context() as short:
            short.setattr("server.lane.Runner", no_runner)
            await bench.pass_time(3)
            assert not bench.batcher.works
        with pytest.raises(EngineFailed, match="cannot be restarted"):
            await task
        await bench.pass_time(5)
        await until(lambda: bench.batcher.works)
        assert left_edge_px(await bench.submit(bench.image())) == 8

    run(test, reopen=True)


def test_an_engine_that_stays_away_is_reported_even_if_nobody_asks_for_it() -> None:
    async def test(bench: Bench) -> None:
        bench.open_engine.trouble = "open"
        bench.engine.trouble = "raise"
        with pytest.raises(EngineFailed):
            await bench.submit(bench.image())
        await bench.pass_time(50)
        assert bench.batcher.trouble() is None
        await bench.pass_time(20)
        assert "an engine has been down for" in str(bench.batcher.trouble())

    run(test, reopen=True)


def test_images_that_wait_while_an_engine_is_opened_are_served_then() -> None:
    async def test(bench: Bench) -> None:
        bench.open_engine.gate.clear()
        bench.engine.trouble = "raise"
        lost = bench.submit(bench.image(16))
        await until(lambda: not bench.batcher.works)
        waiting = [bench.submit(bench.image(24)) for _ in range(2)]
        late = bench.submit(bench.image(), deadline_s=bench.clock.now_s + 1)
        await settle()
        assert bench.batcher.waiting == 4
        await bench.pass_time(1.2)
        bench.open_engine.gate.set()
        assert [left_edge_px(await task) for task in (lost, *waiting)] == pytest.approx([16, 24, 24])
        with pytest.raises(DeadlinePassed):
            await late

    run(test, reopen=True)


def test_another_engine_takes_over_what_one_was_lost_with() -> None:
    async def test(bench: Bench) -> None:
        bench.open_engine.gate.clear()
        for engine in bench.engines:
            engine.gate.clear()
        tasks = [bench.submit(bench.image(column)) for column in (8, 16)]
        await asyncio.gather(*(asyncio.to_thread(engine.entered.acquire) for engine in bench.engines))
        tasks += [bench.submit(bench.image(24)) for _ in range(8)]
        await until(lambda: bench.batcher.waiting == 8)
        bench.engines[0].trouble = "raise"
        for engine in bench.engines:
            engine.gate.set()
        assert [left_edge_px(answer) for answer in await asyncio.gather(*tasks)] == pytest.approx([8, 16] + [24] * 8)
        assert bench.batcher.works
        assert bench.batcher.trouble() is None
        assert bench.restarts("died") == 1

    run(test, engines=2, reopen=True)


def test_another_bundle_is_not_slipped_in() -> None:
    async def test(bench: Bench) -> None:
        other = MANIFEST.model_copy(update={"categories": {1: "cat"}})
        bench.batcher._lanes[0]._reopen = lambda: FakeEngine(other)
        bench.engine.trouble = "raise"
        with pytest.raises(EngineFailed, match="cannot be restarted"):
            await bench.submit(bench.image())
        assert not bench.batcher.works

    run(test, reopen=True)


def test_an_engine_given_as_an_object_is_used_again_when_it_answers() -> None:
    async def test(bench: Bench) -> None:
        bench.engine.trouble = "nan"
        with pytest.raises(EngineFailed):
            await bench.submit(bench.image())
        bench.engine.trouble = None
        await bench.pass_time(1)
        await until(lambda: bench.batcher.works)
        assert left_edge_px(await bench.submit(bench.image(16))) == pytest.approx(16)
        assert not bench.engine.closed

    run(test)


def test_an_engine_given_as_an_object_is_used_again_when_it_comes_back_from_hanging() -> None:
    async def test(bench: Bench) -> None:
        task = await bench.hold()
        await bench.pass_time(5)
        assert (bench.batcher.works, bench.batcher.trouble()) == (False, "no progress in inference")
        assert len(bench.engine.batches) == 1  # nothing else is asked of it
        bench.engine.gate.set()
        assert left_edge_px(await task) == 8
        assert (bench.batcher.works, bench.batcher.trouble()) == (True, None)
        assert len(bench.engine.threads["infer"]) == 1

    run(test)


def test_closing_with_an_engine_being_opened_leaves_nobody_waiting() -> None:
    async def test(bench: Bench) -> None:
        bench.open_engine.gate.clear()
        bench.engine.trouble = "raise"
        tasks = [bench.submit(bench.image(canvas=canvas), NEVER_S) for canvas in (WIDE, TALL)]
        await until(lambda: not bench.batcher.works)
        await bench.batcher.close()
        answers = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), timeout=5)
        assert all(isinstance(answer, Exception) for answer in answers)
        bench.open_engine.gate.set()
        await until(lambda: len(bench.opened) == 2 and bench.opened[1].closed)

    run(test, reopen=True)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("engines", "lethal"), [(1, TAR), (1, LETHAL), (3, LETHAL)])
def test_whatever_comes_everyone_gets_what_is_theirs(engines: int, lethal: int, seed: int) -> None:
    chance = random.Random(seed)

    async def test(bench: Bench) -> None:
        tasks: list[tuple[asyncio.Task[Inferred], int, int]] = []
        deadly = set(chance.sample(range(120), 1 if lethal == TAR else 2))  # each takes two engines down
        for number in range(120):
            column = chance.choice(COLUMNS)
            corner = lethal if number in deadly else POISON if chance.random() < 0.05 else 0
            priority: Priority = "batch" if chance.random() < 0.5 else "interactive"
            image = bench.image(column, corner=corner)
            tasks.append((bench.submit(image, priority=priority), column, corner))
            if chance.random() < 0.1:
                chance.choice(tasks)[0].cancel()
            if chance.random() < 0.3:
                await settle()
        await answers_of(bench, [task for task, _, _ in tasks])
        for task, column, corner in tasks:
            if task.cancelled():
                continue
            if corner:
                assert isinstance(task.exception(), EngineFailed)
            else:
                assert left_edge_px(task.result()) == column
        assert bench.batcher.waiting == 0
        while not bench.batcher.works:
            await bench.pass_time(CHECK_EVERY_S)
        assert left_edge_px(await bench.submit(bench.image(16))) == 16
        assert bench.batcher.trouble() is None
        assert len(bench.opened) <= engines + 4

    run(test, engines=engines, reopen=True)
