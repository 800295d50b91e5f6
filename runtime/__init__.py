"""Runs TensorRT and TensorRT-RTX engines: numpy, CUDA's and TensorRT's bindings, and nothing of ours."""

from runtime.errors import (
    CudaFailed,
    EngineRefused,
    NoGpu,
    NotInstalled,
    OutOfGpuMemory,
    PluginRefused,
    RuntimeUnavailable,
)
from runtime.gpu import Gpu, gpus
from runtime.session import Answer, Staged, TensorRTSession
from runtime.tensorrt import open_tensorrt

__all__ = [
    "Answer",
    "CudaFailed",
    "EngineRefused",
    "Gpu",
    "NoGpu",
    "NotInstalled",
    "OutOfGpuMemory",
    "PluginRefused",
    "RuntimeUnavailable",
    "Staged",
    "TensorRTSession",
    "gpus",
    "open_tensorrt",
]
