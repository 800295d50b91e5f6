"""Whether the threads of a stage get on with what they have begun."""

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_FACTOR = 3  # a call that takes this many times the longest that came back is stuck
_FADING = 0.98  # of the longest, with every call that comes back


class Progress:
    """Watches the calls of a stage's threads, each by itself: one that is stuck is seen whatever the others do.

    Work that was given up before a thread began it is no progress. A slow machine is no hang: patience grows with what
    calls have taken, and shrinks again by the hundred quicker ones after that.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._began_s: dict[int, float] = {}  # by thread
        self._longest_s = 0.0

    def watch(self, function: Callable[[], T]) -> T:
        """Call it, in this thread."""
        thread, began_s = threading.get_ident(), self._clock()
        with self._lock:
            self._began_s[thread] = began_s
        try:
            result = function()
            with self._lock:  # what raises says nothing of how long a picture takes
                self._longest_s = max(_FADING * self._longest_s, self._clock() - began_s)
            return result
        finally:
            with self._lock:
                del self._began_s[thread]

    def stalled(self, timeout_s: float) -> bool:
        """Whether a call takes longer than `timeout_s`, and than is usual here."""
        with self._lock:
            now_s = self._clock()
            longest_s = now_s - min(self._began_s.values(), default=now_s)
            return longest_s > max(timeout_s, _FACTOR * self._longest_s)
