"""What `ddetr build` is to a server: python -m tests.server.fake_builder FOLDER LOG GATE TROUBLE.

Says in LOG that it began, waits until GATE is there, and writes a bundle with an engine into FOLDER, or fails.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from tests.server.gpus import bundle_with


def main() -> int:
    folder, log, gate, trouble = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    with log.open("a") as file:
        file.write(f"{os.getpid()}\n")
    deadline_s = time.monotonic() + 60
    while not gate.exists():
        if time.monotonic() > deadline_s:
            return 3
        time.sleep(0.01)  # it is another process: there is no event to wait for
    if trouble == "long line":
        sys.stderr.write("." * 300_000)
    if trouble == "fail":
        sys.stderr.write("1/7 load\nddetr build: out of memory at a tactic: give a smaller --max-batch-size\n\n")
        return 1
    bundle_with(folder, *([] if trouble == "empty" else ["tensorrt-sm80-fp16.engine"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
