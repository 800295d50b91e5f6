"""MSDeformAttn, convolutions, linear layers and the resize, compiled: where the libraries are, if they were built."""

from pathlib import Path

_BUILT = Path(__file__).parent / "built"


def _built(name: str) -> Path | None:
    library = _BUILT / name
    return library if library.is_file() else None


def onnxruntime_library() -> Path | None:
    """The custom-op library for ONNX Runtime, or None: the model file's own function is then used.

    For the CPU, and for CUDA where it was built with nvcc.
    """
    return _built("libmsda_onnxruntime.so")


def tensorrt_library() -> Path | None:
    """The TensorRT plugin library, or None where it was not built: it needs nvcc and TensorRT's headers."""
    return _built("libmsda_tensorrt.so")


def cuda_library() -> Path | None:
    """The CUDA kernel behind the C ABI of msda.h, or None where it was not built: it needs nvcc."""
    return _built("libmsda_cuda.so")


def resize_library() -> Path | None:
    """The paper's resize behind the C interface of resize.h, or None where it was not built: Pillow then does it."""
    return _built("libresize.so")
