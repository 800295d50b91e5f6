"""An engine at one canvas and one batch size, run again and again."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runtime.cuda import Address, CaptureFailed, Cuda, Handle
from runtime.errors import CudaFailed, EngineRefused, OutOfGpuMemory
from runtime.flavour import log_of

logger = logging.getLogger("ddetr.engine")


class Contexts:
    """Makes the execution contexts of an engine; they share its memory, as only one of them works at a time."""

    def __init__(self, engine: Any, trt: Any, memory: Address, memory_bytes: int, kernels: Path | None = None) -> None:
        self._engine, self._trt = engine, trt
        self._memory, self._memory_bytes = memory, memory_bytes
        self._kernels = kernels
        self._compiled: Any = None
        self._how: Any = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if hasattr(trt, "IRuntimeCache"):
            # RTX compiles its kernels here: once for all contexts, and before they serve, for each has but one shape.
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(self._how)
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            self._compiled = config.create_runtime_cache()
            if (kept := _kept(kernels)) and not self._compiled.deserialize(kept):
                logger.info("%s is of another GPU or version: kernels are compiled again", kernels)
            config.set_runtime_cache(self._compiled)
            self._how = config

    def keep_kernels(self) -> None:
        """Write what was compiled into the file, for the next time; where nothing is compiled or kept, do nothing."""
        if self._compiled is None or self._kernels is None:
            return
        compiled = self._compiled.serialize()
        if compiled is None:
            why = log_of(self._trt).reason()
            logger.warning("compiled kernels are not kept, the next start takes as long: %s", why)
            return
        content = bytes(compiled)
        fresh = self._kernels.with_name(f".{self._kernels.name}.{os.getpid()}")
        try:
            if self._kernels.is_file() and self._kernels.read_bytes() == content:
                return
            self._kernels.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_bytes(content)
            fresh.replace(self._kernels)
        except OSError as error:
            logger.warning("compiled kernels are not kept, the next start takes as long: %s", str(error))

    def make(
        self,
        profile: int,
        shapes: Mapping[str, Sequence[int]],
        addresses: Mapping[str, Address],
        stream: Handle,
    ) -> Any:
        """A context for inputs of these shapes. `addresses`: of all tensors. Raises OutOfGpuMemory, EngineRefused."""
        log = log_of(self._trt)
        log.errors.clear()
        context = self._engine.create_execution_context(self._how)
        if context is None:
            raise OutOfGpuMemory(f"TensorRT makes no context: {log.reason()}; set max_batch_size lower")
        context.set_device_memory(self._memory, self._memory_bytes)
        done = context.set_optimization_profile_async(profile, stream)
        done = done and all(context.set_input_shape(name, tuple(shape)) for name, shape in shapes.items())
        done = done and all(context.set_tensor_address(name, address) for name, address in addresses.items())
        if not done or (missing := context.infer_shapes()):
            why = log.reason() if not done else f"it misses the shapes of {', '.join(missing)}"
            raise EngineRefused(f"the engine does not take {dict(shapes)} in profile {profile}: {why}")
        return context

    def layer_information(self, context: Any) -> str:
        """What the engine says of its own layers, as TensorRT's JSON, with the shapes of `context`."""
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = context
        return str(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))


def _kept(kernels: Path | None) -> bytes:
    """What the file holds; nothing where there is none, or it cannot be read, which costs time alone."""
    try:
        return b"" if kernels is None else kernels.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return b""
    except OSError as error:
        logger.warning("%s cannot be read, kernels are compiled again: %s", kernels, error.strerror or error)
        return b""


class Graphs:
    """Whether a session's work can be made CUDA graphs; the first that cannot ends it for all."""

    def __init__(self, *, wanted: bool) -> None:
        self.on = wanted

    def give_up(self, why: str) -> None:
        """Say so, once."""
        if self.on:
            self.on = False
            logger.warning("no CUDA graphs, every batch is queued kernel by kernel: %s", why)


class Program:
    """Nothing about its context ever changes, so that the graph of its work stays true.

    The first run is queued as it is, as TensorRT asks; the second is captured, and replayed from then on.
    """

    def __init__(self, context: Any, trt: Any, cuda: Cuda, graphs: Graphs) -> None:
        self.context: Any = context
        self._trt = trt
        self._cuda = cuda
        self._graphs = graphs
        self._graph: Handle | None = None
        self._ran = False

    def enqueue(self, stream: Handle) -> None:
        """Queue one run. Raises CudaFailed."""
        if self._graph is None and self._ran and self._graphs.on:
            self._capture(stream)
        if self._graph is not None:
            self._cuda.launch(self._graph, stream)
        else:
            self._execute(stream)
            self._ran = True

    def free(self) -> None:
        """Give back what it holds. Its stream must be idle."""
        graph, self._graph, self.context = self._graph, None, None
        if graph is not None:
            self._cuda.free_graph(graph)

    def _capture(self, stream: Handle) -> None:
        ask = getattr(self.context, "is_stream_capturable", None)  # RTX has it
        if ask is not None and not ask(stream):
            self._graphs.give_up("TensorRT says that this engine's work cannot be captured")
            return
        try:
            self._graph = self._cuda.capture(stream, lambda: self._execute(stream))
        except CaptureFailed as error:
            self._graphs.give_up(str(error))

    def _execute(self, stream: Handle) -> None:
        log = log_of(self._trt)
        log.errors.clear()
        if not self.context.execute_async_v3(stream):
            raise CudaFailed(f"TensorRT did not queue the batch: {log.reason()}")
