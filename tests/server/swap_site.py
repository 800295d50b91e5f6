"""A server whose bundles are fakes that misbehave when told to, and an administrator."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from bundle import Manifest, ModelName
from server.app import create_app
from server.engine import Engine
from server.gate import Result, Verdict
from server.metrics import Metrics
from server.served import Opened
from server.settings import Settings
from server.swap import Swaps
from tests.server.fake_engine import MANIFEST, FakeEngine
from tests.server.test_load import Site

KEY = {"X-API-Key": "secret"}
FIRST = "7"  # the version of the bundle at the start: MANIFEST's


def version_of(manifest: Manifest, version: str) -> Manifest:
    return manifest.model_copy(update={"model": ModelName(name=manifest.model.name, version=version)})


class Bundles:
    """Opens fakes: the version is the folder's name, and so is what is said of it here."""

    def __init__(self) -> None:
        self.opened: dict[str, FakeEngine] = {}  # by version, the newest
        self.count = 0
        self.errors: dict[str, Exception] = {}
        self.manifests: dict[str, Manifest] = {}
        self.on_open: dict[str, Callable[[FakeEngine], None]] = {}
        self.gate = threading.Event()  # closed: opening waits for it
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.passed_over: tuple[str, ...] = ()
        self.engine = "fake"
        self.unavailable: tuple[str, ...] = ()
        self.result: Result = "passed"
        self.given_up: Callable[[], bool] = lambda: False  # what the newest opening may ask

    def __call__(
        self, settings: Settings, path: Path, metrics: Metrics, gate_seconds: float, given_up: Callable[[], bool]
    ) -> Opened:
        version = path.name
        self.given_up = given_up
        self.entered.release()
        assert self.gate.wait(30)
        if version in self.errors:
            raise self.errors[version]

        def open_one() -> Engine:
            engine = FakeEngine(version_of(self.manifests.get(version, MANIFEST), version))
            self.on_open.get(version, lambda engine: None)(engine)
            self.opened[version] = engine
            self.count += 1
            return engine

        verdict = Verdict(self.engine, self.result, "fp32", passed_over=self.passed_over, unavailable=self.unavailable)
        return Opened([open_one()], [open_one], path, (verdict,))

    def release(self) -> None:
        """Let every thread go."""
        self.gate.set()
        for engine in self.opened.values():
            engine.gate.set()


class SwapSite(Site):
    """With an administrator."""

    bundles: Bundles

    @property
    def swaps(self) -> Swaps:
        swaps = self.app.state.swaps
        assert isinstance(swaps, Swaps)
        return swaps

    @property
    def first(self) -> FakeEngine:
        """The engine of the start."""
        return self.engine

    async def begin(self, path: str, **more: object) -> httpx2.Response:
        return await self.client.post("/admin/bundle", json={"path": path, **more}, headers=KEY)

    def swap(self, path: str, **more: object) -> "asyncio.Task[httpx2.Response]":
        """The answer when it is over."""
        posting = self.client.post("/admin/bundle?wait=true", json={"path": path, **more}, headers=KEY)
        return asyncio.create_task(posting)

    async def state(self) -> dict[str, Any]:
        content: dict[str, Any] = (await self.client.get("/admin/bundle", headers=KEY)).json()
        return content

    async def version(self) -> str:
        """Of the bundle that answers."""
        answer = await self.post()
        assert answer.status_code == 200, answer.text
        return str(answer.json()["model"]["version"])


def run(test: Callable[[SwapSite], Awaitable[None]], **settings: Any) -> None:
    """`test` on a site with these settings; nothing is kept ready after a swap unless they say so."""

    async def body() -> None:
        async with asyncio.timeout(60), _site(settings) as site:
            await test(site)

    asyncio.run(body())


@asynccontextmanager
async def _site(changes: dict[str, Any]) -> AsyncIterator[SwapSite]:
    defaults = {"admin_keys": "secret", "rollback_seconds": 0, "stall_timeout_ms": 60_000, "decode_threads": 2}
    bundles = Bundles()
    engine = FakeEngine()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("server.app.open_bundle", bundles)
        settings = Settings(**{"bundle": Path("no-bundle"), **defaults, **changes})
        app = create_app(settings, engine)
        async with (
            app.router.lifespan_context(app),
            httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://test") as client,
        ):
            site = SwapSite(app, engine, client)
            site.bundles = bundles
            try:
                yield site
            finally:
                engine.gate.set()
                bundles.release()
