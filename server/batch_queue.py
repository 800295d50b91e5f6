"""Images waiting for an engine, by priority and canvas, and how they leave. No clock, no loop, no thread."""

from asyncio import Future
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, islice
from typing import Literal

from bundle import Canvas
from server.engine import RawImageDetections
from server.preprocess import PreparedImage

LeaveReason = Literal["full", "delay", "idle", "drain"]
LEAVE_REASONS: tuple[LeaveReason, ...] = ("full", "delay", "idle", "drain")

Priority = Literal["interactive", "batch"]
PRIORITIES: tuple[Priority, ...] = ("interactive", "batch")

MOST_PASSED_OVER = 4
"""Batches in a row that may leave without the oldest batch-priority image."""


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
    priority: Priority = "interactive"


@dataclass(frozen=True)
class Batch:
    """Images of one canvas that go through an engine together."""

    canvas: Canvas
    entries: tuple[Entry, ...]
    reason: LeaveReason
    yields: bool = False  # but for one whose turn it is all are of batch priority: an interactive one goes before them
    retry: bool = False  # an image that an engine was lost with, by itself
    passed_over: int = 0  # the queue's count before this batch left, for putting it back


class BatchQueue:
    """First in, first out within a canvas and a priority. Images of different canvases never share a batch.

    Interactive images lead. Those of batch priority fill the places that are left in a batch of their canvas, and lead
    when no interactive one waits. They do not starve: of any five batches in a row that leave while some wait, at least
    one takes the oldest of them along. Before the others in that batch interactive images go, as in any: a turn costs
    those of its canvas one place.

    Images that an engine was lost with go before all others, one by one, so that only the culprit can do it again.
    """

    def __init__(self, max_batch_size: int, max_delay_s: float) -> None:
        self._max_batch_size = max_batch_size
        self._max_delay_s = max_delay_s
        # Insertion order is age; removal anywhere is O(1).
        self._lines: dict[Priority, dict[Canvas, dict[Entry, None]]] = {priority: {} for priority in PRIORITIES}
        self._retries: dict[Entry, None] = {}
        self._count = 0
        self._passed_over = 0

    def __len__(self) -> int:
        return self._count

    def push(self, entry: Entry) -> None:
        """Put an image at the end of its line."""
        self._lines[entry.priority].setdefault(entry.image.canvas, {})[entry] = None
        self._count += 1

    def push_retry(self, entry: Entry) -> None:
        """Let an image that an engine was lost with leave once more, by itself."""
        self._retries[entry] = None
        self._count += 1

    def put_back(self, batch: Batch) -> None:
        """Let the images of a batch that no engine has begun stand where they stood."""
        waiting = [entry for entry in batch.entries if not entry.future.done()]
        self._count += len(waiting)
        self._passed_over = max(self._passed_over, batch.passed_over)
        if batch.retry:
            self._retries = dict.fromkeys([*waiting, *self._retries])
            return
        for priority, lines in self._lines.items():
            if entries := [entry for entry in waiting if entry.priority == priority]:
                entries += lines.get(batch.canvas, ())
                lines[batch.canvas] = dict.fromkeys(sorted(entries, key=lambda entry: entry.queued_at_s))

    def discard(self, entry: Entry) -> None:
        """Take an image out, if it is still in: its client has gone, or its deadline has passed."""
        lines = self._lines[entry.priority]
        line = self._retries if entry in self._retries else lines.get(entry.image.canvas, {})
        if entry not in line:
            return
        del line[entry]
        self._count -= 1
        if not line and line is not self._retries:
            del lines[entry.image.canvas]

    def drop_expired(self, now_s: float) -> list[Entry]:
        """Take out what no engine should work on any more: answered entries, and those past their deadline."""
        lines = [self._retries, *(line for lines in self._lines.values() for line in lines.values())]
        expired = [entry for line in lines for entry in line if entry.future.done() or entry.deadline_s <= now_s]
        for entry in expired:
            self.discard(entry)
        return expired

    def drop_retries(self) -> list[Entry]:
        """Take out the images that an engine was lost with."""
        dropped = list(self._retries)
        for entry in dropped:
            self.discard(entry)
        return dropped

    def pop(self, now_s: float, *, draining: bool = False, ahead: bool = False) -> Batch | None:
        """The next batch for an engine that is idle, or None if nothing waits.

        Lines whose oldest image has waited `max_delay` go first, the oldest of them first: no canvas starves. Then
        full ones; then, since the engine would do nothing otherwise, whatever is there, the oldest first.

        `ahead` is for an engine that still works: the batch that would leave next, if it is full and waiting cannot
        better it, since images of one priority fill it; besides them one whose turn it is.
        """
        if self._retries:
            return None if ahead else self._pop_retry(draining)
        if ahead and self._count < self._max_batch_size:
            return None
        oldest = self._oldest_of_batch_priority()
        due = oldest is not None and self._passed_over >= MOST_PASSED_OVER
        lead: Priority = "batch" if due or not self._lines["interactive"] else "interactive"
        lines = self._lines[lead]
        if not lines:
            return None
        others = self._lines["batch" if lead == "interactive" else "interactive"]

        def rank(canvas: Canvas) -> tuple[int, float]:
            oldest_s = next(iter(lines[canvas])).queued_at_s
            if now_s - oldest_s >= self._max_delay_s:
                return 0, oldest_s
            count = len(lines[canvas]) + len(others.get(canvas, ()))
            return (1 if count >= self._max_batch_size else 2), oldest_s

        canvas = oldest.image.canvas if oldest is not None and due else min(lines, key=rank)
        line = lines[canvas]
        first = 1 if due else len(line)
        in_order = chain(islice(line, first), others.get(canvas, ()), islice(line, first, None))
        entries = tuple(islice(in_order, self._max_batch_size))
        filled_by = {entry.priority for entry in entries[due:]}
        if ahead and (len(entries) < self._max_batch_size or len(filled_by) > 1):
            return None
        overdue = rank(canvas)[0] == 0
        for entry in entries:
            self.discard(entry)
        passed_over = self._passed_over
        self._passed_over = 0 if oldest is None or oldest in entries else passed_over + 1
        reason: LeaveReason = "idle"
        if len(entries) == self._max_batch_size:
            reason = "full"
        elif draining:
            reason = "drain"
        elif overdue:
            reason = "delay"
        return Batch(canvas, entries, reason, yields=filled_by == {"batch"}, passed_over=passed_over)

    def _pop_retry(self, draining: bool) -> Batch:
        entry = next(iter(self._retries))
        self.discard(entry)
        reason: LeaveReason = "drain" if draining else "idle"
        return Batch(entry.image.canvas, (entry,), reason, retry=True, passed_over=self._passed_over)

    def _oldest_of_batch_priority(self) -> Entry | None:
        oldest_of_lines = (next(iter(line)) for line in self._lines["batch"].values())
        return min(oldest_of_lines, key=lambda entry: entry.queued_at_s, default=None)
