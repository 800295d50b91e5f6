"""What keeps an engine from running.

RuntimeUnavailable       one line: what is wrong, and the way out
├── NotInstalled         a Python package is not there, or cannot be loaded
├── NoGpu                no GPU, no driver, or no GPU of that number
├── PluginRefused        the op's plugin is not built, or not for this TensorRT
├── EngineRefused        a file for another GPU or version, or no engine of a served graph
├── OutOfGpuMemory       the GPU, or the host's memory that it can read
└── CudaFailed           a call of CUDA, with its name for what went wrong
"""


class RuntimeUnavailable(RuntimeError):
    """Base of everything this package raises beside ValueError for what no caller should ask for."""


class NotInstalled(RuntimeUnavailable):
    """A Python package is not there, or cannot be loaded."""


class NoGpu(RuntimeUnavailable):
    """No GPU, no driver, or no GPU of that number."""


class PluginRefused(RuntimeUnavailable):
    """The op's plugin is not built, or not for this TensorRT."""


class EngineRefused(RuntimeUnavailable):
    """TensorRT does not take the file, or it is no engine of a served graph."""


class OutOfGpuMemory(RuntimeUnavailable):
    """There is not memory enough on the GPU, or not enough of the host's that it can read."""


class CudaFailed(RuntimeUnavailable):
    """A call of CUDA failed. After most of these no call of this process succeeds: it must be restarted."""
