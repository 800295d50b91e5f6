"""MSDeformAttn for inference runtimes: where to find the native libraries, if they were built."""

from pathlib import Path

_BUILT = Path(__file__).parent / "msda"


def onnxruntime_library() -> Path | None:
    """The custom-op library for ONNX Runtime on the CPU, or None: the model file's own function is then used."""
    library = _BUILT / "libmsda_onnxruntime.so"
    return library if library.is_file() else None


def tensorrt_library() -> Path | None:
    """The TensorRT plugin library, or None where it was not built."""
    return None
