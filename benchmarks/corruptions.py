"""Engines that answer wrong, each in one way, made of a right one: what the parity gate is tried on."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from parity.gate import Infer

Outputs = list[NDArray[Any]]
OUTPUTS = ("boxes", "scores", "labels")


@dataclass(frozen=True)
class Corruption:
    """What is wrong, and how a graph is made so and run."""

    name: str
    engine: Callable[[onnx.ModelProto, Path | None], Infer]


def run(proto: onnx.ModelProto, library: Path | None) -> Infer:
    """The graph in ONNX Runtime on the CPU; with the native kernel where its library is given."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    if library is not None:
        options.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda images, sizes: session.run(list(OUTPUTS), {"images": images, "sizes": sizes})


def _graph(name: str, edit: Callable[[onnx.ModelProto], None], kernel: bool = True) -> Corruption:
    """A corruption of the graph; kernel False: of the op's function, so the graph runs without the native kernel."""

    def engine(proto: onnx.ModelProto, library: Path | None) -> Infer:
        edited = onnx.ModelProto()
        edited.CopyFrom(proto)
        edit(edited)
        return run(edited, library if kernel else None)

    return Corruption(name, engine)


def _inputs(name: str, edit: Callable[[NDArray[np.uint8], NDArray[np.int64]], tuple[Any, Any]]) -> Corruption:
    """An engine that is given something else than was asked."""

    def engine(proto: onnx.ModelProto, library: Path | None) -> Infer:
        right = run(proto, library)
        return lambda images, sizes: right(*edit(images, sizes))

    return Corruption(name, engine)


def _outputs(name: str, edit: Callable[[Outputs], Sequence[Any]]) -> Corruption:
    """An engine whose answer is spoilt on the way back."""

    def engine(proto: onnx.ModelProto, library: Path | None) -> Infer:
        right = run(proto, library)
        return lambda images, sizes: edit([np.array(output) for output in right(images, sizes)])

    return Corruption(name, engine)


def rounded_to_half(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A float32 graph that rounds to half what goes into its products, where `export.precision.to_half` would compute.

    An engine in half precision, without the minute that its own trace takes.
    """
    rounded = onnx.ModelProto()
    rounded.CopyFrom(proto)
    precise = _heads(rounded)
    weights = {weight.name: weight for weight in rounded.graph.initializer}
    nodes = []
    for number, node in enumerate(rounded.graph.node):
        product = node.op_type in {"Conv", "MatMul", "Gemm"} or (
            node.domain == "msda" and node.op_type != "MSDeformAttn"
        )
        for place, name in enumerate(node.input):
            if not product or number in precise or not name:
                continue
            if name in weights:
                if weights[name].data_type == TensorProto.FLOAT:
                    _edit_weight(weights[name], _round)
                continue
            half, full = f"{name}_{number}_half", f"{name}_{number}_full"
            nodes.append(helper.make_node("Cast", [name], [half], to=TensorProto.FLOAT16))
            nodes.append(helper.make_node("Cast", [half], [full], to=TensorProto.FLOAT))
            node.input[place] = full
        nodes.append(node)
    _replace(rounded.graph.node, nodes)
    return rounded


def _round(values: NDArray[Any]) -> None:
    values[...] = values.astype(np.float16)


def _heads(proto: onnx.ModelProto) -> set[int]:
    """Nodes between the last norms and the outputs or the reference points."""
    maker = {output: number for number, node in enumerate(proto.graph.node) for output in node.output}
    waiting = [value.name for value in proto.graph.output]
    waiting += [node.input[2] for node in proto.graph.node if node.op_type == "MSDeformAttn"]
    found: set[int] = set()
    while waiting:
        number = maker.get(waiting.pop())
        if number is None or number in found or proto.graph.node[number].op_type == "LayerNormalization":
            continue
        found.add(number)
        waiting += proto.graph.node[number].input
    return found


# --- the graph -----------------------------------------------------------------------------------------------------


def _weights(proto: onnx.ModelProto, shape_of: Callable[[tuple[int, ...]], bool]) -> Iterator[TensorProto]:
    types = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT8)
    return (w for w in proto.graph.initializer if w.data_type in types and shape_of(tuple(w.dims)))


def _is_kernel(dims: tuple[int, ...]) -> bool:
    """Of 3x3: [out, in, 3, 3], or as the native layers have it, [out / 32, 3, 3, in, 32]."""
    return len(dims) in (4, 5) and dims.count(3) == 2


def _edit_weight(tensor: TensorProto, edit: Callable[[NDArray[Any]], None]) -> None:
    values = np.array(numpy_helper.to_array(tensor))
    edit(values)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def _flip_one_weight(proto: onnx.ModelProto) -> None:
    """The sign of the largest weight of a convolution of the backbone."""

    def flip(values: NDArray[Any]) -> None:
        values.flat[np.abs(values).argmax()] *= -1

    _edit_weight(list(_weights(proto, _is_kernel))[3], flip)


def _flip_one_bit(proto: onnx.ModelProto) -> None:
    """The highest bit, of the exponent or of the integer, of one weight of a convolution far from the largest."""

    def flip(values: NDArray[Any]) -> None:
        where = int(np.abs(np.abs(values) - np.median(np.abs(values))).argmin())
        if values.dtype == np.int8:
            values.flat[where] ^= 1 << 6
        else:
            values.flat[where] = np.clip(values.flat[where] * 2.0**12, -6e4, 6e4)

    _edit_weight(list(_weights(proto, _is_kernel))[4], flip)


def _swap_two_channels(proto: onnx.ModelProto) -> None:
    """Two of the channels that a convolution in the middle of the backbone hands on."""

    def swap(values: NDArray[Any]) -> None:
        channels = np.moveaxis(values, 0 if values.ndim == 4 else -1, 0)
        channels[[3, 4]] = channels[[4, 3]]

    _edit_weight(list(_weights(proto, _is_kernel))[5], swap)


def _reference_points_in_half(proto: onnx.ModelProto) -> None:
    nodes = []
    for node in proto.graph.node:
        if node.op_type == "MSDeformAttn":
            half, full = f"{node.output[0]}_half", f"{node.output[0]}_full"
            nodes.append(helper.make_node("Cast", [node.input[2]], [half], to=TensorProto.FLOAT16))
            nodes.append(helper.make_node("Cast", [half], [full], to=TensorProto.FLOAT))
            node.input[2] = full
        nodes.append(node)
    _replace(proto.graph.node, nodes)


def _locations_in_half(proto: onnx.ModelProto) -> None:
    (function,) = (f for f in proto.functions if f.name == "MSDeformAttn")
    nodes = []
    for node in function.node:
        if list(node.output) == ["bounded"]:
            node.output[0] = "bounded_full"
            nodes += [node, helper.make_node("Cast", ["bounded_full"], ["bounded_half"], to=TensorProto.FLOAT16)]
            nodes.append(helper.make_node("Cast", ["bounded_half"], ["bounded"], to=TensorProto.FLOAT))
        else:
            nodes.append(node)
    _replace(function.node, nodes)


def _aligned_corners(proto: onnx.ModelProto) -> None:
    for function in proto.functions:
        for node in function.node:
            for attribute in node.attribute:
                if node.op_type == "GridSample" and attribute.name == "align_corners":
                    attribute.i = 1


def _replace(field: Any, nodes: Sequence[onnx.NodeProto]) -> None:
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del field[:]
    field.extend(copies)


# --- what goes in and what comes back ------------------------------------------------------------------------------


def _whole_canvas(images: NDArray[np.uint8], sizes: NDArray[np.int64]) -> tuple[Any, Any]:
    return images, np.tile(np.array(images.shape[1:3], np.int64), (len(sizes), 1))


def _neighbour_in_the_padding(images: NDArray[np.uint8], sizes: NDArray[np.int64]) -> tuple[Any, Any]:
    """As wide as the canvas, the rest filled with what the slot before holds there."""
    leaking = np.where(_filled(images, sizes), images, np.roll(images, 1, axis=0))
    return leaking, _whole_canvas(images, sizes)[1] if len(images) > 1 else sizes


def _neighbour_shines_through(images: NDArray[np.uint8], sizes: NDArray[np.int64]) -> tuple[Any, Any]:
    """One part in 32 of the slot before."""
    mixed = (images.astype(np.uint16) * 31 + np.roll(images, 1, axis=0)) // 32
    return np.where(_filled(images, sizes), mixed, 0).astype(np.uint8), sizes


def _filled(images: NDArray[np.uint8], sizes: NDArray[np.int64]) -> NDArray[np.bool_]:
    rows = np.arange(images.shape[1])[None] < sizes[:, :1]
    columns = np.arange(images.shape[2])[None] < sizes[:, 1:]
    filled: NDArray[np.bool_] = (rows[:, :, None] & columns[:, None])[..., None]
    return filled


def _first_slot_for_all(outputs: Outputs) -> Outputs:
    return [np.repeat(output[:1], len(output), axis=0) for output in outputs]


def _last_slot_zero(outputs: Outputs) -> Outputs:
    for output in outputs:
        output[-1] = 0
    return outputs


def _slots_turned(outputs: Outputs) -> Outputs:
    return [np.roll(output, 1, axis=0) for output in outputs]


def _one_nan(outputs: Outputs) -> Outputs:
    outputs[0][-1, -1, 2] = np.nan
    return outputs


def _two_scores_swapped(outputs: Outputs) -> Outputs:
    outputs[1][:, [1, 2]] = outputs[1][:, [2, 1]]
    return outputs


def _middle_and_size(outputs: Outputs) -> Outputs:
    boxes = outputs[0]
    corners = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    return [np.concatenate(corners, -1), *outputs[1:]]


def _labels_of_two_swapped(outputs: Outputs) -> Outputs:
    boxes, scores, labels = outputs
    first, second = np.unique(labels)[:2]
    return [boxes, scores, np.where(labels == first, second, np.where(labels == second, first, labels))]


def _half_the_detections(outputs: Outputs) -> Outputs:
    return [output[:, : output.shape[1] // 2] for output in outputs]


def _engine_of_one(proto: onnx.ModelProto, library: Path | None) -> Infer:
    """Batch size 1 baked in, so that it refuses all others."""
    right = run(proto, library)

    def infer(images: NDArray[np.uint8], sizes: NDArray[np.int64]) -> Sequence[Any]:
        if len(images) != 1:
            raise ValueError(f"input 'images' has {len(images)} rows, expected 1")
        return right(images, sizes)

    return infer


def _answer_before(proto: onnx.ModelProto, library: Path | None) -> Infer:
    """A buffer read too early: the answer of the batch before, where it has the same shape."""
    right = run(proto, library)
    kept: dict[int, Any] = {}

    def infer(images: NDArray[np.uint8], sizes: NDArray[np.int64]) -> Sequence[Any]:
        answer = right(images, sizes)
        before: Sequence[Any] = kept.get(len(images), answer)
        kept[len(images)] = answer
        return before

    return infer


CORRUPTIONS = (
    _graph("one weight's sign flipped", _flip_one_weight),
    _graph("one weight's exponent bit flipped", _flip_one_bit),
    _graph("two channels swapped", _swap_two_channels),
    _inputs("red and blue swapped", lambda images, sizes: (np.ascontiguousarray(images[..., ::-1]), sizes)),
    _graph("reference points in half precision", _reference_points_in_half),
    _graph("sampling locations in half precision", _locations_in_half, kernel=False),
    _graph("corners aligned in the sampling", _aligned_corners, kernel=False),
    Corruption("batch size 1 baked in, others raise", _engine_of_one),
    _outputs("batch size 1 baked in, slot 0's answer for all", _first_slot_for_all),
    _outputs("one slot's answer zero", _last_slot_zero),
    _outputs("slots turned by one", _slots_turned),
    Corruption("the answer of the batch before", _answer_before),
    _inputs("height and width of sizes swapped", lambda images, sizes: (images, np.ascontiguousarray(sizes[:, ::-1]))),
    _inputs("mask ignored", _whole_canvas),
    _inputs("a neighbour's pixels in the padding", _neighbour_in_the_padding),
    _inputs("1/32 of a neighbour's pixels", _neighbour_shines_through),
    _outputs("labels off by one", lambda outputs: [*outputs[:2], outputs[2] + 1]),
    _outputs("two labels swapped", _labels_of_two_swapped),
    _outputs("scores not sorted", _two_scores_swapped),
    _outputs("one NaN", _one_nan),
    _outputs("middle and size instead of corners", _middle_and_size),
    _outputs("half the detections", _half_the_detections),
)
