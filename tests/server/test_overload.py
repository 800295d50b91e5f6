"""What the door does under load, second by simulated second: the real admission, line, estimate and queue; a clock, an
engine, decoding threads and clients that are made up. Nothing sleeps, and chance comes from a seed."""

import heapq
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any, cast

import numpy as np
import pytest

from bundle import Canvas
from server.admit import Admission, Limits, Ticket
from server.batch_queue import Batch, BatchQueue, Entry, Priority
from server.errors import DeadlineUnmeetable, QueueFull
from server.estimate import Estimate
from server.line import Line
from server.preprocess import PreparedImage
from server.timing import StageTimes

WIDE, TALL = Canvas(height=64, width=96), Canvas(height=96, width=64)
CANVASES = (WIDE, WIDE, TALL)  # of each three pictures
FIXED_S, EACH_S = {WIDE: 0.010, TALL: 0.015}, {WIDE: 0.020, TALL: 0.030}  # of a batch, of an image in it
DECODE_S = 0.006
READ_S = 0.002
BATCH = 4
BATCH_S = sum(FIXED_S[canvas] + BATCH * EACH_S[canvas] for canvas in CANVASES) / len(CANVASES)
SUSTAINABLE = BATCH / BATCH_S  # images a second


@dataclass
class Client:
    """Asks for one image, and comes back when it is told to."""

    came_s: float
    deadline_s: float
    priority: Priority
    tries: int = 0
    refusals: list[str] = field(default_factory=list)
    told_s: list[int] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)  # of tries that were let in
    done: bool = False


class Pending:
    """In place of a future."""

    def __init__(self) -> None:
        self.result = False

    def done(self) -> bool:
        return self.result


class Simulation:
    """A server with one engine and two decoding threads, in simulated time."""

    def __init__(self, seed: int, *, most_tries: int = 6, queue_limit: int = 128, noise: float = 0.1) -> None:
        self.now_s = 1000.0
        self.clients: list[Client] = []
        self.finished_s: list[float] = []  # when answers came that met their deadline
        self._random = random.Random(seed)
        self._noise = noise
        self._most_tries = most_tries
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._estimate = Estimate(1)
        self.line = Line(self._estimate, BATCH, 2, lambda: self.now_s)
        limits = Limits(queue_limit, 1 << 27, 1 << 25, 20.0)
        self.admission = Admission(limits, self.line, self._estimate, BATCH, lambda: self.now_s)
        self._queue = BatchQueue(BATCH, 0.005)
        self._busy = False
        self._to_decode: list[Callable[[], None]] = []
        self._free_threads = 2
        self.slowdown = 1.0
        for canvas in (WIDE, TALL):  # the warm-up
            self._estimate.observe(canvas, 1, FIXED_S[canvas] + EACH_S[canvas])

    def arrive(self, rate: float, seconds: float, deadline_s: float, priority: Priority = "interactive") -> None:
        """Poisson arrivals at `rate` a second, from now on."""
        at_s = self.now_s
        while (at_s := at_s + self._random.expovariate(rate)) < self.now_s + seconds:
            client = Client(at_s, deadline_s, priority)
            self.clients.append(client)
            self._at(at_s, lambda client=client: self._ask(client))

    def run(self, until_s: float = math.inf) -> None:
        while self._events and self._events[0][0] <= until_s:
            self.now_s, _, happen = heapq.heappop(self._events)
            happen()

    def _at(self, at_s: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at_s, next(self._order), happen))

    def _ask(self, client: Client) -> None:
        client.tries += 1
        deadline_s = self.now_s + client.deadline_s
        try:
            ticket = self.admission.admit(deadline_s, client.priority, 50_000)
        except (QueueFull, DeadlineUnmeetable) as refusal:
            self._refuse(client, refusal)
        else:
            self._at(self.now_s + READ_S, lambda: self._read(client, ticket, self.now_s - READ_S))

    def _refuse(self, client: Client, refusal: QueueFull | DeadlineUnmeetable) -> None:
        assert refusal.retry_after_s is not None
        client.refusals.append(refusal.code)
        client.told_s.append(refusal.retry_after_s)
        if client.tries < self._most_tries:
            self._at(self.now_s + refusal.retry_after_s, lambda: self._ask(client))

    def _read(self, client: Client, ticket: Ticket, asked_s: float) -> None:
        try:
            ticket.read([50_000])
        except (QueueFull, DeadlineUnmeetable) as refusal:
            ticket.leave()
            self._refuse(client, refusal)
            return
        self._to_decode.append(lambda: self._decoded(client, ticket, asked_s))
        self._decode()

    def _decode(self) -> None:
        while self._free_threads and self._to_decode:
            self._free_threads -= 1
            self._at(self.now_s + DECODE_S, self._to_decode.pop(0))

    def _decoded(self, client: Client, ticket: Ticket, asked_s: float) -> None:
        self._free_threads += 1
        self._decode()
        canvas = self._random.choice(CANVASES)
        ticket.places[0].decoded(canvas)
        image = PreparedImage(np.zeros((1, 1, 3), np.uint8), canvas, 1, 1, StageTimes())
        entry = Entry(
            image, self.now_s, ticket.deadline_s, cast(Any, Pending()), ticket.places[0].dispatched, client.priority
        )
        self._queue.push(entry)
        self._at(ticket.deadline_s, lambda: self._end(entry, client, ticket, asked_s))
        entry.future.answer = lambda: self._end(entry, client, ticket, asked_s)  # type: ignore[attr-defined]
        self._dispatch()

    def _end(self, entry: Entry, client: Client, ticket: Ticket, asked_s: float) -> None:
        """With an answer, or without one at its deadline."""
        future = cast(Any, entry.future)
        if future.result:
            return
        future.result = True
        self._queue.discard(entry)
        ticket.answered()
        ticket.leave()
        client.latencies_s.append(self.now_s - asked_s)
        if self.now_s < ticket.deadline_s:
            client.done = True
            self.finished_s.append(self.now_s)

    def _dispatch(self) -> None:
        if self._busy:
            return
        self._queue.drop_expired(self.now_s)
        batch = self._queue.pop(self.now_s)
        if batch is None:
            return
        self._busy = True
        for entry in batch.entries:
            entry.on_dispatch()
        size = len(batch.entries)
        seconds = self.slowdown * (FIXED_S[batch.canvas] + size * EACH_S[batch.canvas])
        seconds *= math.exp(self._random.gauss(0, self._noise))
        self._at(self.now_s + seconds, lambda: self._infer(batch, seconds))

    def _infer(self, batch: Batch, seconds: float) -> None:
        self._busy = False
        self._estimate.observe(batch.canvas, len(batch.entries), seconds)
        for entry in batch.entries:
            cast(Any, entry.future).answer()
        self._dispatch()


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))]


BURST_S = 20.0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("deadline_s", [0.5, 1.0, 5.0])
def test_at_three_times_the_sustainable_rate(seed: int, deadline_s: float) -> None:
    simulation = Simulation(seed)
    began_s = simulation.now_s
    simulation.arrive(3 * SUSTAINABLE, BURST_S, deadline_s)
    simulation.run()
    let_in = [latency for client in simulation.clients for latency in client.latencies_s]
    in_time = sum(latency < deadline_s for latency in let_in) / len(let_in)
    goodput = sum(began_s < at_s <= began_s + BURST_S for at_s in simulation.finished_s) / BURST_S / SUSTAINABLE
    succeeded = sum(client.done for client in simulation.clients) / len(simulation.clients)
    assert in_time >= 0.99
    assert percentile(let_in, 0.99) <= deadline_s
    assert goodput >= 0.9
    assert succeeded >= 0.95
