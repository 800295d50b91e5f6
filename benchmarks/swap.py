"""Swaps between two bundles under load: whether a request is lost, how long one waits, and what stays in memory.

python -m benchmarks.swap
python -m benchmarks.swap --swaps 4 --clients 2

A real server, `ddetr serve`, answers clients that each send the next picture when they have the last one's answer. At
the same time an administrator posts one bundle after the other: the embedded one, and the same under another version
and with other class names, so that every answer tells by itself whether it is all of one bundle. After every fifth swap
come three bundles that must not get in: with a file that is not what the manifest says, with a graph that is none,
and one that is not there. Asked: no request fails, no answer is mixed, nothing bad is promoted, and memory at rest is
afterwards what it was before (within 20 MB; the server's own, after it has given back what it does not use).
"""

import argparse
import asyncio
import hashlib
import io
import json
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import uvloop
from PIL import Image

from benchmarks.machine import machine
from benchmarks.soak import open_files_and_threads, resident_kb
from bundle import embedded_bundle
from loadtest.server_process import serving
from samples import draw_smear

KEY = "benchmark"
REST_S = 12.0  # the server gives memory back every 10 s
MOST_GROWTH_MB = 20.0
BAD_EVERY = 5
STARTS = 5
PAUSE_S = 1.0  # after each swap, for latencies to compare with


@dataclass
class Seen:
    """What came of the requests."""

    answers: Counter[str] = field(default_factory=Counter)  # by version
    failed: list[str] = field(default_factory=list)
    mixed: list[str] = field(default_factory=list)
    taken: list[tuple[float, float]] = field(default_factory=list)  # when sent, seconds


@dataclass
class Swapped:
    """What came of the swaps."""

    windows: list[tuple[float, float]] = field(default_factory=list)  # from the post to its answer
    failed: list[str] = field(default_factory=list)
    rejected: int = 0
    promoted_bad: list[str] = field(default_factory=list)


def other_version(source: Path, folder: Path) -> Path:
    """`source` under another version, with other names for its classes."""
    shutil.copytree(source, folder)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["model"]["version"] += "-other"
    manifest["categories"] = {number: f"{name} (other)" for number, name in manifest["categories"].items()}
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def bad_bundles(source: Path, folder: Path) -> list[Path]:
    """A spoilt file, a graph that is none, nothing at all."""
    spoilt = folder / "spoilt"
    shutil.copytree(source, spoilt)
    (spoilt / "model.onnx").write_bytes(b"not what the manifest says")
    no_graph = folder / "no-graph"
    shutil.copytree(spoilt, no_graph)
    manifest = json.loads((no_graph / "manifest.json").read_bytes())
    manifest["hashes"] = {"onnx": hashlib.sha256((no_graph / "model.onnx").read_bytes()).hexdigest()}
    (no_graph / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    return [spoilt, no_graph, folder / "absent"]


async def ask(session: aiohttp.ClientSession, url: str, picture: bytes, stop: asyncio.Event, seen: Seen) -> None:
    """One client."""
    headers = {"Content-Type": "image/jpeg"}
    while not stop.is_set():
        sent = time.monotonic()
        try:
            async with session.post(f"{url}/detect?threshold=0.3", data=picture, headers=headers) as response:
                content = await response.json()
                if response.status != 200:
                    seen.failed.append(f"{response.status} {content}")
                    continue
        except (aiohttp.ClientError, TimeoutError) as error:
            seen.failed.append(repr(error))
            continue
        seen.taken.append((sent, time.monotonic() - sent))
        version = content["model"]["version"]
        seen.answers[version] += 1
        labels = {found["label"] for image in content["images"] for found in image["detections"]}
        if not labels or any(label.endswith("(other)") != version.endswith("-other") for label in labels):
            seen.mixed.append(f"{version}: {sorted(labels)}")


async def administrate(
    session: aiohttp.ClientSession, url: str, good: Sequence[Path], bad: Sequence[Path], swaps: int
) -> Swapped:
    """Swap so many times, in turn between the good ones."""
    swapped = Swapped()
    for number in range(1, swaps + 1):
        began = time.monotonic()
        status, content = await post(session, url, good[number % 2])
        swapped.windows.append((began, time.monotonic()))
        await asyncio.sleep(PAUSE_S)
        if status != 200:
            swapped.failed.append(str(content))
        if number % BAD_EVERY == 0:
            for path in bad:
                status, content = await post(session, url, path)
                if status == 422:
                    swapped.rejected += 1
                else:
                    swapped.promoted_bad.append(f"{path.name}: {status} {content}")
    return swapped


async def post(session: aiohttp.ClientSession, url: str, path: Path) -> tuple[int, object]:
    """Swap, and wait until that is over."""
    async with session.post(
        f"{url}/admin/bundle?wait=true", json={"path": str(path)}, headers={"X-API-Key": KEY}
    ) as response:
        return response.status, await response.json()


async def run(
    url: str, pid: int, good: Sequence[Path], bad: Sequence[Path], swaps: int, clients: int
) -> tuple[Seen, Swapped, list[float]]:
    """The requests, the swaps, and resident MB at rest before and after."""
    stream = io.BytesIO()
    Image.fromarray(draw_smear(7, 480, 640).image).save(stream, "JPEG")
    picture = stream.getvalue()
    seen, stop, resident = Seen(), asyncio.Event(), []
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        for rounds, noted in ((4, Seen()), (swaps, seen)):  # first the warm-up, of the swaps, too
            stop.clear()
            asking = [asyncio.create_task(ask(session, url, picture, stop, noted)) for _ in range(clients)]
            swapped = await administrate(session, url, good, bad if noted is seen else [], rounds)
            stop.set()
            await asyncio.gather(*asking)
            await asyncio.sleep(REST_S)
            resident.append(resident_kb(pid) / 1024)
    return seen, swapped, resident


def starts(bundle: Path) -> tuple[float, float]:
    """Seconds from start to ready, with the gate and without, in turns: the best of each."""
    best = [float("inf")] * 2
    for _ in range(STARTS):
        for index, flag in enumerate(("--gate", "--no-gate")):
            began = time.monotonic()
            with serving(["--bundle", str(bundle), flag]):
                best[index] = min(best[index], time.monotonic() - began)
    return best[0], best[1]


def milliseconds(values: Sequence[float]) -> str:
    """Median, 99th of a hundred, longest."""
    if not values:
        return "none"
    ordered = sorted(values)
    p99 = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return f"p50 {statistics.median(ordered) * 1e3:.0f}, p99 {p99 * 1e3:.0f}, longest {ordered[-1] * 1e3:.0f} ms"


def main() -> int:
    """Print the figures; exit 1 if anything was lost, mixed, let in or kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=embedded_bundle())
    parser.add_argument("--swaps", type=int, default=20)
    parser.add_argument("--clients", type=int, default=4)
    args = parser.parse_args()
    print(f"{machine()}; {args.swaps} swaps, {args.clients} clients", flush=True)
    gated, plain = starts(args.bundle)
    print(f"start to ready, the best of {STARTS}: {gated:.2f} s with the gate, {plain:.2f} s without", flush=True)
    with tempfile.TemporaryDirectory() as name:
        good = [args.bundle, other_version(args.bundle, Path(name) / "other")]
        bad = bad_bundles(args.bundle, Path(name))
        environment = {"DDETR_ADMIN_KEYS": KEY, "DDETR_LOG_LEVEL": "error"}
        with serving(["--bundle", str(args.bundle), "--rollback-seconds", "0"], environment) as process:
            before = open_files_and_threads(process.pid)
            seen, swapped, resident = uvloop.run(run(process.url, process.pid, good, bad, args.swaps, args.clients))
            after = open_files_and_threads(process.pid)
    during = [s for at, s in seen.taken if any(began <= at + s and at <= ended for began, ended in swapped.windows)]
    beside = [s for at, s in seen.taken if not any(began <= at + s and at <= ended for began, ended in swapped.windows)]
    lengths = [ended - began for began, ended in swapped.windows]
    print(f"requests: {sum(seen.answers.values())} answered ({dict(seen.answers)}), {len(seen.failed)} failed")
    print(f"answers not of one bundle: {len(seen.mixed)}")
    print(f"swaps: {len(lengths) - len(swapped.failed)} of {args.swaps} promoted, each {milliseconds(lengths)}")
    print(f"bad bundles: {swapped.rejected} rejected, {len(swapped.promoted_bad)} not")
    print(f"latency during a swap: {milliseconds(during)}")
    print(f"latency otherwise: {milliseconds(beside)}")
    print(f"resident at rest: {resident[0]:.1f} MB before, {resident[1]:.1f} MB after {args.swaps} swaps")
    print(f"open files {before[0]} before, {after[0]} after; threads {before[1]} before, {after[1]} after")
    for line in [*seen.failed[:3], *seen.mixed[:3], *swapped.failed[:3], *swapped.promoted_bad[:3]]:
        print(f"unexpected: {line}")
    kept = resident[1] - resident[0] > MOST_GROWTH_MB
    return int(bool(seen.failed or seen.mixed or swapped.failed or swapped.promoted_bad or kept))


if __name__ == "__main__":
    raise SystemExit(main())
