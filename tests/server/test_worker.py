import asyncio
import gc
import subprocess
import sys
import threading
import weakref
from functools import partial

import pytest

from server.worker import Worker, still_at_work


def test_calls_run_in_order_in_one_thread() -> None:
    worker = Worker("test")
    order: list[int] = []
    futures = [worker.submit(lambda n=n: (order.append(n), threading.get_ident())[1]) for n in range(20)]
    threads = {future.result(timeout=10) for future in futures}
    assert order == list(range(20))
    assert len(threads) == 1
    assert threads != {threading.get_ident()}
    worker.stop()


def test_what_is_raised_comes_back_and_the_thread_lives_on() -> None:
    worker = Worker("test")

    def fail(error: BaseException) -> None:
        raise error

    with pytest.raises(KeyError):
        worker.submit(fail, KeyError("x")).result(timeout=10)
    with pytest.raises(RuntimeError, match="SystemExit"):
        worker.submit(fail, SystemExit(1)).result(timeout=10)
    assert worker.submit(int, "5").result(timeout=10) == 5
    worker.stop()


def test_a_cancelled_call_is_not_made() -> None:
    worker = Worker("test")
    gate = threading.Event()
    first = worker.submit(gate.wait, 10)
    second = worker.submit(pytest.fail, "was called")
    assert second.cancel()
    gate.set()
    assert first.result(timeout=10)
    assert worker.submit(int, "1").result(timeout=10) == 1
    worker.stop()


def test_an_event_loop_waits_for_a_call_and_goes_on_meanwhile() -> None:
    async def body() -> None:
        worker = Worker("test")
        gate = threading.Event()
        held = asyncio.create_task(worker.run(lambda: gate.wait(10) and threading.get_ident()))
        await asyncio.sleep(0.01)
        assert not held.done()
        gate.set()
        assert await held not in {False, threading.get_ident()}
        with pytest.raises(ZeroDivisionError):
            await worker.run(lambda: 1 / 0)
        with pytest.raises(RuntimeError, match="SystemExit"):
            await worker.run(sys.exit)
        worker.stop()

    asyncio.run(asyncio.wait_for(body(), 30))


def test_a_call_whose_caller_is_cancelled_first_is_not_made() -> None:
    async def body() -> None:
        worker = Worker("test")
        gate, made = threading.Event(), list[str]()
        held = asyncio.create_task(worker.run(lambda: gate.wait(10)))
        given_up = asyncio.create_task(worker.run(lambda: made.append("given up")))
        await asyncio.sleep(0.01)
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        gate.set()
        assert await held
        await worker.run(lambda: made.append("after it"))
        assert made == ["after it"]
        worker.stop()

    asyncio.run(asyncio.wait_for(body(), 30))


def test_replies_wait_for_one_another_where_nobody_is_in_a_hurry() -> None:
    async def body() -> None:
        hurried, gates = threading.Event(), [threading.Event() for _ in range(3)]
        worker = Worker("test", threads=3, unhurried=lambda: not hurried.is_set())
        calls = [asyncio.create_task(worker.run(partial(gate.wait, 10))) for gate in gates]
        gates[0].set()
        await asyncio.sleep(0.05)
        assert not calls[0].done()
        hurried.set()
        gates[1].set()
        assert await calls[1]
        assert calls[0].done()
        assert not calls[2].done()
        gates[2].set()
        assert await calls[2]
        worker.stop()

    asyncio.run(asyncio.wait_for(body(), 30))


def test_the_last_of_several_calls_brings_all_their_replies() -> None:
    async def body() -> None:
        worker = Worker("test", threads=2, unhurried=lambda: True)
        assert await asyncio.gather(*(worker.run(partial(int, str(n))) for n in range(11))) == list(range(11))
        gate = threading.Event()
        last = asyncio.create_task(worker.run(lambda: gate.wait(10)))
        first = asyncio.create_task(worker.run(lambda: 1))
        await asyncio.sleep(0.05)
        assert not first.done()
        gate.set()
        assert await last
        assert first.done()
        worker.stop()

    asyncio.run(asyncio.wait_for(body(), 30))


def test_no_more_replies_wait_than_a_batch_has() -> None:
    async def body() -> None:
        worker = Worker("test", threads=2, unhurried=lambda: True)
        gate = threading.Event()
        held = asyncio.create_task(worker.run(lambda: gate.wait(10)))
        assert await asyncio.gather(*(worker.run(partial(int, str(n))) for n in range(4))) == [0, 1, 2, 3]
        assert not held.done()
        gate.set()
        assert await held
        worker.stop()

    asyncio.run(asyncio.wait_for(body(), 30))


def test_replies_do_not_wait_for_calls_that_are_not_made() -> None:
    async def body() -> None:
        worker = Worker("test", unhurried=lambda: True)
        gate = threading.Event()
        first = asyncio.create_task(worker.run(lambda: gate.wait(10)))
        given_up = [asyncio.create_task(worker.run(pytest.fail)) for _ in range(3)]
        await asyncio.sleep(0.01)
        for each in given_up:
            each.cancel()
        await asyncio.gather(*given_up, return_exceptions=True)
        gate.set()
        assert await first
        assert await worker.run(lambda: 1) == 1
        worker.stop()

    asyncio.run(asyncio.wait_for(body(), 30))


def test_replies_can_be_had_while_another_call_hangs() -> None:
    async def body() -> None:
        worker = Worker("test", threads=2, unhurried=lambda: True)
        gate = threading.Event()
        hangs = asyncio.create_task(worker.run(lambda: gate.wait(10)))
        other = asyncio.create_task(worker.run(lambda: 1))
        await asyncio.sleep(0.05)
        assert not other.done()
        worker.deliver()
        assert await other == 1
        assert not hangs.done()
        gate.set()
        assert await hangs
        worker.stop()

    asyncio.run(asyncio.wait_for(body(), 30))


@pytest.mark.parametrize("handed_over", [True, False])
def test_stopping_leaves_no_event_loop_waiting(handed_over: bool) -> None:
    async def body() -> None:
        worker = Worker("test")
        gate = threading.Event()
        held = asyncio.create_task(worker.run(lambda: gate.wait(10)))
        await asyncio.sleep(0.01)
        behind = asyncio.create_task(worker.run(pytest.fail))
        await asyncio.sleep(0.01 if handed_over else 0)
        worker.stop(cancel=True)
        with pytest.raises(asyncio.CancelledError):
            await behind
        gate.set()
        assert await held

    asyncio.run(asyncio.wait_for(body(), 30))


def test_what_a_call_that_failed_held_is_free_at_once() -> None:
    class Upload:
        """What a request holds while it is decoded."""

    async def body() -> None:
        worker = Worker("test")
        upload = Upload()
        held = weakref.ref(upload)

        def fail(upload: Upload) -> None:
            raise ValueError("held")

        with pytest.raises(ValueError, match="held") as caught:
            await worker.run(partial(fail, upload))
        del upload, caught
        await worker.run(int)  # the thread has let go of the call before
        assert held() is None
        worker.stop()

    gc.disable()
    try:
        asyncio.run(asyncio.wait_for(body(), 30))
    finally:
        gc.enable()


def test_a_thread_outlives_the_event_loop_that_waited_for_it() -> None:
    worker = Worker("test")
    gate = threading.Event()

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(worker.run(lambda: gate.wait(10)), 0.01)

    asyncio.run(give_up())
    gate.set()
    assert worker.submit(int, "5").result(timeout=10) == 5
    worker.stop()


def test_stopping_ends_the_thread_after_its_calls() -> None:
    worker = Worker("test")
    future = worker.submit(int, "3")
    worker.stop()
    assert future.result(timeout=10) == 3
    worker.join()
    assert not worker.alive


def test_several_threads_share_the_calls() -> None:
    worker = Worker("test", threads=3)
    together = threading.Barrier(3)
    waits = [worker.submit(together.wait, 10) for _ in range(3)]
    assert sorted(wait.result(timeout=10) for wait in waits) == [0, 1, 2]
    worker.stop()
    worker.join()
    assert not worker.alive


def test_stopping_can_cancel_what_has_not_begun() -> None:
    worker = Worker("test", threads=2)
    gate, begun = threading.Event(), threading.Barrier(3)

    def hold() -> bool:
        begun.wait(10)
        return gate.wait(10)

    held = [worker.submit(hold) for _ in range(2)]
    begun.wait(10)
    waiting = [worker.submit(pytest.fail, "was called") for _ in range(3)]
    worker.stop(cancel=True)
    assert all(call.cancelled() for call in waiting)
    gate.set()
    assert all(call.result(timeout=10) for call in held)
    worker.join()


def test_a_call_that_hangs_does_not_keep_the_process_from_ending() -> None:
    program = "from server.worker import Worker; import time; Worker('test', 2).submit(time.sleep, 600)"
    subprocess.run([sys.executable, "-c", program], timeout=60, check=True)


def test_threads_that_have_not_ended_are_named() -> None:
    gate = threading.Event()
    worker = Worker("at-work")
    worker.submit(gate.wait, 30)
    worker.stop()
    assert "at-work" in still_at_work(0.01)
    gate.set()
    worker.join()
    assert "at-work" not in still_at_work(0.0)
