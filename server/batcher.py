"""Forms batches and sees them through the engines. Everything here runs in the event loop but the engines."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

from bundle import Canvas
from server.batch_queue import Batch, BatchQueue, Entry, Inferred
from server.engine import Engine, RawDetections, run_engine
from server.errors import DeadlinePassed, Draining, EngineFailed
from server.estimate import Estimate
from server.metrics import Metrics
from server.preprocess import Pixels, PreparedImage
from server.progress import Progress
from server.worker import Worker

logger = logging.getLogger("ddetr.batcher")


class Batcher:
    """One queue before one or more engines.

    A batch leaves as soon as an engine is idle (see `BatchQueue.pop` for which), so batches grow while engines work.
    An image whose caller has gone or whose deadline has passed does not leave. A batch on which the engine raises is
    retried by halves, so that an image that cannot be inferred fails alone.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        queue: BatchQueue,
        estimate: Estimate,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.progress = Progress(clock)  # of the engines: callers that come and go are none
        self._lanes = [_Lane(engine, index, self.progress) for index, engine in enumerate(engines)]
        self._idle = list(self._lanes)
        self._queue = queue
        self._estimate = estimate
        self._metrics = metrics
        self._clock = clock
        self._running: set[asyncio.Task[None]] = set()  # asyncio itself keeps no hard reference to a task
        self._draining = False
        self._closed = False

    @property
    def waiting(self) -> int:
        """Images in the queue."""
        return len(self._queue)

    async def infer(
        self, image: PreparedImage, deadline_s: float, on_dispatch: Callable[[], None] = lambda: None
    ) -> Inferred:
        """The engine's answer for `image`. `on_dispatch` is called when it leaves the queue for an engine.

        Raises Draining, DeadlinePassed or EngineFailed. To give up, cancel: the image leaves the queue at once.
        """
        if self._closed:
            raise self._stopping()
        now_s = self._clock()
        entry = Entry(image, now_s, deadline_s, asyncio.get_running_loop().create_future(), on_dispatch)
        self._queue.push(entry)
        try:
            self._dispatch()
            return await entry.future
        finally:
            self._queue.discard(entry)

    async def warm(self, canvases: Sequence[Canvas], make_image: Callable[[Canvas], Pixels]) -> None:
        """Run every engine once on every canvas, so that no request pays for a first time. Errors are raised."""

        async def warm_lane(lane: _Lane) -> None:
            for canvas in canvases:
                images = [make_image(canvas)]
                await lane.run(images, canvas)  # allocates, and for a GPU compiles
                started_s = self._clock()
                await lane.run(images, canvas)
                self._estimate.observe(canvas, 1, self._clock() - started_s)

        await asyncio.gather(*(warm_lane(lane) for lane in self._lanes))

    def drain(self) -> None:
        """From now on batches leave because of the drain. Images are still taken: their requests are under way."""
        self._draining = True

    async def close(self) -> None:
        """Fail what is left (nothing, if all requests were waited for), and let the engines go."""
        self._closed = True
        for entry in self._queue.drop_expired(float("inf")):
            _fail(entry, self._stopping())
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(self._running)
        for lane in self._lanes:
            lane.close()

    def _dispatch(self) -> None:
        while self._idle:
            now_s = self._clock()
            for entry in self._queue.drop_expired(now_s):
                _fail(entry, DeadlinePassed("the deadline passed in the queue"))
            batch = self._queue.pop(now_s, draining=self._draining)
            if batch is None:
                return
            lane = self._idle.pop()
            task = asyncio.get_running_loop().create_task(self._run(lane, batch, now_s))
            self._running.add(task)
            task.add_done_callback(partial(self._finish, lane, batch))

    async def _run(self, lane: "_Lane", batch: Batch, now_s: float) -> None:
        self._metrics.observe_batch(batch)
        for entry in batch.entries:
            entry.on_dispatch()
        await self._infer_by_halves(lane, batch.entries, batch.canvas, now_s)

    def _finish(self, lane: "_Lane", batch: Batch, task: "asyncio.Task[None]") -> None:
        """A callback, not a `finally`: a task that is cancelled before it has begun never reaches its `try`."""
        self._running.discard(task)
        for entry in batch.entries:  # whatever happened, no future is left waiting
            _fail(entry, EngineFailed("the engine was stopped"))
        self._idle.append(lane)
        self._dispatch()

    async def _infer_by_halves(
        self, lane: "_Lane", entries: Sequence[Entry], canvas: Canvas, dispatched_s: float
    ) -> None:
        entries = [entry for entry in entries if not entry.future.done()]
        if not entries:
            return
        started_s = self._clock()
        try:
            raw = await lane.run([entry.image.pixels for entry in entries], canvas)
        except Exception as error:
            if len(entries) == 1:
                logger.exception("%s failed on one image of canvas %s", lane.engine.name, canvas)
                _fail(entries[0], EngineFailed(f"the engine failed on this image: {type(error).__name__}"))
                return
            logger.warning("%s failed on %d images, trying halves: %s", lane.engine.name, len(entries), error)
            half = len(entries) // 2
            await self._infer_by_halves(lane, entries[:half], canvas, dispatched_s)
            await self._infer_by_halves(lane, entries[half:], canvas, dispatched_s)
            return
        now_s = self._clock()
        self._estimate.observe(canvas, len(entries), now_s - started_s)
        for slot, entry in enumerate(entries):
            if not entry.future.done():
                queue_ms, inference_ms = (dispatched_s - entry.queued_at_s) * 1e3, (now_s - dispatched_s) * 1e3
                answer = Inferred(raw.of_slot(slot), queue_ms, inference_ms, now_s, len(entries))
                entry.future.set_result(answer)

    def _stopping(self) -> Draining:
        return Draining("the server is stopping", self._estimate.retry_after_s(self.waiting))


class _Lane:
    """An engine and its thread."""

    def __init__(self, engine: Engine, index: int, progress: Progress) -> None:
        self.engine = engine
        self._progress = progress
        self._worker = Worker(f"engine-{index}")

    async def run(self, images: Sequence[Pixels], canvas: Canvas) -> RawDetections:
        self._progress.begin()
        try:
            return await asyncio.wrap_future(self._worker.submit(run_engine, self.engine, images, canvas))
        finally:
            self._progress.end()

    def close(self) -> None:
        self._worker.submit(self.engine.close)  # after what it still does
        self._worker.stop()


def _fail(entry: Entry, error: Exception) -> None:
    if not entry.future.done():
        entry.future.set_exception(error)
