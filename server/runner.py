"""An engine and its two threads: while one infers a batch, the other prepares the next."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from bundle import Canvas
from server.batch_queue import Batch, Entry
from server.engine import Engine, OpenEngine, RawDetections, check_answer
from server.isolate import EngineDied, infer_each
from server.preprocess import Pixels
from server.worker import Worker

_CLOSE_S = 10.0  # longest wait for an engine to give its memory back before the next one is opened


@dataclass(frozen=True, eq=False)
class Call:
    """What an engine is asked for."""

    canvas: Canvas
    images: int


@dataclass(frozen=True, eq=False)
class Begun:
    """An engine begins a batch, with those of its images that somebody still waits for."""

    entries: tuple[Entry, ...]
    at_s: float


@dataclass(frozen=True, eq=False)
class Answered:
    """What came of some of a batch's images."""

    entries: tuple[Entry, ...]
    answer: RawDetections | BaseException
    seconds: float


class Runner:
    """Batches run in the order they were given; each is prepared while the one before is inferred."""

    def __init__(self, name: str, clock: Callable[[], float], engine: Engine | None = None) -> None:
        self.engine = engine
        self.call: Call | None = None
        """What the engine is doing. Written by its thread; whoever sees the same one for too long calls it a hang."""
        self.out_of_service = False
        """Since its engine died or hangs: nothing is begun any more."""
        self._clock = clock
        self._seconds = 0.0  # of the engine's newest answer
        self._closed: Future[None] | None = None
        self._preparing = Worker(f"{name}-prepare")
        self._inferring = Worker(name)

    @property
    def alive(self) -> bool:
        """Whether the thread that infers has not ended."""
        return self._inferring.alive

    def open(
        self, open_engine: OpenEngine, canvases: Sequence[Canvas], after: "Future[None] | None"
    ) -> "Future[list[tuple[Canvas, float]]]":
        """Open an engine, once `after` is done, and warm it."""

        def open_and_warm() -> list[tuple[Canvas, float]]:
            if after is not None:
                wait([after], timeout=_CLOSE_S)
            self.engine = open_engine()
            return self._warm(canvases)

        return self._inferring.submit(open_and_warm)

    def warm(self, canvases: Sequence[Canvas]) -> "Future[list[tuple[Canvas, float]]]":
        """Run the engine on every canvas, so that no request pays for a first time; the seconds of a second time."""
        return self._inferring.submit(self._warm, canvases)

    def run(self, batch: Batch, report: Callable[[Begun | Answered], None]) -> "Future[None]":
        """See a batch through. What happens is told to `report`, in the engine's thread.

        Until the engine begins the batch, cancelling the future takes it back. It ends with EngineDied if that is so.
        """
        prepared = self._prepare([entry.image.pixels for entry in batch.entries], batch.canvas)
        work = self._inferring.submit(self._run, batch, prepared, report)
        work.add_done_callback(lambda _: prepared.cancel())  # has an effect only if the batch was taken back
        return work

    def close(self) -> "Future[None]":
        """Take nothing any more, and let the engine go once its thread is free. A second call does nothing more."""
        self.out_of_service = True
        if self._closed is None:
            self._closed = self._inferring.submit(self._close)
            self._inferring.stop()
        return self._closed

    def _prepare(self, images: Sequence[Pixels], canvas: Canvas) -> "Future[Any]":
        assert self.engine is not None
        return self._preparing.submit(self.engine.prepare, images, canvas)

    def _run(self, batch: Batch, prepared: "Future[Any]", report: Callable[[Begun | Answered], None]) -> None:
        if self.out_of_service:
            return
        now_s = self._clock()
        entries = tuple(entry for entry in batch.entries if not entry.future.done() and entry.deadline_s > now_s)
        report(Begun(entries, now_s))
        if not entries:
            return
        inputs = [prepared] if len(entries) == len(batch.entries) else []  # of all the images, for the first call
        infer = partial(self._infer, batch.canvas, inputs)
        try:
            for part in infer_each(infer, [entry.image.pixels for entry in entries], partial(blank, batch.canvas)):
                report(Answered(entries[part.slots], part.answer, self._seconds))
        except EngineDied:
            self.out_of_service = True
            raise

    def _infer(self, canvas: Canvas, inputs: "list[Future[Any]]", images: Sequence[Pixels]) -> RawDetections:
        assert self.engine is not None
        if self.out_of_service:
            raise EngineDied("it was given up")  # its answer would not be listened to
        self.call = Call(canvas, len(images))
        try:
            prepared = inputs.pop() if inputs else self._prepare(images, canvas)
            began_s = self._clock()
            raw = self.engine.finish(self.engine.infer(prepared.result()))
            check_answer(raw, len(images))
            self._seconds = self._clock() - began_s
            return raw
        finally:
            self.call = None

    def _warm(self, canvases: Sequence[Canvas]) -> list[tuple[Canvas, float]]:
        self.out_of_service = False
        timed = []
        for canvas in canvases:
            self._infer(canvas, [], [blank(canvas)])  # allocates, and for a GPU compiles
            self._infer(canvas, [], [blank(canvas)])
            timed.append((canvas, self._seconds))
        return timed

    def _close(self) -> None:
        self._preparing.stop()
        self._preparing.join()
        if self.engine is not None:
            self.engine.close()


def blank(canvas: Canvas) -> Pixels:
    """A black picture that fills the canvas."""
    return np.zeros((canvas.height, canvas.width, 3), np.uint8)
