"""The served graph with 8-bit integers in its convolutions and linear layers: what ONNX Runtime runs fastest on a CPU.

Activations are uint8 with one range a tensor, weights int8 with one scale an output channel: the pair that the
processors' dot-product instructions (VNNI) take. Ranges are fixed, from calibration pictures: ranges taken from the
batch at hand would let an image's answer depend on its neighbours. A convolution hands integers on to the next one,
its ReLU inside its range and the residual addition between integers; a linear layer gives floats. What is precise by
nature stays float32: the op, norms, softmax, positions, boxes, class scores, and the first convolution, whose three
channels an integer kernel computes no faster.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Feed = Mapping[str, NDArray[np.generic]]
"""The served graph's inputs of one batch."""
Ranges = Mapping[str, tuple[float, float]]
"""A tensor's name to its smallest and largest value, on calibration pictures."""

_CONTRIB = "com.microsoft"  # operators that every ONNX Runtime has
_STAYS_FLOAT = ("class_embed", "bbox_embed", "reference_points", "pos_trans")
_GROUPS = (
    (r"backbone\.(layer\d+)\.", r"backbone.\1"),
    (r"input_proj\.", "input_proj"),
    (r"transformer\.(?:en|de)coder\..*\.sampling_offsets", "sampling_offsets"),
    (r"transformer\.((?:en|de)coder)\.layers\.(\d+)\.", r"\1.\2"),
    (r"transformer\.(\w+)", r"\1"),
)
"""A weight's path in the network to the group that is tried, and left out, as a whole."""
_POOL_ATTRIBUTES = ("auto_pad", "ceil_mode", "dilations", "kernel_shape", "pads", "strides")
_LEAST_CHANNELS = 4  # what one dot-product instruction sums


class QuantiseError(ValueError):
    """The graph cannot be quantised; the message says which part."""


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer that may compute in integers; `path` is its place in the network."""

    node: str
    path: str
    group: str


@dataclass(frozen=True)
class _Twin:
    """The integer form of a float tensor: real = scale * (integer - zero_point), all three by name in the graph."""

    name: str
    scale: str
    zero_point: str
    real_scale: np.float32


def layers_of(proto: onnx.ModelProto) -> tuple[Layer, ...]:
    """The layers of a served graph that may compute in integers."""
    graph = _Graph(proto)
    layers = []
    for node in proto.graph.node:
        path = graph.path(node)
        if path is None or any(part in path for part in _STAYS_FLOAT):
            continue
        group = next((re.match(p, path).expand(g) for p, g in _GROUPS if re.match(p, path)), None)  # type: ignore[union-attr]
        if group is not None:
            layers.append(Layer(node.name, path, group))
    return tuple(layers)


def groups_of(layers: Iterable[Layer]) -> tuple[str, ...]:
    """The groups in the order in which a picture meets them."""
    return tuple(dict.fromkeys(layer.group for layer in layers))


def calibrate(
    proto: onnx.ModelProto, layers: Sequence[Layer], feeds: Iterable[Feed], library: Path | None, threads: int = 0
) -> dict[str, tuple[float, float]]:
    """The range of every tensor that `quantise` may turn into integers, over all `feeds`.

    library: the native kernel's, for ONNX Runtime; threads: its number of threads, 0 for one a core.
    """
    probe = onnx.ModelProto()
    probe.CopyFrom(proto)
    graph = _Graph(probe)
    tensors = sorted({t for layer in layers for t in graph.touched(graph.node[layer.node])})
    for tensor in tensors:
        for reduce in ("ReduceMin", "ReduceMax"):
            probe.graph.node.append(helper.make_node(reduce, [tensor], [f"{tensor}:{reduce}"], keepdims=0))
            probe.graph.output.append(helper.make_tensor_value_info(f"{tensor}:{reduce}", TensorProto.FLOAT, []))
    session = open_session(probe, library, threads)
    names = [value.name for value in session.get_outputs()][len(proto.graph.output) :]
    rows = np.array([session.run(names, dict(feed)) for feed in feeds], np.float32)  # [pictures, 2 * tensors]
    if not rows.size or not np.isfinite(rows).all():
        raise QuantiseError("no calibration pictures" if not rows.size else "a layer's values are not finite numbers")
    low, high = rows[:, ::2].min(0), rows[:, 1::2].max(0)
    return {tensor: (float(low[i]), float(high[i])) for i, tensor in enumerate(tensors)}


def open_session(proto: onnx.ModelProto, library: Path | None, threads: int = 0) -> onnxruntime.InferenceSession:
    """The model in ONNX Runtime on the CPU, with the native kernel if its library is given."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def quantise(proto: onnx.ModelProto, layers: Collection[Layer], ranges: Ranges) -> onnx.ModelProto:
    """A copy of `proto` whose `layers` compute in integers; what `proto` computes elsewhere is as it was."""
    writer = _Writer(proto, {layer.node for layer in layers}, ranges)
    return writer.written()


class _Graph:
    """Who makes and who takes each tensor of a graph."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.node = {node.name: node for node in proto.graph.node}
        self.constants = {tensor.name: tensor for tensor in proto.graph.initializer}
        self.maker = {name: node for node in proto.graph.node for name in node.output}
        self.takers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in proto.graph.node:
            for name in node.input:
                self.takers[name].append(node)
        for value in proto.graph.output:
            self.takers[value.name].append(onnx.NodeProto())

    def path(self, node: onnx.NodeProto) -> str | None:
        """The place in the network of a convolution or product whose kernel can be integers; else None."""
        weight = self.constants.get(node.input[1]) if node.op_type in ("Conv", "MatMul") else None
        if weight is None or weight.data_type != TensorProto.FLOAT or not all(weight.dims):
            return None
        # By its bias: a weight loses its name when it is brought into another order.
        if node.op_type == "Conv":
            known = len(node.input) > 2 and node.input[2] in self.constants and weight.dims[1] >= _LEAST_CHANNELS
            name = node.input[2] if known else ""
        else:
            bias = self.bias(node)
            name = bias[1].name if bias is not None and len(weight.dims) == 2 else ""
        match = re.fullmatch(r"model\.(.+)\.bias", name)
        return match[1] if match else None

    def bias(self, product: onnx.NodeProto) -> tuple[onnx.NodeProto, onnx.TensorProto] | None:
        """The addition of a constant vector that a product's result goes into and nowhere else, with the vector."""
        taker = self.only_taker(product.output[0], "Add") or self.only_taker(product.output[0], "Sum")
        if taker is None or len(taker.input) != 2:
            return None
        vector = next((self.constants[name] for name in taker.input if name in self.constants), None)
        return (taker, vector) if vector is not None and len(vector.dims) == 1 else None

    def only_taker(self, tensor: str, op_type: str) -> onnx.NodeProto | None:
        """The one node that takes `tensor`, if it is of this type."""
        takers = self.takers[tensor]
        return takers[0] if len(takers) == 1 and takers[0].op_type == op_type else None

    def rectified(self, node: onnx.NodeProto) -> str:
        """A node's result, behind its ReLU where that is all that takes it."""
        relu = self.only_taker(node.output[0], "Relu")
        name: str = (node if relu is None else relu).output[0]
        return name

    def touched(self, node: onnx.NodeProto) -> set[str]:
        """The tensors that are integers if a layer is: what it takes and, of a convolution, what it and the residual
        addition behind it make."""
        if node.op_type == "MatMul":
            return {node.input[0]}
        made = self.rectified(node)
        sums = [taker for taker in self.takers[made] if taker.op_type == "Add"]
        pools = [maker for maker in [self.maker.get(node.input[0])] if maker is not None and maker.op_type == "MaxPool"]
        taken = (maker.input[0] for maker in pools)
        return {node.input[0], made, *taken, *(self.rectified(taker) for taker in sums)}


class _Writer:
    """Writes the graph anew, node by node, in order."""

    def __init__(self, proto: onnx.ModelProto, chosen: Collection[str], ranges: Ranges) -> None:
        self._proto, self._chosen, self._ranges = proto, chosen, ranges
        self._graph = _Graph(proto)
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []
        self._twins: dict[str, _Twin] = {}
        self._made_as_integers: set[str] = set()
        self._floats: set[str] = {value.name for value in proto.graph.input} | set(self._graph.constants)
        self._done: set[str] = set()  # nodes that another one has taken in

    def written(self) -> onnx.ModelProto:
        """The whole graph."""
        for node in self._proto.graph.node:
            if node.name in self._done:
                continue
            if node.name in self._chosen:
                (self._convolution if node.op_type == "Conv" else self._linear)(node)
            elif self._is_residual(node):
                self._residual(node)
            elif node.op_type == "MaxPool" and len(node.output) == 1 and self._feeds_convolutions(node.output[0]):
                self._pool(node)
            else:
                self._float(node)
        for value in self._proto.graph.output:
            self._as_float(value.name)
        result = onnx.ModelProto()
        result.CopyFrom(self._proto)
        del result.graph.node[:], result.graph.initializer[:]
        result.graph.node.extend(self._nodes)
        used = {name for node in self._nodes for name in node.input}
        constants = [*self._proto.graph.initializer, *self._constants]
        result.graph.initializer.extend(tensor for tensor in constants if tensor.name in used)
        made = {name for node in self._nodes for name in node.output}
        known = [value for value in result.graph.value_info if value.name in made]
        del result.graph.value_info[:]
        result.graph.value_info.extend(known)
        if all(entry.domain != _CONTRIB for entry in result.opset_import):
            result.opset_import.append(helper.make_opsetid(_CONTRIB, 1))
        onnx.checker.check_model(result)
        return result

    def _convolution(self, node: onnx.NodeProto) -> None:
        x = self._as_integers(node.input[0])
        weight, scale = _by_channel(numpy_helper.to_array(self._graph.constants[node.input[1]]), axis=0)
        bias = numpy_helper.to_array(self._graph.constants[node.input[2]]).astype(np.float64) / (x.real_scale * scale)
        limits = np.iinfo(np.int32)
        whole = np.clip(np.rint(bias), limits.min, limits.max).astype(np.int32)
        inputs = [
            *_names(x),
            *self._weight(node.name, weight, scale),
            *self._made(node)[1:],
            self._constant(f"{node.name}:bias", whole),
        ]
        made = self._twins[self._graph.rectified(node)]
        written = helper.make_node("QLinearConv", inputs, [made.name], node.name)
        written.attribute.extend(node.attribute)
        self._nodes.append(written)

    def _is_residual(self, node: onnx.NodeProto) -> bool:
        """Whether a node adds what two convolutions made, or one made and another took."""
        inputs = set(node.input)
        return node.op_type == "Add" and self._twins.keys() >= inputs and bool(self._made_as_integers & inputs)

    def _feeds_convolutions(self, tensor: str) -> bool:
        takers = self._graph.takers[tensor]
        return any(t.op_type == "Conv" and t.name in self._chosen for t in takers)

    def _pool(self, node: onnx.NodeProto) -> None:
        """The largest of some integers, channels last: the other layout's kernel takes forty times as long."""
        x = self._as_integers(node.input[0])
        made = replace(x, name=f"{node.output[0]}:int8")
        self._twins[node.output[0]] = made
        last, pooled = f"{made.name}:last", f"{made.name}:pooled"
        written = helper.make_node("NhwcMaxPool", [last], [pooled], node.name, domain=_CONTRIB)
        written.attribute.extend(a for a in node.attribute if a.name in _POOL_ATTRIBUTES)
        self._nodes += [
            helper.make_node("Transpose", [x.name], [last], f"{node.name}:last", perm=[0, 2, 3, 1]),
            written,
            helper.make_node("Transpose", [pooled], [made.name], f"{node.name}:first", perm=[0, 3, 1, 2]),
        ]

    def _residual(self, node: onnx.NodeProto) -> None:
        inputs = [name for tensor in node.input for name in _names(self._twins[tensor])]
        made = self._made(node)
        self._nodes.append(helper.make_node("QLinearAdd", [*inputs, *made[1:]], [made[0]], node.name, domain=_CONTRIB))

    def _linear(self, node: onnx.NodeProto) -> None:
        x = self._as_integers(node.input[0])
        weight, scale = _by_channel(numpy_helper.to_array(self._graph.constants[node.input[1]]), axis=1)
        b, b_scale, b_zero = self._weight(node.name, weight, scale)
        inputs, output = [x.name, b, x.scale, b_scale, x.zero_point, b_zero], node.output[0]
        if (bias := self._graph.bias(node)) is not None:
            addition, vector = bias
            self._done.add(addition.name)
            inputs, output = [*inputs, vector.name], addition.output[0]
        self._nodes.append(helper.make_node("MatMulIntegerToFloat", inputs, [output], node.name, domain=_CONTRIB))
        self._floats.add(output)

    def _float(self, node: onnx.NodeProto) -> None:
        kept = onnx.NodeProto()
        kept.CopyFrom(node)
        for index, name in enumerate(node.input):
            if node.op_type == "Shape" and name in self._twins:
                kept.input[index] = self._twins[name].name  # it looks at no value
            elif name:
                self._as_float(name)
        self._nodes.append(kept)
        self._floats.update(node.output)

    def _as_float(self, tensor: str) -> None:
        """Have `tensor` in the graph as floats."""
        if tensor not in self._floats and tensor in self._twins:
            self._nodes.append(
                helper.make_node("DequantizeLinear", [*_names(self._twins[tensor])], [tensor], f"{tensor}:float")
            )
            self._floats.add(tensor)

    def _as_integers(self, tensor: str) -> _Twin:
        """Have `tensor` in the graph as integers."""
        if tensor not in self._twins:
            twin = self._twin(tensor)
            self._nodes.append(
                helper.make_node(
                    "QuantizeLinear", [tensor, twin.scale, twin.zero_point], [twin.name], f"{tensor}:quantise"
                )
            )
        return self._twins[tensor]

    def _made(self, node: onnx.NodeProto) -> tuple[str, str, str]:
        """What an integer node makes, its ReLU taken in: cut off at zero by the range, which begins there."""
        tensor = self._graph.rectified(node)
        if tensor != node.output[0]:
            self._done.add(self._graph.takers[node.output[0]][0].name)
        self._made_as_integers.add(tensor)
        return _names(self._twin(tensor))

    def _twin(self, tensor: str) -> _Twin:
        low, high = self._ranges[tensor]
        low, high = min(low, 0.0), max(high, 0.0)  # zero, which padding is, must be one of the 256 values
        scale = np.float32((high - low) / 255 or 1.0)
        zero_point = np.uint8(np.clip(np.rint(-low / scale), 0, 255))
        twin = _Twin(
            f"{tensor}:int8",
            self._constant(f"{tensor}:scale", np.array(scale)),
            self._constant(f"{tensor}:zero", np.array(zero_point)),
            scale,
        )
        self._twins[tensor] = twin
        return twin

    def _weight(self, node: str, weight: NDArray[np.int8], scale: NDArray[np.float32]) -> tuple[str, str, str]:
        return (
            self._constant(f"{node}:weight", weight),
            self._constant(f"{node}:weight_scale", scale),
            self._constant(f"{node}:weight_zero", np.zeros(scale.shape, np.int8)),
        )

    def _constant(self, name: str, value: NDArray[np.generic]) -> str:
        self._constants.append(numpy_helper.from_array(value, name))
        return name


def _names(twin: _Twin) -> tuple[str, str, str]:
    return twin.name, twin.scale, twin.zero_point


def _by_channel(weight: NDArray[np.float32], axis: int) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Weights in -127..127 and a scale for each output channel, which `axis` counts."""
    others = tuple(i for i in range(weight.ndim) if i != axis)
    largest = np.abs(weight).max(axis=others)
    scale = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
    return np.rint(weight / scale.reshape(shape)).astype(np.int8), scale
