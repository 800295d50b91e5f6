"""The layers of a served graph that may compute in integers, and how its tensors hang together around them."""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import onnx
from onnx import TensorProto

from export.stem import find_stem

_STAYS_FLOAT = ("class_embed", "bbox_embed", "reference_points", "pos_trans")
_GROUPS = (
    (r"backbone\.(layer\d+\b|conv1$)", r"backbone.\1"),
    (r"input_proj\.", "input_proj"),
    (r"transformer\.(?:en|de)coder\..*\.sampling_offsets", "sampling_offsets"),
    (r"transformer\.((?:en|de)coder)\.layers\.(\d+)\.", r"\1.\2"),
    (r"transformer\.(\w+)", r"\1"),
)
"""A weight's path in the network to the group that is tried, and left out, as a whole."""
_LEAST_CHANNELS = 4  # what one dot-product instruction sums


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer that may compute in integers; `path` is its place in the network."""

    node: str
    path: str
    group: str


def layers_of(proto: onnx.ModelProto) -> tuple[Layer, ...]:
    """The layers of a served graph that may compute in integers."""
    graph = Wiring(proto)
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


class Wiring:
    """Who makes and who takes each tensor of a graph."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self._proto = proto
        self.node = {node.name: node for node in proto.graph.node}
        self._dims = {value.name: value.type.tensor_type.shape.dim for value in proto.graph.value_info}
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
            wide = weight.dims[1] >= _LEAST_CHANNELS or find_stem(node, self._proto) is not None
            known = len(node.input) > 2 and node.input[2] in self.constants and wide
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

    def hidden(self, product: onnx.NodeProto) -> str | None:
        """The result of a linear layer and its ReLU, where that is [N, S, C] and one product's input and nothing else:
        the middle of a feed-forward network, by far its largest tensor; else None."""
        bias = self.bias(product)
        if bias is None or len(self._dims.get(product.input[0], ())) != 3:
            return None
        relu = self.only_taker(bias[0].output[0], "Relu")
        if relu is None or self.only_taker(relu.output[0], "MatMul") is None:
            return None
        name: str = relu.output[0]
        return name

    def touched(self, node: onnx.NodeProto) -> set[str]:
        """The tensors that are integers if a layer is: what it takes and, of a convolution, what it and the residual
        addition behind it make."""
        if node.op_type == "MatMul":
            return {node.input[0], *filter(None, [self.hidden(node)])}
        made = self.rectified(node)
        sums = [taker for taker in self.takers[made] if taker.op_type == "Add"]
        pools = [maker for maker in [self.maker.get(node.input[0])] if maker is not None and maker.op_type == "MaxPool"]
        taken = [] if find_stem(node, self._proto) else [node.input[0]]
        return {made, *taken, *(pool.input[0] for pool in pools), *(self.rectified(taker) for taker in sums)}
