"""The door: who may come in, and how much at once. Passed before a request's body is read."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Self, get_args

from server.batch_queue import Priority
from server.errors import (
    BadParameter,
    BodyTimeout,
    BodyTooLarge,
    DeadlinePassed,
    DeadlineUnmeetable,
    Draining,
    QueueFull,
)
from server.estimate import Estimate
from server.line import Line, Place
from server.promise import Promises

_LONGEST_TIMEOUT_MS = 24 * 3600 * 1e3
_BATCH_SHARE = 0.5  # of the queue, in images and in bytes, for batch work at most: the rest is interactive work's alone

# A body that comes slower than this after its first moment, or slower than its timeout allows for after its first
# second, gives way.
_GRACE_S, _LEAST_BYTES_PER_S = 0.5, 32 * 1024
_PACE_GRACE_S = 1.0

_PREDICT_EVERY_S = 0.04  # to learn from how it turns out, while there is time enough for certain

_NEWEST_SHARE = 0.05  # weight of the newest request in the mean of images a request


@dataclass(frozen=True)
class Limits:
    """What may be inside at once, and how long a body may take to come in."""

    images: int
    queued_bytes: int
    body_bytes: int
    body_timeout_s: float

    def images_of(self, priority: Priority) -> int:
        """The most images of one lane."""
        return self.images if priority == "interactive" else max(1, int(self.images * _BATCH_SHARE))

    def bytes_of(self, priority: Priority) -> int:
        """The most bytes of one lane: enough for the largest body."""
        if priority == "interactive":
            return self.queued_bytes
        return max(self.body_bytes, int(self.queued_bytes * _BATCH_SHARE))


class Admission:
    """Bounds what was admitted and is not yet with an engine: the images, and the bytes of their uploads.

    A request whose body is being read counts as one image, and with the bytes that have come of it: of the length that
    it declares there must be room when it comes, but nothing is kept free for it, or a few that only declare would keep
    everyone out. Senders that are slow give their places up as soon as somebody else needs them.
    """

    def __init__(
        self, limits: Limits, line: Line, estimate: Estimate, max_batch_size: int, clock: Callable[[], float]
    ) -> None:
        self.limits = limits
        self.draining = False
        self._line = line
        self._estimate = estimate
        self._max_batch_size = max_batch_size
        self._clock = clock
        self._promises = Promises(clock)
        self._images_a_request = 1.0
        self._predict_at_s = -math.inf
        self._readers: dict[Ticket, asyncio.Timeout] = {}

    def use(self, estimate: Estimate) -> None:
        """Predict by another estimate from now on: another bundle is in service."""
        self._estimate = estimate
        self._line.use(estimate)

    @property
    def waiting(self) -> int:
        """Images admitted and not yet with an engine."""
        return self._line.waiting()

    @property
    def unanswered(self) -> int:
        """Images admitted that have no answer yet."""
        return len(self._line)

    @property
    def held_bytes(self) -> int:
        """Bytes of uploads not yet decoded, and of bodies on their way."""
        return self._line.held_bytes()

    def admit(self, deadline_s: float, priority: Priority = "interactive", length: int | None = None) -> "Ticket":
        """A place for one request, whose body has `length` bytes if it says so.

        Raises Draining, QueueFull or DeadlineUnmeetable, each with a Retry-After.
        """
        if self.draining:
            raise Draining("the server is stopping", self._estimate.retry_after_s(self.unanswered))
        ticket = Ticket(self, self._line, deadline_s, priority, length, self._clock)
        self._let_in(ticket, images=1, more_images=1, more_bytes=length or 0)
        ticket.places.append(self._line.enter(priority, 0))
        return ticket

    def _let_in(self, ticket: "Ticket", *, images: int, more_images: int, more_bytes: int) -> float:
        """Raise if there is no room for so much more of a request, or, where it has `images`, no time for it.

        Returns the seconds in which these would be done; 0 if it has none, nothing is known, or nobody is ahead, and as
        a rule where there is time enough for certain.
        """
        full = self._full(ticket, more_images, more_bytes)
        if full is not None and self._show_slow_readers_out(ticket):
            full = self._full(ticket, more_images, more_bytes)
        if full is not None:
            wait_s = self._line.finish_s(ticket.priority, 0, with_readers=True)
            raise QueueFull(full, self._retry_after_s(ticket, images, wait_s))
        if not images:
            return 0.0
        now_s = self._clock()
        left_s = ticket.deadline_s - now_s
        certain = self._line.surely_s(ticket.priority, images) <= left_s
        if certain and (not ticket.places or now_s < self._predict_at_s):
            return 0.0
        # To an idle server everyone is let in: were all refused, nothing would correct an estimate gone wrong.
        ahead = self._line.ahead_of(ticket.places)
        if not ahead:
            return 0.0
        if certain:
            self._predict_at_s = now_s + _PREDICT_EVERY_S
        predicted_s = self._line.finish_s(ticket.priority, images, with_readers=not ticket.places)
        needed_s = predicted_s * self._line.margin(ticket.priority)
        if needed_s > left_s:
            message = f"{ahead} images ahead take about {needed_s * 1e3:.0f} ms, {left_s * 1e3:.0f} are left"
            raise DeadlineUnmeetable(message, self._retry_after_s(ticket, images, needed_s - left_s))
        return predicted_s

    def _full(self, ticket: "Ticket", more_images: int, more_bytes: int) -> str | None:
        """Why there is no room, or None."""
        line, limits, lane = self._line, self.limits, ticket.priority
        if (held := line.waiting()) + more_images > limits.images:
            return _no_place(held, "images are waiting", limits.images, more_images)
        if (held := line.held_bytes()) + more_bytes > limits.queued_bytes:
            return _no_place(held, "bytes are held", limits.queued_bytes, more_bytes)
        if lane == "batch":
            if (held := line.waiting(lane)) + more_images > limits.images_of(lane):
                return _no_place(held, "images of batch work are waiting", limits.images_of(lane), more_images)
            if (held := line.held_bytes(lane)) + more_bytes > limits.bytes_of(lane):
                return _no_place(held, "bytes of batch work are held", limits.bytes_of(lane), more_bytes)
        return None

    def _retry_after_s(self, ticket: "Ticket", images: int, wait_s: float) -> int:
        rate = self._estimate.rate(self._max_batch_size)
        # At the door nobody knows how many images a request has: as many as others have had.
        return self._promises.retry_after_s(ticket.priority, wait_s, max(images, self._images_a_request), rate)

    def _read(self, images: int) -> None:
        """A request turned out to have so many images."""
        self._images_a_request += _NEWEST_SHARE * (images - self._images_a_request)

    def _show_slow_readers_out(self, needed_by: "Ticket") -> bool:
        """Whether there were any; batch work does not show out interactive work."""
        lanes = {"batch", needed_by.priority}
        slow = [each for each in self._readers if each is not needed_by and each.priority in lanes and each.is_slow()]
        for ticket in slow:
            timeout = self._readers.pop(ticket)
            if not timeout.expired():
                timeout.reschedule(0.0)  # the time is up: BodyTimeout, in its own task
            ticket.show_out()
        return bool(slow)


class Ticket:
    """A request's places, one an image; leaving the `with` block gives back what is left of them."""

    def __init__(
        self,
        admission: Admission,
        line: Line,
        deadline_s: float,
        priority: Priority,
        length: int | None,
        clock: Callable[[], float],
    ) -> None:
        self.deadline_s = deadline_s
        self.priority = priority
        self.places: list[Place] = []
        self._admission = admission
        self._line = line
        self._length = length or 0
        self._clock = clock
        self._since_s = clock()
        self._received = 0
        self._shown_out = False
        self._predicted: tuple[float, float] | None = None  # when, and seconds from then on

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[None]:
        """While the body is read. Raises BodyTimeout when that takes too long, or slow senders have to give way."""
        timeout_s = self._admission.limits.body_timeout_s
        try:
            async with asyncio.timeout(timeout_s) as timeout:
                self._admission._readers[self] = timeout
                yield
                if self._shown_out:  # in the moment that the rest of it came
                    raise TimeoutError
        except TimeoutError as error:
            taken_s = self._clock() - self._since_s
            said = f" of {self._length}" if self._length else ""
            raise BodyTimeout(
                f"{self._received}{said} bytes of the body came in {taken_s:.1f} s; it may take {timeout_s:g} s, "
                "and a slow one less where others need its place"
            ) from error
        finally:
            self._admission._readers.pop(self, None)

    def received(self, count: int) -> None:
        """`count` more bytes of the body have come. Raises QueueFull if they find no room."""
        self._received += count
        self._admission._let_in(self, images=0, more_images=0, more_bytes=count)
        self.places[0].hold(self._received)

    def is_slow(self) -> bool:
        """Whether what has come of the body is less than can be asked for."""
        taken_s = self._clock() - self._since_s
        pace = self._length / self._admission.limits.body_timeout_s
        return self._received < max(_LEAST_BYTES_PER_S * (taken_s - _GRACE_S), pace * (taken_s - _PACE_GRACE_S))

    def read(self, sizes: Sequence[int], *, keep: bool = False) -> None:
        """The body is here; it holds uploads of `sizes` bytes, which count until they are decoded, or `keep`, the end.

        Raises QueueFull or DeadlineUnmeetable: how many images there are was not known at the door.
        """
        more = len(sizes) - len(self.places)
        predicted_s = self._admission._let_in(self, images=len(sizes), more_images=more, more_bytes=0)
        # Alone, how long it takes says nothing of how good predictions are.
        self._predicted = (self._clock(), predicted_s) if predicted_s else None
        self._admission._read(len(sizes))
        self.places += [self._line.enter(self.priority, 0) for _ in range(more)]
        for place, size in zip(self.places, sizes, strict=True):
            place.read(size, keep=keep)

    def answered(self) -> None:
        """All images have their answers: what was predicted can be held against it."""
        if self._predicted is not None:
            at_s, predicted_s = self._predicted
            self._line.observe(self.priority, predicted_s, self._clock() - at_s)
            self._predicted = None

    def show_out(self) -> None:
        """Its place is needed: it gives it back, and its reading fails."""
        self._shown_out = True
        self.leave()

    def leave(self) -> None:
        """Give all places back."""
        for place in self.places:
            place.give_back()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, DeadlinePassed):
            self.answered()  # too late, and by how much will not be known
        self.leave()


def _no_place(held: int, what: str, most: int, more: int) -> str:
    return f"{held} {what} and {most} may: no place for {more} more"


def priority(headers: Mapping[str, str]) -> Priority:
    """The lane that the caller's X-Priority asks for."""
    given = headers.get("x-priority", "interactive")
    for lane in get_args(Priority):
        if given.strip().lower() == lane:
            return lane  # type: ignore[no-any-return]
    raise BadParameter(f"X-Priority: {given[:100]!r} is neither {' nor '.join(get_args(Priority))}")


def timeout_ms(headers: Mapping[str, str], default_timeout_ms: float) -> float:
    """The caller's X-Timeout-Ms, or the default."""
    given = headers.get("x-timeout-ms")
    if given is None:
        return default_timeout_ms
    try:
        value = math.nan if "_" in given else float(given)  # Python's numbers may have some
    except ValueError:
        value = math.nan
    if not 0 < value <= _LONGEST_TIMEOUT_MS:
        raise BadParameter(f"X-Timeout-Ms: {given[:100]!r} is not a number of milliseconds above 0, at most a day's")
    return value


def body_length(headers: Mapping[str, str], max_body_bytes: int) -> int | None:
    """The bytes that a body says it has. Raises BodyTooLarge."""
    given = headers.get("content-length", "")
    if not (given.isascii() and given.isdigit()):
        return None
    length = int(given.lstrip("0")[:20] or "0")  # Python reads no numbers of thousands of digits
    if length > max_body_bytes:
        raise BodyTooLarge(f"{length} bytes exceed {max_body_bytes}")
    return length
