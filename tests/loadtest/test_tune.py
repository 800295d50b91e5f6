"""Tuning on response surfaces that are a formula."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from loadtest.errors import ServerNotStarted
from loadtest.report import Batches, Candidate, Measurement, Trial, Tuning
from loadtest.tune import Space, space_for, tune
from tests.loadtest.made import measurement

START = Candidate(engine_instances=1, engine_threads=0, max_batch_size=4, max_delay_ms=5.0)
FOUR_CORES = space_for(START, cores=4, on_gpu=False)

Throughput = Callable[[Candidate], float]


class Surface:
    """Servers whose throughput is a formula of their settings; latency is, too, and doubles near saturation."""

    def __init__(self, throughput: Throughput, latency_ms: Throughput = lambda _: 50.0) -> None:
        self.throughput = throughput
        self.latency_ms = latency_ms
        self.served: list[Candidate] = []
        self.running = 0

    @contextmanager
    def serve(self, candidate: Candidate) -> Iterator["Loads"]:
        self.served.append(candidate)
        self.running += 1
        assert self.running == 1, "two servers at once disturb each other"
        try:
            yield Loads(self, candidate)
        finally:
            self.running -= 1

    def tune(self, space: Space = FOUR_CORES, p99_ms: float | None = None) -> Tuning:
        return tune(self.serve, space, p99_ms)


class Loads:
    def __init__(self, surface: Surface, candidate: Candidate) -> None:
        self.throughput = surface.throughput(candidate)
        self.latency_ms = surface.latency_ms(candidate)
        self.batches = Batches(count=10, mean_size=float(candidate.max_batch_size), by_size={}, by_reason={})

    def saturate(self) -> Measurement:
        return measurement(
            [self.latency_ms * 4] * 100,
            throughput_rps=self.throughput,
            rate_rps=None,
            concurrency=32,
            batches=self.batches,
        )

    def at_rate(self, rate_rps: float, target_ms: float | None) -> Measurement:
        latency = self.latency_ms * (2 if rate_rps > 0.75 * self.throughput else 1)
        within = None if target_ms is None else float(latency <= target_ms)
        return measurement(
            [latency] * 100, throughput_rps=rate_rps, within_target=within, rate_rps=rate_rps, target_ms=target_ms
        )


def cores_used(candidate: Candidate) -> int:
    return candidate.engine_instances * (candidate.engine_threads or 4 // candidate.engine_instances)


def test_it_follows_the_surface_to_its_top() -> None:
    def throughput(candidate: Candidate) -> float:
        # Best with 2 instances and batches of 16; a larger one is worse again.
        shared = {1: 1.0, 2: 1.4, 4: 1.2}[candidate.engine_instances] * cores_used(candidate)
        return shared * {1: 5, 2: 6, 4: 7, 8: 8, 16: 9, 32: 8.5, 64: 8}[candidate.max_batch_size]

    surface = Surface(throughput)
    found = surface.tune()
    assert (found.chosen.engine_instances, found.chosen.engine_threads) == (2, 2)
    assert found.chosen.max_batch_size == 16
    assert found.gain == pytest.approx(1.4 * 9 / 7)
    assert len(surface.served) <= FOUR_CORES.expected_trials()
    assert [trial.candidate for trial in found.trials] == surface.served


def test_what_is_hardly_better_changes_nothing() -> None:
    found = Surface(lambda candidate: 50.0 + candidate.engine_instances / 2 + candidate.max_batch_size / 16).tune()
    assert found.chosen == START
    assert found.gain == 1.0


def test_a_smaller_batch_that_is_as_good_waits_less() -> None:
    found = Surface(lambda candidate: 50.0 * (1.05 if candidate.max_batch_size <= 2 else 1.0)).tune()
    assert found.chosen.max_batch_size == 1
    assert found.gain == pytest.approx(1.05)


def test_the_delay_is_chosen_by_latency() -> None:
    latencies = {0.0: 50.0, 5.0: 50.0, 20.0: 40.0}
    found = Surface(lambda _: 50.0, lambda candidate: latencies[candidate.max_delay_ms]).tune()
    assert found.chosen == START.model_copy(update={"max_delay_ms": 20.0})
    delays = [trial for trial in found.trials if trial.phase == "delay"]
    assert all(trial.score is None and trial.remark == "at 35/s" for trial in delays)


def test_a_delay_that_is_better_by_luck_is_not_chosen() -> None:
    asked: list[Candidate] = []

    def latency(candidate: Candidate) -> float:
        asked.append(candidate)
        return 30.0 if candidate.max_delay_ms == 20.0 and asked.count(candidate) == 1 else 50.0

    found = Surface(lambda _: 50.0, latency).tune()
    assert found.chosen == START
    assert [trial.candidate.max_delay_ms for trial in found.trials if trial.phase == "delay"] == [5, 0, 20, 5, 20]


def test_a_gain_that_does_not_show_again_is_dropped() -> None:
    asked: list[Candidate] = []

    def throughput(candidate: Candidate) -> float:
        asked.append(candidate)
        return 60.0 if candidate.engine_instances == 2 and asked.count(candidate) == 1 else 50.0

    found = Surface(throughput).tune()
    assert found.chosen == START
    assert found.gain == 1.0
    confirmed = [trial.candidate for trial in found.trials if trial.phase == "confirmation"]
    assert confirmed[0::2] == [START, START], "in turns"
    assert confirmed[1] == confirmed[3] != START


def test_with_a_target_the_rate_that_holds_it_decides() -> None:
    # A batch of 8 has more throughput, but its latency is within 100 ms at no rate.
    surface = Surface(
        lambda candidate: 10.0 * candidate.max_batch_size,
        lambda candidate: 150.0 if candidate.max_batch_size >= 8 else 60.0,
    )
    found = surface.tune(p99_ms=100.0)
    assert found.chosen.max_batch_size == 4
    assert found.trials[0].score == pytest.approx(0.7 * 40)  # nearer to saturation it takes 120 ms
    assert "p99 within 100 ms" in found.goal
    assert surface.tune().chosen.max_batch_size == 64


def test_settings_that_make_the_target_possible_are_chosen_over_none() -> None:
    found = Surface(lambda _: 40.0, lambda candidate: 60.0 if candidate.engine_instances == 4 else 500.0).tune(
        p99_ms=100.0
    )
    assert found.chosen.engine_instances == 4
    assert found.gain is None


def test_a_candidate_that_cannot_be_served_is_passed_over() -> None:
    surface = Surface(lambda candidate: 50.0 * candidate.engine_instances)

    @contextmanager
    def serve(candidate: Candidate) -> Iterator[Loads]:
        if candidate.engine_instances == 4:
            raise ServerNotStarted("out of memory")
        with surface.serve(candidate) as loads:
            yield loads

    trials: list[Trial] = []
    found = tune(serve, FOUR_CORES, on_trial=trials.append)
    assert found.chosen.engine_instances == 2
    [failed] = [trial for trial in trials if trial.score is None and trial.phase == "threads"]
    assert failed.remark == "out of memory"
    assert tuple(trials) == found.trials


def test_where_nothing_can_be_served_it_says_why() -> None:
    @contextmanager
    def serve(candidate: Candidate) -> Iterator[Loads]:
        raise ServerNotStarted("no bundle")
        yield

    with pytest.raises(ServerNotStarted, match="no bundle"):
        tune(serve, FOUR_CORES)


@pytest.mark.parametrize(
    ("cores", "on_gpu", "divisions"),
    [
        (1, False, {(1, 1)}),
        (2, False, {(1, 2), (2, 1), (1, 1)}),
        (6, False, {(1, 6), (2, 3), (4, 1), (1, 5)}),
        (16, False, {(1, 16), (2, 8), (4, 4), (8, 2), (16, 1), (1, 15)}),
        (16, True, {(1, 0), (2, 0)}),
    ],
)
def test_the_ways_to_share_the_cores(cores: int, on_gpu: bool, divisions: set[tuple[int, int]]) -> None:
    assert set(space_for(START, cores, on_gpu).divisions) == divisions


def test_the_first_candidate_is_not_tried_again_in_other_words() -> None:
    surface = Surface(lambda _: 50.0)
    surface.tune()
    assert START.model_copy(update={"engine_threads": 4}) not in surface.served
