"""From one bundle to another without losing a request: opened and proven beside the old one, then switched to."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Literal

from bundle import BundleError, ModelName
from bundle.reader import MANIFEST_FILE, read_manifest
from server.errors import Draining, PathForbidden, StartupError, SwapInProgress
from server.gate import Verdict
from server.served import LEAST_FAILURES, Opened, Served
from server.service import Service
from server.shadow import Comparison, Shadow
from server.worker import Worker

logger = logging.getLogger("ddetr.swap")

Cause = Literal["request", "signal", "watch", "build"]
State = Literal["opening", "shadowing", "warming", "watched", "retiring", "promoted", "rejected", "rolled_back"]

SWAP_GATE_SECONDS = 60.0
"""Time for comparing a new bundle's engines, if `gate_seconds` is not more: requests are answered meanwhile."""

_LOOK_S = 0.1  # between two looks at what may end a stage early
_WATCH_S = 1.0
_REMEMBERED = 20
_MOST_HANGING = 3
"""Openings that may hang at once; their memory is lost until the process ends."""
_STOPPING = "the server is stopping"
_REST_S = 10.0  # longest that a shadow's last picture may take


@dataclass(frozen=True)
class Trial:
    """How a new bundle is tried on live pictures before it is switched to."""

    percent: float = 0.0
    seconds: float = 60.0
    least_agreement: float = 0.8


@dataclass(eq=False)
class Swap:
    """One swap: what was asked for, how far it has come, and what became of it."""

    id: str
    path: str
    cause: Cause
    trial: Trial = Trial()
    state: State = "opening"
    reason: str | None = None  # why it was not promoted
    model: ModelName | None = None
    gate: tuple[Verdict, ...] = ()
    shadow: Comparison | None = None
    began_at: float = field(default_factory=time.time)  # seconds since 1970
    ended_at: float | None = None
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def content(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "id": self.id,
            "path": self.path,
            "cause": self.cause,
            "state": self.state,
            "reason": self.reason,
            "model": None if self.model is None else self.model.model_dump(),
            "gate": [asdict(verdict) for verdict in self.gate],
            "shadow": None if self.shadow is None else asdict(self.shadow),
            "began_at": self.began_at,
            "ended_at": self.ended_at,
        }


class _Rejected(Exception):
    """The new bundle is not promoted; the message says why."""


class _Hangs(_Rejected):
    """... and its engine cannot be closed."""


class Swaps:
    """One swap at a time, and what became of the last ones. Everything but the opening runs in the event loop.

    The steps: open and prove the new bundle's engines beside the old ones, in a thread; show them live pictures, if
    that is asked for; put them behind a queue and warm them; switch, between two requests. The old bundle finishes
    what it has begun and is kept ready for `rollback_seconds`: if the new one's engines fail, it is back. Then it is
    let go. Until that is done there is no other swap, so there are never more than two bundles in memory.
    """

    def __init__(self, service: Service, open_bundle: Callable[[Path], Opened]) -> None:
        self.history: deque[Swap] = deque(maxlen=_REMEMBERED)
        """Newest last; the one under way included."""
        self._service = service
        self._settings = service.settings
        self._open_bundle = open_bundle
        self._ids = count(1)
        self._task: asyncio.Task[None] | None = None
        self._again: Cause | None = None
        self._hanging: list[Worker] = []

    @property
    def _stopping(self) -> bool:
        return self._service.admission.draining or self._service.leaving

    @property
    def busy(self) -> bool:
        """Whether a swap is under way, or it is looked whether there should be one."""
        return self._task is not None and not self._task.done()

    def begin(self, path: Path, cause: Cause, trial: Trial | None = None) -> Swap:
        """Begin a swap to the bundle in folder `path`. Raises Draining, SwapInProgress or PathForbidden."""
        if self._stopping:
            raise Draining(_STOPPING)
        if self.busy:
            last = self.history[-1] if self.history else None
            if last is None or last.over.is_set():
                raise SwapInProgress(f"one at a time: it is looked whether {self._settings.bundle} has changed")
            raise SwapInProgress(f"one at a time: swap {last.id} to {last.path} is {last.state}")
        self._hanging = [worker for worker in self._hanging if worker.alive]
        if len(self._hanging) >= _MOST_HANGING:
            raise SwapInProgress(f"{len(self._hanging)} openings hang, and hold their memory; restart the server")
        root = self._settings.bundle_root if cause == "request" else None
        if cause == "request":
            path = _place(path, root)
        swap = self._note(path, cause, trial)

        async def run() -> None:
            await self._run(swap, path, root)
            await self._run_again()

        self._task = asyncio.get_running_loop().create_task(run())
        return swap

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
        while (cause := self._again) is not None and not self._stopping:
            self._again = None
            path = self._settings.bundle
            if await asyncio.to_thread(self._is_served, path):
                logger.info("%s: what it leads to is in service already", path)
            else:
                await self._run(self._note(path, cause), path, None)

    def _is_served(self, path: Path) -> bool:
        served = self._service.served
        try:
            path = path.resolve()
            return path == served.opened.path and read_manifest(path / MANIFEST_FILE) == served.manifest
        except (BundleError, OSError, RuntimeError):  # a swap to it will say what is wrong
            return False

    def _note(self, path: Path, cause: Cause, trial: Trial | None = None) -> Swap:
        swap = Swap(str(next(self._ids)), str(path), cause, trial or Trial())
        self.history.append(swap)
        logger.info("swap %s: to %s, by %s", swap.id, path, cause)
        return swap

    async def _run(self, swap: Swap, path: Path, root: Path | None) -> None:
        try:
            await self._swap(swap, path, root)
        except _Rejected as error:
            swap.state, swap.reason = "rejected", str(error)
        except asyncio.CancelledError:
            if swap.state in ("watched", "retiring"):
                swap.state = "promoted" if swap.reason is None else "rolled_back"
            else:
                swap.state, swap.reason = "rejected", _STOPPING
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

    async def _swap(self, swap: Swap, path: Path, root: Path | None) -> None:
        service = self._service
        opened = await self._open(path, root)
        swap.path, swap.model, swap.gate = str(opened.path), opened.engines[0].manifest.model, opened.verdicts
        try:
            self._check(opened)
            if swap.trial.percent:
                swap.state = "shadowing"
                await self._try(swap, opened)
        except _Hangs:
            raise
        except BaseException:
            await asyncio.to_thread(opened.close)
            raise
        swap.state = "warming"
        new = await self._warm(opened)
        old = service.switch(new)
        swap.state = "watched"
        swap.reason = await self._suspicion(new, old)
        if swap.reason is not None:
            service.switch(old)
        swap.state = "retiring"
        await service.retire(old if swap.reason is None else new)
        swap.state = "promoted" if swap.reason is None else "rolled_back"

    async def _open(self, path: Path, root: Path | None) -> Opened:
        worker = Worker("bundle")
        opening = worker.submit(_open_within, self._open_bundle, path, root)
        worker.stop()
        waiting = asyncio.wrap_future(opening)
        try:
            await self._in_time(waiting, "opening it")
        except BaseException:
            self._hanging.append(worker)
            waiting.add_done_callback(_forget)
            opening.add_done_callback(_close_late)
            raise
        try:
            return waiting.result()
        except (BundleError, StartupError, PathForbidden) as error:
            raise _Rejected(_explain(str(error))) from error
        except Exception as error:
            raise _Rejected(_explain(f"{type(error).__name__}: {error}")) from error

    def _check(self, opened: Opened) -> None:
        """A start may fall back to a slower engine, for there is nothing else; a swap may not."""
        if any(each.passed_over for each in self._service.served.verdicts):
            return  # what is in service has fallen back itself
        for verdict in opened.verdicts:
            if verdict.passed_over:
                raise _Rejected(
                    f"{'; '.join(verdict.passed_over)}; {verdict.engine} could stand in, but what serves now is better"
                )

    async def _try(self, swap: Swap, opened: Opened) -> None:
        trial = swap.trial
        shadow = Shadow(opened.engines[0], trial.percent, trial.least_agreement, self._service.metrics)
        self._service.shadow = shadow
        try:
            until_s = _now_s() + trial.seconds
            while (left_s := until_s - _now_s()) > 0 and not self._fails(shadow.so_far):
                self._go_on()
                await asyncio.sleep(min(_LOOK_S, left_s))
                swap.shadow = shadow.so_far
        finally:
            self._service.shadow = None
            at_rest = shadow.stop()
            await asyncio.wait([asyncio.wrap_future(at_rest)], timeout=_REST_S)
            if not at_rest.done():
                at_rest.add_done_callback(lambda _: opened.close())
                raise _Hangs("its engine hangs on a live picture")
        swap.shadow = seen = shadow.so_far
        if self._fails(seen):
            raise _Rejected(f"its engine failed on {seen.failed} of {seen.failed + seen.compared} live pictures")
        if seen.agreement < trial.least_agreement:
            raise _Rejected(
                f"over {seen.compared} live pictures its answers agree with those in service to {seen.agreement:.3f}, "
                f"asked for is {trial.least_agreement:g}"
            )

    def _fails(self, seen: Comparison) -> bool:
        share = self._settings.rollback_error_percent / 100
        return seen.failed >= LEAST_FAILURES and seen.failed > share * (seen.failed + seen.compared)

    async def _warm(self, opened: Opened) -> Served:
        new = Served(opened, self._settings, self._service.metrics, self._service.clock)
        warming = asyncio.ensure_future(new.warm())
        try:
            await self._in_time(warming, "warming it")
            warming.result()
            self._go_on()
        except BaseException as error:
            warming.cancel()
            await new.batcher.close()
            if isinstance(error, Exception) and not isinstance(error, _Rejected):
                raise _Rejected(_explain(f"its engine fails: {type(error).__name__}: {error}")) from error
            raise
        return new

    async def _suspicion(self, new: Served, old: Served) -> str | None:
        """Why the new bundle should make way for the old one again, if that shows while it is watched."""
        until_s = _now_s() + self._settings.rollback_seconds
        while (left_s := until_s - _now_s()) > 0 and not self._stopping:
            if old.batcher.works and (why := new.suspicion()) is not None:
                return why
            await asyncio.sleep(min(_LOOK_S, left_s))
        return None

    async def _in_time(self, work: asyncio.Future[Any], doing: str) -> None:
        """Wait until `work` is done. Raises _Rejected if that takes too long or the server stops."""
        until_s = _now_s() + self._settings.swap_timeout_seconds
        while not work.done():
            self._go_on()
            if _now_s() >= until_s:
                raise _Rejected(f"{doing} takes longer than {self._settings.swap_timeout_seconds:g} s")
            await asyncio.wait([work], timeout=_LOOK_S)

    def _go_on(self) -> None:
        if self._stopping:
            raise _Rejected(_STOPPING)


def _place(path: Path, root: Path | None) -> Path:
    """Where a posted path leads, by its letters. Raises PathForbidden."""
    if root is None:
        if not path.is_absolute():
            raise PathForbidden(f"{path} is not absolute; it may be relative where bundle_root is set")
        return path
    place = Path(os.path.normpath(root / path))
    _check_within(place, Path(os.path.normpath(root)), path)
    return place


def _check_within(place: Path, root: Path, path: Path) -> None:
    if not place.is_relative_to(root):
        raise PathForbidden(f"{path} leads out of bundle_root {root}")


def _open_within(open_bundle: Callable[[Path], Opened], path: Path, root: Path | None) -> Opened:
    """Open what `path` leads to, once links are followed. Raises PathForbidden if that is outside of `root`."""
    place = path.resolve()
    if root is not None:
        _check_within(place, root.resolve(), path)
    return open_bundle(place)


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


def _explain(reason: str) -> str:
    if "memory" in reason.lower():
        return f"{reason} (a swap needs memory for two bundles side by side)"
    return reason


def _close_late(opening: Future[Opened]) -> None:
    """What nobody waits for any more has been opened after all, or not."""
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()


def _forget(waiting: asyncio.Future[Opened]) -> None:
    if not waiting.cancelled():
        waiting.exception()


def _now_s() -> float:
    return asyncio.get_running_loop().time()
