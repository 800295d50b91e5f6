"""One thread that does one thing at a time."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class Worker:
    """Runs calls in the order they come, in a thread of its own.

    The thread is a daemon: an engine that hangs must not keep the process from ending, as a
    `concurrent.futures` pool would.
    """

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Call `function` in the thread; its result, or what it raises, goes into the future."""
        future: Future[T] = Future()
        self._calls.put(partial(_call, future, partial(function, *args, **kwargs)))
        return future

    def stop(self) -> None:
        """End the thread once its calls are done, without waiting for it."""
        self._calls.put(None)

    def join(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the thread has not ended."""
        return self._thread.is_alive()

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            del call  # holds the batch's images


def _call(future: Future[T], function: Callable[[], T]) -> None:
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
