"""The threads that decode, and the memory that large pictures take turns for."""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from server.decode import decode_pixels
from server.headers import Header, read_header
from server.progress import Progress
from server.resize import Pixels
from server.worker import Worker

T = TypeVar("T")

SMALL_BYTES = 16 << 20
"""A picture that takes no more while it is decoded is small: 4 megapixels of a plain JPEG."""

_LARGE_STALL_S = 30.0
"""The largest picture of the slowest kind takes 3 s of a core; one that takes this long hangs."""


@dataclass(frozen=True)
class _Large:
    header: Header


class Allowance:
    """So many bytes, lent in the order of asking. Used in one event loop."""

    def __init__(self, total_bytes: int) -> None:
        self._total = total_bytes
        self.free_bytes = total_bytes
        self._turns: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def borrow(self, amount: int) -> int:
        """Wait for `amount`, or for all there is if it is more; returns what is to be given back."""
        amount = min(amount, self._total)
        if not self._turns and amount <= self.free_bytes:
            self.free_bytes -= amount
            return amount
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._turns.append((amount, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._serve()  # those behind it may fit
            else:
                self.give_back(amount)
            raise
        return amount

    def give_back(self, amount: int) -> None:
        """What was borrowed is free again."""
        self.free_bytes += amount
        self._serve()

    def _serve(self) -> None:
        while self._turns:
            amount, turn = self._turns[0]
            if not turn.done():
                if amount > self.free_bytes:
                    return  # whoever is first waits until it fits: large ones must not starve
                self.free_bytes -= amount
                turn.set_result(None)
            self._turns.popleft()


class Decoders:
    """Decodes pictures beside the event loop.

    Small pictures and large ones have threads of their own: however many large ones come, a small one waits for small
    ones only. Large ones wait, outside of any thread, until the memory that they take is free.
    """

    def __init__(
        self,
        threads: int,
        max_image_pixels: int,
        max_decode_bytes: int,
        clock: Callable[[], float],
        unhurried: Callable[[], bool] = lambda: False,
    ) -> None:
        """`unhurried`: whether nobody waits for the next small picture, see Worker."""
        self._max_image_pixels = max_image_pixels
        self._small = Worker("decode", threads, unhurried)
        self._large = Worker("decode-large", threads)
        self._allowance = Allowance(max_decode_bytes)
        self._progress = Progress(clock)
        self._large_progress = Progress(clock)

    async def decode(
        self,
        data: bytes,
        then: Callable[[Pixels], T],
        *,
        check: Callable[[], object] = lambda: None,
        more_bytes_a_pixel: int = 0,
    ) -> T:
        """`then` of the picture in `data`, in a thread; what it makes takes `more_bytes_a_pixel` beside the picture.

        `check` is called when a thread is free; what it raises ends the matter. Raises ImageError or one of its kinds.
        """

        def peak_bytes(header: Header) -> int:
            return header.peak_bytes + more_bytes_a_pixel * header.width * header.height

        def decode_small() -> T | _Large:
            check()
            header = read_header(data, self._max_image_pixels)
            large = header.slow or peak_bytes(header) > SMALL_BYTES
            return _Large(header) if large else then(decode_pixels(header))

        result = await self._small.run(partial(self._progress.watch, decode_small))
        if not isinstance(result, _Large):
            return result
        header = result.header

        def decode_large() -> T:
            check()
            return then(decode_pixels(header))

        borrowed = await self._allowance.borrow(peak_bytes(header))
        loop = asyncio.get_running_loop()

        def give_back(_: Future[T]) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits for memory any more
                loop.call_soon_threadsafe(self._allowance.give_back, borrowed)

        decoded = self._large.submit(self._large_progress.watch, decode_large)
        decoded.add_done_callback(give_back)  # maybe long after the caller has given up
        return await asyncio.wrap_future(decoded)

    def deliver(self) -> None:
        """Hand over what has been decoded: when an engine may want it, and now and then, for one that hangs."""
        self._small.deliver()

    def stop(self) -> None:
        """End the threads once their work is done, without waiting for it."""
        for pool in (self._small, self._large):
            pool.stop(cancel=True)

    def stalled(self, timeout_s: float) -> bool:
        """Whether a small picture takes longer than `timeout_s`, or a large one much longer; see Progress."""
        return self._progress.stalled(timeout_s) or self._large_progress.stalled(max(timeout_s, _LARGE_STALL_S))
