"""The bundle's model.onnx in ONNX Runtime, on the CPU or on an NVIDIA GPU."""

import ctypes
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime as ort

import plugins
from bundle import Bundle, Canvas, Manifest
from runtime import RuntimeUnavailable, gpus
from server.cores import available_cores, sums_bytes_exactly
from server.engine import Candidate, PassedOver, RawDetections
from server.errors import StartupError
from server.preprocess import Pixels, lay_on_canvas
from server.settings import Settings
from server.worker import Worker

logger = logging.getLogger("ddetr.engine")

_CPU = "CPUExecutionProvider"
_PROVIDERS = {"CUDAExecutionProvider": "cuda:0", _CPU: "cpu"}
_CUDA_OPTIONS = {
    "cudnn_conv_algo_search": "HEURISTIC",  # trying all takes seconds at each new canvas and batch size
    "use_tf32": "0",  # float32 is float32: the proof's tolerances are for it
}
_INPUTS = ("images", "sizes")
_OUTPUTS = ("boxes", "scores", "labels")
_ERRORS_ONLY = 3


def onnxruntime_ways(settings: Settings, bundle: Bundle) -> list[Candidate | PassedOver]:
    """On the GPU, then on the CPU, as far as the settings allow either."""
    ways: list[Candidate | PassedOver] = []
    graphs = {"fp32": bundle.onnx_path, "int8": bundle.int8_path}
    precision = "fp32" if settings.precision == "auto" or _stands_in(settings) else settings.precision
    graph = graphs.get(precision)
    for provider, name in _PROVIDERS.items():
        if not _allows(settings.device, provider):
            continue
        name = f"onnxruntime on {name if provider == _CPU or ':' not in settings.device else settings.device}"
        there = ort.get_available_providers()
        if graph is None:
            how = " (ddetr export --int8 adds one)" if precision == "int8" else ""
            ways.append(PassedOver(name, f"the bundle has no graph of precision {precision} for it{how}"))
        elif provider not in there:
            ways.append(PassedOver(name, f"this ONNX Runtime has no CUDA, only {', '.join(there)}"))
        elif precision == "int8" and provider != _CPU:
            ways.append(PassedOver(name, "int8 is for the CPU"))
        elif precision == "int8" and not sums_bytes_exactly():
            ways.append(PassedOver(name, "int8 needs a CPU with VNNI: without it sums of 8-bit products overflow"))
        else:
            on = settings.model_copy(update={"device": "cpu" if provider == _CPU else settings.device})
            opening = partial(OnnxRuntimeEngine, bundle, on, graph, provider)
            kind = "" if provider == _CPU else f" on {_kind_of_gpu(settings.device)}"
            ways.append(Candidate(name, precision, opening, source=f"{graph} by {provider}{kind}"))
    return ways


def _stands_in(settings: Settings) -> bool:
    """Whether it is to serve in float32 until a TensorRT engine in half has been built."""
    return settings.engine != "onnxruntime" and (settings.precision, settings.build_engine) == ("fp16", "background")


def _kind_of_gpu(device: str) -> str:
    """Its name; where nothing tells that, the device's, which is then taken for another kind than any other."""
    try:
        return gpus()[_index(device)].name
    except (RuntimeUnavailable, IndexError):
        return device


def _index(device: str) -> int:
    return int(device.partition(":")[2] or 0)


@dataclass(frozen=True, eq=False)
class _Inputs:
    """A batch where the session reads it."""

    images: Any
    sizes: Any


class OnnxRuntimeEngine:
    """One session. It runs the native kernel, where that is built for the device; else the model's own function."""

    def __init__(
        self, bundle: Bundle, settings: Settings, graph: Path | None = None, provider: str = "CPUExecutionProvider"
    ) -> None:
        """`graph`: the bundle's model.onnx, unless another is given. Raises StartupError."""
        self.manifest: Manifest = bundle.manifest
        graph = graph or bundle.onnx_path
        index = _index(settings.device)
        device = "cpu" if provider == _CPU else f"cuda:{index}"
        self._placed = None if provider == _CPU else ("cuda", index)
        library = plugins.onnxruntime_library()
        if library is not None and provider != _CPU and not has_cuda_kernel(library):
            library = None  # each attention handed over to the CPU is slower than the function on the GPU
        session_options = ort.SessionOptions()
        session_options.log_severity_level = _ERRORS_ONLY
        session_options.intra_op_num_threads = settings.engine_threads or max(
            1, available_cores() // settings.engine_instances
        )
        session_options.inter_op_num_threads = 1
        if provider == _CPU:
            # The plan for a shape's memory is made by its first batch and asks for more with its second, which for a
            # rare shape comes hours later; without, memory is less, what it will be is soon known, and speed the same.
            session_options.enable_mem_pattern = False
        if library is not None:
            try:
                _register(session_options, library, for_cuda=provider != _CPU)
            except Exception as error:
                raise StartupError(f"ONNX Runtime {ort.__version__} refuses {library}: {error}") from error
        options = {} if provider == _CPU else {"device_id": str(index), **_CUDA_OPTIONS}
        niceness = settings.engine_niceness if provider == _CPU else 0
        try:
            self._session = _session(graph, session_options, (provider, options), niceness)
        except Exception as error:
            raise StartupError(f"ONNX Runtime {ort.__version__} cannot load {graph}: {error}") from error
        if provider not in (got := self._session.get_providers()):  # it says so in its own log alone, and goes on
            raise StartupError(f"{device}: ONNX Runtime {ort.__version__} could not use it, and took {', '.join(got)}")
        self._check_graph(graph)
        self.op = "native kernel" if library is not None else "function"
        precision = "" if graph == bundle.onnx_path else f", {graph.name}"
        self.name = f"onnxruntime {ort.__version__} on {device}{precision}, MSDeformAttn as {self.op}"
        logger.info("%s, %d threads", self.name, session_options.intra_op_num_threads)
        if library is None and device == "cpu":
            logger.warning("the native kernel is not built, answers take longer; with a C++ compiler: make native")

    def prepare(self, images: Sequence[Pixels], canvas: Canvas) -> _Inputs:
        """The graph's two inputs, see `lay_on_canvas`. For a GPU they are copied to it now: another batch computes."""
        laid = lay_on_canvas(images, canvas)
        if self._placed is None:
            return _Inputs(*laid)
        return _Inputs(*(ort.OrtValue.ortvalue_from_numpy(array, *self._placed) for array in laid))

    def infer(self, inputs: _Inputs) -> Sequence[Any]:
        """The graph's three outputs."""
        outputs: Sequence[Any]
        if self._placed is None:
            outputs = self._session.run(list(_OUTPUTS), {"images": inputs.images, "sizes": inputs.sizes})
            return outputs
        binding = self._session.io_binding()
        binding.bind_ortvalue_input("images", inputs.images)
        binding.bind_ortvalue_input("sizes", inputs.sizes)
        for name in _OUTPUTS:
            binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        outputs = binding.copy_outputs_to_cpu()
        return outputs

    def finish(self, outputs: Sequence[Any]) -> RawDetections:
        """The outputs by name; they are in host memory already."""
        return RawDetections(*outputs)

    def close(self) -> None:
        """Free the session's memory."""
        del self._session

    def _check_graph(self, graph: Path) -> None:
        inputs = {value.name for value in self._session.get_inputs()}
        outputs = {value.name for value in self._session.get_outputs()}
        if inputs != set(_INPUTS) or outputs != set(_OUTPUTS):
            raise StartupError(
                f"{graph} has inputs {sorted(inputs)} and outputs {sorted(outputs)}; "
                f"a served graph has inputs {sorted(_INPUTS)} and outputs {sorted(_OUTPUTS)}"
            )


def has_cuda_kernel(library: Path) -> bool:
    """Whether the op's library brings its kernel for CUDA: it was built where nvcc is. False for what is no library."""
    try:
        return hasattr(ctypes.CDLL(str(library)), "msda_forward_cuda_host_shapes")
    except OSError:
        return False


def _session(
    graph: Path, options: ort.SessionOptions, provider: tuple[str, dict[str, str]], niceness: int
) -> ort.InferenceSession:
    """A session whose threads are nicer than this one by `niceness`, on Linux: there a thread begins as its starter is.

    They wait for each other awake. Where they are as hurried as the rest, a thread that decodes or answers takes the
    core of the one that all others wait for as often as that of one that waits.
    """

    def start() -> ort.InferenceSession:
        if niceness and sys.platform == "linux":  # elsewhere it is of the whole process
            with suppress(OSError):  # forbidden: as hurried, then
                os.nice(niceness)
        return ort.InferenceSession(graph, options, [provider])

    if not niceness:
        return start()
    starter = Worker("starter")  # a thread of its own: nobody may become less nice again
    try:
        return starter.submit(start).result()
    finally:
        starter.stop()
        starter.join()


def _register(options: ort.SessionOptions, library: Path, *, for_cuda: bool) -> None:
    """The library's ops, of which some have no kernel for CUDA: there the model's functions are better than the CPU."""
    if not for_cuda:
        options.register_custom_ops_library(str(library))
        return
    choose = getattr(ctypes.CDLL(str(library)), "msda_register_for_cuda", None)  # of this thread
    if choose is None:
        raise StartupError(f"{library} was built by an earlier release: python -m plugins.build")
    choose(1)
    try:
        options.register_custom_ops_library(str(library))
    finally:
        choose(0)


def _allows(device: str, provider: str) -> bool:
    return device == "auto" or (device == "cpu") == (provider == _CPU)
