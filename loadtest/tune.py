"""Good settings for a server on this host: one setting after the other, each from where the last one left off.

A full grid would take an hour and find little more: how the cores are shared out matters most, then how large a batch
may be, and the delay only decides between canvases. What is chosen is measured against the first settings once more,
in turns, so that a noisy minute does not choose.
"""

import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from loadtest.errors import ServerNotStarted
from loadtest.report import Candidate, Measurement, Trial, TrialPhase, Tuning
from loadtest.search import HOLDS_SHARE

MARGIN = 0.03
"""A candidate must be better by this; of two that are nearer, the simpler one stays."""
SAME = 0.01
"""A smaller batch may be worse by this: it waits less."""
LOAD_SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.35, 0.2)
"""Of the rate at saturation: where p99 is looked at, from above."""
DELAY_LOAD_SHARE = 0.7
DELAY_MARGIN = 0.1
ROUNDS = 2
DELAYS_MS = (0.0, 5.0, 20.0)
MOST_BATCH = 64


class Loads(Protocol):
    """A server with a candidate's settings, to be loaded."""

    def saturate(self) -> Measurement:
        """Closed loop, as fast as it answers."""

    def at_rate(self, rate_rps: float, target_ms: float | None) -> Measurement:
        """Open loop."""


Serve = Callable[[Candidate], AbstractContextManager[Loads]]
"""Starts a server for as long as a `with` lasts. Raises ServerNotStarted."""


@dataclass(frozen=True)
class Space:
    """What may be tried."""

    start: Candidate
    divisions: tuple[tuple[int, int], ...]  # engine instances, and threads of each
    most_batch: int = MOST_BATCH
    delays_ms: tuple[float, ...] = DELAYS_MS

    def expected_trials(self) -> int:
        """About as many: how far batch sizes are followed shows only on the way."""
        return 1 + len(self.divisions) + 3 + len(self.delays_ms) + 2 * ROUNDS + 2


def space_for(start: Candidate, cores: int, on_gpu: bool) -> Space:
    """On a CPU the ways to share its cores among instances; on a GPU one or two instances."""
    if on_gpu:
        return Space(start, ((1, start.engine_threads), (2, start.engine_threads)))
    shared = [(instances, cores // instances) for instances in _powers_of_two(cores)]
    if cores > 1:
        shared.append((1, cores - 1))  # leaves one to decoding
    return Space(start, tuple(shared))


def tune(
    serve: Serve,
    space: Space,
    p99_ms: float | None = None,
    on_trial: Callable[[Trial], None] = lambda _: None,
) -> Tuning:
    """Try candidates and choose. With `p99_ms` for the rate that holds it, else for throughput at saturation.

    Raises ServerNotStarted if not even the first candidate can be served.
    """
    tuner = _Tuner(serve, p99_ms, on_trial)
    first = tuner.score(space.start, "start")
    if first is None:
        raise ServerNotStarted(tuner.trials[0].remark)
    best, best_score = space.start, first
    best, best_score = tuner.share_cores(space, best, best_score)
    best, best_score = tuner.follow_batch_size(space, best, best_score)
    gain: float | None = 1.0
    if best != space.start:
        gain = tuner.compare(best, space.start)
        if gain is not None and gain < 1 + MARGIN:
            best, best_score, gain = space.start, first, 1.0
    best = tuner.choose_delay(space, best, best_score)
    goal = "requests a second at saturation" if p99_ms is None else f"requests a second with p99 within {p99_ms:g} ms"
    return Tuning(goal=goal, chosen=best, gain=gain, trials=tuple(tuner.trials))


class _Tuner:
    def __init__(self, serve: Serve, p99_ms: float | None, on_trial: Callable[[Trial], None]) -> None:
        self.trials: list[Trial] = []
        self._serve = serve
        self._p99_ms = p99_ms
        self._on_trial = on_trial
        self._best = 0.0

    def share_cores(self, space: Space, best: Candidate, best_score: float) -> tuple[Candidate, float]:
        """The division of cores that is best; the first stays unless another is clearly better."""
        for instances, threads in space.divisions:
            candidate = space.start.model_copy(update={"engine_instances": instances, "engine_threads": threads})
            if _same_threads(candidate, space):
                continue
            score = self.score(candidate, "threads")
            if score is not None and score > best_score * (1 + MARGIN):
                best, best_score = candidate, score
        return best, best_score

    def follow_batch_size(self, space: Space, best: Candidate, best_score: float) -> tuple[Candidate, float]:
        """Double while that helps; if it never does, halve while that does not hurt."""
        first = best
        for size in _doubled(first.max_batch_size, space.most_batch):
            candidate = first.model_copy(update={"max_batch_size": size})
            score = self.score(candidate, "batch size")
            if score is None or score <= best_score * (1 + MARGIN):
                break
            best, best_score = candidate, score
        if best != first:
            return best, best_score
        highest = best_score
        for size in _halved(first.max_batch_size):
            candidate = first.model_copy(update={"max_batch_size": size})
            score = self.score(candidate, "batch size")
            if score is None or score < highest * (1 - SAME):
                break
            best, best_score, highest = candidate, score, max(highest, score)
        return best, best_score

    def choose_delay(self, space: Space, best: Candidate, best_score: float) -> Candidate:
        """The delay of least p95 at a rate that all can bear; the present one stays unless another is clearly less,
        and is so again when both are measured once more."""
        rate = DELAY_LOAD_SHARE * best_score
        others = [best.model_copy(update={"max_delay_ms": delay}) for delay in space.delays_ms]
        others = [other for other in others if other != best]
        if not rate or not others:
            return best
        present = self._p95(best, rate)
        by_p95 = [(found, other) for other in others if (found := self._p95(other, rate)) is not None]
        if present is None or not by_p95:
            return best
        found, other = min(by_p95, key=lambda pair: pair[0])
        if not _clearly_less(found, present):
            return best
        present, again = self._p95(best, rate), self._p95(other, rate)
        return other if present is not None and again is not None and _clearly_less(again, present) else best

    def compare(self, candidate: Candidate, other: Candidate) -> float | None:
        """Score of `candidate` over that of `other`, measured in turns; None where `other` has none."""
        scores: dict[Candidate, list[float]] = {candidate: [], other: []}
        for _ in range(ROUNDS):
            for each in (other, candidate):
                scores[each].append(self.score(each, "confirmation") or 0.0)
        mean = statistics.fmean(scores[other])
        return statistics.fmean(scores[candidate]) / mean if mean else None

    def score(self, candidate: Candidate, phase: TrialPhase) -> float | None:
        """More is better; None if the candidate cannot be served."""
        try:
            with self._serve(candidate) as loads:
                saturated = loads.saturate()
                if self._p99_ms is None:
                    score, decisive, remark = saturated.throughput_rps, saturated, _remark(saturated)
                else:
                    score, decisive, remark = self._rate_within(
                        loads,
                        saturated,
                        self._p99_ms,
                        enough=0.0 if phase == "confirmation" else self._best * (1 - MARGIN),
                    )
        except ServerNotStarted as error:
            self._add(candidate, phase, None, None, str(error))
            return None
        self._best = max(self._best, score)
        self._add(candidate, phase, score, decisive, remark)
        return score

    def _rate_within(
        self, loads: Loads, saturated: Measurement, p99_ms: float, enough: float
    ) -> tuple[float, Measurement, str]:
        """The highest of some shares of the rate at saturation that holds the target; from `enough` on downwards it
        is not looked at: it cannot win."""
        measured = saturated
        for share in LOAD_SHARES:
            rate = share * saturated.throughput_rps
            if rate < enough or not rate:
                return rate, measured, f"{rate:.4g}/s is less than another holds: not tried"
            measured = loads.at_rate(rate, p99_ms)
            if measured.valid and (measured.within_target or 0.0) >= HOLDS_SHARE:
                return rate, measured, _remark(measured)
        return 0.0, measured, "does not hold the target at any rate tried"

    def _p95(self, candidate: Candidate, rate_rps: float) -> float | None:
        try:
            with self._serve(candidate) as loads:
                measured = loads.at_rate(rate_rps, self._p99_ms)
        except ServerNotStarted as error:
            self._add(candidate, "delay", None, None, str(error))
            return None
        remark = _remark(measured)
        self._add(candidate, "delay", None, measured, f"at {rate_rps:.4g}/s{remark and f'; {remark}'}")
        return measured.latency_ms.p95 if measured.latency_ms is not None and measured.valid else None

    def _add(
        self, candidate: Candidate, phase: TrialPhase, score: float | None, measured: Measurement | None, remark: str
    ) -> None:
        batches = None if measured is None else measured.batches
        trial = Trial(
            candidate=candidate,
            phase=phase,
            score=score,
            throughput_rps=None if measured is None else measured.throughput_rps,
            latency_ms=None if measured is None else measured.latency_ms,
            mean_batch_size=None if batches is None else batches.mean_size,
            remark=remark,
        )
        self.trials.append(trial)
        self._on_trial(trial)


def _same_threads(candidate: Candidate, space: Space) -> bool:
    """Whether it is the first candidate in other words: 0 threads are the cores shared among the instances."""
    start = space.start
    if candidate.engine_instances != start.engine_instances:
        return False
    if start.engine_threads:
        return candidate.engine_threads == start.engine_threads
    shared = max(instances * threads for instances, threads in space.divisions)
    return candidate.engine_threads in (0, shared // start.engine_instances)


def _clearly_less(found_ms: float, present_ms: float) -> bool:
    return found_ms < present_ms * (1 - DELAY_MARGIN)


def _remark(measured: Measurement) -> str:
    if not measured.valid:
        return measured.remarks[0]
    failed = measured.requests - measured.answered
    return f"{failed} of {measured.requests} failed: {', '.join(measured.errors)}" if failed else ""


def _powers_of_two(most: int) -> Iterator[int]:
    power = 1
    while power <= most:
        yield power
        power *= 2


def _doubled(size: int, most: int) -> Iterator[int]:
    while 2 * size <= most:
        size *= 2
        yield size


def _halved(size: int) -> Iterator[int]:
    while size > 1:
        size //= 2
        yield size
