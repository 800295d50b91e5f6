"""A bundle's TensorRT engine, in the package `runtime`. It has not run on a GPU yet: tests hold it to a double."""

import logging
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import plugins
from bundle import Bundle, Canvas, EngineMismatch, EngineRecord, Manifest, find_engine
from runtime import Answer, Gpu, NotInstalled, RuntimeUnavailable, Staged, TensorRTSession, gpus, open_tensorrt
from runtime.flavour import load_flavour
from runtime.session import MOST_PROGRAMS
from server.engine import Candidate, PassedOver, RawDetections
from server.engine_cache import EngineCache, NoRecipe, recipe_for
from server.errors import StartupError
from server.preprocess import Pixels, lay_in
from server.settings import Settings

logger = logging.getLogger("ddetr.engine")

_ORDER = (("tensorrt", "fp16"), ("tensorrt", "fp32"), ("rtx", "fp16"), ("rtx", "fp32"))


def tensorrt_ways(settings: Settings, bundle: Bundle) -> list[Candidate | PassedOver]:
    """The engines of the bundle for this machine's GPU, best first, or why there is none."""
    if settings.precision == "int8":
        return [PassedOver("tensorrt", "it has no int8 here; precision int8 runs in ONNX Runtime on the CPU")]
    builds = settings.build_engine != "never"
    if not bundle.manifest.engines and not builds:
        return [PassedOver("tensorrt", "the bundle has no engine (ddetr build adds one)")]
    try:
        gpu = find_gpu(settings.device)
    except RuntimeUnavailable as error:
        return [PassedOver("tensorrt", str(error))]
    ways: list[Candidate | PassedOver] = []
    why = ""
    for flavour, precision in _ORDER:
        if settings.precision not in ("auto", precision):
            continue
        try:
            record = find_engine(bundle, flavour, gpu.arch, precision)
        except EngineMismatch as error:
            why = why or str(error)
            continue
        name = f"tensorrt {record.file} on cuda:{gpu.index}"
        refusal = _of_another_version(record) or _too_small(record, bundle.manifest, settings.max_batch_size)
        if refusal:
            ways.append(PassedOver(name, refusal))
        else:
            ways.append(_candidate(name, bundle, settings, record, gpu, bundle.path / record.file))
    if builds and not any(isinstance(way, Candidate) for way in ways):
        ways.append(_built(settings, bundle, gpu))
    return ways or [PassedOver("tensorrt", why)]


def _candidate(name: str, bundle: Bundle, settings: Settings, record: EngineRecord, gpu: Gpu, path: Path) -> Candidate:
    opening = partial(TensorRTEngine, bundle, settings, record, gpu, path)
    return Candidate(name, record.exactness, opening, source=f"{record.sha256} on {gpu.name}", needs_proof=True)


def _of_another_version(record: EngineRecord) -> str:
    """Why the installed TensorRT does not take an engine, as far as its record tells; empty where it may.

    It takes engines of its own major and minor version; `ddetr build` makes none that are compatible with others.
    """
    try:
        installed = str(load_flavour(record.flavour).__version__)
    except NotInstalled as error:
        return str(error)
    built_with = record.built_with.get(record.flavour, installed)
    if built_with.split(".")[:2] == installed.split(".")[:2]:
        return ""
    return f"it was built with {record.flavour} {built_with}, and {installed} is installed: build it again"


def _built(settings: Settings, bundle: Bundle, gpu: Gpu) -> Candidate | PassedOver:
    """The engine that was built for this bundle here."""
    cache = EngineCache(settings.engine_cache)
    try:
        recipe = recipe_for(settings, bundle, gpu)
    except NoRecipe as error:
        return PassedOver("tensorrt", str(error))
    kept = cache.find(recipe)
    if kept is None:
        failed = cache.failure(recipe)
        why = "none is built yet" if failed is None else f"none could be built: {failed}"
        return PassedOver("tensorrt", f"for {gpu.name} ({gpu.arch}) {why}", comes=True)
    record, path = kept
    name = f"tensorrt {record.file}, built here, on cuda:{gpu.index}"
    return _candidate(name, bundle, settings, record, gpu, path)


class TensorRTEngine:
    """One instance: contexts, buffers and streams of its own. Every batch size is run before the first request."""

    def __init__(
        self,
        bundle: Bundle,
        settings: Settings,
        record: EngineRecord,
        gpu: Gpu,
        path: Path,
    ) -> None:
        """Raises StartupError."""
        self.manifest: Manifest = bundle.manifest
        began_s = time.monotonic()
        try:
            self._session = _open(path, record, gpu, settings.engine_cache)
        except Exception as error:
            raise _refused(path, error) from error
        try:
            self._check(path, settings.max_batch_size)
            for canvas in self.manifest.canvases:
                for count in _warmed(settings.max_batch_size, len(self.manifest.canvases)):
                    self._session.warm(count, canvas.height, canvas.width)
            self._session.keep_kernels()
        except BaseException as error:
            self._session.close()
            if isinstance(error, Exception):
                raise _refused(path, error) from error
            raise
        graphs = "CUDA graphs" if self._session.graphs else "no CUDA graphs"
        self.name = f"{self._session.name}, {record.precision}, {graphs}"
        logger.info("%s, ready in %.1f s", self.name, time.monotonic() - began_s)

    def prepare(self, images: Sequence[Pixels], canvas: Canvas) -> Staged:
        """The batch on its way to the GPU, while another may be computed."""
        staged = self._session.stage(len(images), canvas.height, canvas.width)
        lay_in(images, staged.images, staged.sizes)
        self._session.upload(staged)
        return staged

    def infer(self, inputs: Staged) -> Staged:
        """The batch, queued."""
        return self._session.run(inputs)

    def finish(self, outputs: Staged) -> RawDetections:
        """The answer, waited for."""
        answer: Answer = self._session.fetch(outputs)
        return RawDetections(answer.boxes, answer.scores, answer.labels)

    def close(self) -> None:
        """Give back the GPU's memory."""
        self._session.close()

    def _check(self, path: Path, max_batch_size: int) -> None:
        """Raises StartupError where the engine does not take every batch that will come."""
        most = {(each.height, each.width): each.most for each in reversed(self._session.profiles)}
        for canvas in self.manifest.canvases:
            if (takes := most.get((canvas.height, canvas.width), 0)) < max_batch_size:
                raise StartupError(_refusal(path.name, canvas, takes, max_batch_size))


def _refused(path: Path, error: Exception) -> StartupError:
    """Whatever TensorRT's bindings raise, of a version that nobody has tried: the next kind of engine may do."""
    if isinstance(error, StartupError):
        return error
    return StartupError(str(error) if isinstance(error, RuntimeUnavailable) else f"{path}: {error!r}")


def _warmed(max_batch_size: int, canvases: int) -> list[int]:
    """The batch sizes to run before requests come: all, or as many as are kept ready, the largest among them."""
    kept = max(1, MOST_PROGRAMS // canvases)
    return [*range(1, min(max_batch_size, kept)), max_batch_size]


def _open(path: Path, record: EngineRecord, gpu: Gpu, cache: Path) -> TensorRTSession:
    built_with = f"{record.flavour} {record.built_with.get(record.flavour, 'of an unknown version')} for {record.arch}"
    kernels = cache / "kernels" / f"{record.sha256[:32]}-{gpu.arch}.bin"  # of RTX, which compiles them here
    return open_tensorrt(path, record.flavour, gpu.index, plugins.tensorrt_library(), built_with, kernels=kernels)


def find_gpu(device: str) -> Gpu:
    """The GPU that the setting means. Raises RuntimeUnavailable."""
    there = gpus()
    index = int(device.partition(":")[2] or 0)
    if index >= len(there):
        raise RuntimeUnavailable(f"there is no {device}: this machine has cuda:0 to cuda:{len(there) - 1}")
    return there[index]


def _too_small(record: EngineRecord, manifest: Manifest, max_batch_size: int) -> str:
    """Why an engine does not take every batch that will come, as far as its record tells; empty where it does."""
    most = {profile.canvas: profile.max_batch_size for profile in record.profiles}
    short = [(canvas, most.get(canvas, 0)) for canvas in manifest.canvases if most.get(canvas, 0) < max_batch_size]
    return _refusal(record.file, *short[0], max_batch_size) if record.profiles and short else ""


def _refusal(file: str, canvas: Canvas, takes: int, max_batch_size: int) -> str:
    if not takes:
        return f"{file} has no profile for canvas {canvas}; build it again"
    return (
        f"{file} takes at most {takes} images of canvas {canvas}, and max_batch_size is {max_batch_size}: set that to "
        f"{takes}, or build it with --max-batch-size {max_batch_size}"
    )
