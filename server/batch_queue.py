"""Images waiting for an engine, by canvas, and the rule by which they leave. No clock, no loop, no thread."""

from asyncio import Future
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from bundle import Canvas
from server.engine import RawImageDetections
from server.preprocess import PreparedImage

LeaveReason = Literal["full", "delay", "idle", "drain"]
LEAVE_REASONS: tuple[LeaveReason, ...] = ("full", "delay", "idle", "drain")


@dataclass(frozen=True)
class Inferred:
    """An image's answer from the engine, and how long it took to get it."""

    raw: RawImageDetections
    queue_ms: float
    inference_ms: float
    answered_s: float = 0.0  # when the engine had it, by the batcher's clock
    batch_size: int = 1  # of the batch that it was answered in


@dataclass(frozen=True, eq=False)
class Entry:
    """An image in the queue. Its future always gets an answer or an exception."""

    image: PreparedImage
    queued_at_s: float
    deadline_s: float
    future: "Future[Inferred]"
    on_dispatch: Callable[[], None]


@dataclass(frozen=True)
class Batch:
    """Images of one canvas that go through an engine together."""

    canvas: Canvas
    entries: tuple[Entry, ...]
    reason: LeaveReason


class BatchQueue:
    """First in, first out within a canvas. Images of different canvases never share a batch."""

    def __init__(self, max_batch_size: int, max_delay_s: float) -> None:
        self._max_batch_size = max_batch_size
        self._max_delay_s = max_delay_s
        self._waiting: dict[Canvas, dict[Entry, None]] = {}  # insertion order is age; removal anywhere is O(1)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def push(self, entry: Entry) -> None:
        """Put an image at the end of its canvas's line."""
        self._waiting.setdefault(entry.image.canvas, {})[entry] = None
        self._count += 1

    def discard(self, entry: Entry) -> None:
        """Take an image out, if it is still in: its client has gone, or its deadline has passed."""
        line = self._waiting.get(entry.image.canvas, {})
        if entry in line:
            del line[entry]
            self._count -= 1
            if not line:
                del self._waiting[entry.image.canvas]

    def drop_expired(self, now_s: float) -> list[Entry]:
        """Take out what no engine should work on any more: answered entries, and those past their deadline."""
        expired = [
            entry
            for line in self._waiting.values()
            for entry in line
            if entry.future.done() or entry.deadline_s <= now_s
        ]
        for entry in expired:
            self.discard(entry)
        return expired

    def pop(self, now_s: float, *, draining: bool = False) -> Batch | None:
        """The next batch for an engine that is idle, or None if nothing waits.

        Lines whose oldest image has waited `max_delay` go first, the oldest of them first: no canvas starves. Then
        full ones; then, since the engine would do nothing otherwise, whatever is there, the oldest first.
        """
        if not self._waiting:
            return None

        def rank(canvas: Canvas) -> tuple[int, float]:
            oldest_s = next(iter(self._waiting[canvas])).queued_at_s
            if now_s - oldest_s >= self._max_delay_s:
                return 0, oldest_s
            return (1 if len(self._waiting[canvas]) >= self._max_batch_size else 2), oldest_s

        canvas = min(self._waiting, key=rank)
        line = self._waiting[canvas]
        overdue = rank(canvas)[0] == 0
        entries = tuple(entry for entry, _ in zip(line, range(self._max_batch_size), strict=False))
        for entry in entries:
            self.discard(entry)
        reason: LeaveReason = "idle"
        if len(entries) == self._max_batch_size:
            reason = "full"
        elif draining:
            reason = "drain"
        elif overdue:
            reason = "delay"
        return Batch(canvas, entries, reason)
