"""Freed memory is kept: what is asked for again comes without fresh pages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import export.malloc
from export.malloc import keep_freed_memory

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import resource
from export.malloc import keep_freed_memory
def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        bytearray(256 << 20)[:: 4096].count(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
fresh = pages()
keep_freed_memory()
pages()
print(fresh, pages())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it is glibc's allocator that is told")
def test_memory_that_was_freed_is_used_again() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=True)
    fresh, kept = map(int, done.stdout.split())
    assert kept < fresh / 3


def test_without_glibc_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export.malloc.ctypes, "CDLL", lambda _: object())
    keep_freed_memory()


@pytest.mark.parametrize(("most", "taken"), [(32 << 20, {-3: 32 << 20, -1: 2_000_000_000}), (0, {})])
def test_what_an_older_glibc_refuses_is_asked_for_smaller(
    monkeypatch: pytest.MonkeyPatch, most: int, taken: dict[int, int]
) -> None:
    """Without a threshold for large blocks the other option would make things worse."""
    options: dict[int, int] = {}

    def mallopt(option: int, value: int) -> int:
        if option == -3 and value > most:
            return 0
        options[option] = value
        return 1

    monkeypatch.setattr(export.malloc.ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    keep_freed_memory()
    assert options == taken
