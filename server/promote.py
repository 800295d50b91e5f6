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
from server.served import LEAST_FAILURES, Opened, Served
from server.service import Service
from server.shadow import MOST_BYTES, Comparison, Shadow
from server.worker import Worker

Cause = Literal["request", "signal", "watch", "build"]
State = Literal["opening", "shadowing", "warming", "watched", "retiring", "promoted", "rejected", "rolled_back"]

STOPPING = "the server is stopping"

_LOOK_S = 0.1  # between two looks at what may end a step early
_REST_S = 10.0  # longest that a shadow's last picture may take
_MOST_HANGING = 3
"""Openings and engines that may hang at once; their memory is lost until the process ends."""


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
            "began_at": self.began_at,
            "ended_at": self.ended_at,
        }


class Rejected(Exception):
    """The new bundle is not promoted; the message says why."""


class WrongAnswers(Rejected):
    """... an engine of it was held against its proof, and failed."""


class _Hangs(Rejected):
    """... and its engine cannot be closed."""


class Promotion:
    """The steps of a swap. Everything but the opening runs in the event loop.

    Open and prove the new bundle's engines beside the old ones, in a thread; show them live pictures, if that is asked
    for; put them behind a queue and warm them; switch, between two requests. The old bundle finishes what it has begun
    and is kept ready for `rollback_seconds`: if the new one's engines fail, it is back. Then it is let go, and `run`
    ends, so there are never more than two bundles in memory.
    """

    def __init__(self, service: Service, open_bundle: Callable[[Path], Opened]) -> None:
        self._service = service
        self._settings = service.settings
        self._open_bundle = open_bundle
        self._hanging: list[Future[Any]] = []  # done when what hangs has come to its end

    async def run(self, swap: Swap, path: Path, root: Path | None) -> None:
        """See a swap through, to what the folder `path` leads to; if there is a `root`, below that.

        Raises Rejected, or whatever nobody foresaw; cancelled, it leaves in service what is in service.
        """
        service = self._service
        opened = await self._open(path, root)
        swap.path, swap.model, swap.gate = str(opened.path), opened.engines[0].manifest.model, opened.verdicts
        try:
            self._check(opened)
            if swap.trial.percent:
                swap.state = "shadowing"
                await self._try(swap, opened)
            new = Served(opened, self._settings, service.metrics, service.clock)
        except _Hangs:
            raise
        except BaseException:
            await asyncio.to_thread(opened.close)
            raise
        swap.state = "warming"
        await self._warm(new)
        old = service.switch(new)
        swap.state = "watched"
        swap.reason = await self._suspicion(new, old)
        if swap.reason is not None:
            service.switch(old)
        swap.state = "retiring"
        await service.retire(old if swap.reason is None else new)
        swap.state = "promoted" if swap.reason is None else "rolled_back"

    async def _open(self, path: Path, root: Path | None) -> Opened:
        self._hanging = [each for each in self._hanging if not each.done()]
        if len(self._hanging) >= _MOST_HANGING:
            raise Rejected(f"{len(self._hanging)} openings or engines hang, and hold their memory; restart the server")
        worker = Worker("bundle")
        opening = worker.submit(_open_within, self._open_bundle, path, root)
        worker.stop()
        waiting = asyncio.wrap_future(opening)
        try:
            await self._in_time(waiting, "opening it")
        except BaseException:
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
                self._hanging.append(at_rest)
                at_rest.add_done_callback(lambda _: opened.close())
                raise _Hangs("its engine hangs on a live picture")
        swap.shadow = seen = shadow.so_far
        if self._fails(seen):
            raise Rejected(f"its engine failed on {seen.failed} of {seen.failed + seen.compared} live pictures")
        if not seen.compared:
            raise Rejected(
                f"no live picture was compared: {seen.dropped} dropped (it was busy, or they take more than "
                f"{MOST_BYTES >> 20} MiB), {seen.failed} failed; try for longer, or with more percent"
            )
        if seen.agreement < trial.least_agreement:
            raise Rejected(
                f"over {seen.compared} live pictures its answers agree with those in service to {seen.agreement:.3f}, "
                f"asked for is {trial.least_agreement:g}"
            )

    def _fails(self, seen: Comparison) -> bool:
        share = self._settings.rollback_error_percent / 100
        return seen.failed >= LEAST_FAILURES and seen.failed > share * (seen.failed + seen.compared)

    async def _warm(self, new: Served) -> None:
        warming = asyncio.ensure_future(new.warm())
        try:
            await self._in_time(warming, "warming it")
            warming.result()
            self._go_on()
        except BaseException as error:
            warming.cancel()
            self._hanging += await new.batcher.close()
            if isinstance(error, Exception) and not isinstance(error, Rejected):
                raise Rejected(_explain(f"its engine fails: {type(error).__name__}: {error}")) from error
            raise

    async def _suspicion(self, new: Served, old: Served) -> str | None:
        """Why the new bundle should make way for the old one again, if that shows while it is watched."""
        until_s = _now_s() + self._settings.rollback_seconds
        while (left_s := until_s - _now_s()) > 0 and not self._service.stopping:
            if old.batcher.works and (why := new.suspicion()) is not None:
                return why
            await asyncio.sleep(min(_LOOK_S, left_s))
        return None

    async def _in_time(self, work: asyncio.Future[Any], doing: str) -> None:
        """Wait until `work` is done. Raises Rejected if that takes too long or the server stops."""
        until_s = _now_s() + self._settings.swap_timeout_seconds
        while not work.done():
            self._go_on()
            if _now_s() >= until_s:
                raise Rejected(f"{doing} takes longer than {self._settings.swap_timeout_seconds:g} s")
            await asyncio.wait([work], timeout=_LOOK_S)

    def _go_on(self) -> None:
        if self._service.stopping:
            raise Rejected(STOPPING)


def check_within(place: Path, root: Path, path: Path) -> None:
    """Raise PathForbidden if `place`, where `path` leads, is not below `root`."""
    if not place.is_relative_to(root):
        raise PathForbidden(f"{path} leads out of bundle_root {root}")


def _open_within(open_bundle: Callable[[Path], Opened], path: Path, root: Path | None) -> Opened:
    """Open what `path` leads to, once links are followed. Raises PathForbidden if that is outside of `root`."""
    place = path.resolve()
    if root is not None:
        check_within(place, root.resolve(), path)
    return open_bundle(place)


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
