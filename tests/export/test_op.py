"""The op's function body in ONNX Runtime against the reference in PyTorch."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from export import op
from models.msda import reference_ms_deform_attn

ATOL = 2e-5  # measured 1.3e-5 with offsets of 3 pixels on a level 48 wide: float32 locations


def model_of_one_node() -> onnx.ModelProto:
    node = helper.make_node(op.NAME, op.INPUTS, ["output"], domain=op.DOMAIN)
    types = {"spatial_shapes": TensorProto.INT64}
    ranks = {"value": 4, "spatial_shapes": 2, "reference_points": 4, "sampling_offsets": 6, "attention_logits": 4}
    inputs = [
        helper.make_tensor_value_info(name, types.get(name, TensorProto.FLOAT), [None] * ranks[name])
        for name in op.INPUTS
    ]
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, [None] * 3)
    return helper.make_model(
        helper.make_graph([node], "one", inputs, [output]),
        opset_imports=[helper.make_opsetid("", op.OPSET), helper.make_opsetid(op.DOMAIN, op.VERSION)],
        functions=[op.function()],
        ir_version=10,
    )


@pytest.fixture(scope="module")
def session() -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model_of_one_node().SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def run(session: onnxruntime.InferenceSession, inputs: list[Tensor]) -> np.ndarray:
    feeds = {name: tensor.numpy() for name, tensor in zip(op.INPUTS, inputs, strict=True)}
    return session.run(None, feeds)[0]


def random_inputs(
    n: int, shapes: list[tuple[int, int]], heads: int, channels: int, queries: int, points: int, reference: int
) -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    levels, pixels = len(shapes), sum(h * w for h, w in shapes)
    value = torch.randn(n, pixels, heads, channels, generator=random)
    points_at = torch.rand(n, queries, levels, reference, generator=random) * 1.2 - 0.1
    offsets = torch.randn(n, queries, heads, levels, points, 2, generator=random) * 3
    logits = torch.randn(n, queries, heads, levels * points, generator=random)
    return [value, torch.tensor(shapes), points_at, offsets, logits]


@pytest.mark.parametrize("reference", [2, 4])
@pytest.mark.parametrize(
    ("n", "shapes", "heads", "channels", "queries", "points"),
    [
        (2, [(36, 48), (18, 24), (9, 12), (5, 6)], 8, 16, 50, 4),
        (1, [(7, 9)], 4, 8, 20, 3),
        (3, [(5, 4), (5, 4)], 2, 5, 7, 1),
        (2, [(2, 3), (7, 9), (1, 1), (4, 20), (1, 2)], 1, 8, 20, 6),
    ],
)
def test_one_body_serves_every_shape(
    session: onnxruntime.InferenceSession,
    n: int,
    shapes: list[tuple[int, int]],
    heads: int,
    channels: int,
    queries: int,
    points: int,
    reference: int,
) -> None:
    inputs = random_inputs(n, shapes, heads, channels, queries, points, reference)
    np.testing.assert_allclose(run(session, inputs), reference_ms_deform_attn(*inputs).numpy(), atol=ATOL)


def test_nothing_is_read_from_beyond_a_level(session: onnxruntime.InferenceSession) -> None:
    """Points a pixel, a level and a mile outside give zero, although other levels lie there on the plane."""
    inputs = random_inputs(1, [(6, 8), (3, 4), (2, 2)], 2, 4, 400, 4, 2)
    inputs[0] = inputs[0].abs() + 1
    inputs[3] = inputs[3].sign() * torch.tensor([10.0, 40.0, 1e4, 1e30])[:, None]
    assert np.abs(run(session, inputs)).max() == 0


@pytest.mark.parametrize("beyond", [-0.75, -0.25, 0.25, 0.75])
def test_the_border_fades_to_zero(session: onnxruntime.InferenceSession, beyond: float) -> None:
    """A constant level of ones, sampled across its lower border: bilinear between one and the zeros outside."""
    value = torch.ones(1, 12 + 4, 1, 1)
    place = torch.tensor([0.5, 1.0]).expand(1, 1, 2, 2).clone()
    offsets = torch.zeros(1, 1, 1, 2, 1, 2)
    offsets[..., 1] = beyond
    logits = torch.tensor([50.0, -50.0]).view(1, 1, 1, 2)  # the first level alone
    got = run(session, [value, torch.tensor([[3, 4], [2, 2]]), place, offsets, logits])
    assert got.item() == pytest.approx(min(1.0, max(0.0, 0.5 - beyond)), abs=1e-6)


def test_schema_and_function_agree() -> None:
    op.register_schema()
    op.register_schema()  # twice is once
    schema = onnx.defs.get_schema(op.NAME, op.VERSION, op.DOMAIN)
    function = op.function()
    assert tuple(value.name for value in schema.inputs) == op.INPUTS == tuple(function.input)
    assert tuple(value.name for value in schema.outputs) == ("output",) == tuple(function.output)
    assert not schema.attributes
    assert not function.attribute
    onnx.checker.check_model(model_of_one_node(), full_check=True)
