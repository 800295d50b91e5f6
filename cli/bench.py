"""`ddetr bench`: load on a server, and how it bears it."""

from __future__ import annotations

import argparse
import importlib.util
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from bundle import BundleError
from cli.handover import EXIT_MISSING_EXTRA, say_missing_extra
from cli.serve import read_settings
from server.version import version

if TYPE_CHECKING:
    from loadtest.client import Target
    from loadtest.payload import Payload
    from loadtest.report import Host, Plan, Server
    from loadtest.session import Outcome
    from server.settings import Settings

EXIT_FAILED = 1
TERMINATED = 143  # what a shell reports for a command ended by SIGTERM

LOAD_S, STEP_S, TRIAL_S = 20.0, 15.0, 8.0
FIRST_RATE_RPS = 4.0
P99_MS = 200.0
DRAWN = 16
TUNED = ("engine_instances", "engine_threads", "max_batch_size", "max_delay_ms")
PLACED = ("host", "port", "metrics_host", "metrics_port")
REPORTED = ("bundle", "engine", "device", *TUNED, "queue_limit", "decode_threads", "default_timeout_ms")

DESCRIPTION = """\
Put load on a server and report throughput, latency, errors, batch sizes and stage times.

Without --url a server is started on a free port of this machine, tested and stopped; its settings are DDETR_* variables
or, after --, flags of `ddetr serve`. Without a load it is saturated first, and then gets 70% of what it bore.

The load is open loop: requests arrive at random moments at a set rate, whether or not earlier ones are answered, and
latency counts from the moment a request was due. So waiting shows. The exit status is 1 where the figures are not the
server's (the generator fell behind, and the report says so) or nothing was answered."""

EXAMPLE = """\
example:
  ddetr bench --rate 20 --duration 30 --json report.json --plot report.png
  ddetr bench --url http://gpu-host:8000 --data pictures/ --find-rate --p99-ms 100
  ddetr bench --concurrency 64 -- --max-batch-size 8
  ddetr bench --tune
"""


def run(argv: Sequence[str]) -> int:
    """Carry out what the arguments ask for; 1 if the figures are no good."""
    own, serve_flags = split_at_dashes(argv)
    parser = argument_parser()
    arguments = parser.parse_args(own)
    if arguments.schema:
        from loadtest.report import Report

        print(json.dumps(Report.model_json_schema(), indent=2))
        return 0
    check(parser, arguments, serve_flags)
    for library in ("aiohttp", *(["matplotlib"] if arguments.plot else [])):
        if importlib.util.find_spec(library) is None:
            say_missing_extra("bench", "bench", library)
            return EXIT_MISSING_EXTRA
    from loadtest.errors import LoadtestError

    # By default SIGTERM ends a process at once, and the server that it started would stay.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        return _bench(parser, arguments, serve_flags, without_keys(argv))
    except (LoadtestError, BundleError) as error:
        print(f"ddetr bench: {error}", file=sys.stderr)
        return EXIT_FAILED
    finally:
        signal.signal(signal.SIGTERM, before)


def split_at_dashes(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments before `--`, and those after it, which are the server's."""
    words = list(argv)
    if "--" not in words:
        return words, []
    place = words.index("--")
    return words[:place], words[place + 1 :]


def without_keys(argv: Sequence[str]) -> list[str]:
    """The arguments with the values of `--api-keys` starred: reports are passed on."""
    shown = list(argv)
    for place, word in enumerate(argv):
        if word == "--api-keys" and place + 1 < len(shown):
            shown[place + 1] = "***"
        elif word.startswith("--api-keys="):
            shown[place] = "--api-keys=***"
    return shown


def argument_parser() -> argparse.ArgumentParser:
    """All flags of `ddetr bench`."""
    parser = argparse.ArgumentParser(
        prog="ddetr bench",
        usage="ddetr bench [--url URL] [flags] [-- flags of ddetr serve]",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--url", help="a server that runs (default: start one here)")
    parser.add_argument(
        "--bundle", type=Path, metavar="DIR", help="what the server started here serves (default: embedded bundle)"
    )

    load = parser.add_argument_group("load")
    kind = load.add_mutually_exclusive_group()
    kind.add_argument("--rate", type=positive, metavar="R", help="open loop: requests a second")
    kind.add_argument("--concurrency", type=count, metavar="N", help="closed loop: clients that wait for their answer")
    kind.add_argument(
        "--find-rate", action="store_true", help="search for the highest rate that holds --p99-ms, by 2 and by halves"
    )
    kind.add_argument(
        "--tune", action="store_true", help="try batch size, delay, threads and instances here; print the best settings"
    )
    load.add_argument(
        "--p99-ms",
        type=positive,
        metavar="MS",
        help="latency target: 99 of 100 requests within it, failed ones counted as late "
        f"(--find-rate: {P99_MS:g}; --tune: for the rate that holds it instead of throughput at saturation)",
    )
    load.add_argument(
        "--start-rate",
        type=positive,
        metavar="R",
        default=FIRST_RATE_RPS,
        help="where --find-rate begins (default: %(default)g)",
    )
    load.add_argument(
        "--max-rate", type=positive, metavar="R", default=10_000.0, help="where it ends (default: %(default)g)"
    )
    load.add_argument(
        "--duration",
        type=positive,
        metavar="S",
        help=f"seconds measured (default: {LOAD_S:g}; a step of --find-rate: at least {STEP_S:g}; a trial of --tune: "
        f"{TRIAL_S:g})",
    )
    load.add_argument(
        "--warmup",
        type=not_negative,
        metavar="S",
        default=3.0,
        help="seconds of the same load before them (default: %(default)g)",
    )
    load.add_argument(
        "--connections", type=count, metavar="N", default=256, help="most connections at once (default: %(default)s)"
    )
    load.add_argument("--seed", type=int, default=0, help="of arrivals and pictures (default: %(default)s)")

    requests = parser.add_argument_group("requests")
    requests.add_argument(
        "--data", type=Path, metavar="DIR", help=f"pictures to send, as they are (default: {DRAWN} drawn 640x480 JPEGs)"
    )
    requests.add_argument("--timeout-ms", type=positive, metavar="MS", help="the deadline told to the server")
    requests.add_argument("--priority", choices=("interactive", "batch"), help="the lane asked for")
    requests.add_argument(
        "--retry",
        type=count,
        metavar="N",
        default=0,
        help="after a 429 or 503 try again when its Retry-After says, up to N times (default: never)",
    )
    requests.add_argument("--api-key-file", type=Path, metavar="FILE", help="its first line is the API key")
    requests.add_argument("--metrics-url", metavar="URL", help="where the metrics are (default: /metrics of --url)")

    report = parser.add_argument_group("report")
    report.add_argument("--json", type=Path, metavar="FILE", help="write the report, see --schema")
    report.add_argument("--plot", type=Path, metavar="FILE", help="draw it: a PNG, or SVG or PDF by the file's name")
    report.add_argument("--schema", action="store_true", help="print the JSON Schema of reports, and no more")
    return parser


def positive(text: str) -> float:
    """A number above 0, for argparse."""
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return number


def not_negative(text: str) -> float:
    """A number not below 0, for argparse."""
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number, 0 or more")
    return number


def count(text: str) -> int:
    """A whole number above 0, for argparse."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return number


def check(parser: argparse.ArgumentParser, arguments: argparse.Namespace, serve_flags: Sequence[str]) -> None:
    """End with a usage error where flags contradict each other."""
    if arguments.url is not None:
        if not arguments.url.startswith(("http://", "https://")):
            parser.error(f"--url: {arguments.url!r} does not begin with http:// or https://")
        own_servers = {"--bundle": arguments.bundle, "--tune": arguments.tune, "flags after --": serve_flags}
        for name in (name for name, given in own_servers.items() if given):
            parser.error(f"{name} for a server started here; with --url one runs already")
    if arguments.p99_ms is not None and not (arguments.find_rate or arguments.tune):
        parser.error("--p99-ms is the target of --find-rate or --tune")
    if arguments.find_rate and arguments.start_rate > arguments.max_rate:
        parser.error(f"--start-rate {arguments.start_rate:g} exceeds --max-rate {arguments.max_rate:g}")
    given_flags = {flag.partition("=")[0] for flag in serve_flags}
    for name in (*PLACED, *(TUNED if arguments.tune else ()), *(("bundle",) if arguments.bundle else ())):
        if (flag := f"--{name.replace('_', '-')}") in given_flags:
            parser.error(f"{flag} after --: bench sets it")
    for option in ("json", "plot"):
        path = getattr(arguments, option)
        if path is not None and not path.absolute().parent.is_dir():
            parser.error(f"--{option}: there is no folder {path.absolute().parent}")


@dataclass(frozen=True)
class Job:
    """What the arguments come to."""

    arguments: argparse.Namespace
    serve_flags: Sequence[str]
    settings: Settings | None  # of the server that is to be started; None where one runs
    api_key: str | None
    payloads: Sequence[Payload]
    pictures: str


def _bench(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, serve_flags: Sequence[str], command: Sequence[str]
) -> int:
    """Test, say what was found, write the report; the exit status."""
    from loadtest.host import this_host
    from loadtest.report import Report
    from server.cores import available_cores

    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    host = this_host(available_cores())  # now: its load is that without ours
    if arguments.bundle is not None:
        serve_flags = ["--bundle", str(arguments.bundle), *serve_flags]
    settings = None if arguments.url is not None else read_settings(serve_flags)
    api_key = read_api_key(parser, arguments.api_key_file, settings)
    job = Job(arguments, serve_flags, settings, api_key, *read_payloads(arguments))
    server, outcome = _test(job, host)
    report = Report(
        kind=outcome.kind,
        ddetr_version=version(),
        started_at=started_at,
        command=tuple(command),
        host=host,
        server=server,
        pictures=job.pictures,
        measurements=tuple(outcome.measurements),
        search=outcome.search,
        tuning=outcome.tuning,
    )
    if arguments.json is not None:
        arguments.json.write_text(report.model_dump_json(indent=1) + "\n", encoding="utf-8")
        say(f"report: {arguments.json}")
    if arguments.plot is not None:
        from loadtest.plot import plot

        plot(report, arguments.plot)
        say(f"plot: {arguments.plot}")
    answered = any(measurement.answered for measurement in report.measurements)
    if not report.valid:
        print("ddetr bench: not all figures are the server's, see the remarks", file=sys.stderr)
    return 0 if answered and report.valid else EXIT_FAILED


def _test(job: Job, host: Host) -> tuple[Server, Outcome]:
    from loadtest import session, text
    from loadtest.client import Target

    arguments = job.arguments
    running = None
    if arguments.url is not None:
        running = Target(arguments.url.rstrip("/"), job.api_key, arguments.metrics_url)
    with session.server_to_test(running, job.serve_flags, shown(job.settings), job.api_key) as (target, server):
        for line in (*text.headline(host, server, job.pictures), ""):
            say(line)
        if not arguments.tune:
            return server, _load(job, target)
    return server, _tune(job, server, host.cores)  # each of its trials has its own server


def _load(job: Job, target: Target) -> Outcome:
    from loadtest import session
    from loadtest.search import Bounds

    arguments = job.arguments
    if arguments.find_rate:
        bounds = Bounds(start_rps=arguments.start_rate, most_rps=arguments.max_rate)
        return session.search(target, job.payloads, plan(arguments, STEP_S, arguments.p99_ms or P99_MS), bounds, say)
    wanted = plan(arguments, LOAD_S, None)
    if wanted.rate_rps is not None or wanted.concurrency is not None:
        return session.single(target, job.payloads, wanted, say)
    return session.saturation_and_open_loop(target, job.payloads, wanted, say)


def _tune(job: Job, server: Server, cores: int) -> Outcome:
    from loadtest import session
    from loadtest.report import Candidate

    if job.settings is None:
        raise ValueError("--tune starts its servers itself")
    start = Candidate.model_validate({name: getattr(job.settings, name) for name in TUNED})
    return session.tuning(
        (server, start),
        job.payloads,
        plan(job.arguments, TRIAL_S, job.arguments.p99_ms),
        job.serve_flags,
        job.api_key,
        most_clients=job.settings.queue_limit,
        cores=cores,
        say=say,
    )


def plan(arguments: argparse.Namespace, duration_s: float, target_ms: float | None) -> Plan:
    """The load as the arguments have it; `duration_s` where they say nothing of it."""
    from loadtest.report import Plan

    return Plan(
        rate_rps=arguments.rate,
        concurrency=arguments.concurrency,
        duration_s=arguments.duration or duration_s,
        warmup_s=arguments.warmup,
        seed=arguments.seed,
        connections=arguments.connections,
        target_ms=target_ms,
        timeout_ms=arguments.timeout_ms,
        priority=arguments.priority,
        retries=arguments.retry,
    )


def read_payloads(arguments: argparse.Namespace) -> tuple[Sequence[Payload], str]:
    """What to send, and what to call it."""
    from loadtest.payload import drawn, from_folder

    if arguments.data is not None:
        payloads = from_folder(arguments.data, arguments.seed)
        name = f"{len(payloads)} pictures of {arguments.data}"
    else:
        # A delay decides between canvases: to tune it there must be two.
        payloads = drawn(DRAWN, arguments.seed, upright_every=4 if arguments.tune else 0)
        name = f"{len(payloads)} drawn smears, JPEG 640x480{', some upright' if arguments.tune else ''}"
    return payloads, f"{name}, {sum(len(payload.body) for payload in payloads) / len(payloads) / 1e3:.0f} kB each"


def read_api_key(parser: argparse.ArgumentParser, path: Path | None, settings: Settings | None) -> str | None:
    """The key in the file; else the first of those that the server to be started will want."""
    if path is None and settings is not None and not settings.api_keys:
        path = settings.api_keys_file
    if path is not None:
        try:
            key = path.read_text(encoding="utf-8").partition("\n")[0].strip()
        except OSError as error:
            parser.error(f"--api-key-file: {path}: {error.strerror}")
        if not key:
            parser.error(f"--api-key-file: {path}: its first line is empty")
        return key
    return settings.api_keys[0].get_secret_value() if settings is not None and settings.api_keys else None


def shown(settings: Settings | None) -> dict[str, str]:
    """The settings that a report names: what decides how quick a server is, and no secrets."""
    if settings is None:
        return {}
    return {name: str(getattr(settings, name)) for name in REPORTED}


def say(line: str) -> None:
    """A line for the user, at once: a bench takes its time."""
    print(line, flush=True)
