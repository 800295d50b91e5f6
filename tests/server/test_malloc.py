import subprocess
import sys

import pytest

PROGRAM = """
import sys, threading
import numpy as np
from server.malloc import LARGE_BYTES, tame_malloc

def resident_mb():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) / 256

if sys.argv[1] == "tame":
    tame_malloc()
np.ones(30 << 20, np.uint8)  # left to itself, glibc takes blocks as large as this from its heaps from now on
before = resident_mb()
kept = []

def work(seed):
    rng = np.random.default_rng(seed)
    for _ in range(40):
        large = np.ones(int(rng.integers(LARGE_BYTES, 20 << 20)), np.uint8)
        kept.append(np.ones(1000, np.uint8))  # small blocks that stay lie between large ones that go
        del large

threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(resident_mb() - before)
"""


def growth_mb(how: str) -> float:
    run = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True, timeout=100)
    return float(run.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_large_blocks_of_changing_sizes_go_back_when_they_are_freed() -> None:
    assert growth_mb("tame") < 40  # measured 8; without it 290


HOLES = """
import numpy as np
from server.malloc import give_back, tame_malloc

def resident_mb():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) / 256

tame_malloc()
blocks = [np.ones(1 << 20, np.uint8) for _ in range(200)]
before = resident_mb()
del blocks[::2]  # none is at the end of the heap
kept = resident_mb()
give_back()
print(before - kept, kept - resident_mb())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_between_blocks_in_use_is_given_back_too() -> None:
    run = subprocess.run([sys.executable, "-c", HOLES], capture_output=True, text=True, check=True, timeout=100)
    freed_mb, given_back_mb = map(float, run.stdout.split())
    assert freed_mb < 20  # without asking for it, it stays
    assert given_back_mb > 80  # of 100


THREADS = """
import threading
import numpy as np
from server.malloc import give_back, tame_malloc

def resident_mb():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) / 256

def work(seed):
    rng = np.random.default_rng(seed)
    for _ in range(60):
        block = np.ones(int(rng.integers(1 << 20, 4 << 20)), np.uint8)
        block = np.ones(int(rng.integers(1 << 20, 8 << 20)), np.uint8)

tame_malloc()
threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
before = resident_mb()
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
kept = resident_mb()
give_back()
print(kept - before, resident_mb() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_threads_took_is_given_back_whole() -> None:
    run = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=True, timeout=100)
    kept_mb, left_mb = map(float, run.stdout.split())
    assert kept_mb > 20
    assert left_mb < 10  # measured below 4; with a second heap 17 to 24
