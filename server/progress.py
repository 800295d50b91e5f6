"""Whether a stage with work before it gets on with it."""

import threading
from collections.abc import Callable


class Progress:
    """Counts a stage's work, and remembers when some of it was last done. Work may end in any thread."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._pending = 0
        self._last_s = clock()

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
            self._pending -= 1
            self._last_s = self._clock()

    def stalled_s(self) -> float:
        """Seconds since anything was done; 0 with no work waiting."""
        return self._clock() - self._last_s if self._pending else 0.0
