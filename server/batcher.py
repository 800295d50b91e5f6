"""Forms batches and hands them to the engines. Everything here runs in the event loop."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from server.batch_queue import Batch, BatchQueue, Entry, Inferred, Priority
from server.engine import Engine, OpenEngine
from server.errors import DeadlinePassed, Draining, EngineFailed, Unavailable
from server.estimate import Estimate
from server.lane import Lane, fail
from server.metrics import Metrics
from server.preprocess import PreparedImage

logger = logging.getLogger("ddetr.batcher")

CHECK_EVERY_S = 0.1
"""How often `check` wants to be called."""

_LONGEST_RESTART_S = 60.0  # an engine that has not come back by then will not


class Batcher:
    """One queue before one or more engines.

    A batch leaves as soon as an engine is idle (see `BatchQueue.pop` for which), so batches grow while engines work.
    Behind the batch that an engine works on lies one more if it is full already, so that a busy engine finds its next
    batch without waiting for the event loop. It is taken back when an interactive image comes and it holds none, or
    when another engine is idle.

    An image whose caller has gone or whose deadline has passed does not leave; in a batch that has left and that no
    engine has begun, it is left out when the engine begins. An image that an engine raises on fails alone (see
    `infer_each`). The images of a batch that an engine is lost with are tried once more, one by one.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        queue: BatchQueue,
        estimate: Estimate,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        *,
        reopen: Sequence[OpenEngine] = (),
        stall_timeout_s: float = 1.5,
    ) -> None:
        self._queue = queue
        self._estimate = estimate
        self._clock = clock
        self._lanes = [
            Lane(
                engine,
                f"engine-{index}",
                reopen[index] if reopen else None,
                estimate,
                metrics,
                clock,
                stall_timeout_s,
                lost=self._lost,
                changed=self._dispatch,
            )
            for index, engine in enumerate(engines)
        ]
        self._work_came_s = self._checked_s = clock()
        self._looks_ahead = False
        self._draining = False
        self._replaced = False
        self._closed = False

    @property
    def waiting(self) -> int:
        """Images that no engine has begun."""
        return len(self._queue) + sum(lane.waiting for lane in self._lanes)

    @property
    def works(self) -> bool:
        """Whether any engine does."""
        return any(lane.up for lane in self._lanes)

    @property
    def provided(self) -> bool:
        """Whether every engine has its next batch, and would not change it for what comes now. From any thread."""
        return all(lane.provided for lane in self._lanes)

    @property
    def engine_name(self) -> str:
        """What runs, and on what; of several kinds all."""
        return "; ".join(dict.fromkeys(lane.engine_name for lane in self._lanes))

    @property
    def losses(self) -> int:
        """How often an engine died or hung."""
        return sum(lane.losses for lane in self._lanes)

    @property
    def opening_failed(self) -> str | None:
        """Why an engine that was lost could not be opened again, if that was tried in vain."""
        return next((lane.opening_failed for lane in self._lanes if lane.opening_failed is not None), None)

    async def infer(
        self,
        image: PreparedImage,
        deadline_s: float,
        on_dispatch: Callable[[], None] = lambda: None,
        priority: Priority = "interactive",
    ) -> Inferred:
        """The engine's answer for `image`. `on_dispatch` is called when an engine begins with it.

        Raises Draining, Unavailable, DeadlinePassed or EngineFailed. To give up, cancel: the image leaves the queue.
        """
        if self._closed:
            raise self._stopping()
        now_s = self._clock()
        if not self._busy:
            self._work_came_s = now_s
        entry = Entry(image, now_s, deadline_s, asyncio.get_running_loop().create_future(), on_dispatch, priority)
        self._queue.push(entry)
        try:
            if priority == "interactive":
                self._make_way()
            self._dispatch()
            return await entry.future
        finally:
            self._queue.discard(entry)
            del entry  # its future holds an error, whose traceback holds this frame, which holds the image

    async def warm(self) -> None:
        """Run every engine on every canvas, so that no request pays for a first time. Errors are raised."""
        await asyncio.gather(*(lane.warm() for lane in self._lanes))

    def check(self) -> None:
        """Look for engines that hang, and bring back those that were lost. To be called every CHECK_EVERY_S."""
        now_s = self._clock()
        # A process that was stopped for a while, or whose machine was, must not take its engines for hung.
        elapsed_s = min(now_s - self._checked_s, 2 * CHECK_EVERY_S)
        self._checked_s = now_s
        for lane in self._lanes:
            lane.check(elapsed_s)

    def trouble(self) -> str | None:
        """Why engines do not get on with their work, or None."""
        for lane in self._lanes:
            if lane.out_of_order is not None:
                return lane.out_of_order
            if lane.down_s > _LONGEST_RESTART_S:
                return f"an engine has been down for {lane.down_s:.0f} s"
        got_on_s = max(self._work_came_s, *(lane.got_on_s for lane in self._lanes))
        patience_s = max(lane.patience_s for lane in self._lanes)
        return "no progress in inference" if self._busy and self._clock() - got_on_s > patience_s else None

    def drain(self) -> None:
        """From now on batches leave because of the drain. Images are still taken: their requests are under way."""
        self._draining = True

    def replaced(self) -> None:
        """Others serve from now on: what is left is answered, but does not wait for engines that do not come back."""
        self._replaced = True
        self._dispatch()

    async def close(self, patience_s: float = 0.0) -> list[Future[None]]:
        """Fail what is left (nothing, if all requests were waited for), and let the engines go.

        Waits for up to `patience_s` until they have given back what they hold; a future is of one that has not yet, or
        that hung and was left behind long ago.
        """
        self._closed = True
        for entry in self._queue.drop_expired(float("inf")):
            fail(entry, self._stopping())
        closed = [lane.close() for lane in self._lanes]
        if patience_s:
            done, _ = await asyncio.wait([asyncio.wrap_future(each) for each in closed], timeout=patience_s)
            for error in filter(None, (each.exception() for each in done)):
                logger.warning("an engine could not be closed: %s: %s", type(error).__name__, error)
        closed += [each for lane in self._lanes for each in lane.hanging]
        return [each for each in closed if not each.done()]

    @property
    def _busy(self) -> bool:
        return bool(len(self._queue)) or any(lane.load for lane in self._lanes)

    def _dispatch(self) -> None:
        if self._closed:
            return
        for lane in self._lanes:
            if lane.up and not lane.load and (batch := self._next()) is not None:
                lane.give(batch)
        if not self._looks_ahead and len(self._queue) and any(lane.up and lane.load == 1 for lane in self._lanes):
            # Behind what the loop has to do now: answers go before what no engine waits for, and the thread that
            # prepares a batch would find Python busy.
            asyncio.get_running_loop().call_soon(self._dispatch_ahead)
            self._looks_ahead = True
        if not self.works:
            self._give_up()

    def _dispatch_ahead(self) -> None:
        self._looks_ahead = False
        for lane in self._lanes:
            if not self._closed and lane.up and lane.load == 1:
                batch = self._queue.pop(self._clock(), draining=self._draining, ahead=True)
                if batch is not None:
                    lane.give(batch)

    def _next(self) -> Batch | None:
        now_s = self._clock()
        for entry in self._queue.drop_expired(now_s):
            fail(entry, DeadlinePassed("the deadline passed in the queue"))
        if (batch := self._queue.pop(now_s, draining=self._draining)) is not None:
            return batch
        # Before it does nothing, an engine takes over what lies behind another's batch.
        return next((taken for lane in self._lanes if (taken := lane.take_back()) is not None), None)

    def _make_way(self) -> None:
        for lane in self._lanes:
            if lane.behind is not None and lane.behind.yields and (batch := lane.take_back()) is not None:
                self._queue.put_back(batch)

    def _lost(self, batch: Batch, begun: bool) -> None:
        """An engine was lost with a batch, or before it had begun it."""
        if not begun:
            self._queue.put_back(batch)
            return
        for entry in batch.entries:
            if batch.retry:
                fail(entry, EngineFailed("the engine was lost with this image, twice"))
            elif not entry.future.done():
                self._queue.push_retry(entry)

    def _give_up(self) -> None:
        """With no engine left: fail what has no chance."""
        if all(lane.out_of_order is not None for lane in self._lanes):
            for entry in self._queue.drop_expired(float("inf")):
                fail(entry, Unavailable("no engine is left", self._estimate.retry_after_s(self.waiting)))
        elif all(lane.opening_failed is not None or lane.out_of_order is not None for lane in self._lanes):
            for entry in self._queue.drop_retries():
                fail(entry, EngineFailed("the engine was lost with this image and cannot be restarted"))
            if self._replaced:
                for entry in self._queue.drop_expired(float("inf")):
                    fail(entry, Unavailable("its bundle was taken out of service, and another serves", 1))

    def _stopping(self) -> Draining:
        return Draining("the server is stopping", self._estimate.retry_after_s(self.waiting))
