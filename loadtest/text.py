"""A report in words and columns, for a terminal."""

from collections.abc import Iterator, Mapping

from loadtest.report import Candidate, Distribution, Host, Measurement, Plan, RateSearch, Server, Trial, Tuning

_LABEL = 16


def headline(host: Host, server: Server, pictures: str) -> list[str]:
    """What is tested, from where, with what."""
    shared = " (shared with the load generator)" if server.on_this_host else ""
    lines = [
        f"{server.model} ({server.variant}, {server.precision}) on {server.engine}",
        f"at {server.url}{shared}; sent: {pictures}",
        f"from {host.cores} cores of {host.cpu}, load {host.load_average:g}, Python {host.python}",
    ]
    if server.settings:
        lines.append("settings: " + ", ".join(f"{name} {value}" for name, value in server.settings.items()))
    return lines


def title(plan: Plan) -> str:
    """What kind of load it is."""
    if plan.rate_rps is not None:
        load = f"open loop: Poisson arrivals at {plan.rate_rps:.4g}/s, seed {plan.seed}"
    else:
        load = f"closed loop: {plan.concurrency} clients, each waiting for its answer (saturation)"
    return f"{load}; {plan.duration_s:g} s after {plan.warmup_s:g} s of warm-up"


def describe(measurement: Measurement) -> list[str]:
    """All that was measured, a line each."""
    return [f"  {label:<{_LABEL}}{text}" for label, text in _rows(measurement)]


def _rows(measurement: Measurement) -> Iterator[tuple[str, str]]:
    answered = f"{measurement.answered} of {measurement.requests} requests"
    yield "answered", f"{answered}, {measurement.throughput_rps:.4g} a second"
    since = "due" if measurement.plan.rate_rps is not None else "sent"
    if measurement.latency_ms is not None:
        yield "latency ms", f"{percentiles(measurement.latency_ms)}   (since the request was {since})"
    if measurement.within_target is not None:
        yield "within target", f"{measurement.within_target:.2%} within {measurement.plan.target_ms:g} ms"
    yield "errors", counts(measurement.errors) or "none"
    if measurement.tries > measurement.requests:
        yield "tries", f"{measurement.tries} for {measurement.requests} requests, after Retry-After"
    if measurement.stages_ms:
        yield "stages, p50 ms", ", ".join(f"{name} {found.p50:.1f}" for name, found in measurement.stages_ms.items())
        yield "stages, p99 ms", ", ".join(f"{name} {found.p99:.1f}" for name, found in measurement.stages_ms.items())
    if (batches := measurement.batches) is not None:
        sizes = counts(batches.by_size)
        yield "batches", f"{batches.count}, {batches.mean_size:.2f} images each (size: number {sizes})"
        yield "", f"left because: {counts(batches.by_reason)}"
    if (cpu := measurement.server_cpu) is not None:
        each = "" if cpu.ms_per_request is None else f", {cpu.ms_per_request:.1f} ms of CPU time a request"
        yield "server", f"{cpu.cores:.2f} cores{each}"
    generator = measurement.generator
    late = "" if generator.lateness_ms is None else f", p99 of its lateness {generator.lateness_ms.p99:.1f} ms"
    yield (
        "generator",
        f"{generator.cpu_cores:.2f} cores{late}, at most {generator.in_flight_peak} requests on their way",
    )
    for number, remark in enumerate(measurement.remarks):
        yield "NOT VALID" if number == 0 and not measurement.valid else "note", remark


def percentiles(found: Distribution) -> str:
    """`p50 41.2   p95 66.1   p99 80.3   max 102.5`."""
    return "   ".join(
        f"{name} {value:.1f}"
        for name, value in (("p50", found.p50), ("p95", found.p95), ("p99", found.p99), ("max", found.max))
    )


def counts(numbers: Mapping[str, int]) -> str:
    """`1: 20, 2: 31`."""
    return ", ".join(f"{name}: {number}" for name, number in numbers.items())


def step_line(measurement: Measurement, phase: str) -> str:
    """One step of a search for the highest rate, while it runs."""
    latency = measurement.latency_ms
    shown = "no answers" if latency is None else f"p50 {latency.p50:.1f}, p99 {latency.p99:.1f} ms"
    within = measurement.within_target or 0.0
    failed = measurement.requests - measurement.answered
    errors = f", {failed} failed ({counts(measurement.errors)})" if failed else ""
    return (
        f"  {phase:<12} {measurement.plan.rate_rps:>8.4g}/s   {within:>7.2%} within "
        f"{measurement.plan.target_ms:g} ms   {shown}{errors}"
    )


def search_result(search: RateSearch) -> list[str]:
    """What the search found, and why it stopped."""
    found = "no rate" if search.rate_rps is None else f"{search.rate_rps:.4g} requests a second"
    return [f"{found} with p99 within {search.p99_ms:g} ms", f"stopped because {search.stopped}"]


def trial_header() -> str:
    """Above the lines of a tuning's trials."""
    names = (
        ("instances", 9),
        ("threads", 9),
        ("batch", 7),
        ("delay ms", 10),
        ("score", 9),
        ("p50 ms", 9),
        ("p95 ms", 9),
    )
    return f"  {'':<13}{''.join(f'{name:>{width}}' for name, width in names)}{'batches of':>12}"


def trial_line(trial: Trial) -> str:
    """One candidate and what it gave."""
    candidate = trial.candidate
    threads = str(candidate.engine_threads or "all")
    score = "-" if trial.score is None else f"{trial.score:.1f}"
    latency = trial.latency_ms
    p50, p95 = ("-", "-") if latency is None else (f"{latency.p50:.1f}", f"{latency.p95:.1f}")
    size = "-" if trial.mean_batch_size is None else f"{trial.mean_batch_size:.1f}"
    remark = trial.remark.splitlines()[0] if trial.remark else ""
    return (
        f"  {trial.phase:<13}{candidate.engine_instances:>9}{threads:>9}{candidate.max_batch_size:>7}"
        f"{candidate.max_delay_ms:>10g}{score:>9}{p50:>9}{p95:>9}{size:>12}  {remark}"
    ).rstrip()


def tuning_result(tuning: Tuning) -> list[str]:
    """The settings to use, in both forms."""
    if tuning.gain is None:
        verdict = "the present settings hold the target at no rate; these do:"
    elif tuning.chosen == tuning.trials[0].candidate:
        verdict = "nothing tried is clearly better than the present settings:"
    elif tuning.gain == 1.0:
        verdict = "with these the present settings bear as much, and p95 is lower:"
    else:
        verdict = f"{tuning.gain - 1:+.0%} {tuning.goal}, measured in turns with the present settings:"
    return [verdict, "", *use(tuning.chosen)]


def use(candidate: Candidate) -> list[str]:
    """As variables, and as a command."""
    variables = [f"  {name}={value}" for name, value in candidate.environment().items()]
    return [*variables, "", f"  ddetr serve {' '.join(candidate.flags())}"]
