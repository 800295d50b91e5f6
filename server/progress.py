"""Whether a stage with work before it gets on with it."""

import threading
from collections.abc import Callable

_FACTOR = 5  # a stage that takes this many times its longest pause so far is stalled
_FADING = 0.98  # of the longest pause, at every sign of progress


class Progress:
    """Counts a stage's work, and remembers when some of it was last done. Work may end in any thread."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._pending = 0
        self._last_s = clock()
        self._longest_pause_s = 0.0

    @property
    def pending(self) -> int:
        """Pieces of work begun and not ended."""
        return self._pending

    def begin(self) -> None:
        """A piece of work has come."""
        with self._lock:
            if self._pending == 0:
                self._last_s = self._clock()  # an idle stage is not a stalled one
            self._pending += 1

    def end(self) -> None:
        """A piece of work is done, whatever came of it."""
        with self._lock:
            now_s = self._clock()
            self._pending -= 1
            self._longest_pause_s = max(_FADING * self._longest_pause_s, now_s - self._last_s)
            self._last_s = now_s

    def stalled(self, timeout_s: float) -> bool:
        """Whether nothing was done for longer than `timeout_s`, and than is usual here, with work waiting."""
        with self._lock:
            pause_s = self._clock() - self._last_s if self._pending else 0.0
            return pause_s > max(timeout_s, _FACTOR * self._longest_pause_s)
