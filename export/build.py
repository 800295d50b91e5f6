"""An ONNX model into an engine: parsed with the op's plugin, its layers counted, built for the GPUs that will run it.

Networks are strongly typed: every layer computes in the type the graph gives it, and nothing here changes precision.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import TensorProto, helper

import plugins
from bundle import Canvas
from export import op
from export.flavour import BuildError, Flavour, NotInstalled
from export.plain import plain_graph

_LOG = logging.getLogger("ddetr.tensorrt")

PLUGIN_LAYER, SAMPLE_LAYER = "PLUGIN_V3", "GRID_SAMPLE"


class PluginMissing(BuildError):
    pass


class NotParsed(BuildError):
    pass


class NotBuilt(BuildError):
    pass


@dataclass(frozen=True)
class Profile:
    """The inputs an engine is built for: batches of pictures on one canvas."""

    canvas: Canvas
    max_batch_size: int
    best_batch_size: int = 1  # what kernels are chosen for

    def __post_init__(self) -> None:
        if not 1 <= self.best_batch_size <= self.max_batch_size:
            raise ValueError(f"best batch size {self.best_batch_size} is not in 1..{self.max_batch_size}")


@dataclass(frozen=True)
class LayerReport:
    """The layers of a parsed network."""

    layers: Mapping[tuple[str, str], int]  # (kind of layer, type of its first output) -> how many
    plugin_inputs: tuple[tuple[str, ...], ...]  # of each plugin layer, the type of each input

    @property
    def total(self) -> int:
        return sum(self.layers.values())

    def count(self, kind: str, output_type: str | None = None) -> int:
        """How many layers are of this kind ("CONVOLUTION") and, if given, have outputs of this type ("half")."""
        return sum(n for (k, t), n in self.layers.items() if k == kind and output_type in (None, t))


@dataclass(frozen=True)
class Engine:
    """A serialised engine and what it was built from."""

    content: bytes
    flavour: str
    version: str
    targets: tuple[str, ...]
    report: LayerReport


class Parsed:
    """A network in its builder's hands; all of it lives as long as this."""

    def __init__(self, flavour: Flavour, library: Path | None = None) -> None:
        """An empty network, the plugin's library loaded. Raises NotInstalled and PluginMissing."""
        self.flavour = flavour
        self.trt = flavour.load()
        self.log = _log(self.trt)
        self.library = library or plugins.tensorrt_library()
        if self.library is None:
            raise PluginMissing(
                "the TensorRT plugin was not built: it needs nvcc and TensorRT's headers (python -m plugins.build)"
            )
        self.builder = self.trt.Builder(self.log)
        if self.builder is None:
            raise NotInstalled(f"{flavour.name} makes no builder: {self.log.reason()}")
        self._load_plugin(self.library)
        strongly_typed = getattr(self.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # always so, one day
        self.network = self.builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
        self.parser = self.trt.OnnxParser(self.network, self.log)  # the network's weights are the parser's

    def _load_plugin(self, library: Path) -> None:
        registry = self.builder.get_plugin_registry()
        registry.load_library(str(library))
        if not any(creator.name == op.NAME for creator in registry.all_creators):
            raise PluginMissing(f"{library} brings no plugin {op.NAME}: {self.log.reason()}")

    def report(self) -> LayerReport:
        """What the network is made of."""
        layers = list(self._layers())
        kinds = Counter((layer.type.name, _type_name(layer.get_output(0))) for layer in layers)
        taken = tuple(
            tuple(_type_name(layer.get_input(i)) for i in range(layer.num_inputs))
            for layer in layers
            if layer.type.name == PLUGIN_LAYER
        )
        return LayerReport(dict(kinds), taken)

    def _layers(self) -> Iterator[Any]:
        return (self.network.get_layer(index) for index in range(self.network.num_layers))


def parse(model: onnx.ModelProto, flavour: Flavour, library: Path | None = None) -> Parsed:
    """The network of an ONNX model, each of its MSDeformAttn nodes a plugin layer.

    `library` is the plugin's, where it is not the project's own. Raises NotInstalled, PluginMissing, and NotParsed with
    the node and the reason, or with the count of layers that is wrong.
    """
    parsed = Parsed(flavour, library)
    if not parsed.parser.parse(_in_its_dialect(model).SerializeToString()):
        raise NotParsed(_parse_error(parsed))
    nodes = sum(node.domain == op.DOMAIN and node.op_type == op.NAME for node in model.graph.node)
    report = parsed.report()
    found, samples = report.count(PLUGIN_LAYER), report.count(SAMPLE_LAYER)
    if (found, samples) != (nodes, 0):
        raise NotParsed(f"{nodes} {op.NAME} nodes became {found} plugin layers and {samples} GridSample layers")
    return parsed


def build(
    parsed: Parsed,
    profiles: Sequence[Profile],
    targets: Sequence[str] = (),
    *,
    tf32: bool = False,
    embed_plugin: bool = False,
    hardware_compatible: bool = False,
    workspace_mib: int | None = None,
    timing_cache: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> Engine:
    """Build the parsed network's engine.

    targets: architectures such as "sm86"; none, this machine's GPU. tf32: float32 products may be rounded to 10 bits.
    embed_plugin: put the plugin's library into the engine, for hosts that do not have it; they must then allow the
    engine to bring code (`engine_host_code_allowed`). hardware_compatible: for this GPU and later ones.
    workspace_mib: the most a kernel may use for itself. timing_cache: a file of kernels' times, used and brought up to
    date where the flavour takes them. progress: told each phase of the builder that begins.

    Raises TargetError and NotBuilt.
    """
    if not profiles:
        raise ValueError("an engine needs at least one profile")
    trt, builder = parsed.trt, parsed.builder
    aims = parsed.flavour.targets(targets)
    config = builder.create_builder_config()
    if hardware_compatible:
        aims = parsed.flavour.widened(aims)
    parsed.flavour.aim(config, aims)
    (config.set_flag if tf32 else config.clear_flag)(trt.BuilderFlag.TF32)
    if embed_plugin:
        config.plugins_to_serialize = [str(parsed.library)]
    for profile in profiles:
        if config.add_optimization_profile(_shapes(parsed, profile)) < 0:
            raise NotBuilt(f"canvas {profile.canvas} is no profile of this network: {parsed.log.reason()}")
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # so that the engine tells its layers' types
    if workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_mib << 20)
    if not parsed.flavour.times_kernels:
        timing_cache = None
    if timing_cache is not None:
        known = config.create_timing_cache(timing_cache.read_bytes() if timing_cache.is_file() else b"")
        if known is not None:  # one of another version or GPU is none
            config.set_timing_cache(known, False)
    if progress is not None:
        config.progress_monitor = _monitor(trt, progress)
    content = builder.build_serialized_network(parsed.network, config)
    if content is None:
        raise NotBuilt(f"{parsed.flavour.name} built no engine for {', '.join(aims)}: {parsed.log.reason()}")
    if timing_cache is not None and (timed := config.get_timing_cache()) is not None:
        fresh = timing_cache.with_name(f".{timing_cache.name}.new")
        fresh.write_bytes(bytes(timed.serialize() or b""))
        fresh.replace(timing_cache)
    return Engine(bytes(content), parsed.flavour.name, trt.__version__, aims, parsed.report())


def _shapes(parsed: Parsed, profile: Profile) -> Any:
    """TensorRT's form of a profile: smallest, best and largest shape of every input."""
    height, width = profile.canvas.height, profile.canvas.width
    rests = {"images": (height, width, 3), "sizes": (2,)}
    batches = (1, profile.best_batch_size, profile.max_batch_size)
    shapes = parsed.builder.create_optimization_profile()
    for index in range(parsed.network.num_inputs):
        name = parsed.network.get_input(index).name
        if name not in rests:
            raise NotBuilt(f"the network has an input {name!r}; those of a bundle are {', '.join(rests)}")
        shapes.set_shape(name, *((batch, *rests[name]) for batch in batches))
    return shapes


def _in_its_dialect(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model as TensorRT wants it said."""
    said = onnx.ModelProto()
    # A bundle's graph, laid out for a CPU, has more ops of ours; a graph traced for engines has this one.
    said.CopyFrom(plain_graph(model) if any(each.name != op.NAME for each in model.functions) else model)
    # With the function in the file the parser takes it for the node's meaning, and the plugin is never asked.
    del said.functions[:]
    # A uint8 tensor may enter and be cast, and nothing else; the graph transposes it first, when a pixel is a byte.
    bytes_in = {value.name for value in said.graph.input if value.type.tensor_type.elem_type == TensorProto.UINT8}
    for index, node in reversed(list(enumerate(said.graph.node))):
        if node.op_type == "Transpose" and node.input[0] in bytes_in:
            entered = node.input[0]
            node.input[0] = f"{entered}_as_float"
            cast = helper.make_node("Cast", [entered], [node.input[0]], to=TensorProto.FLOAT)
            said.graph.node.insert(index, cast)
    return said


def _type_name(tensor: Any) -> str:
    return "" if tensor is None else str(tensor.dtype.name).lower()


def _parse_error(parsed: Parsed) -> str:
    """The node and the reason, of the first error."""
    if not parsed.parser.num_errors:
        return f"the parser refuses the graph: {parsed.log.reason()}"
    error = parsed.parser.get_error(0)
    # What went wrong was logged before the parser said where.
    cause = next((line for line in parsed.log.errors if not line.startswith("ModelImporter.cpp")), error.desc())
    return f"node {error.node_name() or error.node()} ({error.node_operator()}): {_plain(cause)}"


def _plain(message: str) -> str:
    """The first line, without the places in TensorRT's own source and the quotes of its assertions."""
    line = message.splitlines()[0]
    line = re.sub(r"^\S+: Error Code \d+: [\w ]+ \((.*?)(?: In \w+ at \S+)?\)$", r"\1", line)
    return re.sub(r'^\w+ && "(.*)"$', r"\1", line)


def _monitor(trt: Any, tell: Callable[[str], None]) -> Any:
    """A progress monitor that tells the phases as they begin; it never asks the builder to stop."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase is None:
                tell(f"{phase_name}, {num_steps} steps")

        def step_complete(self, *_: object) -> bool:
            return True

        def phase_finish(self, *_: object) -> None:
            pass

    return Monitor()


def _log(trt: Any) -> Any:
    """A logger that hands everything to `logging` and keeps the errors."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            # Without a GPU each error is followed by one that says so.
            if severity <= trt.ILogger.Severity.ERROR and "catchCudaError" not in message:
                self.errors.append(message)
            _LOG.debug("%s: %s", severity.name, message)

        def reason(self) -> str:
            """The first error, in one line: the ones after it are its consequences."""
            return _plain(self.errors[0]) if self.errors else "no reason given"

    return Log()
