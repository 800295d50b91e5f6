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
        self.estimate = Estimate(1)
        self.line = Line(self.estimate, BATCH, 2, lambda: self.now_s)
        limits = Limits(queue_limit, 1 << 27, 1 << 25, 20.0)
        self.admission = Admission(limits, self.line, self.estimate, BATCH, lambda: self.now_s)
        self._queue = BatchQueue(BATCH, 0.005)
        self._busy = False
        self._to_decode: list[Callable[[], None]] = []
        self._free_threads = 2
        self.slowdown = 1.0
        for canvas in (WIDE, TALL):  # the warm-up
            self.estimate.observe(canvas, 1, FIXED_S[canvas] + EACH_S[canvas])

    @property
    def counts(self) -> tuple[int, int, int]:
        return self.admission.waiting, self.admission.unanswered, self.admission.held_bytes

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
        self.estimate.observe(batch.canvas, len(batch.entries), seconds)
        for entry in batch.entries:
            cast(Any, entry.future).answer()
        self._dispatch()


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[int(share * (len(values) - 1))]


BURST_S = 20.0


def goodput(simulation: Simulation, from_s: float, to_s: float) -> float:
    """Answers in time a second, between two times, as a share of the sustainable rate."""
    return sum(from_s < at_s <= to_s for at_s in simulation.finished_s) / (to_s - from_s) / SUSTAINABLE


def latencies_s(clients: list[Client]) -> list[float]:
    """Of tries that were let in."""
    return [latency for client in clients for latency in client.latencies_s]


def share_done(clients: list[Client]) -> float:
    return sum(client.done for client in clients) / len(clients)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("deadline_s", [0.5, 1.0, 5.0])
def test_at_three_times_the_sustainable_rate_the_door_keeps_what_it_promises(seed: int, deadline_s: float) -> None:
    simulation = Simulation(seed)
    began_s = simulation.now_s
    simulation.arrive(3 * SUSTAINABLE, BURST_S, deadline_s)
    simulation.run()
    assert percentile(latencies_s(simulation.clients), 0.99) < deadline_s
    assert goodput(simulation, began_s, began_s + BURST_S) >= 0.9
    assert share_done(simulation.clients) >= 0.95, "they came back when they were told to"
    assert simulation.counts == (0, 0, 0)


def test_a_full_queue_keeps_it_too() -> None:
    simulation = Simulation(0, queue_limit=12)
    began_s = simulation.now_s
    simulation.arrive(3 * SUSTAINABLE, BURST_S, deadline_s=30.0)
    simulation.run()
    refusals = {code for client in simulation.clients for code in client.refusals}
    assert refusals == {"queue_full"}
    assert goodput(simulation, began_s, began_s + BURST_S) >= 0.9
    assert share_done(simulation.clients) >= 0.95


def test_below_the_sustainable_rate_hardly_anyone_is_refused() -> None:
    simulation = Simulation(0, most_tries=1)
    simulation.arrive(0.8 * SUSTAINABLE, BURST_S, deadline_s=1.0)
    simulation.run()
    assert share_done(simulation.clients) >= 0.98


@pytest.mark.parametrize(
    ("load", "batch_deadline_s", "answered", "in_time"),
    [(0.6, 10.0, 0.98, 0.99), (0.8, 10.0, 0.97, 0.93), (0.8, 30.0, 0.97, 0.99), (0.9, 30.0, 0.92, 0.99)],
)
@pytest.mark.parametrize("seed", range(3))
def test_batch_work_takes_what_interactive_work_leaves(
    seed: int, load: float, batch_deadline_s: float, answered: float, in_time: float
) -> None:
    simulation = Simulation(seed, most_tries=1)
    began_s = simulation.now_s
    simulation.arrive(load * SUSTAINABLE, BURST_S, deadline_s=1.0)
    simulation.arrive(2 * SUSTAINABLE, BURST_S, deadline_s=batch_deadline_s, priority="batch")
    simulation.run()
    interactive = [client for client in simulation.clients if client.priority == "interactive"]
    batch = [client for client in simulation.clients if client.priority == "batch"]
    assert share_done(interactive) >= answered
    assert percentile(latencies_s(interactive), 0.99) < 1.0
    assert percentile(latencies_s(batch), in_time) < batch_deadline_s
    assert goodput(simulation, began_s, began_s + BURST_S) >= 0.92


@pytest.mark.parametrize("seed", range(3))
def test_an_engine_that_slows_down_is_followed(seed: int) -> None:
    simulation = Simulation(seed, most_tries=1)
    began_s = simulation.now_s
    simulation.arrive(3 * SUSTAINABLE, 40.0, deadline_s=2.0)
    simulation.run(began_s + 10)
    simulation.slowdown = 2.0
    simulation.run(began_s + 25)
    simulation.slowdown = 1.0
    simulation.run()
    adapted = [client for client in simulation.clients if 15 < client.came_s - began_s <= 25]
    let_in = latencies_s(adapted)
    assert sum(latency < 2.0 for latency in let_in) / len(let_in) >= 0.97
    assert goodput(simulation, began_s + 15, began_s + 25) >= 0.45, "half of what it was"
    assert goodput(simulation, began_s + 27, began_s + 40) >= 0.9


def test_an_estimate_gone_wrong_corrects_itself() -> None:
    simulation = Simulation(0, most_tries=1)
    began_s = simulation.now_s
    for canvas in (WIDE, TALL):
        for size in range(1, BATCH + 1):
            for _ in range(9):
                simulation.estimate.observe(canvas, size, 100.0)
    simulation.arrive(3 * SUSTAINABLE, BURST_S, deadline_s=1.0)
    simulation.run()
    assert goodput(simulation, began_s + 10, began_s + BURST_S) >= 0.9


def test_those_refused_in_one_moment_come_back_over_the_time_that_they_take() -> None:
    simulation = Simulation(0, most_tries=1, queue_limit=8)
    now_s = simulation.now_s
    simulation.arrive(3e6, 1e-3, deadline_s=30.0)
    simulation.run(now_s + 1e-3)
    told_s = sorted(seconds for client in simulation.clients for seconds in client.told_s)
    a_second = [told_s.count(second) for second in range(2, 50)]
    assert max(a_second) <= SUSTAINABLE
    assert min(a_second) >= 0.5 * SUSTAINABLE
    assert max(told_s) == 60
