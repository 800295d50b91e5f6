"""What the server costs: its images a second beside a bare loop around its engine, and its CPU time a request.

python -m benchmarks.saturation
python -m benchmarks.saturation --max-batch-size 1 --rounds 7

First part: the embedded model (or --bundle) at saturation, JPEG 640x480 in and JSON out over HTTP, against a loop that
keeps the same engine busy with a ready-made batch of the same size, before and after; both begin anew each round, and
medians count. Asked: 0.95 of the loop.

Second part: CPU time of the server's process but for its engine, a request: reading it, decoding, resizing, laying
pictures on the canvas, writing JSON and the log. The engine's part is known exactly, see accounted_server.py: the
clock of the thread in `infer`, and those of the threads that ONNX Runtime started. (To subtract the loop's CPU time an
image instead would charge the server for threads of ONNX Runtime that wait for each other, awake, while another process
has one's core. It is printed, too.) Asked: 2 ms at 640x480, 4 ms when resizing to 800x1066; for these the engine is one
that sleeps, since only the paper's resize rule matters.

The client is a process of its own, and counted apart; on a machine of few cores it takes from the server all the same.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from benchmarks.machine import machine
from bundle import embedded_bundle

ROOT = Path(__file__).parents[1]
START_TIMEOUT_S = 120.0
ASKED_RATIO = 0.95
REST_MS = 5.0
"""Of the engine that sleeps, an image: at most 200 images a second."""
RULES = {"640x480 as it is": (480, 640, 2.0), "640x480 to 800x1066": (800, 1333, 4.0)}
"""By what is done with a picture: the resize rule's sides, and the ms of CPU time that are asked for."""


@dataclass
class Child:
    """A process of this folder that answers lines with lines."""

    process: "subprocess.Popen[str]"

    def tell(self, line: str) -> None:
        """Send a line."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        """The next line it prints; RuntimeError when it has ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args} ended with status {self.process.wait()}")
        return line.strip()

    def ask(self, line: str) -> dict[str, float]:
        """Send a line, and read the JSON it answers."""
        self.tell(line)
        answer: dict[str, float] = json.loads(self.hear())
        return answer


@contextmanager
def child(
    module: str, arguments: Sequence[str], settings: Mapping[str, object], log: IO[str] | None = None
) -> Iterator[Child]:
    """`python -m benchmarks.MODULE` with DDETR_* settings, until the `with` ends. What it logs goes to `log`."""
    environment = os.environ | {f"DDETR_{name.upper()}": str(value) for name, value in settings.items()}
    process = subprocess.Popen(
        [sys.executable, "-m", f"benchmarks.{module}", *arguments],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
    )
    try:
        yield Child(process)
    finally:
        process.terminate()
        process.wait(timeout=60)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


@contextmanager
def ready_child(module: str, arguments: Sequence[str], settings: Mapping[str, object]) -> Iterator[Child]:
    """A child that says when it is ready."""
    with child(module, arguments, settings) as started:
        if started.hear() != "ready":
            raise RuntimeError(f"{module} did not get ready")
        yield started


@contextmanager
def server(arguments: Sequence[str], settings: Mapping[str, object]) -> Iterator[tuple[Child, str]]:
    """An accounted server that is ready, and its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = {"host": "127.0.0.1", "port": port}
    # With the line for every request that it logs unless told otherwise: that is work, too.
    with tempfile.TemporaryFile("w+") as log, child("accounted_server", arguments, {**settings, **own}, log) as started:
        url = f"http://127.0.0.1:{port}"
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not answers(f"{url}/readyz"):
            status = started.process.poll()
            if status is not None or time.monotonic() > deadline_s:
                log.seek(0)
                raise RuntimeError(f"the server did not become ready (exit status {status}):\n{log.read()}")
            time.sleep(0.05)
        yield started, url


def answers(url: str) -> bool:
    """Whether GET is answered with 200."""
    try:
        with urllib.request.urlopen(url, timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False


@dataclass(frozen=True)
class Round:
    """One turn of a server under load."""

    rate: float  # answers a second
    batch_size: float
    engine_ms: float  # CPU time, an image
    rest_ms: float  # CPU time of all else in the server's process, a request
    event_loop_ms: float  # of that, the event loop's thread
    client_cores: float
    p50_ms: float
    p99_ms: float


def load(under_load: Child, client: Child, warmup_s: float, duration_s: float) -> Round:
    """Saturate the server for that long, and take its accounts at the beginning and the end."""
    client.tell(f"{warmup_s} {duration_s}")
    if client.hear() != "begun":
        raise RuntimeError("the client did not begin")
    before = under_load.ask("accounts")
    seen: dict[str, Any] = json.loads(client.hear())
    after = under_load.ask("accounts")
    if seen["failed"]:
        raise RuntimeError(f"{seen['failed']} requests failed: such figures would flatter the server")
    took = {name: after[name] - before[name] for name in after}
    return Round(
        rate=seen["answers"] / seen["seconds"],
        batch_size=took["images"] / took["batches"],
        engine_ms=took["engine_s"] * 1e3 / took["images"],
        rest_ms=(took["process_s"] - took["engine_s"]) * 1e3 / took["images"],
        event_loop_ms=took["event_loop_s"] * 1e3 / took["images"],
        client_cores=seen["cpu_s"] / seen["seconds"],
        p50_ms=seen["p50_ms"],
        p99_ms=seen["p99_ms"],
    )


def median(rounds: Sequence[Round], name: str) -> float:
    """Of one figure over the rounds."""
    return statistics.median(getattr(each, name) for each in rounds)


def beside_the_loop(args: argparse.Namespace) -> bool:
    """The first part; whether the ratio is what was asked."""
    settings = {
        "bundle": args.bundle,
        "device": "cpu",
        "max_batch_size": args.max_batch_size,
        "engine_threads": args.threads,
        "engine_instances": args.instances,
    }
    print(
        f"\n{args.bundle.name}: batches of up to {args.max_batch_size}, {args.instances} engines of "
        f"{args.threads or 'all'} threads, {args.clients} clients, {args.rounds} rounds of {args.seconds:g} s"
    )
    print(
        f"{'round':>6}{'loop':>9}{'server':>9}{'ratio':>8}{'batches of':>12}{'engine ms':>11}{'all else ms':>13}"
        f"{'client cores':>14}{'p50 ms':>9}{'p99 ms':>9}"
    )
    loops, rounds, ratios = [], [], []
    for number in range(args.rounds + 1):
        with (  # each anew: where its memory lies makes a process a little quicker or slower for as long as it lives
            ready_child("bare_loop", [], {**settings, "engine_niceness": 0}) as loop,  # there is nothing to give way to
            server([], settings) as (under_load, url),
            ready_child("cheap_client", ["--url", url, "--clients", str(args.clients)], {}) as client,
        ):
            loop.ask(str(args.warm_up))
            before = loop.ask(str(args.seconds / 2))
            served = load(under_load, client, args.warm_up, args.seconds)
            loop.ask(str(args.warm_up))
            after = loop.ask(str(args.seconds / 2))
        bare = {name: before[name] + after[name] for name in before}
        bare_rate = bare["images"] / bare["seconds"]
        print(
            f"{number:>6}{bare_rate:>9.2f}{served.rate:>9.2f}{served.rate / bare_rate:>8.3f}"
            f"{served.batch_size:>12.2f}{served.engine_ms:>11.2f}{served.rest_ms:>13.2f}"
            f"{served.client_cores:>14.3f}{served.p50_ms:>9.1f}{served.p99_ms:>9.1f}"
            f"{'' if number else '   does not count'}",
            flush=True,
        )
        if number:
            loops.append(bare)
            rounds.append(served)
            ratios.append(served.rate / bare_rate)
    bare_rate = statistics.median(bare["images"] / bare["seconds"] for bare in loops)
    bare_ms = statistics.median(bare["cpu_s"] * 1e3 / bare["images"] for bare in loops)
    rate, ratio = median(rounds, "rate"), statistics.median(ratios)
    print(
        f"medians: loop {bare_rate:.2f}/s, server {rate:.2f}/s, ratio of rounds {ratio:.3f} (asked: {ASKED_RATIO}), "
        f"batches of {median(rounds, 'batch_size'):.2f}"
    )
    engine_ms, rest_ms, client_cores = (median(rounds, name) for name in ("engine_ms", "rest_ms", "client_cores"))
    print(
        f"CPU time an image: the loop's {bare_ms:.2f} ms; the server's engine {engine_ms:.2f}, all else {rest_ms:.2f}, "
        f"of it the event loop {median(rounds, 'event_loop_ms'):.2f}; the client's {client_cores * 1e3 / rate:.2f}"
    )
    print(
        f"(all else by subtracting the loop's: {engine_ms + rest_ms - bare_ms:.2f} ms; the client takes "
        f"{client_cores:.3f} cores)"
    )
    return ratio >= ASKED_RATIO


def without_an_engine(args: argparse.Namespace) -> bool:
    """The second part; whether the CPU times are what was asked."""
    batch_ms = REST_MS * args.max_batch_size
    print(f"\nan engine that sleeps {batch_ms:g} ms a batch of up to {args.max_batch_size}, {args.clients} clients")
    print(
        f"{'':<22}{'CPU ms a request':>18}{'asked':>7}{'best':>7}{'worst':>7}{'event loop':>12}{'requests/s':>12}"
        f"{'client cores':>14}"
    )
    kept = True
    for name, (shortest, longest, asked_ms) in RULES.items():
        rest = ["--rest", str(shortest), str(longest), str(batch_ms)]
        settings = {"max_batch_size": args.max_batch_size, "device": "cpu"}
        with (
            server(rest, settings) as (under_load, url),
            ready_child("cheap_client", ["--url", url, "--clients", str(args.clients)], {}) as client,
        ):
            rounds = [load(under_load, client, args.warm_up, args.seconds) for _ in range(args.rounds)]
        found = [each.rest_ms for each in rounds]
        print(
            f"{name:<22}{statistics.median(found):>18.2f}{asked_ms:>7g}{min(found):>7.2f}{max(found):>7.2f}"
            f"{median(rounds, 'event_loop_ms'):>12.2f}{median(rounds, 'rate'):>12.1f}"
            f"{median(rounds, 'client_cores'):>14.3f}",
            flush=True,
        )
        kept = kept and statistics.median(found) <= asked_ms
    return kept


def main() -> int:
    """Print both parts; exit 1 when something is not as was asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=embedded_bundle())
    parser.add_argument("--max-batch-size", type=int, default=4)
    parser.add_argument("--threads", type=int, default=0, help="of an engine; 0: all cores shared out")
    parser.add_argument("--instances", type=int, default=1)
    parser.add_argument("--clients", type=int, default=16, help="requests on their way at once")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="of a turn")
    parser.add_argument("--warm-up", type=float, default=2.0, help="seconds of load before each turn")
    parser.add_argument("--part", choices=("loop", "cpu", "both"), default="both")
    args = parser.parse_args()
    args.bundle = args.bundle.resolve()
    print(machine())
    kept = [beside_the_loop(args)] if args.part != "cpu" else []
    kept += [without_an_engine(args)] if args.part != "loop" else []
    return int(not all(kept))


if __name__ == "__main__":
    raise SystemExit(main())
