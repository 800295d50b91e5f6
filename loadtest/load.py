"""Sends requests by a schedule or as fast as they are answered, and keeps what became of each."""

import asyncio
import math
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from loadtest.arrivals import Arrival
from loadtest.client import OK, REFUSED, Answer
from loadtest.payload import Payload

GONE_AFTER = 50
"""So many connections refused in a row: nobody is there any more."""


class Detect(Protocol):
    """One try."""

    async def __call__(self, payload: Payload) -> Answer:
        """Send and wait for the answer; does not raise."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One request, with all its tries. Seconds since the start."""

    due_s: float  # when it was to be sent
    sent_s: float  # when it was sent
    done_s: float  # when its last answer had come
    outcome: str
    tries: int = 1
    stages_ms: Mapping[str, float] | None = None

    @property
    def latency_ms(self) -> float:
        """From the moment it was due: what waited in the client waited."""
        return (self.done_s - self.due_s) * 1e3


class Load:
    """One run, open or closed loop."""

    def __init__(
        self,
        detect: Detect,
        payloads: Sequence[Payload],
        connections: int,
        retries: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.samples: list[Sample] = []
        self.in_flight_peak = 0
        self.waited_for_connection = 0  # tries that found all connections taken
        self.gone = False  # the run was broken off: nobody is there
        self._detect = detect
        self._payloads = payloads
        self._connections = connections
        self._retries = retries
        self._clock = clock
        self._start_s = clock()
        self._in_flight = 0
        self._refused_in_a_row = 0

    async def open_loop(self, arrivals: Iterable[Arrival]) -> None:
        """Send each request when it is due, whatever became of those before it; return when all are answered."""
        self._start_s = self._clock()
        tasks: set[asyncio.Task[None]] = set()
        for arrival in arrivals:
            await self._until(self._start_s + arrival.at_s)
            if self.gone:
                break
            task = asyncio.create_task(self._request(self._payloads[arrival.payload], arrival.at_s))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        if tasks:
            await asyncio.wait(tasks)

    async def closed_loop(self, concurrency: int, duration_s: float, seed: int) -> None:
        """`concurrency` clients that each send their next request when they have their answer."""
        self._start_s = self._clock()

        async def client(number: int) -> None:
            rng = random.Random(seed * 1_000_003 + number)
            while (now_s := self._now_s()) < duration_s and not self.gone:
                await self._request(rng.choice(self._payloads), now_s)

        await asyncio.gather(*map(client, range(concurrency)))

    async def _until(self, moment_s: float) -> None:
        """Wait for the moment; where it is past already, let the others have their turn."""
        await asyncio.sleep(0)
        while (left_s := moment_s - self._clock()) > 0:
            # Event loops count in whole milliseconds: rounded down, this would spin.
            await asyncio.sleep(math.ceil(left_s * 1e3) / 1e3)

    async def _request(self, payload: Payload, due_s: float) -> None:
        sent_s = self._now_s()
        answer = await self._try(payload)
        tries = 1
        while answer.retry_after_s is not None and tries <= self._retries:
            await asyncio.sleep(answer.retry_after_s)
            answer = await self._try(payload)
            tries += 1
        self.samples.append(Sample(due_s, sent_s, self._now_s(), answer.outcome, tries, answer.stages_ms))

    async def _try(self, payload: Payload) -> Answer:
        self.waited_for_connection += self._in_flight >= self._connections
        self._in_flight += 1
        self.in_flight_peak = max(self.in_flight_peak, self._in_flight)
        try:
            answer = await self._detect(payload)
        finally:
            self._in_flight -= 1
        self._refused_in_a_row = self._refused_in_a_row + 1 if answer.outcome == REFUSED else 0
        self.gone = self.gone or self._refused_in_a_row >= GONE_AFTER
        return answer

    def _now_s(self) -> float:
        return self._clock() - self._start_s


def is_ok(sample: Sample) -> bool:
    """Whether it was answered with boxes."""
    return sample.outcome == OK
