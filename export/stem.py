"""The first convolution on the picture's own bytes: no pixel becomes a float before the network's first sum.

A 7x7 window of stride 2 over 3 channels, each pixel normalised as p * scale + shift inside the picture and 0 outside,
is a 4x4 window of stride 1 over blocks of 2x2 pixels with 4 channels: the three bytes, which are 0 outside, and one
that is 255 inside, whose weights are what the window makes of the shift.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

_INSIDE = 255
_WINDOW = {"strides": [2, 2], "pads": [3, 3, 3, 3], "kernel_shape": [7, 7]}
_CHANNELS = 4
_BLOCK_WINDOW = {"strides": [1, 1], "pads": [2, 2, 1, 1], "kernel_shape": [4, 4]}
# A row of weights before the seven makes them eight, two to a block.


@dataclass(frozen=True, eq=False)
class Stem:
    """Where the convolution's input comes from: images uint8 [N, H, W, 3], mask bool [N, 1, H, W]; [3] each."""

    images: str
    mask: str
    scale: NDArray[np.float32]
    shift: NDArray[np.float32]


def find_stem(conv: onnx.NodeProto, proto: onnx.ModelProto) -> Stem | None:
    """What a Conv is the first convolution of, if it is one: of (pixels * scale + shift) * mask."""
    if {a.name: list(a.ints) for a in conv.attribute if a.name in _WINDOW} != _WINDOW:
        return None
    maker = {name: node for node in proto.graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    if conv.input[1] not in constants or constants[conv.input[1]].dims[1] != 3:
        return None

    def made(name: str, op_type: str) -> onnx.NodeProto | None:
        node = maker.get(name)
        return node if node is not None and node.op_type == op_type else None

    masked = made(conv.input[0], "Mul")
    shifted = made(masked.input[0], "Add") if masked else None
    mask = made(masked.input[1], "Cast") if masked else None
    scaled = made(shifted.input[0], "Mul") if shifted else None
    pixels = made(scaled.input[0], "Cast") if scaled else None
    images = made(pixels.input[0], "Transpose") if pixels else None
    if not (shifted and mask and scaled and images) or images.input[0] != proto.graph.input[0].name:
        return None
    scale, shift = constants.get(scaled.input[1]), constants.get(shifted.input[1])
    if scale is None or shift is None:
        return None
    return Stem(
        images.input[0], mask.input[0], numpy_helper.to_array(scale).ravel(), numpy_helper.to_array(shift).ravel()
    )


def block_weight(weight: NDArray[np.float32], stem: Stem) -> NDArray[np.float32]:
    """[K, 3, 7, 7] -> [K, 16, 4, 4], for bytes instead of normalised pixels."""
    shift = np.einsum("kcyx,c->kyx", weight, stem.shift)[:, None] / _INSIDE
    four = np.concatenate([weight * stem.scale[:, None, None], shift], axis=1)  # [K, 4, 7, 7]
    eight = np.pad(four, ((0, 0), (0, 0), (1, 0), (1, 0)))
    blocks = eight.reshape(len(weight), _CHANNELS, 4, 2, 4, 2)  # [K, C, y, row, x, column]
    moved: NDArray[np.float32] = blocks.transpose(0, 3, 5, 1, 2, 4).reshape(len(weight), 4 * _CHANNELS, 4, 4)
    return np.ascontiguousarray(moved, np.float32)


def block_window() -> list[onnx.AttributeProto]:
    """The attributes of the convolution over blocks."""
    return [helper.make_attribute(name, value) for name, value in _BLOCK_WINDOW.items()]


def block_nodes(stem: Stem) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto], str]:
    """The nodes that make uint8 [N, 16, H/2, W/2] of the picture's bytes, their constants, and the result's name."""
    constants: list[onnx.TensorProto] = []
    nodes: list[onnx.NodeProto] = []

    def constant(name: str, value: NDArray[np.generic]) -> str:
        constants.append(numpy_helper.from_array(value, f"stem:{name}"))
        return f"stem:{name}"

    def node(op_type: str, *inputs: str, **attributes: Any) -> str:
        name = f"stem:{op_type}_{len(nodes)}"
        nodes.append(helper.make_node(op_type, inputs, [name], name, **attributes))
        return name

    one, two = constant("one", np.array([1])), constant("two", np.array([2]))
    inside = node(
        "Where",
        stem.mask,
        constant("inside", np.array([_INSIDE], np.uint8)),
        constant("outside", np.zeros(1, np.uint8)),
    )  # [N, 1, H, W]
    four = node("Concat", stem.images, node("Transpose", inside, perm=[0, 2, 3, 1]), axis=3)  # [N, H, W, 4]
    sides = node("Shape", four, start=1, end=3)
    # An odd side gets a row of zeros, as the window's own padding has them.
    zeros = constant("zeros", np.zeros(5, np.int64))
    odd = node("Mod", sides, two)
    even = node("Pad", four, node("Concat", zeros, odd, constant("zero", np.array([0])), axis=0))
    columns = node("Slice", node("Div", node("Add", sides, one), two), one, two)
    shape = node("Concat", constant("rows", np.array([0, -1, 2])), columns, constant("pair", np.array([8])), axis=0)
    pairs = node("Transpose", node("Reshape", even, shape), perm=[0, 1, 3, 2, 4])  # [N, H/2, W/2, 2, 2 * 4]
    blocks = node("Reshape", pairs, constant("block", np.array([0, 0, 0, 4 * _CHANNELS])))
    return nodes, constants, node("Transpose", blocks, perm=[0, 3, 1, 2])
