"""The ranges of a graph's tensors on pictures that are like those it will see."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper

from export.quantisable import Layer, Wiring

Feed = Mapping[str, NDArray[np.generic]]
"""The served graph's inputs of one batch."""
Ranges = Mapping[str, tuple[float, float]]
"""A tensor's name to its smallest and largest value, on calibration pictures."""


class CalibrationError(ValueError):
    """The pictures give no ranges; the message says why."""


def calibrate(
    proto: onnx.ModelProto, layers: Sequence[Layer], feeds: Iterable[Feed], library: Path | None, threads: int
) -> dict[str, tuple[float, float]]:
    """The range of every tensor that `quantise` may turn into integers, over all `feeds`.

    library: the native kernel's, for ONNX Runtime; threads: its number of threads.
    """
    probe = onnx.ModelProto()
    probe.CopyFrom(proto)
    graph = Wiring(probe)
    tensors = sorted({t for layer in layers for t in graph.touched(graph.node[layer.node])})
    for tensor in tensors:
        for reduce in ("ReduceMin", "ReduceMax"):
            probe.graph.node.append(helper.make_node(reduce, [tensor], [f"{tensor}:{reduce}"], keepdims=0))
            probe.graph.output.append(helper.make_tensor_value_info(f"{tensor}:{reduce}", TensorProto.FLOAT, []))
    session = open_session(probe, library, threads)
    names = [value.name for value in session.get_outputs()][len(proto.graph.output) :]
    rows = np.array([session.run(names, dict(feed)) for feed in feeds], np.float32)  # [pictures, 2 * tensors]
    if not rows.size:
        raise CalibrationError("there are no pictures to take ranges from")
    if not np.isfinite(rows).all():
        raise CalibrationError("on these pictures a layer's values are not finite numbers")
    low, high = rows[:, ::2].min(0), rows[:, 1::2].max(0)
    return {tensor: (float(low[i]), float(high[i])) for i, tensor in enumerate(tensors)}


def is_of_onnxruntime(error: BaseException) -> bool:
    """Whether ONNX Runtime raised it: its exceptions have no base of their own."""
    return type(error).__module__.startswith("onnxruntime.")


def open_session(proto: onnx.ModelProto, library: Path | None, threads: int) -> onnxruntime.InferenceSession:
    """The model in ONNX Runtime on the CPU, with the native kernel if its library is given."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
