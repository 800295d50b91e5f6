"""The door: who may come in, and how many at once. Passed before a request's body is read."""

import hmac
import math
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from pydantic import SecretStr
from starlette.datastructures import Headers

from server.errors import BadParameter, BodyTooLarge, DeadlineUnmeetable, Draining, QueueFull, Unauthorized
from server.estimate import Estimate

_LONGEST_TIMEOUT_MS = 24 * 3600 * 1e3


class Admission:
    """Bounds the images that were admitted and are not yet with an engine."""

    def __init__(self, queue_limit: int, estimate: Estimate, clock: Callable[[], float]) -> None:
        self._limit = queue_limit
        self._estimate = estimate
        self._clock = clock
        self._waiting = 0  # images until an engine takes them
        self._unanswered = 0  # images until their request ends
        self.draining = False

    @property
    def waiting(self) -> int:
        """Images admitted and not yet with an engine."""
        return self._waiting

    @property
    def unanswered(self) -> int:
        """Images admitted whose requests have not ended."""
        return self._unanswered

    def admit(self, deadline_s: float) -> "Ticket":
        """A place for one image. Raises Draining, QueueFull or DeadlineUnmeetable, each with a Retry-After."""
        if self.draining:
            raise Draining("the server is stopping", self._estimate.retry_after_s(self._unanswered))
        ticket = Ticket(self)
        self._enter(1, deadline_s)
        ticket.images = ticket.waiting = 1
        return ticket

    def _enter(self, images: int, deadline_s: float, held: int = 0) -> None:
        """Count `images` more of a request that holds `held` places already."""
        if self._waiting + images > self._limit:
            raise QueueFull(
                f"{self._waiting} images are waiting and {self._limit} may: no place for {images} more",
                self._estimate.retry_after_s(self._unanswered),
            )
        # To an idle server everyone is let in: were all refused, nothing would correct an estimate gone wrong.
        ahead = self._unanswered - held
        if ahead:
            needed_s = self._estimate.seconds_for(self._unanswered + images)
            left_s = deadline_s - self._clock()
            if needed_s > left_s:
                raise DeadlineUnmeetable(
                    f"{ahead} images ahead take about {needed_s * 1e3:.0f} ms, {left_s * 1e3:.0f} are left",
                    max(1, math.ceil(needed_s - left_s)),
                )
        self._waiting += images
        self._unanswered += images

    def _leave_queue(self, images: int) -> None:
        self._waiting -= images

    def _leave(self, images: int) -> None:
        self._unanswered -= images


class Ticket:
    """A request's places in the queue; leaving the `with` block gives back what is left of them."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.images = 0
        self.waiting = 0

    def extend(self, images: int, deadline_s: float) -> None:
        """Places for `images` images in all, where one was held."""
        more = images - self.images
        if more > 0:
            self._admission._enter(more, deadline_s, held=self.images)
            self.images += more
            self.waiting += more

    def dispatched(self) -> None:
        """One image has left the queue: for an engine, or because it cannot be read."""
        if self.waiting:
            self.waiting -= 1
            self._admission._leave_queue(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._admission._leave_queue(self.waiting)
        self._admission._leave(self.images)
        self.images = self.waiting = 0


def timeout_ms(headers: Headers, default_timeout_ms: float) -> float:
    """The caller's X-Timeout-Ms, or the default."""
    given = headers.get("x-timeout-ms")
    if given is None:
        return default_timeout_ms
    try:
        value = float(given)
    except ValueError:
        value = math.nan
    if not 0 < value <= _LONGEST_TIMEOUT_MS:
        raise BadParameter(f"X-Timeout-Ms: {given[:100]!r} is not a number of milliseconds above 0, at most a day's")
    return value


def check_length(headers: Headers, max_body_bytes: int) -> None:
    """Refuse a body that says itself that it is too large."""
    given = headers.get("content-length", "0")
    if given.isascii() and given.isdigit() and int(given[:20]) > max_body_bytes:
        raise BodyTooLarge(f"{given[:20]} bytes exceed {max_body_bytes}")


def check_api_key(headers: Headers, api_keys: Sequence[SecretStr]) -> None:
    """With API keys set, one of them must come as `Authorization: Bearer KEY` or as `X-API-Key: KEY`."""
    if not api_keys:
        return
    scheme, _, token = headers.get("authorization", "").partition(" ")
    given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
    sent = given.encode("latin-1")  # as which the bytes of headers were read
    # Every key is compared, each in constant time: how long it takes tells nothing of which was near.
    matches = [hmac.compare_digest(sent, key.get_secret_value().encode()) for key in api_keys]
    if not any(matches):
        raise Unauthorized("this server needs an API key: Authorization: Bearer KEY")
