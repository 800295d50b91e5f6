"""One engine at work, and its replacement when it dies or hangs."""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from bundle import Canvas, Manifest
from server.batch_queue import Batch, Entry, Inferred
from server.engine import Engine, OpenEngine
from server.errors import DeadlinePassed, EngineFailed
from server.estimate import Estimate
from server.metrics import Metrics
from server.runner import Answered, Begun, Runner

logger = logging.getLogger("ddetr.lane")

HANG_FACTOR = 5
"""A batch that takes this many times what it should is a hang, if it takes longer than `stall_timeout` too."""

MOST_ABANDONED = 3
"""Threads that may hang in engines given up; their memory is lost until the process ends."""

_BACKOFF_S = 0.5  # before the second try to open an engine; twice as long before each further one
_LONGEST_BACKOFF_S = 30.0

RestartReason = Literal["died", "hung"]


@dataclass(eq=False)
class _Run:
    """A batch that the engine's threads have been given."""

    batch: Batch
    began_s: float | None = None
    work: "Future[None] | None" = None  # until it is done or taken back; it refers to this object, too

    @property
    def waiting(self) -> int:
        """Its images that an engine has not begun."""
        return 0 if self.began_s is not None else sum(not entry.future.done() for entry in self.batch.entries)

    def cancel(self) -> bool:
        """Whether the engine had not begun it, and will not."""
        return self.work is not None and self.work.cancel()


class Lane:
    """Sees batches through an engine: one is with it, and one may be prepared behind that.

    Everything here runs in the event loop. The engine's threads report to it and never wait for it. What a thread
    reports of a batch that was taken from it answers nobody.

    An engine dies by raising on a blank picture, and hangs by taking far longer than it should; `lost` is told of its
    batches. With `reopen` it is replaced: the new engine is opened and warmed in a thread of its own, at once or, if
    that fails or the new one is lost before it has answered anything, after a back-off. A thread that hangs is left
    behind; with more than MOST_ABANDONED of them the lane is out of order for good.

    Without `reopen` (the engine was handed over as an object) the same engine is warmed again, in its own threads: one
    that died may have been short of memory for a moment, and one that hung may come back. Until then nothing else is
    asked of it: it is made for one thread.
    """

    def __init__(
        self,
        engine: Engine,
        name: str,
        reopen: OpenEngine | None,
        estimate: Estimate,
        metrics: Metrics,
        clock: Callable[[], float],
        stall_timeout_s: float,
        lost: Callable[[Batch, bool], None],
        changed: Callable[[], None],
    ) -> None:
        self.up = True
        self.out_of_order: str | None = None
        self.opening_failed: str | None = None
        """Why the engine could not be opened again, since that was last tried in vain."""
        self.engine_name = engine.name
        self.losses = 0
        """How often an engine died or hung here."""
        self.got_on_s = clock()
        """When the engine last began or answered something, died or came back."""
        self._name = name
        self._manifest: Manifest = engine.manifest
        self._runner = Runner(name, clock, engine)
        self._reopen = reopen
        self._estimate = estimate
        self._metrics = metrics
        self._clock = clock
        self._stall_timeout_s = stall_timeout_s
        self._lost = lost  # takes a batch, and whether the engine had begun it
        self._changed = changed
        self._runs: list[_Run] = []
        self._seen_call: object = None
        self._seen_for_s = 0.0
        self._failures = 0  # in a row: openings that failed, and engines lost before they had answered anything
        self._opening: Future[list[tuple[Canvas, float]]] | None = None
        self._lost_at_s = self._open_at_s = 0.0
        self._closing: Future[None] | None = None
        self._abandoned: list[Runner] = []

    @property
    def load(self) -> int:
        """Batches given and not ended: 0, 1, or 2 if one is prepared behind the other."""
        return len(self._runs)

    @property
    def waiting(self) -> int:
        """Images given that the engine has not begun, and that somebody still waits for."""
        return sum(run.waiting for run in self._runs)

    @property
    def behind(self) -> Batch | None:
        """The batch that is prepared behind another."""
        return self._runs[1].batch if len(self._runs) > 1 else None

    @property
    def provided(self) -> bool:
        """Whether a batch lies behind another that goes before whatever comes. From any thread."""
        behind = self._runs[1:2]  # a copy: the event loop may take it meanwhile
        return bool(behind) and not behind[0].batch.yields

    @property
    def hanging(self) -> "list[Future[None]]":
        """Of engines that hang and were left behind: done once they have let go."""
        return [runner.close() for runner in self._abandoned if runner.alive]

    @property
    def down_s(self) -> float:
        """Seconds since the engine was lost; 0 while it works."""
        return 0.0 if self.up else self._clock() - self._lost_at_s

    @property
    def patience_s(self) -> float:
        """How long what the engine does now may take."""
        call = self._runner.call
        predicted_s = None if call is None else self._estimate.batch_s(call.canvas, call.images)
        return max(self._stall_timeout_s, HANG_FACTOR * (predicted_s or 0.0))

    async def warm(self) -> None:
        """Run the engine on every canvas, so that no request pays for a first time. What it raises is raised."""
        for canvas, seconds in await asyncio.wrap_future(self._runner.warm(self._manifest.canvases)):
            self._estimate.observe(canvas, 1, seconds)

    def give(self, batch: Batch) -> None:
        """See a batch through, after what was given before."""
        run = _Run(batch)
        self._runs.append(run)
        post = partial(_post, asyncio.get_running_loop())
        run.work = self._runner.run(batch, lambda report: post(self._hear, run, report))
        run.work.add_done_callback(lambda work: post(self._end, run, work))

    def take_back(self) -> Batch | None:
        """The batch behind, unless the engine begins it just now."""
        if len(self._runs) < 2 or not self._runs[1].cancel():
            return None
        run = self._runs.pop()
        run.work = None
        return run.batch

    def check(self, elapsed_s: float) -> None:
        """Look after the engine; `elapsed_s` since the last time."""
        if self.up:
            call = self._runner.call
            self._seen_for_s = self._seen_for_s + elapsed_s if call is self._seen_call else 0.0
            self._seen_call = call
            if call is not None and self._seen_for_s > self.patience_s:
                self._replace("hung", f"{call.images} images of canvas {call.canvas} take {self._seen_for_s:.1f} s")
        elif self._opening is None and self.out_of_order is None and self._clock() >= self._open_at_s:
            self._open()

    def close(self) -> "Future[None]":
        """Fail what is left, and let the engine go once its thread is free; the future is done then."""
        self.up = False
        self.out_of_order = "closed"
        runs, self._runs = self._runs, []
        for run in runs:
            run.cancel()
            run.work = None
            for entry in run.batch.entries:
                fail(entry, EngineFailed("the engine was stopped"))
        return self._runner.close()

    def _hear(self, run: _Run, report: Begun | Answered) -> None:
        if run not in self._runs:
            # Nobody wants the answer any more. But what is slow and not stuck shall not be called a hang again.
            if isinstance(report, Answered) and not isinstance(report.answer, BaseException):
                self._estimate.observe(run.batch.canvas, len(report.entries), report.seconds)
            return
        self.got_on_s = self._clock()
        if isinstance(report, Begun):
            self._begin(run, report)
        elif isinstance(report.answer, BaseException):
            self._failures = 0
            logger.warning("%s failed on one image of canvas %s: %r", self._name, run.batch.canvas, report.answer)
            error = EngineFailed(f"the engine failed on this image: {type(report.answer).__name__}")
            error.__cause__ = report.answer
            for entry in report.entries:
                fail(entry, error)
        else:
            self._failures = 0
            self._answer(run, report)

    def _begin(self, run: _Run, report: Begun) -> None:
        run.began_s = report.at_s
        for entry in run.batch.entries:
            if entry not in report.entries:
                fail(entry, DeadlinePassed("the deadline passed in the queue"))
        if not run.batch.retry:  # it left the queue once
            if report.entries:
                self._metrics.observe_batch(replace(run.batch, entries=report.entries))
            for entry in report.entries:
                entry.on_dispatch()
        self._changed()

    def _answer(self, run: _Run, report: Answered) -> None:
        raw = report.answer
        assert run.began_s is not None
        assert not isinstance(raw, BaseException)
        now_s, size = self.got_on_s, len(report.entries)
        self._estimate.observe(run.batch.canvas, size, report.seconds)
        for slot, entry in enumerate(report.entries):
            if not entry.future.done():
                queue_ms, inference_ms = (run.began_s - entry.queued_at_s) * 1e3, (now_s - run.began_s) * 1e3
                entry.future.set_result(Inferred(raw.of_slot(slot), queue_ms, inference_ms, now_s, size))

    def _end(self, run: _Run, work: "Future[None]") -> None:
        if run not in self._runs:
            return
        self.got_on_s = self._clock()
        if error := work.exception():
            self._replace("died", str(error))
            return
        self._runs.remove(run)
        run.work = None
        self._changed()

    def _replace(self, reason: RestartReason, why: str) -> None:
        logger.error("%s %s: %s", self._name, reason, why)
        self._metrics.engine_restarts.labels(reason).inc()
        self.losses += 1
        self.up = False
        self._lost_at_s = self._clock()
        self._runner.out_of_service = True
        runs, self._runs = self._runs, []
        for run in runs:
            run.cancel()
            run.work = None
            self._lost(run.batch, run.began_s is not None)
        if self._reopen is not None:
            closed = self._runner.close()
            self._closing = closed if reason == "died" else None  # a GPU may not have the memory for two engines
            if reason == "hung":
                self._abandoned = [*(runner for runner in self._abandoned if runner.alive), self._runner]
        if len(self._abandoned) > MOST_ABANDONED:
            self.out_of_order = f"{len(self._abandoned)} engines hang"
            logger.critical("%s is out of order: %s; the process must be restarted", self._name, self.out_of_order)
        else:
            self._open_later()
        self._changed()

    def _open_later(self) -> None:
        backoff_s = min(_LONGEST_BACKOFF_S, _BACKOFF_S * 2.0 ** (self._failures - 1)) if self._failures else 0.0
        self._failures += 1
        self._open_at_s = self._clock() + backoff_s
        if not backoff_s:
            self._open()

    def _open(self) -> None:
        if self._reopen is None:
            self._opening = self._runner.warm(self._manifest.canvases)
        else:
            try:
                self._runner = Runner(self._name, self._clock)
            except RuntimeError as error:  # this process may have no more threads
                self._not_opened(error)
                return
            self._opening = self._runner.open(self._reopen, self._manifest.canvases, self._closing)
        post = partial(_post, asyncio.get_running_loop())
        self._opening.add_done_callback(lambda opening: post(self._opened, opening))

    def _opened(self, opening: "Future[list[tuple[Canvas, float]]]") -> None:
        self._opening = None
        if self.out_of_order is not None:
            return
        error = opening.exception()
        engine = self._runner.engine
        if error is None and engine is not None and engine.manifest != self._manifest:
            error = ValueError("the bundle is another one than it was when it was opened; swap to it, or restart")
        if error is not None:
            if self._reopen is not None:
                self._closing = self._runner.close()
            self._not_opened(error)
        else:
            logger.warning("%s works again", self._name)
            self.up = True
            self.opening_failed = None
            self.engine_name = engine.name if engine is not None else self.engine_name
            self.got_on_s = self._clock()
        self._changed()

    def _not_opened(self, error: BaseException) -> None:
        self.opening_failed = f"{type(error).__name__}: {error}"
        logger.error("%s cannot be restarted yet: %s", self._name, self.opening_failed)
        self._open_later()


def fail(entry: Entry, error: Exception) -> None:
    """Answer an entry with an error, unless it has been answered."""
    if not entry.future.done():
        entry.future.set_exception(error)


def _post(loop: asyncio.AbstractEventLoop, handle: Callable[..., None], *args: object) -> None:
    with suppress(RuntimeError):  # the loop is closed: nobody waits any more
        loop.call_soon_threadsafe(handle, *args)
