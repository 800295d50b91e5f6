"""The search against made-up servers: a rate is borne or not, by a rule."""

from collections.abc import Callable

import pytest

from loadtest.report import Measurement, RateSearch
from loadtest.search import Bounds, find_rate
from tests.loadtest.made import measurement

BOUNDS = Bounds(start_rps=4.0, least_rps=0.5, most_rps=512.0, precision=0.05)


def search(holds: Callable[[float, int], float], bounds: Bounds = BOUNDS) -> tuple[RateSearch, list[Measurement]]:
    """`holds` gives the share within the target at a rate, in the so-manieth step; NaN where the generator is lost."""
    taken = 0

    def measure(rate_rps: float, phase: str) -> Measurement:
        nonlocal taken
        share = holds(rate_rps, taken)
        taken += 1
        lost = share != share
        return measurement(
            [1.0], rate_rps=rate_rps, within_target=0.0 if lost else share, valid=not lost, target_ms=200
        )

    return find_rate(measure, 200.0, bounds)


def up_to(limit_rps: float) -> Callable[[float, int], float]:
    return lambda rate, _: 1.0 if rate <= limit_rps else 0.5


@pytest.mark.parametrize("limit", [0.7, 3.9, 4.0, 37.0, 100.0, 511.0])
def test_it_finds_the_limit_within_its_precision(limit: float) -> None:
    found, measurements = search(up_to(limit))
    assert found.rate_rps is not None
    assert limit / 1.05 <= found.rate_rps <= limit
    assert "does not hold, and is within 5% of what does" in found.stopped
    assert [step.measurement for step in found.steps] == list(range(len(measurements)))
    assert [measurements[step.measurement].plan.rate_rps for step in found.steps] == [s.rate_rps for s in found.steps]


def test_it_doubles_then_bisects_then_tries_again() -> None:
    found, _ = search(up_to(37.0))
    phases = [step.phase for step in found.steps]
    assert [step.rate_rps for step in found.steps if step.phase == "doubling"] == [4, 8, 16, 32, 64]
    assert phases == sorted(phases, key=["doubling", "bisection", "confirmation"].index)
    assert phases.count("confirmation") == 1
    assert len(phases) <= 11


def test_it_halves_where_the_first_rate_is_too_much() -> None:
    found, _ = search(up_to(0.7))
    assert [step.rate_rps for step in found.steps if step.phase == "halving"] == [2, 1, 0.5]


def test_99_in_100_is_enough_and_98_is_not() -> None:
    assert search(lambda rate, _: 0.99 if rate <= 100 else 0.9899)[0].rate_rps == pytest.approx(98, rel=0.05)


def test_a_rate_that_held_by_luck_is_lowered_until_it_holds_again() -> None:
    confirmations: list[float] = []

    def holds(rate: float, taken: int) -> float:
        if taken <= 5:  # the doubling, 64 included, and the first step of the bisection: all luck
            return 1.0 if rate <= 46 else 0.0
        confirmations.append(rate)
        return 1.0 if rate <= 40 else 0.9

    found, _ = search(holds)
    assert found.rate_rps is not None
    assert found.rate_rps <= 40
    assert len([step for step in found.steps if step.phase == "confirmation" and not step.holds]) >= 2


def test_a_rate_that_never_holds_again_is_not_reported() -> None:
    bisected = 9
    found, _ = search(lambda rate, taken: (1.0 if rate <= 37 else 0.0) if taken < bisected else 0.0)
    assert found.rate_rps is None
    assert "unsteady" in found.stopped


def test_it_says_that_higher_rates_were_not_asked_for() -> None:
    found, _ = search(lambda *_: 1.0)
    assert found.rate_rps == 512
    assert "512/s holds, and higher rates were not asked for" in found.stopped


def test_it_gives_up_below_the_least_rate() -> None:
    found, _ = search(lambda *_: 0.0)
    assert found.rate_rps is None
    assert found.stopped == "not even 0.5/s holds"


def test_where_the_generator_is_lost_it_stops_with_what_held() -> None:
    found, _ = search(lambda rate, _: 1.0 if rate <= 100 else float("nan"))
    assert found.rate_rps == 64
    assert "the load generator could not make 128/s: the generator fell behind" in found.stopped
    assert not found.steps[-1].holds
