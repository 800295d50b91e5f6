"""A real bundle whose network is a few ONNX nodes: it finds the box of all pixels brighter than 128."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bundle import Bundle, ModelName, write_bundle
from tests.server.fake_engine import BRIGHT, MANIFEST

LABEL = 2
SCORE = 0.75


def write_tiny_bundle(
    folder: Path, version: str = MANIFEST.model.version, label: int = LABEL, *, bright: int = BRIGHT, proof: bytes = b""
) -> Bundle:
    """Write the bundle, with MANIFEST's rule and canvases, into `folder`. It labels what is brighter than `bright`."""
    manifest = MANIFEST.model_copy(update={"model": ModelName(name=MANIFEST.model.name, version=version)})
    files = {"model.onnx": tiny_model(label, bright).SerializeToString()} | ({"proof.npz": proof} if proof else {})
    return write_bundle(folder, manifest, files)


def tiny_model(label: int = LABEL, bright: int = BRIGHT) -> onnx.ModelProto:
    """images uint8 [N,H,W,3], sizes int64 [N,2] -> boxes [N,1,4], scores [N,1], labels [N,1]."""
    constants = {
        "bright": np.array(bright, np.float32),
        "score": np.array(SCORE, np.float32),
        "label": np.array(label, np.int64),
        "one": np.array(1, np.int64),
        "axis_1": np.array([1], np.int64),
        "axis_2": np.array([2], np.int64),
        "axis_3": np.array([3], np.int64),
        "axes_hw": np.array([1, 2], np.int64),
        "columns_1032": np.array([1, 0, 1, 0], np.int64),
    }
    node = helper.make_node
    nodes = [
        node("Cast", ["images"], ["pixels"], to=TensorProto.FLOAT),
        node("ReduceMax", ["pixels", "axis_3"], ["brightest"], keepdims=0),  # [N, H, W]
        node("Greater", ["brightest", "bright"], ["mask"]),
        node("Cast", ["mask"], ["lit"], to=TensorProto.FLOAT),
        node("ReduceMax", ["lit", "axis_1"], ["columns"], keepdims=0),  # [N, W]
        node("ReduceMax", ["lit", "axis_2"], ["rows"], keepdims=0),  # [N, H]
        node("ArgMax", ["columns"], ["x0"], axis=1, keepdims=1),
        node("ArgMax", ["columns"], ["last_x"], axis=1, keepdims=1, select_last_index=1),
        node("ArgMax", ["rows"], ["y0"], axis=1, keepdims=1),
        node("ArgMax", ["rows"], ["last_y"], axis=1, keepdims=1, select_last_index=1),
        node("Add", ["last_x", "one"], ["x1"]),
        node("Add", ["last_y", "one"], ["y1"]),
        node("Concat", ["x0", "y0", "x1", "y1"], ["box_px"], axis=1),  # [N, 4]
        node("Gather", ["sizes", "columns_1032"], ["whwh"], axis=1),  # sizes are (h, w)
        node("Cast", ["box_px"], ["box_px_float"], to=TensorProto.FLOAT),
        node("Cast", ["whwh"], ["whwh_float"], to=TensorProto.FLOAT),
        node("Div", ["box_px_float", "whwh_float"], ["box"]),
        node("Unsqueeze", ["box", "axis_1"], ["boxes"]),
        node("ReduceMax", ["lit", "axes_hw"], ["found"], keepdims=0),  # [N]
        node("Unsqueeze", ["found", "axis_1"], ["found_column"]),
        node("Mul", ["found_column", "score"], ["scores"]),
        node("Mul", ["x0", "label"], ["zero_or_more"]),
        node("Sub", ["zero_or_more", "zero_or_more"], ["zeros"]),
        node("Add", ["zeros", "label"], ["labels"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [
            helper.make_tensor_value_info("images", TensorProto.UINT8, ["N", "H", "W", 3]),
            helper.make_tensor_value_info("sizes", TensorProto.INT64, ["N", 2]),
        ],
        [
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, ["N", 1, 4]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", 1]),
            helper.make_tensor_value_info("labels", TensorProto.INT64, ["N", 1]),
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return model
