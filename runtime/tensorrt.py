"""An engine file into a session on a GPU of this machine."""

from pathlib import Path
from typing import Any

from runtime.cuda import BoundCuda, Cuda
from runtime.errors import EngineRefused, NoGpu, PluginRefused
from runtime.flavour import load_flavour, log_of
from runtime.gpu import Gpu, gpus
from runtime.session import TensorRTSession

_PLUGIN, _PLUGIN_VERSION = "MSDeformAttn", "1"


def open_tensorrt(
    path: Path,
    flavour: str,
    device: int,
    plugin: Path | None,
    built_with: str = "",
    *,
    graphs: bool = True,
    kernels: Path | None = None,
) -> TensorRTSession:
    """The engine in file `path` on GPU number `device`.

    flavour: "tensorrt" or "rtx". plugin: the library of the op. built_with: the version of the flavour, for messages.
    graphs: make CUDA graphs of what is run again. kernels: a file for those that RTX compiles here, see `keep_kernels`.
    Raises RuntimeUnavailable.
    """
    trt = load_flavour(flavour)
    there = gpus()
    if device >= len(there):
        raise NoGpu(f"there is no cuda:{device}: this machine's GPUs are cuda:0 to cuda:{len(there) - 1}")
    return open_on(there[device], path, flavour, trt, BoundCuda(), plugin, built_with, graphs=graphs, kernels=kernels)


def open_on(
    gpu: Gpu,
    path: Path,
    flavour: str,
    trt: Any,
    cuda: Cuda,
    plugin: Path | None,
    built_with: str = "",
    *,
    graphs: bool = True,
    kernels: Path | None = None,
) -> TensorRTSession:
    """The same, with TensorRT's module and CUDA as they are given."""
    log = log_of(trt)
    cuda.use(gpu.index)
    log.errors.clear()
    runtime = trt.Runtime(log)
    if runtime is None:
        raise EngineRefused(f"{flavour} {trt.__version__} makes no runtime: {log.reason()}")
    _load_plugin(runtime, log, flavour, trt.__version__, plugin)
    log.errors.clear()
    engine = runtime.deserialize_cuda_engine(_content(path))
    if engine is None:
        built = f", built with {built_with}," if built_with else ""
        raise EngineRefused(
            f"{path}{built} cannot be loaded by {flavour} {trt.__version__} on {gpu.name} ({gpu.arch}): "
            f"{log.reason()}; build it here: ddetr build --checkpoint ... --flavour {flavour}"
        )
    name = f"{flavour} {trt.__version__} on cuda:{gpu.index} ({gpu.name}, {gpu.arch})"
    return TensorRTSession(engine, trt, cuda, gpu.index, name=name, graphs=graphs, kernels=kernels)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise EngineRefused(f"{path} cannot be read: {error.strerror or error}") from error


def _load_plugin(runtime: Any, log: Any, flavour: str, version: str, plugin: Path | None) -> None:
    """Before an engine is read, its plugin has to be known."""
    if plugin is None:
        raise PluginRefused(
            "the TensorRT plugin was not built: it needs nvcc and TensorRT's headers (python -m plugins.build)"
        )
    registry = runtime.get_plugin_registry()
    registry.load_library(str(plugin))
    if registry.get_creator(_PLUGIN, _PLUGIN_VERSION, "") is None:
        raise PluginRefused(
            f"{plugin} brings {flavour} {version} no plugin {_PLUGIN} of version {_PLUGIN_VERSION}: {log.reason()}; "
            "build it here: python -m plugins.build libmsda_tensorrt.so"
        )
