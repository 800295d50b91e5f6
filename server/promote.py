"""How a new bundle gets into service without losing a request: the steps of one swap, and what is told of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from bundle import BundleError, ModelName
from server.errors import ParityFailed, PathForbidden, StartupError
from server.gate import Verdict
from server.served import CLOSE_S, LEAST_FAILURES, Opened, Served
from server.service import Service
from server.settings import Settings
from server.shadow import MOST_BYTES, Comparison, Shadow
from server.worker import Worker

Cause = Literal["request", "signal", "watch", "build"]
State = Literal["opening", "warming", "shadowing", "watched", "retiring", "promoted", "rejected", "rolled_back"]

OpenBundle = Callable[[Path, Callable[[], bool]], Opened]
"""Opens the bundle in a folder; asked between steps whether that has been given up, it ends early by raising."""

STOPPING = "the server is stopping"

_LOOK_S = 0.1  # between two looks at what may end a step early
_REST_S = 10.0  # longest that a shadow's last picture may take
_MOST_HANGING = 3
"""Openings and engines that may hang at once; their memory is lost until the process ends."""
_SOON = 20  # pictures compared after the switch, from which on disagreement is acted upon at once


@dataclass(frozen=True)
class Trial:
    """How a new bundle is tried on live pictures before it is switched to, and held against the old one after it."""

    percent: float = 0.0
    seconds: float = 60.0
    least_agreement: float = 0.8

    @classmethod
    def of(cls, settings: Settings) -> Trial:
        """As the settings say."""
        return cls(settings.shadow_percent, settings.shadow_seconds, settings.min_agreement)


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
    shadow_after: Comparison | None = None
    given_up: str | None = None  # why it is to be ended, if it can be
    began_at: float = field(default_factory=time.time)  # seconds since 1970
    ended_at: float | None = None
    wrong_answers: bool = False  # of an engine: that is why
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
            "shadow_after": None if self.shadow_after is None else asdict(self.shadow_after),
            "began_at": self.began_at,
            "ended_at": self.ended_at,
        }


class Rejected(Exception):
    """The new bundle is not promoted; the message says why."""


class WrongAnswers(Rejected):
    """... an engine of it was held against its proof, and failed."""


class _Hangs(Rejected):
    """... its engine hangs: to wait until it is closed is no use."""


class Promotion:
    """The steps of a swap. Everything but the opening runs in the event loop.

    Open and prove the new bundle's engines beside the old ones, in a thread; put them behind a queue and warm them;
    show them live pictures, if that is asked for; switch, between two requests. The old bundle finishes what it has
    begun and is kept ready for `rollback_seconds`, shown as many of the live pictures: if the new one's engines fail,
    or the two agree too little, it is back. Then the other is let go, and `run` ends, so there are never more than two
    bundles in memory.
    """

    def __init__(self, service: Service, open_bundle: OpenBundle) -> None:
        self._service = service
        self._settings = service.settings
        self._open_bundle = open_bundle
        self._hanging: list[Future[Any]] = []  # done when what hangs has come to its end

    async def run(self, swap: Swap, path: Path, root: Path | None) -> None:
        """See a swap through, to what the folder `path` leads to; if there is a `root`, below that.

        Raises Rejected, or whatever nobody foresaw; cancelled, it leaves in service what is in service.
        """
        service = self._service
        opened = await self._open(swap, path, root)
        swap.path, swap.model, swap.gate = str(opened.path), opened.engines[0].manifest.model, opened.verdicts
        try:
            self._check(opened)
            new = Served(opened, self._settings, service.metrics, service.clock)
        except BaseException:
            await asyncio.to_thread(opened.close)
            raise
        try:
            swap.state = "warming"
            await self._warm(swap, new)
            if swap.trial.percent:
                swap.state = "shadowing"
                service.look_after(new)
                await self._try(swap, new)
        except BaseException as error:
            patience_s = CLOSE_S if isinstance(error, Rejected) and not isinstance(error, _Hangs) else 0.0
            self._hanging += await service.retire(new, patience_s)
            raise
        old = service.switch(new)
        swap.state = "watched"
        swap.reason = await self._watch(swap, new, old)
        if swap.reason is not None:
            service.switch(old)
        swap.state = "retiring"
        self._hanging += await service.retire(old if swap.reason is None else new)
        swap.state = "promoted" if swap.reason is None else "rolled_back"

    async def _open(self, swap: Swap, path: Path, root: Path | None) -> Opened:
        self._hanging = [each for each in self._hanging if not each.done()]
        if len(self._hanging) >= _MOST_HANGING:
            raise Rejected(f"{len(self._hanging)} openings or engines hang, and hold their memory; restart the server")
        worker = Worker("bundle")
        left = False

        def given_up() -> bool:
            return left or swap.given_up is not None or self._service.stopping

        opening = worker.submit(_open_within, self._open_bundle, path, root, given_up)
        worker.stop()
        waiting = asyncio.wrap_future(opening)
        try:
            await self._in_time(swap, waiting, Rejected("opening it takes longer than"))
        except BaseException:
            left = True
            self._hanging.append(opening)
            waiting.add_done_callback(_forget)
            opening.add_done_callback(_close_late)
            raise
        try:
            return waiting.result()
        except ParityFailed as error:
            raise WrongAnswers(_explain(str(error))) from error
        except (BundleError, StartupError, PathForbidden) as error:
            raise Rejected(_explain(str(error))) from error
        except Exception as error:
            raise Rejected(_explain(f"{type(error).__name__}: {error}")) from error

    def _check(self, opened: Opened) -> None:
        """A start may fall back to a slower engine, or one without a proof, for there is nothing else; a swap may not.

        What is in service may have fallen back itself. Where engines are built in the background one that cannot be
        opened here is no reason: it will be built.
        """
        served = self._service.served.verdicts
        for verdict in opened.verdicts:
            stands_in = f"{verdict.engine} could stand in, but what serves now is better"
            if verdict.result == "no proof" and any(each.result == "passed" for each in served):
                raise Rejected(
                    f"{opened.path} carries no proof that its answers are right, and what serves now has passed: "
                    "export it anew, or start the server with --no-gate"
                )
            if verdict.passed_over and not any(each.passed_over for each in served):
                raise WrongAnswers(f"{'; '.join(verdict.passed_over)}; {stands_in}")
            if self._settings.build_engine == "never" and _worse(verdict, served):
                raise Rejected(f"{'; '.join(verdict.unavailable)}; {stands_in}")

    async def _try(self, swap: Swap, new: Served) -> None:
        trial = swap.trial
        until_s = _now_s() + trial.seconds
        shadow = self._show_to(new, trial)
        try:
            while (left_s := until_s - _now_s()) > 0 and not self._fails(shadow.so_far) and not new.batcher.losses:
                self._go_on(swap)
                await asyncio.sleep(min(_LOOK_S, left_s))
                swap.shadow = shadow.so_far
            self._service.shadow = None
            if not await shadow.rest(_REST_S):
                raise _Hangs("its engine hangs on a live picture")
            self._go_on(swap)
        finally:
            self._service.shadow = None
            shadow.stop()
            swap.shadow = seen = shadow.so_far
        if self._fails(seen):
            raise Rejected(f"its engine failed on {seen.failed} of {seen.failed + seen.compared} live pictures")
        if new.batcher.losses:
            raise Rejected("its engine died or hung on a live picture")
        if not seen.compared:
            raise Rejected(
                f"no live picture was compared: {seen.dropped} dropped (it was busy), {seen.too_large} larger than "
                f"{MOST_BYTES >> 20} MiB, {seen.failed} failed; try for longer, or with more percent"
            )
        if seen.agreement < trial.least_agreement:
            raise Rejected(
                f"over {seen.compared} live pictures its answers agree with those in service to {seen.agreement:.3f}, "
                f"asked for is {trial.least_agreement:g}"
            )

    def _show_to(self, served: Served, trial: Trial) -> Shadow:
        service = self._service
        service.shadow = Shadow(served, trial.percent, trial.least_agreement, service.metrics, service.clock)
        return service.shadow

    def _fails(self, seen: Comparison) -> bool:
        share = self._settings.rollback_error_percent / 100
        return seen.failed >= LEAST_FAILURES and seen.failed > share * (seen.failed + seen.compared)

    async def _warm(self, swap: Swap, new: Served) -> None:
        warming = asyncio.ensure_future(new.warm())
        try:
            await self._in_time(swap, warming, _Hangs("warming it takes longer than"))
            warming.result()
            self._go_on(swap)
        except Exception as error:
            if isinstance(error, Rejected):
                raise
            raise Rejected(_explain(f"its engine fails: {type(error).__name__}: {error}")) from error
        finally:
            warming.cancel()

    async def _watch(self, swap: Swap, new: Served, old: Served) -> str | None:
        """Why the new bundle should make way for the old one again, if that shows while it is watched."""
        until_s = _now_s() + self._settings.rollback_seconds
        shadow = self._show_to(old, swap.trial) if swap.trial.percent else None
        why: str | None = None
        try:
            while why is None and not self._service.stopping:
                left_s = until_s - _now_s()
                if shadow is not None:
                    swap.shadow_after = shadow.so_far
                if old.batcher.works:
                    why = swap.given_up or new.suspicion() or _differs(swap, _SOON if left_s > 0 else LEAST_FAILURES)
                if left_s <= 0:
                    break
                if why is None:
                    await asyncio.sleep(min(_LOOK_S, left_s))
            return why
        finally:
            self._service.shadow = None
            if shadow is not None:
                shadow.stop()

    async def _in_time(self, swap: Swap, work: asyncio.Future[Any], late: Rejected) -> None:
        """Wait until `work` is done. Raises what `_go_on` does, and `late`, with the seconds, if it takes too long."""
        until_s = _now_s() + self._settings.swap_timeout_seconds
        while not work.done():
            self._go_on(swap)
            if _now_s() >= until_s:
                raise type(late)(f"{late} {self._settings.swap_timeout_seconds:g} s")
            await asyncio.wait([work], timeout=_LOOK_S)
        self._go_on(swap)

    def _go_on(self, swap: Swap) -> None:
        if self._service.stopping:
            raise Rejected(STOPPING)
        if swap.given_up is not None:
            raise Rejected(swap.given_up)


def _differs(swap: Swap, least: int) -> str | None:
    """Why the old bundle's answers to `least` pictures or more are reason enough to go back to it, if they are."""
    seen, trial = swap.shadow_after, swap.trial
    if seen is None or seen.compared < least or seen.agreement >= trial.least_agreement:
        return None
    return (
        f"over {seen.compared} live pictures after the switch its answers agree with the old bundle's to "
        f"{seen.agreement:.3f}, asked for is {trial.least_agreement:g}"
    )


def check_within(place: Path, root: Path, path: Path) -> None:
    """Raise PathForbidden if `place`, where `path` leads, is not below `root`."""
    if not place.is_relative_to(root):
        raise PathForbidden(f"{path} leads out of bundle_root {root}")


def _open_within(open_bundle: OpenBundle, path: Path, root: Path | None, given_up: Callable[[], bool]) -> Opened:
    """Open what `path` leads to, once links are followed. Raises PathForbidden if that is outside of `root`."""
    place = path.resolve()
    if root is not None:
        check_within(place, root.resolve(), path)
    return open_bundle(place, given_up)


def _worse(verdict: Verdict, served: Sequence[Verdict]) -> bool:
    """Whether better engines could not be opened, and what serves has no such lack, or a lesser one."""
    if not verdict.unavailable or any(each.result == "not asked" for each in served):
        return False
    if not any(each.unavailable for each in served):
        return True
    return _on_onnx_runtime(verdict) and not any(map(_on_onnx_runtime, served))


def _on_onnx_runtime(verdict: Verdict) -> bool:
    return verdict.engine.startswith("onnxruntime")


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
