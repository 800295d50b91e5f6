"""Two servers behind a plain load balancer against the same two as replicas of Ray Serve, on the same cores.

python -m benchmarks.fleet
python -m benchmarks.fleet --bundle tiny --rounds 3

Contestants: HAProxy (deploy/balancer) before two `ddetr serve`; Ray Serve with two replicas (deploy/ray), once with
Ray's own proxy and once with its HAProxy (RAY_SERVE_ENABLE_HA_PROXY=1); and for comparison one `ddetr serve` with two
engines. Each engine has one thread. All are started, and take turns: in a round each gets a closed loop, which
saturates it, and an open loop at a rate that all of them bear, where latency counts from the moment a request is due.
CPU time is that of all processes of a contestant, idle ones included: what a request costs more than with one server is
the price of the way to it. `--bundle tiny` has a network of a few nodes, and shows that price alone. Shown are medians
over the rounds, and ratios of medians to the balancer's.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.balancing import balanced, haproxy
from benchmarks.machine import machine
from benchmarks.ray_serving import configuration, ray_serving
from loadtest.client import Target
from loadtest.measure import measure
from loadtest.payload import Payload, drawn
from loadtest.report import Plan
from loadtest.server_process import free_port, serving

CLIENTS = 16
COMFORTABLE = 0.5
"""Of the first saturated throughput of the slowest: the rate of the open loop."""
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Contestant:
    """A way to serve, and what was measured of it, a figure a round."""

    name: str
    url: str
    pids: Sequence[int]  # with all below them it is all of it
    throughput_rps: list[float] = field(default_factory=list)
    cpu_ms: list[float] = field(default_factory=list)  # a request, saturated
    p50_ms: list[float] = field(default_factory=list)
    p95_ms: list[float] = field(default_factory=list)
    failed: int = 0


@contextmanager
def two_behind_haproxy(flags: Sequence[str]) -> Iterator[Contestant]:
    """HAProxy and two servers."""
    with serving(flags) as first, serving(flags) as second:
        ports = [int(server.url.rpartition(":")[2]) for server in (first, second)]
        with balanced(ports, free_port()) as (url, pid):
            yield Contestant("HAProxy, two servers", url, [pid, first.pid, second.pid])


@contextmanager
def two_in_ray(settings: dict[str, str | int], through_haproxy: bool) -> Iterator[Contestant]:
    """Ray Serve and two replicas."""
    proxy = "Ray Serve with HAProxy" if through_haproxy else "Ray Serve with its own proxy"
    content = configuration(free_port(), settings, replicas=2, cpus=1)
    with ray_serving(content, cpus=2, through_haproxy=through_haproxy) as running:
        yield Contestant(f"{proxy}, two replicas", running.url, running.pids)


@contextmanager
def one_server(flags: Sequence[str]) -> Iterator[Contestant]:
    """One server with two engines."""
    with serving([*flags, "--engine-instances", "2", "--decode-threads", "2"]) as server:
        yield Contestant("one server, two engines", server.url, [server.pid])


def tree_cpu_s(pids: Sequence[int]) -> float:
    """CPU time of these processes and all below them, those that have ended included."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(folder.name)] = int(fields[1])
            ticks[int(folder.name)] = sum(map(int, fields[11:15]))  # user, system, and of children that ended
    found: set[int] = set()
    ring = set(pids)
    while ring:
        found |= ring
        ring = {pid for pid, parent in parents.items() if parent in ring} - found
    return sum(ticks.get(pid, 0) for pid in found) / TICKS


def saturate(contestant: Contestant, payloads: Sequence[Payload], seconds: float, seed: int) -> float:
    """One closed loop; the throughput."""
    plan = Plan(concurrency=CLIENTS, duration_s=seconds, warmup_s=1.0, seed=seed, connections=CLIENTS)
    before_s = tree_cpu_s(contestant.pids)
    measured = measure(Target(contestant.url), payloads, plan)
    spent_s = tree_cpu_s(contestant.pids) - before_s
    contestant.throughput_rps.append(measured.throughput_rps)
    # The warm-up's requests are in the time, too: as many a second as those that count.
    answered = measured.throughput_rps * (seconds + plan.warmup_s)
    contestant.cpu_ms.append(spent_s * 1e3 / max(1.0, answered))
    contestant.failed += sum(measured.errors.values())
    return measured.throughput_rps


def stroll(contestant: Contestant, payloads: Sequence[Payload], seconds: float, seed: int, rate_rps: float) -> None:
    """One open loop at a rate that all bear."""
    plan = Plan(rate_rps=rate_rps, duration_s=seconds, warmup_s=1.0, seed=seed, connections=64)
    measured = measure(Target(contestant.url), payloads, plan)
    contestant.failed += sum(measured.errors.values())
    if measured.latency_ms is not None:
        contestant.p50_ms.append(measured.latency_ms.p50)
        contestant.p95_ms.append(measured.latency_ms.p95)


def table(contestants: Sequence[Contestant]) -> str:
    """Medians, and in brackets the ratio to the first."""
    lines = [
        "|  | images/s, saturated | CPU ms a request | p50 ms | p95 ms | failed |",
        "|---|---|---|---|---|---|",
    ]
    first = contestants[0]
    for each in contestants:
        cells = []
        for name in ("throughput_rps", "cpu_ms", "p50_ms", "p95_ms"):
            median, base = statistics.median(getattr(each, name)), statistics.median(getattr(first, name))
            cells.append(f"{median:.1f} ({median / base:.2f})")
        lines.append(f"| {each.name} | {' | '.join(cells)} | {each.failed} |")
    return "\n".join(lines)


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each load")
    parser.add_argument("--bundle", help="folder, or tiny (default: embedded)")
    parser.add_argument("--without-ray", action="store_true")
    args = parser.parse_args()
    if haproxy() is None:
        print("no haproxy: apt-get install haproxy", file=sys.stderr)
        return 1
    payloads = drawn(16, seed=1)
    with ExitStack() as stack:
        bundle = args.bundle
        if bundle == "tiny":
            from tests.server.tiny_bundle import write_tiny_bundle

            bundle = str(write_tiny_bundle(Path(stack.enter_context(TemporaryDirectory()))).path)
        settings: dict[str, str | int] = {"engine_threads": 1, "decode_threads": 1}
        if bundle:
            settings["bundle"] = bundle
        flags = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        contestants = [stack.enter_context(two_behind_haproxy(flags))]
        if not args.without_ray:
            for through_haproxy in (False, True):
                contestants.append(stack.enter_context(two_in_ray(settings, through_haproxy)))
        contestants.append(stack.enter_context(one_server(flags)))
        rate_rps = 0.0
        for number in range(args.rounds):
            reached = [saturate(each, payloads, args.seconds, seed=number) for each in contestants]
            rate_rps = rate_rps or COMFORTABLE * min(reached)
            for each in contestants:
                stroll(each, payloads, args.seconds, number, rate_rps)
            print(f"round {number + 1}: " + ", ".join(f"{rps:.1f}/s" for rps in reached), flush=True)
        print(f"\n{machine()}; {args.bundle or 'embedded'} bundle, open loop at {rate_rps:.1f}/s\n")
        print(table(contestants))
    return 0


if __name__ == "__main__":
    sys.exit(main())
