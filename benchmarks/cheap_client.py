"""A client that saturates a server and takes as little CPU time for it as Python can, see lean_client.py.

For benchmarks.saturation. For every line `WARMUP DURATION` (seconds) on standard input it prints "begun" when the
warm-up ends, and a line of JSON when the duration has: `answers`, `failed`, `seconds`, `cpu_s`, `p50_ms`, `p99_ms`.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import cycle

from benchmarks.lean_client import LeanClient, Try
from loadtest.arrivals import Arrival
from loadtest.client import OK
from loadtest.payload import drawn
from loadtest.report import percentile


class _Over(Exception):
    """The duration is."""


def main() -> int:
    """Load the server on request until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--pictures", type=int, default=16)
    args = parser.parse_args()
    payloads = drawn(args.pictures, seed=0)
    client = LeanClient(args.url, payloads)
    print("ready", flush=True)
    for line in sys.stdin:
        warmup_s, duration_s = map(float, line.split())
        saturate(client, args.pictures, args.clients, warmup_s, duration_s)
    return 0


def saturate(client: LeanClient, pictures: int, clients: int, warmup_s: float, duration_s: float) -> None:
    """Closed loop over new connections; what came within the duration is printed when it is over."""
    numbers = cycle(range(pictures))
    began: tuple[float, float] | None = None  # the duration's start: its time, and CPU seconds by then
    measured: list[Try] = []

    def again(each: Try) -> Arrival:
        nonlocal began
        if began is None:
            if each.done_s >= warmup_s:
                began = each.done_s, time.process_time()
                print("begun", flush=True)
        else:
            measured.append(each)
            if each.done_s >= began[0] + duration_s:
                print(json.dumps(found(measured, each.done_s - began[0], time.process_time() - began[1])), flush=True)
                raise _Over
        return Arrival(each.done_s, next(numbers))

    with suppress(_Over):  # and with it all that is under way
        client.run([Arrival(0.0, next(numbers)) for _ in range(clients)], again)


def found(measured: Sequence[Try], seconds: float, cpu_s: float) -> dict[str, float | int]:
    """For the caller to read."""
    latencies_ms = sorted(each.latency_ms for each in measured)
    failed = sum(each.outcome != OK for each in measured)
    return {
        "answers": len(measured) - failed,
        "failed": failed,
        "seconds": seconds,
        "cpu_s": cpu_s,
        "p50_ms": percentile(latencies_ms, 50) if measured else 0.0,
        "p99_ms": percentile(latencies_ms, 99) if measured else 0.0,
    }


if __name__ == "__main__":
    raise SystemExit(main())
