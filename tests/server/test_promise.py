import math

import pytest

from server.promise import LONGEST_S, Promises


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def promises(clock: Clock) -> Promises:
    return Promises(clock)


def test_at_least_a_second_and_whole_ones(promises: Promises) -> None:
    assert promises.retry_after_s("interactive", 0.0, 1, rate=1000) == 1
    assert promises.retry_after_s("interactive", 2.2, 1, rate=1000) == 3


def test_with_nothing_known_nobody_waits_for_others(promises: Promises) -> None:
    assert [promises.retry_after_s("interactive", 0.0, 9, rate=math.inf) for _ in range(100)] == [1] * 100


def test_each_gets_a_later_place_and_the_places_pass_with_time(promises: Promises, clock: Clock) -> None:
    told = [promises.retry_after_s("interactive", 0.0, 4, rate=10) for _ in range(20)]  # half a second each
    assert told == [math.ceil((number + 1) / 2) for number in range(20)]
    clock.now_s += 8
    assert promises.retry_after_s("interactive", 0.0, 4, rate=10) == 3
    clock.now_s += 100
    assert promises.retry_after_s("interactive", 0.0, 4, rate=10) == 1


def test_nobody_is_sent_away_for_longer_than_a_minute(promises: Promises) -> None:
    assert promises.retry_after_s("interactive", 1e6, 1, rate=10) == LONGEST_S
    assert promises.retry_after_s("interactive", 0.0, 1, rate=1e-9) == LONGEST_S


def test_batch_work_comes_after_interactive_work(promises: Promises) -> None:
    assert promises.retry_after_s("interactive", 0.0, 8, rate=1) == 10
    assert promises.retry_after_s("batch", 0.0, 8, rate=1) == 20
    assert promises.retry_after_s("interactive", 0.0, 8, rate=1) == 20
