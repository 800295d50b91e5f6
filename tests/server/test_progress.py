import threading
from collections.abc import Callable

import pytest

from server.progress import Progress

TIMEOUT_S = 1.5


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def progress(clock: Clock) -> Progress:
    return Progress(clock)


Taking = Callable[[float], bool]


@pytest.fixture
def taking(clock: Clock, progress: Progress) -> Taking:
    """Makes a call that takes so many seconds; whether it was taken for one that is stuck, just before its end."""

    def take(seconds: float) -> bool:
        def work() -> bool:
            clock.now_s += seconds
            return progress.stalled(TIMEOUT_S)

        return progress.watch(work)

    return take


def test_an_idle_stage_is_not_a_stalled_one(clock: Clock, progress: Progress) -> None:
    clock.now_s += 60
    assert not progress.stalled(TIMEOUT_S)


def test_a_call_that_takes_too_long_is_stuck_until_it_ends(progress: Progress, taking: Taking) -> None:
    assert not taking(TIMEOUT_S)
    assert taking(3 * TIMEOUT_S + 0.1)
    assert not progress.stalled(TIMEOUT_S)


def test_one_call_that_is_stuck_is_seen_though_others_get_on(clock: Clock, progress: Progress, taking: Taking) -> None:
    gate, entered = threading.Event(), threading.Event()

    def hang() -> None:
        entered.set()
        assert gate.wait(30)

    thread = threading.Thread(target=progress.watch, args=(hang,))
    thread.start()
    try:
        assert entered.wait(30)
        seen = [taking(0.25) for _ in range(8)]
        assert seen == [False] * 6 + [True] * 2
        assert progress.stalled(TIMEOUT_S)
    finally:
        gate.set()
        thread.join()
    assert not progress.stalled(TIMEOUT_S)


def test_where_calls_are_slow_they_have_more_time_until_they_are_quick_again(taking: Taking) -> None:
    assert taking(2)
    assert not taking(5.9)
    assert taking(18)
    for _ in range(300):
        taking(0.01)
    assert taking(2)


def test_what_raises_teaches_nothing_and_is_over(clock: Clock, progress: Progress, taking: Taking) -> None:
    def fail() -> None:
        clock.now_s += 10
        raise KeyError

    taking(2)
    for _ in range(300):
        with pytest.raises(KeyError):
            progress.watch(fail)
    assert not progress.stalled(TIMEOUT_S)
    assert not taking(5.8)
    assert taking(18)
