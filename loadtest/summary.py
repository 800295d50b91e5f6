"""From samples to a measurement: what of a run counts, and whether the generator was in its way."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from loadtest.load import Load, Sample, is_ok
from loadtest.report import CURVE_STEPS, Batches, Distribution, Generator, Measurement, Plan, ServerCpu, percentile
from loadtest.scrape import BatchesFormed, Scrape, between

# The generator may be late by this, or by this share of the latency it reports, before it counts as too slow.
LATE_MS, LATE_SHARE = 10.0, 0.1
BUSY_CORES = 0.9
"""One event loop is one core: above this it is the generator that is saturated."""
FEW_REQUESTS = 100
"""With fewer, the 99th percentile is the slowest request."""


@dataclass(frozen=True)
class Snapshot:
    """What is read at the beginning and at the end of the measured time."""

    at_s: float  # by any one clock
    generator_cpu_s: float
    server_cpu_s: float | None
    scrape: Scrape | None


def summarise(load: Load, plan: Plan, before: Snapshot, after: Snapshot) -> Measurement:
    """The measurement of a run that has ended."""
    begin_s, end_s = plan.warmup_s, plan.warmup_s + plan.duration_s
    due = [sample for sample in load.samples if begin_s <= sample.due_s < end_s]
    answered = [sample for sample in due if is_ok(sample)]
    came = sum(is_ok(sample) and begin_s <= sample.done_s < end_s for sample in load.samples)
    latencies = sorted(sample.latency_ms for sample in answered)
    latency = Distribution.of(latencies)
    generator = _generator(load, plan, due, before, after)
    complaints = _complaints(generator, latency)
    return Measurement(
        plan=plan,
        requests=len(due),
        answered=len(answered),
        throughput_rps=came / plan.duration_s,
        latency_ms=latency,
        latency_curve_ms=curve(latencies),
        within_target=within(latencies, len(due), plan.target_ms),
        service_ms=Distribution.of((sample.done_s - sample.sent_s) * 1e3 for sample in answered),
        errors=dict(Counter(sample.outcome for sample in due if not is_ok(sample)).most_common()),
        tries=sum(sample.tries for sample in due),
        stages_ms=_stages(answered),
        batches=_batches(between(before.scrape, after.scrape)),
        generator=generator,
        server_cpu=_server_cpu(before, after, came),
        valid=not complaints,
        remarks=(*complaints, *_remarks(plan, generator, len(due), len(answered))),
    )


def curve(ordered: Sequence[float]) -> tuple[float, ...]:
    """The percentiles 0 to 100 of values in ascending order, rounded to a microsecond; empty if there are none."""
    if not ordered:
        return ()
    return tuple(round(percentile(ordered, 100 * step / CURVE_STEPS), 3) for step in range(CURVE_STEPS + 1))


def within(latencies_ms: Sequence[float], requests: int, target_ms: float | None) -> float | None:
    """Share of `requests` that were answered within the target; the rest were answered late or not at all."""
    if target_ms is None:
        return None
    return sum(latency <= target_ms for latency in latencies_ms) / requests if requests else 0.0


def _generator(load: Load, plan: Plan, due: Sequence[Sample], before: Snapshot, after: Snapshot) -> Generator:
    late = (sample.sent_s - sample.due_s for sample in due)
    return Generator(
        cpu_cores=(after.generator_cpu_s - before.generator_cpu_s) / (after.at_s - before.at_s),
        lateness_ms=Distribution.of(seconds * 1e3 for seconds in late) if plan.rate_rps is not None else None,
        in_flight_peak=load.in_flight_peak,
        waited_for_connection=load.waited_for_connection,
    )


def _complaints(generator: Generator, latency: Distribution | None) -> list[str]:
    """Why the figures are the generator's and not the server's."""
    complaints = []
    late = generator.lateness_ms
    if late is not None:
        allowed_ms = max(LATE_MS, LATE_SHARE * latency.p99 if latency is not None else 0.0)
        if late.p99 > allowed_ms:
            complaints.append(
                f"the generator fell behind its schedule: one request in 100 was sent {late.p99:.0f} ms late or more "
                f"({allowed_ms:.0f} may be); lower the rate, or send from another machine"
            )
    if generator.cpu_cores > BUSY_CORES:
        complaints.append(
            f"the generator used {generator.cpu_cores:.2f} of the one core it can use: "
            "what was measured is the generator; run several of them, and add up"
        )
    return complaints


def _remarks(plan: Plan, generator: Generator, requests: int, answered: int) -> list[str]:
    remarks = []
    if generator.waited_for_connection:
        remarks.append(
            f"{generator.waited_for_connection} requests waited here for one of {plan.connections} connections "
            "(counted in their latency): more with --connections"
        )
    if 0 < answered < FEW_REQUESTS:
        remarks.append(f"p99 of {answered} answers is the slowest of them: measure longer for one that means something")
    if not requests:
        remarks.append("no request was due in the measured time: measure longer, or at a higher rate")
    return remarks


def _stages(answered: Sequence[Sample]) -> dict[str, Distribution]:
    names = dict.fromkeys(name for sample in answered for name in sample.stages_ms or ())
    distributions = {
        name: Distribution.of(
            sample.stages_ms[name] for sample in answered if sample.stages_ms is not None and name in sample.stages_ms
        )
        for name in names
    }
    return {name: distribution for name, distribution in distributions.items() if distribution is not None}


def _batches(formed: BatchesFormed | None) -> Batches | None:
    if formed is None or not formed.count:
        return None
    return Batches(
        count=formed.count,
        mean_size=formed.images / formed.count,
        by_size=dict(formed.by_size),
        by_reason=dict(formed.by_reason),
    )


def _server_cpu(before: Snapshot, after: Snapshot, answers: int) -> ServerCpu | None:
    if before.server_cpu_s is None or after.server_cpu_s is None:
        return None
    took_s = after.server_cpu_s - before.server_cpu_s
    return ServerCpu(
        cores=took_s / (after.at_s - before.at_s),
        ms_per_request=took_s * 1e3 / answers if answers else None,
    )
