"""Short runs against a real server with a small bundle."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from loadtest.client import Target
from loadtest.errors import ServerGone, ServerNotStarted
from loadtest.measure import measure
from loadtest.payload import Payload, drawn
from loadtest.report import Candidate, Measurement, Plan
from loadtest.search import Bounds
from loadtest.server import inspect
from loadtest.server_process import ServerProcess, serving
from loadtest.session import saturation_and_open_loop, search, tuning
from tests.loadtest.made import SERVER, measurement, plan
from tests.server.tiny_bundle import write_tiny_bundle

PAYLOADS = drawn(3, seed=0, width=96, height=64)
STAGES = {"decode", "preprocess", "queue", "inference", "postprocess"}
QUICK = plan(rate_rps=None, duration_s=1.0, warmup_s=0.2)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny").path


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[ServerProcess]:
    with serving(["--bundle", str(bundle), "--device", "cpu"], {"OMP_NUM_THREADS": "1"}) as process:
        yield process


@pytest.fixture
def target(server: ServerProcess) -> Target:
    return Target(server.url, pid=server.pid)


def check(measured: Measurement) -> None:
    assert measured.answered == measured.requests > 0
    assert measured.errors == {}
    assert set(measured.stages_ms) >= STAGES
    assert measured.latency_ms is not None
    assert measured.service_ms is not None
    inside_ms = sum(measured.stages_ms[stage].mean for stage in STAGES)
    assert inside_ms < measured.service_ms.mean + 1e-3 <= measured.latency_ms.mean + 2e-3
    assert measured.batches is not None
    assert sum(measured.batches.by_size.values()) == measured.batches.count > 0
    assert sum(measured.batches.by_reason.values()) == measured.batches.count
    assert measured.server_cpu is not None
    assert measured.server_cpu.cores > 0


def test_an_open_loop_sends_at_its_rate(target: Target) -> None:
    measured = measure(target, PAYLOADS, plan(rate_rps=60.0, duration_s=1.0, warmup_s=0.2, seed=1))
    check(measured)
    assert 30 < measured.requests < 90  # of 60 expected
    assert measured.generator.lateness_ms is not None
    again = measure(target, PAYLOADS, plan(rate_rps=60.0, duration_s=1.0, warmup_s=0.2, seed=1))
    assert again.requests == measured.requests, "the same seed, the same requests"


def test_saturation_comes_before_a_comfortable_rate(target: Target) -> None:
    said: list[str] = []
    outcome = saturation_and_open_loop(target, PAYLOADS, QUICK, said.append)
    saturated, comfortable = outcome.measurements
    check(saturated)
    check(comfortable)
    assert saturated.plan.concurrency == 32
    assert saturated.generator.in_flight_peak == 32
    assert comfortable.plan.rate_rps == pytest.approx(0.7 * saturated.throughput_rps, rel=0.01)
    assert "70% of that:" in said


def test_a_search_ends_at_the_rate_it_is_given(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadtest.session.STEP_REQUESTS", 30)
    monkeypatch.setattr("loadtest.summary.LATE_MS", 10_000.0)  # a busy machine is not what is tested
    said: list[str] = []
    bounds = Bounds(start_rps=20.0, most_rps=40.0)
    target_ms = 5_000.0
    outcome = search(target, PAYLOADS, QUICK.model_copy(update={"target_ms": target_ms}), bounds, said.append)
    assert outcome.search is not None
    assert outcome.search.rate_rps == 40
    assert [step.phase for step in outcome.search.steps] == ["doubling", "doubling", "confirmation"]
    assert "higher rates were not asked for" in said[-1]
    lengths = [measured.plan.duration_s for measured in outcome.measurements]
    assert lengths == [1.5, 1.0, 1.0], "30 requests, and a second at least"


def test_errors_are_reported_by_code(target: Target) -> None:
    measured = measure(
        target, [Payload("no picture", b"text", "image/png")], QUICK.model_copy(update={"concurrency": 1})
    )
    assert measured.answered == 0
    assert list(measured.errors) == ["422 image_unreadable"]
    assert measured.latency_ms is None


def test_a_server_describes_what_it_serves(target: Target) -> None:
    assert inspect(target).model == "bright 7"


def test_a_server_that_ends_is_gone(bundle: Path) -> None:
    with serving(["--bundle", str(bundle), "--device", "cpu"]) as process:
        pass
    assert process.process.returncode == 0, "it was drained, not killed"
    with pytest.raises(ServerGone, match="refuses connections"):
        measure(Target(process.url), PAYLOADS, QUICK.model_copy(update={"concurrency": 2}))


def test_a_server_that_cannot_start_shows_its_log(tmp_path: Path) -> None:
    with (
        pytest.raises(ServerNotStarted, match=r"status 1 before it was ready:\n.*no bundle at"),
        serving(["--bundle", str(tmp_path / "absent")]),
    ):
        pass


def tuned_in_seconds(rate_rps: float, most_batch: int, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The lengths of a tuning's loads, on a server that answers `rate_rps` whatever its settings are."""
    lengths: list[float] = []

    @contextmanager
    def served(flags: Sequence[str], environment: dict[str, str]) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(url="http://127.0.0.1:1", pid=None)

    def measured(target: Target, payloads: Sequence[Payload], load: Plan) -> Measurement:
        lengths.append(load.duration_s)
        return measurement([50.0] * round(rate_rps * load.duration_s), throughput_rps=rate_rps, **load.model_dump())

    monkeypatch.setattr("loadtest.session.serving", served)
    monkeypatch.setattr("loadtest.session.measure", measured)
    start = Candidate(engine_instances=1, engine_threads=0, max_batch_size=most_batch, max_delay_ms=5.0)
    plan_s = plan(rate_rps=None, duration_s=8.0)
    tuning((SERVER, start), PAYLOADS, plan_s, [], api_key=None, most_clients=64, cores=2, say=lambda _: None)
    return lengths


def test_a_slow_server_s_trials_are_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    first, again, *others = tuned_in_seconds(2.5, 2, monkeypatch)
    assert (first, again) == (8, 40), "100 requests"
    assert min(others) >= 40
    assert max(others) == 60, "200 requests would take longer at the rate where delays are compared"


def test_a_quick_server_s_trials_are_as_long_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(tuned_in_seconds(1000.0, 4, monkeypatch)) == {8.0}


def test_large_batches_need_longer_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = tuned_in_seconds(50.0, 16, monkeypatch)
    assert lengths[0] == 8
    assert lengths[1] == 9.6, "30 batches of 16"
    assert max(lengths) == 19.2, "30 of 32"


@pytest.mark.slow
def test_tuning_starts_its_own_servers(target: Target, bundle: Path) -> None:
    said: list[str] = []
    outcome = tuning(
        (inspect(target), Candidate(engine_instances=1, engine_threads=1, max_batch_size=2, max_delay_ms=5.0)),
        PAYLOADS,
        QUICK,
        ["--bundle", str(bundle), "--device", "cpu"],
        api_key=None,
        most_clients=16,
        cores=1,
        say=said.append,
    )
    assert outcome.tuning is not None
    assert outcome.tuning.trials[0].score is not None
    assert any(line.startswith("  DDETR_MAX_BATCH_SIZE=") for line in said)
    assert all(measured.answered for measured in outcome.measurements)
