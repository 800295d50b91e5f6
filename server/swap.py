"""Which swaps there are: one at a time, asked for by an administrator, a signal or a changed folder."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import deque
from itertools import count
from pathlib import Path

from bundle import BundleError
from bundle.reader import MANIFEST_FILE, read_manifest
from server.errors import Draining, NoSwap, PathForbidden, SwapInProgress
from server.promote import STOPPING, Cause, OpenBundle, Promotion, Rejected, Trial, WrongAnswers, check_within
from server.promote import Swap as Swap
from server.service import Service

logger = logging.getLogger("ddetr.swap")

SWAP_GATE_SECONDS = 60.0
"""Time for comparing a new bundle's engines, if `gate_seconds` is not more: requests are answered meanwhile."""

_WATCH_S = 1.0
_REMEMBERED = 20


class Swaps:
    """One swap at a time, and what became of the last ones. For the event loop."""

    def __init__(self, service: Service, open_bundle: OpenBundle) -> None:
        self.history: deque[Swap] = deque(maxlen=_REMEMBERED)
        """Newest last; the one under way included."""
        self._service = service
        self._settings = service.settings
        self._promotion = Promotion(service, open_bundle)
        self._ids = count(1)
        self._task: asyncio.Task[None] | None = None
        self._again: Cause | None = None

    @property
    def busy(self) -> bool:
        """Whether a swap is under way, or it is looked whether there should be one."""
        return self._task is not None and not self._task.done()

    def begin(self, path: Path, cause: Cause, trial: Trial | None = None) -> Swap:
        """Begin a swap to the bundle in folder `path`, with a `trial` or none.

        Raises Draining, SwapInProgress or PathForbidden.
        """
        if self._service.stopping:
            raise Draining(STOPPING)
        if self.busy:
            last = self.history[-1] if self.history else None
            if last is None or last.over.is_set():
                raise SwapInProgress(f"one at a time: it is looked whether {self._settings.bundle} has changed")
            raise SwapInProgress(f"one at a time: swap {last.id} to {last.path} is {last.state}")
        root = self._settings.bundle_root if cause == "request" else None
        if cause == "request":
            path = _place(path, root)
        swap = self._note(path, cause, trial or Trial())

        async def run() -> None:
            await self._run(swap, path, root)
            await self._run_again()

        self._task = asyncio.get_running_loop().create_task(run())
        return swap

    def give_up(self, why: str) -> Swap:
        """End the swap under way soon: with the bundle that was in service before it. Raises NoSwap."""
        last = self.history[-1] if self.history else None
        if last is None or last.over.is_set():
            raise NoSwap("no swap is under way; to go back, swap to the bundle before")
        if last.state == "retiring":
            raise NoSwap(f"swap {last.id} to {last.path} is over but for letting a bundle go: swap to the other one")
        last.given_up = last.given_up or why
        return last

    def reload(self, cause: Cause) -> None:
        """Swap to what the settings' `bundle` leads to now, unless that is in service. During a swap: after it."""
        self._again = cause
        if not self.busy:
            self._task = asyncio.get_running_loop().create_task(self._run_again())

    async def watch(self) -> None:
        """Until cancelled, look every second where the settings' `bundle` leads to and what is there.

        A change counts once it has been the same for two looks: files may still be on their way.
        """
        if not self._settings.watch_bundle:
            return
        acted_on: object = None  # nothing yet: it may have changed since it was read
        before: object = None
        while True:
            try:
                found = await asyncio.to_thread(_state, self._settings.bundle)
            except Exception:  # unwatched, no later change would ever be seen
                logger.exception("%s could not be looked at", self._settings.bundle)
                found = None
            if found is not None and found == before != acted_on:
                acted_on = found
                self.reload("watch")
            before = found
            await asyncio.sleep(_WATCH_S)

    async def stop(self) -> None:
        """End what is under way; the server has drained, and stays with the bundle that it has."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run_again(self) -> None:
        while (cause := self._again) is not None and not self._service.stopping:
            self._again = None
            path = self._settings.bundle
            if await asyncio.to_thread(self._is_served, path):
                logger.info("%s: what it leads to is in service already", path)
            else:
                await self._run(self._note(path, cause, Trial.of(self._settings)), path, None)

    def _is_served(self, path: Path) -> bool:
        served = self._service.served
        try:
            path = path.resolve()
            return path == served.opened.path and read_manifest(path / MANIFEST_FILE) == served.manifest
        except (BundleError, OSError, RuntimeError):  # a swap to it will say what is wrong
            return False

    def _note(self, path: Path, cause: Cause, trial: Trial) -> Swap:
        swap = Swap(str(next(self._ids)), str(path), cause, trial)
        self.history.append(swap)
        logger.info("swap %s: to %s, by %s", swap.id, path, cause)
        return swap

    async def _run(self, swap: Swap, path: Path, root: Path | None) -> None:
        try:
            await self._promotion.run(swap, path, root)
        except Rejected as error:
            swap.state, swap.reason, swap.wrong_answers = "rejected", str(error), isinstance(error, WrongAnswers)
        except asyncio.CancelledError:
            if swap.state in ("watched", "retiring"):
                swap.state = "promoted" if swap.reason is None else "rolled_back"
            else:
                swap.state, swap.reason = "rejected", STOPPING
            raise
        except Exception as error:
            logger.exception("swap %s", swap.id)
            swap.state, swap.reason = "rejected", f"{type(error).__name__}: {error}"
        finally:
            swap.ended_at = time.time()
            swap.over.set()
            self._service.metrics.swaps.labels(swap.state).inc()
            level = logging.INFO if swap.state == "promoted" else logging.ERROR
            logger.log(level, "swap %s: %s%s", swap.id, swap.state, f": {swap.reason}" if swap.reason else "")


def _place(path: Path, root: Path | None) -> Path:
    """Where a posted path leads, by its letters. Raises PathForbidden."""
    if root is None:
        if not path.is_absolute():
            raise PathForbidden(f"{path} is not absolute; it may be relative where bundle_root is set")
        return path
    place = Path(os.path.normpath(root / path))
    check_within(place, Path(os.path.normpath(root)), path)
    return place


def _state(folder: Path) -> object:
    """What differs when the bundle that `folder` leads to does; None where there is none."""
    place = folder.resolve()
    try:
        files = sorted((entry.name, entry.stat()) for entry in os.scandir(place))
    except OSError:
        return None
    if not any(name == MANIFEST_FILE for name, _ in files):
        return None
    return place, [(name, state.st_ino, state.st_size, state.st_mtime_ns) for name, state in files]
