"""The graph in integers: which layers, what they compute, what stays as it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import plugins
from export.calibrate import CalibrationError, Feed, calibrate, open_session
from export.plain import PlainError, plain_graph
from export.quantisable import groups_of, layers_of
from export.quantise import quantise
from export.stem import find_stem
from export.trace import OUTPUTS
from export.verify import draw_pictures
from server.cores import sums_bytes_exactly
from tests.export.conftest import Exported
from tests.export.small import CANVASES

LIBRARY = plugins.onnxruntime_library()
FEED_FORWARDS = 2
MAX_SCORE_ERROR = 0.06  # measured 0.039; 0.084 with one scale for all channels, 0.12 with a window one pixel off
ALONE_ATOL = 1e-6  # a picture alone and in a batch: the integers are the same, float sums may be in another order


exact = pytest.mark.skipif(not sums_bytes_exactly(), reason="8-bit sums overflow on this CPU: it has no VNNI")


def feeds(count: int, seed: int = 0) -> list[Feed]:
    """Inputs of one picture each, on both canvases."""
    drawn = [draw_pictures(CANVASES[i % 2], ((0.93, 0.81),), seed + i) for i in range(count)]
    return [{"images": pictures.images, "sizes": pictures.sizes} for pictures in drawn]


@pytest.fixture(scope="module")
def plain(exported: Callable[[str], Exported]) -> onnx.ModelProto:
    return plain_graph(exported("r50-two-stage").proto())


def run(proto: onnx.ModelProto, feed: Feed) -> list[np.ndarray]:
    return list(open_session(proto, LIBRARY, 1).run(list(OUTPUTS), dict(feed)))


def test_every_group_of_the_network_is_named_and_the_heads_are_not_among_them(plain: onnx.ModelProto) -> None:
    layers = layers_of(plain)
    assert groups_of(layers) == (
        "backbone.conv1", "backbone.layer1", "backbone.layer2", "backbone.layer3", "input_proj",
        "encoder.0", "sampling_offsets", "enc_output", "decoder.0",
    )  # fmt: skip
    paths = [layer.path for layer in layers]
    assert len(set(paths)) == len(paths)
    assert not [path for path in paths if "embed" in path or "pos_trans" in path]


@exact
def test_the_integer_graph_finds_what_the_float_graph_finds(plain: onnx.ModelProto) -> None:
    layers = layers_of(plain)
    integers = quantise(plain, layers, calibrate(plain, layers, feeds(8), LIBRARY, 1))
    kinds = Counter(node.op_type for node in integers.graph.node)
    # In every layer of the two stacks the middle of the feed-forward network is a convolution of one pixel.
    assert kinds["QLinearConv"] == sum(node.op_type == "Conv" for node in plain.graph.node) + FEED_FORWARDS
    assert kinds["MatMulIntegerToFloat"] == len(layers) - kinds["QLinearConv"]
    assert kinds["Conv"] == 0
    for feed in feeds(4, seed=100):
        want, got = run(plain, feed), run(integers, feed)
        assert [value.shape for value in got] == [value.shape for value in want]
        np.testing.assert_allclose(got[1], want[1], atol=MAX_SCORE_ERROR)


def test_an_answer_does_not_depend_on_its_neighbours(plain: onnx.ModelProto) -> None:
    layers = layers_of(plain)
    integers = quantise(plain, layers, calibrate(plain, layers, feeds(4), LIBRARY, 1))
    pictures = draw_pictures(CANVASES[0], ((1.0, 1.0), (0.7, 0.9), (0.9, 0.5)), 7)
    together = run(integers, {"images": pictures.images, "sizes": pictures.sizes})
    for slot in range(3):
        part = slice(slot, slot + 1)
        alone = run(integers, {"images": pictures.images[part], "sizes": pictures.sizes[part]})
        for ours, theirs in zip(alone, together, strict=True):
            np.testing.assert_allclose(ours[0], theirs[slot], atol=ALONE_ATOL)


def test_weights_have_a_scale_for_each_output_channel(plain: onnx.ModelProto) -> None:
    layers = layers_of(plain)
    integers = quantise(plain, layers, calibrate(plain, layers, feeds(2), LIBRARY, 1))
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in integers.graph.initializer}
    floats = {tensor.name: numpy_helper.to_array(tensor) for tensor in plain.graph.initializer}
    seen = 0
    for node in plain.graph.node:
        if f"{node.name}:weight" not in constants or find_stem(node, plain) is not None:
            continue
        seen += 1
        weight, scale = constants[f"{node.name}:weight"], constants[f"{node.name}:weight_scale"]
        assert weight.dtype == np.int8
        assert np.abs(weight.astype(int)).max() == 127
        real = floats[node.input[1]]
        if node.op_type == "MatMul" and weight.ndim == 4:  # as a convolution
            real = real.T[:, :, None, None]
        step = scale.reshape([-1, 1, 1, 1] if weight.ndim == 4 else [1, -1])
        assert (np.abs(weight * step - real) <= step / 2 * 1.001).all()
    assert seen == len(layers) - 1


@exact
def test_the_bias_of_a_channel_that_is_nearly_dead_is_kept(plain: onnx.ModelProto) -> None:
    layers = layers_of(plain)
    model = onnx.ModelProto()
    model.CopyFrom(plain)
    stems = {node.name for node in plain.graph.node if find_stem(node, plain) is not None}
    conv = next(node for node in model.graph.node if node.op_type == "Conv" and node.name not in stems)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, value in ((conv.input[1], 1e-12), (conv.input[2], 0.5)):
        content = numpy_helper.to_array(tensors[name]).copy()
        content[3] = value
        tensors[name].CopyFrom(numpy_helper.from_array(content, name))
    integers = quantise(model, layers, calibrate(model, layers, feeds(2), LIBRARY, 1))
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in integers.graph.initializer}
    written = next(node for node in integers.graph.node if node.name == conv.name)
    x_scale, weight_scale = constants[written.input[1]], constants[written.input[4]][3]
    units = int(constants[f"{conv.name}:bias"][3])
    assert abs(units) <= 2**30  # room for the products beside it
    assert units * float(x_scale) * float(weight_scale) == pytest.approx(0.5, rel=1e-3)


def test_only_the_layers_asked_for_are_integers(plain: onnx.ModelProto) -> None:
    layers = layers_of(plain)
    ranges = calibrate(plain, layers, feeds(2), LIBRARY, 1)
    untouched = quantise(plain, [], ranges)
    feed = feeds(1)[0]
    for ours, theirs in zip(run(untouched, feed), run(plain, feed), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    for group in groups_of(layers):
        chosen = [layer for layer in layers if layer.group == group]
        kinds = Counter(node.op_type for node in quantise(plain, chosen, ranges).graph.node)
        assert kinds["QLinearConv"] + kinds["MatMulIntegerToFloat"] == len(chosen)


@exact
def test_the_first_convolution_takes_bytes_and_sees_the_same_picture(plain: onnx.ModelProto) -> None:
    """In float, over blocks of bytes, it is the same sum; the border of a picture on its canvas included."""
    conv = next(node for node in plain.graph.node if find_stem(node, plain) is not None)
    stem = [layer for layer in layers_of(plain) if layer.group == "backbone.conv1"]
    integers = quantise(plain, stem, calibrate(plain, stem, feeds(4), LIBRARY, 1))
    after = next(node.output[0] for node in plain.graph.node if conv.output[0] in node.input)  # behind its ReLU
    for side in (64, 63):  # 63: a row that blocks of two do not fill
        pictures = draw_pictures(CANVASES[0], ((0.8, 0.7),), 3)
        feed = {"images": np.ascontiguousarray(pictures.images[:, :side]), "sizes": pictures.sizes}
        got, want = (_value(graph, after, feed) for graph in (integers, plain))
        assert got.shape == want.shape
        assert np.abs(got - want).max() <= 0.02 * want.max()
    pixels, casts = {"images"}, 0
    for node in integers.graph.node:  # the picture stays bytes, whatever moves it about
        if node.op_type in ("Transpose", "Cast") and node.input[0] in pixels:
            pixels.add(node.output[0])
            casts += node.op_type == "Cast"
    assert casts == 0


def _value(proto: onnx.ModelProto, tensor: str, feed: Feed) -> np.ndarray:
    probe = onnx.ModelProto()
    probe.CopyFrom(proto)
    if not any(tensor in node.output for node in proto.graph.node):
        twin = next(node for node in proto.graph.node if f"{tensor}:int8" in node.output)
        probe.graph.node.append(
            helper.make_node("DequantizeLinear", [f"{tensor}:int8", *twin.input[6:8]], [tensor], "probe")
        )
    probe.graph.output.append(helper.make_tensor_value_info(tensor, TensorProto.FLOAT, None))
    value: np.ndarray = open_session(probe, LIBRARY, 1).run([tensor], dict(feed))[0]
    return value


def test_without_pictures_there_are_no_ranges(plain: onnx.ModelProto) -> None:
    with pytest.raises(CalibrationError, match="no pictures"):
        calibrate(plain, layers_of(plain), [], LIBRARY, 1)


def test_functions_other_than_the_op_are_written_out(plain: onnx.ModelProto) -> None:
    """A convolution in an op of its own, its weight in another order and its pixels too, is a Conv again."""
    packed = onnx.ModelProto()
    packed.CopyFrom(plain)
    body = onnx.parser.parse_function(
        '<domain: "own", opset_import: ["" : 20]> Packed (x, weight, bias) => (y) {\n'
        "  kernel = Transpose <perm = [1, 0, 2, 3]> (weight)\n"
        "  planes = Transpose <perm = [0, 3, 1, 2]> (x)\n"
        "  conv = Conv (planes, kernel, bias)\n"
        "  y = Transpose <perm = [0, 2, 3, 1]> (conv)\n}"
    )
    nodes, count = [], 0
    constants = {tensor.name: tensor for tensor in packed.graph.initializer}
    for node in plain.graph.node:
        window = {attribute.name: attribute for attribute in node.attribute}
        weight = constants.get(node.input[1]) if node.op_type == "Conv" else None
        if weight is None or list(weight.dims[2:]) != [1, 1] or list(window["strides"].ints) != [1, 1]:
            nodes.append(node)
            continue
        count += 1
        x, y = f"{node.name}:x", f"{node.name}:y"
        weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight).swapaxes(0, 1), weight.name))
        nodes += [
            helper.make_node("Transpose", [node.input[0]], [x], perm=[0, 2, 3, 1]),
            helper.make_node("Packed", [x, *node.input[1:]], [y], node.name, domain="own"),
            helper.make_node("Transpose", [y], [node.output[0]], perm=[0, 3, 1, 2]),
        ]
    assert count > 4
    del packed.graph.node[:], packed.graph.value_info[:]
    packed.graph.node.extend(nodes)
    packed.functions.append(body)
    packed.opset_import.append(helper.make_opsetid("own", 1))
    again = plain_graph(packed)
    assert [layer.path for layer in layers_of(again)] == [layer.path for layer in layers_of(plain)]
    assert [function.name for function in again.functions] == ["MSDeformAttn"]
    transpositions = [Counter(node.op_type for node in graph.graph.node)["Transpose"] for graph in (plain, again)]
    assert transpositions[0] == transpositions[1]
    for ours, theirs in zip(run(again, feeds(1)[0]), run(plain, feeds(1)[0]), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    del packed.functions[-1]
    with pytest.raises(PlainError, match="own::Packed"):
        plain_graph(packed)
