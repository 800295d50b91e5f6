"""Threads of our own: one that does one thing at a time, or some that share what there is to do."""

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_MOST_TOGETHER = 4
"""Replies that are handed over at once, at most: a usual batch's."""


class Worker:
    """Runs calls in the order they come, in a thread of its own, or in the first of several that is free.

    Where `unhurried` says so, replies to `run` wait for one another as long as calls are under way, and the event loop
    is woken once for several: beside an engine that uses all cores, waking up is a good part of what a reply costs.

    The threads are daemons: an engine or a decoder that hangs must not keep the process from ending, as a
    `concurrent.futures` pool would.
    """

    def __init__(self, name: str, threads: int = 1, unhurried: Callable[[], bool] = lambda: False) -> None:
        """`unhurried` is asked in the threads."""
        self._calls: queue.SimpleQueue[tuple[Future[Any] | _Reply[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._stopped = False
        self._unhurried = unhurried
        self._lock = threading.Lock()
        self._under_way = 0  # calls of `run`
        self._replies: deque[tuple[_Reply[Any], Callable[[Any], object], object]] = deque()
        names = [name] if threads == 1 else [f"{name}-{index}" for index in range(threads)]
        self._threads = [_Thread(target=self._work, name=each, daemon=True) for each in names]
        for thread in self._threads:
            thread.start()

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Call `function` in a thread; its result, or what it raises, goes into the future."""
        future: Future[T] = Future()
        self._calls.put((future, partial(function, *args, **kwargs)))
        return future

    async def run(self, function: Callable[[], T]) -> T:
        """The same for an event loop, which goes on meanwhile. If the caller is cancelled first, no call is made."""
        reply: _Reply[T] = _Reply(self._hand_over)
        # In the loop's next pass: a thread that is woken while this one goes on would find Python busy.
        reply.loop.call_soon(self._put, reply, function)
        try:
            return await reply.future
        finally:
            del reply  # its future holds an error, whose traceback holds this frame

    def deliver(self) -> None:
        """In the event loop: hand the replies over that wait for others."""
        while self._replies:
            reply, end, value = self._replies.popleft()
            if not reply.future.done():
                end(value)

    def stop(self, *, cancel: bool = False) -> None:
        """End the threads once their calls are done, without waiting for it. `cancel`: those not begun are not made.

        To be called in the loop that `run` was, if any; a call that was not handed over by then is cancelled.
        """
        self._stopped = True
        with suppress(queue.Empty):
            while cancel:
                call = self._calls.get_nowait()
                if call is not None:
                    call[0].cancel()
        self.deliver()
        for _ in self._threads:
            self._calls.put(None)

    def join(self) -> None:
        """Wait until the threads have ended."""
        for thread in self._threads:
            thread.join()

    @property
    def alive(self) -> bool:
        """Whether a thread has not ended."""
        return any(thread.is_alive() for thread in self._threads)

    def _put(self, reply: "_Reply[Any]", function: Callable[[], Any]) -> None:
        if self._stopped:
            reply.future.cancel()
        else:
            with self._lock:
                self._under_way += 1
            self._calls.put((reply, function))

    def _hand_over(self, reply: "_Reply[Any]", end: Callable[[Any], object], value: object) -> None:
        self._replies.append((reply, end, value))
        with self._lock:
            self._under_way -= 1
        if not self._under_way or len(self._replies) >= _MOST_TOGETHER or not self._unhurried():
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                reply.loop.call_soon_threadsafe(self.deliver)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            _call(*call)
            del call  # holds the batch's images


class _Reply(Generic[T]):
    """Where a thread puts what a call comes to, for the event loop that it was made from.

    A `concurrent.futures.Future` that asyncio wraps costs the loop twice as much, and is two futures.
    """

    def __init__(self, hand_over: "Callable[[_Reply[T], Callable[[Any], object], object], None]") -> None:
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[T] = self.loop.create_future()
        self._hand_over = hand_over

    def set_running_or_notify_cancel(self) -> bool:
        if self.future.cancelled():
            self.cancel()
            return False
        return True

    def set_result(self, result: T) -> None:
        self._hand_over(self, self.future.set_result, result)

    def set_exception(self, error: BaseException) -> None:
        self._hand_over(self, self.future.set_exception, error)

    def cancel(self) -> None:
        self._hand_over(self, self.future.cancel, None)


class _Thread(threading.Thread):
    """One of a worker's, to tell it from others."""


def still_at_work(patience_s: float) -> list[str]:
    """The names of all workers' threads that have not ended, though given `patience_s` to."""
    threads = [thread for thread in threading.enumerate() if isinstance(thread, _Thread)]
    until_s = time.monotonic() + patience_s
    for thread in threads:
        thread.join(max(0.0, until_s - time.monotonic()))
    return [thread.name for thread in threads if thread.is_alive()]


def _call(future: Future[T] | _Reply[T], function: Callable[[], T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = function()
    except Exception as error:
        future.set_exception(error)
    except BaseException as error:  # a SystemExit of a library must fail its batch, not end the event loop
        future.set_exception(RuntimeError(f"the call raised {error!r}"))
    else:
        future.set_result(result)
    finally:
        del future  # holds an error, whose traceback holds this frame
