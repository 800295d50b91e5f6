"""When one more image would be done, against sums done by hand."""

import math
import random
from collections.abc import Sequence
from functools import partial

import pytest

from bundle import Canvas
from server.batch_queue import PRIORITIES, Priority
from server.estimate import Estimate
from server.line import Line, Place

SMALL, LARGE = Canvas(height=64, width=96), Canvas(height=128, width=192)


class Hall:
    """A line with batches of up to 4 that take 1 s and 0.5 s an image on SMALL, twice that on LARGE."""

    def __init__(self, engines: int = 1, threads: int = 2, mix: Sequence[Canvas] = (SMALL,)) -> None:
        self.now_s = 100.0
        self.estimate = Estimate(engines)
        for size in (1, 4):
            self.estimate.observe(SMALL, size, 1 + 0.5 * size)
            self.estimate.observe(LARGE, size, 2 + 1.0 * size)
        for canvas in mix:
            self.estimate.observe_decoding(canvas, 0.2)
        self.line = Line(self.estimate, 4, threads, lambda: self.now_s)

    def reading(self, images: int, priority: Priority = "interactive") -> list[Place]:
        return [self.line.enter(priority, 0) for _ in range(images)]

    def decoding(self, images: int, priority: Priority = "interactive") -> list[Place]:
        places = self.reading(images, priority)
        for place in places:
            place.read(0)
        return places

    def waiting(self, images: int, canvas: Canvas = SMALL, priority: Priority = "interactive") -> list[Place]:
        places = self.reading(images, priority)
        for place in places:
            place.read(0)
            self.now_s += 0.1
            place.decoded(canvas)
        self.estimate.decode_s = 0.0
        return places

    def running(self, images: int, canvas: Canvas = SMALL, priority: Priority = "interactive") -> list[Place]:
        places = self.waiting(images, canvas, priority)
        for place in places:
            place.dispatched()
        return places

    def finish_s(self, images: int = 1, priority: Priority = "interactive", *, with_readers: bool = True) -> float:
        return self.line.finish_s(priority, images, with_readers=with_readers)


def test_nothing_ahead() -> None:
    assert Hall().finish_s(1) == pytest.approx(0.2 + 1.5)
    assert Hall().finish_s(4) == pytest.approx(0.4 + 3)  # two threads decode two each
    assert Hall().finish_s(9) == pytest.approx(3 + 3 + 1.5)  # while the first batch runs the others are decoded


def test_nothing_known_nothing_predicted() -> None:
    assert Line(Estimate(1), 4, 2, lambda: 0.0).finish_s("interactive", 5, with_readers=True) == 0


def test_what_waits_goes_before_in_batches_as_full_as_can_be() -> None:
    hall = Hall()
    hall.waiting(9)
    assert hall.finish_s() == pytest.approx(3 + 3 + 2)  # the last with the newcomer


def test_what_an_engine_has_is_partly_done() -> None:
    hall = Hall()
    hall.running(4)
    assert hall.finish_s() == pytest.approx(3 + 1.5)
    hall.now_s += 1
    assert hall.finish_s() == pytest.approx(2 + 1.5)
    hall.now_s += 100  # and never more than done
    assert hall.finish_s() == pytest.approx(1.5)


def test_engines_share_the_work() -> None:
    hall = Hall(engines=2)
    hall.waiting(11)
    assert hall.finish_s() == pytest.approx((3 + 3) / 2 + 3)


def test_the_longest_of_decoding_and_engines_counts() -> None:
    hall = Hall(threads=1)
    hall.decoding(19)
    assert hall.finish_s() == pytest.approx(4 * 3 + 3)
    hall.estimate.decode_s = 1.0
    assert hall.finish_s() == pytest.approx(20 * 1.0 + 3)


def test_images_whose_canvas_is_not_known_are_like_those_that_came() -> None:
    hall = Hall(mix=[SMALL])
    hall.waiting(4, LARGE)
    large_s = 6.0
    share = hall.estimate.mix()[LARGE]
    assert 0.05 < share < 0.1
    # 4 + `share` of the newcomer's on LARGE, the rest of it on SMALL.
    assert hall.finish_s() == pytest.approx(large_s + share * 3 + (1 - share) * 1.5)


def test_who_has_been_read_does_not_wait_for_those_who_still_are() -> None:
    hall = Hall()
    hall.estimate.decode_s = 0.0
    hall.reading(8)
    assert hall.finish_s() == pytest.approx(3 + 3 + 1.5)
    assert hall.finish_s(with_readers=False) == pytest.approx(1.5)


def test_nobody_waits_for_bodies_that_take_long() -> None:
    hall = Hall()
    hall.estimate.decode_s = 0.0
    slow = hall.reading(8)
    hall.now_s += 0.2
    quick = hall.reading(1)
    assert (hall.line.ahead_of(quick), hall.finish_s()) == (8, pytest.approx(3 + 3 + 2))
    hall.now_s += 0.1
    assert (hall.line.ahead_of(quick), hall.finish_s()) == (0, pytest.approx(2))
    assert hall.line.waiting() == 9, "they have their places"
    for place in slow:
        place.read(0)
    assert hall.finish_s(with_readers=False) == pytest.approx(3 + 3 + 1.5)
    for place in slow + quick:
        place.give_back()
    assert len(hall.line) == 0


@pytest.mark.parametrize("seed", range(30))
def test_what_is_certain_is_never_less_than_what_is_predicted(seed: int) -> None:
    rng = random.Random(seed)
    hall = Hall(engines=rng.randint(1, 3), threads=rng.randint(1, 3), mix=rng.choices([SMALL, LARGE], k=3))
    least = rng.choice([1, 1, 3])
    for _ in range(rng.choice([20, 200])):  # sizes whose time by the image grows or shrinks; many: 1 is forgotten, or 2
        hall.estimate.observe(rng.choice([SMALL, LARGE]), rng.randint(least, 4), rng.uniform(0.1, 10))
    for _ in range(rng.randint(0, 6)):
        come = rng.choice([hall.reading, hall.decoding, hall.waiting, hall.running])
        come(rng.randint(1, 5), priority=rng.choice(PRIORITIES))
    hall.estimate.observe_decoding(SMALL, rng.uniform(0, 10))
    for _ in range(100):  # a margin as large as any
        hall.line.observe("interactive", 1.0, 100.0)
    images, with_readers = rng.randint(1, 9), rng.random() < 0.5
    predicted_s = hall.finish_s(images, with_readers=with_readers)
    assert hall.line.surely_s("interactive", images) >= predicted_s * hall.line.margin("interactive")
    assert hall.line.surely_s("batch", images) == math.inf


def test_what_is_counted_is_what_is_there() -> None:
    hall, rng = Hall(), random.Random(0)
    places: list[Place] = []
    seen = set()
    for _ in range(1500):
        hall.now_s += 0.02  # a body that is awaited for 13 steps counts as one that takes long
        if rng.random() < 0.2 or not places:
            places += hall.reading(1, rng.choice(PRIORITIES))
        place = rng.choice(places[-30:])
        rng.choice([partial(place.read, 10), partial(place.decoded, SMALL), place.dispatched, place.leave])()
        ahead = hall.line.ahead_of(())
        there = [(each.stage, each.priority) for each in places if each.stage is not None]
        seen |= {stage for stage, _ in there}
        assert len(hall.line) == len(there)
        assert ahead == sum(stage != "uploading" for stage, _ in there)
        assert hall.line.waiting() == sum(stage != "running" for stage, _ in there)
        for priority in PRIORITIES:
            of_lane = sum(stage != "running" and lane == priority for stage, lane in there)
            assert hall.line.waiting(priority) == of_lane
        assert hall.line.decoding() == sum(stage == "decoding" for stage, _ in there)
    assert seen == {"reading", "uploading", "decoding", "waiting", "running"}


def test_interactive_work_does_not_wait_for_batch_work_but_for_what_an_engine_has_and_the_other_way_round() -> None:
    hall = Hall()
    hall.waiting(8, priority="batch")
    assert hall.finish_s(priority="interactive") == pytest.approx(3)  # its batch may be filled up
    assert hall.finish_s(priority="batch") == pytest.approx(3 + 3 + 1.5)
    hall.waiting(4)
    hall.running(4, priority="batch")
    assert hall.finish_s(priority="interactive") == pytest.approx(3 + 3 + 3)
    assert hall.finish_s(priority="batch") == pytest.approx(3 + 3 * 3 + 1.5)


@pytest.mark.parametrize(("every_s", "times"), [(6.0, 2.0), (12.0, 4 / 3), (1.0, 20.0)])
def test_batch_work_waits_for_as_much_interactive_work_as_came_of_late(every_s: float, times: float) -> None:
    """A full batch takes 3 s; where interactive work leaves nothing, one place in five batches is batch work's."""
    hall = Hall()
    alone_s = Hall().finish_s(40, priority="batch")
    while hall.now_s < 200:
        for place in hall.running(4):
            place.leave()
        hall.now_s += every_s - 0.4
    assert hall.finish_s(40, priority="batch") == pytest.approx(alone_s * times, rel=0.2 if times < 20 else 0.01)
    assert hall.finish_s(40, priority="interactive") == alone_s


def test_decoding_is_learnt_from_what_it_takes_beside_others() -> None:
    hall = Hall(threads=2, mix=[])
    places = hall.decoding(4)
    for place in places:  # one after the other, 0.1 s apart: two threads that take 0.2 s each
        hall.now_s += 0.1
        place.decoded(SMALL)
    assert hall.estimate.decode_s == pytest.approx(0.2, abs=0.05)


def test_margins_are_learnt_by_lane() -> None:
    hall = Hall()
    margin = hall.line.margin
    assert margin("interactive") == margin("batch") == 2.0
    for _ in range(200):
        hall.line.observe("interactive", 1.0, 0.9)
    hall.now_s += 0.1
    assert (margin("interactive"), margin("batch")) == (pytest.approx(1.05), 2.0)
    hall.line.observe("interactive", 1.0, 99.0)
    assert margin("interactive") == pytest.approx(1.05), "one in two hundred is let pass"
    hall.line.observe("interactive", 1.0, 99.0)
    assert margin("interactive") == pytest.approx(4.0), "and no more than this is ever added"
    hall.now_s += 11
    assert margin("interactive") == 2.0, "a bad moment is forgotten"
