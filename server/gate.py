"""No engine is served before its answers are right: opens what there is, best first, and holds it against the proof."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from bundle import Bundle, Canvas
from parity.gate import FIGURE_NAMES, GateReport, run_gate
from parity.proof import Proof, ProofInvalid, read_proof
from runtime import OutOfGpuMemory
from server.engine import Candidate, Engine, candidates, passed_over, run_engine
from server.errors import ParityFailed, StartupError
from server.settings import Settings

if TYPE_CHECKING:
    from server.metrics import Metrics

logger = logging.getLogger("ddetr.gate")

_SHOWN_FAILURES = 3
_ONNX_RUNTIME = {"engine": "onnxruntime", "precision": "auto"}  # one asked for may have no graph, or a wrong one

Result = Literal["passed", "no proof", "off", "not asked"]
"""Of an engine in service; "not asked": it was handed over as an object."""


@dataclass(frozen=True)
class Verdict:
    """How an engine came to be served."""

    engine: str
    result: Result
    precision: str = ""
    compared: int = 0  # answers to pictures
    left_out: tuple[str, ...] = ()  # what there was no time for: "canvas 800x1344 in batches of 4"
    worst: dict[str, float] = field(default_factory=dict)  # figure to the worst of all answers
    seconds: float = 0.0
    passed_over: tuple[str, ...] = ()  # better engines whose answers are wrong, and what was wrong with them
    unavailable: tuple[str, ...] = ()  # better engines that could not be opened here, and why


@dataclass(frozen=True, eq=False)
class Proven:
    """An engine that may be served, and why."""

    engine: Engine
    verdict: Verdict


class GivenUp(Exception):
    """Nobody waits for the engine any more."""


def open_proven(
    settings: Settings,
    bundle: Bundle,
    metrics: Metrics,
    seconds: float | None = None,
    compared: set[tuple[str, str]] | None = None,
    given_up: Callable[[], bool] = lambda: False,
) -> Proven:
    """The best engine for `bundle` that opens on this machine and answers right.

    `seconds` as for `prove`; by default the settings' `gate_seconds`. `compared`: source and precision of engines that
    had that time, so that more of their kind need none; this one's is put there. A TensorRT engine without a proof
    counts as wrong. Raises StartupError where nothing opens, its kind ParityFailed where an engine's answers are wrong
    and the settings refuse others, or those of all are wrong, and GivenUp once `given_up` says so between two steps.
    """
    proof = _read_proof(settings, bundle)
    seconds = settings.gate_seconds if seconds is None else seconds
    compared = set() if compared is None else compared
    unavailable = list(passed_over(settings, bundle))
    for why in unavailable:
        logger.info("passed over %s", why)
    wrong: list[str] = []
    closed: list[str] = []

    def refuse(candidate: Candidate, name: str, error: ParityFailed) -> None:
        metrics.parity_failures.labels(candidate.name).inc()
        wrong.append(f"{name}: {error}")
        logger.error("not served: %s", wrong[-1])
        if settings.on_parity_failure == "refuse":
            raise ParityFailed(f"{wrong[-1]} (on_parity_failure=fallback would try the next engine)") from error

    def give_up(candidate: Candidate, error: StartupError) -> None:
        logger.warning("passed over %s: %s", candidate.name, error)
        closed.append(str(error))
        unavailable.append(f"{candidate.name}: {error}")

    for candidate in _in_turn(settings, bundle, wrong):
        if given_up():
            raise GivenUp
        if candidate.needs_proof and proof is None and settings.gate:
            unproven = ParityFailed(f"{bundle.path} carries no proof of its answers: export it anew, or set --no-gate")
            refuse(candidate, candidate.name, unproven)
            continue
        try:
            engine = candidate.open()
        except StartupError as error:
            give_up(candidate, error)
            continue
        kind = (candidate.source or candidate.name, candidate.precision)
        try:
            if proof is None:
                verdict = Verdict(engine.name, "no proof" if settings.gate else "off", candidate.precision)
            else:
                limit_s = 0.0 if kind in compared else seconds
                verdict = prove(engine, proof, candidate.precision, settings.max_batch_size, limit_s, given_up)
        except ParityFailed as error:
            engine.close()
            refuse(candidate, engine.name, error)
            continue
        except StartupError as error:
            engine.close()
            give_up(candidate, error)
            continue
        except BaseException:
            engine.close()
            raise
        compared.add(kind)
        if verdict.result == "passed":
            logger.info("%s: %d answers are right, in %.1f s", engine.name, verdict.compared, verdict.seconds)
        elif settings.gate:
            logger.warning("%s carries no proof: nobody knows whether %s answers right", bundle.path, engine.name)
        return Proven(engine, replace(verdict, passed_over=tuple(wrong), unavailable=tuple(unavailable)))
    if wrong:
        raise ParityFailed("no engine answers right: " + "; ".join([*wrong, *closed]))
    raise StartupError("; ".join(closed))


def prove(
    engine: Engine,
    proof: Proof,
    precision: str,
    max_batch_size: int,
    seconds: float,
    given_up: Callable[[], bool] = lambda: False,
) -> Verdict:
    """Hold an engine against its bundle's proof: one batch of one on every canvas, and more while there is time.

    More is batches as large as they come, then smaller ones: each is begun only if it will likely be over when
    `seconds` are. Raises ParityFailed, with the first of what is wrong, StartupError where memory does not suffice, and
    GivenUp.
    """
    began_s = time.monotonic()
    infer = _Infer(engine)
    canvases = engine.manifest.canvases
    reports: list[GateReport] = []
    left_out: list[str] = []

    def compare(batch_size: int, canvas: Canvas) -> None:
        if given_up():
            raise GivenUp
        report = run_gate(infer, proof, precision, [batch_size], canvases=[canvas], rounds=1)
        if infer.lacked is not None:
            raise StartupError(f"{engine.name} could not be compared: {infer.lacked}") from infer.lacked
        if not report.passed:
            failures = "; ".join(report.failures[:_SHOWN_FAILURES])
            more = len(report.failures) - _SHOWN_FAILURES
            raise ParityFailed(f"{failures}; and {more} more" if more > 0 else failures)
        reports.append(report)

    for canvas in canvases:
        compare(1, canvas)
    for batch_size in _batch_sizes(max_batch_size):
        for canvas in canvases:
            likely_s = batch_size * infer.image_s[canvas]
            if time.monotonic() - began_s + likely_s > seconds:
                left_out.append(f"canvas {canvas} in batches of {batch_size}")
            else:
                compare(batch_size, canvas)
    rows = [row for report in reports for row in report.rows]
    worst = {name: max(float(getattr(row.figures, name)) for row in rows) for name in FIGURE_NAMES}
    taken_s = time.monotonic() - began_s
    return Verdict(engine.name, "passed", precision, len(rows), tuple(left_out), worst, taken_s)


class _Infer:
    """The engine as the gate asks it: pictures on a canvas in, boxes, scores and labels out."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.image_s: dict[Canvas, float] = {}
        """Seconds of an image in the newest batch of a canvas."""
        self.lacked: Exception | None = None
        """What it lacked, if it had not memory enough: the machine's trouble."""

    def __call__(self, images: NDArray[np.uint8], sizes: NDArray[np.int64]) -> Sequence[NDArray[np.generic]]:
        """images [n, H, W, 3], sizes [n, 2] (h, w)."""
        canvas = Canvas(height=images.shape[1], width=images.shape[2])
        cut = [image[:height, :width] for image, (height, width) in zip(images, sizes.tolist(), strict=True)]
        began_s = time.monotonic()
        try:
            raw = run_engine(self._engine, cut, canvas)
        except (OutOfGpuMemory, MemoryError) as error:  # the gate takes every exception for a wrong answer
            self.lacked = error
            raise
        self.image_s[canvas] = (time.monotonic() - began_s) / len(cut)
        return raw.boxes, raw.scores, raw.labels


def _read_proof(settings: Settings, bundle: Bundle) -> Proof | None:
    if not settings.gate:
        return None
    try:
        return read_proof(bundle)
    except ProofInvalid as error:
        raise ParityFailed(f"the proof cannot be used: {error}") from error


def _in_turn(settings: Settings, bundle: Bundle, wrong: Sequence[str]) -> Iterator[Candidate]:
    """The settings' engines; once one is found `wrong`, ONNX Runtime, too, whatever they ask for."""
    tried = set()
    for candidate in candidates(settings, bundle):
        tried.add((candidate.name, candidate.precision))
        yield candidate
    for device in (settings.device, "cpu"):
        if wrong:
            with suppress(StartupError):  # there is none
                for candidate in candidates(settings.model_copy(update=_ONNX_RUNTIME | {"device": device}), bundle):
                    if (candidate.name, candidate.precision) not in tried:
                        tried.add((candidate.name, candidate.precision))
                        yield candidate


def _batch_sizes(most: int) -> list[int]:
    """Above 1, the most telling first: all slots; then the powers of two, whose kernels may be others."""
    smaller = [2**power for power in range(1, most.bit_length()) if 2**power < most]
    return [most, *smaller] if most > 1 else []
