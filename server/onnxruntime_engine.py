"""The bundle's model.onnx in ONNX Runtime, on the CPU or on an NVIDIA GPU."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

import plugins
from bundle import Bundle, Canvas, Manifest
from server.cores import available_cores
from server.engine import RawDetections
from server.errors import StartupError
from server.preprocess import Pixels, lay_on_canvas
from server.settings import Settings

logger = logging.getLogger("ddetr.engine")

_INPUTS = ("images", "sizes")
_OUTPUTS = ("boxes", "scores", "labels")
_ERRORS_ONLY = 3


class OnnxRuntimeEngine:
    """One session. On the CPU it runs the native kernel, if built; else the function that the model carries."""

    def __init__(self, bundle: Bundle, settings: Settings) -> None:
        self.manifest: Manifest = bundle.manifest
        provider, options = _provider(settings.device)
        # Its kernel is for the CPU: a GPU that hands every attention over to it is slower than with the function.
        library = plugins.onnxruntime_library() if provider == "CPUExecutionProvider" else None
        session_options = ort.SessionOptions()
        session_options.log_severity_level = _ERRORS_ONLY
        session_options.intra_op_num_threads = settings.engine_threads or max(
            1, available_cores() // settings.engine_instances
        )
        session_options.inter_op_num_threads = 1
        if library is not None:
            try:
                session_options.register_custom_ops_library(str(library))
            except Exception as error:
                raise StartupError(f"ONNX Runtime {ort.__version__} refuses {library}: {error}") from error
        try:
            self._session = ort.InferenceSession(bundle.onnx_path, session_options, [(provider, options)])
        except Exception as error:
            raise StartupError(f"ONNX Runtime {ort.__version__} cannot load {bundle.onnx_path}: {error}") from error
        self._check_graph(bundle)
        device = "cpu" if provider == "CPUExecutionProvider" else f"cuda:{options['device_id']}"
        self.op = "native kernel" if library is not None else "function"
        self.name = f"onnxruntime {ort.__version__} on {device}, MSDeformAttn as {self.op}"
        logger.info("%s, %d threads", self.name, session_options.intra_op_num_threads)
        if library is None and device == "cpu":
            logger.warning("the native kernel is not built, answers take longer; with a C++ compiler: make native")

    def prepare(self, images: Sequence[Pixels], canvas: Canvas) -> tuple[Pixels, NDArray[np.int64]]:
        """The graph's two inputs, see `lay_on_canvas`."""
        return lay_on_canvas(images, canvas)

    def infer(self, inputs: tuple[Pixels, NDArray[np.int64]]) -> Sequence[Any]:
        """The graph's three outputs."""
        outputs: Sequence[Any] = self._session.run(list(_OUTPUTS), dict(zip(_INPUTS, inputs, strict=True)))
        return outputs

    def finish(self, outputs: Sequence[Any]) -> RawDetections:
        """The outputs by name; they are in host memory already."""
        return RawDetections(*outputs)

    def close(self) -> None:
        """Free the session's memory."""
        del self._session

    def _check_graph(self, bundle: Bundle) -> None:
        inputs = {value.name for value in self._session.get_inputs()}
        outputs = {value.name for value in self._session.get_outputs()}
        if inputs != set(_INPUTS) or outputs != set(_OUTPUTS):
            raise StartupError(
                f"{bundle.onnx_path} has inputs {sorted(inputs)} and outputs {sorted(outputs)}; "
                f"a served graph has inputs {sorted(_INPUTS)} and outputs {sorted(_OUTPUTS)}"
            )


def _provider(device: str) -> tuple[str, dict[str, str]]:
    """ONNX Runtime's name for the device, and its options."""
    there = ort.get_available_providers()
    if device == "auto":
        device = "cuda" if "CUDAExecutionProvider" in there else "cpu"
    if device == "cpu":
        return "CPUExecutionProvider", {}
    if "CUDAExecutionProvider" not in there:
        raise StartupError(f"device {device!r}: this ONNX Runtime has no CUDA, only {', '.join(there)}")
    return "CUDAExecutionProvider", {"device_id": device.partition(":")[2] or "0"}
