"""Between SIGTERM and the closing of the door: who asks is answered, and led elsewhere."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import pytest

from loadtest.server_process import free_port
from tests.deploy.processes import ROOT, wait_for
from tests.deploy.rollout import START_S, is_ready
from tests.server.pictures import encode, rectangle
from tests.server.tiny_bundle import write_tiny_bundle

pytestmark = pytest.mark.timeout(300)
LONG_MS, SOON_S = 600_000, 60.0


@contextmanager
def server(folder: Path, delay_ms: float) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    port = free_port()
    flags = ["--bundle", str(write_tiny_bundle(folder / "bundle").path), "--port", str(port), "--engine-threads", "1"]
    flags += ["--decode-threads", "1", "--log-level", "error", "--shutdown-delay-ms", str(delay_ms)]
    process = subprocess.Popen([sys.executable, "-m", "cli.main", "serve", *flags], cwd=ROOT)
    try:
        wait_for(lambda: asyncio.run(is_ready(port)), START_S, "a server")
        yield port, process
    finally:
        process.kill()
        process.wait()


async def ask(port: int, session: aiohttp.ClientSession) -> tuple[int, str | None]:
    """The status of a request to /detect, and the answer's Connection header."""
    async with session.post(
        f"http://127.0.0.1:{port}/detect", data=encode(rectangle()), headers={"Content-Type": "image/png"}
    ) as response:
        await response.read()
        return response.status, response.headers.get("Connection")


def test_requests_are_answered_on_connections_that_end_and_the_probe_is_told(tmp_path: Path) -> None:
    with server(tmp_path, LONG_MS) as (port, process):

        async def before_and_after() -> list[tuple[int, str | None]]:
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1)) as session:
                answers = [await ask(port, session)]  # a connection that is kept from before the signal on
                process.terminate()
                async with asyncio.timeout(SOON_S):
                    while await is_ready(port):
                        await asyncio.sleep(0.05)
                return [*answers, *[await ask(port, session) for _ in range(3)]]

        assert asyncio.run(before_and_after()) == [(200, None), *[(200, "close")] * 3]
        assert process.poll() is None
        process.terminate()
        assert process.wait(SOON_S) == 0, "a second signal ends the delay"


def test_it_ends_by_itself(tmp_path: Path) -> None:
    with server(tmp_path, 300) as (_, process):
        process.terminate()
        assert process.wait(SOON_S) == 0


def test_ctrl_c_does_not_wait(tmp_path: Path) -> None:
    with server(tmp_path, LONG_MS) as (_, process):
        process.send_signal(2)
        assert process.wait(SOON_S) == 0
