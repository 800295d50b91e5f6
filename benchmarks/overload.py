"""A server that is asked for more than it can do: what becomes of those it lets in, and of those it sends away.

python -m benchmarks.overload
python -m benchmarks.overload --pictures FOLDER --deadline-ms 500 --seconds 30 --rounds 1
python -m benchmarks.overload --serve="--engine-threads 1"       (leaves a core of two to the client)

The sustainable rate is that of answers to clients that ask again as soon as they are answered. In each of --rounds
requests at --factor times the newest such rate arrive as a Poisson process, each with a deadline; whoever is refused
comes back after exactly the Retry-After, --retries times at most. Both rates are taken over --seconds, of a server that
has been under that load for some seconds already. The sustainable rate is measured before, between and after: machines
change their speed from minute to minute, and the mean of the two beside a round is what counts for it (the later one
comes when the last retry has been answered). Asked: of the requests let in while others arrive, p99 within the
deadline; answers within the deadline at 0.9 of the sustainable rate, by the median of the rounds; 95% of the clients
succeed in the end.

The client is a process of its own, but on the same machine: what it takes it takes from the server.
"""

import argparse
import shlex
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

from benchmarks.lean_client import LeanClient, Try
from benchmarks.machine import machine
from bundle import embedded_bundle
from loadtest.arrivals import Arrival, poisson
from loadtest.client import OK
from loadtest.payload import Payload, drawn, from_folder
from loadtest.report import percentile
from loadtest.server_process import serving

SATURATING_CLIENTS = 24
WARM_UP_S = 3.0
REFUSED = ("429 queue_full", "503 deadline_unmeetable")
GOODPUT, SUCCEED = 0.9, 0.95


@dataclass(frozen=True)
class Round:
    """What became of the requests of one round."""

    sustainable: float  # answers a second, the mean of before and after
    good: float  # answers a second in time, while requests arrived and after the warm-up
    tries: Sequence[Try]
    clients: int
    arriving_s: float
    client_cores: float  # in that time

    @property
    def goodput(self) -> float:
        """Of the sustainable rate."""
        return self.good / self.sustainable

    @property
    def succeeded(self) -> int:
        """Clients that got their boxes in the end."""
        return sum(each.outcome == OK for each in self.tries)

    @property
    def let_in(self) -> list[Try]:
        """All that was not refused."""
        return [each for each in self.tries if not each.outcome.startswith(REFUSED)]

    @property
    def refused(self) -> list[Try]:
        """What was told to come back."""
        return [each for each in self.tries if each.outcome.startswith(REFUSED)]

    @property
    def latencies_ms(self) -> list[float]:
        """Of those let in that were due while others arrived, ascending; one without boxes counts as never answered."""
        due = [each for each in self.let_in if each.due_s <= self.arriving_s]
        return sorted(each.latency_ms if each.outcome == OK else float("inf") for each in due)


def sustainable_rate(url: str, payloads: Sequence[Payload], seconds: float) -> float:
    """Good answers a second with the server never idle."""
    numbers = cycle(range(len(payloads)))
    until_s = WARM_UP_S + seconds

    def again(each: Try) -> Arrival | None:
        return Arrival(each.done_s, next(numbers)) if each.done_s < until_s else None

    tries = LeanClient(url, payloads).run([Arrival(0.0, next(numbers)) for _ in range(SATURATING_CLIENTS)], again)
    answered = [each for each in tries if WARM_UP_S < each.done_s <= until_s]
    if any(each.outcome != OK for each in answered):
        raise SystemExit(f"at saturation, not all was answered: {Counter(each.outcome for each in answered)}")
    return len(answered) / seconds


def overload(
    url: str, payloads: Sequence[Payload], rate: float, seed: int, args: argparse.Namespace
) -> tuple[list[Try], int, float]:
    """All tries, how many clients there were, and the cores that this one took while they arrived."""
    arriving_s = WARM_UP_S + args.seconds
    arrived_cpu_s = 0.0

    def again(each: Try) -> Arrival | None:
        nonlocal arrived_cpu_s
        if each.done_s >= arriving_s and not arrived_cpu_s:
            arrived_cpu_s = time.process_time()
        if each.retry_after_s is None or each.tries > args.retries:
            return None
        return Arrival(each.done_s + each.retry_after_s, each.payload)

    arrivals = list(poisson(rate, arriving_s, len(payloads), seed))
    began_cpu_s = time.process_time()
    tries = LeanClient(url, payloads, args.deadline_ms).run(arrivals, again)
    if all(each.outcome.startswith(REFUSED) for each in tries):
        raise SystemExit(f"nobody was let in: {Counter(each.outcome for each in tries)}")
    return tries, len(arrivals), ((arrived_cpu_s or time.process_time()) - began_cpu_s) / arriving_s


def main() -> int:
    """Print the table; exit 1 where less is kept than was asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=embedded_bundle())
    parser.add_argument("--pictures", type=Path, help="folder; default: drawn smears")
    parser.add_argument("--serve", default="", help="more flags of ddetr serve, in one string")
    parser.add_argument("--factor", type=float, default=3.0, help="of the sustainable rate")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=12.0, help="of each part of a round, after its warm-up")
    parser.add_argument("--deadline-ms", type=float, default=1000.0)
    parser.add_argument("--retries", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    payloads = drawn(16, args.seed) if args.pictures is None else from_folder(args.pictures, args.seed)
    print(machine())
    print(f"{'round':>6}{'before':>9}{'good':>8}{'after':>8}{'goodput':>9}{'p50 ms':>8}{'p99 ms':>8}{'succeed':>9}")
    rounds: list[Round] = []
    with serving(["--bundle", str(args.bundle), *shlex.split(args.serve)]) as server:
        before = sustainable_rate(server.url, payloads, args.seconds)
        for number in range(args.rounds):
            tries, clients, cores = overload(server.url, payloads, args.factor * before, args.seed + number, args)
            after = sustainable_rate(server.url, payloads, args.seconds)
            arriving_s = WARM_UP_S + args.seconds
            measured = [each for each in tries if WARM_UP_S < each.done_s <= arriving_s and each.outcome == OK]
            in_time = sum(each.latency_ms <= args.deadline_ms for each in measured)
            one = Round((before + after) / 2, in_time / args.seconds, tries, clients, arriving_s, cores)
            rounds.append(one)
            p50, p99 = (percentile(one.latencies_ms, share) for share in (50, 99))
            print(
                f"{number + 1:>6}{before:>9.1f}{one.good:>8.1f}{after:>8.1f}{one.goodput:>9.3f}{p50:>8.0f}{p99:>8.0f}"
                f"{one.succeeded / one.clients:>9.1%}",
                flush=True,
            )
            before = after
    return report(args, rounds)


def report(args: argparse.Namespace, rounds: Sequence[Round]) -> int:
    """Print what became of all of it; 1 where less is kept than was asked."""
    goodput = statistics.median(one.goodput for one in rounds)
    latencies = sorted(latency for one in rounds for latency in one.latencies_ms)
    p50, p99 = percentile(latencies, 50), percentile(latencies, 99)
    clients = sum(one.clients for one in rounds)
    succeeded = sum(one.succeeded for one in rounds) / clients
    refused = [each for one in rounds for each in one.refused]
    others = Counter(each.outcome for one in rounds for each in one.let_in if each.outcome != OK)
    refusing_ms = sorted(each.latency_ms for each in refused)
    tries_each = sum(len(one.tries) for one in rounds) / clients
    refusals = Counter(each.outcome for each in refused).most_common()
    low, high = min(one.goodput for one in rounds), max(one.goodput for one in rounds)
    rows = [
        ("sustainable rate", f"{statistics.median(one.sustainable for one in rounds):.1f}/s"),
        ("offered", f"{args.factor:g} times that, for {WARM_UP_S + args.seconds:g} s a round, and their retries"),
        ("deadline", f"{args.deadline_ms:g} ms"),
        ("goodput", f"{goodput:.3f} of the sustainable rate, median of {len(rounds)} ({low:.3f} to {high:.3f})"),
        ("let in", f"{len(latencies)}: p50 {p50:.0f} ms, p99 {p99:.0f} ms (without boxes is never answered)"),
        ("let in, but no boxes", ", ".join(f"{count} x {name}" for name, count in others.most_common()) or "none"),
        ("refused", ", ".join(f"{count} x {name}" for name, count in refusals)),
        ("refusing took", f"p50 {percentile(refusing_ms, 50):.1f} ms" if refused else ""),
        ("clients that succeeded", f"{succeeded:.1%}, after {tries_each:.2f} tries"),
        ("CPU of the client", f"{statistics.median(one.client_cores for one in rounds):.3f} cores"),
    ]
    for name, value in rows:
        print(f"{name:>24}  {value}")
    kept = p99 <= args.deadline_ms and goodput >= GOODPUT and succeeded >= SUCCEED
    print("kept" if kept else f"NOT KEPT: p99 within the deadline, goodput {GOODPUT}, {SUCCEED:.0%} succeed")
    return int(not kept)


if __name__ == "__main__":
    raise SystemExit(main())
