"""Which layers become ops of the native library, and that the graph computes the same."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper, parser

from export.native_layers import functions, use_native_layers
from export.op import DOMAIN

ATOL = 1e-5  # the same sums in another order
C = 32


def graph(body: str, **weights: tuple[int, ...]) -> onnx.ModelProto:
    """x [N, 32, H, W] -> y, through `body`, with random weights of these shapes."""
    random = np.random.default_rng(0)
    text = f"""
        <ir_version: 10, opset_import: ["" : 20]>
        g (float[N, {C}, H, W] x) => (float[N, K, OH, OW] y) {{ {body} }}
    """
    model = parser.parse_model(text)
    for name, shape in weights.items():
        array: NDArray[np.float32] = random.standard_normal(shape).astype(np.float32) / np.float32(10)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def rewritten(model: onnx.ModelProto) -> onnx.ModelProto:
    converted = ir.from_proto(model)
    use_native_layers(converted)
    proto = ir.to_proto(converted)
    proto.functions.extend(functions({node.op_type for node in proto.graph.node if node.domain == DOMAIN}))
    onnx.checker.check_model(proto)
    return proto


def types(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def run(model: onnx.ModelProto) -> NDArray[np.float32]:
    random = np.random.default_rng(1)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    x = random.standard_normal((2, C, 9, 11)).astype(np.float32)
    answer: NDArray[np.float32] = session.run(None, {"x": x})[0]
    return answer


SAME = "pads = [1, 1, 1, 1]"
BLOCK = f"""
    a = Conv <{SAME}> (x, w1, b1)
    b = Relu (a)
    c = Conv <{SAME}> (b, w2, b2)
    d = {{addition}}
    y = Relu (d)
"""
BLOCK_WEIGHTS: dict[str, tuple[int, ...]] = {"w1": (C, C, 3, 3), "b1": (C,), "w2": (C, C, 3, 3), "b2": (C,)}


@pytest.mark.parametrize("addition", ["Add (c, x)", "Add (x, c)", "Sum (c, x)"])
def test_a_residual_block_is_two_ops_between_two_transpositions(addition: str) -> None:
    model = graph(BLOCK.format(addition=addition), **BLOCK_WEIGHTS)
    model.graph.value_info.append(onnx.helper.make_tensor_value_info("c", onnx.TensorProto.FLOAT, ["N", C, "H", "W"]))
    got = rewritten(model)
    assert types(got) == ["Transpose", "NhwcConvRelu", "NhwcConvAddRelu", "Transpose"]
    np.testing.assert_allclose(run(got), run(model), atol=ATOL)


def test_an_addition_that_may_broadcast_stays() -> None:
    model = graph(BLOCK.format(addition="Add (c, s)"), **BLOCK_WEIGHTS, s=(1, C, 1, 1))
    got = rewritten(model)
    assert types(got) == ["Transpose", "NhwcConvRelu", "NhwcConv", "Transpose", "Add", "Relu"]
    np.testing.assert_allclose(run(got), run(model), atol=ATOL)


def test_strides_and_windows_are_kept() -> None:
    body = "a = Conv <strides = [2, 1], dilations = [1, 2], pads = [2, 0, 1, 3]> (x, w, b) y = Relu (a)"
    model = graph(body, w=(64, C, 5, 3), b=(64,))
    got = rewritten(model)
    assert types(got) == ["Transpose", "NhwcConvRelu", "Transpose"]
    np.testing.assert_allclose(run(got), run(model), atol=ATOL)


def test_what_is_used_twice_is_not_swallowed() -> None:
    model = graph(f"a = Conv <{SAME}> (x, w, b) r = Relu (a) y = Mul (r, a)", w=(C, C, 3, 3), b=(C,))
    got = rewritten(model)
    assert types(got) == ["Transpose", "NhwcConv", "Transpose", "Relu", "Mul"]
    np.testing.assert_allclose(run(got), run(model), atol=ATOL)


@pytest.mark.parametrize(
    ("node", "weights"),
    [
        ("Conv <group = 2> (x, w, b)", {"w": (C, C // 2, 1, 1), "b": (C,)}),
        ("Conv (x, w, b)", {"w": (40, C, 1, 1), "b": (40,)}),
        ("Conv (x, w)", {"w": (C, C, 1, 1)}),
        ('Conv <auto_pad = "SAME_UPPER"> (x, w, b)', {"w": (C, C, 3, 3), "b": (C,)}),
        ("ConvTranspose (x, w, b)", {"w": (C, C, 3, 3), "b": (C,)}),
    ],
)
def test_others_stay_as_they_are(node: str, weights: dict[str, tuple[int, ...]]) -> None:
    model = graph(f"y = {node}", **weights)
    assert types(rewritten(model)) == types(model)


def test_linear_layers_take_their_bias_along() -> None:
    """One that two uses share is one weight; without a bias, or with one that is no vector of K, it stays."""
    body = """
        t = Transpose <perm = [0, 2, 3, 1]> (x)
        m = MatMul (t, w) a = Add (m, b) h = Relu (a)
        n = MatMul (h, w) c = Add (b, n)
        d = Add (c, t)
        e = MatMul (d, w)
        f = MatMul (e, w) y = Add (f, s)
    """
    model = graph(body, w=(C, C), b=(C,), s=(1,))
    for name in ("c", "t"):
        info = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", "H", "W", C])
        model.graph.value_info.append(info)
    got = rewritten(model)
    assert types(got) == ["Transpose", "LinearRelu", "LinearAdd", "MatMul", "MatMul", "Add"]
    assert sorted(list(tensor.dims) for tensor in got.graph.initializer) == [[1], [1, C, 32], [C], [C, C]]
    np.testing.assert_allclose(run(got), run(model), atol=ATOL)
