"""Convolutions and linear layers as ops of the native library: with the bias, an addition and a ReLU in one pass.

In the domain of `export.op`, version 1:

- NhwcConv(x [N, H, W, C], weight [K/32, R, S, C, 32], bias [K]) -> [N, OH, OW, K]; strides, dilations, pads as Conv's
- Linear(x [..., C], weight [K/32, C, 32], bias [K]) -> [..., K]

and of each the same with Relu, with Add (a fourth input, `shortcut`, of the result's shape) and with AddRelu behind its
name. K of a weight is split in the way in which the library multiplies it. Every op has a body of ONNX's own operators,
for runtimes without the library.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import parser
from onnx_ir.passes import common as passes

from export.op import DOMAIN, OPSET, VERSION

NAMES = tuple(layer + tail for layer in ("NhwcConv", "Linear") for tail in ("", "Relu", "Add", "AddRelu"))

_LANES, _CHANNELS, _MAX_CHANNELS = 32, 16, 8192  # the library's: of K and of C, a multiple and the most
_TO_LAST, _TO_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]

_CONV = """
{name} <strides, dilations, pads> (x, weight, bias{shortcut}) => (y)
{{
  lanes_second = Transpose <perm = [0, 4, 3, 1, 2]> (weight)
  window = Shape <start = 2> (lanes_second)
  rest = Constant <value_ints = [-1]> ()
  shape = Concat <axis = 0> (rest, window)
  kernel = Reshape (lanes_second, shape)
  planes = Transpose <perm = [0, 3, 1, 2]> (x)
  product = Conv <strides: ints = @strides, dilations: ints = @dilations, pads: ints = @pads> (planes, kernel, bias)
  {add}
  {relu}
  y = Transpose <perm = [0, 2, 3, 1]> (result)
}}
"""
_CONV_ADD = "added = Transpose <perm = [0, 3, 1, 2]> (shortcut)\n  sum = Add (product, added)"
# Sum, as ONNX Runtime 1.32 fuses Add and a LayerNormalization after it into a slower kernel.
_LINEAR = """
{name} (x, weight, bias{shortcut}) => (y)
{{
  lanes_last = Transpose <perm = [1, 0, 2]> (weight)
  shape = Constant <value_ints = [0, -1]> ()
  matrix = Reshape (lanes_last, shape)
  unbiased = MatMul (x, matrix)
  product = Add (unbiased, bias)
  {add}
  {relu}
  y = Identity (result)
}}
"""
_LINEAR_ADD = "sum = Sum (product, shortcut)"


def functions(names: set[str]) -> list[onnx.FunctionProto]:
    """The model-local functions of these ops."""
    bodies = []
    for name in sorted(names):
        conv = name.startswith("NhwcConv")
        body = (_CONV if conv else _LINEAR).format(
            name=name,
            shortcut=", shortcut" if "Add" in name else "",
            add=(_CONV_ADD if conv else _LINEAR_ADD) if "Add" in name else "sum = Identity (product)",
            relu="result = Relu (sum)" if "Relu" in name else "result = Identity (sum)",
        )
        bodies.append(parser.parse_function(f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>{body}'))
    return bodies


@dataclass(frozen=True)
class _Layer:
    """What one op is put in place of: these nodes, in order; the weight's lanes are last already."""

    nodes: Sequence[ir.Node]
    weight: NDArray[np.float32]
    bias: ir.Value
    shortcut: ir.Value | None
    relu: bool


def use_native_layers(model: ir.Model) -> int:
    """Put the ops in place of every Conv and every linear layer that the library serves; how many."""
    graph, count = model.graph, 0
    for node in list(graph):
        if node.graph is None:  # part of a layer that is replaced already
            continue
        if (conv := _convolution(node)) is not None:
            _replace_convolution(graph, conv)
        elif (linear := _linear(node)) is not None:
            _replace(graph, linear, "Linear", linear.nodes[0].inputs[0], linear.shortcut, ())
        else:
            continue
        count += 1
    if count:
        model.opset_imports[DOMAIN] = VERSION
    for node in list(graph):
        _cancel(node)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.RemoveUnusedNodesPass()(model)
    passes.TopologicalSortPass()(model)
    return count


def _convolution(node: ir.Node) -> _Layer | None:
    if node.op_type != "Conv" or len(node.inputs) != 3 or (weight := _constant(node.inputs[1])) is None:
        return None
    bias, plain = node.inputs[2], node.attributes.get_string("auto_pad", "NOTSET") == "NOTSET"
    if bias is None or weight.ndim != 4 or not plain or node.attributes.get_int("group", 1) != 1:
        return None
    k, c, r, s = weight.shape
    if k % _LANES or c % _CHANNELS or c > _MAX_CHANNELS:
        return None
    lanes_last = weight.reshape(k // _LANES, _LANES, c, r, s).transpose(0, 3, 4, 2, 1)
    return _Layer(*_with_tail([node], lanes_last, bias))


def _linear(node: ir.Node) -> _Layer | None:
    if node.op_type != "MatMul" or (weight := _constant(node.inputs[1])) is None or weight.ndim != 2:
        return None
    add = _only_user(node.outputs[0], "Add", "Sum")
    if add is None or len(add.inputs) != 2:
        return None
    bias = _other(add, node.outputs[0])
    c, k = weight.shape
    if bias is None or (numbers := _constant(bias)) is None or numbers.shape != (k,):
        return None
    if k % _LANES or c % _CHANNELS or c > _MAX_CHANNELS:
        return None
    return _Layer(*_with_tail([node, add], weight.reshape(c, k // _LANES, _LANES).transpose(1, 0, 2), bias))


def _constant(value: ir.Value | None) -> NDArray[np.float32] | None:
    return None if value is None or value.const_value is None else value.const_value.numpy()


def _only_user(value: ir.Value, *op_types: str) -> ir.Node | None:
    users = list(value.uses())
    if len(users) != 1 or value.is_graph_output():
        return None
    return users[0].node if users[0].node.op_type in op_types else None


def _other(add: ir.Node, one: ir.Value) -> ir.Value | None:
    return add.inputs[1] if add.inputs[0] is one else add.inputs[0]


def _with_tail(
    nodes: list[ir.Node], weight: NDArray[np.float32], bias: ir.Value
) -> tuple[list[ir.Node], NDArray[np.float32], ir.Value, ir.Value | None, bool]:
    """The layer with what follows it, if nothing else does: an addition without broadcasting, a ReLU."""
    shortcut, result = None, nodes[-1].outputs[0]
    add = _only_user(result, "Add", "Sum")
    other = _other(add, result) if add is not None and len(add.inputs) == 2 else None
    if add is not None and other is not None and _same_shape(other, result):
        nodes, shortcut, result = [*nodes, add], other, add.outputs[0]
    relu = _only_user(result, "Relu")
    return [*nodes, relu] if relu else nodes, weight, bias, shortcut, relu is not None


def _same_shape(one: ir.Value, other: ir.Value) -> bool:
    """Whether the two are known to be; two sides that have no name may differ."""
    if one.shape is None or other.shape is None or one.shape != other.shape:
        return False
    return all(isinstance(side, int) or side.value is not None for side in one.shape)


def _replace_convolution(graph: ir.Graph, layer: _Layer) -> None:
    """With transpositions on all sides; `_cancel` takes away those that meet."""
    conv, last = layer.nodes[0], layer.nodes[-1]
    assert conv.inputs[0] is not None
    x = _transposed(conv.inputs[0], _TO_LAST)
    shortcut = _transposed(layer.shortcut, _TO_LAST) if layer.shortcut is not None else None
    graph.insert_before(last, [each for each in (x, shortcut) if each is not None])
    standard = {"strides": [1, 1], "dilations": [1, 1], "pads": [0, 0, 0, 0]}
    window = [ir.AttrInt64s(name, list(conv.attributes.get_ints(name, value))) for name, value in standard.items()]
    _replace(graph, layer, "NhwcConv", x.outputs[0], shortcut.outputs[0] if shortcut else None, window)


def _replace(
    graph: ir.Graph,
    layer: _Layer,
    kind: str,
    x: ir.Value | None,
    shortcut: ir.Value | None,
    attributes: Sequence[ir.Attr],
) -> None:
    first, last = layer.nodes[0], layer.nodes[-1]
    assert first.inputs[1] is not None
    name = f"{first.inputs[1].name}_lanes"
    if name not in graph.initializers:  # layers may share a weight
        tensor = ir.tensor(np.ascontiguousarray(layer.weight), name=name)
        value = ir.Value(
            name=name, const_value=tensor, shape=ir.Shape(layer.weight.shape), type=ir.TensorType(tensor.dtype)
        )
        graph.register_initializer(value)

    op_name = kind + ("Add" if shortcut is not None else "") + ("Relu" if layer.relu else "")
    inputs = [x, graph.initializers[name], layer.bias, *([shortcut] if shortcut is not None else [])]
    op = ir.Node(DOMAIN, op_name, inputs, attributes, name=first.name)
    nodes = [op, _transposed(op.outputs[0], _TO_FIRST)] if kind == "NhwcConv" else [op]
    graph.insert_before(last, nodes)
    old, new = last.outputs[0], nodes[-1].outputs[0]
    new.name, new.shape, new.type = old.name, old.shape, old.type
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    for node in reversed(layer.nodes):
        graph.remove(node, safe=True)


def _transposed(x: ir.Value, perm: list[int]) -> ir.Node:
    return ir.Node("", "Transpose", [x], [ir.AttrInt64s("perm", perm)])


def _cancel(node: ir.Node) -> None:
    """Take what was there before two transpositions that undo each other."""
    if _transposes(node, _TO_LAST) and node.inputs[0] is not None and not node.outputs[0].is_graph_output():
        before = node.inputs[0].producer()
        if before is not None and _transposes(before, _TO_FIRST) and before.inputs[0] is not None:
            node.outputs[0].replace_all_uses_with(before.inputs[0])


def _transposes(node: ir.Node, perm: list[int]) -> bool:
    return node.op_type == "Transpose" and list(node.attributes.get_ints("perm", [])) == perm
