"""A built engine against its bundle's proof, where this machine has a GPU that it runs on."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import plugins
from bundle import Canvas, EngineRecord, ParityRecord
from export.engine_layers import check_built, read_layers
from export.verify import ParityError
from parity import GateReport, Proof, run_gate
from runtime import Gpu, NoGpu, NotInstalled, OutOfGpuMemory, TensorRTSession, gpus, open_tensorrt

_SHOWN = 3


class CannotRun(RuntimeError):
    """The engine cannot be run here, which says nothing about it; the message says why."""


class EngineWrong(ParityError):
    """The engine runs, and its answers are not PyTorch's; the message has the first figures and where."""


def gpu_for(record: EngineRecord) -> Gpu:
    """The first GPU of this machine that runs the engine. Raises CannotRun."""
    try:
        there = gpus()
    except (NotInstalled, NoGpu) as error:
        raise CannotRun(str(error)) from error
    for gpu in there:
        if record.runs_on(gpu.arch):
            return gpu
    raise CannotRun(
        f"it is for {', '.join(record.targets or (record.arch,))}, this machine's GPUs are "
        f"{', '.join(f'{gpu.name} ({gpu.arch})' for gpu in there)}"
    )


def gate_engine(path: Path, record: EngineRecord, proof: Proof, device: int, progress: Any = None) -> GateReport:
    """Run the engine in file `path` on GPU number `device` in batches of 1, the typical size and the largest.

    Raises CannotRun for lack of memory or of TensorRT, EngineWrong where it answers wrong, LayersWrong where it says
    itself that its layers are of another precision, and what `runtime` raises where TensorRT refuses it on the GPU that
    it was built for.
    """
    built_with = record.built_with.get(record.flavour, "")
    try:
        session = open_tensorrt(path, record.flavour, device, plugins.tensorrt_library(), built_with)
    except (NotInstalled, OutOfGpuMemory) as error:
        raise CannotRun(str(error)) from error
    with closing(session):
        sizes = {profile.typical_batch_size for profile in record.profiles}
        sizes |= {profile.max_batch_size for profile in record.profiles}
        infer = _Infer(session)
        report = run_gate(infer, proof, record.exactness, [1, *sorted(sizes - {1})], progress=progress)
        if report.passed:
            _check_layers(session, record, progress or (lambda _: None))
    if infer.lacked is not None:
        raise CannotRun(str(infer.lacked)) from infer.lacked
    if not report.passed:
        more = len(report.failures) - _SHOWN
        said = "; ".join(report.failures[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")
        raise EngineWrong(f"{record.file} answers wrong and is not published: {said}")
    return report


def _check_layers(session: TensorRTSession, record: EngineRecord, say: Callable[[str], None]) -> None:
    """Hold what the engine says of its layers against its precision. Raises LayersWrong; silence proves nothing."""
    try:
        layers = read_layers(session.layer_information())
    except Exception as error:  # its answers are right, and this has not been seen on every release
        say(f"{type(error).__name__}: {' '.join(str(error).split())}")
        return
    check_built(layers, record.precision)
    say(layers.line)


class _Infer:
    """The session as the gate asks it, which takes every exception for the engine's fault."""

    def __init__(self, session: TensorRTSession) -> None:
        self._session = session
        self.lacked: OutOfGpuMemory | None = None
        """What it lacked: memory is asked for by the first batch of each kind, and the machine's trouble."""

    def __call__(self, images: NDArray[np.uint8], sizes: NDArray[np.int64]) -> Sequence[NDArray[Any]]:
        try:
            answer = self._session.infer(images, sizes)
        except OutOfGpuMemory as error:
            self.lacked = error
            raise
        return answer.boxes, answer.scores, answer.labels


def parity_records(report: GateReport, engine: str) -> tuple[ParityRecord, ...]:
    """The gate's figures for the manifest, one for each canvas and batch size."""
    by_kind: dict[tuple[Canvas, int], list[Any]] = defaultdict(list)
    for row in report.rows:
        by_kind[row.canvas, row.batch_size].append(row.figures)
    return tuple(
        ParityRecord(
            canvas=canvas,
            batch_size=batch_size,
            max_box_error=max(figures.box_max for figures in found),
            max_score_error=max(figures.score_max for figures in found),
            engine=engine,
            detections_compared=sum(figures.paired for figures in found),
        )
        for (canvas, batch_size), found in by_kind.items()
    )
