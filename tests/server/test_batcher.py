"""The batcher's rules, with an engine that waits at a gate and a clock that is moved by hand. Nothing sleeps."""

import asyncio
import gc
import weakref

import pytest

from server.batch_queue import Inferred
from server.errors import DeadlinePassed, Draining, EngineFailed
from tests.server.bench import NEVER_S, TALL, WIDE, Bench, left_edge_px, run, settle, until
from tests.server.fake_engine import LETHAL, MANIFEST, POISON


def test_one_image_goes_at_once() -> None:
    async def test(bench: Bench) -> None:
        answer = await bench.submit(bench.image(16))
        assert left_edge_px(answer) == pytest.approx(16)
        assert bench.engine.batches == [(1, WIDE)]

    run(test)


def test_batches_grow_while_the_engine_works() -> None:
    async def test(bench: Bench) -> None:
        first = await bench.hold()
        others = [bench.submit(bench.image(column)) for column in (8, 16, 24, 32, 40)]
        await settle()
        assert bench.batcher.waiting == 5
        bench.engine.gate.set()
        answers = await asyncio.gather(first, *others)
        assert [left_edge_px(answer) for answer in answers[1:]] == pytest.approx([8, 16, 24, 32, 40])
        assert bench.engine.batches == [(1, WIDE), (4, WIDE), (1, WIDE)]

    run(test)


def test_engines_are_provided_for_once_a_full_batch_lies_behind_the_one_they_work_on() -> None:
    async def test(bench: Bench) -> None:
        assert not bench.batcher.provided
        tasks = [await bench.hold()]
        for _ in range(4):
            assert not bench.batcher.provided
            tasks.append(bench.submit(bench.image()))
            await settle()
        assert bench.batcher.provided
        bench.engine.gate.set()
        await asyncio.gather(*tasks)
        await settle()
        assert not bench.batcher.provided

    run(test)


def test_an_engine_is_not_provided_for_with_a_batch_that_interactive_work_goes_before() -> None:
    async def test(bench: Bench) -> None:
        tasks = [await bench.hold()]
        tasks += [bench.submit(bench.image(), priority="batch") for _ in range(4)]
        await settle()
        assert bench.batcher.waiting == 4
        assert not bench.batcher.provided
        bench.engine.gate.set()
        await asyncio.gather(*tasks)

    run(test)


def test_canvases_do_not_mix() -> None:
    async def test(bench: Bench) -> None:
        first = await bench.hold()
        others = [bench.submit(bench.image(8, canvas)) for canvas in (WIDE, TALL, WIDE, TALL)]
        await settle()
        bench.engine.gate.set()
        await asyncio.gather(first, *others)
        assert sorted(bench.engine.batches[1:], key=str) == sorted([(2, WIDE), (2, TALL)], key=str)

    run(test)


def test_every_idle_engine_gets_work() -> None:
    async def test(bench: Bench) -> None:
        for engine in bench.engines:
            engine.gate.clear()
        tasks = [bench.submit(bench.image()) for _ in range(2)]
        await asyncio.gather(*(asyncio.to_thread(engine.entered.acquire) for engine in bench.engines))
        for engine in bench.engines:
            engine.gate.set()
        await asyncio.gather(*tasks)
        assert [len(engine.batches) for engine in bench.engines] == [1, 1]

    run(test, engines=2)


def test_reasons_sizes_and_padding_are_counted() -> None:
    async def test(bench: Bench) -> None:
        first = await bench.hold()
        others = [bench.submit(bench.image()) for _ in range(5)]
        await settle()
        bench.clock.now_s += 1.0
        bench.engine.gate.set()
        await asyncio.gather(first, *others)
        text = bench.metrics.exposition().decode()
        assert 'ddetr_batches_total{reason="idle"} 1.0' in text
        assert 'ddetr_batches_total{reason="full"} 1.0' in text
        assert 'ddetr_batches_total{reason="delay"} 1.0' in text
        assert "ddetr_batch_size_sum 6.0" in text
        assert 'ddetr_padding_ratio_bucket{le="0.0"} 3.0' in text

    run(test)


def test_times_come_from_the_clock() -> None:
    async def test(bench: Bench) -> None:
        first = await bench.hold()
        second = bench.submit(bench.image())
        await settle()
        bench.clock.now_s += 2.0
        bench.engine.gate.set()
        assert (await first).inference_ms == pytest.approx(2000)
        assert (await first).queue_ms == 0
        assert (await second).queue_ms == pytest.approx(2000)

    run(test)


def test_an_image_whose_client_has_gone_is_not_inferred() -> None:
    async def test(bench: Bench) -> None:
        first = await bench.hold()
        gone, stays = bench.submit(bench.image()), bench.submit(bench.image())
        await settle()
        gone.cancel()
        await settle()
        assert bench.batcher.waiting == 1
        bench.engine.gate.set()
        await asyncio.gather(first, stays)
        assert bench.engine.batches == [(1, WIDE), (1, WIDE)]

    run(test)


def test_a_storm_of_cancellations_leaves_nothing_behind() -> None:
    async def test(bench: Bench) -> None:
        first = await bench.hold()
        storm = [bench.submit(bench.image()) for _ in range(500)]
        await settle()
        for task in storm:
            task.cancel()
        await asyncio.gather(*storm, return_exceptions=True)
        assert bench.batcher.waiting == 0
        bench.engine.gate.set()
        await first
        assert left_edge_px(await bench.submit(bench.image(24))) == pytest.approx(24)
        assert len(bench.engine.batches) == 2

    run(test)


def test_an_image_past_its_deadline_is_not_inferred() -> None:
    async def test(bench: Bench) -> None:
        first = await bench.hold()
        late = bench.submit(bench.image(), deadline_s=bench.clock.now_s + 1)
        on_time = bench.submit(bench.image(), deadline_s=bench.clock.now_s + 3)
        await settle()
        bench.clock.now_s += 2
        bench.engine.gate.set()
        with pytest.raises(DeadlinePassed):
            await late
        await asyncio.gather(first, on_time)
        assert bench.engine.batches == [(1, WIDE), (1, WIDE)]

    run(test)


@pytest.mark.parametrize("position", range(4))
def test_poison_costs_only_its_own_request(position: int) -> None:
    async def test(bench: Bench) -> None:
        first = await bench.hold()
        images = [bench.image(8 * (index + 1)) for index in range(4)]
        images[position] = bench.image(corner=POISON)
        tasks = [bench.submit(image) for image in images]
        await settle()
        bench.engine.gate.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        await first
        for index, answer in enumerate(answers):
            if index == position:
                assert isinstance(answer, EngineFailed)
                assert "RuntimeError" in answer.message
            else:
                assert isinstance(answer, Inferred)
                assert left_edge_px(answer) == pytest.approx(8 * (index + 1))

    run(test)


def test_dispatch_is_told_when_it_happens() -> None:
    async def test(bench: Bench) -> None:
        first = await bench.hold()
        told: list[int] = []
        second = asyncio.create_task(bench.batcher.infer(bench.image(), NEVER_S, lambda: told.append(1)))
        await settle()
        assert not told
        bench.engine.gate.set()
        await asyncio.gather(first, second)
        assert told == [1]

    run(test)


def test_draining_finishes_what_there_is() -> None:
    async def test(bench: Bench) -> None:
        first = await bench.hold()
        others = [bench.submit(bench.image()) for _ in range(2)]
        await settle()
        bench.batcher.drain()
        late = bench.submit(bench.image())  # its request was admitted before the drain
        await settle()
        bench.engine.gate.set()
        assert len(await asyncio.gather(first, *others, late)) == 4
        assert 'ddetr_batches_total{reason="drain"} 1.0' in bench.metrics.exposition().decode()

    run(test)


def test_closing_leaves_nobody_waiting_even_with_an_engine_that_hangs() -> None:
    async def test(bench: Bench) -> None:
        running = await bench.hold()
        queued = bench.submit(bench.image())
        await settle()
        await bench.batcher.close()
        assert isinstance((await asyncio.gather(running, return_exceptions=True))[0], EngineFailed)
        for refused in (queued, bench.submit(bench.image())):
            with pytest.raises(Draining) as caught:
                await refused
            assert caught.value.retry_after_s == 1

    run(test)


def test_closing_leaves_nobody_waiting_of_a_batch_that_has_not_begun() -> None:
    async def test(bench: Bench) -> None:
        task = bench.submit(bench.image())
        await asyncio.sleep(0)  # it is with the engine's thread, and nothing that this reports has been heard
        await bench.batcher.close()
        with pytest.raises(EngineFailed):
            await asyncio.wait_for(task, timeout=5)

    run(test)


def test_closing_lets_the_engines_go() -> None:
    async def test(bench: Bench) -> None:
        await bench.submit(bench.image())
        await bench.batcher.close()
        while not bench.engine.closed:  # the engine's own thread closes it
            await asyncio.sleep(0)

    run(test)


def test_warming_runs_every_engine_on_every_canvas() -> None:
    async def test(bench: Bench) -> None:
        await bench.batcher.warm()
        for engine in bench.engines:
            assert {canvas for _, canvas in engine.batches} == set(MANIFEST.canvases)
        assert bench.estimate.batch_s(WIDE, 1) is not None

    run(test, engines=2)


def test_warming_fails_with_the_engine() -> None:
    async def test(bench: Bench) -> None:
        bench.engine.trouble = "raise"
        with pytest.raises(RuntimeError, match="told to"):
            await bench.batcher.warm()

    run(test)


def test_clients_that_give_up_are_no_progress_of_an_engine_that_hangs() -> None:
    async def test(bench: Bench) -> None:
        first = await bench.hold()
        for _ in range(3):
            assert bench.batcher.trouble() is None
            impatient = bench.submit(bench.image())
            await settle()
            bench.clock.now_s += 0.6
            impatient.cancel()
            await settle()
        assert bench.batcher.trouble() == "no progress in inference"
        first.cancel()
        await settle()
        assert bench.batcher.trouble() == "no progress in inference"

    run(test)


def test_no_progress_with_work_waiting_is_seen() -> None:
    async def test(bench: Bench) -> None:
        bench.clock.now_s += 50
        assert bench.batcher.trouble() is None
        first = await bench.hold()
        bench.clock.now_s += 1.4
        assert bench.batcher.trouble() is None
        bench.clock.now_s += 0.2
        assert bench.batcher.trouble() == "no progress in inference"
        bench.engine.gate.set()
        await first
        assert bench.batcher.trouble() is None

    run(test)


def test_a_large_network_on_few_cores_is_slow_and_not_stuck() -> None:
    async def test(bench: Bench) -> None:
        bench.estimate.observe(WIDE, 1, 2.0)
        first = await bench.hold()
        bench.clock.now_s += 9
        assert bench.batcher.trouble() is None
        bench.clock.now_s += 2
        assert bench.batcher.trouble() == "no progress in inference"
        bench.engine.gate.set()
        await first

    run(test)


def test_one_full_batch_is_prepared_behind_the_one_that_an_engine_works_on() -> None:
    async def test(bench: Bench) -> None:
        first = await bench.hold()
        others = [bench.submit(bench.image(8 * (index + 1))) for index in range(9)]
        await until(lambda: bench.engine.prepared == [1, 4])
        assert bench.batcher.waiting == 9
        assert bench.engine.threads["prepare"].isdisjoint(bench.engine.threads["infer"])
        bench.engine.gate.set()
        # The event loop stands still here, and the engine goes on all the same.
        assert bench.engine.entered.acquire(timeout=10)
        answers = await asyncio.gather(first, *others)
        assert [left_edge_px(answer) for answer in answers[1:]] == pytest.approx([8 * n for n in range(1, 10)])
        assert [size for size, _ in bench.engine.batches] == [1, 4, 4, 1]
        assert bench.engine.prepared == [1, 4, 4, 1]
        text = bench.metrics.exposition().decode()
        assert 'ddetr_batches_total{reason="full"} 2.0' in text
        assert "ddetr_batch_size_count 4.0" in text

    run(test)


def test_a_batch_that_is_not_full_goes_on_growing() -> None:
    async def test(bench: Bench) -> None:
        first = await bench.hold()
        others = [bench.submit(bench.image()) for _ in range(3)]
        await settle()
        bench.clock.now_s += 10
        others.append(bench.submit(bench.image(), priority="batch"))
        await settle()
        assert bench.engine.prepared == [1]
        bench.engine.gate.set()
        assert [answer.batch_size for answer in await asyncio.gather(*others)] == [4] * 4
        await first

    run(test)


def test_who_leaves_a_prepared_batch_costs_no_engine() -> None:
    async def test(bench: Bench) -> None:
        first = await bench.hold()
        others = [bench.submit(bench.image(8 * (index + 1))) for index in range(4)]
        await until(lambda: bench.engine.prepared == [1, 4])
        others[1].cancel()
        others[2].cancel()
        await settle()
        assert bench.batcher.waiting == 2
        bench.engine.gate.set()
        assert [left_edge_px(await others[index]) for index in (0, 3)] == pytest.approx([8, 32])
        assert (await others[0]).batch_size == 2
        assert bench.engine.batches == [(1, WIDE), (2, WIDE)]
        assert "ddetr_batch_size_sum 3.0" in bench.metrics.exposition().decode()
        await first

    run(test)


def test_a_prepared_batch_that_nobody_waits_for_is_not_inferred() -> None:
    async def test(bench: Bench) -> None:
        first = await bench.hold()
        others = [bench.submit(bench.image()) for _ in range(4)]
        await until(lambda: bench.engine.prepared == [1, 4])
        for task in others:
            task.cancel()
        await settle()
        bench.engine.gate.set()
        await first
        assert left_edge_px(await bench.submit(bench.image(24))) == pytest.approx(24)
        assert bench.engine.batches == [(1, WIDE), (1, WIDE)]
        assert "ddetr_batch_size_count 2.0" in bench.metrics.exposition().decode()

    run(test)


def test_a_deadline_that_passes_in_a_prepared_batch_costs_no_engine() -> None:
    async def test(bench: Bench) -> None:
        first = await bench.hold()
        late = [bench.submit(bench.image(), deadline_s=bench.clock.now_s + 1) for _ in range(2)]
        on_time = [bench.submit(bench.image()) for _ in range(2)]
        await until(lambda: bench.engine.prepared == [1, 4])
        bench.clock.now_s += 2
        bench.engine.gate.set()
        for task in late:
            with pytest.raises(DeadlinePassed):
                await task
        assert [answer.queue_ms for answer in await asyncio.gather(*on_time)] == pytest.approx([2000] * 2)
        assert bench.engine.batches == [(1, WIDE), (2, WIDE)]
        await first

    run(test)


def test_dispatch_is_told_when_an_engine_begins() -> None:
    async def test(bench: Bench) -> None:
        first = await bench.hold()
        told: list[int] = []
        others = [
            asyncio.create_task(bench.batcher.infer(bench.image(), NEVER_S, lambda: told.append(1))) for _ in range(4)
        ]
        await until(lambda: bench.engine.prepared == [1, 4])
        await settle()
        assert not told
        bench.engine.gate.set()
        await asyncio.gather(first, *others)
        assert told == [1] * 4

    run(test)


def test_an_interactive_image_goes_before_batch_work_that_is_prepared_already() -> None:
    async def test(bench: Bench) -> None:
        first = await bench.hold()
        bulk = [bench.submit(bench.image(), priority="batch") for _ in range(4)]
        await until(lambda: bench.engine.prepared == [1, 4])
        interactive = bench.submit(bench.image(24, TALL))
        await settle()
        assert bench.batcher.waiting == 5
        bench.engine.gate.set()
        await asyncio.gather(first, interactive, *bulk)
        assert bench.engine.batches == [(1, WIDE), (1, TALL), (4, WIDE)]

    run(test)


def test_batch_work_fills_what_interactive_images_leave() -> None:
    async def test(bench: Bench) -> None:
        first = await bench.hold()
        bulk = [bench.submit(bench.image(), priority="batch") for _ in range(5)]
        interactive = [bench.submit(bench.image()) for _ in range(2)]
        await settle()
        bench.engine.gate.set()
        assert [answer.batch_size for answer in await asyncio.gather(*interactive)] == [4, 4]
        assert [answer.batch_size for answer in await asyncio.gather(*bulk)] == [4, 4, 3, 3, 3]
        await first

    run(test)


def test_an_idle_engine_takes_over_what_is_prepared_behind_another() -> None:
    async def test(bench: Bench) -> None:
        for engine in bench.engines:
            engine.gate.clear()
        first = [bench.submit(bench.image()) for _ in range(2)]
        await asyncio.gather(*(asyncio.to_thread(engine.entered.acquire) for engine in bench.engines))
        await until(lambda: bench.batcher.waiting == 0)
        others = [bench.submit(bench.image()) for _ in range(4)]
        await until(lambda: sum(len(engine.prepared) for engine in bench.engines) == 3)
        idle = next(engine for engine in bench.engines if engine.prepared == [1])
        idle.gate.set()
        await asyncio.gather(*others)
        assert [size for size, _ in idle.batches] == [1, 4]
        for engine in bench.engines:
            engine.gate.set()
        await asyncio.gather(*first)

    run(test, engines=2)


@pytest.mark.parametrize("corner", [0, POISON, LETHAL])
def test_nothing_keeps_an_image_that_is_answered(corner: int) -> None:
    async def test(bench: Bench) -> None:
        first = await bench.hold()
        images = [bench.image(), bench.image(corner=corner), bench.image(), bench.image()]
        kept = [weakref.ref(image) for image in images]
        tasks = [bench.submit(image) for image in images]
        del images
        await settle()
        tasks[3].cancel()
        bench.engine.gate.set()
        await asyncio.gather(first, *tasks, return_exceptions=True)
        del tasks, first
        await bench.submit(bench.image())  # the threads let go of the last batch when they take the next
        await until(lambda: not any(image() for image in kept))

    gc.collect()
    gc.disable()  # what only it would find stays for long, and a batch is tens of megabytes
    try:
        run(test, reopen=True)
    finally:
        gc.enable()
