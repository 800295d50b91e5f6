"""A network in float16: what it answers, and what types its graph has."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto

import plugins
from export import op
from export.build import PLUGIN_LAYER, parse
from export.flavour import FLAVOURS, NotInstalled
from export.precision import to_half
from export.trace import trace
from tests.export.small import build, small

ATOL = 5e-3  # of boxes in 0..1 and of scores; measured 1.4e-3, ten bits and some layers
HEADS = 2 + 3  # reference points, classes, and the three layers of the boxes


@pytest.fixture(scope="module")
def half() -> onnx.ModelProto:
    model = build(small("r50"))
    to_half(model)
    return trace(model)


@pytest.fixture(scope="module")
def full() -> onnx.ModelProto:
    return trace(build(small("r50")))


def run(model: onnx.ModelProto) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 96, 3), np.uint8)
    return session.run(None, {"images": images, "sizes": np.array([[64, 96], [60, 50]])})


def test_answers_are_nearly_those_of_float32(half: onnx.ModelProto, full: onnx.ModelProto) -> None:
    for got, wanted in zip(run(half), run(full), strict=True):
        assert got.dtype == wanted.dtype, "a bundle's outputs are float32 in every precision"
        np.testing.assert_allclose(got, wanted, atol=ATOL)


def test_weights_are_half_but_for_the_heads(half: onnx.ModelProto, full: onnx.ModelProto) -> None:
    def matrices(model: onnx.ModelProto) -> Counter[int]:
        return Counter(weight.data_type for weight in model.graph.initializer if len(weight.dims) in (2, 4))

    assert half.ByteSize() < 0.7 * full.ByteSize()
    stayed = matrices(half)[TensorProto.FLOAT]
    assert matrices(half)[TensorProto.FLOAT16] == matrices(full)[TensorProto.FLOAT] - stayed > 3 * stayed


def test_tensorrt_computes_in_half(half: onnx.ModelProto) -> None:
    rtx = FLAVOURS["rtx"]
    try:
        rtx.load()
    except NotInstalled as error:
        pytest.skip(str(error))
    if plugins.tensorrt_library() is None:
        pytest.skip("the TensorRT plugin was not built: no nvcc, or no TensorRT headers")
    report = parse(half, rtx).report()
    assert set(report.plugin_inputs) == {("half", "int64", "float", "half", "half")}
    assert report.count(PLUGIN_LAYER, "half") == sum(node.domain == op.DOMAIN for node in half.graph.node) == 2
    assert report.count("CONVOLUTION", "half") == report.count("CONVOLUTION") > 0
    assert report.count("MATRIX_MULTIPLY", "float") == HEADS
