import itertools
import statistics

import pytest

from loadtest.arrivals import poisson


def test_the_same_seed_gives_the_same_arrivals() -> None:
    assert list(poisson(50, 10, 7, seed=3)) == list(poisson(50, 10, 7, seed=3))
    assert list(poisson(50, 10, 7, seed=3)) != list(poisson(50, 10, 7, seed=4))


def test_gaps_are_exponential_and_arrivals_stay_within_the_time() -> None:
    arrivals = list(poisson(100, 100, 7, seed=0))
    assert 9_600 < len(arrivals) < 10_400  # 10000 expected, 4 standard deviations of 100
    gaps = [second.at_s - first.at_s for first, second in itertools.pairwise(arrivals)]
    assert min(gaps) > 0
    assert statistics.fmean(gaps) == pytest.approx(0.01, rel=0.04)
    assert statistics.stdev(gaps) == pytest.approx(0.01, rel=0.06)  # of an exponential, as large as the mean
    assert arrivals[-1].at_s < 100
    assert {arrival.payload for arrival in arrivals} == set(range(7))


def test_a_time_too_short_has_no_arrival() -> None:
    assert list(poisson(1, 1e-6, 1, seed=0)) == []
