"""The highest rate that holds a latency target: by doubling, then by bisection, then tried again."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from loadtest.report import Measurement, RateSearch, RateStep, SearchPhase

HOLDS_SHARE = 0.99
"""p99 within the target, failed requests counted as too late."""
CONFIRMATIONS = 4


@dataclass(frozen=True)
class Bounds:
    """Where the search begins and where it gives up."""

    start_rps: float
    least_rps: float = 0.25
    most_rps: float = 10_000.0
    precision: float = 0.05


@dataclass
class _Search:
    measure: Callable[[float, SearchPhase], Measurement]
    steps: list[RateStep] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)

    def holds(self, rate_rps: float, phase: SearchPhase) -> bool:
        """Measure at this rate. Raises _GeneratorTooSlow where that says nothing of the server."""
        measurement = self.measure(rate_rps, phase)
        within = measurement.within_target or 0.0
        # A few requests that fail make it worse than p99 alone would show.
        holds = measurement.valid and within >= HOLDS_SHARE
        self.measurements.append(measurement)
        self.steps.append(
            RateStep(
                rate_rps=rate_rps,
                phase=phase,
                holds=holds,
                within_target=within,
                measurement=len(self.measurements) - 1,
            )
        )
        if not measurement.valid:
            raise _GeneratorTooSlow(f"the load generator could not make {rate_rps:.4g}/s: {measurement.remarks[0]}")
        return holds


class _GeneratorTooSlow(Exception):
    pass


def find_rate(
    measure: Callable[[float, SearchPhase], Measurement], p99_ms: float, bounds: Bounds
) -> tuple[RateSearch, list[Measurement]]:
    """Search with `measure`, which takes a rate and has `p99_ms` as its target; also all that was measured.

    The rate found is measured twice at least: of many tries near the limit, one holds by luck.
    """
    search = _Search(measure)
    best: float | None = None
    try:
        low, high, stopped = _bracket(search, bounds)
        if low is not None and high is not None:
            low, high = _bisect(search, low, high, bounds.precision)
            stopped = f"{high:.4g}/s does not hold, and is within {bounds.precision:.0%} of what does"
        if low is not None:
            best, stopped = _confirm(search, low, bounds, stopped)
    except _GeneratorTooSlow as error:
        held = [step.rate_rps for step in search.steps if step.holds]
        best, stopped = max(held, default=None), str(error)
    found = RateSearch(
        p99_ms=p99_ms, precision=bounds.precision, rate_rps=best, stopped=stopped, steps=tuple(search.steps)
    )
    return found, search.measurements


def _bracket(search: _Search, bounds: Bounds) -> tuple[float | None, float | None, str]:
    """A rate that holds and twice that rate, which does not; None where a bound comes first, and which."""
    rate = bounds.start_rps
    if search.holds(rate, "doubling"):
        while rate < bounds.most_rps:
            low, rate = rate, min(2 * rate, bounds.most_rps)
            if not search.holds(rate, "doubling"):
                return low, rate, ""
        return rate, None, f"{rate:.4g}/s holds, and higher rates were not asked for"
    while rate > bounds.least_rps:
        high, rate = rate, max(rate / 2, bounds.least_rps)
        if search.holds(rate, "halving"):
            return rate, high, ""
    return None, rate, f"not even {rate:.4g}/s holds"


def _bisect(search: _Search, low: float, high: float, precision: float) -> tuple[float, float]:
    while high > low * (1 + precision):
        middle = math.sqrt(low * high)
        if search.holds(middle, "bisection"):
            low = middle
        else:
            high = middle
    return low, high


def _confirm(search: _Search, low: float, bounds: Bounds, stopped: str) -> tuple[float | None, str]:
    """The highest rate at or a little below `low` that holds once more."""
    rate = low
    for _ in range(CONFIRMATIONS):
        if search.holds(rate, "confirmation"):
            return rate, stopped
        rate = max(rate * (1 - bounds.precision), bounds.least_rps)
    return None, (
        f"{low:.4g}/s held once, but neither it nor rates a little below held again: "
        "latency is unsteady here; measure longer steps, or on a quieter machine"
    )
