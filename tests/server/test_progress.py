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


def test_an_idle_stage_is_not_a_stalled_one(clock: Clock, progress: Progress) -> None:
    clock.now_s += 60
    assert not progress.stalled(TIMEOUT_S)
    progress.begin()
    assert not progress.stalled(TIMEOUT_S)


def test_work_that_waits_for_too_long_is(clock: Clock, progress: Progress) -> None:
    progress.begin()
    clock.now_s += TIMEOUT_S
    assert not progress.stalled(TIMEOUT_S)
    clock.now_s += 0.1
    assert progress.stalled(TIMEOUT_S)
    progress.end()
    assert not progress.stalled(TIMEOUT_S)


def test_coming_is_no_progress_and_finishing_is(clock: Clock, progress: Progress) -> None:
    for _ in range(4):
        progress.begin()
        clock.now_s += 0.4
    assert progress.stalled(TIMEOUT_S)
    progress.end()
    assert progress.pending == 3
    clock.now_s += 0.4
    assert not progress.stalled(TIMEOUT_S)


def test_a_stage_that_is_slow_has_more_time_until_it_is_quick_again(clock: Clock, progress: Progress) -> None:
    progress.begin()
    clock.now_s += 3
    progress.end()
    progress.begin()
    clock.now_s += 14
    assert not progress.stalled(TIMEOUT_S)
    clock.now_s += 2
    assert progress.stalled(TIMEOUT_S)
    for _ in range(300):
        progress.begin()
        progress.end()
    progress.begin()
    clock.now_s += 2
    assert progress.stalled(TIMEOUT_S)
