import random
import statistics

import pytest

from bundle import Canvas
from server.estimate import Estimate

SMALL, LARGE = Canvas(height=64, width=96), Canvas(height=128, width=192)


@pytest.fixture
def estimate() -> Estimate:
    return Estimate(engine_instances=1)


def test_nothing_is_promised_before_anything_is_known(estimate: Estimate) -> None:
    assert estimate.batch_s(SMALL, 4) is None
    assert estimate.mix() == {}
    assert estimate.rate(4) == float("inf")
    assert estimate.retry_after_s(1000) == 1


def test_canvases_and_sizes_are_learnt_apart(estimate: Estimate) -> None:
    estimate.observe(SMALL, 1, 0.1)
    estimate.observe(SMALL, 4, 0.25)
    estimate.observe(LARGE, 1, 0.5)
    assert estimate.batch_s(SMALL, 1) == pytest.approx(0.1)
    assert estimate.batch_s(SMALL, 4) == pytest.approx(0.25)
    assert estimate.batch_s(LARGE, 1) == pytest.approx(0.5)


def test_sizes_not_seen_lie_between_those_that_were(estimate: Estimate) -> None:
    estimate.observe(SMALL, 2, 0.2)
    assert estimate.batch_s(SMALL, 1) == pytest.approx(0.2)  # never quicker than known
    assert estimate.batch_s(SMALL, 6) == pytest.approx(0.6)  # nor ever gained by batching
    estimate.observe(SMALL, 4, 0.3)
    assert estimate.batch_s(SMALL, 3) == pytest.approx(0.25)
    assert estimate.batch_s(SMALL, 2.5) == pytest.approx(0.225)
    assert estimate.batch_s(SMALL, 8) == pytest.approx(0.6)


@pytest.mark.parametrize("seed", range(5))
def test_the_newest_five_of_a_size_among_the_newest_batches_count(estimate: Estimate, seed: int) -> None:
    rng = random.Random(seed)
    batches: list[tuple[int, float]] = []
    for _ in range(200):
        batches.append((rng.choice([1, 2, 3, 8, 8, 8, 8, 8]), rng.random()))
        estimate.observe(SMALL, *batches[-1])
        by_size: dict[int, list[float]] = {}
        for size, seconds in batches[-32:]:
            by_size.setdefault(size, []).append(seconds)
        for size, seconds in by_size.items():
            assert estimate.batch_s(SMALL, size) == statistics.median(seconds[-5:])
        if 2 not in by_size and {1, 3} <= by_size.keys():
            assert estimate.batch_s(SMALL, 2) == pytest.approx(
                (statistics.median(by_size[1][-5:]) + statistics.median(by_size[3][-5:])) / 2
            ), "what was forgotten lies between its neighbours again"


def test_a_canvas_not_seen_costs_by_its_pixels(estimate: Estimate) -> None:
    estimate.observe(SMALL, 1, 0.1)
    assert estimate.batch_s(LARGE, 1) == pytest.approx(0.4)


def test_outliers_change_nothing_and_what_lasts_does(estimate: Estimate) -> None:
    for _ in range(9):
        estimate.observe(SMALL, 1, 0.1)
    for _ in range(2):
        estimate.observe(SMALL, 1, 30.0)
    assert estimate.batch_s(SMALL, 1) == pytest.approx(0.1)
    estimate.observe(SMALL, 1, 30.0)
    assert estimate.batch_s(SMALL, 1) == pytest.approx(30.0)


def test_a_size_that_is_not_run_any_more_is_forgotten(estimate: Estimate) -> None:
    estimate.observe(SMALL, 4, 100.0)  # whatever it was
    for _ in range(31):
        estimate.observe(SMALL, 1, 0.1)
    assert estimate.batch_s(SMALL, 4) == pytest.approx(100.0)
    estimate.observe(SMALL, 1, 0.1)
    assert estimate.batch_s(SMALL, 4) == pytest.approx(0.4)


def test_the_mix_follows_what_comes(estimate: Estimate) -> None:
    estimate.observe(SMALL, 1, 0.1)
    estimate.observe(LARGE, 1, 0.3)
    assert estimate.mix() == {SMALL: 0.5, LARGE: 0.5}  # nothing has come: all are as likely
    assert estimate.rate(1) == pytest.approx(5)
    estimate.observe_decoding(SMALL, 0.01)
    assert estimate.mix() == {SMALL: 1.0}
    assert estimate.rate(1) == pytest.approx(10)
    for _ in range(400):
        estimate.observe_decoding(LARGE, 0.03)
    assert estimate.mix()[LARGE] == pytest.approx(1.0, abs=0.001)
    assert sum(estimate.mix().values()) == pytest.approx(1.0)
    assert estimate.decode_s == pytest.approx(0.03)


def test_the_rate_counts_every_engine() -> None:
    estimate = Estimate(engine_instances=2)
    estimate.observe(SMALL, 4, 0.2)
    assert estimate.rate(4) == pytest.approx(40)
    estimate.observe(SMALL, 1, 2.5)
    assert estimate.retry_after_s(4) == 5
    assert estimate.retry_after_s(10_000) == 60


def test_the_slowest_an_image_can_be(estimate: Estimate) -> None:
    assert estimate.slowest_s == 0
    estimate.observe(SMALL, 3, 0.3)
    assert estimate.slowest_s == pytest.approx(0.3)  # by itself it may take as long
    estimate.observe(SMALL, 1, 0.12)
    assert estimate.slowest_s == pytest.approx(0.12)
    estimate.observe(SMALL, 2, 0.5)
    assert estimate.slowest_s == pytest.approx(0.25)
    estimate.observe(LARGE, 1, 0.4)
    assert estimate.slowest_s == pytest.approx(0.4)
