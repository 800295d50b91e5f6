import threading

import pytest

from server.worker import Worker


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


def test_stopping_ends_the_thread_after_its_calls() -> None:
    worker = Worker("test")
    future = worker.submit(int, "3")
    worker.stop()
    assert future.result(timeout=10) == 3
    worker._thread.join(timeout=10)
    assert not worker._thread.is_alive()
