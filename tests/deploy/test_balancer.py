"""HAProxy with our configuration in front of two real servers, one of which is killed, or told to go, under load."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import pytest
from yarl import URL

from benchmarks.balancing import CONFIGURATION, balanced, haproxy
from loadtest.server_process import free_port
from server.settings import Settings
from tests.deploy.processes import ROOT, wait_for
from tests.deploy.rollout import START_S, ask_until, is_ready
from tests.server.pictures import encode, rectangle
from tests.server.tiny_bundle import write_tiny_bundle

pytestmark = [
    pytest.mark.skipif(haproxy() is None, reason="haproxy is not on PATH: apt-get install haproxy"),
    pytest.mark.timeout(300),
]

DELAY_MS = 5000.0  # as the configuration's head has it
STOP_S = 60.0


def text() -> str:
    return CONFIGURATION.read_text(encoding="utf-8")


@contextmanager
def servers(bundle: Path, count: int) -> Iterator[dict[int, subprocess.Popen[bytes]]]:
    """Servers by their ports, ready."""
    started: dict[int, subprocess.Popen[bytes]] = {}
    try:
        for _ in range(count):
            port = free_port()
            flags = ["--bundle", str(bundle), "--port", str(port), "--shutdown-delay-ms", str(DELAY_MS)]
            flags += ["--engine-threads", "1", "--decode-threads", "1", "--log-level", "error"]
            started[port] = subprocess.Popen([sys.executable, "-m", "cli.main", "serve", *flags], cwd=ROOT)
        for port in started:
            wait_for(lambda port=port: asyncio.run(is_ready(port)), START_S, "a server")
        yield started
    finally:
        for process in started.values():
            process.kill()
            process.wait()


async def load(port: int, seconds: float, meanwhile: Callable[[], None]) -> Counter[str]:
    """What clients saw, over kept connections and new ones; `meanwhile` happens when a third of the time is over."""
    outcomes: Counter[str] = Counter()
    done = asyncio.Event()
    body = encode(rectangle())
    clients = [
        asyncio.create_task(ask_until(done, port, body, keep, outcomes))
        for keep in (True, True, True, False, False, False)
    ]
    try:
        await asyncio.sleep(seconds / 3)
        await asyncio.to_thread(meanwhile)
        await asyncio.sleep(seconds * 2 / 3)
    finally:
        done.set()
        await asyncio.gather(*clients)
    return outcomes


def test_a_killed_server_costs_at_most_what_it_was_writing(tmp_path: Path) -> None:
    """Requests inside it are asked again elsewhere, and so are those that find its door gone; not half an answer."""
    bundle = write_tiny_bundle(tmp_path / "bundle").path
    with servers(bundle, 2) as started:
        port, victim = free_port(), next(iter(started.values()))
        with balanced(list(started), port):
            outcomes = asyncio.run(load(port, 6.0, lambda: os.kill(victim.pid, signal.SIGKILL)))
        assert victim.wait() == -signal.SIGKILL
    assert min(outcomes["new 200"], outcomes["kept 200"]) >= 50
    assert outcomes.keys() - {"new 200", "kept 200"} <= {"new ClientPayloadError", "kept ClientPayloadError"}
    assert outcomes.total() - outcomes["new 200"] - outcomes["kept 200"] <= 2, dict(outcomes)


def test_a_server_that_is_told_to_go_is_missed_by_nobody(tmp_path: Path) -> None:
    bundle = write_tiny_bundle(tmp_path / "bundle").path
    with servers(bundle, 2) as started:
        port, leaving = free_port(), next(iter(started.values()))
        with balanced(list(started), port):

            def leave() -> None:
                leaving.terminate()
                assert leaving.wait(STOP_S) == 0

            outcomes = asyncio.run(load(port, 3.0, leave))
    assert outcomes.keys() == {"new 200", "kept 200"}, dict(outcomes)
    assert min(outcomes.values()) >= 50


def test_what_is_one_servers_is_not_asked_for_here(tmp_path: Path) -> None:
    """A swap through the balancer would be the swap of whichever server it came to."""
    bundle = write_tiny_bundle(tmp_path / "bundle").path
    paths = ("/metrics", "/%6Detrics", "/admin/bundle", "/adm%69n/bundle", "/admin%2fbundle")

    async def statuses(url: str) -> list[int]:
        async with aiohttp.ClientSession() as session:
            found = []
            for path in ("/readyz", *paths):
                async with session.get(URL(url + path, encoded=True)) as response:
                    found.append(response.status)
            return found

    with servers(bundle, 2) as started, balanced(list(started), free_port()) as (url, _):
        assert asyncio.run(statuses(url)) == [200] + [404] * len(paths)
        itself = asyncio.run(statuses(f"http://127.0.0.1:{next(iter(started))}"))
        assert itself == [200, 200, 200, 403, 403, 403], "the server knows them, however they are written"


def test_the_balancer_waits_longer_than_the_server_and_looks_more_often_than_it_goes() -> None:
    (timeout_s,) = map(int, re.findall(r"timeout server (\d+)s", text()))
    assert timeout_s * 1e3 > Settings().default_timeout_ms
    ((every_s, times),) = re.findall(r"check inter (\d+)s fall (\d+)", text())
    delays = [float(found) for found in re.findall(r"--shutdown-delay-ms (\d+)", text())]
    assert delays == [DELAY_MS, DELAY_MS]
    assert int(every_s) * int(times) * 1e3 < DELAY_MS / 2
    (body_bytes,) = map(int, re.findall(r"tune.bufsize (\d+)", text()))
    assert body_bytes >= 500_000, "most photographs fit, and are asked again elsewhere"
