"""A fuzzer of picture files: good ones are damaged and sent to the service, for as long as it is told to.

    python -m tests.fuzz.images --seconds 3600 --seed 7 --save failures/

Every case follows from the seed and its number. The service runs in a process of its own, so that a decoder's crash is
seen, and laid to the file that caused it. A failure is any answer that is neither boxes nor an error with a reason.
"""

import argparse
import contextlib
import io
import json
import mmap
import os
import random
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]

PIXEL_LIMIT = 1_000_000  # files that claim more are refused; what they claim would cost the fuzzer its time
BATCH = 16  # files in a request
HANG_S = 60.0
MOST_MEMORY_MB = 600  # measured 150

_PROGRESS = struct.Struct("<QQ")  # the first case under way, and how many


# --- good files -------------------------------------------------------------------------------------------------------


def seeds() -> list[bytes]:
    """Small good files of every kind that is served, and of some that are not."""
    noise = np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)
    picture = Image.fromarray(noise).resize((64, 48), Image.Resampling.BILINEAR)
    exif = Image.Exif()
    exif[274] = 6
    exif[315] = "somebody"
    alpha = picture.convert("RGBA")
    alpha.putalpha(picture.convert("L"))
    palette = picture.quantize(16)
    wide = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    floats = Image.fromarray(np.asarray(picture.convert("L")).astype(np.float32))
    return [
        _encode(picture, "JPEG"),
        _encode(picture, "JPEG", progressive=True, exif=exif),
        _encode(picture, "JPEG", subsampling=0, restart_marker_rows=1),
        _encode(picture.convert("L"), "JPEG"),
        _encode(picture.convert("CMYK"), "JPEG", progressive=True),
        _encode(picture, "MPO", pages=True),
        _encode(picture, "PNG", exif=exif),
        _encode(alpha, "PNG"),
        _encode(palette, "PNG", transparency=3),
        _encode(picture.convert("1"), "PNG"),
        _encode(wide, "PNG"),
        _encode(picture, "PNG", pages=True),
        _interlaced(picture),
        _encode(picture, "WEBP", exif=exif),
        _encode(picture, "WEBP", lossless=True),
        _encode(alpha, "WEBP"),
        _encode(alpha, "WEBP", lossless=True, exif=exif),
        _encode(picture, "WEBP", pages=True),
        _encode(picture, "BMP"),
        _encode(palette, "BMP"),
        _encode(alpha, "BMP"),
        _encode(picture.convert("1"), "BMP"),
        _encode(picture, "TIFF", pages=True),
        _encode(picture, "TIFF", big_tiff=True),
        _encode(picture, "TIFF", compression="jpeg"),
        _encode(picture, "TIFF", compression="tiff_lzw", exif=exif),
        _encode(alpha, "TIFF", compression="tiff_adobe_deflate"),
        _encode(palette, "TIFF", compression="packbits"),
        _encode(picture.convert("1"), "TIFF", compression="group4"),
        _encode(picture.convert("CMYK"), "TIFF"),
        _encode(floats, "TIFF"),
        _encode(wide, "TIFF", compression="tiff_deflate"),
        _in_tiles(picture.convert("L"), deflated=False),
        _in_tiles(picture.convert("L"), deflated=True),
        _encode(picture, "GIF"),
    ]


def _encode(picture: Image.Image, file_format: str, pages: bool = False, **options: object) -> bytes:
    buffer = io.BytesIO()
    if pages:
        options |= {"save_all": True, "append_images": [picture.rotate(180)]}
    picture.copy().save(buffer, file_format, **options)  # a copy: saving leaves traces on a picture
    return buffer.getvalue()


def _interlaced(picture: Image.Image) -> bytes:
    """A PNG in Adam7, which Pillow reads and does not write."""
    pixels = np.asarray(picture)
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    rows = b"".join(b"\0" + row.tobytes() for y, x, dy, dx in passes for row in pixels[y::dy, x::dx])
    header = struct.pack(">IIBBBBB", picture.width, picture.height, 8, 2, 0, 0, 1)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")


def _in_tiles(picture: Image.Image, deflated: bool) -> bytes:
    """A grey TIFF in four tiles of 32x32, which Pillow does not write."""
    pixels = np.asarray(picture.resize((64, 64)))
    tiles = [pixels[y : y + 32, x : x + 32].tobytes() for y in (0, 32) for x in (0, 32)]
    tiles = [zlib.compress(tile) for tile in tiles] if deflated else tiles
    offsets = [8 + sum(map(len, tiles[:number])) for number in range(4)]
    lists_at = offsets[3] + len(tiles[3])
    data = b"".join(tiles) + struct.pack("<8I", *offsets, *map(len, tiles))
    tags = [
        (tag, 3, 1, value) for tag, value in ((256, 64), (257, 64), (258, 8), (259, 8 if deflated else 1), (262, 1))
    ]
    tags += [(277, 3, 1, 1), (322, 3, 1, 32), (323, 3, 1, 32), (324, 4, 4, lists_at), (325, 4, 4, lists_at + 16)]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory


# --- damage -----------------------------------------------------------------------------------------------------------

_NUMBERS = (0, 1, 2, 3, 7, 8, 15, 16, 63, 64, 127, 128, 255, 256, 1023, 4096, 32767, 32768, 65535, 65536)
_LARGE_NUMBERS = (0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFE, 0x01000000, 0x00FFFFFF)


def make_case(seed: int, number: int, files: Sequence[bytes]) -> bytes:
    """The damaged file of that number."""
    dice = random.Random(f"{seed}:{number}")
    data = bytearray(dice.choice(files))
    if data[:4] == b"\x89PNG" and dice.random() < 0.3:
        data = _damage_rows(dice, data, files)
        if dice.random() < 0.7:
            return bytes(data)
    for _ in range(dice.choice((1, 1, 1, 2, 2, 3, 5, 9))):
        dice.choice(_DAMAGES)(dice, data, files)
    if data[:4] == b"\x89PNG" and dice.random() < 0.7:
        _mend_checksums(data)
    return bytes(data)


def _place(dice: random.Random, data: bytearray) -> int:
    """Anywhere, and half of the time near the front, where headers are."""
    most = min(len(data), 128) if dice.random() < 0.5 else len(data)
    return dice.randrange(most) if most else 0


def _flip(dice: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    if data:
        data[_place(dice, data)] ^= 1 << dice.randrange(8)


def _set_byte(dice: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    if data:
        data[_place(dice, data)] = dice.choice((0, 1, 0x7F, 0x80, 0xFE, 0xFF, dice.randrange(256)))


def _set_number(dice: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    """A length, a size, an offset: two or four bytes, either end first."""
    letter = dice.choice(("<H", ">H", "<I", ">I"))
    value = dice.choice((*_NUMBERS, *_LARGE_NUMBERS, len(data), dice.randrange(1 << 16)))
    place = _place(dice, data)
    packed = struct.pack(letter, value & (0xFFFF if letter[1] == "H" else 0xFFFFFFFF))
    data[place : place + len(packed)] = packed


def _truncate(dice: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    del data[_place(dice, data) :]


def _delete(dice: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    place = _place(dice, data)
    del data[place : place + dice.choice((1, 2, 4, 12, 100))]


def _repeat(dice: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    place = _place(dice, data)
    piece = data[place : place + dice.choice((1, 4, 12, 30, 300))]
    data[place:place] = piece * dice.choice((1, 2, 10, 100))


def _insert(dice: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    place = _place(dice, data)
    data[place:place] = dice.randbytes(dice.choice((1, 2, 4, 50)))


def _move(dice: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    begin, length, to = _place(dice, data), dice.choice((4, 12, 64)), _place(dice, data)
    piece = data[begin : begin + length]
    data[to : to + len(piece)] = piece


def _splice(dice: random.Random, data: bytearray, files: Sequence[bytes]) -> None:
    other = dice.choice(files)
    data[_place(dice, data) :] = other[dice.randrange(len(other)) :]


def _zero(dice: random.Random, data: bytearray, _: Sequence[bytes]) -> None:
    place, length = _place(dice, data), dice.choice((2, 8, 64))
    data[place : place + length] = bytes(min(length, max(0, len(data) - place)))


_DAMAGES: tuple[Callable[[random.Random, bytearray, Sequence[bytes]], None], ...] = (
    _flip,
    _flip,
    _set_byte,
    _set_byte,
    _set_number,
    _set_number,
    _set_number,
    _truncate,
    _delete,
    _repeat,
    _insert,
    _move,
    _splice,
    _zero,
)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _damage_rows(dice: random.Random, data: bytearray, files: Sequence[bytes]) -> bytearray:
    """A PNG with its rows damaged and compressed again: otherwise all damage to them ends at zlib's checksum."""
    begin = data.index(b"IDAT") - 4
    (length,) = struct.unpack_from(">I", data, begin)
    rows = bytearray(zlib.decompress(data[begin + 8 : begin + 8 + length]))
    for _ in range(dice.randrange(1, 6)):
        dice.choice(_DAMAGES)(dice, rows, files)
    return data[:begin] + _chunk(b"IDAT", zlib.compress(bytes(rows))) + data[begin + 12 + length :]


def _mend_checksums(data: bytearray) -> None:
    """Make the damage of a PNG get past its checksums."""
    position = 8
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        end = position + 8 + length
        if end + 4 > len(data):
            return
        struct.pack_into(">I", data, end, zlib.crc32(data[position + 4 : end]))
        position = end + 4


# --- the process with the service -------------------------------------------------------------------------------------


def work(seed: int, first: int, last: int, seconds: float, progress: Path, die_at: int, batch: int) -> None:
    """Send cases until the time is over or `last` is reached; a line of JSON on stdout for each failure."""
    from starlette.testclient import TestClient

    from server.app import create_app
    from server.settings import Settings
    from tests.server import fake_engine

    fake_engine.holds = lambda *_: False  # damage makes the very pictures on which this engine raises or hangs
    files = seeds()
    settings = Settings(
        bundle=Path("none"),
        decode_threads=2,
        max_image_pixels=PIXEL_LIMIT,
        stall_timeout_ms=30_000,  # a machine that is busy with others is no reason to restart an engine
        log_level="warning",
    )
    deadline_s = time.monotonic() + seconds
    with (
        open(progress, "r+b") as file,
        mmap.mmap(file.fileno(), _PROGRESS.size) as shared,
        TestClient(create_app(settings, fake_engine.FakeEngine()), raise_server_exceptions=False) as client,
    ):
        number = first
        while number < last and time.monotonic() < deadline_s:
            count = min(batch, last - number)
            _PROGRESS.pack_into(shared, 0, number, count)
            if number <= die_at < number + count:
                os.kill(os.getpid(), signal.SIGSEGV)
            cases = [make_case(seed, number + index, files) for index in range(count)]
            parts = [("images", (f"{index}", case, "image/*")) for index, case in enumerate(cases)]
            if _trouble(client.post("/detect", files=parts), count):
                for index, case in enumerate(cases):
                    trouble = _trouble(client.post("/detect", content=case, headers={"Content-Type": "image/*"}), 1)
                    if trouble:
                        _say(json.dumps({"number": number + index, "trouble": trouble}))
            number += count
        _PROGRESS.pack_into(shared, 0, number, 0)
        status = Path("/proc/self/status").read_text(encoding="ascii")
        peak_mb = int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024  # type: ignore[index]
        if peak_mb > MOST_MEMORY_MB:
            _say(json.dumps({"number": number, "trouble": f"took {peak_mb:.0f} MB"}))


def _trouble(response: object, count: int) -> str | None:
    """What is wrong with an answer to `count` files; None if nothing is."""
    status: int = response.status_code  # type: ignore[attr-defined]
    text: str = response.text  # type: ignore[attr-defined]
    try:
        content = json.loads(text)
    except ValueError:
        return f"{status} without JSON: {text[:300]}"
    if status >= 500:
        return f"{status}: {text[:1000]}"
    if status != 200:
        error = content.get("error", {})
        return None if error.get("code") and error.get("message") else f"{status} without a reason: {text[:300]}"
    images = content["images"]
    if len(images) != count:
        return f"{len(images)} answers for {count} files"
    for image in images:
        if "error" in image:
            if not (image["error"]["code"] and image["error"]["message"]):
                return f"an error without a reason: {image}"
            if image["error"]["code"] in {"engine_failed", "internal"}:
                return f"an error of the server: {image}"
            continue
        width, height = image["width"], image["height"]
        for detection in image["detections"]:
            x0, y0, x1, y1 = detection["box"]
            if not (0 <= x0 <= x1 <= width and 0 <= y0 <= y1 <= height):
                return f"a box outside of {width}x{height}: {detection}"
    return None


# --- the process that watches -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failure:
    """A file that must not do what it did."""

    number: int
    trouble: str


def fuzz(seed: int, seconds: float, first: int = 0, die_at: int = -1) -> tuple[int, list[Failure]]:
    """Fuzz for so long; how many cases there were, and the failures."""
    deadline_s = time.monotonic() + seconds
    failures: list[Failure] = []
    number = first
    while (left_s := deadline_s - time.monotonic()) > 0:
        reached, found, ended = _run(seed, number, 1 << 62, left_s, die_at)
        failures += found
        if ended is None:
            return reached - first, failures
        begun, number, alone = reached, reached, 0
        while number < begun + BATCH:  # once more, file by file
            reached, found, ended_alone = _run(seed, number, begun + BATCH, HANG_S, die_at, batch=1)
            failures += found
            if ended_alone is not None:
                failures.append(Failure(reached, ended_alone))
                alone += 1
            number = reached + 1 if ended_alone is not None else begun + BATCH
        if not alone:
            failures.append(Failure(begun, f"{ended}, in the company of the {BATCH - 1} files after it"))
    return number - first, failures


def _run(
    seed: int, first: int, last: int, seconds: float, die_at: int, batch: int = BATCH
) -> tuple[int, list[Failure], str | None]:
    """Let a process work: the case that it reached, the failures it told of, and how it ended if not by itself."""
    with tempfile.TemporaryDirectory() as folder:
        progress = Path(folder) / "progress"
        progress.write_bytes(_PROGRESS.pack(first, 0))
        arguments = ["--child", str(progress), "--seed", str(seed), "--first", str(first), "--last", str(last)]
        arguments += ["--die-at", str(die_at), "--batch", str(batch)]
        with open(Path(folder) / "out", "w+b") as out, open(Path(folder) / "log", "w+b") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.fuzz.images", *arguments, "--seconds", str(seconds)],
                cwd=ROOT,
                stdout=out,
                stderr=log,
            )
            before, changed_s = progress.read_bytes(), time.monotonic()
            ended: str | None = None
            while process.poll() is None:
                time.sleep(0.05)
                now = progress.read_bytes()
                if now != before:
                    before, changed_s = now, time.monotonic()
                elif time.monotonic() - changed_s > HANG_S:
                    process.kill()
                    process.wait()
                    ended = f"no answer within {HANG_S:g} s"
            if ended is None and process.returncode < 0:
                ended = f"killed the process: {signal.Signals(-process.returncode).name}"
            elif ended is None and process.returncode:
                ended = f"exit status {process.returncode}"
            if ended is not None:
                log.seek(0)
                ended += "\n" + log.read()[-3000:].decode("utf-8", "replace")
            out.seek(0)
            found = [Failure(**json.loads(line)) for line in out]
            reached, _ = _PROGRESS.unpack(progress.read_bytes())
            return reached, found, ended


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzz, tell of it, and keep what failed; 1 if anything did."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.images", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--save", type=Path, default=Path("fuzz-failures"), help="folder for files that failed")
    parser.add_argument("--last", type=int, default=1 << 62, help=argparse.SUPPRESS)
    parser.add_argument("--die-at", type=int, default=-1, help=argparse.SUPPRESS)  # for the fuzzer's own test
    parser.add_argument("--batch", type=int, default=BATCH, help=argparse.SUPPRESS)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child is not None:
        work(given.seed, given.first, given.last, given.seconds, given.child, given.die_at, given.batch)
        return 0
    cases, failures = fuzz(given.seed, given.seconds, given.first, given.die_at)
    files = seeds()
    for failure in failures:
        given.save.mkdir(parents=True, exist_ok=True)
        path = given.save / f"seed{given.seed}-{failure.number}.bin"
        with contextlib.suppress(OSError):
            path.write_bytes(make_case(given.seed, failure.number, files))
        _say(f"{path}: {failure.trouble}")
    _say(f"{cases} cases from seed {given.seed}: {len(failures)} failures")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
