"""A rolling update of real servers as Kubernetes does it: endpoints that follow readiness, SIGTERM, grace."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from loadtest.server_process import free_port
from tests.deploy.processes import ROOT

START_S = 120.0


@dataclass
class Timing:
    """What the manifests say, in seconds, and how slow the cluster is."""

    delay_s: float
    """DDETR_SHUTDOWN_DELAY_MS."""
    grace_s: float
    probe_every_s: float
    withdrawn_after_s: float
    """From a pod's deletion until nobody is led to it any more: the news travels to every node and gateway."""


@dataclass(eq=False)
class Pod:
    """A server of its own."""

    port: int
    process: subprocess.Popen[bytes]
    log: Path
    exit_status: int | None = None


@dataclass
class Service:
    """Leads each new connection to the next endpoint, as kube-proxy does: it knows bytes, not requests."""

    endpoints: list[int] = field(default_factory=list)
    port: int = 0

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        turns = itertools.count()

        async def lead(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                port = self.endpoints[next(turns) % len(self.endpoints)]
                there, back = await asyncio.open_connection("127.0.0.1", port)
            except (OSError, ZeroDivisionError):
                writer.transport.abort()
                return
            await asyncio.gather(pass_on(reader, back), pass_on(there, writer))

        server = await asyncio.start_server(lead, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield
        finally:
            server.close()


async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Bytes until one side closes; then the other is closed."""
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    with contextlib.suppress(OSError):
        writer.close()


class Cluster:
    """Pods behind a service. Every wait is on an event of the real world or a delay that a cluster has, too."""

    def __init__(self, bundle: Path, timing: Timing, folder: Path) -> None:
        self.service = Service()
        self.pods: list[Pod] = []
        self.ended: list[Pod] = []
        self._bundle = bundle
        self._timing = timing
        self._folder = folder

    async def start_pod(self) -> Pod:
        """A new pod, once it is ready and in the endpoints."""
        port = free_port()
        flags = ["--bundle", str(self._bundle), "--port", str(port), "--engine-threads", "1", "--decode-threads", "1"]
        flags += ["--shutdown-delay-ms", str(self._timing.delay_s * 1e3)]
        log = Path(tempfile.mkstemp(dir=self._folder, suffix=".log")[1])
        with log.open("wb") as sink:
            process = subprocess.Popen(
                [sys.executable, "-m", "cli.main", "serve", *flags], cwd=ROOT, stdout=sink, stderr=sink
            )
        pod = Pod(port, process, log)
        self.pods.append(pod)
        async with asyncio.timeout(START_S):
            while not await is_ready(port):
                assert process.poll() is None, log.read_text()
                await asyncio.sleep(self._timing.probe_every_s)
        self.service.endpoints.append(port)
        return pod

    async def delete_pod(self, pod: Pod) -> None:
        """SIGTERM and its end within the grace period; meanwhile, after a while, the endpoint is withdrawn."""

        async def withdraw() -> None:
            await asyncio.sleep(self._timing.withdrawn_after_s)
            self.service.endpoints.remove(pod.port)

        async def stop() -> None:
            pod.process.terminate()
            pod.exit_status = await asyncio.to_thread(pod.process.wait, self._timing.grace_s)

        await asyncio.gather(withdraw(), stop())
        self.pods.remove(pod)
        self.ended.append(pod)

    async def roll(self) -> None:
        """Every pod is replaced: one new before one old goes (maxSurge 1, maxUnavailable 0)."""
        for old in list(self.pods):
            await self.start_pod()
            await self.delete_pod(old)

    def close(self) -> None:
        """Nothing stays behind."""
        for pod in self.pods:
            pod.process.kill()
            pod.process.wait()


async def is_ready(port: int) -> bool:
    """As the readiness probe asks."""
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as session,
            session.get(f"http://127.0.0.1:{port}/readyz") as response,
        ):
            return response.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False


async def ask_until(done: asyncio.Event, port: int, body: bytes, keep: bool, outcomes: Counter[str]) -> None:
    """A client that asks one request after the other, over a kept connection or a new one each time."""
    connector = aiohttp.TCPConnector(limit=1, force_close=not keep)
    async with aiohttp.ClientSession(connector=connector) as session:
        while not done.is_set():
            try:
                async with session.post(
                    f"http://127.0.0.1:{port}/detect", data=body, headers={"Content-Type": "image/png"}
                ) as response:
                    await response.read()
                    outcomes[f"{'kept' if keep else 'new'} {response.status}"] += 1
            except aiohttp.ClientError as error:
                outcomes[f"{'kept' if keep else 'new'} {type(error).__name__}"] += 1
            await asyncio.sleep(0.01)


async def roll_under_load(
    bundle: Path, timing: Timing, folder: Path, body: bytes, pods: int = 2
) -> tuple[Counter[str], list[Pod]]:
    """What clients saw while every pod was replaced, and the pods that ended."""
    cluster = Cluster(bundle, timing, folder)
    outcomes: Counter[str] = Counter()
    done = asyncio.Event()
    try:
        async with cluster.service.listening():
            await asyncio.gather(*(cluster.start_pod() for _ in range(pods)))
            clients = [
                asyncio.create_task(ask_until(done, cluster.service.port, body, keep, outcomes))
                for keep in (False, False, False, True, True, True)
            ]
            try:
                await cluster.roll()
                await asyncio.sleep(0.5)
            finally:
                done.set()
                await asyncio.gather(*clients)
    finally:
        cluster.close()
    return outcomes, cluster.ended
