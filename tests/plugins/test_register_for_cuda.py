"""What the ONNX Runtime library leaves out for sessions on CUDA: the ops without a kernel there."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import plugins
from tests.plugins.cases import Case as MsdaCase
from tests.plugins.test_conv import Case
from tests.plugins.test_onnxruntime_op import one_node

LIBRARY = plugins.onnxruntime_library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the native library is not built")


@contextmanager
def for_cuda() -> Iterator[None]:
    choose = ctypes.CDLL(str(LIBRARY)).msda_register_for_cuda
    choose(1)
    try:
        yield
    finally:
        choose(0)


def session(model: onnx.ModelProto, optimised: Path | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    options.register_custom_ops_library(str(LIBRARY))
    return ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def test_convolutions_are_the_functions_of_the_file(tmp_path: Path) -> None:
    """On the CPU, as there is no GPU here: what is registered does not depend on where it runs."""
    case = Case("conv")
    inputs = case.draw()
    model = case.model(inputs, with_function=True)
    given = {"x": inputs["x"]}
    native = session(model, tmp_path / "native.onnx")
    with for_cuda():
        as_function = session(model, tmp_path / "function.onnx")
    again = session(model, tmp_path / "again.onnx")
    found = {
        name: "NhwcConv" in {node.op_type for node in onnx.load(tmp_path / f"{name}.onnx").graph.node}
        for name in ("native", "function", "again")
    }
    assert found == {"native": True, "function": False, "again": True}
    np.testing.assert_allclose(as_function.run(None, given)[0], native.run(None, given)[0], atol=case.atol)
    np.testing.assert_array_equal(again.run(None, given)[0], native.run(None, given)[0])


def test_the_attention_is_there_for_both() -> None:
    inputs = MsdaCase("").draw()
    with for_cuda():
        got = session(one_node()).run(None, inputs)[0]
    np.testing.assert_array_equal(got, session(one_node()).run(None, inputs)[0])


def test_it_is_this_threads_choice() -> None:
    case = Case("conv")
    model = case.model(case.draw())  # without the function it needs the op
    failed: list[BaseException] = []

    def elsewhere() -> None:
        try:
            session(model)
        except Exception as error:
            failed.append(error)

    with for_cuda():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        with pytest.raises(Exception, match="NhwcConv"):
            session(model)
    assert failed == []
