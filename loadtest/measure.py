"""One measurement: the load, with a look at the server and at oneself at the beginning and the end of what counts."""

import asyncio
import time
from collections.abc import Sequence

import uvloop

from loadtest.arrivals import poisson
from loadtest.client import Client, Target
from loadtest.errors import ServerGone
from loadtest.host import cpu_seconds
from loadtest.load import Load
from loadtest.payload import Payload
from loadtest.report import Measurement, Plan
from loadtest.scrape import parse
from loadtest.summary import Snapshot, summarise


def measure(target: Target, payloads: Sequence[Payload], plan: Plan) -> Measurement:
    """Put the planned load on the server. Returns when the last request is answered. Raises ServerGone."""
    return uvloop.run(_measure(target, payloads, plan))


async def _measure(target: Target, payloads: Sequence[Payload], plan: Plan) -> Measurement:
    async with Client(target, plan.connections, plan.timeout_ms, plan.priority) as client:
        load = Load(client.detect, payloads, plan.connections, plan.retries)
        watching = asyncio.create_task(_watch(client, target, plan))
        try:
            until_s = plan.warmup_s + plan.duration_s
            if plan.rate_rps is not None:
                await load.open_loop(poisson(plan.rate_rps, until_s, len(payloads), plan.seed))
            elif plan.concurrency is not None:
                await load.closed_loop(plan.concurrency, until_s, plan.seed)
            if load.gone:
                raise ServerGone(f"{target.url} refuses connections: the server went away during the test")
            before, after = await watching
        finally:
            watching.cancel()
    return summarise(load, plan, before, after)


async def _watch(client: Client, target: Target, plan: Plan) -> tuple[Snapshot, Snapshot]:
    await asyncio.sleep(plan.warmup_s)
    before = await _look(client, target)
    await asyncio.sleep(max(0.0, before.at_s + plan.duration_s - time.monotonic()))
    return before, await _look(client, target)


async def _look(client: Client, target: Target) -> Snapshot:
    at_s, own_s, server_s = time.monotonic(), time.process_time(), cpu_seconds(target.pid)
    exposition = await client.metrics()
    return Snapshot(at_s, own_s, server_s, None if exposition is None else parse(exposition))
