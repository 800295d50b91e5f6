"""The server's memory over many requests of mixed sizes and formats: whether it grows once it is warm.

python -m benchmarks.soak --plot soak.png
python -m benchmarks.soak --requests 2000

Pictures from 48x64 to 3000x2000 in all five formats, one and several a request, as files, forms and JSON, with answers
as JSON, COCO and pictures; one in twenty is broken, and one in fifty is given up by its client. After each five
hundred all clients rest, until the server has given back what it does not use, and its memory then is what counts: how
much it takes at work depends on which pictures are inside at the moment. The first fifth of the requests is the
warm-up; through the rests after it goes a line, in KB per 1000 requests. Open files and threads are counted at both
ends. Asked: no growth: a line that rises by less than 1 MB over all requests, or by less than its own uncertainty
(twice its standard error).
"""

import argparse
import asyncio
import base64
import io
import json
import math
import os
import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import numpy as np
import uvloop
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from benchmarks.machine import machine
from bundle import embedded_bundle
from loadtest.server_process import serving
from samples import draw_smear

WARM_SHARE = 0.2
REST_EVERY, REST_S = 500, 12.0  # the server gives memory back every 10 s
SAMPLES_A_ROUND = 10
"""At work, for the plot."""
FLAT_KB = 1024.0
SIZES = ((64, 48), (320, 240), (480, 640), (640, 480), (640, 480), (640, 480), (1024, 768), (1600, 1200), (3000, 2000))
"""Width and height of the pictures; most are ordinary."""
FORMATS = ("JPEG", "JPEG", "JPEG", "PNG", "WEBP", "BMP", "TIFF")
VARIANTS = 160
BROKEN_EVERY, GIVEN_UP_EVERY = 20, 50
PAGE_KB = os.sysconf("SC_PAGE_SIZE") / 1024


@dataclass(frozen=True)
class Post:
    """A request as it is sent."""

    query: str
    body: bytes
    media_type: str


@dataclass(frozen=True)
class Sample:
    """Of the server's process."""

    requests: int  # answered so far
    resident_kb: float
    resting: bool


def picture_file(rng: random.Random, size: tuple[int, int]) -> tuple[bytes, str]:
    """A smear enlarged or reduced to `size`, in a format by chance, and its media type."""
    smear = Image.fromarray(draw_smear(rng.randrange(1000), 240, 320).image).resize(size)
    file_format = rng.choice(FORMATS)
    stream = io.BytesIO()
    smear.save(stream, file_format)
    return stream.getvalue(), f"image/{file_format.lower()}"


def posts(seed: int) -> list[Post]:
    """All the kinds of requests; each is sent many times."""
    rng = random.Random(seed)
    made = []
    for number in range(VARIANTS):
        body, media_type = picture_file(rng, rng.choice(SIZES))
        kind = rng.random()
        if number % BROKEN_EVERY == 0:
            made.append(Post("", body[: len(body) // 3], media_type))
        elif kind < 0.75:
            made.append(
                Post(rng.choice(("", "", "threshold=0.3", "format=coco", "units=normalized")), body, media_type)
            )
        elif kind < 0.8:
            small, media_type = picture_file(rng, (640, 480))
            made.append(Post("format=image", small, media_type))
        elif kind < 0.9:
            files = [picture_file(rng, rng.choice(SIZES[:7]))[0] for _ in range(rng.randint(2, 4))]
            made.append(Post("", multipart(files), "multipart/form-data; boundary=soak"))
        else:
            content = {"images": [{"b64": base64.b64encode(body).decode()}]}
            made.append(Post("", json.dumps(content).encode(), "application/json"))
    return made


def multipart(files: Sequence[bytes]) -> bytes:
    """A form of parts named images."""
    head = b'--soak\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n'
    return b"".join(head + file + b"\r\n" for file in files) + b"--soak--\r\n"


def resident_kb(pid: int) -> float:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * PAGE_KB


def open_files_and_threads(pid: int) -> tuple[int, int]:
    """Of a process, now."""
    return len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task"))


async def soak(
    url: str, pid: int, kinds: Sequence[Post], requests: int, clients: int, seed: int
) -> tuple[list[Sample], Counter[str]]:
    """Send so many requests, by as many clients at once; the memory on the way, and the answers by status."""
    rng = random.Random(seed)
    answers: Counter[str] = Counter()
    samples: list[Sample] = []
    begun = ended = 0

    async def client(session: aiohttp.ClientSession, until: int) -> None:
        nonlocal begun, ended
        while begun < until:
            number, post = begun, rng.choice(kinds)
            begun += 1
            answers[await send(session, url, post, given_up=number % GIVEN_UP_EVERY == GIVEN_UP_EVERY - 1)] += 1
            ended += 1
            if ended % (REST_EVERY // SAMPLES_A_ROUND) == 0:
                samples.append(Sample(ended, resident_kb(pid), resting=False))

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=4)) as session:
        while ended < requests:
            started_s, until = time.monotonic(), min(ended + REST_EVERY, requests)
            await asyncio.gather(*(client(session, until) for _ in range(clients)))
            rate = REST_EVERY / (time.monotonic() - started_s)
            await asyncio.sleep(REST_S)
            samples.append(Sample(ended, resident_kb(pid), resting=True))
            print(f"{ended:>7} requests, {samples[-1].resident_kb / 1024:.1f} MB at rest, {rate:.1f}/s", flush=True)
    return samples, answers


async def send(session: aiohttp.ClientSession, url: str, post: Post, given_up: bool) -> str:
    """What became of it: the status, or that its client left after a moment."""
    patience = aiohttp.ClientTimeout(total=0.02 if given_up else 120)
    try:
        async with session.post(
            f"{url}/detect?{post.query}",
            data=io.BytesIO(post.body),
            headers={"Content-Type": post.media_type},
            timeout=patience,
        ) as response:
            await response.read()
            return str(response.status)
    except TimeoutError:
        return "given up" if given_up else "timeout"
    except aiohttp.ClientError as error:
        return type(error).__name__


@dataclass(frozen=True)
class Growth:
    """The line through the samples after the warm-up."""

    slope_kb: float  # per 1000 requests
    error_kb: float  # its standard error
    scatter_kb: float  # standard deviation of the samples around it
    start_kb: float  # mean of the first tenth of the samples
    end_kb: float  # mean of the last tenth
    requests: int  # from the first sample to the last


def growth(samples: Sequence[Sample]) -> Growth:
    """Least squares; its error allows for samples that resemble their neighbours."""
    x = np.array([sample.requests for sample in samples], float)
    y = np.array([sample.resident_kb for sample in samples])
    slope, intercept = np.polyfit(x, y, 1)
    residual = y - (slope * x + intercept)
    scatter = float(residual.std(ddof=2)) if len(x) > 2 else 0.0
    # Memory is what it was a moment ago: the effective number of samples is smaller by their correlation.
    correlation = float((residual[1:] * residual[:-1]).mean() / residual.var()) if scatter else 0.0
    correlation = min(max(correlation, 0.0), 0.99)
    independent = max(3.0, len(x) * (1 - correlation) / (1 + correlation))
    error = scatter / (float(x.std()) * math.sqrt(independent))
    tenth = max(1, len(y) // 10)
    return Growth(
        slope_kb=float(slope) * 1e3,
        error_kb=error * 1e3,
        scatter_kb=scatter,
        start_kb=float(y[:tenth].mean()),
        end_kb=float(y[-tenth:].mean()),
        requests=int(x[-1] - x[0]),
    )


def plot(samples: Sequence[Sample], warm: int, found: Growth, path: Path) -> None:
    """The memory over the requests, with the line."""
    figure = Figure(figsize=(9.0, 4.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    resting = [sample for sample in samples if sample.resting]
    working = [sample for sample in samples if not sample.resting]
    for some, style in (
        (working, {"color": "#9fb8cc"}),
        (resting, {"color": "#33658a", "marker": "o", "markersize": 3}),
    ):
        name = "at rest" if some is resting else "at work"
        axes.plot([s.requests for s in some], [s.resident_kb / 1024 for s in some], linewidth=1, label=name, **style)
    axes.axvspan(0, warm, color="#eeeeee", label="warm-up")
    after = [sample for sample in resting if sample.requests > warm]
    middle_x = sum(sample.requests for sample in after) / len(after)
    middle_y = sum(sample.resident_kb for sample in after) / len(after)
    ends = (after[0].requests, after[-1].requests)
    line = [(middle_y + found.slope_kb / 1e3 * (x - middle_x)) / 1024 for x in ends]
    label = f"{found.slope_kb:+.1f} KB per 1000 requests (standard error {found.error_kb:.1f})"
    axes.plot(ends, line, color="#d1495b", linestyle="--", label=label)
    axes.set(xlabel="requests of mixed sizes and formats", ylabel="resident memory of the server, MB")
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    figure.savefig(path)


def main() -> int:
    """Print the figures and draw them; exit 1 when memory grew, or requests failed that should not have."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=embedded_bundle())
    parser.add_argument("--requests", type=int, default=20_000, help=f"at least {10 * REST_EVERY} say something")
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    kinds = posts(args.seed)
    print(f"{machine()}; {args.requests} requests of {len(kinds)} kinds, {args.clients} at once", flush=True)
    with serving(["--bundle", str(args.bundle)]) as process:
        before = open_files_and_threads(process.pid)
        samples, answers = uvloop.run(soak(process.url, process.pid, kinds, args.requests, args.clients, args.seed))
        time.sleep(6)  # past uvicorn's 5 s: connections that idle are closed
        after = open_files_and_threads(process.pid)
    warm = int(WARM_SHARE * args.requests)
    resting = [sample for sample in samples if sample.resting]
    found = growth([sample for sample in resting if sample.requests > warm])
    print(f"answers: {', '.join(f'{name}: {number}' for name, number in sorted(answers.items()))}")
    print(f"open files {before[0]} before, {after[0]} after; threads {before[1]} before, {after[1]} after")
    print(
        f"resident MB at rest: {resting[0].resident_kb / 1024:.1f} at first, {found.start_kb / 1024:.1f} after the "
        f"warm-up, {found.end_kb / 1024:.1f} at the end; most at work {max(s.resident_kb for s in samples) / 1024:.1f}"
    )
    total_kb = found.slope_kb * found.requests / 1e3
    print(
        f"growth after the warm-up: {found.slope_kb:+.1f} KB per 1000 requests (standard error {found.error_kb:.1f}), "
        f"{total_kb:+.0f} KB over {found.requests}; rests scatter by {found.scatter_kb:.0f} KB"
    )
    if args.plot is not None:
        plot(samples, warm, found, args.plot)
    grew = total_kb >= FLAT_KB and found.slope_kb >= 2 * found.error_kb
    surprises = set(answers) - {"200", "422", "given up"}
    if surprises:
        print(f"unexpected: {', '.join(sorted(surprises))}")
    return int(grew or bool(surprises))


if __name__ == "__main__":
    raise SystemExit(main())
