"""The served graph with 8-bit integers in its convolutions and linear layers: what ONNX Runtime runs fastest on a CPU.

Activations are uint8 with one range a tensor, weights int8 with one scale an output channel: the pair that the
processors' dot-product instructions (VNNI) take. Ranges are fixed, from calibration pictures: ranges taken from the
batch at hand would let an image's answer depend on its neighbours. A convolution hands integers on to the next one,
its ReLU inside its range and the residual addition between integers, and so does the first half of a feed-forward
network; other linear layers give floats. The first convolution takes the picture's own bytes. What is precise by nature
stays float32: the op, norms, softmax, positions, boxes and class scores.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from export.calibrate import Ranges
from export.quantisable import Layer, Wiring
from export.stem import Stem, block_nodes, block_weight, block_window, find_stem

_CONTRIB = "com.microsoft"  # operators that every ONNX Runtime has
_POOL_ATTRIBUTES = ("auto_pad", "ceil_mode", "dilations", "kernel_shape", "pads", "strides")
_BYTE = "pixel:scale", "pixel:zero"
"""Names of a byte's own scale, 1, and zero point, 0."""


@dataclass(frozen=True)
class _Twin:
    """The integer form of a float tensor: real = scale * (integer - zero_point), all three by name in the graph."""

    name: str
    scale: str
    zero_point: str
    real_scale: np.float32


def quantise(proto: onnx.ModelProto, layers: Collection[Layer], ranges: Ranges) -> onnx.ModelProto:
    """A copy of `proto` whose `layers` compute in integers; what `proto` computes elsewhere is as it was."""
    writer = _Writer(proto, {layer.node for layer in layers}, ranges)
    return writer.written()


class _Writer:
    """Writes the graph anew, node by node, in order."""

    def __init__(self, proto: onnx.ModelProto, chosen: Collection[str], ranges: Ranges) -> None:
        self._proto, self._chosen, self._ranges = proto, chosen, ranges
        self._graph = Wiring(proto)
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
        used = {value.name for value in self._proto.graph.output}
        kept = []
        for node in reversed(self._nodes):  # what nobody takes any more is left out: the normalisation of the pixels
            if not used.isdisjoint(node.output):
                kept.append(node)
                used.update(node.input)
        result.graph.node.extend(reversed(kept))
        constants = [*self._proto.graph.initializer, *self._constants]
        result.graph.initializer.extend(tensor for tensor in constants if tensor.name in used)
        made = {name for node in kept for name in node.output}
        known = [value for value in result.graph.value_info if value.name in made]
        del result.graph.value_info[:]
        result.graph.value_info.extend(known)
        if all(entry.domain != _CONTRIB for entry in result.opset_import):
            result.opset_import.append(helper.make_opsetid(_CONTRIB, 1))
        onnx.checker.check_model(result)
        return result

    def _convolution(self, node: onnx.NodeProto) -> None:
        real = numpy_helper.to_array(self._graph.constants[node.input[1]])
        stem = find_stem(node, self._proto)
        if stem is None:
            x, window = self._as_integers(node.input[0]), node.attribute
        else:
            x, real = self._blocks(stem), block_weight(real, stem)
            window = block_window()
        bias = numpy_helper.to_array(self._graph.constants[node.input[2]])
        weight, scale = _by_channel(real, axis=0, least=_least_scale(bias, x))
        inputs = [
            *_names(x),
            *self._weight(node.name, weight, scale),
            *self._made(node)[1:],
            self._bias(node.name, bias, x.real_scale * scale),
        ]
        made = self._twins[self._graph.rectified(node)]
        written = helper.make_node("QLinearConv", inputs, [made.name], node.name)
        written.attribute.extend(window)
        self._nodes.append(written)

    def _blocks(self, stem: Stem) -> _Twin:
        nodes, constants, name = block_nodes(stem)
        self._nodes += nodes
        self._constants += constants
        one, zero = np.array(1, np.float32), np.array(0, np.uint8)
        return _Twin(name, self._constant(_BYTE[0], one), self._constant(_BYTE[1], zero), np.float32(1))

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
        hidden = self._graph.hidden(node)
        if hidden is not None and self._graph.takers[hidden][0].name in self._chosen:
            self._hidden(node, hidden)
            return
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

    def _hidden(self, node: onnx.NodeProto, hidden: str) -> None:
        """A linear layer and its ReLU as a convolution of one pixel, which hands on integers."""
        bias = self._graph.bias(node)
        assert bias is not None  # of a hidden layer there is one
        addition, vector = bias
        x, made = self._as_integers(node.input[0]), self._twin(hidden)
        least = _least_scale(numpy_helper.to_array(vector), x)
        weight, scale = _by_channel(numpy_helper.to_array(self._graph.constants[node.input[1]]), axis=1, least=least)
        map_in, map_out = f"{made.name}:map", f"{made.name}:made"
        axis = self._constant(f"{node.name}:axis", np.array([2]))
        inputs = [
            map_in,
            *_names(x)[1:],
            *self._weight(node.name, np.ascontiguousarray(weight.T[:, :, None, None]), scale),
            *_names(made)[1:],
            self._bias(node.name, numpy_helper.to_array(vector), x.real_scale * scale),
        ]
        self._nodes += [
            helper.make_node("Unsqueeze", [x.name, axis], [map_in], f"{node.name}:map"),  # [N, S, 1, C]
            helper.make_node("QLinearConv", inputs, [map_out], node.name, domain=_CONTRIB, channels_last=1),
            helper.make_node("Squeeze", [map_out, axis], [made.name], f"{node.name}:made"),
        ]
        self._done |= {addition.name, self._graph.takers[addition.output[0]][0].name}

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

    def _bias(self, node: str, bias: NDArray[np.float32], scale: NDArray[np.float32]) -> str:
        """A bias in the units of the sum it is added to; `_least_scale` has made room for it."""
        return self._constant(f"{node}:bias", np.rint(bias.astype(np.float64) / scale).astype(np.int32))

    def _constant(self, name: str, value: NDArray[np.generic]) -> str:
        self._constants.append(numpy_helper.from_array(value, name))
        return name


def _names(twin: _Twin) -> tuple[str, str, str]:
    return twin.name, twin.scale, twin.zero_point


def _least_scale(bias: NDArray[np.float32], x: _Twin) -> NDArray[np.float64]:
    """Of each channel's weights: with a smaller one the bias would not fit into the 32 bits of the sum."""
    return np.abs(bias.astype(np.float64)) / (float(x.real_scale) * 2**30)


def _by_channel(
    weight: NDArray[np.float32], axis: int, least: NDArray[np.float64] | float = 0.0
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Weights in -127..127 and a scale for each output channel, which `axis` counts; no scale is below `least`."""
    others = tuple(i for i in range(weight.ndim) if i != axis)
    largest = np.abs(weight).max(axis=others)
    scale = np.maximum(np.where(largest > 0, largest / 127, 1), least).astype(np.float32)
    shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
    return np.rint(weight / scale.reshape(shape)).astype(np.int8), scale
