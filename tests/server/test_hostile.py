"""Attacks on a server in a process of its own: each is answered with a reason, at no cost to memory or to others."""

from collections.abc import Iterator

import pytest

from tests.server.hostile import ATTACKS, Attack
from tests.server.siege import Siege

MOST_GROWTH_MB = 32
MOST_NEIGHBOUR_MS = 2000  # a busy machine of two cores; measured alone: below 50


@pytest.fixture(scope="module")
def siege() -> Iterator[Siege]:
    with Siege() as siege:
        yield siege


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_an_attack_is_answered_with_a_reason_and_costs_nothing(siege: Siege, attack: Attack) -> None:
    result = siege.attack(attack)
    assert (result.status, result.code) == (attack.status, attack.code), result
    if attack.code:
        assert result.message
    assert result.growth_mb < MOST_GROWTH_MB, result
    assert result.neighbour_ms < MOST_NEIGHBOUR_MS, result
    assert siege.process.poll() is None
