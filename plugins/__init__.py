"""MSDeformAttn for inference runtimes: where to find the native libraries, if they were built."""

from pathlib import Path


def onnxruntime_library() -> Path | None:
    """The custom-op library for ONNX Runtime, or None: the model file's own function is then used."""
    return None


def tensorrt_library() -> Path | None:
    """The TensorRT plugin library, or None where it was not built."""
    return None
