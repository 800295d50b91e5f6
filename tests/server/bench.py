"""A batcher on a bench: fake engines, a clock that is moved by hand, images to feed it with."""

import asyncio
from collections.abc import Awaitable, Callable

import numpy as np

from bundle import Canvas
from server.batch_queue import BatchQueue, Inferred, Priority
from server.batcher import CHECK_EVERY_S, Batcher
from server.estimate import Estimate
from server.metrics import Metrics
from server.preprocess import PreparedImage
from server.timing import StageTimes
from tests.server.fake_engine import FakeEngine, FakeEngines

WIDE, TALL = Canvas(height=64, width=96), Canvas(height=96, width=64)
NEVER_S = 1e9


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Bench:
    """A batcher and what it stands on. With `reopen` engines that are lost are replaced."""

    def __init__(self, engines: int = 1, max_batch_size: int = 4, reopen: bool = False) -> None:
        self.open_engine = FakeEngines()
        self.engines = [self.open_engine() for _ in range(engines)]
        self.clock = Clock()
        self.metrics = Metrics()
        self.estimate = Estimate(engines)
        self.batcher = Batcher(
            self.engines,
            BatchQueue(max_batch_size, 0.005),
            self.estimate,
            self.metrics,
            self.clock,
            reopen=[self.open_engine] * engines if reopen else (),
        )

    @property
    def engine(self) -> FakeEngine:
        """The first one."""
        return self.engines[0]

    @property
    def opened(self) -> list[FakeEngine]:
        """The engines, with those that came later."""
        return self.open_engine.opened

    def image(self, column: int = 8, canvas: Canvas = WIDE, corner: int = 0) -> PreparedImage:
        """Bright from `column` on, so that an answer tells whose it is."""
        pixels = np.zeros((canvas.height, canvas.width, 3), np.uint8)
        pixels[:, column:] = 255
        pixels[0, 0] = corner
        return PreparedImage(pixels, canvas, canvas.width, canvas.height, StageTimes())

    def submit(
        self, image: PreparedImage, deadline_s: float = NEVER_S, priority: Priority = "interactive"
    ) -> "asyncio.Task[Inferred]":
        return asyncio.create_task(self.batcher.infer(image, deadline_s, priority=priority))

    async def hold(self) -> "asyncio.Task[Inferred]":
        """Close the first engine's gate and put one image behind it: the engine is busy from here on."""
        self.engine.gate.clear()
        task = self.submit(self.image())
        await asyncio.to_thread(self.engine.entered.acquire)
        await until(lambda: self.batcher.waiting == 0)
        return task

    async def pass_time(self, seconds: float) -> None:
        """Let time pass for the batcher, as its watch sees it."""
        for _ in range(round(seconds / CHECK_EVERY_S)):
            self.clock.now_s += CHECK_EVERY_S
            self.batcher.check()
            await asyncio.sleep(0)

    def restarts(self, reason: str) -> int:
        """Engines lost so far."""
        return int(self.metrics.engine_restarts.labels(reason)._value.get())


def run(test: Callable[[Bench], Awaitable[None]], **options: int) -> None:
    async def body() -> None:
        bench = Bench(**options)
        try:
            await asyncio.wait_for(test(bench), timeout=20)
        finally:
            bench.open_engine.release()
            await bench.batcher.close()

    asyncio.run(body())


async def settle() -> None:
    """Let every task that can run do so."""
    for _ in range(5):
        await asyncio.sleep(0)


async def until(condition: Callable[[], bool]) -> None:
    """Yield until the threads have come that far."""
    while not condition():
        await asyncio.sleep(0)


def left_edge_px(answer: Inferred) -> int:
    return round(float(answer.raw.boxes[0, 0]) * WIDE.width)
