"""Places in time for those who are refused, so that they do not all come back at once."""

import math
from collections.abc import Callable

from server.batch_queue import Priority

LONGEST_S = 60
# Who comes back meets newcomers, too: by leaving them a part of the rate, few have to be refused a second time.
_PROMISED_SHARE = 0.8


class Promises:
    """A backlog of those who were told to come back: it grows with each of them, and drains at the server's rate.

    Nobody can be recognised who comes back, and nobody has to: a promise changes only what the next one is told. Those
    who never come back cost the others at most a Retry-After of LONGEST_S.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._until_s: dict[Priority, float] = {"interactive": 0.0, "batch": 0.0}

    def retry_after_s(self, priority: Priority, wait_s: float, images: float, rate: float) -> int:
        """Whole seconds, 1 to LONGEST_S, after which `images` images may come back, not before `wait_s`.

        `rate` is in images a second. Batch work is sent behind interactive work. Rounded up: nobody comes before the
        place is due, and since each counts from the moment of its own refusal, what the rounding adds is spread.
        """
        now_s = self._clock()
        before_s = self._until_s[priority] if priority == "interactive" else max(self._until_s.values())
        due_s = min(max(now_s + wait_s, before_s) + images / (rate * _PROMISED_SHARE), now_s + LONGEST_S)
        self._until_s[priority] = due_s
        return min(LONGEST_S, max(1, math.ceil(due_s - now_s)))
