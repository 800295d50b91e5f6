"""Who waits for whom when pictures are decoded."""

import asyncio
import threading
from collections.abc import Awaitable, Callable

import numpy as np
import pytest
from PIL import Image

from server.decoders import SMALL_BYTES, Allowance, Decoders
from server.errors import DeadlinePassed, ImageError, ImageTooLarge
from server.headers import read_header
from tests.server.hostile import jpeg_scans
from tests.server.pictures import encode

SMALL = encode(Image.new("RGB", (8, 8)))
LARGE = encode(Image.new("RGB", (1600, 1600)), compress_level=1)
LARGE_BYTES = read_header(LARGE, 10_000_000).peak_bytes


class Held:
    """Work that waits in its thread until it is let go, and knows how much of it there is at once."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self._lock = threading.Lock()
        self.entered = 0
        self.inside = 0
        self.most_inside = 0

    def __call__(self, picture: Image.Image) -> tuple[int, int]:
        with self._lock:
            self.entered += 1
            self.inside += 1
            self.most_inside = max(self.most_inside, self.inside)
        assert self.gate.wait(timeout=30)
        with self._lock:
            self.inside -= 1
        return picture.shape[:2]

    async def until(self, entered: int) -> None:
        async with asyncio.timeout(30):
            while self.entered < entered:
                await asyncio.sleep(0.001)


def run(
    test: Callable[[Decoders], Awaitable[None]], threads: int = 2, max_decode_bytes: int = 3 * LARGE_BYTES
) -> Decoders:
    async def body() -> Decoders:
        decoders = Decoders(threads, 10_000_000, max_decode_bytes, asyncio.get_running_loop().time)
        try:
            await test(decoders)
        finally:
            decoders.stop()
        return decoders

    return asyncio.run(body())


def test_the_large_one_is_large() -> None:
    assert LARGE_BYTES > SMALL_BYTES


def test_small_pictures_do_not_wait_for_large_ones() -> None:
    async def test(decoders: Decoders) -> None:
        held = Held()
        large = [asyncio.create_task(decoders.decode(LARGE, held)) for _ in range(5)]
        await held.until(2)
        assert await decoders.decode(SMALL, lambda picture: picture.shape[:2]) == (8, 8)
        held.gate.set()
        assert await asyncio.gather(*large) == [(1600, 1600)] * 5

    run(test)


def test_large_pictures_take_turns_for_memory_not_for_threads() -> None:
    async def test(decoders: Decoders) -> None:
        held = Held()
        large = [asyncio.create_task(decoders.decode(LARGE, held)) for _ in range(6)]
        await held.until(2)
        held.gate.set()
        await asyncio.gather(*large)
        assert held.most_inside == 2

    run(test, threads=6, max_decode_bytes=2 * LARGE_BYTES + 1000)


def test_a_picture_larger_than_all_the_memory_goes_alone() -> None:
    async def test(decoders: Decoders) -> None:
        held = Held()
        held.gate.set()
        large = [asyncio.create_task(decoders.decode(LARGE, held)) for _ in range(3)]
        await asyncio.gather(*large)
        assert held.most_inside == 1

    run(test, threads=3, max_decode_bytes=1)


def test_memory_of_who_gives_up_comes_back_when_the_thread_is_done() -> None:
    async def test(decoders: Decoders) -> None:
        held = Held()
        first, second = (asyncio.create_task(decoders.decode(LARGE, held)) for _ in range(2))
        await held.until(1)
        first.cancel()
        second.cancel()
        await asyncio.gather(first, second, return_exceptions=True)
        third = asyncio.create_task(decoders.decode(LARGE, held))
        await asyncio.sleep(0.05)
        assert held.entered == 1, "the first one's thread has the memory still"
        held.gate.set()
        assert await third == (1600, 1600)
        assert held.most_inside == 1

    run(test, max_decode_bytes=LARGE_BYTES)


def test_what_cannot_be_decoded_gives_its_memory_back() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (1600, 1600, 3), np.uint8))
    data = bytearray(encode(noise, compress_level=1))
    data[len(data) // 2 : len(data) // 2 + 5000] = bytes(5000)

    async def test(decoders: Decoders) -> None:
        for _ in range(3):
            with pytest.raises(ImageError):
                await decoders.decode(bytes(data), lambda picture: picture.shape[:2])

    run(test, max_decode_bytes=LARGE_BYTES)


def test_what_drawing_needs_makes_a_picture_large() -> None:
    async def test(decoders: Decoders) -> None:
        held = Held()
        drawn = asyncio.create_task(decoders.decode(SMALL, held, more_bytes_a_pixel=SMALL_BYTES))
        await held.until(1)
        assert await decoders.decode(SMALL, lambda picture: picture.shape[:2]) == (8, 8)
        held.gate.set()
        await drawn

    run(test, threads=1)


@pytest.mark.parametrize(("scans", "thread"), [(5, "decode"), (80, "decode-large")])
def test_many_scans_make_a_picture_large(scans: int, thread: str) -> None:
    async def body(decoders: Decoders) -> None:
        name = await decoders.decode(jpeg_scans(scans), lambda _: threading.current_thread().name)
        assert name.rpartition("-")[0] == thread

    run(body)


def test_the_check_comes_before_any_decoding() -> None:
    def late() -> None:
        raise DeadlinePassed("too late")

    async def test(decoders: Decoders) -> None:
        for data in (SMALL, LARGE):
            with pytest.raises(DeadlinePassed):
                await decoders.decode(data, lambda picture: picture.shape[:2], check=late)

    run(test)


def test_the_limit_of_pixels_is_kept() -> None:
    async def test(decoders: Decoders) -> None:
        with pytest.raises(ImageTooLarge, match="4000x4000"):
            await decoders.decode(encode(Image.new("1", (4000, 4000))), lambda picture: picture.shape[:2])

    run(test)


def test_large_pictures_may_take_longer_than_small_ones_before_they_count_as_stalled() -> None:
    now_s = 0.0

    async def body() -> None:
        nonlocal now_s
        decoders = Decoders(1, 10_000_000, LARGE_BYTES, lambda: now_s)
        held = Held()
        large = asyncio.create_task(decoders.decode(LARGE, held))
        await held.until(1)
        now_s = 20.0
        assert not decoders.stalled(1.5)
        now_s = 31.0
        assert decoders.stalled(1.5)
        held.gate.set()
        await large
        decoders.stop()

    asyncio.run(body())


@pytest.mark.parametrize(("data", "timeout_s"), [(SMALL, 1.5), (LARGE, 30.0)])
def test_a_thread_that_hangs_is_seen_while_others_get_on_and_clients_give_up(data: bytes, timeout_s: float) -> None:
    now_s = 0.0

    async def body() -> None:
        nonlocal now_s
        decoders = Decoders(2, 10_000_000, 3 * LARGE_BYTES, lambda: now_s)
        first, second = Held(), Held()
        tasks = [asyncio.create_task(decoders.decode(data, first))]
        await first.until(1)
        for _ in range(4):
            now_s += timeout_s / 4
            assert not decoders.stalled(1.5)
            await decoders.decode(data, lambda _: None)
        now_s += timeout_s / 4
        assert decoders.stalled(1.5)
        tasks.append(asyncio.create_task(decoders.decode(data, second)))
        await second.until(1)
        for _ in range(4):  # no thread is free now: these are given up before they begin
            late = asyncio.create_task(decoders.decode(data, lambda _: None))
            await asyncio.sleep(0)
            late.cancel()
            await asyncio.gather(late, return_exceptions=True)
            now_s += timeout_s / 4
            assert decoders.stalled(1.5)
        first.gate.set()
        second.gate.set()
        await asyncio.gather(*tasks)
        assert not decoders.stalled(1.5)
        decoders.stop()

    asyncio.run(body())


# --- the allowance by itself ------------------------------------------------------------------------------------------


def test_the_first_in_line_is_served_first_even_if_a_later_one_would_fit() -> None:
    async def body() -> None:
        allowance = Allowance(10)
        assert await allowance.borrow(6) == 6
        large = asyncio.create_task(allowance.borrow(8))
        small = asyncio.create_task(allowance.borrow(2))
        await asyncio.sleep(0)
        assert not large.done()
        assert not small.done()
        allowance.give_back(6)
        assert await large == 8
        assert await small == 2
        assert allowance.free_bytes == 0

    asyncio.run(body())


def test_who_leaves_the_line_lets_the_next_one_go() -> None:
    async def body() -> None:
        allowance = Allowance(10)
        await allowance.borrow(6)
        large = asyncio.create_task(allowance.borrow(8))
        small = asyncio.create_task(allowance.borrow(3))
        await asyncio.sleep(0)
        large.cancel()
        assert await small == 3
        assert allowance.free_bytes == 1

    asyncio.run(body())


def test_who_leaves_in_the_moment_of_being_served_gives_it_back() -> None:
    async def body() -> None:
        allowance = Allowance(10)
        await allowance.borrow(10)
        waiting = asyncio.create_task(allowance.borrow(10))
        await asyncio.sleep(0)
        allowance.give_back(10)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert allowance.free_bytes == 10

    asyncio.run(body())
