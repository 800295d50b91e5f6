import asyncio

import pytest

from loadtest.client import OK, Answer
from loadtest.load import Load, Sample
from loadtest.payload import Payload
from loadtest.report import Measurement
from loadtest.scrape import Scrape
from loadtest.summary import Snapshot, curve, summarise, within
from tests.loadtest.made import plan


async def never(payload: Payload) -> Answer:
    raise NotImplementedError


def look(at_s: float, own_s: float = 0.0, server_s: float | None = None, scrape: Scrape | None = None) -> Snapshot:
    return Snapshot(at_s, own_s, server_s, scrape)


def summary(samples: list[Sample], **changes: object) -> Measurement:
    """Of a run of 1 s of warm-up and 10 s that count."""
    load = Load(never, [], connections=64)
    load.samples = samples
    before, after = changes.pop("looks", (look(0.0), look(10.0)))  # type: ignore[misc]
    return summarise(load, plan(**changes), before, after)


def sample(due_s: float, latency_s: float, outcome: str = OK, late_s: float = 0.0, **more: object) -> Sample:
    return Sample(due_s, due_s + late_s, due_s + latency_s, outcome, **more)  # type: ignore[arg-type]


def test_what_was_due_in_the_warm_up_or_after_the_end_does_not_count() -> None:
    measured = summary([sample(0.9, 0.5), sample(1.0, 0.1), sample(10.9, 0.2), sample(11.0, 0.1)])
    assert (measured.requests, measured.answered) == (2, 2)
    assert measured.latency_ms is not None
    assert measured.latency_ms.max == 200


def test_throughput_counts_answers_that_came_in_the_measured_time() -> None:
    # Due before it and answered in it; due in it and answered after it; and one that is no answer.
    measured = summary([sample(0.9, 0.5), sample(5.0, 0.1), sample(10.9, 5.0), sample(3.0, 0.1, "500")])
    assert measured.throughput_rps == pytest.approx(0.2)


def test_errors_are_counted_by_code_the_most_frequent_first_and_have_no_latency() -> None:
    measured = summary(
        [sample(2.0, 9.0, "timeout"), sample(2.0, 0.1), *(sample(3.0, 0.01, "429 queue_full") for _ in range(2))]
    )
    assert list(measured.errors.items()) == [("429 queue_full", 2), ("timeout", 1)]
    assert measured.latency_ms is not None
    assert measured.latency_ms.count == 1
    assert (measured.requests, measured.answered) == (4, 1)


def test_failed_requests_are_not_within_the_target() -> None:
    measured = summary(
        [*(sample(2.0, 0.1) for _ in range(98)), *(sample(2.0, 0.01, "503") for _ in range(2))], target_ms=200
    )
    assert measured.within_target == 0.98
    assert within([100.0, 200.0, 201.0], 4, 200.0) == 0.5
    assert within([], 0, 200.0) == 0.0
    assert within([1.0], 1, None) is None


def test_latency_is_since_due_and_service_since_sent() -> None:
    measured = summary([sample(2.0, 0.5, late_s=0.1)] * 20)
    assert measured.latency_ms is not None
    assert measured.service_ms is not None
    assert (measured.latency_ms.p50, measured.service_ms.p50) == (500, 400)
    assert measured.generator.lateness_ms is not None
    assert measured.generator.lateness_ms.p99 == 100


@pytest.mark.parametrize(
    ("late_s", "latency_s", "valid"),
    [(0.009, 0.05, True), (0.02, 0.05, False), (0.02, 0.5, True), (0.1, 0.5, False)],
)
def test_a_generator_that_lags_spoils_the_run(late_s: float, latency_s: float, valid: bool) -> None:
    quick = [sample(2.0, latency_s) for _ in range(195)]
    measured = summary([*quick, *(sample(2.0, latency_s, late_s=late_s) for _ in range(5))])
    assert measured.valid is valid
    assert ("behind its schedule" in " ".join(measured.remarks)) is not valid


def test_one_late_request_in_200_spoils_nothing() -> None:
    assert summary([sample(2.0, 1.0, late_s=0.9), *(sample(2.0, 0.05) for _ in range(199))]).valid


def test_a_generator_that_fills_its_core_spoils_the_run() -> None:
    samples = [sample(2.0, 0.05) for _ in range(200)]
    assert summary(samples, looks=(look(0.0), look(10.0, own_s=5.0))).valid
    spoiled = summary(samples, looks=(look(0.0), look(10.0, own_s=9.5)))
    assert not spoiled.valid
    assert "0.95 of the one core" in spoiled.remarks[0]
    assert spoiled.generator.cpu_cores == pytest.approx(0.95)


def test_a_closed_loop_has_no_lateness() -> None:
    measured = summary([sample(2.0, 0.05, late_s=0.04)] * 200, rate_rps=None, concurrency=4)
    assert measured.generator.lateness_ms is None
    assert measured.valid


def test_few_answers_and_none_are_remarked() -> None:
    assert "p99 of 99 answers is the slowest" in summary([sample(2.0, 0.1)] * 99).remarks[0]
    assert summary([sample(2.0, 0.1)] * 100).remarks == ()
    nothing = summary([])
    assert "no request was due" in nothing.remarks[0]
    assert (nothing.latency_ms, nothing.latency_curve_ms, nothing.throughput_rps) == (None, (), 0)


def test_cpu_time_of_the_server_by_answer() -> None:
    looks = (look(100.0, server_s=7.0), look(110.0, server_s=12.0))
    measured = summary([sample(2.0, 0.1) for _ in range(50)], looks=looks)
    assert measured.server_cpu is not None
    assert (measured.server_cpu.cores, measured.server_cpu.ms_per_request) == (0.5, 100)
    assert summary([sample(2.0, 0.1)], looks=(look(0.0), look(1.0))).server_cpu is None


def test_stages_come_from_the_answers() -> None:
    measured = summary(
        [
            sample(2.0, 0.1, stages_ms={"decode": 2.0, "queue": 5.0}),
            sample(2.0, 0.1, stages_ms={"decode": 4.0}),
            sample(2.0, 0.1),
            sample(2.0, 0.1, "500", stages_ms={"decode": 1000.0}),
        ]
    )
    assert {name: (found.count, found.max) for name, found in measured.stages_ms.items()} == {
        "decode": (2, 4.0),
        "queue": (1, 5.0),
    }


def test_waiting_for_connections_is_remarked() -> None:
    async def ok(payload: Payload) -> Answer:
        await asyncio.sleep(0)
        return Answer(OK)

    async def crowd() -> Load:
        load = Load(ok, [Payload("a", b"", "image/png")], connections=1)
        await load.closed_loop(3, 0.01, seed=0)
        return load

    load = asyncio.run(crowd())
    measured = summarise(load, plan(warmup_s=0.0, rate_rps=None, concurrency=3), look(0.0), look(10.0))
    assert measured.generator.waited_for_connection > 0
    assert "--connections" in " ".join(measured.remarks)


def test_the_curve_has_all_percentiles() -> None:
    found = curve([float(value) for value in range(1, 101)])
    assert found == (1.0, *(float(value) for value in range(1, 101)))
