"""A client that saturates a server and takes as little CPU time for it as Python can, see lean_client.py.

For benchmarks.saturation. For every line `WARMUP DURATION` (seconds) on standard input it prints "begun" when the
warm-up ends, and a line of JSON when the duration has: `answers`, `failed`, `seconds`, `cpu_s`, `p50_ms`, `p99_ms`.
"""

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from itertools import count

import uvloop

from benchmarks.lean_client import LeanClient
from loadtest.client import OK
from loadtest.payload import Payload, drawn
from loadtest.report import percentile


def main() -> int:
    """Load the server on request until standard input ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--clients", type=int, required=True)
    parser.add_argument("--pictures", type=int, default=16)
    args = parser.parse_args()
    payloads = drawn(args.pictures, seed=0)
    print("ready", flush=True)
    for line in sys.stdin:
        warmup_s, duration_s = map(float, line.split())
        uvloop.run(saturate(args.url, payloads, args.clients, warmup_s, duration_s))
    return 0


async def saturate(url: str, payloads: Sequence[Payload], clients: int, warmup_s: float, duration_s: float) -> None:
    """Closed loop over new connections; what came within the duration is printed when it is over."""
    numbers = count()
    failed = 0
    latencies_ms: list[float] | None = None  # once the warm-up has ended

    async def ask_on(client: LeanClient) -> None:
        nonlocal failed
        while True:
            sent_s = time.perf_counter()
            answer = await client.detect(payloads[next(numbers) % len(payloads)])
            if latencies_ms is not None:
                failed += answer.outcome != OK
                latencies_ms.append((time.perf_counter() - sent_s) * 1e3)

    async with LeanClient(url) as client:
        asking = [asyncio.ensure_future(ask_on(client)) for _ in range(clients)]
        await asyncio.sleep(warmup_s)
        latencies_ms, began_s, began_cpu_s = [], time.perf_counter(), time.process_time()
        print("begun", flush=True)
        await asyncio.sleep(duration_s)
        ordered = sorted(latencies_ms)
        found = {
            "answers": len(ordered) - failed,
            "failed": failed,
            "seconds": time.perf_counter() - began_s,
            "cpu_s": time.process_time() - began_cpu_s,
            "p50_ms": percentile(ordered, 50) if ordered else 0.0,
            "p99_ms": percentile(ordered, 99) if ordered else 0.0,
        }
        print(json.dumps(found), flush=True)
        for each in asking:
            each.cancel()


if __name__ == "__main__":
    raise SystemExit(main())
