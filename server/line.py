"""The images on their way, by how far they have come, and when one more would be done."""

import math
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Literal, get_args

from bundle import Canvas
from server.batch_queue import MOST_PASSED_OVER, Priority
from server.estimate import Estimate

Stage = Literal["reading", "uploading", "decoding", "waiting", "running"]
"""Of a body on its way: "reading" while it is expected any moment, "uploading" when it has not come by then."""

_ANY_MOMENT_S = 0.25

_RATIOS = 200  # newest answers that are held against what was predicted for them
_REMEMBERED_S = 10.0  # and no longer: a bad moment must not keep out those whose answers would correct it
_MAY_BE_LATE = 1  # of these, beyond what the margin allows for
_UNTRIED_MARGIN = 2.0
_LEAST_MARGIN, _MOST_MARGIN = 1.05, 4.0
_HEADROOM = 1.1  # over what was learnt: machines slow down without notice
_LEARN_EVERY_S = 0.1  # of answers that came in time; late ones count at once
_SHARE_OVER_S = 10.0  # what interactive work takes of the engines is a mean over about so long


class Line:
    """Every image from the door to its answer."""

    def __init__(
        self, estimate: Estimate, max_batch_size: int, decode_threads: int, clock: Callable[[], float]
    ) -> None:
        self._estimate = estimate
        self._max_batch_size = max_batch_size
        self._decode_threads = decode_threads
        self._clock = clock
        self._counts: Counter[tuple[Stage, Priority, Canvas | None]] = Counter()  # without zeros
        # Sums of these, which every request asks for several times.
        self._total = 0
        self._at: dict[Stage, int] = dict.fromkeys(get_args(Stage), 0)
        self._bytes: Counter[Priority] = Counter()
        self._all_bytes = 0
        self._expected: deque[tuple[float, Place]] = deque()  # since when
        self._dispatched_s = clock()
        self._ratios: dict[Priority, deque[tuple[float, float]]] = {  # when, and taken over predicted
            "interactive": deque(maxlen=_RATIOS),
            "batch": deque(maxlen=_RATIOS),
        }
        self._margins: dict[Priority, float] = {"interactive": _UNTRIED_MARGIN, "batch": _UNTRIED_MARGIN}
        self._learnt_s: dict[Priority, float] = {"interactive": 0.0, "batch": 0.0}  # when the margins were
        self._interactive_s = 0.0  # engine seconds of interactive work, the older the less
        self._interactive_at_s = self._began_s = clock()  # as of when

    def __len__(self) -> int:
        return self._total

    def use(self, estimate: Estimate) -> None:
        """Predict by another estimate from now on."""
        self._estimate = estimate

    def waiting(self, priority: Priority | None = None) -> int:
        """Images not yet with an engine, of one lane or of both."""
        if priority is None:
            return self._total - self._at["running"]
        return sum(count for (stage, lane, _), count in self._counts.items() if stage != "running" and lane == priority)

    def held_bytes(self, priority: Priority | None = None) -> int:
        """Bytes of uploads not yet decoded, and of bodies on their way, of one lane or of both."""
        return self._all_bytes if priority is None else self._bytes[priority]

    def decoding(self) -> int:
        """Images with a decoding thread, or waiting for one."""
        return self._at["decoding"]

    def enter(self, priority: Priority, held_bytes: int) -> "Place":
        """A place for one image whose body has not been read."""
        self._give_up_expecting()
        place = Place(self, priority, held_bytes)
        self._expected.append((self._clock(), place))
        return place

    def ahead_of(self, places: Sequence["Place"]) -> int:
        """Images of others that an engine has or will soon have."""
        self._give_up_expecting()
        own = sum([place.stage not in (None, "uploading") for place in places])
        return self._total - self._at["uploading"] - own

    def margin(self, priority: Priority) -> float:
        """What to multiply `finish_s` by, as answers of late have needed it: nearly all come sooner then."""
        if self._ratios[priority] and self._learnt_s[priority] <= self._clock() - _LEARN_EVERY_S:
            self._learn_margin(priority)
        return self._margins[priority]

    def surely_s(self, priority: Priority, images: int) -> float:
        """Seconds in which `images` more are done for certain; infinite for batch work, which others may overtake.

        Never less than `finish_s` times any margin, as long as all canvases are the estimate's (just after a swap some
        may be the bundle's before, of which nothing is certain), and found in a tenth of the time.
        """
        if priority == "batch":
            return math.inf
        # One after the other, and at last with as many as a batch holds beside them.
        one_by_one = self._total + images + self._max_batch_size
        return _MOST_MARGIN * one_by_one * (self._estimate.slowest_s + self._estimate.decode_s)

    def finish_s(self, priority: Priority, images: int, *, with_readers: bool) -> float:
        """Seconds until `images` more would be done; 0 if nothing is known yet.

        Before them goes what the engines have, and what is decoded or waits in their own lane or a better one;
        `with_readers` also what is still being read, but for bodies that take long: those come when they come. To batch
        work also goes before what interactive work will come meanwhile, as much as of late.
        """
        self._give_up_expecting()
        batch_s, most, mix = self._batch_s, self._max_batch_size, self._estimate.mix()
        weight = 1.0 if priority == "interactive" else 1.0 / self._left_share()
        unknown, decoding, behind = images * weight, images, 0
        ahead: dict[Canvas, float] = {}
        running: dict[Canvas, int] = {}
        for (stage, lane, canvas), count in self._counts.items():
            if stage == "running" and canvas is not None:
                running[canvas] = running.get(canvas, 0) + count
                continue
            if stage == "uploading" or (stage == "reading" and not with_readers):
                continue
            decoding += count if canvas is None else 0  # threads that decode know no lanes
            if priority == "interactive" and lane == "batch":
                behind += count
                continue
            weighted = count * weight if lane == "batch" else count
            if canvas is None:
                unknown += weighted
            else:
                ahead[canvas] = ahead.get(canvas, 0.0) + weighted
        own_s = filled_s = 0.0  # of the newcomer's own batch, the last: as it is, and filled up from the other lane
        for canvas, share in mix.items():
            ahead[canvas] = ahead_of_it = ahead.get(canvas, 0.0) + share * unknown
            size = max(1.0, ahead_of_it % most or most)
            size_s = batch_s(canvas, size)
            own_s += share * size_s
            filled_s += share * (batch_s(canvas, min(size + behind, most)) if behind else size_s)
        work_s = self._running_s(running) if running else 0.0
        for canvas, weighted in ahead.items():
            work_s += self._work_s(canvas, weighted)
        engines_s = max(0.0, work_s - own_s) / self._estimate.engine_instances
        decoders_s = self._estimate.decode_s * max(1.0, decoding / self._decode_threads)
        return max(engines_s, decoders_s) + filled_s

    def observe(self, priority: Priority, predicted_s: float, taken_s: float) -> None:
        """An answer took `taken_s`, or was given up after that time, where `predicted_s` had been predicted."""
        ratio = min(taken_s / predicted_s, _MOST_MARGIN)
        self._ratios[priority].append((self._clock(), ratio))
        if ratio > self._margins[priority]:
            self._learn_margin(priority)

    def _learn_margin(self, priority: Priority) -> None:
        ratios, now_s = self._ratios[priority], self._clock()
        self._learnt_s[priority] = now_s
        while ratios and ratios[0][0] < now_s - _REMEMBERED_S:
            ratios.popleft()
        late = sorted((ratio for _, ratio in ratios), reverse=True)[: _MAY_BE_LATE + 1]
        learnt = min(late[-1] * _HEADROOM, _MOST_MARGIN) if late else 0.0
        share = len(ratios) / _RATIOS  # few answers do not refute what is assumed before there are any
        margin = share * learnt + (1 - share) * max(learnt, _UNTRIED_MARGIN)
        self._margins[priority] = max(margin, _LEAST_MARGIN)

    def _left_share(self) -> float:
        """Of the engines, what interactive work leaves to batch work, or its turns give it."""
        self._take_interactive(0.0)
        over_s = _SHARE_OVER_S * (1 - math.exp((self._began_s - self._clock()) / _SHARE_OVER_S))
        taken = self._interactive_s / max(over_s, 1.0) / self._estimate.engine_instances
        return max(1.0 - taken, 1.0 / ((MOST_PASSED_OVER + 1) * self._max_batch_size))

    def _take_interactive(self, seconds: float) -> None:
        now_s = self._clock()
        self._interactive_s *= math.exp((self._interactive_at_s - now_s) / _SHARE_OVER_S)
        self._interactive_s += seconds
        self._interactive_at_s = now_s

    def _give_up_expecting(self) -> None:
        """Let those go first that come behind a slow upload."""
        until_s = self._clock() - _ANY_MOMENT_S
        while self._expected and self._expected[0][0] < until_s:
            place = self._expected.popleft()[1]
            if place.stage == "reading":
                self._move(place, "uploading")

    def _work_s(self, canvas: Canvas, images: float) -> float:
        """Engine seconds of `images` images, in batches as full as can be; a part of an image is a part of its cost."""
        full, rest = divmod(images, self._max_batch_size)
        full_s = full * self._batch_s(canvas, self._max_batch_size) if full else 0.0
        return full_s + (self._batch_s(canvas, max(rest, 1.0)) * min(rest, 1.0) if rest else 0.0)

    def _running_s(self, running: dict[Canvas, int]) -> float:
        """Engine seconds left of what the engines have."""
        work_s = longest_s = 0.0
        for canvas, count in running.items():
            work_s += self._work_s(canvas, count)
            longest_s = max(longest_s, self._batch_s(canvas, min(count, self._max_batch_size)))
        # What was done since the newest batch was taken: of that one, and at least as much in every other engine.
        done_s = min(self._clock() - self._dispatched_s, longest_s) * self._estimate.engine_instances
        return max(0.0, work_s - done_s)

    def _batch_s(self, canvas: Canvas, images: float) -> float:
        return self._estimate.batch_s(canvas, images) or 0.0

    def _move(self, place: "Place", stage: Stage | None, canvas: Canvas | None = None) -> None:
        if place.stage is not None:
            key = (place.stage, place.priority, place.canvas)
            self._total -= 1
            self._at[place.stage] -= 1
            left = self._counts[key] - 1
            if left:
                self._counts[key] = left
            else:
                del self._counts[key]
        place.stage, place.canvas = stage, canvas
        if stage is not None:
            self._total += 1
            self._at[stage] += 1
            self._counts[stage, place.priority, canvas] += 1
        if stage == "running" and canvas is not None:
            self._dispatched_s = self._clock()
            if place.priority == "interactive":
                self._take_interactive(self._batch_s(canvas, self._max_batch_size) / self._max_batch_size)

    def _decoding_begins(self) -> tuple[float, float]:
        """When, and how many times as long as alone it will take, since the threads have others to decode as well."""
        return self._clock(), max(1.0, self.decoding() / self._decode_threads)

    def _decoding_ends(self, canvas: Canvas, since_s: float, load: float) -> None:
        self._estimate.observe_decoding(canvas, (self._clock() - since_s) / load)

    def _hold(self, place: "Place", size: int) -> None:
        self._all_bytes += size - place.held_bytes
        self._bytes[place.priority] += size - place.held_bytes
        place.held_bytes = size


class Place:
    """One image's place in the line. It goes forward only; what comes too late for it does nothing."""

    __slots__ = ("_keep", "_line", "_load", "_read_s", "canvas", "held_bytes", "priority", "stage")

    def __init__(self, line: Line, priority: Priority, held_bytes: int) -> None:
        self._line = line
        self._keep = False
        self._read_s, self._load = 0.0, 1.0
        self.priority: Priority = priority
        self.canvas: Canvas | None = None
        self.stage: Stage | None = None
        self.held_bytes = 0
        line._move(self, "reading")
        line._hold(self, held_bytes)

    def hold(self, size: int) -> None:
        """Its upload has, or may come to have, `size` bytes."""
        if self.stage is not None:
            self._line._hold(self, size)

    def read(self, size: int, *, keep: bool = False) -> None:
        """Its body is read, and is next decoded. The bytes are given back after that, or with `keep` at the end."""
        if self.stage in ("reading", "uploading"):
            self._keep = keep
            self._line._hold(self, size)
            self._line._move(self, "decoding")
            self._read_s, self._load = self._line._decoding_begins()

    def decoded(self, canvas: Canvas) -> None:
        """It waits for an engine."""
        if self.stage == "decoding":
            self._line._decoding_ends(canvas, self._read_s, self._load)
            if not self._keep:
                self._line._hold(self, 0)
            self._line._move(self, "waiting", canvas)

    def dispatched(self) -> None:
        """An engine has it."""
        if self.stage == "waiting":
            self._line._move(self, "running", self.canvas)

    def leave(self) -> None:
        """It is answered, or will not be. What is kept of its upload stays counted."""
        if self.stage is not None:
            self._line._move(self, None)
            if not self._keep:
                self._line._hold(self, 0)

    def give_back(self) -> None:
        """Its request has ended."""
        self._keep = False
        self.leave()
        self._line._hold(self, 0)
