"""A server that is asked for more than it can do: what becomes of those it lets in, and of those it sends away.

python -m benchmarks.overload
python -m benchmarks.overload --pictures FOLDER --deadline-ms 500 --seconds 30
python -m benchmarks.overload --serve="--engine-threads 1"       (leaves a core of two to the client)

First the sustainable rate: the answers a second to clients that ask again as soon as they are answered. Then, for
--seconds, requests at --factor times that rate arrive as a Poisson process, each with a deadline; whoever is refused
comes back after exactly the Retry-After, --retries times at most. Both rates are of a server that has been under that
load for some seconds already. When all is done the sustainable rate is measured again: machines change their speed from
minute to minute, and the mean of both is what counts. Asked: of the requests let in, p99 within the deadline; good
answers in that time at 0.9 of the sustainable rate; 95% of the clients succeed in the end.

The client is a process of its own, but on the same machine: what it takes it takes from the server.
"""

import argparse
import shlex
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import uvloop

from benchmarks.lean_client import LeanClient
from benchmarks.machine import machine
from bundle import embedded_bundle
from loadtest.arrivals import poisson
from loadtest.client import OK, Answer
from loadtest.load import Load, Sample, is_ok
from loadtest.payload import Payload, drawn, from_folder
from loadtest.report import percentile
from loadtest.server_process import serving

CONNECTIONS = 1_000_000  # nobody waits in the client
SATURATING_CLIENTS = 24
WARM_UP_S = 3.0
REFUSED = ("429", "503")
GOODPUT, SUCCEED = 0.9, 0.95


@dataclass(frozen=True)
class Try:
    """One request, of one client's several."""

    sent_s: float
    done_s: float
    outcome: str

    @property
    def latency_ms(self) -> float:
        """From sending to the answer's end."""
        return (self.done_s - self.sent_s) * 1e3


class Recorder:
    """Notes every try that goes through it."""

    def __init__(self, client: LeanClient) -> None:
        self.tries: list[Try] = []
        self._client = client

    async def __call__(self, payload: Payload) -> Answer:
        """Send and wait for the answer."""
        sent_s = time.monotonic()
        answer = await self._client.detect(payload)
        self.tries.append(Try(sent_s, time.monotonic(), answer.outcome))
        return answer


async def sustainable_rate(url: str, payloads: Sequence[Payload], seconds: float) -> float:
    """Good answers a second with the server never idle."""
    async with LeanClient(url) as client:
        load = Load(client.detect, payloads, SATURATING_CLIENTS)
        await load.closed_loop(SATURATING_CLIENTS, WARM_UP_S + seconds, seed=0)
    answered = [sample for sample in load.samples if WARM_UP_S < sample.done_s <= WARM_UP_S + seconds]
    if not all(map(is_ok, answered)):
        raise SystemExit(f"at saturation, not all was answered: {Counter(sample.outcome for sample in answered)}")
    return len(answered) / seconds


async def overload(
    url: str, payloads: Sequence[Payload], rate: float, args: argparse.Namespace
) -> tuple[list[Try], list[Sample], float]:
    """All tries, every client's end, and when it began."""
    async with LeanClient(url, args.deadline_ms) as client:
        recorder = Recorder(client)
        load = Load(recorder, payloads, CONNECTIONS, retries=args.retries)
        began_s = time.monotonic()
        await load.open_loop(poisson(rate, WARM_UP_S + args.seconds, len(payloads), args.seed))
    return recorder.tries, load.samples, began_s


def main() -> int:
    """Print the table; exit 1 where less is kept than was asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=embedded_bundle())
    parser.add_argument("--pictures", type=Path, help="folder; default: drawn smears")
    parser.add_argument("--serve", default="", help="more flags of ddetr serve, in one string")
    parser.add_argument("--factor", type=float, default=3.0, help="of the sustainable rate")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each part")
    parser.add_argument("--deadline-ms", type=float, default=1000.0)
    parser.add_argument("--retries", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    payloads = drawn(16, args.seed) if args.pictures is None else from_folder(args.pictures, args.seed)
    print(machine())
    with serving(["--bundle", str(args.bundle), *shlex.split(args.serve)]) as server:
        before = uvloop.run(sustainable_rate(server.url, payloads, args.seconds))
        print(f"sustainable: {before:.1f} answers a second; now {args.factor:g} times as many requests ...", flush=True)
        rate = args.factor * before
        client_s = time.process_time()
        tries, samples, began_s = uvloop.run(overload(server.url, payloads, rate, args))
        client_s = time.process_time() - client_s
        after = uvloop.run(sustainable_rate(server.url, payloads, args.seconds))
    return report(args, (before, after), tries, samples, began_s, client_s)


def report(
    args: argparse.Namespace,
    rates: tuple[float, float],
    tries: Sequence[Try],
    samples: Sequence[Sample],
    began_s: float,
    client_s: float,
) -> int:
    """Print what became of it; 1 where less is kept than was asked. `rates`: sustainable, before and after."""
    warm_s, sustainable = began_s + WARM_UP_S, sum(rates) / 2
    ended_s, arriving_s = warm_s + args.seconds, WARM_UP_S + args.seconds
    refused = [each for each in tries if each.outcome.startswith(REFUSED)]
    let_in = [each for each in tries if not each.outcome.startswith(REFUSED)]
    good = [each for each in let_in if each.outcome == OK]
    latencies = sorted(each.latency_ms if each.outcome == OK else float("inf") for each in let_in)
    p50, p99 = percentile(latencies, 50), percentile(latencies, 99)
    goodput = sum(warm_s < each.done_s <= ended_s for each in good) / args.seconds / sustainable
    succeeded = sum(map(is_ok, samples)) / len(samples)
    tail_s = max(each.done_s for each in tries) - ended_s
    others = Counter(each.outcome for each in let_in if each.outcome != OK)
    rows = [
        ("sustainable rate", f"{sustainable:.1f}/s ({rates[0]:.1f} before, {rates[1]:.1f} after)"),
        (
            "offered",
            f"{len(samples) / arriving_s:.1f}/s for {arriving_s:g} s, and their retries {tail_s:.0f} s more",
        ),
        ("deadline", f"{args.deadline_ms:g} ms"),
        ("goodput", f"{goodput:.3f} of the sustainable rate"),
        ("let in", f"{len(let_in)}: p50 {p50:.0f} ms, p99 {p99:.0f} ms (one without boxes counts as never answered)"),
        ("let in, but no boxes", ", ".join(f"{count} x {name}" for name, count in others.most_common()) or "none"),
        ("refused", ", ".join(f"{n} x {name}" for name, n in Counter(each.outcome for each in refused).most_common())),
        (
            "refusing took",
            f"p50 {percentile(sorted(each.latency_ms for each in refused), 50):.1f} ms" if refused else "",
        ),
        ("clients that succeeded", f"{succeeded:.1%}, after {sum(s.tries for s in samples) / len(samples):.2f} tries"),
        ("CPU of the client", f"{client_s / (arriving_s + tail_s):.2f} cores"),
    ]
    for name, value in rows:
        print(f"{name:>24}  {value}")
    kept = p99 <= args.deadline_ms and goodput >= GOODPUT and succeeded >= SUCCEED
    print("kept" if kept else f"NOT KEPT: p99 within the deadline, goodput {GOODPUT}, {SUCCEED:.0%} succeed")
    return int(not kept)


if __name__ == "__main__":
    raise SystemExit(main())
