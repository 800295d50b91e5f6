"""Processes of a test's own: found by their parents and names, never by name alone."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]


def descendants(pid: int) -> dict[int, str]:
    """Every process below `pid`, with its command line."""
    parents: dict[int, int] = {}
    commands: dict[int, str] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            status = (folder / "stat").read_text()
            commands[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
        except OSError:  # it has ended meanwhile
            continue
        parents[int(folder.name)] = int(status.rpartition(")")[2].split()[1])
    found: dict[int, str] = {}
    ring = {pid}
    while ring:
        ring = {child for child, parent in parents.items() if parent in ring and child not in found}
        found |= {child: commands.get(child, "") for child in ring}
    return found


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Until `condition` holds; fails the test, naming `what`, after so many seconds."""
    until_s = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until_s, f"{what}: not within {seconds:g} s"
        time.sleep(0.05)


@contextmanager
def running(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """The process, which is ended with all below it if it has not ended by itself."""
    try:
        yield process
    finally:
        below = descendants(process.pid)
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pid, command in below.items():
            try:
                same = (Path("/proc") / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
                if same.split(" ")[0] == command.split(" ")[0]:
                    os.kill(pid, 9)
            except OSError:
                continue
        if process.stdout is not None:
            process.stdout.close()
