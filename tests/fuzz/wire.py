"""A fuzzer of what comes over the wire: `python -m tests.fuzz.wire --seconds 3600`.

Good requests, damaged in their lines, headers, chunks and bodies, to a server in a process of its own. No answer may be
a 500, and the server must go on serving its neighbour; that it may also say nothing, and wait for more, is right. A
case follows from the seed and its number: `--first N` begins with that one.
"""

import argparse
import base64
import random
import re
import socket
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import orjson

from tests.server import hostile
from tests.server.siege import Siege

PATIENCE_S = 0.1
"""For an answer. Fake engine, tiny pictures: what has none by then mostly waits for the rest of its request."""

FORM = f"multipart/form-data; boundary={hostile.BOUNDARY}"
CLIENTS, ROUND = 8, 64
RUN_LENGTHS = (1, 20, 5000, 70_000)
VALUE = re.compile(rb"\r\n(?:[A-Za-z-]+: )?([^\r\n]+)(?=\r\n)")
STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")
FINE = {b"100", b"200", b"503"}  # and all 4xx


def seeds() -> list[bytes]:
    """Good requests."""
    picture = hostile.small_png()
    length = {"Content-Length": str(len(picture))}
    form = hostile.form(hostile.part(picture), hostile.part(picture))
    in_json = orjson.dumps({"images": [{"b64": ""}, {"b64": base64.b64encode(picture).decode()}]})
    in_chunks, form_in_chunks, json_in_chunks = (
        hostile.head(content_type, headers={"Transfer-Encoding": "chunked"})
        + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (body[:100], body[100:]))
        + b"0\r\n\r\n"
        for content_type, body in (("image/png", picture), (FORM, form), ("application/json", in_json))
    )
    return [
        hostile.head("image/png", headers=length) + picture,
        hostile.head("image/*", "threshold=0.3&classes=red", {**length, "X-Timeout-Ms": "5000"}) + picture,
        hostile.head("image/png", headers={**length, "X-Priority": "batch", "Expect": "100-continue"}) + picture,
        hostile.head(FORM, headers={"Content-Length": str(len(form))}) + form,
        hostile.head("application/json", headers={"Content-Length": str(len(in_json))}) + in_json,
        in_chunks,
        form_in_chunks,
        json_in_chunks,
        b"GET /model HTTP/1.1\r\nHost: test\r\n\r\nHEAD /readyz HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n",
    ]


def make_case(seed: int, number: int, requests: Sequence[bytes]) -> bytes:
    """A request damaged once or twice."""
    rng = random.Random(seed * 1_000_003 + number)
    data = rng.choice(requests)
    for _ in range(rng.randint(1, 2)):
        data = damage(rng, data, requests)
    return data


def damage(rng: random.Random, data: bytes, requests: Sequence[bytes]) -> bytes:
    """Change, remove, repeat or insert something, most often in the head."""
    most = len(data) if rng.random() < 0.3 else min(len(data), data.find(b"\r\n\r\n") + 4 or len(data))
    begin = rng.randrange(max(1, most))
    end = min(len(data), begin + rng.choice((1, 1, 2, 8, 40)))
    kind = rng.randrange(7)
    if kind == 0:
        new = bytes(rng.randrange(256) for _ in range(end - begin))
    elif kind == 1:
        new = b""
    elif kind == 2:
        new = data[begin:end] * rng.choice((2, 3, 100))
    elif kind in {3, 4}:  # a run of one byte before a header's value or a chunk's size, or behind it
        places = [place for found in VALUE.finditer(data) for place in found.span(1)]
        begin = end = rng.choice(places) if places else begin
        new = rng.choice((b"0", b"9", b" ", b"a", b"\xff")) * rng.choice(RUN_LENGTHS)
    elif kind == 5:
        other = rng.choice(requests)
        new = other[rng.randrange(len(other)) :]
        end = len(data)
    else:
        lines = data[:most].split(b"\r\n")
        rng.shuffle(lines)
        return b"\r\n".join(lines) + data[most:]
    return data[:begin] + new + data[end:]


def answer(port: int, case: bytes) -> bytes:
    """What comes back before the server ends the connection or says nothing for a while."""
    said = b""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        try:
            connection.sendall(case)
            connection.settimeout(PATIENCE_S)
            while piece := connection.recv(1 << 16):
                said += piece
        except OSError:
            pass  # silence, or a reset behind an answer
    return said


def main(arguments: Sequence[str] | None = None) -> int:
    """1 where a case got an answer that it must not get."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    args = parser.parse_args(arguments)
    requests, number, failures = seeds(), args.first, 0
    answers: Counter[str] = Counter()
    with Siege() as siege, ThreadPoolExecutor(CLIENTS) as clients:
        until_s = time.monotonic() + args.seconds
        while time.monotonic() < until_s:
            cases = [make_case(args.seed, number + index, requests) for index in range(ROUND)]
            for index, said in enumerate(clients.map(partial(answer, siege.port), cases)):
                found = STATUS.findall(said)
                answers.update(status.decode() for status in found or [b"none"])
                if any(status not in FINE and not status.startswith(b"4") for status in found):
                    failures += 1
                    what = f"{b', '.join(found).decode()} to {cases[index][:2000]!r}"
                    sys.stdout.write(f"seed {args.seed}, case {number + index}: {what}\n")
            number += ROUND
        siege.calm_ms()  # raises if the neighbour was refused, or gets no answer
    told = ", ".join(f"{count} x {status}" for status, count in answers.most_common())
    sys.stdout.write(f"{number - args.first} cases: {told}; {failures} failures\n")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
