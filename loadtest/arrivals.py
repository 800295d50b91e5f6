"""When requests arrive: as a Poisson process, like callers who know nothing of each other or of the server's state."""

import random
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that is due."""

    at_s: float  # since the start
    payload: int  # which of the payloads


def poisson(rate_rps: float, duration_s: float, payloads: int, seed: int) -> Iterator[Arrival]:
    """Arrivals before `duration_s` with exponential gaps of mean 1/`rate_rps`; the same for the same seed."""
    rng = random.Random(seed)
    at_s = rng.expovariate(rate_rps)
    while at_s < duration_s:
        yield Arrival(at_s, rng.randrange(payloads))
        at_s += rng.expovariate(rate_rps)
