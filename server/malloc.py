"""How the C library keeps freed memory: tuned for large blocks of changing sizes that come and go in many threads."""

import asyncio
import ctypes
import gc
import logging
from collections.abc import Callable
from contextlib import suppress

import numpy as np

logger = logging.getLogger("ddetr.run")

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8

LARGE_BYTES = 4 << 20
"""Blocks from here on come from the kernel and go back to it: pictures beyond a megapixel or so. What is smaller, as
canvases are, is kept, because fresh pages cost as much as a resize."""

_KEPT_BYTES = 64 << 20

_ARENAS = 1
"""Heaps, for all threads together. Of any but the first what is free at its end cannot be given back on demand."""

_GIVE_BACK_EVERY_S = 10.0


def tame_malloc() -> None:
    """Keep the process's memory from creeping up: each thread's own heap, full of holes, takes tens of megabytes.

    Does nothing where the C library is another than glibc. numpy asks for huge pages where its large arrays lie: where
    they have lain, the kernel would make two megabytes of every small block that is left.
    """
    with suppress(AttributeError):  # there is no public call, and the variable for it counts only before the import
        np._core.multiarray._set_madvise_hugepage(False)  # type: ignore[attr-defined]
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    options = {_MMAP_THRESHOLD: LARGE_BYTES, _TRIM_THRESHOLD: _KEPT_BYTES, _ARENA_MAX: _ARENAS}
    if not all(mallopt(option, value) for option, value in options.items()):
        logger.debug("the C library takes no options of its allocator")


async def give_back_regularly(drop_kept: Callable[[], None], every_s: float = _GIVE_BACK_EVERY_S) -> None:
    """Until cancelled: `drop_kept`, then `give_back`, so that what a busy moment took does not stay for good.

    Garbage is collected first: a server at rest makes none, and so would keep what the last requests left.
    """
    while True:
        await asyncio.sleep(every_s)
        gc.collect()
        drop_kept()
        await asyncio.to_thread(give_back)


def give_back() -> None:
    """Hand the pages of freed blocks to the kernel, those between blocks in use, too. Does nothing without glibc."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return
