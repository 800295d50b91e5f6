"""The GPUs of this machine, as CUDA counts them."""

from dataclasses import dataclass
from typing import Any

from runtime.cuda import call, cuda_bindings
from runtime.errors import CudaFailed, NoGpu


@dataclass(frozen=True)
class Gpu:
    """One GPU."""

    index: int
    name: str
    arch: str  # "sm86"


def gpus() -> list[Gpu]:
    """Those that this process may use. Raises NotInstalled, and NoGpu where there is none."""
    cuda: Any = cuda_bindings()
    try:
        count = int(call(cuda, "cudaGetDeviceCount"))
    except CudaFailed as error:  # no driver, or one older than the bindings
        raise NoGpu(f"no NVIDIA GPU can be used: {error}") from error
    if not count:
        raise NoGpu("no NVIDIA GPU can be used: CUDA counts none (is CUDA_VISIBLE_DEVICES empty?)")
    return [_gpu(cuda, index) for index in range(count)]


def _gpu(cuda: Any, index: int) -> Gpu:
    attributes = cuda.cudaDeviceAttr
    major = call(cuda, "cudaDeviceGetAttribute", attributes.cudaDevAttrComputeCapabilityMajor, index)
    minor = call(cuda, "cudaDeviceGetAttribute", attributes.cudaDevAttrComputeCapabilityMinor, index)
    name = call(cuda, "cudaGetDeviceProperties", index).name
    return Gpu(index, name.decode() if isinstance(name, bytes) else str(name), f"sm{major}{minor}")
