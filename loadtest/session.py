"""What `ddetr bench` does, once it knows what is wanted: one load, two, a search or a tuning."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from loadtest import text
from loadtest.client import Target
from loadtest.measure import measure
from loadtest.payload import Payload
from loadtest.report import Candidate, Kind, Measurement, Plan, RateSearch, SearchPhase, Server, Trial, Tuning
from loadtest.search import Bounds, find_rate
from loadtest.server import inspect
from loadtest.server_process import serving
from loadtest.tune import Space, space_for, tune

Say = Callable[[str], None]

SATURATING_CLIENTS = 32
SATURATION_S = 8.0
COMFORTABLE_SHARE = 0.7
"""Of the rate at saturation: a load that a server is meant to bear."""
STEP_REQUESTS = 200
"""A step of a search is as long as these need: of fewer, the 99th percentile says nothing."""
LONGEST_STEP_S = 60.0
TRIAL_REQUESTS, TRIAL_BATCHES = 100, 30
"""A trial of a tuning is as long as both need, within the same bound."""
_START_S = 4.0  # a guess, for the expected duration only


@dataclass(frozen=True)
class Outcome:
    """What a session found."""

    kind: Kind
    measurements: Sequence[Measurement]
    search: RateSearch | None = None
    tuning: Tuning | None = None


@contextmanager
def server_to_test(
    target: Target | None, serve_flags: Sequence[str], settings: Mapping[str, str], api_key: str | None
) -> Iterator[tuple[Target, Server]]:
    """The running server at `target`, or where that is None one started for the test and stopped after it."""
    if target is not None:
        yield target, inspect(target)
        return
    with serving(serve_flags) as process:
        started = Target(process.url, api_key, pid=process.pid)
        yield started, inspect(started, dict(settings))


def single(target: Target, payloads: Sequence[Payload], plan: Plan, say: Say) -> Outcome:
    """One load, open or closed loop as planned."""
    measured = _measured(target, payloads, plan, say)
    return Outcome("open loop" if plan.rate_rps is not None else "closed loop", [measured])


def saturation_and_open_loop(target: Target, payloads: Sequence[Payload], plan: Plan, say: Say) -> Outcome:
    """How much it can bear, then how quick it is at a comfortable share of that."""
    clients = min(SATURATING_CLIENTS, plan.connections)
    saturating = plan.model_copy(
        update={"concurrency": clients, "duration_s": min(plan.duration_s, SATURATION_S), "target_ms": None}
    )
    saturated = _measured(target, payloads, saturating, say)
    if not saturated.throughput_rps:
        return Outcome("closed loop", [saturated])
    rate = COMFORTABLE_SHARE * saturated.throughput_rps
    say("")
    say(f"{COMFORTABLE_SHARE:.0%} of that:")
    comfortable = _measured(target, payloads, plan.model_copy(update={"rate_rps": round(rate, 3)}), say)
    return Outcome("saturation and open loop", [saturated, comfortable])


def search(target: Target, payloads: Sequence[Payload], plan: Plan, bounds: Bounds, say: Say) -> Outcome:
    """The highest rate that holds the plan's target."""
    target_ms = plan.target_ms or 0.0
    say(
        f"searching for the highest rate with p99 within {target_ms:g} ms: some 10 steps of "
        f"{plan.warmup_s + plan.duration_s:g} s, slow ones longer (for {STEP_REQUESTS} requests, up to "
        f"{LONGEST_STEP_S:g} s)"
    )

    def step(rate_rps: float, phase: SearchPhase) -> Measurement:
        duration_s = min(max(plan.duration_s, STEP_REQUESTS / rate_rps), max(plan.duration_s, LONGEST_STEP_S))
        measured = measure(
            target, payloads, plan.model_copy(update={"rate_rps": rate_rps, "duration_s": round(duration_s, 3)})
        )
        say(text.step_line(measured, phase))
        return measured

    found, measurements = find_rate(step, target_ms, bounds)
    for line in ("", *text.search_result(found)):
        say(line)
    return Outcome("rate search", measurements, search=found)


@dataclass
class _Pace:
    """How quick servers were so far: by it, how long a trial must be."""

    plan: Plan
    answers_rps: float | None = None

    def seconds_for(self, requests: float, rate_rps: float | None) -> float:
        """As long as the plan says, or until so many requests are answered at that rate."""
        if not rate_rps:
            return self.plan.duration_s
        return round(min(max(self.plan.duration_s, requests / rate_rps), max(self.plan.duration_s, LONGEST_STEP_S)), 3)


@dataclass
class _Loads:
    """A server with a candidate's settings."""

    target: Target
    payloads: Sequence[Payload]
    candidate: Candidate
    clients: int
    pace: _Pace
    measurements: list[Measurement]

    def saturate(self) -> Measurement:
        # Answers come by batches: a trial's ends cut through one, which must be a small part of all.
        needed = max(TRIAL_REQUESTS, TRIAL_BATCHES * self.candidate.max_batch_size)
        measured = self._saturate(self.pace.seconds_for(needed, self.pace.answers_rps))
        longer_s = self.pace.seconds_for(needed, measured.throughput_rps or None)
        if measured.answered < needed / 2 and longer_s > measured.plan.duration_s:
            measured = self._saturate(longer_s)
        self.pace.answers_rps = measured.throughput_rps or self.pace.answers_rps
        return measured

    def at_rate(self, rate_rps: float, target_ms: float | None) -> Measurement:
        seconds = self.pace.seconds_for(STEP_REQUESTS, rate_rps)
        return self._measure({"rate_rps": round(rate_rps, 3), "target_ms": target_ms, "duration_s": seconds})

    def _saturate(self, duration_s: float) -> Measurement:
        return self._measure({"concurrency": self.clients, "target_ms": None, "duration_s": duration_s})

    def _measure(self, load: Mapping[str, float | None]) -> Measurement:
        measured = measure(self.target, self.payloads, self.pace.plan.model_copy(update=load))
        self.measurements.append(measured)
        return measured


@dataclass
class _Progress:
    """A line for each trial, with the time that is left."""

    say: Say
    expected: int
    started_s: float = field(default_factory=time.monotonic)
    done: int = field(default=0)

    def __call__(self, trial: Trial) -> None:
        self.done += 1
        left_s = max(0, self.expected - self.done) * (time.monotonic() - self.started_s) / self.done
        self.say(f"{text.trial_line(trial)}   [{self.done} of about {self.expected}, {_minutes(left_s)} left]")


def tuning(
    first: tuple[Server, Candidate],
    payloads: Sequence[Payload],
    plan: Plan,
    serve_flags: Sequence[str],
    api_key: str | None,
    most_clients: int,
    cores: int,
    say: Say,
) -> Outcome:
    """Good settings for this host: `first` is what is served without tuning."""
    server, start = first
    space: Space = space_for(start, cores, on_gpu=" on cpu" not in server.engine)
    measurements: list[Measurement] = []
    pace = _Pace(plan)

    @contextmanager
    def serve(candidate: Candidate) -> Iterator[_Loads]:
        # Enough to fill every batch twice over, and no more than the queue lets in.
        clients = max(SATURATING_CLIENTS, 4 * candidate.max_batch_size * candidate.engine_instances)
        clients = min(clients, most_clients, plan.connections)
        with serving(serve_flags, candidate.environment()) as process:
            served = Target(process.url, api_key, pid=process.pid)
            yield _Loads(served, payloads, candidate, clients, pace, measurements)

    loads_each = 1 if plan.target_ms is None else 3
    trial_s = _START_S + loads_each * (plan.warmup_s + plan.duration_s)
    expected = space.expected_trials()
    say(
        f"tuning: about {expected} trials of {trial_s:.0f} s or longer (until enough is answered), "
        f"{_minutes(expected * trial_s)} or more"
    )
    say(text.trial_header())
    found = tune(serve, space, plan.target_ms, _Progress(say, expected))
    for line in ("", *text.tuning_result(found)):
        say(line)
    return Outcome("tuning", measurements, tuning=found)


def _measured(target: Target, payloads: Sequence[Payload], plan: Plan, say: Say) -> Measurement:
    say(text.title(plan))
    measured = measure(target, payloads, plan)
    for line in text.describe(measured):
        say(line)
    return measured


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
