from loadtest import text
from loadtest.report import Batches, Candidate, Trial, Tuning
from loadtest.search import Bounds, find_rate
from tests.loadtest.made import HOST, SERVER, measurement, plan
from tests.loadtest.test_tune import START

BATCHES = Batches(count=10, mean_size=2.5, by_size={"2": 5, "3-4": 5}, by_reason={"idle": 10})


def test_the_headline_tells_who_is_tested_and_from_where() -> None:
    lines = "\n".join(text.headline(HOST, SERVER, "16 smears"))
    for part in ("bright 7", "http://127.0.0.1:1 (shared with the load generator)", "16 smears", "4 cores of abacus"):
        assert part in lines
    apart = text.headline(HOST, SERVER.model_copy(update={"on_this_host": False}), "16 smears")
    assert "shared" not in "\n".join(apart)


def test_a_load_is_named_by_its_kind() -> None:
    assert "open loop: Poisson arrivals at 12.5/s, seed 3" in text.title(plan(rate_rps=12.5, seed=3))
    assert "closed loop: 7 clients" in text.title(plan(rate_rps=None, concurrency=7))
    assert "saturation" in text.title(plan(rate_rps=None, concurrency=7))


def test_a_measurement_is_described_in_full() -> None:
    lines = "\n".join(
        text.describe(measurement([10.0, 20.0], failed=2, within_target=0.5, batches=BATCHES, target_ms=15))
    )
    for part in (
        "2 of 4 requests, 0.2 a second",
        "p50 10.0   p95 20.0   p99 20.0   max 20.0",
        "50.00% within 15 ms",
        "429 queue_full: 2",
        "decode 10.0, inference 10.0",
        "10, 2.50 images each (size: number 2: 5, 3-4: 5)",
        "left because: idle: 10",
        "0.10 cores",
    ):
        assert part in lines
    assert "NOT VALID" not in lines


def test_what_spoils_a_measurement_stands_out() -> None:
    lines = text.describe(measurement([10.0], valid=False))
    assert lines[-1].split("  ")[1] == "NOT VALID"
    assert "errors          none" in "\n".join(lines)


def test_a_search_says_what_it_found_and_why_it_stopped() -> None:
    found, measurements = find_rate(
        lambda rate, _: measurement([30.0], rate_rps=rate, within_target=float(rate < 9), target_ms=50),
        50.0,
        Bounds(4.0),
    )
    assert "4/s   100.00% within 50 ms   p50 30.0, p99 30.0 ms" in text.step_line(measurements[0], "doubling")
    first, second = text.search_result(found)
    assert first.endswith("requests a second with p99 within 50 ms")
    assert second.startswith("stopped because ")
    failed = text.step_line(measurement([], failed=3, within_target=0.0, target_ms=50), "doubling")
    assert "no answers, 3 failed (429 queue_full: 3)" in failed


def trial(candidate: Candidate, score: float | None = 40.0, remark: str = "") -> Trial:
    return Trial(
        candidate=candidate,
        phase="start",
        score=score,
        throughput_rps=score,
        latency_ms=None,
        mean_batch_size=None,
        remark=remark,
    )


def tuning(chosen: Candidate, gain: float | None) -> str:
    made = Tuning(goal="requests a second at saturation", chosen=chosen, gain=gain, trials=(trial(START),))
    return "\n".join(text.tuning_result(made))


def test_a_tuning_ends_with_settings_to_copy() -> None:
    better = START.model_copy(update={"max_batch_size": 8})
    lines = tuning(better, 1.25)
    assert "+25% requests a second at saturation" in lines
    assert "  DDETR_MAX_BATCH_SIZE=8\n" in lines
    assert lines.endswith("--engine-instances 1 --engine-threads 0 --max-batch-size 8 --max-delay-ms 5")


def test_a_tuning_does_not_claim_what_it_did_not_find() -> None:
    assert "nothing tried is clearly better" in tuning(START, 1.0)
    assert "p95 is lower" in tuning(START.model_copy(update={"max_delay_ms": 0.0}), 1.0)
    assert "at no rate" in tuning(START.model_copy(update={"max_batch_size": 8}), None)


def test_a_table_of_trials_is_in_columns() -> None:
    header, line = text.trial_header(), text.trial_line(trial(START, score=None, remark="it ended:\nTraceback"))
    for name, value in (("batch", "4"), ("score", "-")):
        end = header.index(name) + len(name)
        assert line[:end].endswith(f" {value}")
    assert line.endswith("it ended:"), "one line each"
    assert " all " in line
